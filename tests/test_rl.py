"""Facts about stable-baselines3 on the diffusion MDP: the vector environment, the policy wrapper, and PPO as the outside reference."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize
from tiny_sd import write_tiny_sd
from torch import Tensor

from ddil_agents import BCConfig, BehaviourCloning, Evaluation, Judge, rl
from ddil_agents.rl import PPOAgent, PPOConfig, load_agent
from ddil_agents.train import read_metrics
from ddil_env import (
    DenoisingGymEnv,
    DenoisingVectorEnv,
    Expert,
    ExpertPolicy,
    GaussianMixtureExpert,
    StudentPolicy,
    TimeGrid,
    load_expert,
    unroll,
)
from ddil_env.mdp import Kernel
from ddil_env.sb3 import SB3Policy, SB3VecEnv

ACTORS: tuple[rl.Actor, ...] = ("plain", "scaled", "student")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything runs in an empty directory, and leaves torch's generator alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "sb3"))
    with torch.random.fork_rng():
        yield


@cache
def mixture(shape: tuple[int, ...] = (2,), labelled: bool = True) -> GaussianMixtureExpert:
    """Four modes, in two classes if labelled."""
    means = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixtureExpert(means, [0.1, 0.2, 0.3, 0.4], labels=[0, 0, 1, 1] if labelled else None)


def batched(expert: Expert | None = None, n: int = 5, num_steps: int = 3, **options: Any) -> SB3VecEnv:
    """Our environments as stable-baselines3's, with the action box and the reward that PPO needs."""
    given: dict[str, Any] = {"reward": "expert_l2", "action_bound": 5.0, "autoreset_mode": "SameStep", **options}
    return SB3VecEnv(DenoisingVectorEnv(expert or mixture(), n, num_steps, **given))


def one_by_one(expert: Expert | None = None, n: int = 5, num_steps: int = 3, **options: Any) -> DummyVecEnv:
    """The same as so many single environments, by stable-baselines3's own means."""
    given: dict[str, Any] = {"reward": "expert_l2", "action_bound": 5.0, **options}
    return DummyVecEnv([lambda: DenoisingGymEnv(expert or mixture(), num_steps, **given) for _ in range(n)])


def student_policy(expert: Expert | None = None, seed: int = 0) -> StudentPolicy:
    """A student with random weights."""
    expert = expert or mixture()
    torch.manual_seed(seed)
    return StudentPolicy(expert.make_student(width=16).eval(), expert)


def small(**options: Any) -> PPOConfig:
    return PPOConfig(**{"timesteps": 80, "num_envs": 10, "batch_size": 20, "hidden": (16,), "teacher_steps": 8, "epochs": 2, **options})


# The vector environment


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_lives_the_episodes_of_single_environments(kernel: Kernel, labelled: bool) -> None:
    ours, theirs = batched(mixture((2,), labelled), kernel=kernel), one_by_one(mixture((2,), labelled), kernel=kernel)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for env in (ours, theirs):
        env.seed(7)
    rng = np.random.default_rng(0)
    observation, expected = ours.reset(), theirs.reset()
    for step in range(7):  # two episodes, and the first step of a third
        assert observation.keys() == expected.keys()
        for key in observation:
            assert observation[key].dtype == expected[key].dtype
            np.testing.assert_allclose(observation[key], expected[key], atol=1e-6, err_msg=f"{key} at {step}")
        action = rng.normal(size=(5, 2)).astype(np.float32)
        (observation, reward, done, infos), (expected, their_reward, their_done, their_infos) = ours.step(action), theirs.step(action)
        assert (reward.dtype, done.dtype) == (their_reward.dtype, their_done.dtype)
        np.testing.assert_allclose(reward, their_reward, rtol=1e-4, atol=1e-6)
        assert done.tolist() == their_done.tolist() == [step % 3 == 2] * 5
        for info, their_info in zip(infos, their_infos, strict=True):
            assert info.keys() == their_info.keys()
            assert info["TimeLimit.truncated"] is False
            if "terminal_observation" in info:
                assert float(info["terminal_observation"]["t"][0]) == 0
                for key, value in info["terminal_observation"].items():
                    np.testing.assert_allclose(value, their_info["terminal_observation"][key], atol=1e-6)
        assert ours.reset_infos == [{}] * 5


def test_a_seed_is_used_once_and_an_unseeded_reset_goes_on() -> None:
    env = batched()
    env.seed(3)
    first, second = env.reset()["x_t"], env.reset()["x_t"]
    assert not np.isclose(first, second).any()
    env.seed(3)
    assert np.array_equal(env.reset()["x_t"], first)
    assert np.array_equal(env.reset()["x_t"], second)


def test_reset_options_choose_the_starts() -> None:
    env = batched()
    env.set_options([{"x_t": np.full(2, i), "t": 500.0, "c": i % 2} for i in range(5)])
    observation = env.reset()
    assert observation["x_t"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert observation["t"][:, 0].tolist() == [500] * 5
    assert observation["c"].tolist() == [0, 1, 0, 1, 0]
    assert env.reset()["t"][:, 0].tolist() == [999] * 5  # they serve once
    env.set_options({"t": 333.0})
    assert env.reset()["t"][:, 0].tolist() == [333] * 5
    env.set_options([{"t": 333.0}, *({} for _ in range(4))])
    with pytest.raises(ValueError, match=r"reset options \[\['t'\], \[\], .*: every environment needs the same ones"):
        env.reset()


def test_attributes_and_methods_are_those_of_the_batch() -> None:
    env = batched(render_mode="rgb_array")
    env.seed(0)
    env.reset()
    assert env.get_attr("num_envs") == [5] * 5
    assert env.get_attr("render_mode", [0, 3]) == ["rgb_array"] * 2
    assert env.has_attr("mdp")
    assert not env.has_attr("nonsense")
    actions = env.env_method("expert_action")
    assert len(actions) == 5
    assert env.step(np.stack(actions))[1].tolist() == [0] * 5
    assert env.env_is_wrapped(Monitor) == [False] * 5
    env.set_attr("render_mode", None)
    assert env.get_attr("render_mode") == [None] * 5
    assert env.get_images() == [None] * 5
    for call in (lambda: env.set_attr("render_mode", None, 0), lambda: env.env_method("expert_action", indices=[0])):
        with pytest.raises(ValueError, match=r"indices=\[0\]: the 5 environments are one batch; leave indices out"):
            call()


def test_pictures_are_tiled() -> None:
    env = batched(n=4, render_mode="rgb_array")
    env.reset()
    picture = env.render("rgb_array")
    assert picture is not None
    assert picture.shape == (256, 256, 3)


@pytest.mark.parametrize("options", [{"autoreset_mode": "NextStep"}, {"output": "torch"}])
def test_only_same_step_reset_and_numpy_are_bridged(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="build the env with autoreset_mode='SameStep', output='numpy'"):
        batched(**options)


def test_stable_baselines3s_wrappers_and_ppo_run_on_it() -> None:
    env = VecNormalize(VecMonitor(VecCheckNan(batched(), raise_exception=True)), norm_obs_keys=["x_t", "t", "s"])
    agent = PPO("MultiInputPolicy", env, n_steps=6, batch_size=10, n_epochs=1, seed=0, device="cpu")
    agent.learn(60)
    assert agent.num_timesteps == 60
    assert {episode["l"] for episode in agent.ep_info_buffer} == {3}
    assert len(agent.ep_info_buffer) == 20


# Any policy as a model


@pytest.mark.parametrize("name", ["gaussian_mixture", "digits8", "unlabelled", "guided"])
@pytest.mark.parametrize("make", [batched, one_by_one])
def test_the_expert_scores_exactly_zero(name: str, make: Any) -> None:
    expert = mixture((3,), False) if name == "unlabelled" else load_expert("gaussian_mixture" if name == "guided" else name)
    guidance = 2.0 if name == "guided" else None
    env = make(expert, 1 if make is one_by_one else 4, 2, substeps=2, guidance_scale=guidance)  # a batch may round otherwise than one
    env.seed(0)
    policy = ExpertPolicy(expert, 2, guidance)
    assert evaluate_policy(SB3Policy(policy), env, n_eval_episodes=8, warn=False) == (0, 0)
    mean, _ = evaluate_policy(SB3Policy(ExpertPolicy(expert, 1, guidance)), env, n_eval_episodes=8, warn=False)
    assert mean < -1e-5  # the same sampler in fewer steps does worse


def test_a_single_env_is_scored_as_it_is() -> None:
    env = Monitor(DenoisingGymEnv(mixture(), 3, reward="expert_l2"))
    assert evaluate_policy(SB3Policy(ExpertPolicy(mixture())), env, n_eval_episodes=3) == (0, 0)


@pytest.mark.parametrize("expert", [mixture((3,)), mixture((2, 3, 4), labelled=False)], ids=["labelled", "video"])
@pytest.mark.parametrize("make", [batched, one_by_one])
def test_a_student_scores_minus_its_action_error(expert: Expert, make: Any) -> None:
    n, num_steps = 6, 4
    env, policy = make(expert, n, num_steps), student_policy(expert)
    env.seed(11)
    start = env.reset()
    env.seed(11)
    returns, lengths = evaluate_policy(SB3Policy(policy), env, n_eval_episodes=n, return_episode_rewards=True, warn=False)
    assert lengths == [num_steps] * n

    c = torch.from_numpy(start["c"]) if "c" in start else None
    grid = TimeGrid(expert.schedule, num_steps)
    path = unroll(policy, grid, torch.from_numpy(start["x_t"]), c)
    wanted = torch.zeros(n)
    for i in range(num_steps):
        t, s = grid.times[i].expand(n), grid.times[i + 1].expand(n)
        wanted -= (path[:, i + 1] - ExpertPolicy(expert).act(path[:, i], t, s, c)).square().flatten(1).mean(1)
    np.testing.assert_allclose(returns, wanted, rtol=1e-4)
    assert max(returns) < 0


def test_the_score_is_what_the_judge_measures() -> None:
    expert, n = load_expert("gaussian_mixture"), 300
    policy = student_policy(expert)
    judged = Judge(ExpertPolicy(expert, 2), TimeGrid(expert.schedule, 4), Evaluation(n=n, n_paths=n, n_action=n)).judge(policy)
    env = batched(expert, n, 4, substeps=2)
    env.seed(0)
    mean, std = evaluate_policy(SB3Policy(policy), env, n_eval_episodes=n, warn=False)
    assert mean == pytest.approx(-sum(judged["action_mse_own"]), abs=5 * std * math.sqrt(2 / n))  # both are means over n draws


def test_one_observation_alone_is_answered_by_one_action() -> None:
    env, policy = DenoisingGymEnv(mixture((2, 3)), 3), SB3Policy(ExpertPolicy(mixture((2, 3))))
    observation, _ = env.reset(seed=0)
    memory = (np.zeros(3),)
    action, state = policy.predict(observation, memory, np.ones(1, bool), deterministic=True)
    assert action.shape == (2, 3)
    assert state is memory
    assert env.action_space.contains(action)
    batch = {key: np.stack([value, value]) for key, value in observation.items()}
    np.testing.assert_allclose(policy.predict(batch)[0], np.stack([action, action]), atol=1e-6)


def test_an_observation_that_lacks_the_condition_is_refused() -> None:
    observation, _ = DenoisingGymEnv(mixture(labelled=False)).reset(seed=0)
    with pytest.raises(ValueError, match="the observation lacks c: this policy reads x_t, t, s, c; use the env of its expert"):
        SB3Policy(ExpertPolicy(mixture())).predict(observation)


# PPO


@pytest.mark.parametrize(("actor", "factor"), [("plain", 1.2), ("scaled", 10), ("student", 10)])
def test_ppo_improves_its_reward(actor: rl.Actor, factor: float) -> None:
    expert = GaussianMixtureExpert([[0.5, -0.5]], 0.2)
    options: dict[str, Any] = {"timesteps": 4_000, "num_steps": 2, "teacher_steps": 2, "num_envs": 50, "batch_size": 50, "hidden": (32, 32)}
    agent = PPOAgent(expert, PPOConfig(**options, actor=actor))
    env = batched(expert, 200, 2)

    def score() -> float:
        env.seed(1)
        return float(evaluate_policy(SB3Policy(agent.student_policy), env, n_eval_episodes=200, warn=False)[0])

    before = score()
    agent.learn(progress=False)
    assert before < factor * score() < 0


def test_a_students_first_policy_is_the_learners_first_student() -> None:
    expert = mixture()
    learner = BehaviourCloning(expert, BCConfig(seed=4, student={"width": 16}))
    agent = PPOAgent(expert, small(seed=4, student={"width": 16}))
    ours, theirs = agent.average.state_dict(), learner.student.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("actor", ACTORS)
def test_its_policy_is_the_models_own(actor: rl.Actor) -> None:
    agent = PPOAgent(mixture(), small(actor=actor)).learn(progress=False)
    env = batched()
    env.seed(0)
    observation = env.reset()
    action, _ = SB3Policy(agent.student_policy).predict(observation)
    assert np.array_equal(action, agent.model.predict(observation, deterministic=True)[0])
    assert agent.student_policy.nfe_per_action == 1


@pytest.mark.parametrize("actor", ACTORS)
def test_a_seed_is_one_run_and_the_callers_generators_are_left_alone(actor: rl.Actor) -> None:
    outside: list[Any] = []
    students = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        np.random.seed(before)
        agent = PPOAgent(mixture(), small(actor=actor, seed=seed)).learn(progress=False)
        outside.append((torch.rand(1).item(), np.random.rand()))
        students.append(agent.average.state_dict())
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
    assert any(not torch.equal(students[0][key], students[2][key]) for key in students[0])
    assert outside[0] == outside[2] != outside[1]


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_its_cost_is_counted(actor: rl.Actor, guidance: float) -> None:
    expert = mixture()
    agent = PPOAgent(expert, small(actor=actor, guidance_scale=guidance, student={"width": 16} if actor == "student" else {}))
    forwards = []
    agent.model.policy.features_extractor.register_forward_hook(lambda module, given, result: forwards.append(len(result)))
    before = expert.nfe
    agent.learn(progress=False).learn(40, progress=False)
    assert agent.timesteps == 120
    assert agent.step == 120 // 20 * 2
    assert agent.teacher_nfe == expert.nfe - before == 120 * 2 * (2 if guidance > 1 else 1)
    assert agent.student_nfe == sum(forwards)


@pytest.mark.parametrize("actor", ACTORS)
def test_what_is_saved_acts_as_before_bit_for_bit(actor: rl.Actor, tmp_path: Path) -> None:
    agent = PPOAgent(mixture(), small(actor=actor)).learn(progress=False)
    agent.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["student.safetensors"]
    again = PPOAgent(mixture(), small(actor=actor, seed=9))
    grid, x_T, c = agent.grid, torch.randn(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 1])
    path = unroll(agent.student_policy, grid, x_T, c)
    assert not torch.equal(unroll(again.student_policy, grid, x_T, c), path)
    assert torch.equal(unroll(again.load(tmp_path / "run").student_policy, grid, x_T, c), path)
    other: rl.Actor = "plain" if actor != "plain" else "scaled"
    with pytest.raises(ValueError, match="does not fit"):
        PPOAgent(mixture(), small(actor=other)).load(tmp_path / "run")


def test_a_learner_can_start_from_what_ppo_taught(tmp_path: Path) -> None:
    PPOAgent(mixture(), small()).learn(progress=False).save(tmp_path / "run")
    learner = BehaviourCloning(mixture(), BCConfig(init=str(tmp_path / "run")))
    taught = load_file(tmp_path / "run" / "student" / "student.safetensors")
    assert all(torch.equal(value, taught[key]) for key, value in learner.student.state_dict().items())


def test_the_policy_of_a_network_predicts_what_its_action_implies() -> None:
    expert = mixture((2, 3))
    agent = PPOAgent(expert, small(actor="scaled", num_steps=2))
    policy, x_t, c = agent.student_policy, torch.randn(3, 2, 3), torch.tensor([0, 1, 0])
    for t, s in zip(agent.grid.times[:-1], agent.grid.times[1:], strict=True):
        action = policy.act(x_t, t.expand(3), s.expand(3), c)
        torch.testing.assert_close(policy.predict(x_t, t.expand(3), c, None).latent(s.expand(3)), action, atol=1e-5, rtol=1e-5)
    assert float(policy.act(100 * x_t, t.expand(3), s.expand(3), c).abs().max()) <= 4  # the box


def test_a_policy_that_diverges_stops_the_run() -> None:
    agent = PPOAgent(mixture(), small(learning_rate=1e30))
    with pytest.raises(FloatingPointError, match="the policy is not finite at environment step 40; lower learning_rate"):
        agent.learn(progress=False)


def test_a_pipelines_student_is_trained_and_other_actors_are_refused(tmp_path: Path) -> None:
    expert = load_expert("sd15", model=str(write_tiny_sd(tmp_path / "tiny_sd")), prompts=["a bee", "two seas"])
    options: dict[str, Any] = {"timesteps": 8, "num_steps": 2, "teacher_steps": 2, "num_envs": 2, "batch_size": 4}
    agent = PPOAgent(expert, small(**options)).learn(progress=False)
    agent.save(tmp_path / "run")
    x_T, c = torch.randn(2, *expert.sample_shape), torch.tensor([0, 1])
    path = unroll(agent.student_policy, agent.grid, x_T, c)
    again = PPOAgent(expert, small(**options, seed=1)).load(tmp_path / "run")
    assert torch.equal(unroll(again.student_policy, agent.grid, x_T, c), path)
    with pytest.raises(ValueError, match="saves students in a format of its own; choose actor=student"):
        PPOAgent(expert, small(**options, actor="plain"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 90}, r"timesteps=90: PPO learns from whole rollouts of num_envs · episodes · num_steps = 40; choose 80 or 120"),
        ({"timesteps": 30}, "= 40; choose 40"),
        ({"timesteps": 0}, "timesteps=0: need at least 1"),
        ({"batch_size": 30}, "batch_size=30: need a divisor, at least 2, of num_envs · episodes · num_steps = 40, a rollout"),
        ({"batch_size": 1}, "batch_size=1: need a divisor, at least 2"),
        ({"teacher_steps": 6}, "teacher_steps=6 is no multiple of num_steps=4"),
        ({"actor": "ddpo"}, "unknown actor 'ddpo'; choose one of: plain, scaled, student"),
        ({"actor": "plain", "student": {"width": 8}}, "actor=plain has no student; leave it out, or choose actor=student"),
        ({"hidden": (8, 0)}, r"hidden=\(8, 0\): need at least one unit in every layer"),
        ({"gamma": 1.1}, r"gamma=1.1: need a number in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: need a positive, finite number"),
        ({"action_bound": math.inf}, "action_bound=inf: need a positive, finite number"),
        ({"log_std_init": math.nan}, "log_std_init=nan: need a finite number"),
        ({"ent_coef": -1.0}, "ent_coef=-1.0: need 0 or more"),
        ({"student": {"colour": 3}}, "make_student refuses student={'colour': 3}"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf: need a finite number"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOAgent(mixture(), small(**options))


# The command

SMALL = shlex.split(
    "--timesteps 80 --num_envs 10 --batch_size 20 --hidden [16] --teacher_steps 8 --epochs 2 --evaluate.n 30 --evaluate.n_action 10"
)
ENV = ["--env", "gaussian_mixture"]


def quietly(argv: list[str]) -> None:
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
        rl.main(argv)


@pytest.fixture(scope="module", params=["student", "scaled"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / request.param
    quietly([*ENV, *SMALL, "--actor", request.param, "--out", str(out)])
    return out


def test_a_run_directory_is_a_learners(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "result.json", "student", "samples.png", "tensorboard"}
    assert all(torch.isfinite(value).all() for value in load_file(run / "student" / "student.safetensors").values())
    with Image.open(run / "samples.png") as picture:
        assert min(picture.size) > 100
    assert any((run / "tensorboard").iterdir())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["agent"], config["actor"]) == ("rl", run.name)

    rows = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["timesteps"]) for row in rows] == [(4, 40), (8, 80)]
    for row in rows:
        assert row["loss"] > 0
        assert row["action_std"] == pytest.approx(math.exp(-2), rel=0.1)
        assert row["teacher_nfe"] == 2 * row["timesteps"]

    result = json.loads((run / "result.json").read_text())
    assert (result["agent"], result["env"], result["student"], result["training_seed"]) == ("ppo", "gaussian_mixture", "ppo@4", 0)
    assert (result["num_updates"], result["timesteps"], result["teacher_nfe"]) == (8, 80, 160)
    assert result["settings"]["n"] == 30
    assert result["floors"]["held_out_real"]["frechet"] > 0
    assert list(result["models"]) == ["teacher@8", "teacher@4", "ppo@4"]
    own = result["models"]["ppo@4"]
    assert own["nfe_per_sample"] == 4
    assert len(own["action_mse_own"]) == 4
    judge = Judge(ExpertPolicy(load_expert("gaussian_mixture"), 2), load_agent(run).grid, Evaluation(n=30, n_action=10))
    again = judge.judge(load_agent(run).student_policy)
    for key in ("frechet", "frechet_to_expert", "endpoint_rmse", "action_mse_own", "action_mse_expert"):
        assert again[key] == own[key]  # what was saved is what was judged
    assert own["endpoint_rmse"] > 0.05  # 80 steps teach nothing


def test_a_run_reruns_from_its_config(run: Path, tmp_path: Path) -> None:
    quietly(["--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")])
    ours, theirs = (load_file(folder / "student" / "student.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--timesteps", "90"], "timesteps=90: PPO learns from whole rollouts"),
        (["--timestep", "80"], "did you mean --timesteps"),
        (["--resume", "runs"], "--resume: PPO keeps no checkpoints"),
        (["--log_every=3"], "log_every=3: PPO keeps no checkpoints, and writes a line a rollout to metrics.jsonl; leave it out"),
        (["--track", "wandb"], "track=wandb: PPO keeps no checkpoints"),
        (["--evaluate.n", "3"], "n=3: the metrics need at least 10 samples"),
        (["--evaluate.extractor", "vgg"], "vgg"),
        (["--evaluate.also_steps", "[1000]"], "num_steps=1000: need 1 ≤ num_steps ≤ 999"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        rl.main([*ENV, *SMALL, *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m ddil_agents.rl: error: ")
    assert message in error
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_run_is_not_written_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rl.main([*ENV, *SMALL, "--out", str(run)])
    assert "exists and is not empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"metrics.jsonl exists; choose another `out`"):
        PPOAgent(mixture(), small()).learn(out=run, progress=False)
    with pytest.raises(ValueError, match=r"holds no finished run of ddil_agents.rl"):
        load_agent(tmp_path)


def test_unlabelled_latents_of_any_shape_are_learned_from() -> None:
    expert = mixture((2, 3, 4), labelled=False)
    for actor in ACTORS:
        agent = PPOAgent(expert, small(actor=actor, num_steps=2, timesteps=20, batch_size=10)).learn(progress=False)
        samples: Tensor = unroll(agent.student_policy, agent.grid, torch.randn(3, 2, 3, 4))[:, -1]
        assert samples.shape == (3, 2, 3, 4)
