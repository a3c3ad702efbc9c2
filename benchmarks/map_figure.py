"""Does the measured shift tell where DDIL helps? All cells of both maps in one figure: pictures (`when.py`) and worlds (`worlds.py`).

    python benchmarks/map_figure.py      # benchmarks/results/map.png and map.md, from the runs that are there, in seconds

x    error on own states / on forward states, of the student of forward states alone (in a world: own conditions / held-out demonstrations)
y    change of the error on own states where half of the labels are on them, in per cent

Both hold the error of behaviour cloning on own states. So where a cell has four seeds, ratio and effect are of different halves of them,
the mean over both ways. What was expected was written down in benchmarks/README.md before the runs of either map were all there.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from records import Records, read_records
from scipy.stats import spearmanr
from worlds_runs import value as world_value

from ddil_agents.evaluation.results import markdown_table
from ddil_agents.training.checkpoint import write_atomically

mpl.use("Agg")
import matplotlib.pyplot as plt

DRAWS, LEAST = 2000, 2  # of the bootstrap; seeds of a cell
ARMS = {"pictures": ("forward", "student"), "worlds": ("bc", "ddil")}  # behaviour cloning, and half of its labels on own states
COLORS = {"pictures": "tab:purple", "fork": "tab:blue", "lunar_lander": "tab:orange"}


class Cell(NamedTuple):
    """By seed, ln of the ratio of errors of behaviour cloning, and ln(error of half and half / its error) on own states."""

    name: str
    kind: str
    ratio: list[float]
    effect: list[float]

    @property
    def point(self) -> tuple[float, float]:
        """Ratio of errors and effect in per cent, geometric means over seeds."""
        return math.exp(np.mean(self.ratio)), 100 * math.expm1(np.mean(self.effect))


def errors(record: dict[str, Any]) -> tuple[float, float] | None:
    """Error on own states and its ratio to that on forward states or data; None of a run that was lost."""
    if "average" in record:  # pictures: by step, of which the first starts from noise for all
        own, forward = (np.array(record["average"][f"error_{source}"]) for source in ("own", "forward"))
        return float(own.mean()), float((own[1:] / forward[1:]).mean())
    own_error, ratio = world_value(record, "error_own"), record.get("error_ratio")
    return None if own_error is None or ratio is None else (own_error, ratio)


def read_cells(records: Records, family: str) -> list[Cell]:
    """The cells of one map of which both arms have run on at least `LEAST` seeds; LCM and DMD2 have no such ratio."""
    base, arm = ARMS[family]
    cells = []
    for name in dict.fromkeys(cell for cell, _, _ in records):
        if name.startswith(("LCM", "DMD2")):
            continue
        pairs = []
        for seed in sorted({s for c, a, s in records if (c, a) == (name, arm)}):
            found = [errors(records[name, a, seed]) if (name, a, seed) in records else None for a in (base, arm)]
            if found[0] is not None and found[1] is not None:
                pairs.append((math.log(found[0][1]), math.log(found[1][0] / found[0][0])))
        if len(pairs) >= LEAST:
            kind = "pictures" if family == "pictures" else name.partition(",")[0]
            cells.append(Cell(name, kind, *map(list, zip(*pairs, strict=True))))
    return cells


def correlation(cells: list[Cell], generator: np.random.Generator) -> tuple[float, float, float]:
    """Spearman's rank correlation of ratio and effect over cells, and its 95 % interval of a bootstrap over cells and, within, seeds."""

    def of(chosen: list[Cell], resample: bool) -> float:
        return float(np.mean([spearmanr(*zip(*(halves(cell, odd, resample) for cell in chosen), strict=True)).statistic for odd in (0, 1)]))

    def halves(cell: Cell, odd: int, resample: bool) -> tuple[float, float]:
        seeds = np.arange(len(cell.ratio))
        split = len(seeds) >= 4
        parts = [seeds[seeds % 2 == odd], seeds[seeds % 2 != odd]] if split else [seeds, seeds]
        ratio, effect = (generator.choice(part, len(part)) if resample else part for part in parts)
        return float(np.mean(np.array(cell.ratio)[ratio])), float(np.mean(np.array(cell.effect)[effect]))

    drawn = [of([cells[i] for i in generator.integers(len(cells), size=len(cells))], True) for _ in range(DRAWS)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return of(cells, False), float(low), float(high)


def draw(cells: list[Cell], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for kind in dict.fromkeys(cell.kind for cell in cells):
        x, y = zip(*(cell.point for cell in cells if cell.kind == kind), strict=True)
        axis.plot(x, y, "o", color=COLORS[kind], label=kind.replace("_", " "))
    axis.axhline(0, color="gray", lw=0.8)
    axis.axvline(1, color="gray", lw=0.8, ls=":")
    axis.set(xscale="log", xlabel="behaviour cloning: error on own states / forward states or data")
    axis.set_ylabel("change of the error on own states\nwith half of the labels on them, %")
    axis.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    axis.xaxis.set_minor_formatter(plt.NullFormatter())
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the runs, and of what is written")
    args = parser.parse_args()
    files = {"pictures": "when_runs.jsonl", "worlds": "worlds_runs.jsonl"}
    cells = [cell for family, file in files.items() for cell in read_cells(read_records(args.results / file), family)]
    if len(cells) < 4:
        parser.error(f"--results {args.results}: need at least 4 cells with {LEAST} seeds, got {len(cells)}")
    groups = {"all cells": cells, **{kind: [c for c in cells if c.kind == kind] for kind in dict.fromkeys(c.kind for c in cells)}}
    rows = [["cell", "seeds", "own / forward", "error on own states, %"]]
    rows += [[c.name, str(len(c.ratio)), f"{c.point[0]:.2f}", f"{c.point[1]:+.0f}"] for c in sorted(cells, key=lambda c: -c.point[0])]
    lines = [
        "# Does the measured shift tell where DDIL helps?",
        "",
        "`python benchmarks/map_figure.py`; interim while runs of either map are missing.",
        "",
        *markdown_table(rows),
        "",
    ]
    for title, group in groups.items():
        if len(group) >= 4:
            found, low, high = correlation(group, np.random.default_rng(0))
            lines.append(f"Spearman's rank correlation, {title} ({len(group)}): {found:+.2f} [{low:+.2f}, {high:+.2f}].")
    write_atomically(args.results / "map.md", "\n".join(lines) + "\n")
    draw(cells, args.results / "map.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
