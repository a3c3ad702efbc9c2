"""When does DDIL help? The effect of its mixture against the covariate shift that was measured, cell by cell.

    python benchmarks/when.py --jobs 2            # hours on two cores; goes on where it stopped
    python benchmarks/when.py --report_only       # the map, from the runs that are there

What is expected, which metric and how many seeds was written down in benchmarks/README.md before the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ddil_agents.compare import Comparison, compare, merged, own_row
from ddil_agents.report import read_result
from ddil_agents.statistics import paired_comparison

METRICS = ("endpoint_rmse", "frechet_to_expert", "recall")
BASE: dict[str, Any] = {
    "num_updates": 300,
    "num_steps": 4,
    "batch_size": 32,
    "collect_size": 128,
    "updates_per_collect": 16,
    "evaluate": {"n": 300, "n_paths": 300, "n_action": 200},
}
DAGGER = {
    "forward": {"agent": "dagger", "beta": {"forward": 1.0, "teacher": 0.0, "student": 0.0}},
    "ddil": {"agent": "dagger", "beta": {"forward": 0.5, "teacher": 0.1, "student": 0.4}},
    "student": {"agent": "dagger", "beta": {"forward": 0.0, "teacher": 0.0, "student": 1.0}},
}
LCM = {
    "forward": {"agent": "lcm", "beta": {"forward": 1.0, "teacher": 0.0, "student": 0.0}},
    "half": {"agent": "lcm", "beta": {"forward": 0.5, "teacher": 0.0, "student": 0.5}},
}
DMD2 = {
    "own": {"agent": "dmd2", "config": "demo", "beta": {"forward": 0.0, "teacher": 0.0, "student": 1.0}},
    "half teacher": {"agent": "dmd2", "config": "demo", "beta": {"forward": 0.0, "teacher": 0.5, "student": 0.5}},
}


class Cell(NamedTuple):
    """One setting in which the arms are compared."""

    name: str
    arms: dict[str, dict[str, Any]]
    settings: dict[str, Any]


def cells() -> list[Cell]:
    """All of them, fixed before the runs."""
    guided = {"guidance_scale": 3.0}
    found = [
        Cell(f"w {w:g}, {n} steps", DAGGER, {"guidance_scale": w, "num_steps": n, "teacher_steps": 32})
        for w in (1.0, 3.0, 7.0)
        for n in (2, 4, 8, 16)
    ]
    found += [
        Cell("w 3, 4 steps, 75 updates", DAGGER, guided | {"num_updates": 75}),
        Cell("w 3, 4 steps, 1200 updates", DAGGER, guided | {"num_updates": 1200}),
        Cell("w 3, 4 steps, small student", DAGGER, guided | {"student": {"channels": [16, 32]}, "num_updates": 600}),
        Cell("w 3, 4 steps, batch 7", DAGGER, guided | {"batch_size": 7, "collect_size": 28}),
        Cell("LCM, w 3, 4 steps", LCM, guided | {"num_updates": 600}),
        Cell("LCM, w 3, 8 steps", LCM, guided | {"num_updates": 600, "num_steps": 8}),
        Cell("DMD2, w 3, 4 steps", DMD2, guided | {"learning_rate": 3e-5}),
        Cell("DMD2, w 3, 4 steps, batch 7", DMD2, guided | {"learning_rate": 3e-5, "batch_size": 7, "collect_size": 28}),
    ]
    return found


def shift_of(row: dict[str, Any], floor: list[float]) -> dict[str, float]:
    """The covariate shift of one student: how much worse it acts where it goes itself, and how far that is from the data."""
    ratios = [ratio for ratio in row["action_ratio"][1:] if ratio is not None]
    return {
        "action_ratio": statistics.fmean(ratios) if ratios else float("nan"),
        "gaussian_shift": statistics.fmean(a / b for a, b in zip(row["gaussian_shift"][1:], floor[1:], strict=True)),
    }


def effect_of(cell: Cell, result: dict[str, Any], out: Path) -> dict[str, Any]:
    """A cell's differences from its first arm, in per cent of that arm's mean, and the shift measured on that arm."""
    base, *others = cell.arms
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in cell.arms}
    shifts = []
    for run in result["budgets"]["updates"]["runs"]:
        if run["done"]:
            found = read_result(out / run["directory"] / "result.json")
            rows[run["arm"]].append(own_row(found))
            if run["arm"] == base:
                shifts.append(shift_of(own_row(found), found["floors"]["held_out_real"]["gaussian_shift"]))
    effects: dict[str, Any] = {}
    for arm in others:
        for metric in METRICS:
            a, b = ([row[metric] for row in rows[which]] for which in (arm, base))
            if len(a) == len(b) > 1:
                pair, mean = paired_comparison(a, b, (arm, base), len(others)), statistics.fmean(b)
                effects.setdefault(arm, {})[metric] = {
                    **{key: 100 * getattr(pair, key) / mean for key in ("mean", "low", "high")},
                    "n": pair.n,
                    "p": pair.p,
                    "baseline": mean,
                }
    measured = {key: statistics.fmean(shift[key] for shift in shifts) for key in shifts[0]} if shifts else {}
    return {"effects": effects, "shift": measured}


def predicts(found: dict[str, Any], metric: str = "endpoint_rmse") -> dict[str, Any]:
    """Spearman's correlation over the cells between each measure of shift and the best mixture's effect."""
    correlations = {}
    for measure in ("action_ratio", "gaussian_shift"):
        pairs = [
            (cell["shift"][measure], min(effect[metric]["mean"] for effect in cell["effects"].values()))
            for cell in found.values()
            if cell["effects"] and np.isfinite(cell["shift"].get(measure, np.nan))
        ]
        if len(pairs) > 2:
            rho, p = stats.spearmanr(*zip(*pairs, strict=True))
            correlations[measure] = {"rho": float(rho), "p": float(p), "cells": len(pairs)}
    return correlations


def markdown(found: dict[str, Any]) -> str:
    """The map as a table."""
    lines = ["| cell | arm | seeds | RMSE to teacher, % | Fréchet to teacher, % | recall, % | action ratio | Gaussian shift / floor |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, cell in found.items():
        for arm, effect in cell["effects"].items():
            spans = [f"{e['mean']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]" for e in effect.values()]
            shift = [f"{cell['shift'][key]:.2f}" for key in ("action_ratio", "gaussian_shift")]
            lines.append(f"| {name} | {arm} | {effect['endpoint_rmse']['n']} | {' | '.join(spans)} | {' | '.join(shift)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Effect against shift: a point for each cell and arm, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, measure in zip(figure.subplots(1, 2, sharey=True), ("action_ratio", "gaussian_shift"), strict=True):
        for marker, arm in zip("osD^v", ("ddil", "student", "half", "half teacher"), strict=False):
            points = [
                (name, cell["shift"][measure], cell["effects"][arm]["endpoint_rmse"])
                for name, cell in found.items()
                if arm in cell["effects"]
            ]
            if points:
                _, x, effects = zip(*points, strict=True)
                y = [e["mean"] for e in effects]
                error = [[e["mean"] - e["low"] for e in effects], [e["high"] - e["mean"] for e in effects]]
                axis.errorbar(x, y, error, fmt=marker, label=arm, capsize=2, alpha=0.8)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(xlabel=measure.replace("_", " ") + (" (own / forward states)" if measure == "action_ratio" else " / held-out floor"))
        axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("RMSE to teacher against forward-only, %")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/when"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/when.json"))
    parser.add_argument("--env", default="digits8")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cells", nargs="+", default=None, help="names; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    chosen = [cell for cell in cells() if args.cells is None or cell.name in args.cells]
    if not chosen:
        parser.error(f"--cells {args.cells}: choose of {[cell.name for cell in cells()]}")
    found: dict[str, Any] = {}
    for cell in chosen:
        out = args.runs / cell.name.replace(",", "").replace(" ", "_")
        if args.report_only and not out.is_dir():
            continue
        settings = Comparison(args.env, cell.arms, merged(BASE, cell.settings), args.seeds, primary="endpoint_rmse")
        result = compare(settings, out, args.jobs, report_only=args.report_only)
        found[cell.name] = effect_of(cell, result, out)
        print(f"{cell.name}: done", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"env": args.env, "seeds": args.seeds, **result["provenance"]}
    args.out.write_text(json.dumps({"cells": found, "predicts": predicts(found), **provenance}, indent=1))
    draw(found, args.out.with_suffix(".png"))
    print(markdown(found))
    for measure, correlation in predicts(found).items():
        print(f"\nSpearman, {measure} against effect: {correlation['rho']:+.2f}, p = {correlation['p']:.3f}, {correlation['cells']} cells")


if __name__ == "__main__":
    main()
