"""The tables and the picture of `worlds.py`: arms in each cell, effects paired by seed, and the tests that were fixed before the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from scipy.stats import spearmanr
from worlds_adaptive import adaptive_claims, adaptive_table
from worlds_runs import SEEDS, TUNED, Records, Runs, Values, interval, signed, value

from ddil_agents.comparison.statistics import holm, sign_flip_test
from ddil_agents.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from worlds import Cell

mpl.use("Agg")
import matplotlib.pyplot as plt

EQUAL = 0.03  # a difference in success whose 90 % interval lies within ± this is called none
COLORS = {"fork": "tab:blue", "lunar_lander": "tab:orange", "kuramoto": "tab:green"}
METRICS = {
    "success": ("success", "{:.3f}"),
    "return": ("return", "{:.1f}"),
    "route_entropy": ("entropy of routes", "{:.2f}"),
    "error_own": ("error on own conditions", "{:.4f}"),
    "error_first": ("in the first eighth", "{:.4f}"),
    "error_expert": ("on the teacher's conditions", "{:.4f}"),
    "error_data": ("on held-out demonstrations", "{:.4f}"),
    "error_ratio": ("own / held-out", "{:.1f}"),
}
COSTS = {"teacher_nfe": "teacher forwards", "student_nfe": "student forwards", "visits": "world steps", "seconds": "seconds"}
DRAWS = 2000  # of bootstrap and permutations


def verdicts(runs: Runs, cells: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each cell: does ddil have more success than bc, and than teacher? Holm over all cells; none before all runs are there."""
    names = list(cells)
    if not runs.complete(names):
        return {}
    gains = {name: [list(runs.gains(name, "ddil", base).values()) for base in ("bc", "teacher")] for name in names}
    adjusted = holm([max(map(sign_flip_test, gains[name])) for name in names])
    harm = holm([sign_flip_test(gains[name][0]) for name in names])
    found = {}
    for name, p, p_bc in zip(names, adjusted, harm, strict=True):
        beside_bc, beside_teacher = (float(np.mean(x)) for x in gains[name])
        narrow = interval(runs.gains(name, "ddil", "bc"), 0.9)
        assert narrow is not None
        if p < 0.05 and min(beside_bc, beside_teacher) > 0:
            verdict = "helps"
        elif p_bc < 0.05:
            verdict = "more success than bc, not than teacher" if beside_bc > 0 else "hurts"
        else:
            verdict = "none" if narrow["low"] > -EQUAL and narrow["high"] < EQUAL else "undecided"
        found[name] = {"p": float(p), "p_beside_bc": float(p_bc), "verdict": verdict}
    return found


def shift_predicts(runs: Runs, cells: list[str]) -> dict[str, Any] | None:
    """Spearman's correlation over cells of bc's ratio of errors with ddil's gain in success, each from the other half of the seeds.

    Both contain bc. So the correlation stands beside those in which ddil's runs are those of another cell, drawn at random.
    """
    ratio = {name: runs.values(name, "bc", "error_ratio") for name in cells}
    success = {arm: {name: runs.values(name, arm, "success") for name in cells} for arm in ("bc", "ddil")}
    names = [name for name in cells if min(len(found[name]) for found in (ratio, *success.values())) >= 4]
    if len(names) < 4:
        return None
    generator = np.random.default_rng(0)

    def half(values: Values, odd: int, resample: bool) -> float:
        x = np.array([v for seed, v in values.items() if seed % 2 == odd])
        return float(np.mean(generator.choice(x, len(x)) if resample else x))

    def correlation(chosen: list[str], others: list[str], resample: bool = False) -> float:
        halves = []
        for odd in (0, 1):
            shift = [half(ratio[name], odd, resample) for name in chosen]
            own = [half(success["ddil"][name], 1 - odd, resample) for name in others]
            gain = [x - half(success["bc"][name], 1 - odd, resample) for x, name in zip(own, chosen, strict=True)]
            halves.append(spearmanr(shift, gain).statistic)
        return float(np.mean(halves))

    found = correlation(names, names)
    drawn = [correlation(chosen := list(generator.choice(names, len(names))), chosen, True) for _ in range(DRAWS)]
    null = np.array([correlation(names, list(generator.permutation(names))) for _ in range(DRAWS)])
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    p = (1 + int((null >= found).sum())) / (1 + DRAWS)
    return {"spearman": found, "low": float(low), "high": float(high), "null": float(null.mean()), "p": p, "cells": len(names)}


def summarise(records: Records, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """All that the tables show, by cell and arm."""
    runs, summary = Runs(records), {}
    tested = verdicts(runs, cells)
    for name in cells:
        arms: dict[str, Any] = {}
        for arm in dict.fromkeys(a for c, a, seed in records if c == name and seed in SEEDS):
            means = {key: float(np.mean(list(x.values()))) for key in METRICS if (x := runs.values(name, arm, key))}
            costs = {key: float(np.mean([record[key] for record in runs.of(name, arm).values()])) for key in COSTS}
            arms[arm] = {"seeds": len(runs.of(name, arm)), **means, **costs}
            lost = [seed for seed, record in runs.of(name, arm).items() if "lost" in record]
            arms[arm] |= {"lost": lost} if lost else {}
        best = {kind: runs.best(name, kind) for kind in TUNED}
        others = ["bc", "teacher", "dagger", "teacher too", *(arm for arm in best.values() if arm)]
        gains = {base: interval(runs.gains(name, "ddil", base)) for base in others}
        errors = {base: interval(runs.gains(name, "ddil", base, "error_expert", log=True)) for base in others}
        held_out = interval(runs.gains(name, "ddil", "bc", "error_data", log=True))
        first = next(iter(r for (c, _, _), r in records.items() if c == name), {})
        teachers = {"teacher, 16 steps": first.get("teacher"), "teacher, as few steps": first.get("few_steps")}
        summary[name] = {"arms": arms, "teachers": teachers, "best": best, "success": gains, "error_expert": errors, "error_data": held_out}
        summary[name]["test"] = tested.get(name)
    worlds = {env: [name for name, cell in cells.items() if cell.env == env] for env in dict.fromkeys(c.env for c in cells.values())}
    shift = {title: shift_predicts(runs, names) for title, names in {"all": list(cells), **worlds}.items()}
    return {"cells": summary, "shift_predicts": shift, "adaptive": adaptive_claims(runs, list(cells))}


def percent(effect: dict[str, Any] | None) -> str:
    """A mean log ratio and its interval in per cent."""
    if effect is None:
        return "–"
    mean, low, high = (100 * math.expm1(effect[key]) for key in ("mean", "low", "high"))
    return f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]"


def overview(cells: dict[str, Any]) -> list[str]:
    """A row a cell: success of the arms, and the gains of ddil."""
    heads = [
        "",
        "bc: own / held-out",
        "bc",
        "teacher",
        "best dart",
        "best noise",
        "dagger",
        "ddil",
        "ddil − bc",
        "ddil − teacher",
        "verdict",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cell in cells.items():
        arms = ["bc", "teacher", cell["best"]["dart"], cell["best"]["noise"], "dagger", "ddil"]
        shown = [f"{cell['arms'][arm]['success']:.3f}" if arm in cell["arms"] else "–" for arm in arms]
        ratio = cell["arms"].get("bc", {}).get("error_ratio")
        verdict = cell["test"]["verdict"] if cell["test"] else "–"
        row = [
            name,
            "–" if ratio is None else f"{ratio:.1f}",
            *shown,
            *(signed(cell["success"].get(base)) for base in ("bc", "teacher")),
            verdict,
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def detail(name: str, cell: dict[str, Any]) -> list[str]:
    """The table of one cell."""
    keys = [key for key in METRICS if any(key in arm for arm in cell["arms"].values())]
    heads = [
        "",
        "seeds",
        *(METRICS[key][0] for key in keys),
        "success, ddil beside it",
        "error on the teacher's conditions, %",
        *COSTS.values(),
    ]
    lines = [f"### {name}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title, found in cell["teachers"].items():
        if found is not None:
            shown = [METRICS[key][1].format(x) if (x := value(found, key)) is not None else "" for key in keys]
            lines.append(f"| {title} | | {' | '.join(shown)} |{' |' * (len(COSTS) + 2)}")
    for arm, found in cell["arms"].items():
        shown = [METRICS[key][1].format(found[key]) if key in found else "" for key in keys]
        effects = [signed(cell["success"][arm]), percent(cell["error_expert"][arm])] if arm in cell["success"] else ["", ""]
        title = f"{arm} (best)" if arm in cell["best"].values() else arm
        title += f", not finite: {found['lost']}" if "lost" in found else ""
        lines.append(f"| {title} | {found['seeds']} | {' | '.join([*shown, *effects, *(f'{found[key]:,.0f}' for key in COSTS)])} |")
    held_out = f"ddil's error on held-out demonstrations beside bc's, %: {percent(cell['error_data'])}."
    return [*lines, "", held_out, ""]


def draw(summary: dict[str, Any], cells: Mapping[str, Cell], path: Path) -> None:
    """bc's ratio of errors against what ddil gains, a point a cell."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, cell in summary["cells"].items():
        gain, x = cell["success"]["bc"], cell["arms"]["bc"]["error_ratio"]
        spread = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
        axis.errorbar(x, gain["mean"], spread, fmt="o", color=COLORS[cells[name].env])
    axis.axhline(0, color="gray", lw=0.8)
    axis.set(xscale="log", xlabel="bc: error on own conditions / held-out demonstrations", ylabel="success, ddil − bc")
    for env in dict.fromkeys(cell.env for cell in cells.values()):
        axis.plot([], [], "o", color=COLORS[env], label=env)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def write_report(records: Records, cells: Mapping[str, Cell], out: Path) -> None:
    """Writes the summary as JSON, the tables as Markdown and, once all runs that are tested are there, the picture."""
    summary = summarise(records, cells)
    hardware = sorted({f"{r['hardware']}, torch {r['torch']}" for r in records.values()})
    dates = sorted({r["date"] for r in records.values()})
    write_atomically(out, json.dumps(summary | {"dates": dates, "hardware": hardware, "runs": len(records)}, indent=1) + "\n")
    lines = ["# Worlds: arms of imitation learning where samples feed back", ""]
    lines += [f"`python benchmarks/worlds.py`: {len(records)} runs, seeds {SEEDS[0]} to {SEEDS[-1]}, {dates[0]} to {dates[-1]},"]
    lines += [f"{'; '.join(hardware)}. What was expected, and what the columns mean: `benchmarks/README.md`.", ""]
    if not Runs(records).complete(cells):
        lines += ["**Not all runs are there: no test and no verdict yet.**", ""]
    lines += overview(summary["cells"])
    for title, found in summary["shift_predicts"].items():
        if found is not None:
            lines += [
                f"bc's ratio of errors against ddil's gain in success, {title}: Spearman {found['spearman']:.2f} "
                f"[{found['low']:.2f}, {found['high']:.2f}] over {found['cells']} cells; {found['null']:.2f} where ddil's runs are of "
                f"another cell (p = {found['p']:.3f}).",
                "",
            ]
    lines += adaptive_table(summary["adaptive"])
    for name, cell in summary["cells"].items():
        if cell["arms"]:
            lines += detail(name, cell)
    write_atomically(out.with_suffix(".md"), "\n".join(lines))
    if Runs(records).complete(cells):
        draw(summary, cells, out.with_suffix(".png"))
