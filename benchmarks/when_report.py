"""The tables and the picture of `when.py`: effects, paired by seed, and the tests that were fixed before the runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from when_adaptive import adaptive_claims, adaptive_table

from ddil_agents.comparison.statistics import holm, paired_comparison
from ddil_agents.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from when import Cell

Records = dict[tuple[str, str, int], dict[str, Any]]
Ratios = dict[int, float]  # ln(arm / baseline) by seed

METRICS = {
    "frechet_to_expert": "Fréchet to teacher",
    "error_own": "error on own states",
    "error_forward": "error on forward states",
    "endpoint_rmse": "RMSE to teacher",
    "recall": "recall",
    "coverage": "coverage",
    "frechet": "Fréchet to held-out data",
}
PRIMARY, SECOND = "frechet_to_expert", "error_own"
GUIDED = [f"w {w}, {n} steps" for n in (4, 8, 16) for w in (3, 7)]
UNGUIDED = [f"w 1, {n} steps" for n in (4, 8, 16)]
FAMILY = [*GUIDED, "LCM, w 3, 4 steps", "DMD2, w 3, 4 steps"]  # of the corrected tests: each cell's second arm against its first
EITHER = {"average": "By the average of the weights", "raw": "By the last weights"}


def value(record: dict[str, Any], metric: str, weights: str) -> float | None:
    """A metric of one run, of errors by step their mean; None of a run that was lost, or where it is not measured."""
    x = record.get(weights, {}).get(metric)
    return float(np.mean(x)) if isinstance(x, list) else x


def log_ratios(records: Records, cell: str, arm: str, base: str, metric: str, weights: str) -> Ratios:
    """ln(arm / base) by seed, where both have run from the same weights."""
    found = {}
    for seed in sorted({key[2] for key in records if key[:2] == (cell, arm)}):
        own, other = records[cell, arm, seed], records.get((cell, base, seed), {})
        a, b = value(own, metric, weights), value(other, metric, weights)
        if a is not None and b is not None and a > 0 and b > 0 and own["init"] == other["init"]:
            found[seed] = math.log(a / b)
    return found


def effect(ratios: Ratios) -> dict[str, Any] | None:
    """The mean of log ratios in per cent, with its 95 % t-interval, and the p of the sign-flip test."""
    if len(ratios) < 2:
        return None
    pair = paired_comparison(list(ratios.values()), [0.0] * len(ratios), ("arm", "baseline"))
    per_cent = {key: 100 * math.expm1(getattr(pair, key)) for key in ("mean", "low", "high")}
    return {**per_cent, "p": pair.p, "seeds": len(ratios), "by_seed": {seed: 100 * math.expm1(x) for seed, x in ratios.items()}}


def combined(parts: list[tuple[float, Ratios]]) -> Ratios:
    """Σ weight · ln ratio by seed, of the seeds that all parts have."""
    seeds = sorted(set.intersection(*(set(ratios) for _, ratios in parts)))
    return {seed: sum(weight * ratios[seed] for weight, ratios in parts) for seed in seeds}


def contrasts(records: Records, weights: str, metric: str = PRIMARY) -> dict[str, dict[str, Any]]:
    """The arm that is tested, over cells: its pooled effect, how that changes with w and with N, and the unguided cells."""

    def of(cell: str, arm: str = "student", base: str = "forward") -> Ratios:
        return log_ratios(records, cell, arm, base, metric, weights)

    cross = "w 7, 8 steps"
    found = {
        "student, over the guided cells": [(1 / 6, of(cell)) for cell in GUIDED],
        "student, over the unguided cells": [(1 / 3, of(cell)) for cell in UNGUIDED],
        "from w 3 to w 7": [((1 if "w 7" in cell else -1) / 3, of(cell)) for cell in GUIDED],
        "for each doubling of N, guided": [(0.25 * (math.log2(int(cell.split()[2])) - 3), of(cell)) for cell in GUIDED],
        "student against teacher's own states, over the guided cells": [(1 / 6, of(cell, "student", "teacher")) for cell in GUIDED],
        "student against mixed rollouts, over the guided cells": [(1 / 6, of(cell, "student", "mixed rollouts")) for cell in GUIDED],
        "all states against one a rollout, over the guided cells": [(1 / 6, of(cell, "all states", "teacher too")) for cell in GUIDED],
        "thresholding the student too: forward": [(1, of(cross, "forward, student thresholded too"))],
        "thresholding the student too: what it adds to the student's states": [
            (1, of(cross, "student, student thresholded too", "forward, student thresholded too")),
            (-1, of(cross)),
        ],
        "no threshold: forward": [(1, of(cross, "forward, no threshold"))],
        "no threshold: what it adds to the student's states": [
            (1, of(cross, "student, no threshold", "forward, no threshold")),
            (-1, of(cross)),
        ],
    }
    return {name: e for name, parts in found.items() if (e := effect(combined(parts))) is not None}


def effects(records: Records, cells: list[Cell], weights: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By cell and arm, each metric's effect beside the arm that it is compared with."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        for name, arm in list(cell.arms.items())[1:]:
            told = {metric: effect(log_ratios(records, cell.name, name, arm.against, metric, weights)) for metric in METRICS}
            if told[PRIMARY] is not None:
                found.setdefault(cell.name, {})[name] = {metric: e for metric, e in told.items() if e is not None}
        if (e := effect(log_ratios(records, cell.name, next(iter(cell.arms)), "start", PRIMARY, weights))) is not None:
            found.setdefault(cell.name, {})["start"] = {PRIMARY: e}
    return found


def complete(records: Records, cells: list[Cell]) -> bool:
    """Whether every run that a test rests on has its record, in pairs from the same weights; before that no p is told."""
    pairs = [
        ((c.name, a, s), (c.name, b, s))
        for c in cells
        if c.name in FAMILY
        for a, b in [list(c.arms)[:2]]
        for s in range(400, 400 + c.seeds)
    ]
    return bool(pairs) and all(a in records and b in records and records[a].get("init") == records[b].get("init") for a, b in pairs)


def losses(records: Records, cell: Cell) -> int:
    """The seeds of a cell in which one of its first two arms was lost."""
    return len(
        {seed for (name, arm, seed), record in records.items() if name == cell.name and arm in list(cell.arms)[:2] and "lost" in record}
    )


def correct(found: dict[str, dict[str, dict[str, Any]]], records: Records, cells: list[Cell]) -> None:
    """Adds Holm's p to the eight comparisons that were fixed; one that was not made, or lost more than one seed, counts as no effect."""
    kept = {cell.name for cell in cells if losses(records, cell) <= 1}
    tested = {cell.name: found.get(cell.name, {}).get(list(cell.arms)[1], {}).get(PRIMARY) for cell in cells if cell.name in FAMILY}
    p = holm([1.0 if e is None or name not in kept else e["p"] for name, e in tested.items()])
    for e, adjusted in zip(tested.values(), p, strict=True):
        if e is not None:
            e["p_holm"] = float(adjusted)


def span(e: dict[str, Any] | None) -> str:
    return "–" if e is None else f"{e['mean']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]"


def table(found: dict[str, Any], records: Records, cells: list[Cell]) -> str:
    """Each arm's effects beside the arm that it is compared with, and what it cost."""
    heads = ["cell", "arm", "against", "seeds", *(f"{label}, %" for label in METRICS.values()), "p (Holm)", "teacher / student forwards"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell in cells:
        for arm, own in found.get(cell.name, {}).items():
            if arm == "start":
                continue
            spans = [span(own.get(metric)) for metric in METRICS]
            ran = [record for key, record in records.items() if key[:2] == (cell.name, arm) and "lost" not in record]
            cost = " / ".join(f"{sum(r[k] for r in ran) / len(ran):,.0f}" for k in ("teacher_nfe", "student_nfe"))
            p = f"{own[PRIMARY]['p_holm']:.4f}" if "p_holm" in own[PRIMARY] else ""
            lines.append(f"| {' | '.join([cell.name, arm, cell.arms[arm].against, str(own[PRIMARY]['seeds']), *spans, p, cost])} |")
    return "\n".join(lines)


def absolutes(found: dict[str, Any], records: Records, cells: list[Cell], weights: str) -> str:
    """Fréchet distances to the teacher as they are: where the arms fork, of the first two arms, and between two halves of the teacher."""
    lines = ["| cell | start | first arm | second arm | first beside start, % | two halves of the teacher's |", "|---|---|---|---|---|---|"]
    for cell in cells:
        means = []
        for arm in ("start", *list(cell.arms)[:2]):
            values = [x for key, r in records.items() if key[:2] == (cell.name, arm) and (x := value(r, PRIMARY, weights)) is not None]
            means.append(f"{np.mean(values):.2f}" if values else "–")
        floor = next((f"{r['floor']:.2f}" for key, r in records.items() if key[0] == cell.name and "floor" in r), "–")
        e = found.get(cell.name, {}).get("start", {}).get(PRIMARY)
        lines.append(f"| {' | '.join([cell.name, *means, span(e), floor])} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Each cell's effect on the primary metric, by arm, with its interval."""
    from matplotlib.figure import Figure

    shown = {cell: {arm: own[PRIMARY] for arm, own in arms.items() if arm != "start"} for cell, arms in found.items()}
    arms = list(dict.fromkeys(arm for own in shown.values() for arm in own))
    figure = Figure(figsize=(10, 0.5 * len(shown) + 1.5), layout="constrained")
    axis = figure.subplots()
    for i, arm in enumerate(arms):
        cells = [(j, own[arm]) for j, own in enumerate(shown.values()) if arm in own]
        y = [j + 0.06 * (i - (len(arms) - 1) / 2) for j, _ in cells]
        mean = [e["mean"] for _, e in cells]
        error = [[e["mean"] - e["low"] for _, e in cells], [e["high"] - e["mean"] for _, e in cells]]
        axis.errorbar(mean, y, xerr=error, fmt="o", ms=4, capsize=2, label=arm)
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set(xlabel="Fréchet distance to the teacher's samples beside the arm compared with, %: below 0 it helps")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def write_report(records: Records, cells: list[Cell], out: Path) -> None:
    """Writes the JSON file, the tables and the picture, and prints the contrasts."""
    found = {weights: effects(records, cells, weights) for weights in EITHER}
    whole = complete(records, cells)
    lost = [f"{cell}, {arm}, seed {seed}: {r['lost']}" for (cell, arm, seed), r in records.items() if "lost" in r]
    over = {weights: contrasts(records, weights) for weights in EITHER}
    second = contrasts(records, "average", SECOND)
    first = over["average"].get("student, over the guided cells")
    if whole and first is not None and first["mean"] < 0 and first["p"] <= 0.05:  # else the eight are not tested
        correct(found["average"], records, cells)
    about = {key: sorted({str(record[key]) for record in records.values()}) for key in ("date", "hardware", "torch")}
    everything = {"complete": whole, "contrasts": over, "contrasts_error_own": second, "cells": found, "lost": lost, **about}
    write_atomically(out, json.dumps(everything, indent=1))
    if whole:  # intervals of a few seeds would fill the picture and say nothing
        draw(found["average"], out.with_suffix(".png"))
    parts = ["# When does DDIL help?"]
    if not whole:
        parts.append("**Interim**: not all of the runs that the tests rest on have been made, so that no p is told.")
    lines = [f"| contrast, in {METRICS[PRIMARY]} | seeds | by the average, % | p | by the last weights, % | {METRICS[SECOND]}, % |"]
    lines += ["|---|---|---|---|---|---|"]
    for i, (name, e) in enumerate(over["average"].items()):
        p = f"{e['p']:.5f}" if whole and i == 0 else ""
        lines.append(f"| {name} | {e['seeds']} | {span(e)} | {p} | {span(over['raw'].get(name))} | {span(second.get(name))} |")
    parts.append("\n".join(lines))
    for weights, title in EITHER.items():
        parts += [f"## {title}", absolutes(found[weights], records, cells, weights), table(found[weights], records, cells)]
    claims = adaptive_claims(records, [cell.name for cell in cells if "adaptive" in cell.arms], range(400, 408))
    parts += [adaptive_table(claims)] if claims["cells"] else []
    parts += [f"- ! {each}" for each in lost] + [", ".join(" and ".join(values) for values in about.values())]
    write_atomically(out.with_suffix(".md"), "\n\n".join(parts) + "\n")
    print("\n\n".join(parts[:3]))
