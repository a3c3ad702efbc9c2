"""The claims about the schedule `adaptive` in `worlds.py`: adaptive shares beside fixed ones, cell by cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from worlds_runs import SEEDS, Runs, interval, signed

FIXED = ("bc", "teacher too", "dagger")  # shares that do not change in a run: forward alone, the paper's, the student's alone
MARGIN = 0.05  # success by which the adaptive shares may fall short of the best fixed ones


def adaptive_claims(runs: Runs, cells: Iterable[str]) -> dict[str, Any]:
    """The adaptive shares beside fixed ones, cell by cell; the claims, once all runs of all cells are there.

    Not worse: the 90 % interval of adaptive − best lies above −MARGIN, where best is the fixed arm of the highest mean on the same seeds,
    which counts against adaptive.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in cells:
        success = {arm: runs.values(name, arm, "success") for arm in (*FIXED, "ddil", "adaptive")}
        if any(len(success[arm]) < len(SEEDS) for arm in success):
            continue
        best = max(FIXED, key=lambda arm: float(np.mean(list(success[arm].values()))))
        beside = interval(runs.gains(name, "adaptive", best), 0.9)
        assert beside is not None
        found[name] = {
            "best": best,
            "beside_best": beside,
            "not_worse": beside["low"] > -MARGIN,
            "beside_paper": interval(runs.gains(name, "adaptive", "teacher too")),
            "beside_half": interval(runs.gains(name, "adaptive", "ddil")),
        }
    if not found or len(found) < len(list(cells)):
        return {"cells": found}
    better = sum(cell["beside_paper"]["mean"] > 0 for cell in found.values())
    return {"cells": found, "not_worse": all(c["not_worse"] for c in found.values()), "better_than_paper": better}


def adaptive_table(claims: dict[str, Any]) -> list[str]:
    """The adaptive shares beside the best fixed ones, the paper's and half and half."""
    if not claims["cells"]:
        return []
    lines = [
        "## The adaptive shares",
        "",
        "| | best fixed | adaptive − best, 90 % | not worse | − paper's | − half and half |",
        "|---" * 6 + "|",
    ]
    for name, cell in claims["cells"].items():
        row = [name, cell["best"], signed(cell["beside_best"]), "yes" if cell["not_worse"] else "no"]
        lines.append(f"| {' | '.join([*row, signed(cell['beside_paper']), signed(cell['beside_half'])])} |")
    if "not_worse" in claims:
        held = "holds" if claims["not_worse"] else "does not hold"
        better, n = claims["better_than_paper"], len(claims["cells"])
        lines += [
            "",
            f"Not worse than the best fixed shares by more than {MARGIN} in every cell: **{held}**. A higher mean than the paper's",
        ]
        lines += [f"shares in at least half of the cells: **{'holds' if 2 * better >= n else 'does not hold'}** ({better} of {n})."]
    return [*lines, ""]
