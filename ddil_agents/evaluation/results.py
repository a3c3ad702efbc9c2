"""What a result.json says, as tables: the metrics, their headings, and how they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_agents.evaluation.metrics.frechet import FID_EXTRACTOR

if TYPE_CHECKING:
    pass


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
# −1 where lower is better. Those with a value for each step are averaged over the steps.
DIRECTIONS = {name: sign for name, (_, _, sign) in METRICS.items()} | dict.fromkeys(
    ("action_mse_own", "action_mse_expert", "action_mse_forward", "path_rmse", "shift"), -1
)
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


def without_rounding(value: float) -> float:
    """0 for what is 0 but for rounding, as the distance of data from themselves."""
    return 0 if abs(value) < 1e-6 else value


def table(result: dict[str, Any]) -> str:
    """A Markdown table, a line for each metric and cost and a column for each floor and model, and how they were measured."""
    rows = {**{called(name, values): values for name, values in result["floors"].items()}, **result["models"]}
    rows = {name: row for name, row in rows.items() if row.keys() & METRICS.keys()}  # some floors are of steps alone
    cells = [["", *rows]]
    for key, (_, form) in COLUMNS.items():
        if any(row.get(key) is not None for row in rows.values()):
            values = (row.get(key) for row in rows.values())
            cells.append([heading(key, result), *("–" if value is None else form.format(without_rounding(value)) for value in values)])
    return "\n".join([*markdown_table(cells), "", measured(result["settings"], result)])


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
