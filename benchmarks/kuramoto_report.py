"""The tables of `kuramoto_arms.py`: arms in each cell, effects paired by seed, and the test that was fixed before the runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from worlds_runs import Records, Runs, interval, signed

from ddil_agents.comparison.statistics import holm, sign_flip_test
from ddil_agents.training.checkpoint import write_atomically

SEEDS, TUNING = range(800, 808), (790, 791)  # those that are compared; those on which sizes of noise are chosen
FEWER = 5  # seeds of what is not tested
MAIN = ("4 steps", "2 steps")  # the cells that are tested
TESTED = ("ddil", "dagger")  # the arms that are compared with bc there, in success
NOISES = (0.01, 0.03, 0.06, 0.1, 0.3)  # sizes of dart's noise, in standard deviations of the attractor
EQUAL = 0.03  # a difference in success whose 90 % interval lies within ± this is called none
NEAR = 0.05  # success by which a size of noise may fall short of the best one and still be chosen
SHORTER = 6.0  # frames of valid time, a tenth of it, that an arm may lose
METRICS = {  # title, form, and how seeds are summarised: rollouts that blow up would rule a mean of those that have no bound
    "success": ("bounded", "{:.3f}", np.mean),
    "valid_time": ("valid time", "{:.1f}", np.mean),
    "late_shift": ("late shift", "{:.3f}", np.median),
    "high_modes": ("high modes", "{:.3g}", np.median),
    "error_data": ("error on held-out histories", "{:.4f}", np.mean),
    "error_expert": ("on the expert's", "{:.4f}", np.mean),
    "error_first": ("on own, first eighth", "{:.4f}", np.median),
    "error_last": ("last eighth", "{:.4f}", np.median),
    "error_ratio": ("own / held-out", "{:.3g}", np.median),
    "condition_shift": ("shift of histories", "{:.3f}", np.median),
}
COSTS = {
    "teacher_nfe": "teacher forwards",
    "student_nfe": "student forwards",
    "visits": "frames visited",
    "cpu_seconds": "core-seconds",
}


def best_noise(runs: Runs, cell: str) -> str | None:
    """The size of noise of the longest valid time on the tuning seeds, of those whose success is within `NEAR` of the highest."""
    sizes = [f"dart {noise:g}" for noise in NOISES]
    success = {arm: list(runs.values(cell, arm, "success", TUNING).values()) for arm in sizes}
    if any(len(values) < len(TUNING) for values in success.values()):
        return None
    stable = [arm for arm in sizes if np.mean(success[arm]) >= max(map(np.mean, success.values())) - NEAR]
    return max(stable, key=lambda arm: np.mean(list(runs.values(cell, arm, "valid_time", TUNING).values()) or [0]))


def verdicts(runs: Runs) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each arm that is tested, in each cell: its sign-flip p by Holm over all four, and what follows; none before all runs are there."""
    pairs = [(cell, arm) for cell in MAIN for arm in TESTED]
    if any((cell, arm, seed) not in runs.records for cell in MAIN for arm in ("bc", *TESTED) for seed in SEEDS):
        return {}
    gains = [runs.gains(cell, arm, "bc") for cell, arm in pairs]
    found: dict[str, dict[str, dict[str, Any]]] = {cell: {} for cell in MAIN}
    for (cell, arm), gain, p in zip(pairs, gains, holm([sign_flip_test(list(gain.values())) for gain in gains]), strict=True):
        if p < 0.05:
            verdict = "more" if np.mean(list(gain.values())) > 0 else "less"
        else:
            narrow = interval(gain, 0.9)
            verdict = "none" if narrow is not None and narrow["low"] > -EQUAL and narrow["high"] < EQUAL else "undecided"
        found[cell][arm] = {"p": float(p), "verdict": verdict}
    return found


def summarise(records: Records, cells: Iterable[str]) -> dict[str, Any]:
    """All that the tables show, by cell and arm."""
    runs, summary = Runs(records, SEEDS), {}
    tested = verdicts(runs)
    for cell in cells:
        arms: dict[str, Any] = {}
        for arm in dict.fromkeys(a for c, a, seed in records if c == cell and seed in SEEDS):
            values = {key: list(x.values()) for key in METRICS if (x := runs.values(cell, arm, key))}
            arms[arm] = {"seeds": len(runs.of(cell, arm))} | {key: float(METRICS[key][2](x)) for key, x in values.items()}
            arms[arm] |= {key: float(np.mean([record[key] for record in runs.of(cell, arm).values()])) for key in COSTS}
            lost = [seed for seed, record in runs.of(cell, arm).items() if "lost" in record]
            arms[arm] |= {"lost": lost} if lost else {}
        best = best_noise(runs, cell)
        beside_bc = {
            arm: {key: interval(runs.gains(cell, arm, "bc", key)) for key in ("success", "valid_time")} for arm in arms if arm != "bc"
        }
        summary[cell] = {
            "arms": arms,
            "teacher": next((r["teacher"] for (c, _, seed), r in records.items() if c == cell and seed in SEEDS), None),
            "best_dart": best,
            "beside_bc": beside_bc,
            "none": {arm: equal(interval(runs.gains(cell, arm, "bc"), 0.9)) for arm in arms if arm != "bc"},
            "no_shorter": {arm: no_shorter(interval(runs.gains(cell, arm, "bc", "valid_time"), 0.9)) for arm in TESTED},
            "dagger_beside": {
                base: {key: interval(runs.gains(cell, "dagger", base, key)) for key in ("success", "valid_time")}
                for base in ("ddil", "adaptive", "teacher", "within frame", "low-pass", "unroll 2", best)
                if base in arms
            },
            "error_data": {arm: interval(runs.gains(cell, arm, "bc", "error_data", log=True)) for arm in TESTED},
            "test": tested.get(cell),
        }
    tuning = {
        cell: {
            arm: {
                key: float(np.mean(list(x.values())))
                for key in ("success", "valid_time", "error_data")
                if (x := runs.values(cell, arm, key, TUNING))
            }
            for arm in dict.fromkeys(a for c, a, seed in records if c == cell and seed in TUNING)
        }
        for cell in cells
    }
    return {"cells": summary, "tuning": {cell: arms for cell, arms in tuning.items() if arms}}


def equal(narrow: dict[str, Any] | None) -> bool | None:
    return None if narrow is None else narrow["low"] > -EQUAL and narrow["high"] < EQUAL


def no_shorter(narrow: dict[str, Any] | None) -> bool | None:
    return None if narrow is None else narrow["low"] > -SHORTER


def claims(summary: dict[str, Any]) -> dict[str, bool]:
    """Whether dagger loses less valid time than `SHORTER` frames against bc, and whether it is better than the best dart, in both cells.

    Nothing is claimed before the runs of the test and of the tuning are there.
    """
    tested = [summary[cell] for cell in MAIN]
    darts = [cell["dagger_beside"].get(cell["best_dart"]) for cell in tested]
    if any(cell["test"] is None for cell in tested):
        return {}
    if any(dart is None or dart["success"] is None or dart["success"]["seeds"] < FEWER or dart["valid_time"] is None for dart in darts):
        return {}
    better = [dart["valid_time"]["low"] > 0 and dart["success"]["low"] > -NEAR for dart in darts]
    return {"no_shorter": all(cell["no_shorter"]["dagger"] is True for cell in tested), "better_than_dart": all(better)}


def frames(effect: dict[str, Any] | None) -> str:
    return "–" if effect is None else f"{effect['mean']:+.1f} [{effect['low']:+.1f}, {effect['high']:+.1f}]"


def told(flag: bool | None) -> str:
    return {None: "–", True: "yes", False: "no"}[flag]


def table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def overview(cells: dict[str, Any]) -> list[str]:
    """A row a cell: the share of bounded rollouts by arm, and the differences that are tested."""
    heads = ["bounded", "teacher", "bc", "ddil", "dagger", "adaptive", "ddil − bc", "dagger − bc", "test of ddil, dagger"]
    heads += ["valid time, dagger − bc", f"loses less than {SHORTER:g} frames"]
    rows = []
    for name, cell in cells.items():
        if not cell["arms"]:
            continue
        shown = [f"{cell['arms'][arm]['success']:.3f}" if arm in cell["arms"] else "–" for arm in ("bc", "ddil", "dagger", "adaptive")]
        beside = [cell["beside_bc"].get(arm, {}) for arm in TESTED]
        test = ", ".join(f"{cell['test'][arm]['verdict']} (p = {cell['test'][arm]['p']:.3f})" for arm in TESTED) if cell["test"] else "–"
        time = frames(beside[1].get("valid_time")), told(cell["no_shorter"]["dagger"])
        rows.append([name, f"{cell['teacher']['success']:.3f}", *shown, *(signed(x.get("success")) for x in beside), test, *time])
    return table(heads, rows)


def detail(name: str, cell: dict[str, Any]) -> list[str]:
    """The tables of one cell."""
    heads = [
        "",
        "seeds",
        *(title for title, _, _ in METRICS.values()),
        "bounded, beside bc",
        "none",
        "valid time, beside bc",
        *COSTS.values(),
    ]
    shown = [METRICS[key][1].format(cell["teacher"][key]) if key in cell["teacher"] else "" for key in METRICS]
    rows = [["the expert", "", *shown, *[""] * (3 + len(COSTS))]]
    for arm, found in cell["arms"].items():
        title = f"{arm} (best on tuning seeds)" if arm == cell["best_dart"] else arm
        title += f", not finite: {found['lost']}" if "lost" in found else ""
        shown = [METRICS[key][1].format(found[key]) if key in found else "" for key in METRICS]
        beside = cell["beside_bc"].get(arm, {})
        effects = [signed(beside.get("success")), told(cell["none"].get(arm)), frames(beside.get("valid_time"))]
        rows.append([title, str(found["seeds"]), *shown, *effects, *(f"{found[key]:,.0f}" for key in COSTS)])
    lines = [f"### {name}", "", *table(heads, rows)]
    if cell["dagger_beside"]:
        rows = [[base, signed(x["success"]), frames(x["valid_time"])] for base, x in cell["dagger_beside"].items()]
        lines += table(["dagger beside", "bounded", "valid time"], rows)
    return lines


def write_report(records: Records, cells: Iterable[str], out: Path) -> None:
    """Writes the summary as JSON and the tables as Markdown."""
    summary = summarise(records, cells)
    hardware = sorted({f"{r['hardware']}, torch {r['torch']}" for r in records.values()})
    dates = sorted({r["date"] for r in records.values()})
    hours = sum(r["cpu_seconds"] for r in records.values()) / 3600
    about = {"dates": dates, "hardware": hardware, "runs": len(records), "core_hours": round(hours, 2)}
    write_atomically(out, json.dumps(summary | about, indent=1) + "\n")
    lines = ["# The Kuramoto–Sivashinsky equation: arms of imitation learning in a chaotic world", ""]
    lines += [f"`python benchmarks/kuramoto_arms.py`: {len(records)} runs, seeds {SEEDS[0]} to {SEEDS[-1]}, {dates[0]} to {dates[-1]},"]
    lines += [f"{hours:.1f} core-hours, {'; '.join(hardware)}. What was expected, and what the columns mean: `benchmarks/README.md`.", ""]
    if not summary["cells"][MAIN[0]]["test"]:
        lines += ["**Not all runs that are tested are there: no test yet.**", ""]
    lines += overview(summary["cells"])
    found = claims(summary["cells"])
    titles = {
        "no_shorter": f"dagger loses no more than {SHORTER:g} frames of valid time against bc",
        "better_than_dart": "dagger is better than the best dart",
    }
    lines += [f"In both cells that are tested, {titles[key]}: **{'holds' if held else 'does not hold'}**.\n" for key, held in found.items()]
    for name, cell in summary["cells"].items():
        if cell["arms"]:
            lines += detail(name, cell)
    for name, arms in summary["tuning"].items():
        rows = [
            [arm, *(METRICS[key][1].format(x[key]) if key in x else "" for key in ("success", "valid_time", "error_data"))]
            for arm, x in arms.items()
        ]
        lines += [f"### Tuning seeds, {name}", "", *table(["", "bounded", "valid time", "error on held-out histories"], rows)]
    write_atomically(out.with_suffix(".md"), "\n".join(lines))
