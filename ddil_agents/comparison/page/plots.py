"""The figures of a comparison's page: quality against diversity, metrics by sampling step, training curves, performance profiles."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddil_agents.comparison.page.figures import (
    ARM_STYLES,
    FEW_STEPS,
    FLOOR,
    HALVES,
    TEACHER,
    Group,
    Line,
    Points,
    SeriesStyle,
    line_figure,
    scatter_figure,
)
from ddil_agents.comparison.page.tables import BUDGETS
from ddil_agents.comparison.statistics import performance_profile
from ddil_agents.evaluation.results import DIRECTIONS, METRICS, metric_heading, read_result
from ddil_agents.states.beta import SOURCES
from ddil_agents.training.metrics import read_metrics
from ddil_env.presets import read_yaml

Row = dict[str, Any]
ERROR = "action error E (a − a*)²"
STEPS: dict[str, tuple[str, str, str]] = {  # key of a list over sampling steps → title, y axis, what to look for
    "shift": ("Covariate shift", "sliced W₂ to noised data",
              "A model above the training data visits states that noised data do not have. The halves have half as many samples, "
              "which alone raises them."),
    "gaussian_shift": ("Shift of mean and covariance", "Gaussian W₂ to noised data", "The same for mean and covariance."),
    "mmd_shift": ("Shift by MMD", "MMD² to noised data",
                  "An unbiased estimate: for equal distributions it scatters around 0, and may be negative."),
    "shift_to_expert": ("Shift from the teacher's states", "sliced W₂ to the teacher's states",
                        "States of the student against those of the teacher from the same noise. The floor is 0; for samplers that draw "
                        "more noise on the way it is the teacher's halves."),
    "gaussian_shift_to_expert": ("Shift from the teacher's mean and covariance", "Gaussian W₂ to the teacher's states",
                                 "The same for mean and covariance."),
    "mmd_shift_to_expert": ("Shift from the teacher's states by MMD", "MMD² to the teacher's states",
                            "An unbiased estimate, 0 for the teacher: for equal distributions it scatters around 0, and may be negative."),
    "action_mse_own": ("Error on the model's own states", ERROR, "The error in sampling: at the states that the model has reached."),
    "action_mse_expert": ("Error on the teacher's states", ERROR, "The error at the states that the teacher reaches."),
    "action_mse_forward": ("Error on noised data", ERROR, "The error at forward-diffused states, on which behaviour cloning trains."),
    "action_ratio": ("Compounding, against noised data", "error, own states / noised data",
                     "1: own states are no harder than noised data. Where errors compound, the ratio grows from step to step."),
    "compounding": ("Compounding, against the teacher's states", "error, own / teacher's states",
                    "1: own states are no harder than the teacher's. Where errors compound, the ratio grows from step to step."),
    "path_rmse": ("Path error under common noise", "RMSE to the teacher's path",
                  "How far a model has drifted from the teacher's path from the same noise."),
    "diversity": ("Diversity", "mean distance of two states",
                  "Below the teacher, the samples of a model are less diverse."),
}  # fmt: skip
AFTER = ("path_rmse",)  # measured after each step; all others before it
QUALITY = ("frechet", "frechet_to_expert")  # the first that was measured is drawn against each measure of diversity
DIVERSITY = ("recall", "coverage", "vendi", "lpips")
CURVES: dict[str, tuple[str, str]] = {  # key of a line of metrics.jsonl → title, what to look for
    "loss": ("Training loss", "Each method has its own loss, on its own states: compare how the curves fall, not their values."),
    "grad_norm": ("Gradient norm before clipping", "Spikes mean unstable training: compare arms with and without thresholding."),
    "critic_loss": ("Loss of the fake critic", "It should stay level: a critic that lags behind the student misleads it."),
    "critic_grad_norm": ("Gradient norm of the fake critic", "Before clipping."),
    "clipped": ("Entries that thresholding changed", "Fraction of the entries of x̂₀, mean over the roles that are thresholded."),
}
BINS = 40  # points of a training curve, each a mean over a stretch of training
BAND = "Line: mean over seeds; band: from the lowest to the highest seed"


def arm_styles(result: dict[str, Any]) -> dict[str, SeriesStyle]:
    """The style of each arm in all figures."""
    return {arm: ARM_STYLES[i % len(ARM_STYLES)] for i, arm in enumerate(result["arms"])}


def models(result: dict[str, Any], budget: str) -> Iterator[tuple[str, SeriesStyle, list[Row]]]:
    """Yields name, style and rows of each reference and each arm."""
    full = max((name for name in result["references"] if name.startswith("teacher@")), key=num_steps_of, default="")
    for name, rows in result["references"].items():
        kind = name.partition(",")[0]  # the label of a floor ends in its number of samples
        yield name, {full: TEACHER, "training data": FLOOR, "real halves": HALVES, "teacher halves": HALVES}.get(kind, FEW_STEPS), rows
    for arm, style in arm_styles(result).items():
        yield arm, style, [run for run in result["budgets"][budget]["runs"] if run["arm"] == arm and run["done"]]


def num_steps_of(name: str) -> int:
    """Number of steps in a teacher's name, such as teacher@32."""
    return int(re.findall(r"\d+", name)[0])


def count_runs(n: int) -> str:
    """A number of runs as text."""
    return f"{n} {'run' if n == 1 else 'runs'}"


def quality_figures(result: dict[str, Any]) -> Group:
    """Fréchet distance to the data, or without data to the teacher's samples, against each measure of diversity."""
    group = Group("", [])
    for budget, tier in result["budgets"].items():
        distance = next((key for key in QUALITY if key in tier["statistics"]), "")
        for key in DIVERSITY:
            points = []
            for name, style, rows in models(result, budget):
                rows = [row for row in rows if row.get(key) is not None and row.get(distance) is not None]
                if rows:
                    points.append(Points(name, style, [row[key] for row in rows], [row[distance] for row in rows]))
            if points:
                x, y = metric_heading(key, result), metric_heading(distance, result)
                caption = f"The lower right corner is best. {count_runs(max(len(series.x) for series in points))} an arm."
                title = f"{x[0].upper()}{x[1:-2]}, equal {BUDGETS[budget]}"
                group.add(scatter_figure(f"{key}-{budget}", title, caption, points, x, y), points)
    return group


def profile_figures(result: dict[str, Any]) -> Group:
    """Performance profiles: the fraction of an arm's runs that reach each normalised score."""
    group, primary = Group("", []), result["comparison"]["primary"]
    for budget, tier in result["budgets"].items():
        arms = tier["statistics"].get(primary, {"arms": {}})["arms"]
        scores = {arm: row["normalised"] for arm, row in arms.items() if "normalised" in row}
        if not scores:
            continue
        at = np.unique([0, 1, *(x for values in scores.values() for x in values)])
        margin = 0.04 * (at[-1] - at[0])
        at = np.array([at[0] - margin, *at, at[-1] + margin])
        lines = [Line(arm, arm_styles(result)[arm], at.tolist(), performance_profile(values, at)) for arm, values in scores.items()]
        n = max(map(len, scores.values()))
        caption = (
            f"Further right is better; 0: untrained, 1: the teacher in all its steps. {count_runs(n)} an arm, each a step of the curve."
        )
        title, x = f"Equal {BUDGETS[budget]}", f"normalised {metric_heading(primary, result).rstrip(' ↓↑')}, at least"
        figure = line_figure(f"profile-{budget}", title, caption, lines, x, "fraction of runs", log=False, drawstyle="steps-pre")
        group.add(figure, lines)
    return group


def step_figures(result: dict[str, Any], budget: str, out: Path) -> Group:
    """All metrics that have a value for each sampling step, over time, or over the number of the step where times are unknown."""
    group, known = Group("Over the sampling steps", []), arm_times(result, budget, out)
    timed = len(known) == len({run["arm"] for run in result["budgets"][budget]["runs"] if run["done"]})
    for key, (title, y, look_for) in STEPS.items():
        lines, n = [], 0
        for name, style, rows in models(result, budget):
            times = known[name] if name in known else rows[0].get("times", []) if rows else []
            rows = [row for row in rows if row.get("times", times) == times]  # rows of a reference may be at the times of several arms
            lists = [values for row in rows if (values := step_values(row, key))]
            kind = name.partition(",")[0]  # relabel a floor: trajectories may be fewer than samples
            name = f"{kind}, n = {rows[0]['n_paths']}" if name not in known and rows and "n_paths" in rows[0] else name
            if lists and (not timed or len(times) - len(lists[0]) in (0, 1)):  # not a teacher in another number of steps
                length = len(lists[0])
                x = (times[-length:] if key in AFTER else times[:length]) if timed else list(range(1, length + 1))
                lines.append(Line.over(name, style, x, lists))
                n = max(n, len(lists) if name in result["arms"] else 0)
        if n:
            caption = f"{look_for} {count_runs(n)} an arm. {BAND}."
            figure = line_figure(f"{key}-{budget}", title, caption, lines, "time t, noise to data" if timed else "step", y, falling=timed)
            group.add(figure, lines)
    return group


def arm_times(result: dict[str, Any], budget: str, out: Path) -> dict[str, list[float]]:
    """The N times of each arm's grid, and 0."""
    times: dict[str, list[float]] = {}
    for run in result["budgets"][budget]["runs"]:
        path = out / run["directory"] / "result.json"
        if run["done"] and run["arm"] not in times and path.is_file():
            times[run["arm"]] = read_result(path)["times"]
    return times


def step_values(row: Row, key: str) -> list[float]:
    """A row's values over the sampling steps, NaN where one is missing; empty without such values."""
    if key == "compounding":
        pairs = zip(step_values(row, "action_mse_own"), step_values(row, "action_mse_expert"), strict=False)
        return [own / on_expert if on_expert else math.nan for own, on_expert in pairs]
    values = row.get(key)
    return [math.nan if x is None else float(x) for x in values] if isinstance(values, list) else []


def training_figures(result: dict[str, Any], budget: str, out: Path) -> tuple[Group, Group, Group]:
    """Training curves: β and the sources of states for each arm, losses and validation, and gradients with and without thresholding."""
    logs, evaluations = (read_logs(result, budget, out, file) for file in ("metrics.jsonl", "eval.jsonl"))
    shares, curves = Group("β, and the sources of the states", []), Group("Losses, validation and gradients", [])
    for i, (arm, runs) in enumerate(logs.items()):
        lines = []
        for source, (prior, drawn) in source_styles().items():
            lines.append(Line.over(f"β of {source}", prior, *bin_rows(runs, ("beta", source))))
            lines.append(Line.over(f"{source}, drawn", drawn, *bin_rows(runs, ("drawn", source), 12)))
        if lines := [line for line in lines if len(line.x)]:
            caption = (
                f"Lines: β. Marks: fraction of the states that were drawn; {count_states(runs)} states in a run. "
                f"Mean of {count_runs(len(runs))}; band: from the lowest to the highest seed."
            )
            name, x, y = f"beta-{budget}-{i}", "gradient steps", "share of states"
            shares.add(line_figure(name, arm, caption, lines, x, y, log=False, limits=(-0.03, 1.03)), lines)
    for key, (title, look_for) in CURVES.items():
        lines = [Line.over(arm, arm_styles(result)[arm], *bin_rows(runs, (key,))) for arm, runs in logs.items()]
        if lines := [line for line in lines if line.y.any()]:  # no figure for thresholding that changes nothing
            caption = f"{look_for} Up to {count_runs(max(map(len, logs.values())))} an arm. {BAND}."
            curves.add(line_figure(f"{key}-{budget}", title, caption, lines, "gradient steps", title.lower()), lines)
    for key in dict.fromkeys(key for runs in evaluations.values() for rows in runs for row in rows for key in row if key in DIRECTIONS):
        lines = [Line.over(arm, arm_styles(result)[arm], *align_rows(runs, key)) for arm, runs in evaluations.items()]
        title = f"Validation: {metric_heading(key, result) if key in METRICS else key}"
        caption = f"During training, on the validation samples. Up to {count_runs(max(map(len, evaluations.values())))} an arm. {BAND}."
        curves.add(line_figure(f"eval-{key}-{budget}", title, caption, lines, "gradient steps", key), lines)
    thresholded = Group("Gradient norms with and without thresholding", [])
    for i, family in enumerate(thresholding_families(result, out)):
        lines = [
            Line.over(
                f"{arm} ({', '.join(roles)} thresholded)" if roles else f"{arm} (no threshold)",
                replace(arm_styles(result)[arm], dash="--" if roles else "-"),
                *bin_rows(logs.get(arm, []), ("grad_norm",)),
            )
            for arm, roles in family.items()
        ]
        if lines := [line for line in lines if len(line.x)]:
            n = count_runs(max(len(logs.get(arm, [])) for arm in family))
            caption = f"Arms that differ in nothing else. Before clipping; dashed: thresholded. Up to {n} an arm. {BAND}."
            name, x, y = f"thresholded-{budget}-{i}", "gradient steps", "gradient norm"
            thresholded.add(line_figure(name, ", ".join(family), caption, lines, x, y), lines)
    return shares, curves, thresholded


def read_logs(result: dict[str, Any], budget: str, out: Path, file: str) -> dict[str, list[list[Row]]]:
    """By arm, the lines of the file (metrics.jsonl or eval.jsonl) of each run that has it."""
    logs: dict[str, list[list[Row]]] = {}
    for run in result["budgets"][budget]["runs"]:
        if (path := out / run["directory"] / file).is_file():
            logs.setdefault(run["arm"], []).append(read_metrics(path))
    return logs


def thresholding_families(result: dict[str, Any], out: Path) -> list[dict[str, list[str]]]:
    """Families of arms that differ only in thresholding, with and without it: for each arm, the roles that are thresholded."""
    families: dict[str, dict[str, list[str]]] = {}
    for run in result["budgets"]["updates"]["runs"]:
        path = out / run["directory"] / "config.yaml"
        if run["seed"] == result["comparison"]["first_seed"] and path.is_file():
            config = read_yaml(path)
            roles = config.pop("thresholding", {}).get("roles", [])
            families.setdefault(json.dumps(config, sort_keys=True), {})[run["arm"]] = roles
    return [family for family in families.values() if any(family.values()) and not all(family.values())]


def source_styles() -> dict[str, tuple[SeriesStyle, SeriesStyle]]:
    """For each source, the style of its β, a line, and of the states drawn from it, markers."""
    shapes = (("o", "●", "-"), ("*", "★", "--"), ("^", "▲", ":"))
    return {
        s: (SeriesStyle("ink", "", "", dash), SeriesStyle("ink", mark, glyph, ""))
        for s, (mark, glyph, dash) in zip(SOURCES, shapes, strict=True)
    }


def count_states(runs: list[list[Row]]) -> str:
    """Number of states drawn from each source, mean over runs, as text."""
    drawn = [sum((Counter[str](row.get("source_counts") or {}) for row in rows), Counter[str]()) for rows in runs]
    return ", ".join(f"{sum(counts[source] for counts in drawn) / len(runs):,.0f} {source}" for source in SOURCES)


def read_number(row: Row, keys: tuple[str, ...]) -> float:
    """The number at a path of keys in a line of metrics, NaN without one; the mean if there is a mapping, such as of roles."""
    counts = row.get("source_counts") or {}
    value: Any = {**row, "drawn": {source: n / max(1, sum(counts.values())) for source, n in counts.items()}}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    values = [x for x in value.values() if x is not None] if isinstance(value, dict) else [] if value is None else [value]
    return statistics.fmean(values) if values else math.nan


def align_rows(runs: list[list[Row]], key: str) -> tuple[list[float], NDArray[np.float64]]:
    """A metric at each step that any run has a line of: the steps (k,), and values (runs, k), NaN where a run has none."""
    steps = sorted({row["step"] for rows in runs for row in rows})
    by_step = [{row["step"]: row.get(key) for row in rows} for rows in runs]
    return steps, np.array([[values.get(step) for step in steps] for values in by_step], dtype=np.float64)


def bin_rows(runs: list[list[Row]], keys: tuple[str, ...], bins: int = BINS) -> tuple[list[float], NDArray[np.float64]]:
    """Averages lines of metrics over stretches of training.

    Returns:
        The mean step of each stretch, (k,), and the mean of each run in it, (runs, k); NaN where a run has no line.
    """
    points = [(i, row["step"], x) for i, rows in enumerate(runs) for row in rows if math.isfinite(x := read_number(row, keys))]
    last = max((step for _, step, _ in points), default=1)
    sums, counts, steps = np.zeros((len(runs), bins)), np.zeros((len(runs), bins)), np.zeros(bins)
    for i, step, x in points:
        k = math.ceil(bins * step / last) - 1
        sums[i, k] += x
        counts[i, k] += 1
        steps[k] += step
    held = counts.any(0)
    means = np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)
    return (steps[held] / counts[:, held].sum(0)).round().tolist(), means[:, held]
