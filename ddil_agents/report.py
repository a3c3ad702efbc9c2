"""From run directories to a table, curves and a sample grid.

python -m ddil_agents.report runs/bc runs/dagger --out runs/report
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddil_agents.checkpoint import write_atomically
from ddil_agents.metrics.frechet import FID_EXTRACTOR
from ddil_agents.train import read_metrics

if TYPE_CHECKING:
    from ddil_agents.evaluate import Judge

METRICS: dict[str, tuple[str, str, int]] = {  # key of a result → heading, format, and −1 where lower is better
    "frechet": ("Fréchet ↓", "{:.3g}", -1),
    "kid": ("kernel distance ↓", "{:.3g}", -1),
    "precision": ("precision ↑", "{:.3f}", 1),
    "recall": ("recall ↑", "{:.3f}", 1),
    "density": ("density ↑", "{:.3f}", 1),
    "coverage": ("coverage ↑", "{:.3f}", 1),
    "frechet_train": ("Fréchet to training data ↓", "{:.3g}", -1),
    "recall_train": ("recall of training data ↑", "{:.3f}", 1),
    "coverage_train": ("coverage of training data ↑", "{:.3f}", 1),
    "accuracy": ("accuracy ↑", "{:.3f}", 1),
    "vendi": ("Vendi ↑", "{:.3g}", 1),
    "lpips": ("LPIPS diversity ↑", "{:.3f}", 1),
    "clip_score": ("CLIP score ↑", "{:.4f}", 1),
    "hpsv2": ("HPSv2 ↑", "{:.4f}", 1),
    "frechet_to_expert": ("Fréchet to teacher ↓", "{:.3g}", -1),
    "endpoint_rmse": ("RMSE to teacher ↓", "{:.4f}", -1),
}
COLUMNS = {key: (heading, form) for key, (heading, form, _) in METRICS.items()} | {
    "nfe_per_sample": ("NFE/sample", "{:g}"),
    "teacher_nfe": ("teacher NFE (training)", "{:,d}"),
    "train_seconds": ("training s", "{:.0f}"),
}


def heading(key: str, result: dict[str, Any]) -> str:
    """What a result calls a metric or a cost: the distances of Inception's features, and of no others, are FID and KID."""
    name = COLUMNS[key][0]
    return name.replace("Fréchet", "FID").replace("kernel distance", "KID") if result["settings"]["extractor"] == FID_EXTRACTOR else name


def called(name: str, row: dict[str, Any]) -> str:
    """A floor as tables and figures name it, with how many samples it is of: distances fall with their number."""
    return f"{name.replace('_', ' ')}, n = {row['n']}" if "n" in row else name.replace("_", " ")


def measured(settings: dict[str, Any], made: dict[str, Any]) -> str:
    """How scores were measured, and where: the line below a table."""
    seed = f", evaluation seed {settings['seed']}" if "seed" in settings else ""
    against = settings.get("reference")
    data = f", against {settings['n_reference']} {against.replace('_', '-')} data" if against and "images" not in settings else ""
    how = f"n = {settings['n']}{seed}{data}, features of {settings['extractor']}, guidance {settings['guidance_scale']:g}"
    return f"{how}; {made['hardware']}, torch {made['torch']}, {made['date']}"


def markdown_table(cells: list[list[str]]) -> list[str]:
    """Its lines; of the cells (rows, columns) the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def table(result: dict[str, Any]) -> str:
    """A Markdown table, a line for each metric and cost and a column for each floor and model, and how they were measured."""
    rows = {**{called(name, values): values for name, values in result["floors"].items()}, **result["models"]}
    rows = {name: row for name, row in rows.items() if row.keys() & METRICS.keys()}  # some floors are of steps alone
    cells = [["", *rows]]
    for key, (_, form) in COLUMNS.items():
        if any(row.get(key) is not None for row in rows.values()):
            values = (row.get(key) for row in rows.values())
            cells.append([heading(key, result), *("–" if value is None else form.format(value) for value in values)])
    return "\n".join([*markdown_table(cells), "", measured(result["settings"], result)])


def picture_rows(judge: Judge, samples: dict[str, Tensor], columns: int = 20) -> dict[str, np.ndarray]:
    """Each model's first samples as one strip of pictures, (height, columns · width, 3), same noise a column."""
    rows = {}
    for name, x_0 in samples.items():
        pictures = judge.expert.decode(x_0[:columns])
        if pictures is None:
            return {}
        rows[name] = torch.cat(list(pictures), dim=1).numpy()
    return rows


def save_samples(path: Path, rows: dict[str, np.ndarray], scale: int = 3) -> bool:
    """Writes a grid of strips, each with its model's name; False where there are no pictures."""
    if not rows:
        return False
    from PIL import Image, ImageDraw

    margin = 12 + 7 * max(map(len, rows))
    strips = [np.repeat(np.repeat(row, scale, 0), scale, 1) for row in rows.values()]
    canvas = Image.new("RGB", (margin + strips[0].shape[1], sum(s.shape[0] + 4 for s in strips)), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for name, strip in zip(rows, strips, strict=True):
        draw.text((6, y + strip.shape[0] // 2 - 6), name, fill="black")
        canvas.paste(Image.fromarray(strip), (margin, y))
        y += strip.shape[0] + 4
    canvas.save(drawn := io.BytesIO(), format="PNG")
    write_atomically(path, drawn.getvalue())
    return True


def save_scatter(path: Path, judge: Judge, samples: dict[str, Tensor]) -> None:
    """For samples in the plane: one panel a model, over the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(samples), 3.2), layout="constrained")
    for axis, (name, x_0) in zip(np.atleast_1d(figure.subplots(1, len(samples), sharex=True, sharey=True)), samples.items(), strict=True):
        if judge.real is not None:
            axis.scatter(*judge.real.cpu().T, s=2, c="lightgrey")
        axis.scatter(*x_0.cpu().T, s=2)
        axis.set_title(name)
        axis.set_aspect("equal")
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, drawn.getvalue())


def save_pictures(path: Path, judge: Judge, samples: dict[str, Tensor]) -> bool:
    """The samples as a person can see them: a grid of pictures, or a scatter plot in the plane; False for other shapes."""
    if judge.expert.sample_shape == (2,):
        save_scatter(path, judge, samples)
        return True
    return save_samples(path, picture_rows(judge, samples))


def save_curves(path: Path, runs: dict[str, list[dict[str, Any]]], results: dict[str, dict[str, Any]]) -> None:
    """Loss over gradient steps and over teacher NFE; action error and covariate shift over the student's steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 7), layout="constrained")
    (loss, cost), (error, shift) = figure.subplots(2, 2)
    for name, rows in runs.items():
        rows = [row for row in rows if row["loss"] is not None]  # lines without a step of the student have none
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
    for axis in (loss, cost, error, shift):
        if axis.lines:
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, drawn.getvalue())


def read_result(path: Path) -> dict[str, Any]:
    """A run's result.json.

    Raises:
        ValueError: absent, damaged, or not a result.
    """
    try:
        result = json.loads(path.read_text())
        if not {"student", "settings", "env_config", "models", "floors"} <= result.keys():
            raise ValueError("not a run's result")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read {path} ({error}); write it again with --resume {path.parent}") from error
    return result


def merge(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Several runs' results as one.

    Raises:
        ValueError: they were measured differently; names both ways.
    """
    (first_name, first), *others = results.items()
    for name, result in others:
        for key in ("env_config", "settings"):
            if result[key] != first[key]:
                raise ValueError(
                    f"{first_name} has {key} {first[key]}, {name} {result[key]}; compare runs of one expert, judged in one way"
                )
    models: dict[str, Any] = {}
    several = len({result.get("grid") for result in results.values()}) > 1
    for name, result in results.items():
        for key, value in result["models"].items():
            if key.startswith("teacher@"):
                models.setdefault(f"{key}, {result.get('grid')} times" if several else key, value)
            elif key == name or not any(key in other["models"] for other in results.values() if other is not result):
                models[key] = value
            elif key not in results:  # both runs' students were judged in these steps
                models[f"{key}, of {name}"] = value
    return {**first, "models": models}


def main(argv: list[str] | None = None) -> None:
    from ddil_agents.cli import clear_errors, judge_of, load_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories with a result.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md, curves.png and samples.png")
    args = parser.parse_args(argv)
    with clear_errors(parser):
        learners = [load_run(path) for path in args.runs]
        results, metrics, samples = {}, {}, {}
        for path in args.runs:
            result = read_result(path / "result.json")
            name = result["student"]
            if name in results:
                raise ValueError(f"two of the runs are called {name!r}; compare runs of different agents or steps")
            results[name] = result
            metrics[name] = read_metrics(path / "metrics.jsonl")
        merged = merge(results)
        args.out.mkdir(parents=True, exist_ok=True)
        judge = judge_of(learners[0], n=20, n_action=1)
        samples = judge.baselines()
        for (name, _), learner in zip(results.items(), learners, strict=True):
            samples[name] = judge.sample(learner.student_policy, learner.grid, learner.kernel)
        save_curves(args.out / "curves.png", metrics, results)
        drawn = ["samples"] if save_pictures(args.out / "samples.png", judge, samples) else []
        text, pictures = table(merged), [*drawn, "curves"]
        shown = "\n\n".join(f"![{name}]({name}.png)" for name in pictures)
        write_atomically(args.out / "report.md", f"# {merged['env']}\n\n{text}\n\n{shown}\n")
    print(text)
    print(f"\n{args.out}: report.md, {', '.join(f'{name}.png' for name in pictures)}")


if __name__ == "__main__":
    main()
