"""A report of several runs: a table, training curves and a grid of samples.

    python -m ddil_agents.report runs/bc runs/dagger --out runs/report

It reads result.json, metrics.jsonl and, of runs with --evaluate_every, eval.jsonl.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.load import load_run, make_evaluator
from ddil_agents.evaluation.pictures import save_pictures
from ddil_agents.evaluation.results import DIRECTIONS, read_result, table
from ddil_agents.training.checkpoint import write_atomically
from ddil_agents.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Rows = list[dict[str, Any]]


def save_curves(path: Path, runs: dict[str, Rows], results: dict[str, dict[str, Any]], evaluations: dict[str, Rows] | None = None) -> None:
    """Draws the training loss over gradient steps and over teacher NFE, action error and covariate shift over the student's steps.

    If there are evaluations, it also draws their first metric over gradient steps.

    Args:
        path: The PNG.
        runs: Lines of metrics.jsonl, by run.
        results: result.json, by run.
        evaluations: Lines of eval.jsonl, by run; of runs that have them.
    """
    columns = 3 if evaluations else 2
    figure = Figure(figsize=(6 * columns, 7), layout="constrained")
    grid = figure.subplots(2, columns)
    (loss, cost), (error, shift) = grid[:, :2]
    if evaluations:
        plot_evaluations(grid[0, 2], evaluations)
        grid[1, 2].axis("off")
    for name, rows in runs.items():
        rows = [row for row in rows if row["loss"] is not None]  # lines without an update of the student have none
        values = [row["loss"] for row in rows]
        loss.plot([row["step"] for row in rows], values, label=name)
        cost.plot([row["teacher_nfe"] for row in rows], values, label=name)
    for axis, label in ((loss, "gradient steps"), (cost, "teacher NFE")):
        axis.set(xlabel=label, ylabel="training loss (on its own states)", yscale="log")
    floor = None
    for name, result in results.items():
        student = result["models"][name]
        steps = range(1, len(student["action_mse_own"]) + 1)
        (line,) = error.plot(steps, student["action_mse_own"], marker="o", label=f"{name}, own states")
        error.plot(steps, student["action_mse_expert"], marker="o", ls="--", color=line.get_color(), label=f"{name}, expert's states")
        if student["shift"]:
            shift.plot(steps, student["shift"], marker="o", label=name)
            floor = result["floors"].get("training_data", {}).get("shift")
    for axis in (error, shift):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    error.set(xlabel="step", ylabel="action error, E (a − a*)²", yscale="log")
    shift.set(xlabel="step", ylabel="sliced W2 to forward marginals")
    if floor is not None:
        shift.plot(range(1, len(floor) + 1), floor, ls=":", c="grey", label="training data")
    for axis in grid.flat:
        if axis.lines:
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, png.getvalue())


def plot_evaluations(axis: Axes, evaluations: dict[str, Rows]) -> None:
    """Plots the first metric of each run's evaluations during training over gradient steps; a star marks the best evaluation."""
    metrics = {name: next(key for key in rows[0] if key in DIRECTIONS) for name, rows in evaluations.items()}
    for name, rows in evaluations.items():
        metric, several = metrics[name], len(set(metrics.values())) > 1
        steps, values = ([row[key] for row in rows] for key in ("step", metric))
        (line,) = axis.plot(steps, values, marker=".", label=f"{name}, {metric}" if several else name)
        best = max(i for i, row in enumerate(rows) if row["best"] or i == 0)  # the last one that was the best so far
        axis.plot(steps[best], values[best], marker="*", ms=12, ls="", color=line.get_color())
    axis.set(xlabel="gradient steps", ylabel=f"validation: {', '.join(dict.fromkeys(metrics.values()))}")


def merge_results(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Merges the results of several runs into one, with the models of all.

    Raises:
        ValueError: two runs were evaluated differently; the message names both ways.
    """
    (first_name, first), *others = results.items()
    for name, result in others:
        for key in ("env_config", "settings"):
            if result[key] != first[key]:
                raise ValueError(
                    f"{first_name} has {key} {first[key]}, {name} {result[key]}; compare runs of one expert, evaluated in one way"
                )
    models: dict[str, Any] = {}
    several = len({result.get("grid") for result in results.values()}) > 1
    for name, result in results.items():
        for key, value in result["models"].items():
            if key.startswith("teacher@"):
                models.setdefault(f"{key}, {result.get('grid')} times" if several else key, value)
            elif key == name or not any(key in other["models"] for other in results.values() if other is not result):
                models[key] = value
            elif key not in results:  # several students were evaluated in this number of steps
                models[f"{key}, of {name}"] = value
    return {**first, "models": models}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m ddil_agents.report", description=__doc__, formatter_class=raw)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories with a result.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md, curves.png and samples.png")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out} is a file; name a folder")
        learners = [load_run(path) for path in args.runs]
        results, metrics, evaluations = {}, {}, {}
        for path in args.runs:
            result = read_result(path / "result.json")
            name = result["student"]
            if name in results:
                raise ValueError(f"two of the runs are called {name!r}; compare runs of different agents or steps")
            results[name] = result
            metrics[name] = read_metrics(path / "metrics.jsonl", needs=("loss", "teacher_nfe"))
            if (path / "eval.jsonl").is_file() and (rows := read_metrics(path / "eval.jsonl", needs=("best",))):
                evaluations[name] = rows
        merged = merge_results(results)
        args.out.mkdir(parents=True, exist_ok=True)
        evaluator = make_evaluator(learners[0], n=20, n_action=1)
        samples = evaluator.baselines()
        for (name, _), learner in zip(results.items(), learners, strict=True):
            samples[name] = evaluator.sample(learner.student_policy, learner.grid, learner.kernel)
        save_curves(args.out / "curves.png", metrics, results, evaluations)
        has_pictures = save_pictures(args.out / "samples.png", evaluator, samples)
        text, pictures = table(merged), ["samples", "curves"] if has_pictures else ["curves"]
        images = "\n\n".join(f"![{name}]({name}.png)" for name in pictures)
        write_atomically(args.out / "report.md", f"# {merged['env']}\n\n{text}\n\n{images}\n")
    print(text)
    print(f"\n{args.out}: report.md, {', '.join(f'{name}.png' for name in pictures)}")


if __name__ == "__main__":
    main()
