"""What are own histories worth to a surrogate of a chaotic equation? Arms of imitation learning, cell by cell, paired by seed.

    python benchmarks/kuramoto_arms.py --jobs 2            # hours on two cores; goes on where it stopped
    python benchmarks/kuramoto_arms.py --report_only       # the tables, from the runs that are there

    kuramoto.json, kuramoto.md      the tables (kuramoto_report.py)
    kuramoto_runs.jsonl             a line for each run, all that these are made of; a run that has its line is not run again

A small student learns to step the Kuramoto–Sivashinsky equation in N denoising steps a frame, and then runs for 400 frames of its own.
Arms differ in the histories that are labelled; labels, updates and initial weights are equal. Teachers other than the shipped one are
trained when they are first needed, about five minutes each, and kept in the folder of the runs. What is expected, which metric, which test
and how many seeds was written down in benchmarks/README.md before the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from kuramoto_report import FEWER, MAIN, NOISES, SEEDS, TUNING, write_report
from records import Records, collect_records, place_of, run_tasks
from torch import Tensor

from ddil_agents import Algorithm, BehaviourCloning, Beta, Dagger, Dart
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.states.collect import Collector
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid
from ddil_env.experts.kuramoto import Kuramoto, KuramotoSolver
from ddil_env.experts.train_kuramoto import train

VERSION = 1  # to be raised where the library, the world or the training of teachers changes what a run is
ROLLOUTS = 64  # of 400 frames, from the same starts and with the same noise for all
EVALUATION_SEED, TUNING_EVALUATION_SEED = 20_001, 20_000
TEACHER_STEPS = 8
BASE: dict[str, Any] = {  # configs/dagger/kuramoto.yaml, but for the learning rate
    "num_updates": 1000,
    "collect_size": 275,
    "updates_per_collect": 64,
    "capacity": 4400,
}
SMALL = {"channels": 24, "depth": 2}
OWN = Beta(0, 0, 1, schedule="dagger", decay=0.5)  # recorded histories first, then the student's own alone
CUTOFF = 9  # the highest mode that low-passed frames keep

TEACHERS: dict[str, dict[str, Any]] = {  # how each was trained, beside the defaults of train_kuramoto
    "shipped": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "clean": {"noise": 0.0},
    "absolute": {"absolute": True},
    "dt 3": {"dt": 3.0},
    "dt 3, absolute": {"dt": 3.0, "absolute": True},
}


class Cell(NamedTuple):
    """A teacher, a student and its number of steps."""

    teacher: str = "shipped"
    num_steps: int = 4
    small: bool = True  # else the teacher's network, from its weights
    solver: bool = False  # whether the equation's solver labels in the teacher's place
    learning_rate: float = 0.01


CELLS = {
    "4 steps": Cell(),
    "2 steps": Cell(num_steps=2),
    "the teacher's network": Cell(small=False, learning_rate=0.001),
    "the solver as expert": Cell(solver=True),
    "a teacher of clean histories": Cell("clean"),
    "a second teacher": Cell("seed 1"),
    "a third teacher": Cell("seed 2"),
    "absolute targets": Cell("absolute"),
    "dt 3": Cell("dt 3"),
    "dt 3, absolute targets": Cell("dt 3, absolute"),
}


class Arm(NamedTuple):
    """An arm: its agent, what it has of its own, in how many seeds it runs, and whether on the tuning seeds too."""

    agent: type[Algorithm]
    settings: dict[str, Any]
    seeds: int = FEWER
    tuned: bool = False
    low_pass: bool = False


class WithinFrame(Dagger):
    """DAgger whose rollouts are one denoising: the student's own x_t, and recorded histories alone."""

    name = "within_frame"

    def make_collector(self, *args: Any, **settings: Any) -> Collector:
        collector = super().make_collector(*args, **settings)
        collector.world = None
        return collector


class LowPass(StudentPolicy):
    """A student of which every frame keeps the modes 1 to `CUTOFF` alone: what a user does who knows the equation."""

    def __init__(self, policy: StudentPolicy, expert: KuramotoSolver) -> None:
        super().__init__(policy.student, expert)
        self.transition, self.sample_of = expert.make_world(1).transition, expert.sample_of

    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        x_s = super().act(x_t, t, s, c, w)
        if c is None or s[0] > 0:
            return x_s
        following, _ = self.transition(c, x_s)
        return self.sample_of(c[:, -1], low_pass(following[:, -1]))


def low_pass(frames: Tensor) -> Tensor:
    """Frames (…, points) without their mean and their modes above `CUTOFF`."""
    modes = torch.fft.rfft(frames)
    modes[..., 0], modes[..., CUTOFF + 1 :] = 0, 0
    return torch.fft.irfft(modes, frames.shape[-1])


RATES = (3e-3, 5e-3, 2e-2)  # beside the cell's own, on the tuning seeds
CORE = ("bc", "ddil", "dagger", "adaptive", "dart 0.03")  # the arms of every cell; of the cells in MAIN, all
ARMS = {
    "bc": Arm(BehaviourCloning, {}, len(SEEDS), tuned=True),
    "ddil": Arm(Dagger, {"beta": Beta(0.5, 0, 0.5)}, len(SEEDS)),
    "dagger": Arm(Dagger, {"beta": OWN}, len(SEEDS), tuned=True),
    "adaptive": Arm(Dagger, {"beta": Beta(0.5, 0, 0.5, schedule="adaptive")}),
    "teacher": Arm(Dagger, {"beta": Beta(0.5, 0.5, 0)}),
    "within frame": Arm(WithinFrame, {"beta": OWN}),
    **{f"dart {noise:g}": Arm(Dart, {"perturbation": 0.0, "condition_noise": noise}, tuned=True) for noise in NOISES},
    "low-pass": Arm(BehaviourCloning, {}, low_pass=True),
    "bc, four times": Arm(BehaviourCloning, {"num_updates": 4000, "capacity": 17600}),
    "unroll 2": Arm(Dagger, {"beta": OWN, "unroll": 2}),
    **{f"bc at rate {rate:g}": Arm(BehaviourCloning, {"learning_rate": rate}, 0, tuned=True) for rate in RATES},
    **{f"dagger at rate {rate:g}": Arm(Dagger, {"beta": OWN, "learning_rate": rate}, 0, tuned=True) for rate in RATES},
}
ONE_CELL = ("bc, four times", "unroll 2", *(arm for arm in ARMS if "rate" in arm))  # arms of the first cell alone


class Task(NamedTuple):
    """All arms of one seed of one cell."""

    cell: str
    seed: int
    runs: Path
    chosen: tuple[str, ...] = ()  # of the arms; empty: all

    @property
    def arms(self) -> list[str]:
        return [name for name in self.chosen or ARMS if self.seed in seeds_of(self.cell, name)]

    def place(self, arm: str) -> Path:
        """Where the record of an arm lies."""
        return place_of(self.runs, (self.cell, arm, self.seed))


def seeds_of(cell: str, arm: str) -> tuple[int, ...]:
    """The seeds of an arm in a cell, those of tuning first; none if it does not run there."""
    if cell not in MAIN:
        return tuple(SEEDS[:FEWER]) if arm in CORE else ()
    if arm in ONE_CELL and cell != MAIN[0]:
        return ()
    return (*(TUNING if ARMS[arm].tuned else ()), *SEEDS[: ARMS[arm].seeds])


def weights_of(teacher: str, runs: Path) -> str | None:
    """The file of a teacher's weights, which is trained if it is not there; None for the shipped one."""
    if teacher == "shipped":
        return None
    path = runs / "teachers" / f"{teacher.replace(',', '').replace(' ', '_')}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            partial = path.with_suffix(".partial")
            train(partial, **TEACHERS[teacher])
            partial.replace(path)
    return str(path)


@cache
def make_expert(cell: Cell, runs: Path) -> KuramotoSolver:
    return (KuramotoSolver if cell.solver else Kuramoto)(weights=weights_of(cell.teacher, runs))


def substeps_of(cell: Cell) -> int:
    return 1 if cell.solver else TEACHER_STEPS // cell.num_steps


@cache
def make_evaluator(cell: Cell, runs: Path, seed: int) -> EpisodeEvaluator:
    """A cell's evaluator; the expert's rollouts are run once in each process."""
    expert = make_expert(cell, runs)
    return EpisodeEvaluator(ExpertPolicy(expert, substeps_of(cell)), TimeGrid(expert.schedule, cell.num_steps), ROLLOUTS, seed)


def config_of(cell: Cell, arm: str, seed: int) -> Any:
    own = {"num_steps": cell.num_steps, "teacher_steps": substeps_of(cell) * cell.num_steps, "student": SMALL if cell.small else {}}
    own |= {"learning_rate": cell.learning_rate, "seed": seed}
    return ARMS[arm].agent.Config(**BASE | own | ARMS[arm].settings)


def digest(cell: Cell, arm: str) -> str:
    """Of all that a run depends on and that stands here or in its config; of a teacher that is trained here, how it is."""
    taught, config = TEACHERS[cell.teacher], dataclasses.asdict(config_of(cell, arm, 0))
    found = [VERSION, cell, taught or Kuramoto().identity(), ROLLOUTS, EVALUATION_SEED, ARMS[arm].agent.name, ARMS[arm].low_pass, config]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def run(task: Task) -> None:
    """Trains and evaluates the arms of a seed that have no record yet, and writes one for each."""
    torch.set_num_threads(1)
    cell = CELLS[task.cell]
    for arm in task.arms:
        if task.place(arm).is_file():
            continue
        evaluator = make_evaluator(cell, task.runs, TUNING_EVALUATION_SEED if task.seed in TUNING else EVALUATION_SEED)
        expert, began, began_cpu = make_expert(cell, task.runs), time.monotonic(), time.process_time()
        agent = ARMS[arm].agent(expert, config_of(cell, arm, task.seed))
        record: dict[str, Any] = {"cell": task.cell, "arm": arm, "seed": task.seed, "settings": digest(cell, arm)}
        record["teacher_weights"] = expert.identity()["weights"]
        try:
            agent.learn(progress=False)
            policy = agent.student_policy
            record |= evaluator.evaluate(LowPass(policy, expert) if ARMS[arm].low_pass else policy)
        except FloatingPointError as error:
            record |= {"lost": str(error), "success": 0.0}
        record |= {"teacher": evaluator.evaluate(evaluator.expert_policy)}
        record |= {"teacher_nfe": agent.teacher_nfe, "student_nfe": agent.student_nfe, "visits": agent.collector.world_steps}
        record |= {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - began_cpu, 1)}
        record |= provenance(expert.device)
        task.place(arm).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(task.place(arm), json.dumps(record))


def check(records: Records) -> None:
    """Refuses records of other settings than those that stand here, and of two trainings of one teacher.

    Raises:
        ValueError: so; names the first.
    """
    weights: dict[str, str] = {}
    for (name, arm, seed), record in records.items():
        if name not in CELLS or arm not in ARMS or record["settings"] != digest(CELLS[name], arm):
            raise ValueError(
                f"the run of {arm} in {name!r}, seed {seed}, had other settings than it has now; remove it from --out and --runs"
            )
        if weights.setdefault(name, record["teacher_weights"]) != record["teacher_weights"]:
            raise ValueError(
                f"the run of {arm} in {name!r}, seed {seed}, had a teacher of weights {record['teacher_weights']}, others have one of "
                f"{weights[name]}; runs of a cell need the same file of weights: remove those of one of them from --out and --runs"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/kuramoto"), help="where the runs and the trained teachers are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kuramoto.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*TUNING, *SEEDS], metavar="SEED", help="default: %(default)s")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL", help=f"of {list(CELLS)}; default: all")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"of {list(ARMS)}; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="seeds of cells at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    kept = args.out.with_name(f"{args.out.stem}_runs.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    records = collect_records(args.runs, kept, check)
    if not args.report_only:
        tasks = [Task(name, seed, args.runs, tuple(args.arms)) for seed in args.seeds for name in args.cells]
        records = run_tasks(run, [task for task in tasks if task.arms], args.runs, kept, check, args.jobs)
    if not records:
        parser.error(f"--runs {args.runs}: nothing has run there; leave --report_only out, or name another folder")
    write_report(records, CELLS, args.out)


if __name__ == "__main__":
    main()
