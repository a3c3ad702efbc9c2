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
from ddil_agents.statistics import holm, paired_comparison

METRICS = ("endpoint_rmse", "frechet_to_expert", "recall")
SHIFTS = {"action_ratio": "action error, own / forward states", "gaussian_shift": "Gaussian W2 of visits / held-out floor"}
GUIDANCE, STEPS = (1.0, 3.0, 7.0), (2, 4, 8, 16)
BASE: dict[str, Any] = {
    "num_updates": 300,
    "num_steps": 4,
    "batch_size": 32,
    "collect_size": 128,
    "updates_per_collect": 16,
    "evaluate": {"n": 300, "n_paths": 300, "n_action": 200},
}
# Of an experiment's arms the first is the baseline, and the second the mixture whose effect is the cell's.
DAGGER = {
    "forward": {"agent": "dagger", "beta": {"forward": 1.0, "teacher": 0.0, "student": 0.0}},
    "ddil": {"agent": "dagger", "beta": {"forward": 0.5, "teacher": 0.1, "student": 0.4}},
}
STUDENT = {"student": {"agent": "dagger", "beta": {"forward": 0.0, "teacher": 0.0, "student": 1.0}}}
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


def grid_name(w: float, num_steps: int) -> str:
    return f"w {w:g}, {num_steps} steps"


def cells() -> list[Cell]:
    """All of them, fixed before the runs."""
    guided = {"guidance_scale": 3.0}
    found = [
        Cell(grid_name(w, n), DAGGER | (STUDENT if n == 4 else {}), {"guidance_scale": w, "num_steps": n, "teacher_steps": 32})
        for w in GUIDANCE
        for n in STEPS
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
    """A cell's differences from its first arm, paired by seed, in per cent of that arm's mean, and the shift measured on that arm."""
    base, *others = cell.arms
    rows: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in cell.arms}
    shifts = []
    for run in result["budgets"]["updates"]["runs"]:
        if run["done"]:
            found = read_result(out / run["directory"] / "result.json")
            rows[run["arm"]][run["seed"]] = own_row(found)
            if run["arm"] == base:
                shifts.append(shift_of(own_row(found), found["floors"]["held_out_real"]["gaussian_shift"]))
    effects: dict[str, Any] = {}
    for arm in others:
        seeds = sorted(rows[arm].keys() & rows[base].keys())
        for metric in METRICS if len(seeds) > 1 else ():
            own, reference = ([rows[which][seed][metric] for seed in seeds] for which in (arm, base))
            pair, mean = paired_comparison(own, reference, (arm, base)), statistics.fmean(reference)
            effects.setdefault(arm, {})[metric] = {
                **{key: 100 * getattr(pair, key) / mean for key in ("mean", "low", "high")},
                "n": pair.n,
                "p": pair.p,
                "baseline": mean,
            }
    measured = {key: statistics.fmean(shift[key] for shift in shifts) for key in shifts[0]} if shifts else {}
    return {"mixture": others[0], "effects": effects, "shift": measured}


def adjust(found: dict[str, Any]) -> None:
    """Adds Holm's p to the mixtures' effects, one family over the cells; what an arm beside them does is no claim."""
    for metric in METRICS:
        family = [cell["effects"][cell["mixture"]][metric] for cell in found.values() if cell["mixture"] in cell["effects"]]
        for effect, p in zip(family, holm([effect["p"] for effect in family]), strict=True):
            effect["p_holm"] = float(p)


def predicts(found: dict[str, Any], metric: str = "endpoint_rmse") -> dict[str, Any]:
    """Spearman's correlation over the cells between each measure of shift and the mixture's effect."""
    correlations = {}
    for measure in SHIFTS:
        pairs = [
            (cell["shift"][measure], cell["effects"][cell["mixture"]][metric]["mean"])
            for cell in found.values()
            if cell["mixture"] in cell["effects"] and np.isfinite(cell["shift"][measure])
        ]
        if len(pairs) > 2:
            rho, p = stats.spearmanr(*zip(*pairs, strict=True))
            correlations[measure] = {"rho": float(rho), "p": float(p), "cells": len(pairs)}
    return correlations


def markdown(found: dict[str, Any]) -> str:
    """The map as a table."""
    lines = ["| cell | arm | seeds | RMSE to teacher, % | p | Fréchet to teacher, % | recall, % | action ratio | Gaussian shift / floor |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, cell in found.items():
        for arm, effect in cell["effects"].items():
            primary, *others = (f"{e['mean']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]" for e in effect.values())
            p = f"{effect['endpoint_rmse']['p_holm']:.3f}" if arm == cell["mixture"] else ""
            cells = [name, arm, str(effect["endpoint_rmse"]["n"]), primary, p, *others, *(f"{cell['shift'][key]:.2f}" for key in SHIFTS)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The map over guidance and steps, and every cell's effect against its shift, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    grid, *scatters = figure.subplots(1, 3)
    effect = np.full((len(GUIDANCE), len(STEPS)), np.nan)
    for i, j in np.ndindex(effect.shape):
        cell = found.get(grid_name(GUIDANCE[i], STEPS[j]))
        if cell is not None and cell["mixture"] in cell["effects"]:
            e = cell["effects"][cell["mixture"]]["endpoint_rmse"]
            effect[i, j] = e["mean"]
            shift = "\n".join(f"{key.replace('_', ' ')} {cell['shift'][key]:.2f}" for key in SHIFTS)
            grid.text(j, i, f"{e['mean']:+.1f} %\n[{e['low']:+.1f}, {e['high']:+.1f}]\n{shift}", ha="center", va="center", fontsize=7)
    limit = np.nanmax(np.abs(effect), initial=1.0)
    grid.imshow(effect, cmap="PiYG_r", vmin=-limit, vmax=limit, aspect="auto", alpha=0.6)
    grid.set_xticks(range(len(STEPS)), [str(n) for n in STEPS])
    grid.set_yticks(range(len(GUIDANCE)), [f"{w:g}" for w in GUIDANCE])
    grid.set(xlabel="student steps", ylabel="guidance w", title="DDIL's RMSE to teacher against forward-only", box_aspect=0.75)
    for axis, (measure, label) in zip(scatters, SHIFTS.items(), strict=True):
        for marker, arm in zip("osD^", ("ddil", "student", "half", "half teacher"), strict=True):
            cells = [cell for cell in found.values() if arm in cell["effects"]]
            if cells:
                effects = [cell["effects"][arm]["endpoint_rmse"] for cell in cells]
                y = [e["mean"] for e in effects]
                error = [[e["mean"] - e["low"] for e in effects], [e["high"] - e["mean"] for e in effects]]
                axis.errorbar([cell["shift"][measure] for cell in cells], y, error, fmt=marker, label=arm, capsize=2, alpha=0.8)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(xlabel=label, ylabel="effect on RMSE to teacher, %")
        axis.legend(fontsize=8)
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
    if not found:
        parser.error(f"--runs {args.runs}: none of these cells has run there; leave --report_only out, or name another folder")
    adjust(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"env": args.env, "seeds": args.seeds, **result["provenance"]}
    args.out.write_text(json.dumps({"cells": found, "predicts": predicts(found), **provenance}, indent=1))
    draw(found, args.out.with_suffix(".png"))
    told = [
        f"Spearman, {measure} against the mixture's effect: {c['rho']:+.2f}, p = {c['p']:.3f}, {c['cells']} cells"
        for measure, c in predicts(found).items()
    ]
    table = "\n\n".join([markdown(found), *told])
    args.out.with_suffix(".md").write_text(f"# When does DDIL help?\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
