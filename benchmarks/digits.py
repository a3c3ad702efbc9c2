"""BC and DAgger students of the digits expert at 4 and 2 steps, over seeds: means, 95 % intervals and paired differences.

    python benchmarks/digits.py --jobs 2                 # about 45 minutes on 2 idle cores; goes on where it stopped
    python benchmarks/digits.py --report_only            # from the runs that are there

Both agents take the same gradient steps, batch size, collections and initial weights. A label costs the same teacher
forwards whatever its source, but for the tenth of DAgger's states that the teacher's own rollouts lead to; the student's add
student forwards. Both are counted.
The noise and conditions of an evaluation are shared by all models of a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ddil_agents.evaluation.metrics.extractors import load_extractor
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_env import load_expert

METRICS = ("frechet", "frechet_to_expert", "endpoint_rmse", "precision", "recall", "coverage", "accuracy")
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval; NaN where there is one value."""
    half = T95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), half


def run(agent: str, num_steps: int, seed: int, runs: Path, settings: str) -> dict[str, Any]:
    """The result of one run, trained if it is not there, resumed if it was cut short."""
    out = runs / f"{agent}-{num_steps}-s{seed}"
    if not (out / "result.json").is_file():
        flags = f"--env digits --num_steps {num_steps} --seed {seed} --evaluate.seed {seed} --out {out} {settings}".split()
        command = [sys.executable, "-m", f"ddil_agents.{agent}", *(["--resume", str(out)] if out.exists() else flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one run a core; more threads a run than cores would fight
        log = runs / f"{out.name}.log"
        with log.open("w") as file:
            if subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
                raise SystemExit(f"{' '.join(command)} failed; see {log}")
    print(f"{out.name}: done", flush=True)
    return json.loads((out / "result.json").read_text())


def floor(settings: dict[str, Any]) -> dict[str, float]:
    """Real training pictures against other real training pictures, matched in number and classes to the evaluation."""
    n = settings["n"]
    pictures, _ = load_expert("digits").reference_data(2 * n)
    features = load_extractor(settings["extractor"]).features(pictures)
    return {"n": n, "frechet": frechet_distance(features[:n], features[n : 2 * n])}


def summary(results: dict[tuple[int, str, int], dict[str, Any]], steps: list[int], seeds: list[int]) -> dict[str, Any]:
    """Every model's metrics over seeds, and DAgger − BC, paired by seed."""
    any_result = next(iter(results.values()))
    rows: dict[str, dict[str, list[float]]] = {}
    for (_, agent, _), result in sorted(results.items(), key=lambda item: item[0]):
        if agent == "bc":  # teacher and floors are the same in DAgger's result of the seed
            rows.setdefault("training data", {})
            _append(rows["training data"], result["floors"]["training_data"])
        for name, model in result["models"].items():
            if (
                name.startswith(agent)
                or (agent == "bc" and name != "teacher@32")
                or (agent == "bc" and result["student"] == f"bc@{steps[0]}")
            ):
                _append(rows.setdefault(name, {}), model)
    paired = {}
    for n in steps:
        differences = {
            key: [results[n, "dagger", s]["models"][f"dagger@{n}"][key] - results[n, "bc", s]["models"][f"bc@{n}"][key] for s in seeds]
            for key in METRICS
        }
        own = [_last(results[n, "dagger", s], f"dagger@{n}") / _last(results[n, "bc", s], f"bc@{n}") - 1 for s in seeds]
        paired[f"dagger − bc @{n}"] = {key: (*interval(d), d) for key, d in differences.items()}
        paired[f"dagger − bc @{n}"]["last-step action error on own states, relative"] = (*interval(own), own)
    shift = {  # sliced W2 between visited latents and forward marginals, by step; mean over seeds
        f"{agent}@{n}": _mean_by_step([results[n, agent, s]["models"][f"{agent}@{n}"]["shift"] for s in seeds])
        for n in steps
        for agent in ("bc", "dagger")
    }
    floors = [results[steps[0], "bc", s]["floors"]["training_data"] for s in seeds]
    shift[f"training data, n = {floors[0]['n']}, {steps[0]} steps"] = _mean_by_step([f["shift"] for f in floors])
    return {
        "seeds": seeds,
        "shift": shift,
        "models": {name: {key: (*interval(v), v) for key, v in row.items() if len(v) > 1} for name, row in rows.items()},
        "paired": paired,
        "settings": {k: v for k, v in any_result["settings"].items() if k != "seed"},
        "num_updates": any_result["num_updates"],
        **{key: any_result[key] for key in ("date", "hardware", "python", "torch", "diffusers")},
    }


def _append(row: dict[str, list[float]], model: dict[str, Any]) -> None:
    for key in (*METRICS, "teacher_nfe", "train_seconds"):
        if model.get(key) is not None:
            row.setdefault(key, []).append(float(model[key]))


def _mean_by_step(lists: list[list[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*lists, strict=True)]


def _last(result: dict[str, Any], name: str) -> float:
    return result["models"][name]["action_mse_own"][-1]


def markdown(result: dict[str, Any]) -> str:
    """The summary as Markdown tables."""
    columns = ("frechet", "coverage", "recall", "accuracy", "endpoint_rmse", "frechet_to_expert")
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in result["models"].items():
        cells = [f"{row[key][0]:.3f} ± {row[key][1]:.3f}" if key in row else "–" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| paired difference | metric | mean ± 95 % | seeds in DAgger's favour |", "|---|---|---|---|"]
    for name, row in result["paired"].items():
        for key, (mean, half, values) in row.items():
            better = sum(v < 0 for v in values) if key.startswith(("frechet", "endpoint", "last")) else sum(v > 0 for v in values)
            lines.append(f"| {name} | {key} | {mean:+.4f} ± {half:.4f} | {better} of {len(values)} |")
    s = result["settings"]
    lines += [
        "",
        f"{len(result['seeds'])} seeds, {result['num_updates']} updates, n = {s['n']}, features of {s['extractor']}, guidance "
        f"{s['guidance_scale']:g}; {result['hardware']}, torch {result['torch']}, {result['date']}. Floor: a disjoint subset of the real "
        f"training pictures, matched in number and classes, has Fréchet distance {result['floor']['frechet']:.3f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits-benchmark"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits.json"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--num_updates", type=int, default=600)
    parser.add_argument("--updates_per_collect", type=int, default=32, help="each label serves about a quarter of it")
    parser.add_argument("--n", type=int, default=1000, help="samples of an evaluation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    seeds = list(range(args.seeds))
    settings = f"--num_updates {args.num_updates} --updates_per_collect {args.updates_per_collect}"
    settings += f" --evaluate.n {args.n} --evaluate.n_action 100"
    args.runs.mkdir(parents=True, exist_ok=True)
    cells = [(n, agent, seed) for seed in seeds for n in args.steps for agent in ("bc", "dagger")]
    if args.report_only and (missing := [c for c in cells if not (args.runs / f"{c[1]}-{c[0]}-s{c[2]}" / "result.json").is_file()]):
        raise SystemExit(f"runs are missing: {missing}")
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda cell: run(cell[1], cell[0], cell[2], args.runs, settings), cells))
    result = summary(dict(zip(cells, results, strict=True)), args.steps, seeds)
    result["floor"] = floor(results[0]["settings"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    print(markdown(result))


if __name__ == "__main__":
    main()
