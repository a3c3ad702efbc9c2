"""Statistics over the results of a comparison's runs, paired by seed, and warnings about runs and arms."""

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
    normalise,
    paired_comparison,
    probability_of_improvement,
    sign_flip_test,
)
from ddil_agents.evaluation.provenance import PROVENANCE
from ddil_agents.evaluation.results import METRICS

Rows = dict[int, dict[str, Any]]  # metrics of a model, by seed


def student_row(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics and costs of a run's student."""
    row: dict[str, Any] = result["models"][result["student"]]
    return row


def describe_provenance(results: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Date, hardware and versions of some results; all values where they differ."""
    results = list(results)
    return {key: ", ".join(sorted({result[key] for result in results})) for key in PROVENANCE}


def check_same_evaluation(results: dict[Path, dict[str, Any]]) -> None:
    """Checks that all runs were evaluated with the same expert and settings.

    Raises:
        ValueError: two runs were not; the message names them and what differs.
    """
    (first_path, first), *others = results.items()
    for path, result in others:
        for key in ("env_config", "settings"):
            a, b = ({k: v for k, v in r[key].items() if k != "seed"} for r in (first, result))
            if a != b:
                raise ValueError(f"{first_path} has {key} {a}, {path} {b}; compare runs of one expert, evaluated in one way")


def compute_statistics(comparison: Comparison, rows: dict[str, Rows], initial: dict[str, Rows], teacher: Rows) -> dict[str, Any]:
    """For each metric: interquartile mean and interval of each arm, and its paired differences from the baseline.

    Args:
        comparison: Gives baseline and confidence level.
        rows: Metrics of each arm's students, by seed.
        initial: Metrics of the same students untrained.
        teacher: Metrics of the teacher in all its steps.
    """
    computed: dict[str, Any] = {}
    for metric, (_, _, better) in METRICS.items():
        values = {
            arm: {seed: float(row[metric]) for seed, row in arm_rows.items() if row.get(metric) is not None}
            for arm, arm_rows in rows.items()
        }
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
            unreachable = metric == "frechet_to_expert" and not is_deterministic(rows, arm)  # the teacher's own 0
            if not unreachable and all(start is not None and goal is not None and start != goal for start, goal in ends):
                arms[arm]["normalised"] = np.atleast_1d(normalise(v, *map(list, zip(*ends, strict=True)))).tolist()
        if metric == "frechet_to_expert":
            values = {arm: v for arm, v in values.items() if is_deterministic(rows, arm) == is_deterministic(rows, comparison.baseline_arm)}
        computed[metric] = {"arms": arms, "pairs": compare_with_baseline(comparison, values, better)}
    return computed


def is_deterministic(rows: dict[str, Rows], arm: str) -> bool:
    """Whether x_T determines the samples of an arm, as it does those of the teacher: the arm draws no noise on the way.

    An arm that draws more noise shares none with the teacher. Even a perfect student is then as far from the teacher's samples as another
    set of the teacher's samples is. In their distance to the teacher, such arms are not compared with deterministic ones.
    """
    return any(row.get("endpoint_rmse") is not None for row in rows.get(arm, {}).values())


def compare_with_baseline(comparison: Comparison, values: dict[str, dict[int, float]], better: int) -> dict[str, Any]:
    """Paired comparisons of each arm with the baseline, on the seeds that both have, with Holm's correction over the arms.

    Args:
        comparison: Gives baseline and confidence level.
        values: One metric, by arm and seed.
        better: −1 where lower values are better, else 1.
    """
    base = values.get(comparison.baseline_arm, {})
    shared = {arm: [seed for seed in scores if seed in base] for arm, scores in values.items() if arm != comparison.baseline_arm}
    columns = {arm: ([values[arm][s] for s in seeds], [base[s] for s in seeds]) for arm, seeds in shared.items() if len(seeds) > 1}
    if not columns:
        return {}
    p_values = [sign_flip_test(np.subtract(a, b)) for a, b in columns.values()]
    pairs = {}
    for (arm, (a, b)), p_holm in zip(columns.items(), holm(p_values).tolist(), strict=True):
        pair = paired_comparison(a, b, (arm, comparison.baseline_arm), len(columns), comparison.level, p_holm)
        wins = probability_of_improvement(a, b, lower_is_better=better < 0)
        pairs[arm] = dataclasses.asdict(pair) | {"p_holm": p_holm, "probability_of_improvement": wins}
    return pairs


def warn_of_run(
    run: Run, row: dict[str, Any], training: list[dict[str, Any]], initial: dict[str, Any], teacher: dict[str, Any], primary: str
) -> list[str]:
    """Warnings about one run: missed modes, a student that training made worse, gradients that blew up.

    Args:
        run: The run.
        row: Metrics of its student.
        training: The lines of its metrics.jsonl.
        initial: Metrics of the untrained student.
        teacher: Metrics of the teacher in all its steps.
        primary: The primary metric.
    """
    warnings = []
    # Half of the teacher's coverage is a low bar: few steps cost some, and a student that starts from random weights has hardly any.
    # In a world samples of each condition are few, and its episodes are what counts.
    keys = () if "success" in row else ("coverage", "vendi")
    for key, (whose, other, share) in itertools.product(keys, (("untrained", initial, 0.9), ("of the teacher", teacher, 0.5))):
        if (value := row.get(key)) is not None and value < share * (bound := other.get(key) or 0.0):
            warnings.append(f"{key} is {value:.3f}, against {bound:.3f} {whose}: modes are missed")
    value, before = row.get(primary), initial.get(primary)
    if value is not None and before is not None and METRICS[primary][2] * (value - before) < 0:
        warnings.append(f"{METRICS[primary][0][:-2]} is {value:.4g}, and was {before:.4g} untrained: training made it worse")
    for name in sorted({key for line in training for key in line if key.endswith("grad_norm")}):
        lines = [line for line in training if name in line]
        median = statistics.median(line[name] for line in lines)
        later = [line.get(f"{name}_max", line[name]) for line in lines[len(lines) // 5 :]]  # the first fifth counts as warm-up
        largest = max((norm for norm in later if math.isfinite(norm)), default=0.0)  # fp16's scaler skips the others
        if len(lines) >= 10 and largest > 10 * median > 0:
            label = name.replace("grad_norm", "gradient norm").replace("_", " ")
            warnings.append(f"a {label} of {largest:.3g}, {largest / median:.0f} times the median")
    return [f"{run.arm}, seed {run.seed}: {text} (equal {run.budget})" for text in warnings]


def warn_of_identical_arms(comparison: Comparison, rows: dict[str, Rows]) -> list[str]:
    """Warnings about arms whose metrics all equal the baseline's: the settings in which they differ have no effect."""
    numbers = {
        arm: {seed: {key: row.get(key) for key in METRICS} for seed, row in by_seed.items() if row.get(comparison.primary) is not None}
        for arm, by_seed in rows.items()
    }
    baseline = comparison.baseline_arm
    same = [arm for arm, by_seed in numbers.items() if arm != baseline and by_seed and by_seed == numbers[baseline]]
    return [f"{arm}: each run equals that of {baseline}, bit for bit; the settings in which they differ have no effect" for arm in same]
