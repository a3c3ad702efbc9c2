"""When does DDIL help? Its mixtures of states beside forward-diffused data alone, cell by cell, paired by seed.

    python benchmarks/when.py --jobs 2            # hours on two cores; goes on where it stopped
    python benchmarks/when.py --report_only       # the tables, from the runs that are there

    when.json, when.md, when.png    the map (when_report.py)
    when_runs.jsonl                 a line for each run, all that the map is made of; a run that has its line is not run again

A seed of a cell is a chain of runs, each starting from the last one's average, with an optimiser and a warm-up of its own:

    guidance → steps → the arm        DAgger: forward states alone learn the guided teacher, step for step, and then N steps of it
    consistency → the arm             LCM and DMD2: from a student of LCM on forward states alone

All arms of a seed fork from the same weights and draw the same forward states, as DDIL (§5) lets the student's states in late, in a second
part of training. What is expected, which metric, which test and how many seeds was written down in benchmarks/README.md before the runs.
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
from records import Records, collect_records, run_tasks
from when_report import write_report

from ddil_agents import DMD2, LCM, Beta, Dagger
from ddil_agents.algorithm import Algorithm
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.checkpoint import folder_atomically, write_atomically
from ddil_env import Expert, load_expert
from ddil_env.support import Thresholding

FIRST_SEED, SEEDS = 400, 16  # seeds below have been seen, some in settings like these
VERSION = 1  # to be raised where the library changes what a run is: records of another one are not mixed with these
GUIDANCE, STEPS = (3.0, 7.0), (4, 8, 16)
COLLECT, RING = 128, 8  # states of a collection, and how many collections' states are held: as many of every source, so that reuse is equal
BASE: dict[str, Any] = {"batch_size": 32, "collect_size": COLLECT, "updates_per_collect": 16, "teacher_steps": 32}
JUDGED = {"n": 2000, "seed": 20_000, "n_paths": 300, "n_action": 100}  # the same noise for every seed, so that the teacher is sampled once
EITHER = ("average", "raw")  # weights that are judged: the average over the part's steps, and the last


class Arm(NamedTuple):
    """What an arm has of its own, the arm that it is compared with, and in how many seeds."""

    settings: dict[str, Any]
    against: str = "forward"
    seeds: int = SEEDS


def arm(
    forward: float, teacher: float, student: float, against: str = "forward", seeds: int = 8, schedule: Any = "constant", **more: Any
) -> Arm:
    """An arm with these shares of states."""
    beta = Beta(forward, teacher, student, schedule=schedule)
    ring = {"capacity": round(RING * COLLECT * max(beta.largest_shares())), "student_collections": RING}
    return Arm({"beta": beta, **ring, **more}, against, seeds)


NONE, BOTH = Thresholding(roles=()), Thresholding(roles=("teacher", "student"))  # the default: the teacher
FORWARD = {"beta": Beta(1, 0, 0)}
TWO = {"forward": arm(1, 0, 0, seeds=SEEDS), "student": arm(0.5, 0, 0.5, seeds=SEEDS)}  # the baseline, and the arm that is tested
DAGGER = TWO | {
    "teacher": arm(0.5, 0.5, 0),  # as far from the data, and never the student's
    "teacher too": arm(0.5, 0.1, 0.4),
    "mixed rollouts": arm(0.5, 0, 0.5, p_expert=0.5),
    "all states": arm(0.5, 0.1, 0.4, against="teacher too", states_per_rollout="all"),
}
ADAPTIVE = {  # the adaptive shares, and the fixed ones that they are held against beside forward
    "teacher too": DAGGER["teacher too"],
    "student 1": arm(0, 0, 1),
    "adaptive": arm(0.5, 0, 0.5, schedule="adaptive"),
}
MORE = {  # in one cell: other shares, and thresholding crossed with the arm that is tested
    "student .25": arm(0.75, 0, 0.25),
    "forward, no threshold": arm(1, 0, 0, thresholding=NONE),
    "student, no threshold": arm(0.5, 0, 0.5, against="forward, no threshold", thresholding=NONE),
    "forward, student thresholded too": arm(1, 0, 0, thresholding=BOTH),
    "student, student thresholded too": arm(0.5, 0, 0.5, against="forward, student thresholded too", thresholding=BOTH),
}
LCM_ARMS = {"forward": TWO["forward"], "half": TWO["student"]}
DMD2_ARMS = {
    "forward": TWO["forward"],
    "own": arm(0, 0, 1, seeds=SEEDS),
    "half": arm(0.5, 0, 0.5, against="own"),
    "own and teacher": arm(0, 0.5, 0.5, against="own"),
}


class Part(NamedTuple):
    """One run of a chain."""

    name: str
    agent: type[Algorithm]
    settings: dict[str, Any]


class Cell(NamedTuple):
    """A setting in which arms are compared: what they fork from, what they share, what each has of its own. The second arm is tested."""

    name: str
    before: tuple[Part, ...]
    last: Part
    arms: dict[str, Arm]
    env: str = "digits8"
    seeds: int = SEEDS

    def chain(self, arm: str) -> tuple[Part, ...]:
        """All parts of an arm; of `start`, what the arms fork from."""
        if arm == "start":
            return self.before
        return *self.before, self.last._replace(settings=self.last.settings | self.arms[arm].settings)


def dagger_cell(w: float, n: int, arms: dict[str, Arm], name: str = "", num_updates: int = 400, **more: Any) -> Cell:
    """DAgger's: 300 updates to learn guidance w, 300 to learn N steps of it, and num_updates of each arm."""
    student = more.pop("student", {})
    shared = {"guidance_scale": w, "student": student}
    guidance = Part("guidance", Dagger, shared | FORWARD | {"num_steps": 32, "num_updates": 300})
    steps = Part("steps", Dagger, shared | FORWARD | {"num_steps": n, "num_updates": 300})
    last = Part("second", Dagger, shared | {"num_steps": n, "num_updates": num_updates})
    return Cell(f"w {w:g}, {n} steps{name}", (guidance, steps), last, arms, **more)


def cells() -> list[Cell]:
    """All of them, fixed before the runs."""
    consistency = Part("consistency", LCM, FORWARD | {"guidance_scale": 3.0, "num_updates": 600})
    found = [dagger_cell(w, n, DAGGER | ADAPTIVE | (MORE if (w, n) == (7, 8) else {})) for n in STEPS for w in GUIDANCE]
    for n in (4, 8):
        settings = {"guidance_scale": 3.0, "num_steps": n, "inference_steps": (n,), "num_updates": 400}
        found.append(Cell(f"LCM, w 3, {n} steps", (consistency,), Part("second", LCM, settings), LCM_ARMS))
    settings = {"guidance_scale": 3.0, "num_steps": 4, "grid": "lcm", "num_updates": 1000, "critic_updates": 2, "learning_rate": 3e-5}
    found.append(Cell("DMD2, w 3, 4 steps", (consistency,), Part("second", DMD2, settings), DMD2_ARMS))
    found += [dagger_cell(1.0, n, TWO | ADAPTIVE) for n in STEPS]
    found.append(dagger_cell(3.0, 4, TWO | ADAPTIVE, ", small student", student={"channels": [16, 32]}))
    found.append(dagger_cell(7.0, 8, TWO, ", long", num_updates=1600, seeds=8))
    found += [dagger_cell(3.0, 8, TWO, f", {env}", env=env, seeds=8) for env in ("digits", "coloured_digits")]
    return found


def slug(name: str) -> str:
    """A name as a file's."""
    return name.replace(",", "").replace(" ", "_")


def config_of(part: Part, seed: int, init: Path | None) -> Any:
    """A part's config; its streams are its own, and the same for every arm of a seed."""
    return part.agent.Config(**BASE | part.settings, seed=stream_seed(seed, part.name) % 2**31, init=None if init is None else str(init))


def given(cell: Cell, arm: str) -> str:
    """A digest of what an arm's run was given, and how it is judged."""
    return digest(cell.env, cell.chain(arm), cell.last.agent.name, cell.last.settings["num_steps"], repr(JUDGED))


def digest(env: str, chain: tuple[Part, ...], *more: Any) -> str:
    """Of the settings that stand here: where the library's own defaults change, so must VERSION."""
    settings = [(part.name, part.agent.name, BASE | part.settings) for part in chain]
    text = json.dumps([env, settings, more, VERSION], sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def expert_of(env: str) -> Expert:
    return load_expert(env)


@cache
def make_evaluator(name: str, store: Path) -> tuple[Evaluator, float]:
    """The judge of a cell's arms, its teacher's samples drawn once for all seeds and processes; and the floor of its Fréchet distance."""
    cell = next(cell for cell in cells() if cell.name == name)
    part = cell.chain(next(iter(cell.arms)))[-1]
    learner = part.agent(expert_of(cell.env), config_of(part, 0, None))
    settings = Evaluation(**JUDGED, store=str(store / slug(name)))
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / f"{slug(name)}.lock"):
        evaluator = Evaluator(learner.teacher_policy, learner.grid, settings)
    return evaluator, evaluator.floors()["teacher_halves"]["frechet_to_expert"]


def trained(env: str, chain: tuple[Part, ...], seed: int, out: Path) -> Path:
    """The directory of a chain's student, trained if it is not there."""
    place = out / f"{chain[-1].name}-{digest(env, chain)}-s{seed}"
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not place.is_dir():
            init = trained(env, chain[:-1], seed, out) if chain[1:] else None
            learner = chain[-1].agent(expert_of(env), config_of(chain[-1], seed, init)).learn(progress=False)
            with folder_atomically(place) as partial:
                learner.save_student(partial / "student")
    return place


def measure(learner: Algorithm, evaluator: Evaluator) -> dict[str, dict[str, Any]]:
    """What a student does: its average in full, errors and shift by step; of its last weights the samples."""
    found: dict[str, dict[str, Any]] = {}
    for name, network in zip(EITHER, (learner.ema_student, learner.networks["student"]), strict=True):
        support = learner.thresholds["student"] if "student" in learner.config.thresholding.roles else None
        row = evaluator.evaluate(learner.policy(network, support), None if name == "average" else learner.grid, learner.kernel)
        found[name] = {key: row[key] for key in ("frechet_to_expert", "frechet", "recall", "coverage", "endpoint_rmse")}
        if name == "average":
            found[name] |= {f"error_{source}": row[f"action_mse_{source}"] for source in ("own", "forward", "expert")}
            found[name]["gaussian_shift"] = row["gaussian_shift"]
        if broken := [key for key, x in found[name].items() if x is not None and not torch.tensor(x).isfinite().all()]:
            raise FloatingPointError(f"{broken[0]} of the {name} weights is not finite")
    return found


class Task(NamedTuple):
    """One seed of one cell."""

    cell: str
    seed: int
    runs: Path

    def place(self, arm: str) -> Path:
        """Where the record of an arm lies."""
        return self.runs / slug(self.cell) / f"{slug(arm)}-s{self.seed}.json"


def run(task: Task) -> None:
    """Trains and judges the arms of a seed that have no record yet, and writes one for each.

    A record of a machine on which the arms fork from other bits is made again: all arms of a seed start from the same weights.
    """
    torch.set_num_threads(1)
    cell = next(cell for cell in cells() if cell.name == task.cell)
    arms = ["start", *(name for name, arm in cell.arms.items() if task.seed < FIRST_SEED + arm.seeds)]
    if all(task.place(arm).is_file() for arm in arms):
        return
    lost, init, before = None, Path(), ""
    try:
        init = trained(cell.env, cell.before, task.seed, task.runs / "shared")
        before = hashlib.sha256((init / "student" / "student.safetensors").read_bytes()).hexdigest()[:12]
    except FloatingPointError as error:
        lost = {"lost": str(error)}
    for arm in arms:
        place = task.place(arm)
        if place.is_file() and json.loads(place.read_text()).get("init", before) == before:
            continue
        record = {"cell": cell.name, "arm": arm, "seed": task.seed, "given": given(cell, arm), "init": before}
        record |= lost or run_arm(cell, arm, task, init)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(record | provenance(expert_of(cell.env).device)))


def run_arm(cell: Cell, arm: str, task: Task, init: Path) -> dict[str, Any]:
    """What an arm's student does, and what it cost; of one whose loss or metrics are not finite, how it was lost."""
    (evaluator, floor), began = make_evaluator(cell.name, task.runs / "teachers"), time.monotonic()
    part = cell.chain(arm if arm in cell.arms else next(iter(cell.arms)))[-1]
    learner = part.agent(expert_of(cell.env), config_of(part, task.seed, init))
    try:
        if arm in cell.arms:
            learner.learn(progress=False)
        found = measure(learner, evaluator)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        return {"lost": str(error)}
    cost = {"teacher_nfe": learner.teacher_nfe, "student_nfe": learner.student_nfe, "seconds": round(time.monotonic() - began, 1)}
    return {"floor": floor, "n": evaluator.n, **found, **cost}


def tasks(runs: Path, names: list[str], seeds: int | None) -> list[Task]:
    """Seed by seed over all cells, so that what has run at any time is balanced."""
    return [
        Task(cell.name, FIRST_SEED + i, runs)
        for i in range(max(cell.seeds for cell in cells()))
        for cell in cells()
        if cell.name in names and i < min(cell.seeds, seeds or cell.seeds)
    ]


def check(records: Records) -> None:
    """Refuses records of other settings than those that stand here.

    Raises:
        ValueError: so; names them.
    """
    now = {(cell.name, arm): given(cell, arm) for cell in cells() for arm in ("start", *cell.arms)}
    if other := [key for key, record in records.items() if record["given"] != now.get(key[:2])]:
        raise ValueError(f"the runs {other[:3]} … had other settings than they have now; remove them from --out and --runs")


def main() -> None:
    names = [cell.name for cell in cells()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/when"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/when.json"))
    parser.add_argument("--seeds", type=int, default=None, help="the first so many of each cell; default: all")
    parser.add_argument("--cells", nargs="+", default=names, choices=names, metavar="CELL", help=f"of {names}; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="seeds of cells at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    kept = args.out.with_name(f"{args.out.stem}_runs.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    records = collect_records(args.runs, kept, check)
    if not args.report_only:
        records = run_tasks(run, tasks(args.runs, args.cells, args.seeds), args.runs, kept, check, args.jobs)
    if not records:
        parser.error(f"--runs {args.runs}: nothing has run there; leave --report_only out, or name another folder")
    write_report(records, cells(), args.out)


if __name__ == "__main__":
    main()
