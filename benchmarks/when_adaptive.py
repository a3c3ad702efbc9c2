"""The claims about the schedule `adaptive` in `when.py`: adaptive shares beside fixed ones, cell by cell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from records import Records

from ddil_agents.comparison.statistics import paired_comparison

FIXED = ("forward", "teacher too", "student 1")  # forward alone, the paper's shares, the student's alone
MARGIN = 0.1  # part of the Fréchet distance to the teacher by which the adaptive shares may be farther than the best fixed ones


def adaptive_claims(records: Records, cells: list[str], seeds: range) -> dict[str, Any]:
    """The adaptive shares beside fixed ones, by the average of the weights; the claims, once all runs of all cells are there.

    Not worse: the 90 % interval of ln(adaptive / best) lies below ln(1 + MARGIN), where best is the fixed arm of the least mean of
    ln distance on the same seeds, which counts against adaptive.
    """
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        values: dict[str, list[float]] = {}
        for arm in (*FIXED, "adaptive"):
            runs = [records.get((cell, arm, seed), {}).get("average") for seed in seeds]
            values[arm] = [math.log(run["frechet_to_expert"]) for run in runs if run is not None]
        if any(len(x) < len(seeds) for x in values.values()):
            continue
        best = min(FIXED, key=lambda arm: float(np.mean(values[arm])))
        pair = paired_comparison(values["adaptive"], values[best], level=0.9)
        found[cell] = {
            "best": best,
            **{key: 100 * math.expm1(getattr(pair, key)) for key in ("mean", "low", "high")},
            "not_worse": pair.high < math.log1p(MARGIN),
            "beside_paper": 100 * math.expm1(float(np.mean(values["adaptive"]) - np.mean(values["teacher too"]))),
        }
    if not found or len(found) < len(cells):
        return {"cells": found}
    better = sum(cell["beside_paper"] < 0 for cell in found.values())
    return {"cells": found, "not_worse": all(c["not_worse"] for c in found.values()), "better_than_paper": better}


def adaptive_table(claims: dict[str, Any]) -> str:
    """The adaptive shares beside the best fixed ones and the paper's, in the Fréchet distance to the teacher."""
    heads = ["cell", "best fixed", "adaptive beside it, %, 90 %", "not worse", "beside teacher too, %"]
    lines = ["## The adaptive shares", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cell in claims["cells"].items():
        interval = f"{cell['mean']:+.1f} [{cell['low']:+.1f}, {cell['high']:+.1f}]"
        lines.append(f"| {name} | {cell['best']} | {interval} | {'yes' if cell['not_worse'] else 'no'} | {cell['beside_paper']:+.1f} |")
    if "not_worse" in claims:
        better, n = claims["better_than_paper"], len(claims["cells"])
        lines += [
            "",
            f"Not worse by more than {MARGIN:.0%} in every cell: **{'holds' if claims['not_worse'] else 'does not hold'}**. Nearer in",
        ]
        lines += [f"the mean than *teacher too* in at least half: **{'holds' if 2 * better >= n else 'does not hold'}** ({better} of {n})."]
    return "\n".join(lines)
