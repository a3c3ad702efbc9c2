"""When is DDIL worth its rollouts? A rule of thumb from the runs of `worlds.py`, tested on cells that it was not fitted to.

    python benchmarks/rule.py           # benchmarks/results/rule.json and rule.md, in seconds

A cell is a world, a student and its demonstrations. DDIL is *worth* its rollouts there if half and half (ddil) has at least `WORTH` more
success than behaviour cloning (bc), in the mean over seeds. The rules look at a bc student alone:

    shortfall    its success is at least `SHORTFALL` below the teacher's
    ratio        its error on own conditions is at least τ times that on held-out demonstrations

Beside them stands what needs no rollouts: bc under noise in the conditions of its demonstrations, of the size that was best on other seeds.

τ is fitted to all cells but one, and the rule asked about that one (leave one cell out). `python -m ddil_agents.advise` uses the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from records import read_records
from worlds_runs import SEEDS, Runs

from ddil_agents.evaluation.results import markdown_table
from ddil_agents.training.checkpoint import write_atomically

WORTH, SHORTFALL = 0.05, 0.05  # success


class Cell(NamedTuple):
    """What the rule sees of a cell, and what came of it."""

    name: str
    seeds: int
    ratio: float
    shortfall: float
    gain: float
    noise: float | None = None

    @property
    def worth(self) -> bool:
        return self.gain >= WORTH


Rule = Callable[[Cell, float], bool]
RULES: dict[str, Rule] = {
    "shortfall": lambda cell, ratio: cell.shortfall >= SHORTFALL,
    "ratio": lambda cell, ratio: cell.ratio >= ratio,
}


def read_cells(path: Path) -> list[Cell]:
    """The cells of which bc and ddil have run on the same seeds."""
    records = read_records(path)
    runs, cells = Runs(records), []
    for name in dict.fromkeys(cell for cell, _, _ in records):
        gains, ratios = runs.gains(name, "ddil", "bc"), runs.values(name, "bc", "error_ratio")
        if len(gains) < 2 or not ratios:
            continue
        teacher = next(record["teacher"]["success"] for (cell, _, _), record in records.items() if cell == name)
        bc = float(np.mean(list(runs.values(name, "bc", "success").values())))
        ratio = float(np.exp(np.mean(np.log(list(ratios.values())))))
        best = runs.best(name, "noise")
        noise = list(runs.gains(name, best, "ddil").values()) if best is not None else []
        gain = float(np.mean(list(gains.values())))
        cells.append(Cell(name, len(gains), ratio, teacher - bc, gain, float(np.mean(noise)) if noise else None))
    return cells


def fit(cells: list[Cell], rule: Rule) -> float:
    """τ that is right in most cells: of the best ones the middle, in logs, of the widest gap between the cells' ratios."""
    ratios = sorted(cell.ratio for cell in cells)
    edges = [ratios[0] / 2, *ratios, 2 * ratios[-1]]
    gaps = [(low, high) for low, high in pairwise(edges) if high > low]
    return float(np.sqrt(np.prod(max(gaps, key=lambda gap: (right(cells, rule, float(np.sqrt(gap[0] * gap[1]))), gap[1] / gap[0])))))


def right(cells: list[Cell], rule: Rule, ratio: float) -> int:
    """In how many cells a rule says what came of it."""
    return sum(rule(cell, ratio) == cell.worth for cell in cells)


def leave_one_out(cells: list[Cell], rule: Rule) -> int:
    """In how many cells a rule that was fitted to the others is right."""
    return sum(right([cell], rule, fit([other for other in cells if other is not cell], rule)) for cell in cells)


def summarise(cells: list[Cell], complete: int) -> dict[str, Any]:
    """The rules, how often each is right on cells that it was not fitted to, and which part of the shortfall DDIL makes up for."""
    short = [cell for cell in cells if cell.shortfall >= SHORTFALL]
    closed = [cell.gain / cell.shortfall for cell in short if cell.worth]
    seeds = min(cell.seeds for cell in cells)
    return {
        "ratio": round(fit(cells, RULES["ratio"]), 2),
        "shortfall": SHORTFALL,
        "cells": len(cells),
        "right": {name: leave_one_out(cells, rule) for name, rule in RULES.items()},
        "fell_short": len(short),
        "gained": sum(cell.worth for cell in short),
        "noise_ahead": sum(cell.noise is not None and cell.noise > 0 for cell in short),
        "closed": [round(float(x), 2) for x in np.quantile(closed, [0.25, 0.5, 0.75])] if closed else None,
        "seeds": seeds,
        "interim": seeds < complete,
    }


def write_table(cells: list[Cell], rule: dict[str, Any]) -> str:
    """The cells, what each rule says of them, and how far that is to be trusted."""
    head = ["cell", "seeds", "bc: own / held-out", "teacher − bc", "ddil − bc", "noise − ddil", "worth"]
    rows = [[*head, *(f"by {name}" for name in RULES)]]
    for c in sorted(cells, key=lambda cell: -cell.ratio):
        said = [c.worth, *(says(c, rule["ratio"]) for says in RULES.values())]
        row = [c.name, str(c.seeds), f"{c.ratio:.2f}", *("" if x is None else f"{x:+.3f}" for x in (c.shortfall, c.gain, c.noise))]
        rows.append([*row, *("yes" if x else "no" for x in said)])
    counts = ", ".join(f"{name} {n}" for name, n in rule["right"].items())
    lines = ["# When is DDIL worth its rollouts?", "", f"`python benchmarks/rule.py`, τ = {rule['ratio']}.", ""]
    lines += ["**Not all runs are there: interim.**", ""] if rule["interim"] else []
    lines += [*markdown_table(rows), ""]
    lines += [
        f"Where bc fell short by {SHORTFALL} or more, ddil gained as much in {rule['gained']} of {rule['fell_short']} cells. In the other "
        f"{rule['cells'] - rule['fell_short']} there was no room for such a gain, so that they cannot speak against the rule of shortfall.",
        f"Noise in the conditions, without rollouts, had more success than ddil in {rule['noise_ahead']} of the {rule['fell_short']}.",
        "",
        f"Right in cells that it was not fitted to, of {rule['cells']}: {counts}.",
        "",
    ]
    if rule["closed"]:
        low, middle, high = rule["closed"]
        lines += [f"Where it gained, ddil made up for {middle:.0%} of the shortfall (quartiles {low:.0%}, {high:.0%}).", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/results/worlds_runs.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rule.json"))
    args = parser.parse_args()
    if len(cells := read_cells(args.runs)) < 4:
        parser.error(f"--runs {args.runs}: need at least 4 cells in which bc and ddil have run on two seeds, got {len(cells)}")
    rule = summarise(cells, len(SEEDS))
    write_atomically(args.out, json.dumps(rule, indent=1) + "\n")
    write_atomically(args.out.with_suffix(".md"), table := write_table(cells, rule))
    print(table)


if __name__ == "__main__":
    main()
