"""The tables and the picture of `when.py`: effects, paired by seed, and the tests that were fixed before the runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_agents.checkpoint import write_atomically
from ddil_agents.statistics import holm, paired_comparison

if TYPE_CHECKING:
    from when import Cell

Records = dict[tuple[str, str, int], dict[str, Any]]

METRICS = {
    "frechet_to_expert": "Fréchet to teacher",
    "error_own": "error on own states",
    "error_forward": "error on forward states",
    "endpoint_rmse": "RMSE to teacher",
    "recall": "recall",
    "coverage": "coverage",
    "frechet": "Fréchet to held-out data",
}
PRIMARY = "frechet_to_expert"
GUIDED = [f"w {w}, {n} steps" for w in (3, 7) for n in (4, 8, 16)]
FAMILY = [*GUIDED, "LCM, w 3, 4 steps", "DMD2, w 3, 4 steps"]  # of the corrected tests: each cell's first arm against its second


def log_ratios(records: Records, cell: str, arm: str, base: str, metric: str, weights: str) -> dict[int, float]:
    """ln(arm / base) of a metric by seed, where both have run; of a metric that is not positive nothing."""
    found = {}
    for (name, which, seed), record in records.items():
        other = records.get((cell, base, seed))
        if (name, which) == (cell, arm) and other is not None and weights in record and weights in other:
            a, b = record[weights][metric], other[weights][metric]
            if a is not None and b is not None and a > 0 and b > 0:
                found[seed] = math.log(a / b)
    return found


def effect(ratios: dict[int, float]) -> dict[str, Any] | None:
    """The mean of log ratios in per cent, with its 95 % t-interval and the sign-flip test's p."""
    if len(ratios) < 2:
        return None
    pair = paired_comparison(list(ratios.values()), [0.0] * len(ratios), ("arm", "baseline"))
    per_cent = {key: 100 * math.expm1(getattr(pair, key)) for key in ("mean", "low", "high")}
    return {**per_cent, "p": pair.p, "seeds": len(ratios), "by_seed": {seed: 100 * math.expm1(x) for seed, x in ratios.items()}}


def pooled(records: Records, cells: list[Cell], weights: str, metric: str = PRIMARY) -> dict[str, Any] | None:
    """The contrast that was fixed: the second arm against the first, each seed's mean over the guided cells, of seeds that have them all."""
    arms = {cell.name: list(cell.arms) for cell in cells}
    ratios = [log_ratios(records, name, arms[name][1], arms[name][0], metric, weights) for name in GUIDED]
    seeds = sorted(set.intersection(*map(set, ratios)))
    return effect({seed: sum(cell[seed] for cell in ratios) / len(ratios) for seed in seeds})


def effects(records: Records, cells: list[Cell], weights: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By cell and arm, each metric's effect beside the cell's first arm; Holm's p where the arm is the one that is tested."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        base, *others = cell.arms
        for arm in others:
            told = {metric: effect(log_ratios(records, cell.name, arm, baseline(cell, arm), metric, weights)) for metric in METRICS}
            if told[PRIMARY] is not None:
                found.setdefault(cell.name, {})[arm] = {metric: e for metric, e in told.items() if e is not None}
    tested = [found[cell.name][list(cell.arms)[1]][PRIMARY] for cell in cells if cell.name in FAMILY and cell.name in found]
    p = [e["p"] for e in tested]
    for e, adjusted in zip(tested, holm([*p, *[1.0] * (len(FAMILY) - len(p))]), strict=False):
        e["p_holm"] = float(adjusted)
    return found


def baseline(cell: Cell, arm: str) -> str:
    """What an arm is compared with: the cell's first; of arms in two factors, "A, B", the first A of the same B."""
    _, comma, factor = arm.partition(", ")
    return next(iter(cell.arms)).partition(", ")[0] + comma + factor


def markdown(found: dict[str, Any], records: Records, cells: list[Cell], weights: str) -> str:
    """One table: each arm's effects beside forward-only, and what it cost."""
    heads = ["cell", "arm", "seeds", *(f"{label}, %" for label in METRICS.values()), "p (Holm)", "teacher / student forwards"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell in cells:
        for arm, own in found.get(cell.name, {}).items():
            spans = [f"{e['mean']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]" if (e := own.get(metric)) else "–" for metric in METRICS]
            p = own[PRIMARY].get("p_holm")
            ran = [record for key, record in records.items() if key[:2] == (cell.name, arm)]
            cost = " / ".join(f"{sum(r[k] for r in ran) / len(ran):,.0f}" for k in ("teacher_nfe", "student_nfe"))
            row = [cell.name, arm, str(own[PRIMARY]["seeds"]), *spans, "" if p is None else f"{p:.4f}", cost]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Each cell's effect on the primary metric, by arm, with its interval."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for own in found.values() for arm in own))
    figure = Figure(figsize=(9, 0.4 * len(found) + 1.5), layout="constrained")
    axis = figure.subplots()
    for i, arm in enumerate(arms):
        cells = [(j, own[arm][PRIMARY]) for j, own in enumerate(found.values()) if arm in own]
        y = [j + 0.12 * (i - (len(arms) - 1) / 2) for j, _ in cells]
        mean = [e["mean"] for _, e in cells]
        error = [[e["mean"] - e["low"] for _, e in cells], [e["high"] - e["mean"] for _, e in cells]]
        axis.errorbar(mean, y, xerr=error, fmt="o", ms=4, capsize=2, label=arm)
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set(xlabel="Fréchet distance to the teacher's samples beside forward-only training, %: below 0 it helps")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write_report(records: Records, cells: list[Cell], out: Path) -> None:
    """Writes the JSON file, the tables and the picture, and prints the first table."""
    by_weights = {weights: effects(records, cells, weights) for weights in ("average", "raw")}
    contrast = {weights: pooled(records, cells, weights) for weights in by_weights}
    lost = [f"{cell}, {arm}, seed {seed}: {record['lost']}" for (cell, arm, seed), record in records.items() if "lost" in record]
    made = {key: sorted({str(record[key]) for record in records.values()}) for key in ("date", "hardware", "torch")}
    write_atomically(out, json.dumps({"contrast": contrast, "cells": by_weights, "lost": lost, **made}, indent=1))
    draw(by_weights["average"], out.with_suffix(".png"))
    parts = ["# When does DDIL help?"]
    for weights, found in by_weights.items():
        parts.append(f"## By the {'average of the' if weights == 'average' else 'last'} weights")
        if (e := contrast[weights]) is not None:
            parts.append(
                f"The contrast fixed beforehand, over {len(GUIDED)} guided cells and {e['seeds']} seeds: half of the states the student's, "
                f"one a rollout, {e['mean']:+.1f} % [{e['low']:+.1f}, {e['high']:+.1f}] in Fréchet distance to the teacher, p = {e['p']:.5f}."
            )
        parts.append(markdown(found, records, cells, weights))
    parts += [f"- ! {each}" for each in lost] + [", ".join(" and ".join(values) for values in made.values())]
    write_atomically(out.with_suffix(".md"), "\n\n".join(parts) + "\n")
    print("\n\n".join(parts[:4]))
