"""Two processes on gloo do what one does on both their batches; they resume exactly, write once, count both and stop together.

Every rank is a process of its own, forked from a server that has imported the library once.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ENV, ROOT, same_students
from kills import ARGV, after, before, is_checkpoint, outcome, patch
from safetensors.torch import load_file
from scaling import Network, moved
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddil_agents import DMD2, LCM, Algorithm, Beta, Dagger, Gail
from ddil_agents.devices import ranks as ranks_module
from ddil_agents.devices import sharding
from ddil_agents.states.collect import STREAMS, rank_stream_seed, stream_seed
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.trainer import Trainer
from ddil_env import GaussianMixtureExpert, load_expert
from ddil_env.adapters import LoRA

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ddil_agents", "ddil_agents.commands.run", "torch.distributed", "torch.utils.tensorboard", "pytest"])
SECONDS = 100  # that a rank may take on a busy machine

CONFIGS = ROOT / "configs" / "accelerate"
MEANS = [[-0.8, 0.0, 0.3], [0.8, 0.2, 0.0], [0.0, -0.7, 0.5]]
SMALL: dict[str, Any] = {
    "num_updates": 9,
    "teacher_steps": 8,
    "batch_size": 8,
    "collect_size": 24,
    "updates_per_collect": 3,
    "capacity": 32,
    "warmup_updates": 2,
    "learning_rate": 5e-3,
    "ema": 0.8,
    "student": {"width": 16, "depth": 2},
}
ALL = Beta(0.5, 0.2, 0.3)
CASES: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "dagger": (Dagger, {"beta": ALL, "p_expert": 0.3}),
    "dagger, accumulated, bf16": (Dagger, {"beta": ALL, "gradient_accumulation": 2, "mixed_precision": "bf16"}),
    "lcm": (LCM, {"beta": ALL, "teacher_steps": 4, "collect_size": 120, "capacity": 200, "solver_steps": 50}),
    "dmd2": (DMD2, {"beta": ALL, "critic_updates": 3}),
    "dmd2, accumulated, gan": (
        DMD2,
        {"beta": ALL, "critic_updates": 2, "gan_weight": 0.1, "gradient_accumulation": 2, "on_policy": False, "num_updates": 18},
    ),
    "gail": (Gail, {"beta": ALL, "discriminator_width": 8}),
    "dmd2, adapters": (
        DMD2,
        {"beta": ALL, "critic_updates": 2, "lora": LoRA(rank=2), "student": {}, "critic_learning_rate": 5e-3},
    ),
}
WHOLE = ("gail", "dmd2, adapters")  # which do not shard


def expert() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, [1, 2, 3], labels=[0, 1, 1])


def build(case: str, **changed: Any) -> Algorithm:
    agent, settings = CASES[case]
    return agent(load_expert("digits8") if "lora" in settings else expert(), agent.Config(**{**SMALL, **settings, **changed}))


# Processes


def rank_of(function: Callable[..., Any], rank: int, world: int, directory: Path, args: tuple[Any, ...]) -> None:
    """The body of a process: joins the group by a file, so that no port is taken, and runs the function."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with (directory / f"{rank}.txt").open("w") as said:
        sys.stdout = sys.stderr = said
        os.dup2(said.fileno(), 2)
        dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world)
        function(*args)


def launch(function: Callable[..., Any], *args: Any, world: int = 2, scratch: Path) -> tuple[list[int], list[str]]:
    """Exit codes of the ranks, and what they said. As torchrun does, ends the others when one has died of a signal."""
    directory = scratch / f"ranks{len(list(scratch.glob('ranks*')))}"
    directory.mkdir()
    started = [SERVER.Process(target=rank_of, args=(function, rank, world, directory, args)) for rank in range(world)]
    for process in started:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in started], SECONDS)
    for process in started:
        process.join(SECONDS if all(p.exitcode is None or p.exitcode >= 0 for p in started) else 5)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    said = [(directory / f"{rank}.txt").read_text() for rank in range(world)]
    assert codes.count(None) < world, f"hangs: {said}"
    return [-signal.SIGKILL if code is None else code for code in codes], said


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """What is built inside draws as that rank does."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(ranks_module, "rank", lambda: rank)
        yield


def networks(learner: Algorithm) -> dict[str, Tensor]:
    """All weights: of each network that learns, and of the average."""
    found = {name: trainable.unwrapped for name, trainable in learner.trainer.trainables.items()} | {"average": learner.ema_student}
    return {name: torch.cat([flat(p.detach()) for p in network.parameters()]) for name, network in found.items()}


def flat(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).flatten()


def local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


# The same weights


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "100"}


def learn_all(out: Path, environment: dict[str, str]) -> None:
    """Each case in turn, in one group; what this rank ends with."""
    os.environ |= environment
    ended, sent = {}, list[int]()
    count_bytes(sent)
    for case in cases(environment):
        learner = build(case)
        drawn: list[list[int]] = []  # j, and the states of each source
        collect = learner.collector.collect

        def watched(*args: Any, collect: Any = collect, learner: Any = learner, drawn: list[list[int]] = drawn) -> Any:
            states = collect(*args)
            drawn.append([getattr(learner.collector, "j", -1), *states["source"].bincount(minlength=3).tolist()])
            return states

        learner.collector.collect = watched  # type: ignore[method-assign]
        sent.clear()
        learner.learn(progress=False)
        learning = sum(sent)
        student = learner.trainer.trainables["student"]
        momenta = [state["exp_avg"] for state in student.optimizer.state_dict()["state"].values()]
        held = [[local(p).numel() for p in tensors] for tensors in (student.unwrapped.parameters(), momenta)]
        ended[case] = {
            "weights": networks(learner),
            "drawn": drawn,
            "sent": learning,
            "average": 4 * sum(p.numel() for p in learner.ema_student.parameters()),
            "nfe": (learner.teacher_nfe, learner.student_nfe),
            "spent": learner.total_nfe(),
            "held": list(map(sum, held)),
        }
        ended[case]["next"] = learner.collector.streams["noise"].get_state()
    torch.save(ended, out / f"{ranks_module.rank()}.pt")


def count_bytes(sent: list[int]) -> None:
    """Notes the bytes of every gathering and scattering of sharded networks; torch has renamed these functions."""
    for name in ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"):
        if (original := getattr(dist, name, None)) is not None:

            def counted(*args: Any, original: Any = original, **options: Any) -> Any:
                sent.append(max(t.numel() * t.element_size() for t in [*args, *options.values()] if isinstance(t, Tensor)))
                return original(*args, **options)

            setattr(dist, name, counted)


def cases(environment: dict[str, str]) -> list[str]:
    return [case for case in CASES if not environment or case not in WHOLE]


def learned(directory: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """What the two ranks end with."""
    codes, said = launch(learn_all, directory, environment, scratch=directory)
    assert codes == [0, 0], said
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return learned(tmp_path_factory.mktemp("learned"), {})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return learned(tmp_path_factory.mktemp("sharded"), SHARDED)


def in_one(case: str) -> tuple[Algorithm, list[Algorithm]]:
    """A single process that takes the concatenation of both ranks' batches, and the two that draw them."""
    whole, halves = build(case, batch_size=2 * SMALL["batch_size"]), []
    for rank in range(2):
        with as_rank(rank):
            halves.append(build(case))
    if isinstance(whole, DMD2):
        of: Any = halves

        def diffusion(x: Tensor, *span: float) -> tuple[Tensor, ...]:
            return tuple(map(torch.cat, zip(*(half.draw_noise(x, *span) for half, x in zip(of, x.chunk(2), strict=True)), strict=True)))

        def data(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(torch.cat, zip(*(half.draw_data(x) for half, x in zip(of, x.chunk(2), strict=True)), strict=True)))

        whole.draw_noise, whole.draw_data = diffusion, data  # type: ignore[method-assign, assignment]
    while whole.step < whole.total_updates:
        for half in halves:
            half.step = whole.step
            half.networks["student"].load_state_dict(whole.networks["student"].state_dict())
            if whole.step % whole.collect_every == 0:
                half.trainer.collect()
        parts = zip(*(half.trainer.split_batch(half.draw()) for half in halves), strict=True)
        whole.trainer.update(torch.cat([part for pair in parts for part in pair]))
    return whole, halves


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_with_one_and_the_same_weights(case: str, ended: list[dict[str, Any]]) -> None:
    first, second = (rank[case]["weights"] for rank in ended)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case])  # where sums in another order round to other halves
def test_two_ranks_learn_what_one_process_learns_from_both_batches(case: str, ended: list[dict[str, Any]]) -> None:
    whole, halves = in_one(case)
    start, end = networks(build(case)), networks(whole)
    for name, theirs in ended[0][case]["weights"].items():
        assert float((end[name] - start[name]).abs().max()) > 1e-3
        if "adapters" in case:  # where AdamW makes a step of a gradient that is nothing but a convolution's rounding
            assert float((theirs - end[name]).norm()) < 0.01 * float((end[name] - start[name]).norm()), name
        else:
            torch.testing.assert_close(theirs, end[name], atol=1e-6, rtol=0, msg=lambda why, name=name: f"{name}: {why}")
    if case not in ("dmd2", "dmd2, adapters"):  # whose teacher answers the samples of the whole
        assert [rank[case]["nfe"][0] for rank in ended] == [half.teacher_nfe + whole.teacher_nfe // 2 for half in halves]


@pytest.mark.parametrize("case", cases(SHARDED))
def test_sharded_networks_learn_what_whole_ones_do(case: str, ended: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
    atol = 1e-6 if "bf16" not in case else 1e-3
    for name, theirs in ended[0][case]["weights"].items():
        torch.testing.assert_close(shared[0][case]["weights"][name], theirs, atol=atol, rtol=0, msg=lambda why, name=name: f"{name}: {why}")
        assert torch.equal(shared[0][case]["weights"][name], shared[1][case]["weights"][name])
    assert shared[0][case]["spent"] == ended[0][case]["spent"]
    whole = [ended[0][case]["weights"]["student"].numel()] * 2
    assert ended[0][case]["held"] == whole
    assert [sum(of) for of in zip(*(rank[case]["held"] for rank in shared), strict=True)] == whole
    assert max(shared[0][case]["held"]) < 0.6 * whole[0]


@pytest.mark.parametrize("case", ["dagger", "dagger, accumulated, bf16", "lcm", "dmd2"])
def test_sharded_networks_send_what_the_cost_model_says(case: str, shared: list[dict[str, Any]]) -> None:
    config, found = build(case).config, shared[0][case]
    network = Network(found["average"] // 4, 0)
    said = config.num_updates * moved(config, network, ranks=2, sharded=True)
    assert said <= found["sent"] / 2 < 1.1 * said  # a half: (W − 1)/W; above: rows are padded


@pytest.mark.parametrize("case", CASES)
def test_what_is_spent_is_the_sum_over_the_ranks(case: str, ended: list[dict[str, Any]]) -> None:
    first, second = (rank[case] for rank in ended)
    assert first["spent"] == second["spent"] == tuple(map(sum, zip(first["nfe"], second["nfe"], strict=True)))


# Random numbers


def test_ranks_draw_from_streams_of_their_own_and_the_first_one_from_those_of_a_single_process() -> None:
    names = [*STREAMS, "source", "disturbance", "dropout"]
    seeds = []
    for rank in range(512):
        with as_rank(rank):
            seeds += [rank_stream_seed(seed, name) for seed in (0, 1) for name in names]
    assert seeds[: 2 * len(names)] == [stream_seed(seed, name) for seed in (0, 1) for name in names]
    assert len(set(seeds)) == len(seeds)


def test_ranks_start_from_the_same_weights_and_draw_other_states() -> None:
    one, again = build("dagger"), build("dagger")
    with as_rank(1):
        other = build("dagger")
    assert all(torch.equal(weights, networks(other)[name]) for name, weights in networks(one).items())
    for learner in (one, again, other):
        learner.trainer.collect()
    x, same, different = (learner.draw()["x_t"] for learner in (one, again, other))
    assert torch.equal(x, same)
    assert not torch.isin(x, different).any()


def test_a_rank_has_a_dropout_of_its_own() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    build("dagger")
    assert torch.equal(torch.get_rng_state(), state)  # the caller's, in a single process
    drawn = []
    for rank in (1, 2):
        with as_rank(rank):
            build("dagger")
            drawn.append(torch.rand(4))
    assert not torch.isin(*drawn).any()


@pytest.mark.parametrize("case", ["dmd2", "dmd2, accumulated, gan", "dmd2, adapters"])
def test_all_ranks_unroll_to_the_same_time_and_do_the_same_work(case: str, ended: list[dict[str, Any]]) -> None:
    first, second = (rank[case]["drawn"] for rank in ended)
    assert first == second
    assert all(len(set(column)) > 1 for column in zip(*first, strict=True))  # j, and each source


# Runs


def command(directory: Path, argv: list[str], fault: str | None, environment: dict[str, str]) -> None:
    """The body of a rank: the command line, with something amiss."""
    os.environ |= environment
    os.chdir(directory)
    Path("env.yaml").write_text(ENV)
    if fault is not None:
        faulty(fault)
    from ddil_agents import dagger

    dagger.main(argv)


def faulty(fault: str) -> None:
    """Arranges for that fault in this rank."""
    from ddil_agents.states.buffer import SourceBuffer
    from ddil_agents.training import checkpoint

    def not_finite(original: Callable[..., Any], *args: Any) -> Any:
        batch = original(*args)
        batch["x_s"] = batch["x_s"] * torch.nan
        return batch

    def full_disk(original: Callable[..., Any], *args: Any) -> None:
        raise OSError(28, "No space left on device")

    faults: dict[tuple[str, int], Callable[[], None]] = {
        ("rank 1 is killed in a gradient step", 1): lambda: patch(Trainer, "update", 17, after),
        ("rank 1 is killed in saving", 1): lambda: patch(torch, "save", 3, after),
        ("rank 0 is killed before the renaming", 0): lambda: patch(checkpoint.os, "replace", 2, before, is_checkpoint),
        ("a label of rank 1 is not finite", 1): lambda: patch(SourceBuffer, "sample", 5, not_finite),
        ("the disk of rank 1 is full", 1): lambda: patch(torch, "save", 2, full_disk),
    }
    faults.get((fault, ranks_module.rank()), lambda: None)()


def run(
    directory: Path, argv: list[str], fault: str | None = None, world: int = 2, environment: dict[str, str] | None = None
) -> tuple[list[int], list[str]]:
    return launch(command, directory, argv, fault, environment or {}, world=world, scratch=directory)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    codes, said = run(directory, [*ARGV, "--out", "run"])
    assert codes == [0, 0], said
    assert "dagger@4" in said[0]
    assert said[1] == ""
    return directory / "run"


@pytest.mark.parametrize(
    "fault", ["rank 1 is killed in a gradient step", "rank 1 is killed in saving", "rank 0 is killed before the renaming"]
)
def test_a_run_of_two_ranks_goes_on_exactly_when(fault: str, unbroken: Path, tmp_path: Path) -> None:
    codes, _ = run(tmp_path, [*ARGV, "--out", "run"], fault)
    assert codes[int(fault[5])] == -signal.SIGKILL
    codes, said = run(tmp_path, ["--resume", "run"])
    assert codes == [0, 0], said
    assert same_students(tmp_path / "run", unbroken)
    assert outcome(tmp_path / "run") == outcome(unbroken)


def test_a_sharded_run_goes_on_exactly_and_ends_as_one_of_whole_networks(unbroken: Path, tmp_path: Path) -> None:
    for place, fault in (("through", None), ("killed", "rank 1 is killed in a gradient step")):
        (tmp_path / place).mkdir()
        codes, said = run(tmp_path / place, [*ARGV, "--out", "run"], fault, environment=SHARDED)
        assert codes == [0, 0] if fault is None else codes[1] == -signal.SIGKILL, said
    codes, said = run(tmp_path / "killed", ["--resume", "run"], environment=SHARDED)
    assert codes == [0, 0], said
    through, killed = (tmp_path / place / "run" for place in ("through", "killed"))
    assert same_students(through, killed)
    assert outcome(through) == outcome(killed)
    ours, theirs = (load_file(path / "student" / "student.safetensors") for path in (through, unbroken))
    assert all(torch.allclose(ours[name], weight, atol=1e-5) for name, weight in theirs.items())
    ours, theirs = (torch.load(path / "checkpoints/step_00000024/state.pt", weights_only=True) for path in (through, unbroken))
    for part in ("network", "optimizer"):
        assert shapes(ours["trainables"]["student"][part]) == shapes(theirs["trainables"]["student"][part])


def shapes(state: Any) -> Any:
    """A nested state's keys and shapes."""
    return {key: shapes(value) for key, value in state.items()} if isinstance(state, dict) else getattr(state, "shape", None)


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_of_two_ranks_does_not_go_on_with(world: int, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    codes, said = run(tmp_path, ["--resume", "run"], world=world)
    assert codes == [2] * world
    assert f"is of 2 processes, each with states and random numbers of its own, and here are {world}; go on with 2" in said[0]


def test_a_rank_whose_part_of_the_checkpoint_is_damaged_stops_all(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    os.truncate(tmp_path / "run" / "checkpoints" / "step_00000024" / "rank_0001.pt", 1000)
    codes, said = run(tmp_path, ["--resume", "run"])
    assert codes == [2, 2]
    assert all("step_00000024/rank_0001.pt is damaged: its SHA-256 is not the manifest's; remove" in text for text in said)


@pytest.mark.parametrize("prioritised", ["true", "false"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(prioritised: str, tmp_path: Path) -> None:
    argv = [*ARGV, "--out", "run", "--prioritised", prioritised, "--beta.schedule", "constant", "--beta.forward", ".6667"]
    codes, said = run(tmp_path, argv, "a label of rank 1 is not finite")
    assert codes == [2, 2]
    assert all("the loss is not finite at step 5, on states of: forward" in text for text in said)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [3]


def test_a_rank_that_cannot_save_stops_all(tmp_path: Path) -> None:
    codes, said = run(tmp_path, [*ARGV, "--out", "run"], "the disk of rank 1 is full")
    assert codes == [2, 2]
    assert re.search(r"No space left on device; make room .* \(on rank 1\)", said[0])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000007"]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "fsdp.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_makes_one_run_that_counts_both_processes(launcher: str, unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(ENV)
    words = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "ddil_agents.dagger", *ARGV, "--out", "run"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| dagger@4 ") == 1  # one table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env.yaml", "run"]
    ours, theirs = outcome(tmp_path / "run"), outcome(unbroken)
    if launcher == "torchrun":
        assert same_students(tmp_path / "run", unbroken)
        assert ours == theirs
    for part in ("nfe", "checkpoints", "config", "lines"):
        assert ours[part] == theirs[part]


def test_metrics_and_result_count_all_ranks(unbroken: Path, tmp_path: Path) -> None:
    codes, said = run(tmp_path, [*ARGV, "--out", "run"], world=1)
    assert codes == [0], said
    one, two = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "run", unbroken))
    for a, b in zip(one, two, strict=True):
        assert sum(b["source_counts"].values()) == 2 * sum(a["source_counts"].values())
        assert b["held"] == {name: 2 * count for name, count in a["held"].items()}
        assert b["beta"] == a["beta"]
        assert b["loss"] != a["loss"]
    a, b = (json.loads((path / "result.json").read_text()) for path in (tmp_path / "run", unbroken))
    assert (a["processes"], b["processes"]) == (1, 2)
    ranks = [torch.load(unbroken / "checkpoints/step_00000024" / file, weights_only=True)["nfe"] for file in ("state.pt", "rank_0001.pt")]
    first, second = (rank["teacher"] for rank in ranks)
    assert first == a["teacher_nfe"] != second  # the first rank's actors and stops are those of a single process
    assert b["teacher_nfe"] == two[-1]["teacher_nfe"] == b["models"]["dagger@4"]["teacher_nfe"] == first + second
    assert b["student_nfe"] == two[-1]["student_nfe"] > 1.8 * a["student_nfe"]
    assert load_file(unbroken / "student" / "student.safetensors").keys() == load_file(tmp_path / "run/student/student.safetensors").keys()


@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["whole", "sharded"])
def test_stages_follow_one_another_on_all_ranks(environment: dict[str, str], tmp_path: Path) -> None:
    stages = "[{num_steps: 4, num_updates: 3}, {num_steps: 2, num_updates: 3}]"
    codes, said = run(tmp_path, [*ARGV, "--out", "run", "--stages", stages], environment=environment)
    assert codes == [0, 0], said
    whole, *each = (json.loads((tmp_path / "run" / place / "result.json").read_text()) for place in (".", "stage_1", "stage_2"))
    assert whole["teacher_nfe"] == sum(result["teacher_nfe"] for result in each)
    assert each[0]["teacher_nfe"] % 2 == 0
    assert same_students(tmp_path / "run", tmp_path / "run" / "stage_2")


# What is refused


def test_what_runs_in_one_process_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    from ddil_agents.ppo import PPOAgent

    monkeypatch.setattr(ranks_module, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"ppo trains in one process, and here are 2; start it with python -m ddil_agents\.ppo"):
        PPOAgent(expert())


def arguments(config: str) -> Any:
    """What accelerate launch makes of a config."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "-m", "ddil_agents.dagger"])
    )[0]


def test_accelerate_reads_every_config_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    read = {path.name: arguments(path.name) for path in CONFIGS.iterdir()}
    processes = {name: (args.num_processes, args.num_machines, args.multi_gpu, args.use_fsdp) for name, args in read.items()}
    assert processes == {
        "1gpu.yaml": (1, 1, False, False),
        "8gpu.yaml": (8, 1, True, False),
        "2nodes.yaml": (16, 2, True, False),
        "fsdp.yaml": (8, 1, False, True),
    }
    for name, value in prepare_multi_gpu_env(read["fsdp.yaml"]).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    assert not sharding.is_requested()  # one process has nobody to share with
    monkeypatch.setattr(ranks_module, "world_size", lambda: 8)
    assert sharding.is_requested()


@pytest.mark.parametrize(
    ("name", "value"), [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true"), ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")]
)
def test_a_way_of_sharding_that_is_not_supported_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, setting in {**SHARDED, name: value}.items():
        monkeypatch.setenv(key, setting)
    monkeypatch.setattr(ranks_module, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=rf"{name.lower()}={value}: need .*; start from configs/accelerate/fsdp\.yaml"):
        build("dagger")


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "MEGATRON_LM"])
def test_a_plug_in_of_accelerate_that_is_not_supported_is_refused(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ValueError, match=f"accelerate's {plugin} is not supported; choose a config of configs/accelerate"):
        build("dagger")


def test_networks_laid_out_channels_last_can_be_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_requested", lambda: True)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        network = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sharding.shard(network, torch.device("cpu"))
        assert sharding.is_sharded(network)
    finally:
        dist.destroy_process_group()
