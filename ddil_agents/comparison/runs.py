"""Training the runs of a comparison, each in its own process, and the number of gradient steps of each arm at each budget."""

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

from ddil_agents.commands.agents import command_of
from ddil_agents.comparison.arms import Budget, Comparison, Run, arm_settings, run_settings
from ddil_agents.comparison.results import student_row
from ddil_agents.training.checkpoint import write_atomically

MATCHED = "matched.json"  # in a comparison's directory: the gradient steps of each arm at budgets other than updates


def train(runs: list[Run], comparison: Comparison, out: Path, updates: dict[str, int] | None, jobs: int) -> None:
    """Trains the runs that have no result yet, and resumes those that were interrupted. If a run fails, the others continue.

    Args:
        runs: The runs.
        comparison: Their settings.
        out: Directory of the comparison.
        updates: Gradient steps of each arm; None: those of its settings.
        jobs: Runs at a time; each has one GPU, or one thread where there is no GPU.
    """
    todo = [run for run in runs if not has_result(run)]
    gpus, slots, worker = visible_gpus(), SimpleQueue[str](), threading.local()
    for i in range(jobs if gpus else 0):  # with more jobs than GPUs, each GPU has about as many
        slots.put(gpus[i % len(gpus)])

    def assign_gpu() -> None:
        """Assigns a GPU to a worker, for all its runs."""
        worker.gpu = slots.get() if gpus else None

    def train_run(run: Run) -> None:
        agent, settings = str(comparison.arms[run.arm]["agent"]), run_settings(comparison, run.arm, run.seed)
        if updates is not None:
            settings["num_updates"] = updates[run.arm]
        if (run.directory / "config.yaml").is_file():
            arguments = ["--resume", str(run.directory)]
        else:
            write_atomically(run.config_file, yaml.safe_dump(settings, sort_keys=False))
            arguments = ["--config", str(run.config_file), "--seed", str(run.seed), "--out", str(run.directory)]
            arguments += ["--evaluate.store", str((out / "expert").resolve())]  # runs of one seed share the teacher's samples
        environment = dict(os.environ)
        if worker.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = worker.gpu
        elif jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"  # parallel runs with a thread for each core would slow each other down
        with run.log.open("w") as file:
            command = [sys.executable, *command_of(agent), *arguments]
            failed = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode != 0
        bar.set_postfix_str(f"{run.arm}, seed {run.seed}{' failed' if failed else ''}")
        bar.update()

    for run in todo:
        run.directory.parent.mkdir(parents=True, exist_ok=True)
    label = runs[0].budget if runs else ""
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), desc=f"equal {label}", unit="run")
    with bar, ThreadPoolExecutor(jobs, initializer=assign_gpu) as pool:
        list(pool.map(train_run, todo))


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES that select one GPU each: the entries of the user's own, else the numbers of all GPUs."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(count)])[:count]


def matched_updates(comparison: Comparison, budget: Budget, results: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """Gradient steps with which each arm costs as much as the baseline, from the cost of a step in the runs at equal updates.

    Args:
        comparison: Names the baseline.
        budget: The cost to match.
        results: Results of the runs at equal updates, by arm.

    Raises:
        ValueError: an arm has no such cost, or trains in stages, whose steps differ in cost.
    """

    def cost_per_update(arm: str) -> float:
        """Mean cost of one gradient step of an arm."""
        if arm_settings(comparison, arm)[1].get("stages"):
            raise ValueError(f"equal={budget}: {arm} trains in stages, whose steps differ in cost; compare it at equal updates")
        costs = {"teacher_nfe": ("teacher_nfe",), "nfe": ("teacher_nfe", "student_nfe"), "seconds": ("train_seconds",)}[budget]
        total = statistics.fmean(sum(student_row(result)[key] for key in costs) for result in results[arm])
        if not total:
            raise ValueError(
                f"equal={budget}: {arm} has no such cost, so that no number of updates matches the baseline; leave {budget} out"
            )
        return total / results[arm][0]["num_updates"]

    allowed = cost_per_update(comparison.baseline_arm) * results[comparison.baseline_arm][0]["num_updates"]
    return {arm: max(1, round(allowed / cost_per_update(arm))) for arm in results}


def matched_entry(comparison: Comparison, updates: dict[str, int]) -> dict[str, Any]:
    """The entry of matched.json for one budget: gradient steps of each arm, and the settings that they were computed for."""
    settings = {arm: list(arm_settings(comparison, arm)) for arm in updates if arm in comparison.arms}
    return {"baseline": comparison.baseline_arm, "updates": updates, "settings": settings}


def read_matched(out: Path) -> dict[str, Any]:
    """A comparison's matched.json, by budget; empty if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = out / MATCHED
    if not path.is_file():
        return {}
    try:
        matched: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry[key], dict) for entry in matched.values() for key in ("updates", "settings")):
            raise ValueError("not the updates and settings of each budget")
        if not all(isinstance(n, int) for entry in matched.values() for n in entry["updates"].values()):
            raise ValueError("updates are whole numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and the runs of other budgets than updates, which begin anew") from error
    return matched


def recorded_updates(comparison: Comparison, budget: Budget, out: Path) -> dict[str, int]:
    """The gradient steps of each arm at one budget, as matched.json records them.

    They stay as they are when seeds are added, which changes the mean cost of a step.

    Raises:
        ValueError: they were computed for another baseline, or for other settings of the baseline.
    """
    if (recorded := read_matched(out).get(budget)) is None:
        return {}
    now = matched_entry(comparison, recorded["updates"])
    same = {arm for arm, settings in now["settings"].items() if settings == recorded["settings"].get(arm)}
    if recorded["baseline"] != comparison.baseline_arm or comparison.baseline_arm not in same:
        raise ValueError(
            f"the runs of {out / 'runs' / budget} were matched to the cost of {recorded['baseline']}, and the baseline is now "
            f"{comparison.baseline_arm}, or has other settings; remove these runs and {out / MATCHED}, or choose another --out"
        )
    return {arm: updates for arm, updates in recorded["updates"].items() if arm in same}  # an arm with new settings has new costs


def last_line(log: Path) -> str:
    """The last line of a run's log, which says why it stopped."""
    return (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]


def has_result(run: Run) -> bool:
    """Whether a run is finished."""
    return (run.directory / "result.json").is_file()
