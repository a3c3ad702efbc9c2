"""The commands: what a run leaves behind, that it reruns from what it left, and that what is wrong is said before anything is made."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import refused, same_students, student
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from safetensors.torch import load_file
from tiny_sd import write_tiny_sd

from ddil_agents import DMD2, LCM, Algorithm, Dagger, bc, compare, dagger, dmd2, evaluate, load, make, report
from ddil_agents.commands.load import load_run
from ddil_agents.commands.parse import build_config, parse
from ddil_agents.commands.plan import print_plan
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.stages import plan_stages
from ddil_env import GaussianMixtureExpert, load_expert, unroll
from ddil_env.presets import find_preset, preset_names

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = shlex.split(
    "--num_updates 12 --teacher_steps 8 --batch_size 16 --collect_size 32 --updates_per_collect 5 --log_every 5 --checkpoint_every 7 "
    "--student '{width: 16}' --evaluate.n 30 --evaluate.n_action 10"
)
ENV = ["--env", "gaussian_mixture"]
AGENTS: dict[str, Callable[[list[str]], None]] = {"bc": bc.main, "dagger": dagger.main}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run of each agent."""
    root = tmp_path_factory.mktemp("runs")
    for name, main in AGENTS.items():
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
            main([*ENV, *SMALL, "--out", str(root / name)])
    return {name: root / name for name in AGENTS}


# What a run leaves behind


@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_directory_holds_what_the_contract_says(runs: dict[str, Path], agent: str) -> None:
    run = runs[agent]
    contents = {path.name for path in run.iterdir()}
    assert contents == {"config.yaml", "metrics.jsonl", "result.json", "student", "samples.png", "checkpoints", "tensorboard"}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000007", "step_00000012"]
    assert [path.name for path in (run / "student").iterdir()] == ["student.safetensors"]
    assert all(torch.isfinite(value).all() for value in student(run).values())
    with Image.open(run / "samples.png") as picture:
        assert min(picture.size) > 100
    assert any((run / "tensorboard").iterdir())
    assert yaml.safe_load((run / "config.yaml").read_text())["env"]["expert"].endswith("Grid25")


@pytest.mark.parametrize(("agent", "beta"), [("bc", (1.0, 0.0, 0.0)), ("dagger", (0.5, 0.1, 0.4))])
def test_metrics_have_a_line_for_every_log_and_checkpoint(runs: dict[str, Path], agent: str, beta: tuple[float, ...]) -> None:
    rows = read_metrics(runs[agent] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 7, 10, 12]
    assert [sum(row["source_counts"].values()) for row in rows] == [16 * 5, 16 * 2, 16 * 3, 16 * 2]
    for row in rows:
        assert tuple(row["beta"].values()) == pytest.approx(beta)
        assert row["teacher_nfe_per_update"] == row["teacher_nfe"] / row["step"]
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
        assert row["nfe_per_second"] > 0


@pytest.mark.parametrize("agent", AGENTS)
def test_result_says_what_was_measured_how_and_at_what_cost(runs: dict[str, Path], agent: str) -> None:
    result = json.loads((runs[agent] / "result.json").read_text())
    name = f"{agent}@4"
    assert (result["agent"], result["env"], result["student"]) == (agent, "gaussian_mixture", name)
    assert (result["num_updates"], result["training_seed"]) == (12, 0)
    assert result["settings"]["extractor"] == "identity"
    assert (result["settings"]["n"], result["settings"]["seed"], result["settings"]["n_action"]) == (30, 0, 10)
    assert result["times"] == [999, 749, 500, 250, 0]
    assert set(result["models"]) == {"teacher@8", "teacher@4", name, f"{name}, last weights"}
    own = result["models"][name]
    assert own["nfe_per_sample"] == 4
    assert own["teacher_nfe"] == result["teacher_nfe"] == read_metrics(runs[agent] / "metrics.jsonl")[-1]["teacher_nfe"]
    assert own["frechet"] > 0
    assert own["endpoint_rmse"] > result["models"]["teacher@4"]["endpoint_rmse"] > result["models"]["teacher@8"]["endpoint_rmse"] == 0
    assert len(own["action_mse_own"]) == len(own["action_mse_expert"]) == len(own["shift"]) == 4
    assert result["floors"]["training_data"]["frechet"] >= 0
    assert {"date", "hardware", "python", "ddil", "torch", "torchrl"} <= result.keys()
    if agent == "bc":
        assert result["teacher_nfe"] == 3 * 32 * 2  # 3 collections of 32 states of 2 expert steps
        assert result["student_nfe"] == 12 * 16  # no rollout


def test_a_run_loads_as_a_learner(runs: dict[str, Path]) -> None:
    learner = load_run(runs["dagger"])
    saved = student(runs["dagger"])
    assert all(torch.equal(value, saved[key]) for key, value in learner.ema_student.state_dict().items())


def test_a_student_that_is_told_the_guidance_is_judged_at_any_of_its_range(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale=2: the student of .* is not conditioned on it, and has that of its training"):
        load_run(runs["dagger"], guidance_scale=2.0)
    bc.main([*ENV, *SMALL, "--guidance_range", "[1, 3]", "--out", "told"])
    learner = load_run(Path("told"), guidance_scale=2.5)
    assert learner.teacher_policy.guidance_scale == 2.5
    x_t, t, s = torch.randn(4, 2), torch.full((4,), 999.0), torch.full((4,), 500.0)
    told = learner.student_policy.act(x_t, t, s, torch.arange(4))
    assert torch.equal(told, learner.student_policy.act(x_t, t, s, torch.arange(4), torch.full((4,), 2.5)))
    with pytest.raises(ValueError, match="outside guidance_range"):
        load_run(Path("told"), guidance_scale=9.0)


# Running it again


def test_a_runs_config_reruns_to_the_same_weights(runs: dict[str, Path]) -> None:
    dagger.main(["--config", str(runs["dagger"] / "config.yaml"), "--out", "again"])
    assert same_students(Path("again"), runs["dagger"])
    assert Path("again/config.yaml").read_text() == (runs["dagger"] / "config.yaml").read_text()


def test_a_made_agent_learns_the_weights_of_its_command(runs: dict[str, Path]) -> None:
    small = {"num_updates": 12, "teacher_steps": 8, "batch_size": 16, "collect_size": 32, "updates_per_collect": 5}
    agent = make("dagger", "gaussian_mixture", student={"width": 16}, **small).learn(progress=False)
    agent.save_student("made/student")
    assert same_students(Path("made"), runs["dagger"])
    assert make("bc", "fork", config="fork", num_updates=7).config == bc.BehaviourCloning.Config(
        **yaml.safe_load(find_preset("bc", "fork").read_text()) | {"num_updates": 7}
    )
    with pytest.raises(ValueError, match="unknown flag --num_step; did you mean --num_steps"):
        make("dagger", "gaussian_mixture", num_step=2)


def test_another_seed_gives_other_weights(runs: dict[str, Path]) -> None:
    dagger.main(["--config", str(runs["dagger"] / "config.yaml"), "--seed", "1", "--out", "other"])
    assert not same_students(Path("other"), runs["dagger"])
    assert json.loads(Path("other/result.json").read_text())["training_seed"] == 1


def test_printed_config_reruns_to_the_same_weights(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dagger.main([*ENV, *SMALL, "--print_config"])
    assert stop.value.code in (0, None)
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert [path.name for path in Path.cwd().iterdir()] == ["printed.yaml"]
    dagger.main(["--config", "printed.yaml", "--out", "again"])
    assert same_students(Path("again"), runs["dagger"])


def test_the_env_may_be_joined_to_its_flag_and_the_run_names_its_own_directory(runs: dict[str, Path]) -> None:
    bc.main(["--env=gaussian_mixture", *SMALL])
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"bc-gaussian_mixture-s0-\d{8}-\d{6}", run.name)
    assert same_students(run, runs["bc"])


def test_flags_of_beta_and_of_the_expert_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--beta.forward 2 --beta.teacher 1 --beta.student 1 --beta.schedule linear --env.guidance_scale 3 --capacity null"
    with pytest.raises(SystemExit):
        dagger.main([*ENV, *flags.split(), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert [printed["beta"][key] for key in ("forward", "teacher", "student", "schedule")] == [0.5, 0.25, 0.25, "linear"]
    assert printed["env"]["guidance_scale"] == 3
    assert printed["capacity"] is None


@pytest.mark.parametrize(
    ("flags", "shares", "told"),
    [
        ("--beta.student 1", (0, 0, 1), "beta.student=1: shares sum to 1, so that β is forward 0, teacher 0, student 1"),
        ("--beta.student .5", (5 / 12, 1 / 12, 0.5), "β is forward 0.417, teacher 0.0833, student 0.5"),
        ("--beta '{student: 1}'", (0, 0, 1), "β is forward 0, teacher 0, student 1"),
        ("--beta.forward 2 --beta.teacher 1 --beta.student 1", (0.5, 0.25, 0.25), "β is forward 0.5, teacher 0.25, student 0.25"),
        ("--beta.forward .5 --beta.teacher .1 --beta.student .4", (0.5, 0.1, 0.4), ""),
        ("--beta.schedule linear", (0.5, 0.1, 0.4), ""),
    ],
)
def test_shares_are_recorded_as_they_are_used(flags: str, shares: tuple[float, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, cfg = parse(dagger.Dagger, [*ENV, *shlex.split(flags)])
    assert (cfg.beta.forward, cfg.beta.teacher, cfg.beta.student) == pytest.approx(shares)
    said = capsys.readouterr().err
    assert told in said
    assert bool(said) == bool(told)
    with pytest.raises(SystemExit):
        dagger.main([*ENV, *shlex.split(flags), "--print_config"])
    assert list(yaml.safe_load(capsys.readouterr().out)["beta"].values())[:3] == pytest.approx(shares)


def test_a_stages_shares_are_recorded_as_they_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    Path("staged.yaml").write_text("stages: [{beta: {student: .5}}, {num_steps: 2, beta: {forward: 2, teacher: 1, student: 1}}]\n")
    _, cfg = parse(dagger.Dagger, [*ENV, "--config", "staged.yaml"])
    first, second = (stage["beta"] for stage in cfg.stages)
    assert first == pytest.approx({"forward": 5 / 12, "teacher": 1 / 12, "student": 0.5})
    assert second == {"forward": 0.5, "teacher": 0.25, "student": 0.25}
    assert "stage 2: shares sum to 1, so that β is forward 0.5, teacher 0.25, student 0.25" in capsys.readouterr().err


def test_a_run_of_odd_shares_reruns_and_resumes_from_what_it_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    dagger.main([*ENV, *SMALL, "--beta.forward", "1", "--beta.teacher", "1", "--beta.student", "1", "--out", "run"])
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())["beta"]
    assert sum(recorded[name] for name in ("forward", "teacher", "student")) == pytest.approx(1, abs=1e-12)
    capsys.readouterr()
    dagger.main(["--config", "run/config.yaml", "--out", "again"])
    assert same_students(Path("run"), Path("again"))
    dagger.main(["--resume", "run"])
    assert "shares sum to 1" not in capsys.readouterr().err


# --help


def help_of(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    return capsys.readouterr().out


def told_of(flag: str, text: str) -> str:
    """What the help says of one flag, in one line."""
    (found,) = re.findall(rf"^  {re.escape(flag)} .*(?:\n {{10,}}\S.*)*", text, re.MULTILINE)
    return " ".join(found.split())


def test_help_starts_with_usage_and_the_flags_of_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(dagger.main, ["--env", "digits8"], capsys)
    assert [line.split()[0] for line in text.splitlines()[:3] if line] == ["usage:", "python"]
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles[:3] == ["most used", "teacher and student", "states that are trained on"]
    assert titles[-1] == "about the command"
    first = re.findall(r"^  (--\S+)", text.partition("most used:")[2].partition("teacher and student:")[0], re.MULTILINE)
    assert first[:6] == ["--env", "--out", "--resume", "--config", "--device", "--num_updates"]
    assert {"--beta.student", "--batch_size", "--learning_rate", "--guidance_scale", "--seed", "--evaluate.n"} <= {*first}
    flags = re.findall(r"^  (--\S+)", text, re.MULTILINE)
    assert len(flags) == len({*flags})
    assert max(map(len, text.partition("most used:")[2].splitlines())) <= 100
    assert told_of("--lora.rank", text).endswith("(default: 64)")
    assert "SUPPRESS" not in text


def test_help_knows_the_defaults_of_the_env_and_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    plain, sd15 = (help_of(dagger.main, ["--env", env], capsys) for env in ("digits8", "sd15"))
    assert told_of("--beta.forward", plain).endswith("(default: 0.5)")
    assert told_of("--beta.forward", sd15).endswith("(default: 0.0)")
    assert told_of("--env.dataset", plain).endswith("(default: digits8)")
    assert told_of("--env.guidance_scale", sd15).endswith("(default: 7.5)")
    assert told_of("--data", sd15).endswith("(default: null)")
    assert "--data" not in plain
    assert told_of("--num_updates", help_of(dagger.main, ["--env", "digits8", "--config", "demo"], capsys)).endswith("(default: 400)")
    without = help_of(dagger.main, [], capsys)
    assert "pass --env NAME to see its own" in without
    assert "--env.dataset" not in without


def test_every_setting_of_every_agent_has_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    for main, agent in ((dagger.main, Dagger), (dmd2.main, DMD2)):
        text = help_of(main, ENV, capsys)
        for field in dataclasses.fields(agent.Config):
            assert f"\n  --{field.name} " in text or f"\n  --{field.name}." in text, field.name


def test_help_of_evaluate_and_compare_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert told_of("--n", help_of(evaluate.main, [], capsys)).endswith("(default: 500)")
    text = help_of(compare.main, [], capsys)
    assert told_of("--out", text).endswith("(required)")
    assert told_of("--seeds", text).endswith("(default: 3)")


def test_resuming_a_finished_run_trains_no_further(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bc.main(["--config", str(runs["bc"] / "config.yaml"), "--out", "run"])
    before = {name: (Path("run") / name).read_bytes() for name in ("metrics.jsonl", "config.yaml", "student/student.safetensors")}
    models = json.loads(Path("run/result.json").read_text())["models"]
    bc.main(["--resume", "run"])
    assert "resuming run at step 12 of 12" in capsys.readouterr().err
    assert {name: (Path("run") / name).read_bytes() for name in before} == before
    again = json.loads(Path("run/result.json").read_text())["models"]
    assert again["bc@4"]["frechet"] == models["bc@4"]["frechet"]
    assert again["bc@4"]["teacher_nfe"] == models["bc@4"]["teacher_nfe"]


# An expert of one's own, as a module of the working directory, by python -m

MODEL = """
import torch
from ddil_env import GaussianMixtureExpert

class TwoMoons(GaussianMixtureExpert):
    def __init__(self, distance: float = 1.0):
        super().__init__([[-distance, 0.0], [distance, 0.0]], 0.3)
"""


DATALESS = """
from helpers import Dataless, MEANS

class Bare(Dataless):
    def __init__(self) -> None:
        super().__init__(MEANS, 0.2)

    def make_student(self):
        raise AssertionError("built")
"""


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (
            dagger.main,
            [],
            "beta.forward=0.5: .* Bare has none; give it data .*`sample_data`.*: --beta.forward 0 --beta.teacher .5 --beta.student .5",
        ),
        (bc.main, [], "beta.forward=1: .*: --beta.forward 0 --beta.teacher 1$"),
        (
            dagger.main,
            ["--beta.forward", "0", "--beta.schedule", "linear"],
            "beta.forward=0, beta.schedule=linear: .* --beta.schedule constant$",
        ),
    ],
    ids=["dagger", "bc", "schedule"],
)
def test_an_expert_without_data_is_refused_before_anything_is_built(
    main: Callable[[list[str]], None], flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bare_expert.py").write_text(DATALESS)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    error = refused(main, ["--env.expert", "bare_expert.Bare", *flags, "--out", "run"], capsys)
    assert re.search(message, error.strip()), error
    assert not Path("run").exists()


def test_an_expert_of_ones_own_is_found_by_its_class_path() -> None:
    Path("my_model.py").write_text(MODEL)
    argv = ["--env.expert", "my_model.TwoMoons", "--env.distance", "2", *SMALL, "--out", "run"]
    command = [sys.executable, "-m", "ddil_agents.dagger", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(Path("run/result.json").read_text())["env"] == "TwoMoons"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["env"] == {"expert": "my_model.TwoMoons", "distance": 2.0}
    assert "dagger@4" in done.stdout
    assert "Warning" not in done.stderr


# What is wrong is said before anything is made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--env", "gausian_mixture"],
            r"unknown env 'gausian_mixture'; presets: coloured_digits, ddpm, digits, .*, sd15, .*\. Or pass a YAML",
        ),
        (["--env", "nothing.yaml"], "no file 'nothing.yaml'"),
        (["--env"], "--env needs a value"),
        ([], r"which expert\? pass --env NAME; presets: coloured_digits, ddpm, digits"),
        ([*ENV, "--config", "absent.yaml"], "no file 'absent.yaml'"),
        ([*ENV, "--bath_size", "3"], r"--bath_size.*did you mean --batch_size"),
        ([*ENV, "--batch_size", "many"], r"batch_size.*many"),
        ([*ENV, "--batch_size", "0"], "batch_size=0: need at least 1"),
        ([*ENV, "--num_steps", "0"], "num_steps=0: need at least 1"),
        ([*ENV, "--num_updates", "-5"], "num_updates=-5: need at least 1"),
        ([*ENV, "--beta.forward", "-1"], r"beta=\(-1.0, .*need finite shares ≥ 0"),
        ([*ENV, "--beta.forward", "0", "--beta.teacher", "0", "--beta.student", "0"], r"beta=\(0.0, 0.0, 0.0\).*do not sum to 0"),
        ([*ENV, "--beta.schedule", "linaer"], "beta.schedule=linaer: need one of constant, linear, cosine"),
        ([*ENV, "--num_updates", "2.5"], "num_updates=2.5: need a whole number"),
        ([*ENV, "--guidance_range", "[5]"], "guidance_range=.5.: need two numbers, such as .1, 5. or null"),
        ([*ENV, "--lora.rank", "0"], "error: lora.rank=0: need at least 1"),
        ([*ENV, "--student.width", "wide"], "student.width=wide: need a whole number"),
        ([*ENV, "--teacher_steps", "5000"], "teacher_steps=5000: need at most 999, the length of the teacher's chain"),
        ([*ENV, "--init", "nowhere"], "init=nowhere: there is no nowhere/student; name the directory of a finished run"),
        (
            [*ENV, "--env.expert", "signals"],
            "cannot find expert 'signals'; .* the entry point of a package that is installed",
        ),
        ([*ENV, "--grid", "karras"], "grid=karras: need one of linspace, dmd2, trailing"),
        ([*ENV, "--device", "cuda:99"], "device 'cuda:99' is not to be had.*Available here: cpu"),
        ([*ENV, "--env.device", "warp"], "device 'warp' is not to be had"),
        ([*ENV, "--env.expert", "my_pkg.Missing"], "cannot find expert 'my_pkg.Missing' .No module named 'my_pkg'.; pass a dotted path"),
        ([*ENV, "--env.expert", "pathlib.Path"], "'pathlib.Path' is not a subclass of ddil_env.Expert"),
        (
            [*ENV, "--student", '{"widht": 3}'],
            "unexpected keyword argument 'widht'; this expert's students take width, depth",
        ),
        ([*ENV, "--evaluate.extractor", "inception"], "unknown extractor 'inception'; choose one of: identity"),
        ([*ENV, "--evaluate.extractor", "fd_mnist16_clf"], r"fd_mnist16_clf reads pictures of shape \(n, 1, 16, 16\).*got \(1, 2\)"),
        ([*ENV, "--evaluate.n", "3"], "n=3: the metrics need at least 10"),
        ([*ENV, "--log_every", "0"], "log_every.*0"),
        ([*ENV, "--checkpoint_every", "-1"], "checkpoint_every.*-1"),
        ([*ENV, "--teacher_steps", "30"], "teacher_steps=30 is not a multiple of num_steps=4"),
        (["--resume", "nowhere"], "nothing to resume in nowhere"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_wrong_command_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(dagger.main, [*argv, "--out", "run"] if "--resume" not in argv else argv, capsys)
    assert re.search(message, error, re.DOTALL), error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", "two"], "batch_size=two: need a whole number"),
        (["--log_every", "0"], "log_every=0: need a whole number from 1"),
        (["--lora.rank", "x"], "lora.rank=x: need a whole number"),
        (["--lora", "{rank: x}"], "lora.rank=x: need a whole number"),
        (["--lora.rnak", "3"], "unknown setting lora.rnak; did you mean lora.rank"),
        (["--leaning_rate", "1"], "unknown flag --leaning_rate; did you mean --learning_rate?"),
        (["--learning_rate", "1e-4", "--capacity", "some"], "capacity=some: need a whole number or null"),
        (["--guidance_range", "[5]"], "guidance_range=[5]: need two numbers, such as [1, 5] or null"),
        (["--adam_betas", "[.9, x]"], 'adam_betas=[0.9, "x"]: need two numbers, such as [1, 5]'),
        (["--thresholding.roles", "[teacher, nobody]"], "need a list of teacher, target, student, critic"),
        (["--config", "bad.yaml"], "evaluate.n=many: need a whole number"),
        (["--agent", "bc"], "agent=bc: need one of dagger"),
        (["--num_updates"], "--num_updates needs a value: a whole number"),
        (["--evaluate", "3"], "evaluate=3: need a mapping of n, seed, extractor"),
        (["--evaluate", "{n: x}"], "evaluate.n=x: need a whole number"),
        (["--config", "nope"], "--config nope: unknown dagger 'nope'; presets: demo, "),
        (["stray"], "'stray' belongs to no flag; settings are given as --name VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_message_is_made_of_the_librarys(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reworded(self: Any, message: str, ex: Exception | None = None) -> None:
        raise ArgumentError(None, "worded otherwise") from ex

    monkeypatch.setattr(ArgumentParser, "error", reworded)
    Path("bad.yaml").write_text("learning_rate: 1.0e-4\nevaluate: {n: many}\n")
    error = refused(dagger.main, [*ENV, *argv, "--out", "run"], capsys)
    assert message in error
    assert "worded otherwise" not in error


def test_a_flag_of_true_or_false_that_stands_alone_means_true(capsys: pytest.CaptureFixture[str]) -> None:
    _, alone = parse(dagger.Dagger, [*ENV, "--prioritised", "--evaluate.lpips", "--seed", "3"])
    assert (alone.prioritised, alone.evaluate.lpips, alone.seed) == (True, True, 3)
    _, said = parse(dagger.Dagger, [*ENV, "--prioritised", "false", "--evaluate.lpips=true"])
    assert (said.prioritised, said.evaluate.lpips) == (False, True)
    assert "prioritised=maybe: need true or false" in refused(dagger.main, [*ENV, "--prioritised", "maybe", "--out", "run"], capsys)


@pytest.mark.parametrize("flag", ["--env", "--config"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_size: [1, 2", "bad.yaml is not valid YAML"),
        ("- a\n- b\n", "bad.yaml holds list, but a config is a mapping"),
        ("", "bad.yaml holds NoneType, but a config is a mapping"),
        ("\x00\x01", "bad.yaml is not valid YAML"),
    ],
    ids=["malformed", "a list", "empty", "binary"],
)
def test_a_malformed_yaml_file_is_refused(flag: str, content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(content)
    argv = [flag, "bad.yaml", *([] if flag == "--env" else ENV), "--out", "run"]
    assert message in refused(dagger.main, argv, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_size: many\n", "many"),
        ("bath_size: 3\n", "bath_size"),
        ("beta: {forward: -1.0}\n", "need finite shares"),
        ("env: {expert: ddil_env.GaussianMixtureExpert, means: [[0.0, 1.0]], stds: [0.1, 0.2]}\n", "need 1 positive numbers"),
        ("env: nonesuch\n", "unknown env 'nonesuch'"),
    ],
)
def test_a_config_with_a_wrong_value_is_refused(content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(content)
    argv = ["--config", "config.yaml", "--out", "run", *([] if "env:" in content else ENV)]
    assert message in refused(dagger.main, argv, capsys)


def test_an_env_without_an_expert_or_with_an_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("env.yaml").write_text("means: [[0.0, 1.0]]\n")
    assert "env.yaml names no expert" in refused(bc.main, ["--env", "env.yaml", "--out", "run"], capsys)
    Path("env.yaml").write_text("expert: ddil_env.experts.gaussian_mixture.Grid25\nwidth: 3\n")
    assert "takes no argument width" in refused(bc.main, ["--env", "env.yaml", "--out", "run"], capsys)


@pytest.mark.parametrize("content", ["notes.txt", "folder"])
def test_an_existing_run_directory_is_not_written_to(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run", content).mkdir(parents=True)
    error = refused(bc.main, [*ENV, "--out", "run"], capsys)
    assert "run exists and is not empty; continue it with --resume run, or choose another --out" in error


def test_a_file_in_the_place_of_the_run_directory_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").write_text("mine")
    assert "run is a file; choose another --out" in refused(bc.main, [*ENV, "--out", "run"], capsys)
    assert Path("run").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "missing"), [(["--evaluate.scores", "[clip_score]"], "ViT-g-14"), (["--evaluate.lpips", "true"], "alexnet")]
)
def test_weights_that_the_evaluation_lacks_are_missed_before_training(
    flags: list[str], missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty := tmp_path / "weights").mkdir()
    env = ["--env", "sd15", "--env.model", str(write_tiny_sd(tmp_path / "sd")), "--env.prompts", '["a bee", "two seas"]']
    error = refused(dagger.main, [*env, *flags, "--evaluate.weights_dir", str(empty), "--out", "run"], capsys)
    assert f"no {missing}" in error
    assert not Path("run").exists()


def test_resume_refuses_other_settings_and_another_agent(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(dagger.main, ["--resume", str(runs["dagger"]), "--batch_size", "8"], capsys)
    assert "as it was configured, but batch_size differs; start a new run" in error
    assert "is of dagger" in refused(bc.main, ["--resume", str(runs["dagger"])], capsys)


def test_every_preset_of_the_message_exists() -> None:
    shipped = ["coloured_digits", "digits", "digits8", "gaussian_mixture"]
    worlds = ["fork", "kuramoto", "kuramoto_solver", "lunar_lander"]
    assert preset_names("env") == sorted([*shipped, *worlds, "ddpm", "dit", "sd15", "sd3", "sdxl", "ssd1b"])


# Reports


def test_a_report_of_two_runs_is_a_table_curves_and_pictures(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    report.main([*map(str, runs.values()), "--out", "page"])
    assert {path.name for path in Path("page").iterdir()} == {"report.md", "curves.png", "samples.png"}
    text = Path("page/report.md").read_text()
    (head,) = [line.split("|")[2:-1] for line in text.splitlines() if "training data, n" in line]
    assert [re.sub(r", n = \d+", "", name.strip()) for name in head] == [
        "teacher halves",
        "training data",
        "teacher@8",
        "teacher@4",
        "bc@4",
        "bc@4, last weights",
        "dagger@4",
        "dagger@4, last weights",
    ]
    assert "n = 30, evaluation seed 0, against 30 held-out data, features of identity" in text
    frechet = json.loads((runs["bc"] / "result.json").read_text())["models"]["bc@4"]["frechet"]
    assert f"{frechet:.3g}" in text
    for name in ("curves.png", "samples.png"):
        with Image.open(Path("page") / name) as picture:
            assert min(picture.size) > 200
    assert "dagger@4" in capsys.readouterr().out


def test_a_report_refuses_the_same_run_twice(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(runs["bc"]), str(runs["bc"]), "--out", "page"]
    assert "two of the runs are called 'bc@4'" in refused(report.main, argv, capsys)


@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_a_report_refuses_what_is_no_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert kind in refused(report.main, [kind, "--out", "page"], capsys)


def test_evaluate_prints_the_teachers_quality_by_steps(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([*ENV, "--steps", "16", "2", "--n", "40", "--out", "teacher.json"])
    printed = capsys.readouterr().out
    (head,) = [line.split("|")[2:-1] for line in printed.splitlines() if "training data, n" in line]
    assert [name.strip().partition(",")[0] for name in head] == ["teacher halves", "training data", "teacher@16", "teacher@2"]
    (result,) = json.loads(Path("teacher.json").read_text())
    assert result["models"]["teacher@16"]["frechet"] < result["models"]["teacher@2"]["frechet"]
    assert result["models"]["teacher@2"]["nfe_per_sample"] == 2


def test_an_evaluation_in_one_batch_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([*ENV, "--steps", "16", "2", "--n", "40"])
    shown = capsys.readouterr().err
    for name, steps in (("teacher@16", 16), ("teacher@2", 2)):
        assert re.search(rf"{name}:   0%\|.*\| 0/{steps} ", shown)


def planned(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The columns of the plan of a run in one stage; the forwards that its result counts under `counted`."""
    dagger.main([*argv, "--out", "run"])
    lines = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("dagger, the plan"))
    head, row = (re.split(r" {2,}", line.strip()) for line in lines[start + 1 : start + 3])
    assert "run: a checkpoint every 7 updates" in lines[start + 4]
    return {f"{name} {place}": cell for place, (name, cell) in enumerate(zip(head, row, strict=True))} | {"evaluation": lines[start + 3]}


def test_a_run_first_says_what_it_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned([*ENV, *SMALL, "--env.guidance_scale", "2"], capsys)
    evaluation = found.pop("evaluation")
    assert evaluation.strip() == "then an evaluation: 30 samples of the teacher in 8 and 4 steps, and of dagger's student in 4"
    cells = list(found.values())
    assert cells[:5] == ["1", "the expert, guided", "8 → 4", "12", "16"]
    assert cells[5:8] == ["48", "10", "38"]  # of 3 collections of 32
    result = json.loads(Path("run/result.json").read_text())
    for cell, name in zip(cells[8:], ("teacher_nfe", "student_nfe"), strict=True):
        assert int(cell.replace(",", "")) == pytest.approx(result[name], rel=0.1)


def test_a_chains_plan_has_a_line_for_each_stage_and_runs_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, cfg = parse(dagger.Dagger, ["--env", "digits8", "--config", "staged"])
    config = build_config(dagger.Dagger, parser, cfg)
    expert = load_expert("digits8")
    monkeypatch.setattr(expert, "predict", None)
    print_plan(dagger.Dagger, config, plan_stages(config), expert, Evaluation(), Path("run"), 500)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 1 + 8 + 2
    assert lines[2].split() == ["1", "the", "expert", "32", "→", "8", "150", "32", "1,280", "0", "0", "5,120", "4,800"]
    assert [line.split()[1:3] for line in lines[3:6]] == [["the", "same"], ["the", "last"], ["the", "same"]]
    assert lines[-2].strip().startswith("then after each stage an evaluation: 500 samples of the teacher in 32 and 1 steps")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "nonesuch"], "unknown env 'nonesuch'"),
        ([*ENV, "--steps", "0"], "num_steps=0: need a whole number from 1"),
        ([*ENV, "--n", "2"], "n=2: the metrics need at least 10"),
        ([*ENV, "--steps", "four"], "steps=four: need a whole number"),
    ],
)
def test_a_wrong_evaluation_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(evaluate.main, argv, capsys)


def test_a_runs_agent_is_loaded_whether_it_has_finished_or_not(runs: dict[str, Path], tmp_path: Path) -> None:
    finished = load(runs["dagger"])
    saved = load_file(runs["dagger"] / "student" / "student.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in finished.ema_student.state_dict().items())
    half = shutil.copytree(runs["dagger"], tmp_path / "half")
    (half / "result.json").unlink()
    shutil.rmtree(half / "student")
    learner = load(half)
    assert learner.step == 12
    assert torch.equal(learner.sample(8, seed=3), finished.sample(8, seed=3))
    shutil.rmtree(half / "checkpoints")
    with pytest.raises(ValueError, match="half has no checkpoint yet"):
        load(half)
    with pytest.raises(ValueError, match="nowhere holds no run"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("agent", [Dagger, LCM, DMD2])
def test_an_agents_samples_and_environment_have_its_own_times_and_kernel(agent: type[Algorithm]) -> None:
    expert = GaussianMixtureExpert([[-1.0, 0.0], [1.0, 0.0]], 0.2, labels=[0, 1])
    learner = agent(expert, agent.Config(num_steps=4, student={"width": 8, "depth": 1}))
    generator = torch.Generator().manual_seed(stream_seed(5, "sample"))
    x_T = torch.randn(6, 2, generator=generator)
    c = expert.sample_condition(6, generator)
    own = unroll(learner.student_policy, learner.grid, x_T, c, kernel=learner.kernel, generator=generator)[:, -1]
    assert torch.equal(learner.sample(6, seed=5), own)
    assert torch.equal(learner.sample(6, c=1, seed=5), learner.sample(6, c=[1] * 6, seed=5))
    env = learner.make_env([3], reward="expert_l2")
    rollout = env.rollout(4, learner.student_policy)
    assert rollout["t"][0].tolist() == learner.grid.times[:-1].tolist()
    assert env.mdp.kernel == learner.kernel
    for wrong in (2, [0, 1], -1, 0.5):
        with pytest.raises(ValueError, match="need 6 condition ids, or one for all, whole numbers from 0 to 1"):
            learner.sample(6, c=wrong)
    with pytest.raises(ValueError, match="unconditional; leave c out"):
        agent(GaussianMixtureExpert([[0.0, 0.0]], 1.0), learner.config).sample(2, c=0)
