"""The ablations of configs/ablations, on digits and on the Gaussian mixture: each arm against its baseline, paired by seed.

    python benchmarks/ablations.py --jobs 2                       # hours on two cores; goes on where it stopped
    python benchmarks/ablations.py --names priors --envs digits8  # one of them
    python benchmarks/ablations.py --report_only                  # the tables, from the runs that are there

Each is the comparison `python -m ddil_agents.compare --config NAME --env ENV`, with 2000 gradient steps on the mixture; its page is among
the runs. Tables that --out holds already, of other ablations, stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ddil_agents.compare import Comparison, compare, merged
from ddil_agents.page import write_page
from ddil_env.presets import find_preset, read_yaml

NAMES = ("priors", "thresholding", "teacher_share", "matched_compute", "replay")
ENVS: dict[str, dict[str, Any]] = {"digits8": {}, "gaussian_mixture": {"num_updates": 2000}}
METRICS = {"endpoint_rmse": "RMSE to teacher", "frechet_to_expert": "Fréchet to teacher", "frechet": "Fréchet", "recall": "recall"}


def settings_of(name: str, env: str) -> Comparison:
    """An ablation's settings on one expert."""
    given = read_yaml(find_preset("ablations", name))
    return Comparison(**merged(given, {"env": env, "shared": ENVS[env]}))


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
                rows[arm][metric] = {"mean": own}
                if (pair := values["pairs"].get(arm)) is not None:
                    scaled = {key: 100 * pair[key] / base for key in ("mean", "low", "high")}
                    rows[arm][metric] |= {"difference": scaled, "p_holm": pair["p_holm"]}
        found[budget] = rows
    return {"baseline": baseline, "primary": result["comparison"]["primary"], "budgets": found, "flags": result["flags"]}


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
    return "\n".join([*lines, *(f"- ! {flag}" for flag in found["flags"])])


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
    found: dict[str, Any] = {}
    for env in args.envs:
        for name in args.names:
            out = args.runs / f"{name}-{env}"
            if args.report_only and not out.is_dir():
                continue
            command = f"python benchmarks/ablations.py --names {name} --envs {env}"
            result = compare(settings_of(name, env), out, args.jobs, command, args.report_only)
            write_page(result, out)
            found[f"{name}, {env}"] = summary(result) | {"provenance": result["provenance"]}
            print(markdown(f"{name}, {env}", found[f"{name}, {env}"]), flush=True)
    if not found:
        parser.error(f"--runs {args.runs}: none of these ablations has run there; leave --report_only out, or name another folder")
    titles = [f"{name}, {env}" for env in ENVS for name in NAMES]
    found = {title: (known | found)[title] for title in titles if title in known | found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1))
    tables = "\n\n".join(markdown(title, one) for title, one in found.items())
    args.out.with_suffix(".md").write_text(f"# Ablations\n\n{tables}\n")


if __name__ == "__main__":
    main()
