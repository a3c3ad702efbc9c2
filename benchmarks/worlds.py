"""When does DDIL help where samples feed back? Arms of imitation learning in worlds, cell by cell, paired by seed.

    python -m pip install 'ddil[worlds]'
    python benchmarks/worlds.py --jobs 2            # hours on two cores; goes on where it stopped
    python benchmarks/worlds.py --report_only       # the tables, from the runs that are there

    worlds.json, worlds.md, worlds.png      the tables and the picture (worlds_report.py, worlds_adaptive.py)
    worlds_runs.jsonl                       a line for each run, all that these are made of; a run that has its line is not run again

In a cell a student learns a diffusion policy in N steps, from as many labels of the same teacher and in as many updates, whatever the arm:
arms differ in the conditions that are labelled. Every arm of a seed starts from the same weights. What is expected, which metric, which
test and how many seeds was written down in benchmarks/README.md before the runs.
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
from records import Records, collect_records, place_of, run_tasks
from worlds_report import write_report
from worlds_runs import SEEDS, TUNED, TUNING

from ddil_agents import Algorithm, BehaviourCloning, Beta, Dagger, Dart
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import Expert, ExpertPolicy, TimeGrid, load_expert

VERSION = 1  # to be raised where the library or a world changes what a run is: records of another one are not mixed with these
FEWER = 5  # seeds of arms that are not tested
EVALUATION_SEED, TUNING_EVALUATION_SEED = 20_001, 20_000
TEACHER_STEPS = 16
BASE: dict[str, Any] = {
    "teacher_steps": TEACHER_STEPS,
    "num_updates": 2000,
    "learning_rate": 3e-3,
    "collect_size": 512,
    "updates_per_collect": 128,
    "capacity": 8192,  # all labels: 16 collections of 512
    "student_collections": None,
}
LATER = {"unroll": 0}  # settings that the library has since the first runs, and the values at which they change nothing
EPISODES = {"fork": 500, "lunar_lander": 100}


class Arm(NamedTuple):
    """An arm: its agent, what it has of its own, and in how many seeds it runs."""

    agent: type[Algorithm]
    settings: dict[str, Any]
    seeds: int = FEWER


def dart(seeds: int = FEWER, **noise: float) -> Arm:
    """Behaviour cloning under noise in what is executed, of half teacher's episodes, or in the conditions of demonstrations."""
    beta = Beta(0.5, 0.5, 0) if "execution_noise" in noise else Beta(1, 0, 0)
    return Arm(Dart, {"perturbation": 0.0, "beta": beta, **noise}, seeds)


ARMS = {
    "bc": Arm(BehaviourCloning, {}, len(SEEDS)),
    "ddil": Arm(Dagger, {"beta": Beta(0.5, 0, 0.5)}, len(SEEDS)),
    "dagger": Arm(Dagger, {"beta": Beta(0, 0, 1)}, len(SEEDS)),
    "teacher": Arm(Dagger, {"beta": Beta(0.5, 0.5, 0)}, len(SEEDS)),
    "teacher too": Arm(Dagger, {"beta": Beta(0.5, 0.1, 0.4)}, len(SEEDS)),
    "adaptive": Arm(Dagger, {"beta": Beta(0.5, 0, 0.5, schedule="adaptive")}, len(SEEDS)),
    **{f"dart {noise:g}": dart(execution_noise=noise) for noise in (0.1, 0.3, 1.0)},
    **{f"noise {noise:g}": dart(condition_noise=noise) for noise in (0.03, 0.1, 0.3)},
}


class Cell(NamedTuple):
    """A world, a student and how it is taught."""

    env: str
    num_steps: int
    student: tuple[tuple[str, int], ...]  # empty: the teacher's network, from its weights
    num_demos: int
    options: tuple[tuple[str, Any], ...]  # of the expert

    @property
    def name(self) -> str:
        size = f"width {dict(self.student)['width']}" if self.student else "the teacher's network"
        more = "".join(f", {key} {value}" for key, value in self.options)
        return f"{self.env}, {size}, {self.num_steps} step{'s' * (self.num_steps > 1)}, {self.num_demos} demos{more}"


def cell(env: str, num_steps: int, width: int | None, depth: int = 2, num_demos: int = 8, **options: Any) -> Cell:
    student = () if width is None else (("width", width), ("depth", depth))
    return Cell(env, num_steps, student, num_demos, tuple(options.items()))


CELLS = {
    found.name: found
    for found in (
        cell("fork", 2, 32),
        cell("lunar_lander", 2, 12, num_demos=5),
        cell("fork", 1, 64, 3),
        cell("lunar_lander", 2, 24, num_demos=5),
        cell("fork", 2, 64, 3),
        cell("lunar_lander", 1, 16, num_demos=20),
        cell("fork", 1, None),
        cell("lunar_lander", 1, 64, num_demos=20),
        cell("fork", 4, 32),
        cell("lunar_lander", 1, None, num_demos=5),
        cell("fork", 1, 32),
        cell("lunar_lander", 2, 6, num_demos=5),
        cell("fork", 2, 16),
        cell("lunar_lander", 4, 12, num_demos=5),
        cell("fork", 2, 32, num_demos=30),
        cell("fork", 2, 32, num_rows=15),
    )
}


class Task(NamedTuple):
    """All arms of one seed of one cell."""

    cell: str
    seed: int
    runs: Path
    chosen: tuple[str, ...] = ()  # of the arms; empty: all

    @property
    def arms(self) -> list[str]:
        if self.seed in TUNING:
            return [name for name in self.chosen or ARMS if name.split()[0] in TUNED]
        return [name for name in self.chosen or ARMS if self.seed in SEEDS[: ARMS[name].seeds]]

    def place(self, arm: str) -> Path:
        """Where the record of an arm lies."""
        return place_of(self.runs, (self.cell, arm, self.seed))


@cache
def make_expert(cell: Cell) -> Expert:
    return load_expert(cell.env, num_demos=cell.num_demos, **dict(cell.options))


@cache
def make_evaluator(name: str, seed: int) -> EpisodeEvaluator:
    """A cell's evaluator; the teacher's episodes are run once in each process."""
    cell = CELLS[name]
    expert = make_expert(cell)
    policy = ExpertPolicy(expert, substeps=TEACHER_STEPS // cell.num_steps)
    return EpisodeEvaluator(policy, TimeGrid(expert.schedule, cell.num_steps), n=EPISODES[cell.env], seed=seed)


def config_of(cell: Cell, arm: str, seed: int) -> Any:
    own = {"num_steps": cell.num_steps, "student": dict(cell.student), "seed": seed, **ARMS[arm].settings}
    return ARMS[arm].agent.Config(**BASE | own)


def digest(cell: Cell, arm: str) -> str:
    """Of all that a run depends on and that stands here or in its config."""
    expert, config = make_expert(cell), dataclasses.asdict(config_of(cell, arm, 0))
    config = {key: value for key, value in config.items() if key not in LATER or value != LATER[key]}
    identity = {key: value for key, value in expert.identity().items() if key != "schedule"}  # likewise, and it is the cell's expert's
    found = [VERSION, cell, identity, EPISODES[cell.env], EVALUATION_SEED, ARMS[arm].agent.name, config]
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()[:12]


def run(task: Task) -> None:
    """Trains and evaluates the arms of a seed that have no record yet, and writes one for each."""
    torch.set_num_threads(1)
    cell = CELLS[task.cell]
    for arm in task.arms:
        if task.place(arm).is_file():
            continue
        evaluator, began = make_evaluator(task.cell, TUNING_EVALUATION_SEED if task.seed in TUNING else EVALUATION_SEED), time.monotonic()
        agent = ARMS[arm].agent(evaluator.expert, config_of(cell, arm, task.seed))
        record: dict[str, Any] = {"cell": cell.name, "arm": arm, "seed": task.seed, "settings": digest(cell, arm)}
        try:
            agent.learn(progress=False)
            record |= evaluator.evaluate(agent.student_policy)
        except FloatingPointError as error:
            record |= {"lost": str(error), "success": 0.0}
        record |= {"teacher": evaluator.evaluate(evaluator.expert_policy), "few_steps": few_steps(task.cell)}
        record |= {"teacher_nfe": agent.teacher_nfe, "student_nfe": agent.student_nfe, "visits": agent.collector.world_steps}
        record |= {"seconds": round(time.monotonic() - began, 1)} | provenance(evaluator.expert.device)
        task.place(arm).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(task.place(arm), json.dumps(record))


@cache
def few_steps(name: str) -> dict[str, Any]:
    """What the teacher does in as few steps as its students."""
    evaluator = make_evaluator(name, EVALUATION_SEED)
    return evaluator.evaluate(ExpertPolicy(evaluator.expert, substeps=1))


def check(records: Records) -> None:
    """Refuses records of other settings than those that stand here.

    Raises:
        ValueError: so; names the first.
    """
    for (name, arm, seed), record in records.items():
        if name not in CELLS or arm not in ARMS or record["settings"] != digest(CELLS[name], arm):
            raise ValueError(
                f"the run of {arm} in {name!r}, seed {seed}, had other settings than it has now; remove it from --out and --runs"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/worlds"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/worlds.json"))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first so many of each cell (default: %(default)s)")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL", help=f"of {list(CELLS)}; default: all")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"of {list(ARMS)}; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="seeds of cells at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    kept = args.out.with_name(f"{args.out.stem}_runs.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    records = collect_records(args.runs, kept, check)
    if not args.report_only:
        compared = SEEDS[: args.seeds]
        seeds = [*compared[:3], *TUNING, *compared[3:]]
        tasks = [Task(name, seed, args.runs, tuple(args.arms)) for seed in seeds for name in args.cells]  # balanced over cells at any time
        records = run_tasks(run, tasks, args.runs, kept, check, args.jobs)
    if not records:
        parser.error(f"--runs {args.runs}: nothing has run there; leave --report_only out, or name another folder")
    write_report(records, CELLS, args.out)


if __name__ == "__main__":
    main()
