"""Training the runs of a comparison, each in a process of its own, and the gradient steps that a budget gives an arm."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml
from tqdm import tqdm

from ddil_agents.commands.parse import command_of
from ddil_agents.comparison.arms import Budget, Comparison, Run, given_settings, settings_of
from ddil_agents.comparison.results import own_row
from ddil_agents.training.checkpoint import write_atomically

FIXED = "matched.json"  # of a comparison: the gradient steps of each arm at the budgets that the baseline's costs set


def train(runs: list[Run], comparison: Comparison, out: Path, updates: dict[str, int] | None, jobs: int) -> None:
    """Trains what is not there yet, and takes up what was cut short; a run that fails is a result, and the rest goes on.

    Args:
        out: Directory of the comparison.
        runs: Which.
        comparison: Their settings.
        updates: Gradient steps by arm; default: as they are set.
        jobs: Runs at a time; one GPU each where there are GPUs, else one thread each.
    """
    todo = [run for run in runs if not has_result(run)]
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
            command = [sys.executable, *command_of(agent), *arguments]
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


def last_line(log: Path) -> str:
    """Why a run stopped, as far as its log tells."""
    return (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]


def has_result(run: Run) -> bool:
    return (run.directory / "result.json").is_file()
