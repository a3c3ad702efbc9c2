"""The ablations of configs/ablations, on digits and on the Gaussian mixture: each arm against its baseline, paired by seed.

    python benchmarks/ablations.py --jobs 2                       # hours on two cores; goes on where it stopped
    python benchmarks/ablations.py --names priors --envs digits8  # one of them
    python benchmarks/ablations.py --report_only                  # the tables, from the runs that are there

Each is the comparison `python -m ddil_agents.compare --config NAME --env ENV`, with 2000 gradient steps on the mixture; its page is among
the runs. Tables that --out holds already, of other ablations, stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from ddil_agents.compare import compare
from ddil_agents.comparison.arms import Comparison, merge_settings
from ddil_agents.comparison.page import write_page
from ddil_agents.comparison.statistics import paired_comparison
from ddil_agents.training.checkpoint import write_atomically
from ddil_env.presets import find_preset, read_yaml

NAMES = ("priors", "thresholding", "teacher_share", "matched_compute", "replay", "baselines")
ENVS: dict[str, dict[str, Any]] = {"digits8": {}, "gaussian_mixture": {"num_updates": 2000}}
METRICS = {"endpoint_rmse": "RMSE to teacher", "frechet_to_expert": "Fréchet to teacher", "frechet": "Fréchet", "recall": "recall"}


def settings_of(name: str, env: str) -> Comparison:
    """An ablation's settings on one expert."""
    given = read_yaml(find_preset("ablations", name))
    return Comparison(**merge_settings(given, {"env": env, "shared": ENVS[env]}))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """By budget and arm: each metric's mean, and its paired difference from the baseline, in per cent of the baseline's mean."""
    baseline, found = result["comparison"]["baseline"], {}
    for budget, tier in result["budgets"].items():
        rows: dict[str, Any] = {}
        for arm in result["arms"]:
            runs = [run for run in tier["runs"] if run["arm"] == arm and run["done"]]
            if not runs:
                continue
            cost = {key: statistics.fmean(run[key] for run in runs) for key in ("num_updates", "teacher_nfe", "student_nfe")}
            rows[arm] = {"seeds": len(runs), **cost}
            for metric in METRICS:
                if (values := tier["statistics"].get(metric)) is None or arm not in values["arms"]:
                    continue
                base, own = values["arms"][baseline]["mean"], values["arms"][arm]["mean"]
                rows[arm][metric] = {
                    "mean": own,
                    "by_seed": dict(zip(values["arms"][arm]["seeds"], values["arms"][arm]["values"], strict=True)),
                }
                if (pair := values["pairs"].get(arm)) is not None:
                    scaled = {key: 100 * pair[key] / base for key in ("mean", "low", "high")}
                    rows[arm][metric] |= {"difference": scaled, "p_holm": pair["p_holm"]}
        found[budget] = rows
    return {"baseline": baseline, "primary": result["comparison"]["primary"], "budgets": found, "flags": result["flags"]}


def interactions(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of arms that are named by two factors, "A, B": whether B does another thing with A than with the first A, by metric.

        (y_AB − y_A0) − (y_0B − y_00), paired by seed, in per cent of the mean of y_00, the first arm

    Returns:
        By the arm AB; empty for arms that are no such grid.
    """
    factors = [list(dict.fromkeys(part)) for part in zip(*(name.partition(", ")[::2] for name in rows), strict=True)]
    if len(rows) < 4 or list(rows) != [f"{a}, {b}" for a, b in itertools.product(*factors)] or min(map(len, factors)) < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    (a_0, *some), (b_0, *more) = factors
    for (a, b), metric in itertools.product(itertools.product(some, more), METRICS):
        cells = [rows[f"{x}, {y}"].get(metric, {}).get("by_seed", {}) for x, y in ((a, b), (a, b_0), (a_0, b), (a_0, b_0))]
        seeds = sorted(set.intersection(*map(set, cells)))
        if len(seeds) > 1:
            changes = [[cells[i][s] - cells[i + 1][s] for s in seeds] for i in (0, 2)]
            pair, mean = paired_comparison(*changes), statistics.fmean(cells[3][s] for s in seeds)
            found.setdefault(f"{a}, {b}", {})[metric] = {key: 100 * getattr(pair, key) / mean for key in ("mean", "low", "high")}
    return found


def markdown(title: str, found: dict[str, Any]) -> str:
    """One ablation's tables."""
    lines = [f"## {title}", ""]
    for budget, rows in found["budgets"].items():
        heads = [f"{label}: mean, difference %" for label in METRICS.values()]
        lines += [f"Equal {budget}; differences from *{found['baseline']}*, with 95 % intervals; p after Holm, of the first.", ""]
        lines += [f"| arm | seeds | updates | teacher NFE | {' | '.join(heads)} | p |", "|---|---|---|---|" + "---|" * len(heads) + "---|"]
        for arm, row in rows.items():
            cells = []
            for metric in METRICS:
                cell = f"{row[metric]['mean']:.3g}" if metric in row else "–"
                if d := row.get(metric, {}).get("difference"):
                    cell += f", {d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
                cells.append(cell)
            p = row.get(found["primary"], {}).get("p_holm")
            costs = f"{row['seeds']} | {row['num_updates']:.0f} | {row['teacher_nfe']:,.0f}"
            lines.append(f"| {arm} | {costs} | {' | '.join(cells)} | {'' if p is None else f'{p:.3f}'} |")
        lines.append("")
        if crossed := interactions(rows):
            lines += [
                f"Interactions: what the second factor does here less what it does in *{found['baseline']}*'s row, % of that arm.",
                "",
            ]
            lines += [f"| arm | {' | '.join(METRICS.values())} |", "|---|" + "---|" * len(METRICS)]
            for arm, own in crossed.items():
                cells = [f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]" if (d := own.get(m)) else "–" for m in METRICS]
                lines.append(f"| {arm} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join([*lines, *(f"- ! {flag}" for flag in found["flags"])])


def write(path: Path, known: dict[str, Any]) -> None:
    """The JSON file, and its tables beside it."""
    titles = [f"{name}, {env}" for env in ENVS for name in NAMES]
    known = {title: known[title] for title in titles if title in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(known, indent=1))
    tables = "\n\n".join(markdown(title, one) for title, one in known.items())
    write_atomically(path.with_suffix(".md"), f"# Ablations\n\n{tables}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablations.json"))
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--envs", nargs="+", default=list(ENVS), choices=list(ENVS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    done = False
    for env in args.envs:
        for name in args.names:
            out = args.runs / f"{name}-{env}"
            if args.report_only and not any(out.glob("runs/*/*/result.json")):
                continue
            command = f"python benchmarks/ablations.py --names {name} --envs {env}"
            result = compare(settings_of(name, env), out, args.jobs, command, args.report_only)
            write_page(result, out)
            known[f"{name}, {env}"] = found = summary(result) | {"provenance": result["provenance"]}
            print(markdown(f"{name}, {env}", found), flush=True)
            write(args.out, known)
            done = True
    if not done:
        parser.error(f"--runs {args.runs}: none of these ablations has run there; leave --report_only out, or name another folder")


if __name__ == "__main__":
    main()
