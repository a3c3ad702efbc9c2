"""What is damaged, refused or cut short is named, with its cure, and nothing is lost by it: the table of docs/reference/reliability.md."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ALL, ROOT, bc, corners, dagger, learn, make_evaluator, matching, weights
from safetensors.torch import save_file
from tiny_sd import write_tiny_sd
from torch import nn

from ddil_agents import Algorithm
from ddil_agents import dagger as dagger_module
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.pictures import save_samples
from ddil_agents.training.callbacks import Stopwatch
from ddil_agents.training.checkpoint import folder_atomically, save_checkpoint, write_atomically
from ddil_agents.training.metrics import RunFiles, read_metrics
from ddil_env import load_expert
from ddil_env.weights import load_weights

pytestmark = pytest.mark.usefixtures("own_generator")

ROOM = resource.getrlimit(resource.RLIMIT_FSIZE)


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """The system lets no file grow past so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, ROOM[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, ROOM)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Memory


def cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def short_of_memory(learner: Algorithm, most: int, network: str = "student", run_out: Callable[[], None] = cpu) -> Algorithm:
    """A learner whose network cannot take more states than `most` at a time with gradient; the second such batch is the first refused."""
    met = [0]

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and len(args[0]) > most:
            met[0] += 1
            if met[0] > 1:
                run_out()

    learner.networks[network].register_forward_pre_hook(check)
    return learner


def cut_in_two(learner: Algorithm, network: str, step: int, times: int) -> Algorithm:
    """A learner that no memory runs out of, and whose parts are halved so often in that network's gradient step."""
    minimise = learner.trainer.minimise

    def cutting(name: str, loss: Any, parts: list[Any]) -> Any:
        for _ in range(times if (name, learner.step) == (network, step) else 0):
            parts[:] = [half for part in parts for half in part.chunk(2)]
            learner.trainer.gradient_accumulation *= 2
        return minimise(name, loss, parts)

    learner.trainer.minimise = cutting  # type: ignore[method-assign]
    return learner


@pytest.mark.parametrize("run_out", [cpu, cuda])
def test_a_halved_batch_learns_what_a_batch_of_that_size_would_have(run_out: Callable[[], None]) -> None:
    halved = learn(short_of_memory(dagger(halve_batch_on_oom=True), 4, run_out=run_out))
    assert halved.trainer.gradient_accumulation == 4
    assert torch.equal(weights(halved.student), weights(learn(cut_in_two(dagger(), "student", 1, times=2)).student))
    whole = learn(dagger())
    torch.testing.assert_close(weights(halved.student), weights(whole.student), atol=1e-5, rtol=0)
    assert torch.equal(weights(learn(short_of_memory(dagger(halve_batch_on_oom=True), 4)).student), weights(halved.student))


def test_gradients_of_the_parts_that_still_fitted_are_dropped() -> None:
    halved = learn(short_of_memory(dagger(halve_batch_on_oom=True, gradient_accumulation=2), 4))  # the second half of the first batch
    assert halved.trainer.gradient_accumulation == 4
    assert torch.equal(weights(halved.student), weights(learn(dagger(gradient_accumulation=4)).student))


@pytest.mark.parametrize(("network", "step"), [("student", 2), ("critic", 1)])  # the student's turns ask the critic without gradient
def test_dmd2_halves_for_either_network_and_draws_the_same_noise_again(network: str, step: int) -> None:
    options = {"beta": ALL, "on_policy": False, "critic_updates": 2}
    halved = learn(short_of_memory(matching(halve_batch_on_oom=True, **options), 4, network))
    twin = learn(cut_in_two(matching(**options), network, step, times=1))
    assert halved.trainer.gradient_accumulation == 2
    for name in ("student", "critic"):
        assert torch.equal(*(weights(each.networks[name]) for each in (halved, twin)))


def test_batches_that_do_not_divide_are_halved_too() -> None:
    odd = {"batch_size": 6, "collect_size": 32}
    halved = learn(short_of_memory(dagger(halve_batch_on_oom=True, **odd), 2))  # 6, then 3 and 3, then 2, 2 and 2
    torch.testing.assert_close(weights(halved.student), weights(learn(dagger(**odd)).student), atol=1e-5, rtol=0)


def test_the_halving_is_told_recorded_and_kept_by_a_resumed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halved = short_of_memory(dagger(halve_batch_on_oom=True), 4)
    halved.train(tmp_path, progress=False, log_every=1, checkpoint_every=10)
    told = capsys.readouterr().err
    assert (
        "out of memory at step 2, in the gradient of 16 of batch_size=16 states at a time; from here on gradient_accumulation is 2" in told
    )
    assert [row["gradient_accumulation"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, *[4] * 19]
    restored = dagger(halve_batch_on_oom=True).load(tmp_path / "checkpoints" / "step_00000010")
    assert restored.trainer.gradient_accumulation == 4
    assert torch.equal(weights(learn(restored, 10).student), weights(halved.student))


def test_memory_that_runs_out_is_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(
        MemoryError, match=r"gradient of 16 of batch_size=16 .*; lower batch_size, raise gradient_accumulation=1, or set halve"
    ):
        learn(short_of_memory(dagger(), 4))
    with pytest.raises(
        MemoryError, match=r"gradient of 1 of batch_size=16 .*; there is no smaller batch; free memory, or make the student smaller"
    ):
        learn(short_of_memory(dagger(halve_batch_on_oom=True), 0))
    collecting = dagger()
    collecting.collector.collect = lambda *_: cpu()  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(MemoryError, match=r"out of memory while collecting 32 states .*; lower collect_size"):
        learn(collecting)


def test_other_errors_of_a_network_are_not_taken_for_memory() -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learn(short_of_memory(dagger(halve_batch_on_oom=True), 4, run_out=broken))


def test_several_processes_refuse_to_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"halve_batch_on_oom=true: 2 processes .* leave it out and raise gradient_accumulation"):
        dagger(halve_batch_on_oom=True)


# A full disk


def test_a_file_that_cannot_be_written_in_whole_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    with pytest.raises(OSError, match=f"cannot write {path}: File too large; make room") as error, disk_full_at(50_000):
        write_atomically(path, "x" * 100_000)
    assert error.value.errno == errno.EFBIG
    assert contents(tmp_path) == {"result.json": b"old"}


def test_pictures_that_cannot_be_written_in_whole_leave_the_ones_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    rows = {"student": np.random.default_rng(0).integers(0, 256, (64, 640, 3)).astype(np.uint8)}
    assert save_samples(path, {"student": rows["student"][:, :8]})
    before = contents(tmp_path)
    with pytest.raises(OSError, match=f"cannot write {path}: "), disk_full_at(50_000):
        save_samples(path, rows)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_cannot_be_written_in_whole_leaves_the_last_one(tmp_path: Path) -> None:
    learner = learn(dagger(num_updates=20), 10)
    save_checkpoint(learner, tmp_path)
    before = contents(tmp_path)
    learn(learner, 10)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/step_00000020: File too large; make room"), disk_full_at(30_000):
        save_checkpoint(learner, tmp_path)
    assert contents(tmp_path) == before


def test_a_pipeline_that_cannot_be_saved_in_whole_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    expert = load_expert("sd15", model=str(write_tiny_sd(tmp_path / "sd")), prompts=("a",))
    student = tmp_path / "run" / "student"
    with folder_atomically(student) as folder:
        (folder / "old").write_text("old")
    message = f"cannot write {student}: File too large"
    with pytest.raises(OSError, match=message), disk_full_at(50_000), folder_atomically(student) as folder:
        expert.save_student(expert.make_student(), folder, 4)
    assert contents(tmp_path / "run") == {"student/old": b"old"}


def test_a_line_of_metrics_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    agent, files = dagger(), RunFiles(Stopwatch())
    files.on_start(agent, tmp_path)
    with closing(files):
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # every write to it finds no space left
        with pytest.raises(OSError, match=f"cannot write {tmp_path}/metrics.jsonl: No space left on device; make room") as error:
            files.on_log(agent, {"step": 1, "loss": 0.5})
    assert error.value.errno == errno.ENOSPC


# Checkpoints


class Mark:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def refit(checkpoint: Path) -> None:
    """Makes the manifest's digest that of the state, as one would who means harm."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"] = hashlib.sha256((checkpoint / "state.pt").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def changed(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "state.pt")
    refit(checkpoint)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def without_a_setting(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["config"]["halve_batch_on_oom"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        bc().train(out, progress=False, checkpoint_every=10)
    return out / "checkpoints"


DAMAGED = r"step_00000020.* is damaged.*; remove .*step_00000020 to resume from the one before it"
VERSION = r"step_00000020 was written by another version of ddil \({}\); go on with that version, or start a new run"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: os.truncate(at / "state.pt", 1000), DAMAGED),
        (lambda at: flip(at / "state.pt"), DAMAGED),
        (lambda at: (at / "state.pt").unlink(), DAMAGED),
        (lambda at: (at / "manifest.json").unlink(), DAMAGED),
        (lambda at: (at / "manifest.json").write_text('{"step": 20, "sha'), DAMAGED),
        (lambda at: (at / "manifest.json").write_text("[]"), DAMAGED),
        (lambda at: (at / "manifest.json").write_text("{}"), DAMAGED),
        (without_a_setting, VERSION.format("only one of them has the setting halve_batch_on_oom")),
        (lambda at: changed(at, lambda state: state.pop("gradient_accumulation")), VERSION.format(r"KeyError\('gradient_accumulation'\)")),
        (lambda at: changed(at, lambda state: state["trainables"]["student"]["network"].popitem()), VERSION.format("(?s:.*)")),
    ],
    ids=["cut", "a bit", "lost", "no manifest", "half a manifest", "a list", "empty", "its config", "its state", "its network"],
)
def test_a_damaged_or_an_older_checkpoint_is_refused_with_its_cure(
    damage: Callable[[Path], Any], message: str, two_checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "step_00000020")
    with pytest.raises(ValueError, match=message):
        bc().load(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000020")  # as the user decides, not the library
    assert bc().load(tmp_path / "checkpoints").step == 10


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_run(two_checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(two_checkpoints / "step_00000020", tmp_path / "step_00000020"))
    torch.save({"step": Mark(tmp_path / "run by the pickle")}, checkpoint / "state.pt")
    refit(checkpoint)
    with pytest.raises(ValueError, match=r"state.pt holds more than tensors and plain values, and is not read; start a new run"):
        bc().load(checkpoint)
    assert not (tmp_path / "run by the pickle").exists()


def test_no_bit_of_a_safetensors_header_can_be_flipped_to_an_error_that_does_not_name_the_file(tmp_path: Path) -> None:
    path, network = tmp_path / "student.safetensors", nn.Linear(3, 2)
    save_file(network.state_dict(), path)
    whole = path.read_bytes()
    said = []
    for bit in range(8 * (8 + int.from_bytes(whole[:8], "little"))):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        try:
            load_weights(network, path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 8 * 8  # those of the length at least, and of the names
    assert all(str(path) in text for text in said)


# An evaluation


def test_a_damaged_batch_of_an_evaluation_is_named_with_its_cure(tmp_path: Path) -> None:
    make_evaluator(corners(), tmp_path)
    batch = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(batch, batch.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{batch} is damaged .*; remove it, and the batch is drawn again"):
        make_evaluator(corners(), tmp_path)


def test_an_evaluation_out_of_memory_names_its_batch_and_a_resume_takes_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = Evaluator._measure_batch

    def check(self: Evaluator, samples: Any, *args: Any) -> Any:
        if len(samples) > 10:
            cpu()
        return measured(self, samples, *args)

    monkeypatch.setattr(Evaluator, "_measure_batch", check)
    run = str(tmp_path / "run")
    argv = "--env gaussian_mixture --num_updates 1 --teacher_steps 8 --batch_size 4 --collect_size 8 --evaluate.n 20 --evaluate.n_action 2"
    with pytest.raises(SystemExit):
        dagger_module.main([*argv.split(), "--out", run])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: out of memory while evaluating 20 samples at a time (" in error
    assert error.endswith("; lower the evaluation's batch_size")
    dagger_module.main(["--resume", run, "--evaluate.batch_size", "10"])
    assert (tmp_path / "run" / "result.json").is_file()


# The table


@cache
def functions_of(module: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(f"{module}.py")
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("table", ["reliability.md", "public_reports.md"])
def test_every_test_that_a_table_of_faults_names_exists(table: str) -> None:
    lines = (ROOT / "docs" / "reference" / table).read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert named or "| tried" in row, f"no test in: {row}"
        for module, name in named:
            assert name in functions_of(module), f"{module} has no {name}"
