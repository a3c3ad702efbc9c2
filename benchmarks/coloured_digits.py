"""Text to image: how often a picture shows what its caption says, for captions that no training picture had, by teacher and students.

    python benchmarks/coloured_digits.py --jobs 2                 # goes on where it stopped
    python benchmarks/coloured_digits.py --report_only            # from the runs that are there
    python benchmarks/coloured_digits.py --report_only --picture docs/coloured_digits.png   # and a grid of samples

Students are trained on the other captions alone, each with its agent's `demo` settings, and judged on 9 pictures of each of the 56.
A student that is told the guidance scale is judged at the teacher's own. Beside the students the teacher, in as many steps, from the
same noise. "real" are pictures by other hands of the same captions, through the autoencoder: what an ideal model would reach.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from digits import interval

from ddil_agents.commands.load import load_run
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.pictures import picture_rows, save_samples
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import ExpertPolicy, TimeGrid, load_expert

STEPS = (32, 8, 4, 2, 1)
STUDENTS = {  # label: agent, further settings, and the steps in which it is judged
    "bc": ("bc", "--num_steps 4", (4,)),
    "bc, 2 steps": ("bc", "--num_steps 2", (2,)),
    "dagger": ("dagger", "--num_steps 4", (4,)),
    "dagger, 2 steps": ("dagger", "--num_steps 2", (2,)),
    "dagger, told the guidance": ("dagger", "--num_steps 4 --guidance_range [1,5]", (4,)),
    "lcm": ("lcm", "", (4, 2, 1)),
    "dmd2": ("dmd2", "", (4,)),
}
KEYS = ("accuracy", "frechet", "coverage", "recall")


def folder(label: str, seed: int, runs: Path) -> Path:
    """Where a student's run is kept."""
    return runs / f"{label.replace(', ', '-').replace(' ', '-')}-s{seed}"


def train(label: str, seed: int, runs: Path, num_updates: int | None) -> None:
    """Trains a student if it is not there; resumes a run that was cut short."""
    (agent, settings, _), out = STUDENTS[label], folder(label, seed, runs)
    if not (out / "result.json").is_file():
        flags = ["--env", "coloured_digits", "--config", "demo", "--seed", str(seed), "--out", str(out), *settings.split()]
        flags += [] if num_updates is None else ["--num_updates", str(num_updates)]
        flags += ["--evaluate.n", "20", "--evaluate.n_paths", "2", "--evaluate.n_action", "1", "--evaluate.also_steps", "[]"]
        command = [sys.executable, "-m", f"ddil_agents.{agent}", *(["--resume", str(out)] if (out / "config.yaml").is_file() else flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one run a core; more threads a run than cores would fight
        with (runs / f"{out.name}.log").open("w") as log:
            if subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                raise SystemExit(f"{' '.join(command)} failed; see {log.name}")
        print(f"{out.name}: done", flush=True)


def evaluate(runs: Path, seed: int, n: int, asked: list[str]) -> dict[str, dict[str, float]]:
    """Each model of one seed, on the held-out captions: the teacher, and the students that are there."""
    path = runs / f"evaluation-s{seed}-n{n}.json"
    models: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    expert = load_expert("coloured_digits", unseen=True)
    evaluator = Evaluator(
        ExpertPolicy(expert), TimeGrid(expert.schedule, max(STEPS)), Evaluation(n=n, n_paths=2, n_action=1, seed=seed, batch_size=256)
    )

    def add(name: str, result: dict[str, Any]) -> None:
        models[name] = {key: result[key] for key in KEYS if result.get(key) is not None}
        write_atomically(path, json.dumps(models, indent=1))

    if "real" not in models:
        add("real", evaluator.floors()["training_data"])
    for steps in STEPS:
        if (name := f"teacher @{steps}") not in models:
            grid = TimeGrid(expert.schedule, steps)
            add(name, evaluator.score_expert() if steps == max(STEPS) else evaluator.evaluate(ExpertPolicy(expert), grid))
    for label in asked:
        out, names = folder(label, seed, runs), {steps: f"{label.partition(', 2')[0]} @{steps}" for steps in STUDENTS[label][2]}
        if (out / "result.json").is_file() and not all(name in models for name in names.values()):
            learner = load_run(out, unseen=True, device=str(expert.device))
            for steps, name in names.items():
                grid = TimeGrid(learner.expert.schedule, steps, learner.config.grid)
                add(name, evaluator.evaluate(learner.student_policy, grid, learner.kernel))
    return models


def draw(runs: Path, path: Path, asked: list[str], columns: int = 14) -> None:
    """Samples of the teacher and of the first seed's students: a caption a column, and the same noise."""
    expert = load_expert("coloured_digits", unseen=True)
    policy, settings = ExpertPolicy(expert), Evaluation(n=2 * columns, n_paths=2, n_action=1)
    evaluator = Evaluator(policy, TimeGrid(expert.schedule, max(STEPS)), settings)
    samples = {f"teacher @{steps}": evaluator.sample(policy, TimeGrid(expert.schedule, steps)) for steps in STEPS}
    for label in asked:
        if (folder(label, 0, runs) / "result.json").is_file():
            learner = load_run(folder(label, 0, runs), unseen=True, device=str(expert.device))
            for steps in STUDENTS[label][2]:
                grid = TimeGrid(learner.expert.schedule, steps, learner.config.grid)
                samples[f"{label.partition(', 2')[0]} @{steps}"] = evaluator.sample(learner.student_policy, grid, learner.kernel)
    save_samples(path, picture_rows(evaluator, samples, columns), scale=2)
    assert evaluator.c is not None  # captions
    print(f"{path}: {'; '.join(expert.captions(evaluator.c[:columns]))}")


def markdown(result: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    heads = ("caption agreement ↑", "Fréchet ↓", "coverage ↑", "recall ↑")
    lines = [f"| model | seeds | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for name, row in result["models"].items():
        cells = [f"{row[key][0]:.3f}" + (f" ± {row[key][1]:.3f}" if row[key][1] is not None else "") if key in row else "–" for key in KEYS]
        lines.append(f"| {name} | {len(row['accuracy'][2])} | {' | '.join(cells)} |")
    how = f"n = {result['n']}, {result['extractor']}; {result['hardware']}, torch {result['torch']}, {result['date']}"
    lines += ["", f"{how}; mean ± 95 % over seeds, of the students' training and of all models' noise."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/coloured-digits-benchmark"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coloured_digits.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=504, help="pictures of an evaluation")
    parser.add_argument("--students", nargs="*", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--num_updates", type=int, help="default: each demo's own")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    parser.add_argument("--picture", type=Path, help="write a grid of samples here, too")
    args = parser.parse_args()
    if not 2 <= args.seeds <= 10:
        parser.error(f"--seeds {args.seeds}: need 2 … 10, of which the table of t holds the quantiles")
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    seeds = list(range(args.seeds))
    if not args.report_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(
                pool.map(lambda pair: train(pair[1], pair[0], args.runs, args.num_updates), [(s, a) for s in seeds for a in args.students])
            )
    by_seed = [evaluate(args.runs, seed, args.n, args.students) for seed in seeds]
    models: dict[str, dict[str, tuple[float, float | None, list[float]]]] = {name: {} for name in by_seed[0]}
    for name, metrics in models.items():
        for key in KEYS:
            if values := [found[name][key] for found in by_seed if key in found.get(name, ())]:
                mean, half = interval(values)
                metrics[key] = mean, half if len(values) > 1 else None, values
    result = {"models": models, "n": args.n, "extractor": "fd_coloured_digits", **provenance(torch.device("cpu"))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(f"# Text to image: coloured digits, captions that were held out\n\n{markdown(result)}\n")
    print(markdown(result))
    if args.picture is not None:
        draw(args.runs, args.picture, args.students)


if __name__ == "__main__":
    main()
