"""Runs in stages: what each leaves, that a killed chain ends the same, and what is refused before anything is made."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ENV, Killed, refused
from safetensors.torch import load_file

from ddil_agents import Dagger, bc, dagger, report
from ddil_agents.commands.load import load_run
from ddil_agents.training.checkpoint import read_support
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.trainer import Trainer
from ddil_env.experts.digits import Digits

pytestmark = pytest.mark.usefixtures("own_generator")

DIGITS = """\
num_updates: 4
teacher_steps: 4
batch_size: 4
collect_size: 8
updates_per_collect: 2
log_every: 2
checkpoint_every: 3
evaluate: {n: 12, n_action: 4}
stages:
  - {num_steps: 4, beta: {student: 0.0}}
  - {num_steps: 2}
  - {num_steps: 2, expert: same, num_updates: 5, beta: {forward: 0.2}}
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of three stages on digits8."""
    root = tmp_path_factory.mktemp("staged")
    (root / "stages.yaml").write_text(DIGITS)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")), torch.random.fork_rng():
        dagger.main(["--env", "digits8", "--config", str(root / "stages.yaml"), "--out", str(root / "run")])
    return root / "run"


def test_a_staged_run_holds_each_stage_and_the_last_ones_student(staged: Path) -> None:
    contents = {path.name for path in staged.iterdir()}
    assert contents == {"config.yaml", "metrics.jsonl", "result.json", "student", "samples.png", "stage_1", "stage_2", "stage_3"}
    for number in (1, 2, 3):
        inside = {path.name for path in (staged / f"stage_{number}").iterdir()}
        assert inside == {"metrics.jsonl", "result.json", "student", "samples.png", "checkpoints", "tensorboard"}
    last, first = (load_file(staged / stage / "student" / "student.safetensors") for stage in ("stage_3", "stage_1"))
    ours = load_file(staged / "student" / "student.safetensors")
    assert all(torch.equal(ours[key], last[key]) for key in last)
    assert not all(torch.equal(ours[key], first[key]) for key in first)
    assert (staged / "samples.png").read_bytes() == (staged / "stage_3" / "samples.png").read_bytes()
    assert len(yaml.safe_load((staged / "config.yaml").read_text())["stages"]) == 3


def test_a_staged_result_has_every_stages_models_and_the_totals(staged: Path) -> None:
    result = json.loads((staged / "result.json").read_text())
    parts = [json.loads((staged / f"stage_{number}" / "result.json").read_text()) for number in (1, 2, 3)]
    assert (result["agent"], result["student"], result["num_updates"]) == ("dagger", "dagger@2", 13)
    students = {"dagger@4", "dagger@4, last weights", "dagger@2", "dagger@2, last weights"}
    assert set(result["models"]) == students | {"teacher@4", "teacher@2"}
    for part in parts:
        average, latest = (part["models"][f"{part['student']}{which}"] for which in ("", ", last weights"))
        assert average["endpoint_rmse"] != latest["endpoint_rmse"]
        assert part["error_of_weights"].keys() == {"average", "last"}
    assert [part["student"] for part in parts] == ["dagger@4", "dagger@2", "dagger@2"]
    assert result["models"]["dagger@4"] == parts[0]["models"]["dagger@4"]
    for key in ("frechet", "endpoint_rmse", "action_mse_own"):  # of two with as many steps, the later
        assert result["models"]["dagger@2"][key] == parts[2]["models"]["dagger@2"][key]
    assert parts[1]["models"]["dagger@2"]["endpoint_rmse"] != parts[2]["models"]["dagger@2"]["endpoint_rmse"]
    assert result["teacher_nfe"] == sum(part["teacher_nfe"] for part in parts) == result["models"]["dagger@2"]["teacher_nfe"]
    assert result["student_nfe"] == sum(part["student_nfe"] for part in parts)
    assert result["models"]["dagger@2"]["train_seconds"] == pytest.approx(sum(p["models"][p["student"]]["train_seconds"] for p in parts))
    for part in parts:  # every student is judged beside the original teacher in the run's own steps
        assert part["models"]["teacher@4"]["endpoint_rmse"] == 0
    assert parts[1]["times"] == parts[2]["times"] == [999, 500, 0]


def test_the_last_model_of_a_staged_result_counts_the_students_forwards_of_the_whole_run(staged: Path) -> None:
    result = json.loads((staged / "result.json").read_text())
    assert result["models"]["dagger@2"]["student_nfe"] == result["student_nfe"]


def test_staged_metrics_count_on_over_the_stages(staged: Path) -> None:
    rows = read_metrics(staged / "metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [
        *[(2, 1), (3, 1), (4, 1)],
        *[(6, 2), (7, 2), (8, 2)],
        *[(10, 3), (11, 3), (12, 3), (13, 3)],
    ]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    for number in (1, 2, 3):
        own = read_metrics(staged / f"stage_{number}" / "metrics.jsonl")
        assert [row["loss"] for row in own] == [row["loss"] for row in rows if row["stage"] == number]
    assert all(row["beta"]["student"] == 0 for row in rows[:3])
    assert rows[-1]["beta"]["forward"] == pytest.approx(0.2)  # the share that is given holds


@pytest.mark.parametrize("key", ["teacher_nfe", "student_nfe"])
def test_staged_metrics_count_the_forwards_of_the_whole_run(key: str, staged: Path) -> None:
    counts = [row[key] for row in read_metrics(staged / "metrics.jsonl")]
    assert counts == sorted(counts)
    assert counts[-1] == json.loads((staged / "result.json").read_text())[key]


def test_a_staged_run_loads_and_is_reported(staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learner = load_run(staged)
    saved = load_file(staged / "student" / "student.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in learner.ema_student.state_dict().items())
    assert (learner.config.num_steps, learner.config.teacher_steps, learner.config.beta.forward) == (2, 4, 0.2)
    assert isinstance(learner.expert, Digits)
    report.main([str(staged), "--out", str(tmp_path / "page")])
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.md", "curves.png", "samples.png"}
    (head,) = [line.split("|")[2:-1] for line in (tmp_path / "page" / "report.md").read_text().splitlines() if "teacher halves" in line]
    head = [name for name in head if "last weights" not in name]
    assert [name.strip().partition(",")[0] for name in head] == [
        "teacher halves",
        "training data",
        "teacher@4",
        "dagger@4",
        "teacher@2",
        "dagger@2",
    ]
    assert "dagger@2" in capsys.readouterr().out


def test_resuming_a_finished_staged_run_trains_nothing(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {
        path: path.read_bytes() for path in staged.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors")
    }
    assert len(before) > 12
    monkeypatch.setattr(Trainer, "update", None)  # a call would raise
    monkeypatch.setattr(Dagger, "collect", None)
    dagger.main(["--resume", str(staged)])
    assert {path: path.read_bytes() for path in before} == before


MIXTURE = """\
num_updates: 8
teacher_steps: 8
batch_size: 16
collect_size: 30
updates_per_collect: 3
log_every: 3
checkpoint_every: 3
p_expert: 0.3
student: {width: 16}
thresholding: {kind: quantile, samples: 64, roles: [teacher, student]}
evaluate: {n: 20, n_action: 4}
stages:
  - {num_steps: 4}
  - {num_steps: 2}
  - {num_steps: 1, num_updates: 4}
"""


def command(directory: Path, argv: list[str]) -> Path:
    """The command in its own directory; the run's."""
    (directory / "env.yaml").write_text(ENV)
    (directory / "stages.yaml").write_text(MIXTURE)
    dagger.main(argv)
    return directory / "run"


START = ["--env", "env.yaml", "--config", "stages.yaml", "--out", "run"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None), torch.random.fork_rng():
        patch.chdir(root)
        return command(root, START)


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that does not depend on the clock."""
    clock = ("seconds", "nfe_per_second", "train_seconds")
    result = json.loads((run / "result.json").read_text())
    stages = sorted(path.name for path in run.glob("stage_*"))
    return {
        "rows": [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(run / "metrics.jsonl")],
        "models": {name: {k: v for k, v in model.items() if k not in clock} for name, model in result["models"].items()},
        "nfe": (result["teacher_nfe"], result["student_nfe"]),
        "config": (run / "config.yaml").read_text(),
        "students": {
            name: {key: value.tolist() for key, value in load_file(run / name / "student" / "student.safetensors").items()}
            for name in (".", *stages)
        },
        "supports": [(run / name / "support.json").read_text() for name in (".", *stages)],
    }


def at_step(stage: int, step: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A kill before that gradient step of that stage."""
    num_steps = {1: 4, 2: 2, 3: 1}[stage]

    def arrange(patch: pytest.MonkeyPatch) -> None:
        update = Trainer.update

        def killing(trainer: Trainer, batch: Any) -> Any:
            if (trainer.algorithm.config.num_steps, trainer.algorithm.step + 1) == (num_steps, step):
                raise Killed
            return update(trainer, batch)

        patch.setattr(Trainer, "update", killing)

    return arrange


def at_finish(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A kill when the n-th stage has been trained and not yet judged."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        from ddil_agents.commands import run as command

        original, calls = command.save_and_evaluate, [0]

        def killing(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == number:
                raise Killed
            original(*args)

        patch.setattr(command, "save_and_evaluate", killing)

    return arrange


@pytest.mark.parametrize(
    ("kill", "finished"),
    [(at_step(2, 2), 1), (at_step(2, 5), 1), (at_finish(2), 1)],
    ids=["stage 2 before its first checkpoint", "stage 2 after it", "stage 2 not yet judged"],
)
def test_a_staged_run_killed_at(
    kill: Callable[[pytest.MonkeyPatch], None], finished: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            command(tmp_path, START)
    assert sum((tmp_path / "run" / f"stage_{number}" / "result.json").is_file() for number in (1, 2, 3)) == finished
    assert not (tmp_path / "run" / "result.json").exists()
    trained: set[int] = set()
    update = Trainer.update

    def recorded(trainer: Trainer, batch: Any) -> Any:
        trained.add(trainer.algorithm.config.num_steps)
        return update(trainer, batch)

    monkeypatch.setattr(Trainer, "update", recorded)
    run = command(tmp_path, ["--resume", "run"])
    assert trained <= set([4, 2, 1][finished:])  # no finished stage again
    assert outcome(run) == outcome(unbroken)


def test_stages_calibrate_their_support_once(unbroken: Path) -> None:
    facts = outcome(unbroken)
    assert len(set(facts["supports"])) == 1
    assert json.loads(facts["supports"][0])["kind"] == "quantile"
    assert load_run(unbroken).support == read_support(unbroken)[0]


# What is refused before anything is made


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{}, {bath_size: 3}]", r"stage 2 of 2: .*bath_size"),
        ("[{num_steps: 4}, {num_steps: 2, expert: first}]", "stage 2 of 2: expert='first'"),
        ("[{num_steps: 3}]", "stage 1 of 1: teacher_steps=32 is not a multiple of num_steps=3"),
        ("[4, 2]", "stages"),
    ],
)
def test_a_wrong_chain_is_refused_before_anything_is_made(
    stages: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(bc.main, ["--env", "gaussian_mixture", "--stages", stages, "--out", "run"], capsys), re.DOTALL)


TINY = ["--num_updates", "1", "--batch_size", "4", "--collect_size", "8", "--teacher_steps", "4", "--evaluate.n", "20", "--out", "run"]


@pytest.mark.parametrize(
    "stages",
    ["[{}, {student: {widht: 3}}]", "[{}, {beta: {student: 0.5}}]"],
    ids=["an option", "a source"],
)
def test_what_a_later_stages_learner_refuses_is_said_before_the_first_is_trained(
    stages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.yaml").write_text(ENV)
    refused(bc.main, ["--env", "env.yaml", "--stages", stages, *TINY], capsys)


def test_a_run_with_a_guidance_range_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.yaml").write_text(ENV)
    try:
        bc.main(["--env", "env.yaml", "--guidance_range", "[1, 3]", *TINY])
    except SystemExit as stop:
        raise AssertionError("refused") from stop
    assert Path("run/result.json").is_file()
    load_run(Path("run"))


def test_a_chain_of_one_stage_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--num_updates", "2", "--batch_size", "8", "--collect_size", "32", "--evaluate.n", "10", "--evaluate.n_action", "2"]
    dagger.main(["--env", "digits8", *small, "--out", "run", "--stages", "[{num_steps: 4}]"])
    assert load_run(tmp_path / "run").config.num_steps == 4
    assert (tmp_path / "run" / "stage_1" / "result.json").is_file()
    with pytest.raises(ValueError, match="a stage of a run is loaded through the run's own directory"):
        load_run(tmp_path / "run" / "stage_1")


def test_the_costs_of_a_gathered_run_rise_from_stage_to_stage(unbroken: Path) -> None:
    result = json.loads((unbroken / "result.json").read_text())
    own = [model["teacher_nfe"] for name, model in result["models"].items() if name.startswith("dagger@")]
    assert own == sorted(own)
    assert own[-1] == result["teacher_nfe"]
    assert result["training_seed"] == 0
