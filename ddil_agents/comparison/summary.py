"""Collecting the results of all runs of a comparison into one mapping, which comparison.json, the tables and the page show."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ddil_agents.comparison.arms import Budget, Comparison, Run, arm_settings
from ddil_agents.comparison.results import (
    Rows,
    check_same_evaluation,
    compute_statistics,
    describe_provenance,
    is_deterministic,
    student_row,
    warn_of_identical_arms,
    warn_of_run,
)
from ddil_agents.comparison.runs import has_result, last_line
from ddil_agents.comparison.untrained import evaluate_untrained
from ddil_agents.evaluation.results import METRICS, label_floor, read_result
from ddil_agents.training.metrics import read_metrics


def collect_results(comparison: Comparison, out: Path, tiers: dict[Budget, list[Run]], command: str) -> dict[str, Any]:
    """Collects the results of the runs that are finished, and computes their statistics.

    Args:
        comparison: Arms, seeds and budgets.
        out: The comparison's directory.
        tiers: The runs at each budget.
        command: The command line, for the record.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: no run is finished, or runs were evaluated differently.
    """
    results = {run.directory: read_result(run.directory / "result.json") for runs in tiers.values() for run in runs if has_result(run)}
    if not results:
        raise ValueError(f"no run of {out} is finished; see the .log files in {out / 'runs'}")
    check_same_evaluation(results)
    finished = [run for run in tiers["updates"] if has_result(run)]
    initial = evaluate_untrained(comparison, finished)
    references = collect_references(finished, results)
    full_teacher = next(name for name in references if name.startswith("teacher@"))  # a result lists the teacher in all its steps first
    budgets: dict[str, Any] = {}
    flags: list[str] = []
    for budget, runs in tiers.items():
        rows: dict[str, Rows] = {arm: {} for arm in comparison.arms}
        listed = []
        for run in runs:
            listed.append({"arm": run.arm, "seed": run.seed, "directory": os.path.relpath(run.directory, out), "done": has_result(run)})
            if has_result(run):
                row = rows[run.arm][run.seed] = student_row(results[run.directory])
                listed[-1] |= {"num_updates": results[run.directory]["num_updates"], **row}
                training = read_metrics(run.directory / "metrics.jsonl")
                untrained = initial.get(run.arm, {}).get(run.seed, {})
                flags += warn_of_run(run, row, training, untrained, references[full_teacher].get(run.seed, {}), comparison.primary)
            elif run.log.is_file():
                flags.append(f"{budget}/{run.directory.name}: {last_line(run.log)}")
        flags += [f"{text} (equal {budget})" for text in [*warn_of_identical_arms(comparison, rows), *warn_of_primary(comparison, rows)]]
        budgets[budget] = {"runs": listed, "statistics": compute_statistics(comparison, rows, initial, references[full_teacher])}
    flags += [
        f"equal {budget}: not run, because the budget is what {comparison.baseline_arm} costs, which has no finished run"
        for budget in comparison.equal
        if budget not in tiers
    ]
    any_result = next(iter(results.values()))
    return {
        "title": f"{any_result['env']}: {', '.join(comparison.arms)}",
        "command": command,
        "comparison": dataclasses.asdict(comparison) | {"baseline": comparison.baseline_arm},
        "env": any_result["env"],
        "env_config": any_result["env_config"],
        "settings": {key: value for key, value in any_result["settings"].items() if key != "seed"},
        "arms": {arm: dict(zip(("agent", "settings"), arm_settings(comparison, arm), strict=True)) for arm in comparison.arms},
        "references": {name: list(rows.values()) for name, rows in references.items()},
        "initial": initial,
        "budgets": budgets,
        "flags": flags,
        "provenance": describe_provenance(results.values()),
    }


def collect_references(finished: list[Run], results: dict[Path, dict[str, Any]]) -> dict[str, Rows]:
    """Rows of the floors and of the teacher, by seed, each from the first arm that has it.

    The teacher is the same for all arms, except for the times of its few steps.
    """
    references: dict[str, Rows] = {}
    for run in finished:
        result = results[run.directory]
        for name, row in {**result["floors"], **result["models"]}.items():
            if name in result["floors"] or name.startswith("teacher@"):
                label = label_floor(name, row) if name in result["floors"] else name
                references.setdefault(label, {}).setdefault(run.seed, row | {"times": result["times"]})
    return references


def warn_of_primary(comparison: Comparison, rows: dict[str, Rows]) -> list[str]:
    """Warnings of arms that the primary metric cannot compare with the baseline, or that have no such metric."""
    name, baseline, warnings = METRICS[comparison.primary][0].rstrip(" ↓↑"), comparison.baseline_arm, []
    other_noise = [arm for arm in rows if rows[arm] and is_deterministic(rows, arm) != is_deterministic(rows, baseline)]
    if other_noise and comparison.primary == "frechet_to_expert" and rows[baseline]:
        reason = "only one of the two starts from the teacher's noise and draws no more; compare with the row teacher halves"
        warnings.append(f"{', '.join(other_noise)}: in {name} not compared with {baseline}: {reason}")
    warnings += [
        f"{arm}: its runs have no {name}, the primary metric"
        for arm, arm_rows in rows.items()
        if arm_rows and all(row.get(comparison.primary) is None for row in arm_rows.values())
    ]
    return warnings
