"""The tables and the picture of `worlds.py`: arms in each cell, effects paired by seed, and the tests that were fixed before the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from scipy.stats import spearmanr

from ddil_agents.comparison.statistics import holm, paired_comparison, sign_flip_test
from ddil_agents.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from worlds import Cell

mpl.use("Agg")
import matplotlib.pyplot as plt

Records = dict[tuple[str, str, int], dict[str, Any]]
COLORS = {"fork": "tab:blue", "lunar_lander": "tab:orange", "kuramoto": "tab:green"}
METRICS = {
    "success": ("success", "{:.3f}"),
    "return": ("return", "{:.1f}"),
    "route_entropy": ("entropy of routes", "{:.2f}"),
    "error_own": ("error on own conditions", "{:.4f}"),
    "error_data": ("error on held-out demonstrations", "{:.4f}"),
    "error_ratio": ("ratio", "{:.1f}"),
}
COSTS = {"teacher_nfe": "teacher forwards", "student_nfe": "student forwards", "visits": "world steps", "seconds": "seconds"}


def value(record: Mapping[str, Any], metric: str) -> float | None:
    """A metric of one run; the error on own conditions as the mean over the samples of its episodes, as the ratio takes it."""
    if metric == "error_own":
        ratio, data = record.get("error_ratio"), record.get("error_data")
        return None if ratio is None or data is None else ratio * data
    return record.get(metric)


def by_seed(records: Records, cell: str, arm: str, metric: str, tuning: tuple[int, ...]) -> dict[int, float]:
    """The values of the seeds that are compared."""
    found = {seed: value(record, metric) for (c, a, seed), record in records.items() if (c, a) == (cell, arm) and seed not in tuning}
    return {seed: x for seed, x in sorted(found.items()) if x is not None and math.isfinite(x)}


def best_dart(records: Records, cell: str, tuning: tuple[int, ...]) -> str | None:
    """The size of noise with the highest mean success on the tuning seeds; None before all of them are there."""
    found: dict[str, list[float]] = {}
    for (c, arm, seed), record in records.items():
        if c == cell and arm.startswith("dart") and seed in tuning and "success" in record:
            found.setdefault(arm, []).append(record["success"])
    if len(found) < 3 or any(len(values) < len(tuning) for values in found.values()):
        return None
    return max(sorted(found), key=lambda arm: np.mean(found[arm]))


def paired(
    records: Records, cell: str, arm: str, metric: str, tuning: tuple[int, ...], of: Callable[[float, float], float], base: str = "bc"
) -> dict[int, float]:
    """`of(arm, base)` by seed, where both have run."""
    own, other = (by_seed(records, cell, name, metric, tuning) for name in (arm, base))
    return {seed: of(own[seed], other[seed]) for seed in own if seed in other}


def difference(a: float, b: float) -> float:
    return a - b


def log_ratio(a: float, b: float) -> float:
    return math.log(a / b)


def interval(values: Mapping[int, float]) -> dict[str, Any] | None:
    """Mean, 95 % t-interval and number of seeds; None of fewer than two."""
    if len(values) < 2:
        return None
    pair = paired_comparison(list(values.values()), [0.0] * len(values))
    return {"mean": pair.mean, "low": pair.low, "high": pair.high, "seeds": len(values)}


def tests(records: Records, cells: Mapping[str, Cell], seeds: int, tuning: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """p of ddil − bc in success for each cell, Holm over the cells of a world; of worlds of which all runs are there."""
    found: dict[str, dict[str, Any]] = {}
    for env in dict.fromkeys(cell.env for cell in cells.values()):
        names = [name for name, cell in cells.items() if cell.env == env]
        gains = {name: paired(records, name, "ddil", "success", tuning, difference) for name in names}
        if all((name, arm, 700 + i) in records for name in names for arm in ("bc", "ddil") for i in range(seeds)):
            p = [sign_flip_test(list(gains[name].values())) for name in names]
            for name, raw, adjusted in zip(names, p, holm(p), strict=True):
                helps = bool(adjusted <= 0.05 and np.mean(list(gains[name].values())) > 0)
                found[name] = {"p": raw, "p_adjusted": float(adjusted), "helps": helps}
    return found


def shift_predicts(records: Records, cells: Mapping[str, Cell], tuning: tuple[int, ...], resamples: int = 2000) -> dict[str, Any] | None:
    """Spearman's correlation over cells of bc's ratio and ln(error on own conditions, bc / ddil), each from the other half of the seeds."""
    ratios = {name: by_seed(records, name, "bc", "error_ratio", tuning) for name in cells}
    gains = {name: paired(records, name, "ddil", "error_own", tuning, lambda a, b: math.log(b / a)) for name in cells}
    names = [name for name in cells if len(gains[name]) >= 4]
    if len(names) < 4:
        return None
    generator = np.random.default_rng(0)

    def half(values: dict[int, float], odd: int, resample: bool) -> float:
        x = np.array([v for seed, v in values.items() if seed % 2 == odd])
        return float(np.mean(generator.choice(x, len(x)) if resample else x))

    def correlation(chosen: list[str], resample: bool) -> float:
        halves = []
        for odd in (0, 1):
            x, y = [half(ratios[name], odd, resample) for name in chosen], [half(gains[name], 1 - odd, resample) for name in chosen]
            halves.append(spearmanr(x, y).statistic)
        return float(np.mean(halves))

    drawn = [correlation(list(generator.choice(names, len(names))), True) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"spearman": correlation(names, False), "low": float(low), "high": float(high), "cells": len(names)}


def summarise(records: Records, cells: Mapping[str, Cell], seeds: int, tuning: tuple[int, ...]) -> dict[str, Any]:
    """All that the tables show, by cell and arm."""
    tested, summary = tests(records, cells, seeds, tuning), {}
    for name in cells:
        arms: dict[str, Any] = {}
        for arm in dict.fromkeys(a for (c, a, seed) in records if c == name and seed not in tuning):
            means = {key: values for key in METRICS if (values := by_seed(records, name, arm, key, tuning))}
            costs = {
                key: np.mean([r[key] for (c, a, s), r in records.items() if (c, a) == (name, arm) and s not in tuning]) for key in COSTS
            }
            arms[arm] = {key: float(np.mean(list(x.values()))) for key, x in means.items()} | {key: float(x) for key, x in costs.items()}
            arms[arm]["seeds"] = len(means.get("success", ()))
            if arm != "bc":
                arms[arm]["success_gain"] = interval(paired(records, name, arm, "success", tuning, difference))
                arms[arm]["error_own_log_ratio"] = interval(paired(records, name, arm, "error_own", tuning, log_ratio))
            lost = [seed for (c, a, seed), record in records.items() if (c, a) == (name, arm) and "lost" in record]
            arms[arm] |= {"lost": lost} if lost else {}
        teacher = next((r["teacher"] for (c, _, _), r in records.items() if c == name), None)
        summary[name] = {"arms": arms, "teacher": teacher, "best_dart": best_dart(records, name, tuning), "test": tested.get(name)}
    return {"cells": summary, "shift_predicts": shift_predicts(records, cells, tuning)}


def percent(effect: dict[str, Any] | None) -> str:
    """A mean log ratio and its interval in per cent."""
    if effect is None:
        return "–"
    mean, low, high = (100 * math.expm1(effect[key]) for key in ("mean", "low", "high"))
    return f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]"


def signed(effect: dict[str, Any] | None) -> str:
    return "–" if effect is None else f"{effect['mean']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]"


def table(name: str, cell: dict[str, Any]) -> list[str]:
    """The Markdown of one cell."""
    keys = [key for key in METRICS if any(key in arm for arm in cell["arms"].values())]
    heads = ["", "seeds", *(METRICS[key][0] for key in keys), "success, beside bc", "error on own, beside bc, %", *COSTS.values()]
    lines = [f"### {name}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    teacher = cell["teacher"]
    if teacher is not None:
        shown = [METRICS[key][1].format(teacher[key]) if key in teacher else "" for key in keys]
        lines.append(f"| the teacher in 16 steps | | {' | '.join(shown)} |{' |' * (len(COSTS) + 2)}")
    for arm, found in cell["arms"].items():
        shown = [METRICS[key][1].format(found[key]) if key in found else "" for key in keys]
        effects = [signed(found.get("success_gain")), percent(found.get("error_own_log_ratio"))] if arm != "bc" else ["", ""]
        title = f"{arm} (best)" if arm == cell["best_dart"] else arm
        lines.append(f"| {title} | {found['seeds']} | {' | '.join([*shown, *effects, *(f'{found[key]:,.0f}' for key in COSTS)])} |")
        if "lost" in found:
            lines.append(f"| not finite, left out: seeds {found['lost']} |{' |' * (len(heads) - 1)}")
    if cell["test"] is not None:
        claim = "DDIL helps" if cell["test"]["helps"] else "no gain in success is shown"
        lines += ["", f"ddil beside bc in success: p = {cell['test']['p']:.4f}, after Holm {cell['test']['p_adjusted']:.4f}: {claim}."]
    return [*lines, ""]


def draw(summary: dict[str, Any], cells: Mapping[str, Cell], path: Path) -> None:
    """bc's ratio of errors against what ddil gains, a point a cell."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, cell in summary["cells"].items():
        bc, ddil = cell["arms"].get("bc", {}), cell["arms"].get("ddil", {})
        if "error_ratio" not in bc or ddil.get("success_gain") is None or ddil["error_own_log_ratio"] is None:
            continue
        for axis, key, sign in zip(axes, ("success_gain", "error_own_log_ratio"), (1, -1), strict=True):
            gain = ddil[key]
            low, high = sorted((sign * gain["low"], sign * gain["high"]))
            env = cells[name].env
            axis.errorbar(
                bc["error_ratio"],
                sign * gain["mean"],
                [[sign * gain["mean"] - low], [high - sign * gain["mean"]]],
                fmt="o",
                color=COLORS[env],
            )
    for axis, title in zip(axes, ("gain in success", "ln(error on own conditions, bc / ddil)"), strict=True):
        axis.axhline(0, color="gray", lw=0.8)
        axis.set(xscale="log", xlabel="bc's error on own / held-out demonstrations' conditions", ylabel=title)
    for env in dict.fromkeys(cell.env for cell in cells.values()):
        axes[0].plot([], [], "o", color=COLORS[env], label=env)
    axes[0].legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def write_report(records: Records, cells: Mapping[str, Cell], seeds: int, tuning: tuple[int, ...], out: Path) -> None:
    """Writes the summary as JSON, the tables as Markdown and, once a world's runs are complete, the picture."""
    summary = summarise(records, cells, seeds, tuning)
    hardware = sorted({f"{r['hardware']}, torch {r['torch']}" for r in records.values()})
    summary |= {"dates": sorted({r["date"] for r in records.values()}), "hardware": hardware, "runs": len(records)}
    write_atomically(out, json.dumps(summary, indent=1) + "\n")
    lines = ["# Worlds: arms of imitation learning where samples feed back", ""]
    lines += [
        f"`python benchmarks/worlds.py`: {len(records)} runs, seeds 700 to {699 + seeds}, {summary['dates'][0]} to {summary['dates'][-1]}, "
    ]
    lines += [f"{'; '.join(hardware)}. What was expected, and what the columns mean: `benchmarks/README.md`.", ""]
    if (shift := summary["shift_predicts"]) is not None:
        lines += [
            f"bc's ratio of errors against ln(error on own conditions, bc / ddil): Spearman {shift['spearman']:.2f} "
            f"[{shift['low']:.2f}, {shift['high']:.2f}] over {shift['cells']} cells.",
            "",
        ]
    for name, cell in summary["cells"].items():
        if cell["arms"]:
            lines += table(name, cell)
    write_atomically(out.with_suffix(".md"), "\n".join(lines))
    if any(cell["test"] is not None for cell in summary["cells"].values()):
        draw(summary, cells, out.with_suffix(".png"))
