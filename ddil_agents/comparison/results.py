"""What the runs of a comparison say together: statistics, paired by seed, and what is to be warned of."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ddil_agents.comparison.arms import Comparison, Run
from ddil_agents.comparison.statistics import (
    bootstrap_interval,
    holm,
    interquartile_mean,
    normalised,
    paired_comparison,
    probability_of_improvement,
    sign_flip_test,
)
from ddil_agents.evaluation.provenance import PROVENANCE
from ddil_agents.evaluation.results import METRICS

Rows = dict[int, dict[str, Any]]  # what a model scored, by seed


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
