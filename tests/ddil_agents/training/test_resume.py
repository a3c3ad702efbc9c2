"""A run killed with SIGKILL at any moment, or out of disk or memory, and resumed, ends in the weights of the one that went through.

Every run is a process of its own, forked from a server that has imported the library once.
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENV, same_students
from kills import ARGV, after, before, die, is_checkpoint, outcome, patch
from safetensors.torch import load_file

from ddil_agents.training.checkpoint import checkpoints
from ddil_agents.training.metrics import RunFiles, read_metrics
from ddil_agents.training.trainer import Trainer

ROOM = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ddil_agents.dagger", "ddil_env.experts.gaussian_mixture", "torch.utils.tensorboard", "pytest"])


def half_written(original: Callable[..., Any], state: Any, file: Any) -> None:
    original(state, file)
    file.truncate(file.tell() // 2)
    die()


def cut_line(original: Callable[..., Any], metrics: Any, agent: Any) -> None:
    original(metrics, agent)
    path = next(callback.path for callback in agent.trainer.callbacks if isinstance(callback, RunFiles))
    os.truncate(path, os.path.getsize(path) - 40)
    die()


def half_removed(original: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> None:
    (path / "state.pt").unlink()
    die()


def half_saved(original: Callable[..., Any], expert: Any, student: Any, directory: Path, *args: Any) -> None:
    (directory / "student.safetensors").write_bytes(b"\0" * 100)
    die()


def fill_the_disk(most: int) -> None:
    """From here on no file grows past so many bytes: the system refuses, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, ROOM))


def full(most: int) -> Callable[..., Any]:
    def instead(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fill_the_disk(most)
        return original(*args, **kwargs)

    return instead


def full_in_a_line(original: Callable[..., Any], files: Any, agent: Any, row: dict[str, Any]) -> None:
    fill_the_disk(files.path.stat().st_size + 40)
    original(files, agent, row)


def short_of_memory(most: int, since: int) -> None:
    """After so many gradient steps the CPU's allocator refuses what more than `most` states at a time would take."""
    from ddil_agents.training.trainable import Trainable

    original, calls = Trainable.accumulate, [0]

    def accumulate(self: Trainable, loss: Any, parts: Any) -> Any:
        calls[0] += 1
        if calls[0] > since and max(map(len, parts)) > most:
            torch.empty(2**60, dtype=torch.uint8)
        return original(self, loss, parts)

    Trainable.accumulate = accumulate  # type: ignore[method-assign]


def is_old(path: Path, *_: Any) -> bool:
    return path.name.startswith(".step_") and path.name.endswith(".stale") and path.exists()


def named(name: str) -> Callable[[Any, Any], bool]:
    return lambda source, target: Path(target).name == name


def fatal(moment: str) -> None:
    """Arranges for this process to be killed at that moment."""
    from ddil_agents.commands import save_and_evaluate as evaluation
    from ddil_agents.evaluation.evaluator import Evaluator
    from ddil_agents.states.collect import Collector
    from ddil_agents.training import checkpoint, metrics
    from ddil_env import Expert

    moments: dict[str, Callable[[], None]] = {
        "the first gradient step": lambda: patch(Trainer, "update", 1, before),
        "the gradient step after a checkpoint": lambda: patch(Trainer, "update", 15, after),
        "a gradient step far from one": lambda: patch(Trainer, "update", 20, after),
        "the last gradient step": lambda: patch(Trainer, "update", 24, after),
        "a collection": lambda: patch(Collector, "collect", 4, after),
        "a rollout": lambda: patch(Collector, "rollout", 2, after),
        "a line of metrics": lambda: patch(metrics.MetricsCallback, "flush", 5, cut_line),
        "the first state half written": lambda: patch(torch, "save", 1, half_written),
        "the third state half written": lambda: patch(torch, "save", 3, half_written),
        "a state without its manifest": lambda: patch(torch, "save", 2, after),
        "before the renaming": lambda: patch(checkpoint.os, "replace", 2, before, is_checkpoint),
        "after the renaming": lambda: patch(checkpoint.os, "replace", 2, after, is_checkpoint),
        "an old checkpoint half removed": lambda: patch(shutil, "rmtree", 1, half_removed, is_old),
        "after the last checkpoint": lambda: patch(checkpoint.os, "replace", 4, after, is_checkpoint),
        "the student half saved": lambda: patch(Expert, "save_student", 1, half_saved),
        "the evaluation": lambda: patch(Evaluator, "evaluate", 2, before),
        "the fifth batch of an evaluation": lambda: patch(Evaluator, "_measure_batch", 5, before),
        "before the result of an evaluation": lambda: patch(checkpoint.os, "replace", 1, before, named("scores.json")),
        "the writing of the result": lambda: patch(checkpoint.os, "replace", 1, before, named("result.json")),
        "the drawing of the samples": lambda: patch(evaluation, "save_pictures", 1, before),
        "before the student takes its place": lambda: patch(checkpoint.os, "replace", 1, before, named("student")),
        "a checkpoint, the disk full": lambda: patch(torch, "save", 2, full(40_000)),
        "a line of metrics, the disk full": lambda: patch(metrics.RunFiles, "on_log", 5, full_in_a_line),
        "the student, the disk full": lambda: patch(Expert, "save_student", 1, full(2000)),
        "the result, the disk full": lambda: patch(
            evaluation, "write_atomically", 1, full(1000), lambda path, _: path.name == "result.json"
        ),
        "memory short": lambda: short_of_memory(8, since=0),
        "memory short after 10 steps": lambda: short_of_memory(8, since=10),
        "the writing of the config": lambda: patch(checkpoint.os, "replace", 1, before, named("config.yaml")),
    }
    moments[moment]()


def command(directory: Path, argv: list[str], moment: str | None, module: str) -> None:
    """The body of a process: the command line, killed at a moment."""
    os.chdir(directory)
    Path("env.yaml").write_text(ENV)
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = io.StringIO(), (said := io.StringIO())
    if moment is not None:
        fatal(moment)
    try:
        importlib.import_module(f"ddil_agents.{module}").main(argv)
    finally:
        fill_the_disk(ROOM)
        Path("stderr.txt").write_text(said.getvalue())


def run(directory: Path, argv: list[str], moment: str | None = None, module: str = "dagger") -> int:
    """The exit code of the command in a process of its own; −9 where it was killed."""
    process = SERVER.Process(target=command, args=(directory, argv, moment, module))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    assert run(directory, [*ARGV, "--out", "run"]) == 0
    return directory / "run"


def test_the_unbroken_run_is_as_the_moments_suppose(unbroken: Path) -> None:
    facts = outcome(unbroken)
    assert [row["step"] for row in facts["rows"]] == [3, 6, 7, 9, 12, 14, 15, 18, 21, 24]
    assert facts["lines"] == 10
    assert facts["checkpoints"] == ["step_00000021", "step_00000024"]


@pytest.mark.parametrize(
    "moment",
    [
        "the first gradient step",
        "the gradient step after a checkpoint",
        "a gradient step far from one",
        "the last gradient step",
        "a collection",
        "a rollout",
        "a line of metrics",
        "the first state half written",
        "the third state half written",
        "a state without its manifest",
        "before the renaming",
        "after the renaming",
        "an old checkpoint half removed",
        "after the last checkpoint",
        "the student half saved",
        "before the student takes its place",
        "the evaluation",
        "the writing of the result",
        "the drawing of the samples",
    ],
)
def test_a_run_killed_in(moment: str, unbroken: Path, tmp_path: Path) -> None:
    assert run(tmp_path, [*ARGV, "--out", "run"], moment) == -signal.SIGKILL
    assert run(tmp_path, ["--resume", "run"]) == 0
    assert same_students(tmp_path / "run", unbroken)
    assert outcome(tmp_path / "run") == outcome(unbroken)


def test_an_evaluation_killed_goes_on_at_its_last_batch(tmp_path: Path) -> None:
    argv = shlex.split("--env env.yaml --steps 4 2 --n 60 --batch_size 20 --n_action 10 --out scores.json")
    assert run(tmp_path, argv, "the fifth batch of an evaluation", "evaluate") == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".scores.json.seed0").glob("*.safetensors")}
    assert len(kept) == 4
    assert run(tmp_path, argv, "before the result of an evaluation", "evaluate") == -signal.SIGKILL
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # none was drawn again
    assert run(tmp_path, argv, None, "evaluate") == 0
    (whole := tmp_path / "whole").mkdir()
    assert run(whole, argv, None, "evaluate") == 0
    ours, theirs = (json.loads((each / "scores.json").read_text())[0]["models"] for each in (tmp_path, whole))
    for model in (*ours.values(), *theirs.values()):
        del model["seconds"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("what", "path", "kept"),
    [
        ("a checkpoint", "checkpoints/step_00000014", [7]),
        ("a line of metrics", "metrics.jsonl", [7]),
        ("the student", "student", [21, 24]),
        ("the result", "result.json", [21, 24]),
    ],
)
def test_a_run_whose_disk_is_full_at(what: str, path: str, kept: list[int], unbroken: Path, tmp_path: Path) -> None:
    assert run(tmp_path, [*ARGV, "--out", "run"], f"{what}, the disk full") == 2
    error = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert (
        f"cannot write run/{path}: File too large; make room and start it again, a training with --resume: what has been saved is whole"
        in error
    )
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step_{step:08d}" for step in kept]
    assert not [left for left in (tmp_path / "run").rglob("*") if "partial" in left.name]
    assert path == "metrics.jsonl" or not (tmp_path / "run" / path).exists()
    assert run(tmp_path, ["--resume", "run"]) == 0  # there is room again
    assert same_students(tmp_path / "run", unbroken)
    assert outcome(tmp_path / "run") == outcome(unbroken)


def test_a_run_out_of_memory_says_what_to_lower_and_goes_on_with_half_the_batch_at_a_time(unbroken: Path, tmp_path: Path) -> None:
    assert run(tmp_path, [*ARGV, "--out", "run"], "memory short after 10 steps") == 2
    error = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert "out of memory at step 11, in the gradient of 16 of batch_size=16 states at a time (" in error
    assert "DefaultCPUAllocator: can't allocate memory" in error
    assert error.endswith("; lower batch_size, raise gradient_accumulation=1, or set halve_batch_on_oom")
    assert run(tmp_path, ["--resume", "run", "--halve_batch_on_oom", "true"], "memory short") == 0
    assert "out of memory at step 8, " in (tmp_path / "stderr.txt").read_text()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["gradient_accumulation"]) for row in rows][:4] == [(3, 1), (6, 1), (7, 1), (9, 2)]
    ours, theirs = (load_file(each / "student" / "student.safetensors") for each in (tmp_path / "run", unbroken))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-4, rtol=0)


def test_a_run_killed_again_and_again(unbroken: Path, tmp_path: Path) -> None:
    assert run(tmp_path, [*ARGV, "--out", "run"], "a collection") == -signal.SIGKILL
    for moment in ("before the renaming", "the first state half written", "the evaluation"):
        assert run(tmp_path, ["--resume", "run"], moment) == -signal.SIGKILL
    assert run(tmp_path, ["--resume", "run"]) == 0
    assert same_students(tmp_path / "run", unbroken)
    assert outcome(tmp_path / "run") == outcome(unbroken)


def test_a_run_killed_before_its_config_was_written_starts_anew(unbroken: Path, tmp_path: Path) -> None:
    assert run(tmp_path, [*ARGV, "--out", "run"], "the writing of the config") == -signal.SIGKILL
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert run(tmp_path, ["--resume", "run"]) == 2
    assert run(tmp_path, [*ARGV, "--out", "run"]) == 0
    assert same_students(tmp_path / "run", unbroken)


def test_a_checkpoint_damaged_on_the_disk_is_refused_and_the_one_before_it_resumes_to_the_same_weights(
    unbroken: Path, tmp_path: Path
) -> None:
    assert run(tmp_path, [*ARGV, "--out", "run"], "the last gradient step") == -signal.SIGKILL
    newest = tmp_path / "run" / "checkpoints" / "step_00000021"
    os.truncate(newest / "state.pt", 1000)
    assert run(tmp_path, ["--resume", "run"]) == 2
    shutil.rmtree(newest)  # the cure that the message names
    assert run(tmp_path, ["--resume", "run"]) == 0
    assert same_students(tmp_path / "run", unbroken)
    assert outcome(tmp_path / "run") == outcome(unbroken)
