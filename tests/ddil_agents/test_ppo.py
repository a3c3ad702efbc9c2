"""Facts about PPO, the outside reference: it learns, it is counted and seeded, and its runs are read and compared as a learner's are."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import batched, mixture, student
from PIL import Image
from safetensors.torch import load_file
from stable_baselines3.common.evaluation import evaluate_policy
from tiny_sd import write_tiny_sd
from torch import Tensor

from ddil_agents import BCConfig, BehaviourCloning, compare, evaluate, ppo, report
from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.load import load_run
from ddil_agents.ppo import PPOAgent, PPOConfig
from ddil_agents.training.metrics import read_metrics
from ddil_env import GaussianMixtureExpert, load_expert, unroll
from ddil_env.sb3 import SB3Policy

pytestmark = pytest.mark.usefixtures("elsewhere")


def small(**options: Any) -> PPOConfig:
    """Two rollouts of 40 steps, each learned from in 4 gradient steps."""
    return PPOConfig(**{"num_updates": 8, "num_envs": 10, "batch_size": 20, "hidden": (16,), "teacher_steps": 8, "epochs": 2, **options})


def test_ppo_improves_its_reward() -> None:
    expert = GaussianMixtureExpert([[0.5, -0.5]], 0.2)
    config = PPOConfig(num_updates=800, num_steps=2, teacher_steps=2, num_envs=50, batch_size=50, hidden=(32, 32))
    agent = PPOAgent(expert, config)
    env = batched(expert, 200, 2)

    def score() -> float:
        env.seed(1)
        return float(evaluate_policy(SB3Policy(agent.student_policy), env, n_eval_episodes=200, warn=False)[0])

    before = score()
    agent.learn(progress=False)
    assert agent.model.num_timesteps == 4000
    assert before < 10 * score() < 0


def test_a_single_rollout_is_learned_from() -> None:
    agent = PPOAgent(mixture(), small(num_updates=4))
    before = {key: value.clone() for key, value in agent.student.state_dict().items()}
    agent.learn(progress=False)
    assert any(not torch.equal(value, before[key]) for key, value in agent.student.state_dict().items())


@pytest.mark.parametrize(("asked", "taken"), [(1, 4), (5, 4), (7, 8), (12, 12)])
def test_gradient_steps_are_those_of_whole_rollouts(asked: int, taken: int) -> None:
    agent = PPOAgent(mixture(), small(num_updates=asked)).learn(progress=False)
    assert agent.step == agent.total_updates == taken
    assert agent.model.num_timesteps == taken * 10
    assert agent.learn(5, progress=False).step == taken + 4


def test_its_first_student_is_the_learners() -> None:
    expert = mixture()
    learner = BehaviourCloning(expert, BCConfig(seed=4, student={"width": 16}))
    agent = PPOAgent(expert, small(seed=4, student={"width": 16}))
    ours, theirs = agent.ema_student.state_dict(), learner.student.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_its_policy_is_the_models_own() -> None:
    agent = PPOAgent(mixture(), small()).learn(progress=False)
    env = batched()
    env.seed(0)
    observation = env.reset()
    action, _ = SB3Policy(agent.student_policy).predict(observation)
    assert np.array_equal(action, agent.model.predict(observation, deterministic=True)[0])
    assert agent.student_policy.nfe_per_action == 1


def test_a_seed_is_one_run_and_the_callers_generators_are_left_alone() -> None:
    outside: list[Any] = []
    students = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        np.random.seed(before)
        agent = PPOAgent(mixture(), small(seed=seed)).learn(progress=False)
        outside.append((torch.rand(1).item(), np.random.rand()))
        students.append(agent.ema_student.state_dict())
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
    assert any(not torch.equal(students[0][key], students[2][key]) for key in students[0])
    assert outside[0] == outside[2] != outside[1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_its_cost_is_counted(guidance: float) -> None:
    expert = mixture()
    agent = PPOAgent(expert, small(guidance_scale=guidance, student={"width": 16}))
    forwards = []
    agent.model.policy.features_extractor.register_forward_hook(lambda module, given, result: forwards.append(len(result)))
    before = expert.nfe
    agent.learn(progress=False).learn(4, progress=False)
    assert agent.step == 12
    assert agent.teacher_nfe == expert.nfe - before == 120 * 2 * (2 if guidance > 1 else 1)
    assert agent.student_nfe == sum(forwards)


def test_what_is_saved_acts_as_before_bit_for_bit(tmp_path: Path) -> None:
    agent = PPOAgent(mixture(), small()).learn(progress=False)
    agent.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["student.safetensors"]
    again = PPOAgent(mixture(), small(seed=9))
    grid, x_T, c = agent.grid, torch.randn(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 1])
    path = unroll(agent.student_policy, grid, x_T, c)
    assert not torch.equal(unroll(again.student_policy, grid, x_T, c), path)
    assert torch.equal(unroll(again.load(tmp_path / "run").student_policy, grid, x_T, c), path)
    with pytest.raises(ValueError, match="does not fit"):
        PPOAgent(mixture(), small(student={"width": 8})).load(tmp_path / "run")


def test_a_learner_and_ppo_itself_can_start_from_what_ppo_taught(tmp_path: Path) -> None:
    PPOAgent(mixture(), small()).learn(progress=False).save(tmp_path / "run")
    learner = BehaviourCloning(mixture(), BCConfig(init=str(tmp_path / "run")))
    taught = load_file(tmp_path / "run" / "student" / "student.safetensors")
    assert all(torch.equal(value, taught[key]) for key, value in learner.student.state_dict().items())
    agent = PPOAgent(mixture(), small(init=str(tmp_path / "run"), seed=3))
    assert all(torch.equal(value, taught[key]) for key, value in agent.student.state_dict().items())


def test_a_policy_that_diverges_stops_the_run() -> None:
    agent = PPOAgent(mixture(), small(learning_rate=1e30))
    with pytest.raises(FloatingPointError, match="the policy is not finite after rollout 1; lower learning_rate"):
        agent.learn(progress=False)


def test_a_pipelines_student_is_trained(tmp_path: Path) -> None:
    expert = load_expert("sd15", model=str(write_tiny_sd(tmp_path / "tiny_sd")), prompts=["a bee", "two seas"])
    options: dict[str, Any] = {"num_updates": 4, "num_steps": 2, "teacher_steps": 2, "num_envs": 2, "batch_size": 4}
    agent = PPOAgent(expert, small(**options)).learn(progress=False)
    agent.save(tmp_path / "run")
    x_T, c = torch.randn(2, *expert.sample_shape), torch.tensor([0, 1])
    path = unroll(agent.student_policy, agent.grid, x_T, c)
    again = PPOAgent(expert, small(**options, seed=1)).load(tmp_path / "run")
    assert torch.equal(unroll(again.student_policy, agent.grid, x_T, c), path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_updates": 0}, "num_updates=0: need at least 1"),
        ({"seed": -1}, "seed=-1: need 0 or more"),
        ({"batch_size": 30}, "batch_size=30: need a divisor, at least 2, of num_envs · episodes · num_steps = 40, a rollout"),
        ({"batch_size": 1}, "batch_size=1: need a divisor, at least 2"),
        ({"teacher_steps": 6}, "teacher_steps=6 is not a multiple of num_steps=4"),
        ({"hidden": (8, 0)}, r"hidden=\(8, 0\): need at least one unit in every layer"),
        ({"gamma": 1.1}, r"gamma=1.1: need a number in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: need a positive, finite number"),
        ({"action_bound": math.inf}, "action_bound=inf: need a positive, finite number"),
        ({"log_std_init": math.nan}, "log_std_init=nan: need a finite number"),
        ({"ent_coef": -1.0}, "ent_coef=-1.0: need 0 or more"),
        ({"student": {"colour": 3}}, "unexpected keyword argument 'colour'; this expert's students take width, depth"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf: need a finite number"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOAgent(mixture(), small(**options))


# The command

SMALL = shlex.split(
    "--num_updates 8 --num_envs 10 --batch_size 20 --hidden [16] --teacher_steps 8 --epochs 2 --evaluate.n 30 --evaluate.n_action 10"
)
ENV = ["--env", "gaussian_mixture"]


def quietly(argv: list[str]) -> None:
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
        ppo.main(argv)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "ppo"
    quietly([*ENV, *SMALL, "--out", str(out)])
    return out


def test_a_run_directory_is_a_learners(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "result.json", "student", "samples.png", "tensorboard"}
    assert all(torch.isfinite(value).all() for value in student(run).values())
    with Image.open(run / "samples.png") as picture:
        assert min(picture.size) > 100
    assert any((run / "tensorboard").iterdir())
    assert yaml.safe_load((run / "config.yaml").read_text())["agent"] == "ppo"

    rows = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["timesteps"]) for row in rows] == [(4, 40), (8, 80)]
    for row in rows:
        assert row["loss"] > 0
        assert row["action_std"] == pytest.approx(math.exp(-2), rel=0.1)
        assert row["teacher_nfe"] == 2 * row["timesteps"]

    result = json.loads((run / "result.json").read_text())
    assert (result["agent"], result["env"], result["student"], result["training_seed"]) == ("ppo", "gaussian_mixture", "ppo@4", 0)
    assert (result["num_updates"], result["teacher_nfe"], result["student_nfe"]) == (8, 160, 80 * 3 + 20)
    assert list(result["models"]) == ["teacher@8", "teacher@4", "ppo@4"]
    own = result["models"]["ppo@4"]
    assert own["nfe_per_sample"] == 4
    assert len(own["action_mse_own"]) == 4
    assert own["endpoint_rmse"] > 0.05  # 80 steps teach nothing


def test_a_run_loads_and_is_judged_as_a_learners(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_agent("ppo") is PPOAgent
    agent = load_run(run)
    assert isinstance(agent, PPOAgent)
    saved = student(run)
    assert all(torch.equal(value, saved[key]) for key, value in agent.ema_student.state_dict().items())
    evaluate.main(["--run", str(run), "--n", "30", "--n_action", "10", "--out", "again.json"])
    assert "ppo@4" in capsys.readouterr().out
    (again,), own = json.loads(Path("again.json").read_text()), json.loads((run / "result.json").read_text())["models"]["ppo@4"]
    for key in ("frechet", "frechet_to_expert", "endpoint_rmse", "action_mse_own", "action_mse_expert"):
        assert again["models"]["ppo@4"][key] == own[key]


def test_a_run_reruns_from_its_config_and_begins_again_where_it_was_cut_short(run: Path) -> None:
    quietly(["--config", str(run / "config.yaml"), "--out", "again"])
    Path("again/result.json").unlink()
    (Path("again") / "student" / "student.safetensors").unlink()
    quietly(["--resume", "again"])
    ours, theirs = student(run), student(Path("again"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [row["step"] for row in read_metrics(Path("again/metrics.jsonl"))] == [4, 8]


def test_a_report_and_a_comparison_take_ppo_and_a_learner_alike() -> None:
    shared = {"num_updates": 8, "num_steps": 2, "teacher_steps": 4, "evaluate": {"n": 20, "n_paths": 10, "n_action": 5}}
    arms = {"bc": {"agent": "bc", "collect_size": 64}, "ppo": {"agent": "ppo", "num_envs": 10, "batch_size": 20, "epochs": 2}}
    given = {"env": "gaussian_mixture", "arms": arms, "shared": shared, "seeds": 1, "equal": ["updates", "teacher_nfe"]}
    Path("given.yaml").write_text(yaml.safe_dump(given))
    compare.main(["--config", "given.yaml", "--out", "out", "--jobs", "1"])
    found = json.loads(Path("out/comparison.json").read_text())
    runs = {(budget, r["arm"]): r for budget, tier in found["budgets"].items() for r in tier["runs"]}
    assert all(r["done"] for r in runs.values())
    assert runs["updates", "ppo"]["num_updates"] == runs["updates", "bc"]["num_updates"] == 8
    assert runs["updates", "ppo"]["teacher_nfe"] == 160
    assert runs["teacher_nfe", "ppo"]["num_updates"] == 6  # 128 forwards: 3.2 rollouts of 20 steps
    assert found["initial"]["ppo"]["0"]["endpoint_rmse"] == found["initial"]["bc"]["0"]["endpoint_rmse"]  # one untrained student
    assert Path("out/runs/updates/ppo-s0/trajectories.safetensors").is_file()
    assert "<html" in Path("out/report.html").read_text()
    report.main(["out/runs/updates/bc-s0", "out/runs/updates/ppo-s0", "--out", "page"])
    assert "ppo@2" in Path("page/report.md").read_text()


def test_what_ppo_does_not_know_is_refused_by_name_in_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    Path("given.yaml").write_text(yaml.safe_dump({"arms": {"ppo": {"agent": "ppo"}}, "shared": {"collect_size": 16}}))
    for argv, key in ((["--agents", "ppo", "--betas", "student"], "beta"), (["--config", "given.yaml"], "collect_size")):
        with pytest.raises(SystemExit):
            compare.main([*argv, *ENV, "--out", "out"])
        error = capsys.readouterr().err
        assert "arm ppo: " in error
        assert key in error
    assert not Path("out").exists()


def test_without_stable_baselines3_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ddil_agents.ppo")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ValueError, match=r"agent 'ppo': .*stable_baselines3"):
        find_agent("ppo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_update", "80"], "did you mean --num_updates"),
        (["--batch_size", "30"], "batch_size=30: need a divisor"),
        (["--beta.student", "1"], "--beta.student"),
        (["--evaluate.n", "3"], "n=3: the metrics need at least 10 samples"),
        (["--evaluate.extractor", "vgg"], "vgg"),
        (["--evaluate.also_steps", "[1000]"], "num_steps=1000: need a whole number from 1 to 999"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        ppo.main([*ENV, *SMALL, *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m ddil_agents.ppo: error: ")
    assert message in error
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ppo.main([*ENV, *SMALL, "--out", str(run)])
    assert "exists and is not empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists and is not empty; choose another"):
        PPOAgent(mixture(), small()).learn(out=run, progress=False)


def test_unlabelled_latents_of_any_shape_are_learned_from() -> None:
    expert = mixture((2, 3, 4), labelled=False)
    agent = PPOAgent(expert, small(num_steps=2, num_updates=4, batch_size=10)).learn(progress=False)
    samples: Tensor = unroll(agent.student_policy, agent.grid, torch.randn(3, 2, 3, 4))[:, -1]
    assert samples.shape == (3, 2, 3, 4)
