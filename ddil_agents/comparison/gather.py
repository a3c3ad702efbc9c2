"""One result of all runs of a comparison, which its tables and its page are made of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ddil_agents.comparison.arms import Budget, Comparison, Run, settings_of
from ddil_agents.comparison.portraits import portray
from ddil_agents.comparison.results import Rows, flags_of, idle_arms, made, own_row, same_measure, shares_noise, statistics_of
from ddil_agents.comparison.runs import has_result, last_line
from ddil_agents.evaluation.results import METRICS, called, read_result
from ddil_agents.training.metrics import read_metrics


def gather(comparison: Comparison, out: Path, tiers: dict[Budget, list[Run]], command: str) -> dict[str, Any]:
    """All numbers of a comparison, from the runs that are there."""
    results = {run.directory: read_result(run.directory / "result.json") for runs in tiers.values() for run in runs if has_result(run)}
    if not results:
        raise ValueError(f"no run of {out} is finished; see the .log files in {out / 'runs'}")
    same_measure(results)
    finished = [run for run in tiers["updates"] if has_result(run)]
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
            listed.append({"arm": run.arm, "seed": run.seed, "directory": os.path.relpath(run.directory, out), "done": has_result(run)})
            if has_result(run):
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
