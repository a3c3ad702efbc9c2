"""Comparing agents: every arm on one expert, over paired seeds, at equal budgets, and the page that shows it.

    python -m ddil_agents.compare --config four_agents --out runs/four
    python -m ddil_agents.compare --env digits --agents dagger lcm --betas forward half --num_updates 400 --out runs/priors-of-two
    python -m ddil_agents.compare --config priors --jobs 8 --out runs/priors

An arm is an agent with settings. Arms of one seed share the initial weights, the order of the data, all noise and, in the judging,
x_T and conditions, so their differences are paired. Budgets: every arm takes the same number of gradient steps; then, if asked for,
as many as the baseline's teacher forwards, forwards of both networks, or seconds allow. Run it again, and it goes on where it stopped.

    comparison.json    all numbers         report.html    the page         matched.json    steps at the other budgets
    table.csv, table.tex                   runs/          with each student's denoisings, the teacher's, and untrained.json
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from ddil_agents.checkpoint import write_atomically
from ddil_agents.cli import clear_errors, find_agent, load_run, refuse_early, with_preset
from ddil_agents.collect import stream_seed
from ddil_agents.evaluate import PROVENANCE, Evaluation, Judge
from ddil_agents.report import METRICS, called, heading, markdown_table, measured, read_result
from ddil_agents.settings import read_arguments
from ddil_agents.statistics import (
    bootstrap_interval,
    holm,
    interquartile_mean,
    normalised,
    paired_comparison,
    probability_of_improvement,
    sign_flip_test,
)
from ddil_agents.train import read_metrics
from ddil_agents.trajectories import record
from ddil_env import DdimPolicy
from ddil_env.mdp import Kernel
from ddil_env.presets import find_preset, preset_names, read_yaml

Budget = Literal["updates", "teacher_nfe", "nfe", "seconds"]
BETAS: dict[str, tuple[float, float, float]] = {  # source priors by name: forward, teacher, student
    "forward": (1.0, 0.0, 0.0),
    "teacher": (0.0, 1.0, 0.0),
    "student": (0.0, 0.0, 1.0),
    "half": (0.5, 0.0, 0.5),
    "ddil": (0.5, 0.1, 0.4),
}
FIXED = "matched.json"  # of a comparison: the gradient steps of each arm at the budgets that the baseline's costs set
SHOWN = 10  # trajectories of each arm that the page can play


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    env: str = "digits"
    """Preset or YAML file of the expert that all arms imitate."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: `agent`, optionally `config` (a preset of configs/<agent> or a file), and settings that differ."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Settings of all arms, over those of an arm's `config`; the arm's own go over these."""
    seeds: int = 3
    """Runs of each arm, paired by seed."""
    first_seed: int = 0
    """The others follow."""
    equal: tuple[Budget, ...] = ("updates",)
    """Budgets that the arms are compared at: updates, teacher_nfe, nfe (teacher and student), seconds."""
    baseline: str | None = None
    """The arm that others are held against, whose costs are the budgets; null: the first."""
    primary: str = "frechet"
    """The metric that the comparison was set up for."""
    level: float = 0.95
    """Of intervals, and 1 − the error rate of all tests of one metric at one budget together."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms={}: nothing to compare; name --agents, or arms in a config file")
        for name, arm in self.arms.items():
            if not isinstance(arm, dict) or "agent" not in arm:
                raise ValueError(f"arms.{name}={arm}: an arm is a mapping with an `agent`, such as {{agent: dagger, num_updates: 300}}")
            if not name or set(name) & set("/\\") or name.startswith((".", "teacher@")) or name == "teacher":
                raise ValueError(f"arm {name!r}: its name is a folder's, and not the teacher's; leave out slashes and leading dots")
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(f"seeds={self.seeds}, first_seed={self.first_seed}: need at least 1, from 0 or more")
        if self.reference not in self.arms:
            raise ValueError(f"baseline={self.baseline!r} is no arm; the arms are {', '.join(self.arms)}")
        if self.primary not in METRICS:
            raise ValueError(f"primary={self.primary!r}; choose one of: {', '.join(METRICS)}")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level}: need a number from 0.5 to below 1, such as 0.95")
        if not self.equal or self.equal[0] != "updates":
            raise ValueError(f"equal={self.equal}: `updates` comes first; the other budgets are set by what those runs cost")

    @property
    def reference(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.arms), "")

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


Rows = dict[int, dict[str, Any]]  # what a model scored, by seed


class Run(NamedTuple):
    """One training run of a comparison."""

    budget: Budget
    arm: str
    seed: int
    directory: Path

    @property
    def given(self) -> Path:
        """The config file that it is started with. An arm's name may hold a dot: what follows it is no suffix to replace."""
        return self.directory.with_name(f"{self.directory.name}.yaml")

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")


def merged(*settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings laid over one another, the last on top."""
    result: dict[str, Any] = {}
    for layer in settings:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def settings_of(comparison: Comparison, arm: str) -> tuple[str, dict[str, Any]]:
    """An arm's agent, and all of its settings as a config file holds them.

    Raises:
        ValueError: a setting that is the comparison's own.
    """
    own = dict(comparison.arms[arm])
    agent, preset = str(own.pop("agent")), own.pop("config", None)
    base = {} if preset is None else read_yaml(find_preset(agent, str(preset)))
    settings = merged(base, comparison.shared, own)
    if settings.get("env", comparison.env) != comparison.env:
        raise ValueError(f"env={settings['env']}: all arms have the comparison's; write an expert's settings into a YAML file for that")
    if "seed" in settings.get("evaluate", {}):
        raise ValueError(f"evaluate.seed={settings['evaluate']['seed']}: samples start from noise of their run's own seed; leave it out")
    return agent, settings


def given_settings(comparison: Comparison, arm: str, seed: int) -> dict[str, Any]:
    """What a run is given as its config file: the noise of its evaluation goes with its seed."""
    return merged({"evaluate": {"seed": seed}}, settings_of(comparison, arm)[1], {"env": comparison.env})


def arms_of(agents: list[str], betas: list[str]) -> dict[str, dict[str, Any]]:
    """Agents × source priors; `own` is the agent's own."""
    arms: dict[str, dict[str, Any]] = {}
    for agent in agents:
        for name in betas:
            if name != "own" and name not in BETAS:
                raise ValueError(f"unknown priors {name!r}; choose of: own, {', '.join(BETAS)}. Others go into a config's arms")
            beta = {} if name == "own" else {"beta": dict(zip(("forward", "teacher", "student"), BETAS[name], strict=True))}
            arms[agent if len(betas) == 1 else f"{agent} {name}"] = {"agent": agent, **beta}
    return arms


def train(runs: list[Run], comparison: Comparison, out: Path, updates: dict[str, int] | None, jobs: int) -> None:
    """Trains what is not there yet, and takes up what was cut short; a run that fails is a result, and the rest goes on.

    Args:
        out: Directory of the comparison.
        runs: Which.
        comparison: Their settings.
        updates: Gradient steps by arm; default: as they are set.
        jobs: Runs at a time; one GPU each where there are GPUs, else one thread each.
    """
    todo = [run for run in runs if not _done(run)]
    gpus, slots, worker = visible_gpus(), SimpleQueue[str](), threading.local()
    for i in range(jobs if gpus else 0):  # more runs at a time than GPUs share them evenly
        slots.put(gpus[i % len(gpus)])

    def settle() -> None:
        """Gives a worker the GPU of all its runs."""
        worker.gpu = slots.get() if gpus else None

    def one(run: Run) -> None:
        agent, settings = str(comparison.arms[run.arm]["agent"]), given_settings(comparison, run.arm, run.seed)
        if updates is not None:
            settings["num_updates"] = updates[run.arm]
        if (run.directory / "config.yaml").is_file():
            arguments = ["--resume", str(run.directory)]
        else:
            write_atomically(run.given, yaml.safe_dump(settings, sort_keys=False))
            arguments = ["--config", str(run.given), "--seed", str(run.seed), "--out", str(run.directory)]
            arguments += ["--evaluate.store", str((out / "expert").resolve())]  # the teacher is sampled once a seed
        environment = dict(os.environ)
        if worker.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = worker.gpu
        elif jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"  # more threads a run than cores would fight
        with run.log.open("w") as file:
            command = [sys.executable, "-m", f"ddil_agents.{agent}", *arguments]
            failed = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode != 0
        bar.set_postfix_str(f"{run.arm}, seed {run.seed}{' failed' if failed else ''}")
        bar.update()

    for run in todo:
        run.directory.parent.mkdir(parents=True, exist_ok=True)
    label = runs[0].budget if runs else ""
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), desc=f"equal {label}", unit="run")
    with bar, ThreadPoolExecutor(jobs, initializer=settle) as pool:
        list(pool.map(one, todo))


def visible_gpus() -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES that a run can be given one of: the user's own, else every GPU's number."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (given.split(",") if given else [str(i) for i in range(count)])[:count]


def matched_updates(comparison: Comparison, budget: Budget, results: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """Gradient steps of each arm that cost what the baseline's do, from what a step cost in the runs at equal updates.

    Args:
        comparison: Names the baseline.
        budget: Which cost.
        results: Of the runs at equal updates, by arm.

    Raises:
        ValueError: an arm is free of that cost, or trains in stages, whose steps differ in cost.
    """

    def cost(arm: str) -> float:
        """Of one gradient step."""
        if settings_of(comparison, arm)[1].get("stages"):
            raise ValueError(f"equal={budget}: {arm} trains in stages, each with steps of its own; compare it at equal updates")
        costs = {"teacher_nfe": ("teacher_nfe",), "nfe": ("teacher_nfe", "student_nfe"), "seconds": ("train_seconds",)}[budget]
        total = statistics.fmean(sum(own_row(result)[key] for key in costs) for result in results[arm])
        if not total:
            raise ValueError(f"equal={budget}: {arm} costs none, so no number of updates would match; leave {budget} out")
        return total / results[arm][0]["num_updates"]

    allowed = cost(comparison.reference) * results[comparison.reference][0]["num_updates"]
    return {arm: max(1, round(allowed / cost(arm))) for arm in results}


def fixed_by(comparison: Comparison, updates: dict[str, int]) -> dict[str, Any]:
    """What matched.json holds of one budget: gradient steps, and the settings of the arms that they are for."""
    settings = {arm: list(settings_of(comparison, arm)) for arm in updates if arm in comparison.arms}
    return {"baseline": comparison.reference, "updates": updates, "settings": settings}


def read_fixed(out: Path) -> dict[str, Any]:
    """A comparison's matched.json, by budget; nothing before there is one."""
    path = out / FIXED
    return json.loads(path.read_text()) if path.is_file() else {}


def fixed_updates(comparison: Comparison, budget: Budget, out: Path) -> dict[str, int]:
    """The gradient steps that arms were given before at one budget: seeds that are added later change what a step costs in the mean.

    Raises:
        ValueError: another baseline set them, or the same with other settings.
    """
    if (found := read_fixed(out).get(budget)) is None:
        return {}
    now = fixed_by(comparison, found["updates"])
    same = {arm for arm, settings in now["settings"].items() if settings == found["settings"].get(arm)}
    if found["baseline"] != comparison.reference or comparison.reference not in same:
        raise ValueError(
            f"the runs of {out / 'runs' / budget} were matched to what {found['baseline']} cost then, and the baseline is "
            f"{comparison.reference} now, or has other settings; remove them and {out / FIXED}, or choose another --out"
        )
    return {arm: updates for arm, updates in found["updates"].items() if arm in same}  # another arm's costs are its own


def own_row(result: dict[str, Any]) -> dict[str, Any]:
    """What a run's own student scored and cost."""
    row: dict[str, Any] = result["models"][result["student"]]
    return row


def made(results: Iterable[dict[str, Any]]) -> dict[str, str]:
    """When, on what and with which versions some runs were judged: all of them, where they differ."""
    results = list(results)
    return {key: ", ".join(sorted({result[key] for result in results})) for key in PROVENANCE}


def same_measure(results: dict[Path, dict[str, Any]]) -> None:
    """Refuses runs that were not measured in one way.

    Raises:
        ValueError: names two of them, and what differs.
    """
    (first_path, first), *others = results.items()
    for path, result in others:
        for key in ("env_config", "settings"):
            a, b = ({k: v for k, v in r[key].items() if k != "seed"} for r in (first, result))
            if a != b:
                raise ValueError(f"{first_path} has {key} {a}, {path} {b}; compare runs of one expert, judged in one way")


def statistics_of(comparison: Comparison, rows: dict[str, Rows], initial: dict[str, Rows], teacher: Rows) -> dict[str, Any]:
    """Of each metric: each arm's location with its interval, and its paired differences from the baseline.

    Args:
        comparison: Baseline and level.
        rows: What each arm's students scored, by seed.
        initial: What they scored untrained.
        teacher: What the teacher scores in all its steps.
    """
    found: dict[str, Any] = {}
    for metric, (_, _, better) in METRICS.items():
        values = {arm: {seed: float(row[metric]) for seed, row in own.items() if row.get(metric) is not None} for arm, own in rows.items()}
        values = {arm: v for arm, v in values.items() if v}
        if not values:
            continue
        arms: dict[str, Any] = {}
        for arm, by_seed in values.items():
            v = list(by_seed.values())
            low, high = bootstrap_interval(v, interquartile_mean, comparison.level) if len(v) > 1 else (None, None)
            arms[arm] = {"seeds": list(by_seed), "values": v, "mean": statistics.fmean(v), "iqm": float(interquartile_mean(v))}
            arms[arm] |= {"low": low, "high": high}
            ends = [(initial.get(arm, {}).get(seed, {}).get(metric), teacher.get(seed, {}).get(metric)) for seed in by_seed]
            no_goal = metric == "frechet_to_expert" and not shares_noise(rows, arm)  # even a perfect one is not at the teacher's 0
            if not no_goal and all(start is not None and goal is not None and start != goal for start, goal in ends):
                arms[arm]["normalised"] = np.atleast_1d(normalised(v, *map(list, zip(*ends, strict=True)))).tolist()
        if metric == "frechet_to_expert":
            values = {arm: v for arm, v in values.items() if shares_noise(rows, arm) == shares_noise(rows, comparison.reference)}
        found[metric] = {"arms": arms, "pairs": pairs_of(comparison, values, better)}
    return found


def shares_noise(rows: dict[str, Rows], arm: str) -> bool:
    """Whether x_T determines an arm's samples, as it does the teacher's; of one that draws noise on the way it does not.

    Without common noise even a perfect student's samples are as far from the teacher's as another set of the teacher's own is:
    in their distance to it such arms are not held against the others.
    """
    return any(row.get("endpoint_rmse") is not None for row in rows.get(arm, {}).values())


def pairs_of(comparison: Comparison, values: dict[str, dict[int, float]], better: int) -> dict[str, Any]:
    """Each arm against the baseline on the seeds that both have, with Holm's correction over the arms."""
    base = values.get(comparison.reference, {})
    shared = {arm: [seed for seed in own if seed in base] for arm, own in values.items() if arm != comparison.reference}
    columns = {arm: ([values[arm][s] for s in seeds], [base[s] for s in seeds]) for arm, seeds in shared.items() if len(seeds) > 1}
    if not columns:
        return {}
    raw = [sign_flip_test(np.subtract(a, b)) for a, b in columns.values()]
    found = {}
    for (arm, (a, b)), p_holm in zip(columns.items(), holm(raw).tolist(), strict=True):
        pair = paired_comparison(a, b, (arm, comparison.reference), len(columns), comparison.level, p_holm)
        wins = probability_of_improvement(a, b, lower_is_better=better < 0)
        found[arm] = dataclasses.asdict(pair) | {"p_holm": p_holm, "probability_of_improvement": wins}
    return found


def flags_of(
    run: Run, row: dict[str, Any], training: list[dict[str, Any]], initial: dict[str, Any], teacher: dict[str, Any], primary: str
) -> list[str]:
    """What a reader should be warned of in one run.

    Args:
        run: Which.
        row: What its student scored.
        training: Its lines of metrics.
        initial: What the untrained student scored.
        teacher: What the teacher scores in all its steps.
        primary: The metric that the comparison is for.
    """
    found = []
    # An untrained student covers little where a network of its own starts it: half of the teacher's is short of what few steps cost.
    for key, (whose, end, share) in itertools.product(
        ("coverage", "vendi"), (("untrained", initial, 0.9), ("of the teacher", teacher, 0.5))
    ):
        if (now := row.get(key)) is not None and now < share * (then := end.get(key) or 0.0):
            found.append(f"{key} is {now:.3f}, against {then:.3f} {whose}: modes are missed")
    now, then = row.get(primary), initial.get(primary)
    if now is not None and then is not None and METRICS[primary][2] * (now - then) < 0:
        found.append(f"{METRICS[primary][0][:-2]} is {now:.4g}, and was {then:.4g} untrained: training made it worse")
    for name in sorted({key for line in training for key in line if key.endswith("grad_norm")}):
        lines = [line for line in training if name in line]
        usual = statistics.median(line[name] for line in lines)
        later = [line.get(f"{name}_max", line[name]) for line in lines[len(lines) // 5 :]]  # the first fifth is warm-up
        largest = max((norm for norm in later if math.isfinite(norm)), default=0.0)  # fp16's scaler skips the others
        if len(lines) >= 10 and largest > 10 * usual > 0:
            called = name.replace("grad_norm", "gradient norm").replace("_", " ")
            found.append(f"a {called} of {largest:.3g}, {largest / usual:.0f} times the median")
    return [f"{run.arm}, seed {run.seed}: {text} (equal {run.budget})" for text in found]


def idle_arms(comparison: Comparison, rows: dict[str, Rows]) -> list[str]:
    """A warning of each arm whose every number is the baseline's: what it sets differently does nothing."""
    numbers = {
        arm: {seed: {key: row.get(key) for key in METRICS} for seed, row in by_seed.items() if row.get(comparison.primary) is not None}
        for arm, by_seed in rows.items()
    }
    same = [arm for arm, found in numbers.items() if arm != comparison.reference and found and found == numbers[comparison.reference]]
    return [f"{arm}: each run is that of {comparison.reference}, bit for bit; what it sets differently does nothing here" for arm in same]


def portray(comparison: Comparison, runs: list[Run]) -> dict[str, Rows]:
    """Judges each run's untrained student, and records the first seed's trajectories, each arm's and the teacher's on its times.

    They are kept in the run's own directory, and so never outlive it.

    Returns:
        What each arm's students scored untrained, by seed.
    """
    judges, known, initial = dict[str, Judge](), dict[str, dict[str, Any]](), dict[str, Rows]()
    for run in tqdm(runs, desc="untrained students", unit="run"):
        path, files = run.directory / "untrained.json", [run.directory / f"{who}.safetensors" for who in ("trajectories", "teacher")]
        shown = run.seed == comparison.first_seed and not all(file.is_file() for file in files)
        row = json.loads(path.read_text()) if path.is_file() else {}
        if comparison.primary in row and not shown:
            initial.setdefault(run.arm, {})[run.seed] = row
            continue
        learner = load_run(run.directory)
        given = read_yaml(run.directory / "config.yaml")
        told = Evaluation(**given["evaluate"])
        scores = tuple(score for score in told.scores if score == comparison.primary)  # of what costs most, what is asked for
        told = dataclasses.replace(told, also_steps=(), scores=scores, lpips=told.lpips and comparison.primary == "lpips")
        key = repr((run.seed, learner.grid.times.tolist(), learner.config.substeps, learner.reference.guidance_scale))
        if key not in judges:
            judges[key] = Judge(learner.reference, learner.grid, told)
        judge = judges[key]
        untrained = type(learner)(learner.expert, dataclasses.replace(learner.config, init=given.get("init")), learner.support)
        thresholding = learner.config.thresholding if "student" in learner.config.thresholding.roles else None
        start = repr((key, learner.kernel, thresholding, untrained.average.prediction_type, weights_digest(untrained.average)))
        if start not in known:  # most arms of a seed start as the same student
            known[start] = judge.judge(untrained.student_policy, learner.grid, learner.kernel)
        initial.setdefault(run.arm, {})[run.seed] = known[start]
        write_atomically(path, json.dumps(known[start]))
        if shown:
            noise, c = judge.noise()[:SHOWN], None if judge.c is None else judge.c[:SHOWN]
            actors: list[tuple[DdimPolicy, Kernel]] = [(learner.student_policy, learner.kernel), (judge.expert_policy, "ddim")]
            for file, (policy, kernel) in zip(files, actors, strict=True):
                generator = torch.Generator(learner.expert.device).manual_seed(stream_seed(run.seed, "shown"))
                record(policy, judge.expert_policy, learner.grid, noise, c, kernel=kernel, generator=generator).save(file)
    return initial


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of the names and bytes of its parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def gather(comparison: Comparison, out: Path, tiers: dict[Budget, list[Run]], command: str) -> dict[str, Any]:
    """All numbers of a comparison, from the runs that are there."""
    results = {run.directory: read_result(run.directory / "result.json") for runs in tiers.values() for run in runs if _done(run)}
    if not results:
        raise ValueError(f"no run of {out} is finished; see the .log files in {out / 'runs'}")
    same_measure(results)
    finished = [run for run in tiers["updates"] if _done(run)]
    initial = portray(comparison, finished)
    references: dict[str, Rows] = {}
    for run in finished:  # the first arm's that has them: the teacher is the same for all, but for the times of its few steps
        result = results[run.directory]
        for name, row in {**result["floors"], **result["models"]}.items():
            if name in result["floors"] or name.startswith("teacher@"):
                shown = called(name, row) if name in result["floors"] else name
                references.setdefault(shown, {}).setdefault(run.seed, row | {"times": result["times"]})
    teacher = next(name for name in references if name.startswith("teacher@"))  # in all its steps, the first that a run judges
    compared: dict[str, Any] = {}
    flags: list[str] = []
    for budget, runs in tiers.items():
        rows: dict[str, Rows] = {arm: {} for arm in comparison.arms}
        listed = []
        for run in runs:
            listed.append({"arm": run.arm, "seed": run.seed, "directory": os.path.relpath(run.directory, out), "done": _done(run)})
            if _done(run):
                row = rows[run.arm][run.seed] = own_row(results[run.directory])
                listed[-1] |= {"num_updates": results[run.directory]["num_updates"], **row}
                training = read_metrics(run.directory / "metrics.jsonl")
                untrained = initial.get(run.arm, {}).get(run.seed, {})
                flags += flags_of(run, row, training, untrained, references[teacher].get(run.seed, {}), comparison.primary)
            elif run.log.is_file():
                flags.append(f"{budget}/{run.directory.name}: {last_line(run.log)}")
        flags += [f"{text} (equal {budget})" for text in idle_arms(comparison, rows)]
        fresh = [arm for arm in rows if rows[arm] and shares_noise(rows, arm) != shares_noise(rows, comparison.reference)]
        if fresh and comparison.primary == "frechet_to_expert" and rows[comparison.reference]:
            told = f"in {METRICS[comparison.primary][0][:-2]} not held against {comparison.reference}"
            flags.append(f"{', '.join(fresh)}: {told}: one of the two shares the teacher's noise; see teacher halves (equal {budget})")
        missing = METRICS[comparison.primary][0].rstrip(" ↓↑")
        flags += [
            f"{arm}: its runs have no {missing}, which this comparison is for (equal {budget})"
            for arm, own in rows.items()
            if own and all(row.get(comparison.primary) is None for row in own.values())
        ]
        compared[budget] = {"runs": listed, "statistics": statistics_of(comparison, rows, initial, references[teacher])}
    flags += [
        f"equal {budget}: not run, since {comparison.reference}, whose costs set it, has no finished run"
        for budget in comparison.equal
        if budget not in tiers
    ]
    any_result = next(iter(results.values()))
    return {
        "title": f"{any_result['env']}: {', '.join(comparison.arms)}",
        "command": command,
        "comparison": dataclasses.asdict(comparison) | {"baseline": comparison.reference},
        "env": any_result["env"],
        "env_config": any_result["env_config"],
        "settings": {key: value for key, value in any_result["settings"].items() if key != "seed"},
        "arms": {arm: dict(zip(("agent", "settings"), settings_of(comparison, arm), strict=True)) for arm in comparison.arms},
        "references": {name: list(rows.values()) for name, rows in references.items()},
        "initial": initial,
        "budgets": compared,
        "flags": flags,
        "provenance": made(results.values()),
    }


def last_line(log: Path) -> str:
    """Why a run stopped, as far as its log tells."""
    return (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]


def _done(run: Run) -> bool:
    return (run.directory / "result.json").is_file()


def table_rows(result: dict[str, Any], budget: str, intervals: bool = True) -> list[list[str]]:
    """Headings, and a line for each: a reference's mean, an arm's interquartile mean and, unless left out, its interval."""
    found = result["budgets"][budget]["statistics"]
    lines = []
    for name, rows in result["references"].items():
        cells = [
            METRICS[key][1].format(statistics.fmean(row[key] for row in rows)) if rows[0].get(key) is not None else "" for key in found
        ]
        if any(cells):  # some floors are of steps alone
            lines.append([name, str(len(rows)), *cells])
    for arm in result["arms"]:
        cells, n = [], 0
        for key in found:
            own = found[key]["arms"].get(arm)
            n = max(n, len(own["values"]) if own else 0)
            form = METRICS[key][1]
            span = f" [{form.format(own['low'])}, {form.format(own['high'])}]" if intervals and own and own["low"] is not None else ""
            cells.append(form.format(own["iqm"]) + span if own else "")
        lines.append([arm, str(n), *cells])
    return [["model", "runs", *(heading(key, result) for key in found)], *lines]


def csv_table(result: dict[str, Any]) -> str:
    """A line for each run: its budget, arm, seed, scores and costs."""
    file = io.StringIO()
    keys = ["budget", "arm", "seed", "done", "num_updates", *METRICS, "teacher_nfe", "student_nfe", "train_seconds", "extractor", "n"]
    how = {key: result["settings"][key] for key in ("extractor", "n")}
    writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for budget, tier in result["budgets"].items():
        for run in tier["runs"]:
            writer.writerow({"budget": budget, **how, **{k: "" if v is None else v for k, v in run.items()}})
    return file.getvalue()


def latex_table(result: dict[str, Any]) -> str:
    """A booktabs table for each budget."""
    plain = str.maketrans(
        {c: f"\\{c}" for c in "{}$"}
        | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$"}
        | {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "é": r"\'e", "²": "$^2$"}
    )
    parts = []
    for budget in result["budgets"]:
        cells = table_rows(result, budget)
        body = [" & ".join(cell.translate(plain) for cell in line) + r" \\" for line in cells]
        body.insert(1, r"\midrule")
        rows = "\n".join(body)
        columns = "ll" + "r" * (len(cells[0]) - 2)
        parts.append(
            f"% {result['title']}, equal {budget}: interquartile means, {result['comparison']['level']:.0%} bootstrap intervals; "
            f"{measured(result['settings'], result['provenance'])}\n"
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{rows}\n\\bottomrule\n\\end{{tabular}}\n"
        )
    return "\n".join(parts)


def compare(comparison: Comparison, out: Path, jobs: int, command: str = "", report_only: bool = False) -> dict[str, Any]:
    """Trains, judges and writes a comparison; returns what comparison.json holds.

    Raises:
        ValueError: settings that an agent refuses, before anything is trained; runs that were measured in different ways.
    """
    check(comparison, out)
    out.mkdir(parents=True, exist_ok=True)
    tiers: dict[Budget, list[Run]] = {}
    updates: dict[str, int] | None = None
    for budget in comparison.equal:
        runs = [
            Run(budget, arm, seed, out / "runs" / budget / f"{arm}-s{seed}") for seed in comparison.all_seeds for arm in comparison.arms
        ]
        if budget != "updates":
            done = {
                arm: [read_result(r.directory / "result.json") for r in tiers["updates"] if r.arm == arm and _done(r)]
                for arm in comparison.arms
            }
            done = {arm: found for arm, found in done.items() if found}
            if comparison.reference not in done:  # a baseline that diverged sets no budget; what was trained is still to be shown
                continue
            updates = matched_updates(comparison, budget, done) | fixed_updates(comparison, budget, out)
            if not report_only:
                known = read_fixed(out)
                known[budget] = merged(known.get(budget, {}), fixed_by(comparison, updates))  # arms that are left out now keep theirs
                write_atomically(out / FIXED, json.dumps(known, indent=1))
            set_ = {arm: found[0]["num_updates"] for arm, found in done.items()}
            runs = [run for run in runs if run.arm in done]
            for i, run in enumerate(runs):  # a run that would differ by less than a hundredth is the one that is there
                if abs(updates[run.arm] - set_[run.arm]) < 0.01 * set_[run.arm]:
                    runs[i] = run._replace(directory=out / "runs" / "updates" / run.directory.name)
        tiers[budget] = runs
        if not report_only:
            train([run for run in runs if run.directory.parent.name == budget], comparison, out, updates, jobs)
    result = gather(comparison, out, tiers, command)
    write_atomically(out / "comparison.json", json.dumps(result, indent=1))
    write_atomically(out / "table.csv", csv_table(result))
    write_atomically(out / "table.tex", latex_table(result))
    return result


def check(comparison: Comparison, out: Path) -> None:
    """Refuses what an agent would refuse, arms judged in two ways, and runs begun with other settings, before any run begins."""
    expert = None
    measures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in comparison.arms:
            path = Path(folder) / "arm.yaml"
            try:
                agent, settings = settings_of(comparison, arm)
                path.write_text(yaml.safe_dump(settings))
                expert, config, evaluation = refuse_early(find_agent(agent), ["--env", comparison.env, "--config", str(path)], expert)
            except ValueError as error:
                raise ValueError(f"arm {arm}: {error}") from error
            guidance = config.guidance_scale if config.guidance_scale is not None else expert.guidance_scale
            measures[arm] = {"guidance_scale": guidance, "teacher_steps": config.teacher_steps, **dataclasses.asdict(evaluation)}
            measures[arm] |= {"seed": None, "also_steps": None}
    expert = None
    torch.cuda.empty_cache()  # the runs will need it
    (first, measure), *others = measures.items()
    for arm, other in others:
        if differing := [key for key in measure if measure[key] != other[key]]:
            told = "; ".join(f"{key} is {measure[key]} and {other[key]}" for key in differing)
            raise ValueError(f"arms {first} and {arm} would be judged in two ways: {told}. Give them one value, in `shared`")
    for budget, seed, arm in itertools.product(comparison.equal, comparison.all_seeds, comparison.arms):
        given = out / "runs" / budget / f"{arm}-s{seed}.yaml"
        matched = {} if budget == "updates" else {"num_updates": None}  # set by what the runs at equal updates cost
        if given.is_file() and read_yaml(given) | matched != given_settings(comparison, arm, seed) | matched:
            runs = out / "runs" / "*" / f"{arm}-s*"
            raise ValueError(f"{given} holds other settings than arm {arm} has now; choose another --out, or remove its runs, {runs}")
    for budget in comparison.equal:
        fixed_updates(comparison, budget, out)


def markdown(result: dict[str, Any]) -> str:
    """The tables, and the paired differences of the primary metric with their intervals, for a terminal."""
    parts, primary, baseline = [], result["comparison"]["primary"], result["comparison"]["baseline"]
    for budget, tier in result["budgets"].items():
        pairs = tier["statistics"].get(primary, {}).get("pairs", {})
        said = [
            f"{arm} − {baseline}: {pair['mean']:+.3g} [{pair['low']:+.3g}, {pair['high']:+.3g}]; {pair['conclusion']}"
            for arm, pair in pairs.items()
        ]
        shown = [f"{heading(primary, result)}, paired", *said, ""] if said else []
        parts += [f"equal {budget}", "", *markdown_table(table_rows(result, budget, intervals=False)), "", *shown]
    return "\n".join([*parts, measured(result["settings"], result["provenance"]), *(f"! {flag}" for flag in result["flags"])])


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="python -m ddil_agents.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ", ".join(preset_names("ablations"))
    parser.add_argument("--config", action="config", help=f"settings as YAML: a file, or one of configs/ablations: {presets}")
    parser.add_class_arguments(Comparison, None, instantiate=False)
    parser.add_argument("--agents", type=str, default=[], nargs="+", help="arms: these agents …")
    parser.add_argument("--betas", type=str, default=["own"], nargs="+", help=f"… with each of these priors: own, {', '.join(BETAS)}")
    parser.add_argument("--num_updates", type=PositiveInt | None, default=None, help="gradient steps of every arm")
    jobs = torch.cuda.device_count() or os.cpu_count() or 1
    parser.add_argument("--jobs", type=PositiveInt, default=jobs, help="runs at a time; default: one a GPU, or one a core")
    parser.add_argument("--out", type=str, required=True, help="directory of the comparison; it goes on with one that is there")
    parser.add_argument("--report_only", type=bool, default=False, help="train nothing, show what is there")
    with clear_errors(parser):
        args = read_arguments(parser, with_preset("ablations", argv))
        given = {f.name: args[f.name] for f in dataclasses.fields(Comparison)}
        given["arms"] = {**arms_of(args.agents, args.betas), **given["arms"]}
        if args.num_updates is not None:
            given["shared"] = merged(given["shared"], {"num_updates": int(args.num_updates)})
        result = compare(
            Comparison(**given), Path(args.out), args.jobs, shlex.join(["python", "-m", "ddil_agents.compare", *argv]), args.report_only
        )
        print(markdown(result))
        from ddil_agents.page import write_page

        write_page(result, Path(args.out))
    print(f"\n{args.out}: report.html, comparison.json, table.csv, table.tex")


if __name__ == "__main__":
    main()
