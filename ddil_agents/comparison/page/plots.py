"""Which figures a comparison's page has: quality and diversity, what happens step by step, training, performance profiles."""

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

from ddil_agents.comparison.page.figures import FEWER, FLOOR, HALVES, LOOKS, TEACHER, Group, Line, Look, Points, line_figure, scatter_figure
from ddil_agents.comparison.page.tables import BUDGETS
from ddil_agents.comparison.statistics import performance_profile
from ddil_agents.evaluation.results import heading, read_result
from ddil_agents.states.buffer import SOURCES
from ddil_agents.training.metrics import read_metrics
from ddil_env.presets import read_yaml

Row = dict[str, Any]
ERROR = "action error E (a − a*)²"
STEPS: dict[str, tuple[str, str, str]] = {  # key of a row's list over steps → title, y axis, what to look for
    "shift": ("Covariate shift", "sliced W₂ to noised data",
              "Where a model lies above training data, it visits states that noised data do not. Halves are of half as many samples, "
              "and lie higher for it."),
    "gaussian_shift": ("Shift of mean and covariance", "Gaussian W₂ to noised data", "What the first two moments show of the shift."),
    "mmd_shift": ("Shift as a kernel sees it", "MMD² to noised data", "0 for equal distributions, around which the estimate scatters."),
    "shift_to_expert": ("Shift from the teacher's states", "sliced W₂ to the teacher's states",
                        "What a student visits against what the teacher visits, wherever the data are. Both start from the same noise: "
                        "the floor is 0, but for samplers that draw noise on the way, to which the teacher's halves apply."),
    "gaussian_shift_to_expert": ("Mean and covariance of the teacher's states", "Gaussian W₂ to the teacher's states",
                                 "What the first two moments show of it."),
    "mmd_shift_to_expert": ("Shift from the teacher's states as a kernel sees it", "MMD² to the teacher's states",
                            "0 for the teacher itself; of equal distributions the estimate scatters around 0."),
    "action_mse_own": ("Error on the model's own states", ERROR, "What sampling suffers: the states are those that the model has led to."),
    "action_mse_expert": ("Error on the teacher's states", ERROR, "The same, where the teacher would have led."),
    "action_mse_forward": ("Error on noised data", ERROR, "The same, at states of the kind that behaviour cloning trains on."),
    "action_ratio": ("Compounding, against noised data", "error, own states / noised data",
                     "At 1, own states are no harder than those of training. Errors that compound make the ratio grow from step to step."),
    "compounding": ("Compounding, against the teacher's states", "error, own / teacher's states",
                    "At 1, own states are no harder than the teacher's. Errors that compound make the ratio grow from step to step."),
    "path_rmse": ("Path error under common noise", "RMSE to the teacher's path",
                  "How far a model has drifted from where the teacher goes from the same noise."),
    "diversity": ("Diversity", "mean distance of two states",
                  "Where a model falls below the teacher, its samples have come closer together than they should."),
}  # fmt: skip
AFTER = ("path_rmse",)  # of the state that a step leads to; all others of the state that it starts from
QUALITY = ("frechet", "frechet_to_expert")  # the first that was measured, against all of the others
DIVERSITY = ("recall", "coverage", "vendi", "lpips")
CURVES: dict[str, tuple[str, str]] = {  # key of a line of metrics.jsonl → title, what to look for
    "loss": ("Training loss", "Each method's own loss, on its own states: compare courses, not heights, between methods."),
    "grad_norm": ("Gradient norm before clipping", "Spikes say that training is unstable: look at arms with and without thresholding."),
    "critic_loss": ("Loss of the fake critic", "It should stay level: a critic that lags behind misleads the student."),
    "critic_grad_norm": ("Gradient norm of the fake critic", "Before clipping, as above."),
    "clipped": ("Entries that thresholding changed", "Share of the estimates' entries, averaged over the roles that it is on for."),
}
BINS = 40  # points that a training curve is averaged to
BAND = "Line: mean; band: an arm's lowest to highest seed"


def looks(result: dict[str, Any]) -> dict[str, Look]:
    """Each arm's colour and marker, in all figures."""
    return {arm: LOOKS[i % len(LOOKS)] for i, arm in enumerate(result["arms"])}


def models(result: dict[str, Any], budget: str) -> Iterator[tuple[str, Look, list[Row]]]:
    """References and arms with their rows."""
    full = max((name for name in result["references"] if name.startswith("teacher@")), key=steps_in, default="")
    for name, rows in result["references"].items():
        kind = name.partition(",")[0]  # a floor's name goes on with its number of samples
        yield name, {full: TEACHER, "training data": FLOOR, "real halves": HALVES, "teacher halves": HALVES}.get(kind, FEWER), rows
    for arm, look in looks(result).items():
        yield arm, look, [run for run in result["budgets"][budget]["runs"] if run["arm"] == arm and run["done"]]


def steps_in(name: str) -> int:
    """Of a teacher's name, such as teacher@32."""
    return int(re.findall(r"\d+", name)[0])


def runs_of(n: int) -> str:
    """How many runs a figure shows."""
    return f"{n} {'run' if n == 1 else 'runs'}"


def quality(result: dict[str, Any]) -> Group:
    """Fréchet distance to the data, or else to the teacher's samples, against each measure of diversity."""
    group = Group("", [])
    for budget, tier in result["budgets"].items():
        distance = next((key for key in QUALITY if key in tier["statistics"]), "")
        for key in DIVERSITY:
            points = []
            for name, look, rows in models(result, budget):
                rows = [row for row in rows if row.get(key) is not None and row.get(distance) is not None]
                if rows:
                    points.append(Points(name, look, [row[key] for row in rows], [row[distance] for row in rows]))
            if points:
                x, y = heading(key, result), heading(distance, result)
                caption = f"The lower right corner is best. {runs_of(max(len(series.x) for series in points))} an arm."
                title = f"{x[0].upper()}{x[1:-2]}, equal {BUDGETS[budget]}"
                group.add(scatter_figure(f"{key}-{budget}", title, caption, points, x, y), points)
    return group


def profile(result: dict[str, Any]) -> Group:
    """Which fraction of an arm's runs reaches a normalised score."""
    group, primary = Group("", []), result["comparison"]["primary"]
    for budget, tier in result["budgets"].items():
        arms = tier["statistics"].get(primary, {"arms": {}})["arms"]
        scores = {arm: own["normalised"] for arm, own in arms.items() if "normalised" in own}
        if not scores:
            continue
        at = np.unique([0, 1, *(x for own in scores.values() for x in own)])
        margin = 0.04 * (at[-1] - at[0])
        at = np.array([at[0] - margin, *at, at[-1] + margin])
        lines = [Line(arm, looks(result)[arm], at.tolist(), performance_profile(own, at)) for arm, own in scores.items()]
        n = max(map(len, scores.values()))
        caption = f"Further right is better; 0: untrained, 1: the teacher in all its steps. {runs_of(n)} an arm, each a step down: no band."
        title, x = f"Equal {BUDGETS[budget]}", f"normalised {heading(primary, result).rstrip(' ↓↑')}, at least"
        figure = line_figure(f"profile-{budget}", title, caption, lines, x, "fraction of runs", log=False, drawstyle="steps-pre")
        group.add(figure, lines)
    return group


def per_step(result: dict[str, Any], budget: str, out: Path) -> Group:
    """Whatever the rows hold for each step, over the time that it is of; over the step's number where times are unknown."""
    group, known = Group("Over the steps of sampling", []), times(result, budget, out)
    timed = len(known) == len({run["arm"] for run in result["budgets"][budget]["runs"] if run["done"]})
    for key, (title, y, look_for) in STEPS.items():
        lines, n = [], 0
        for name, look, rows in models(result, budget):
            own = known[name] if name in known else rows[0].get("times", []) if rows else []
            rows = [row for row in rows if row.get("times", own) == own]  # a reference's are of any arm's times
            lists = [values for row in rows if (values := steps_of(row, key))]
            kind = name.partition(",")[0]  # its steps may be of fewer paths than its samples
            name = f"{kind}, n = {rows[0]['n_paths']}" if name not in known and rows and "n_paths" in rows[0] else name
            if lists and (not timed or len(own) - len(lists[0]) in (0, 1)):  # a teacher in fewer steps than the arm has times of its own
                length = len(lists[0])
                x = (own[-length:] if key in AFTER else own[:length]) if timed else list(range(1, length + 1))
                lines.append(Line.over(name, look, x, lists))
                n = max(n, len(lists) if name in result["arms"] else 0)
        if n:
            caption = f"{look_for} {runs_of(n)} an arm. {BAND}."
            figure = line_figure(f"{key}-{budget}", title, caption, lines, "time t, noise to data" if timed else "step", y, falling=timed)
            group.add(figure, lines)
    return group


def times(result: dict[str, Any], budget: str, out: Path) -> dict[str, list[float]]:
    """The N times of each arm's steps, and 0."""
    found: dict[str, list[float]] = {}
    for run in result["budgets"][budget]["runs"]:
        path = out / run["directory"] / "result.json"
        if run["done"] and run["arm"] not in found and path.is_file():
            found[run["arm"]] = read_result(path)["times"]
    return found


def steps_of(row: Row, key: str) -> list[float]:
    """A row's list over steps, NaN where it has no value; empty where it has no list."""
    if key == "compounding":
        pairs = zip(steps_of(row, "action_mse_own"), steps_of(row, "action_mse_expert"), strict=False)
        return [own / theirs if theirs else math.nan for own, theirs in pairs]
    values = row.get(key)
    return [math.nan if x is None else float(x) for x in values] if isinstance(values, list) else []


def training(result: dict[str, Any], budget: str, out: Path) -> tuple[Group, Group, Group]:
    """What training logged: each arm's priors and what was drawn, the curves of all, and what thresholding does to gradients."""
    logs: dict[str, list[list[Row]]] = {}
    for run in result["budgets"][budget]["runs"]:
        if (path := out / run["directory"] / "metrics.jsonl").is_file():
            logs.setdefault(run["arm"], []).append(read_metrics(path))
    shares, curves = Group("β, and the sources that states were drawn from", []), Group("Losses and gradients", [])
    for i, (arm, runs) in enumerate(logs.items()):
        lines = []
        for source, (prior, drawn) in source_looks().items():
            lines.append(Line.over(f"β of {source}", prior, *binned(runs, ("beta", source))))
            lines.append(Line.over(f"{source}, drawn", drawn, *binned(runs, ("drawn", source), 12)))
        if lines := [line for line in lines if len(line.x)]:
            caption = (
                f"Marks are what was drawn, and scatter around the lines; in all {counts_of(runs)} states a run. "
                f"Mean of {runs_of(len(runs))}; band: lowest to highest seed."
            )
            name, x, y = f"beta-{budget}-{i}", "gradient steps", "share of states"
            shares.add(line_figure(name, arm, caption, lines, x, y, log=False, limits=(-0.03, 1.03)), lines)
    for key, (title, look_for) in CURVES.items():
        lines = [Line.over(arm, looks(result)[arm], *binned(runs, (key,))) for arm, runs in logs.items()]
        if lines := [line for line in lines if line.y.any()]:  # thresholding that changes nothing needs no figure
            caption = f"{look_for} Up to {runs_of(max(map(len, logs.values())))} an arm. {BAND}."
            curves.add(line_figure(f"{key}-{budget}", title, caption, lines, "gradient steps", title.lower()), lines)
    thresholded = Group("Gradient norms with and without thresholding", [])
    for i, family in enumerate(twins(result, out)):
        lines = [
            Line.over(
                f"{arm} ({', '.join(roles)} thresholded)" if roles else f"{arm} (no threshold)",
                replace(looks(result)[arm], dash="--" if roles else "-"),
                *binned(logs.get(arm, []), ("grad_norm",)),
            )
            for arm, roles in family.items()
        ]
        if lines := [line for line in lines if len(line.x)]:
            n = runs_of(max(len(logs.get(arm, [])) for arm in family))
            caption = f"Arms that differ in nothing else. Before clipping; dashed: thresholded. Up to {n} an arm. {BAND}."
            name, x, y = f"thresholded-{budget}-{i}", "gradient steps", "gradient norm"
            thresholded.add(line_figure(name, ", ".join(family), caption, lines, x, y), lines)
    return shares, curves, thresholded


def twins(result: dict[str, Any], out: Path) -> list[dict[str, list[str]]]:
    """Arms that differ in thresholding alone, some of them without any: for each, the roles that it is on for."""
    families: dict[str, dict[str, list[str]]] = {}
    for run in result["budgets"]["updates"]["runs"]:
        path = out / run["directory"] / "config.yaml"
        if run["seed"] == result["comparison"]["first_seed"] and path.is_file():
            config = read_yaml(path)
            roles = config.pop("thresholding", {}).get("roles", [])
            families.setdefault(json.dumps(config, sort_keys=True), {})[run["arm"]] = roles
    return [family for family in families.values() if any(family.values()) and not all(family.values())]


def source_looks() -> dict[str, tuple[Look, Look]]:
    """Of each source's prior, a line, and of what was drawn from it, marks."""
    shapes = (("o", "●", "-"), ("*", "★", "--"), ("^", "▲", ":"))
    return {s: (Look("ink", "", "", dash), Look("ink", mark, glyph, "")) for s, (mark, glyph, dash) in zip(SOURCES, shapes, strict=True)}


def counts_of(runs: list[list[Row]]) -> str:
    """How many states were drawn from each source, as the mean run counted them."""
    drawn = [sum((Counter[str](row.get("source_counts") or {}) for row in rows), Counter[str]()) for rows in runs]
    return ", ".join(f"{sum(own[source] for own in drawn) / len(runs):,.0f} {source}" for source in SOURCES)


def logged(row: Row, keys: tuple[str, ...]) -> float:
    """A number of a line of metrics, NaN where it has none; of a mapping, such as thresholding's roles, the mean."""
    counts = row.get("source_counts") or {}
    value: Any = {**row, "drawn": {source: n / max(1, sum(counts.values())) for source, n in counts.items()}}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    values = [x for x in value.values() if x is not None] if isinstance(value, dict) else [] if value is None else [value]
    return statistics.fmean(values) if values else math.nan


def binned(runs: list[list[Row]], keys: tuple[str, ...], bins: int = BINS) -> tuple[list[float], NDArray[np.float64]]:
    """Lines of metrics averaged over stretches of training: the stretches' mean steps (k,), the runs' means (runs, k)."""
    points = [(i, row["step"], x) for i, rows in enumerate(runs) for row in rows if math.isfinite(x := logged(row, keys))]
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
