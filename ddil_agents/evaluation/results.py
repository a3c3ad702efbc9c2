"""Reading result.json, and showing it as a table: metrics, their headings, and how they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddil_agents.evaluation.metrics.frechet import FID_EXTRACTOR
from ddil_agents.evaluation.provenance import PROVENANCE

METRICS: dict[str, tuple[str, str, int]] = {  # key of a result → heading, format, and −1 where lower is better
    "success": ("success ↑", "{:.3f}", 1),
    "return": ("return ↑", "{:.1f}", 1),
    "route_entropy": ("entropy of routes, nats ↑", "{:.2f}", 1),
    "valid_time": ("valid time, frames ↑", "{:.1f}", 1),
    "late_shift": ("W₂ of values late in rollouts ↓", "{:.3f}", -1),
    "error_ratio": ("error on own / data's conditions ↓", "{:.2f}", -1),
    "condition_shift": ("conditions' W₂ to data ↓", "{:.3g}", -1),
    "condition_shift_to_expert": ("conditions' W₂ to teacher's ↓", "{:.3g}", -1),
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
# −1 where lower is better. A metric that has a value for each step is averaged over the steps.
DIRECTIONS = {name: sign for name, (_, _, sign) in METRICS.items()} | dict.fromkeys(
    ("action_mse_own", "action_mse_expert", "action_mse_forward", "path_rmse", "shift"), -1
)
COLUMNS = {key: (heading, form) for key, (heading, form, _) in METRICS.items()} | {
    "nfe_per_sample": ("NFE/sample", "{:g}"),
    "teacher_nfe": ("teacher NFE (training)", "{:,d}"),
    "train_seconds": ("training s", "{:.0f}"),
}


def metric_heading(key: str, result: dict[str, Any]) -> str:
    """Heading of a metric or cost in the tables of a result. On features of Inception-v3, the distances are called FID and KID."""
    name = COLUMNS[key][0]
    return name.replace("Fréchet", "FID").replace("kernel distance", "KID") if result["settings"]["extractor"] == FID_EXTRACTOR else name


def kernel_distance_note(result: dict[str, Any]) -> str:
    """A footnote for tables that show the kernel distance, in which negative numbers look like a fault."""
    name = metric_heading("kid", result).rstrip(" ↓")
    return f"{name}: an unbiased estimate, which may be negative; compare it with real data's, not with 0."


def label_floor(name: str, row: dict[str, Any]) -> str:
    """Label of a floor in tables and figures. It says the number of samples, because distances fall as that grows."""
    return f"{name.replace('_', ' ')}, n = {row['n']}" if "n" in row else name.replace("_", " ")


def describe_measurement(settings: dict[str, Any], provenance: dict[str, Any]) -> str:
    """How and where scores were measured: the line below a table."""
    seed = f", evaluation seed {settings['seed']}" if "seed" in settings else ""
    reference = settings.get("reference")
    data = f", against {settings['n_reference']} {reference.replace('_', '-')} data" if reference and "images" not in settings else ""
    episodes = f", {settings['n_episodes']} episodes" if "n_episodes" in settings else ""
    how = f"n = {settings['n']}{episodes}{seed}{data}, features of {settings['extractor']}, guidance {settings['guidance_scale']:g}"
    return f"{how}; {provenance['hardware']}, torch {provenance['torch']}, {provenance['date']}"


def markdown_table(cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table of cells (rows, columns); the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def zero_round_off(value: float) -> float:
    """The value, or 0 for round-off such as 1e-9, which the distance of data from themselves has."""
    return 0 if abs(value) < 1e-6 else value


def table(result: dict[str, Any]) -> str:
    """A Markdown table with a line for each metric and cost, a column for each floor and model, and notes on the measurement below."""
    rows = {**{label_floor(name, values): values for name, values in result["floors"].items()}, **result["models"]}
    rows = {name: row for name, row in rows.items() if row.keys() & METRICS.keys()}  # some floors have only values by step
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows.values())]
    cells = [["", *rows]]
    for key in shown:
        form, values = COLUMNS[key][1], [row.get(key) for row in rows.values()]
        texts = ("–" if value is None else form.format(zero_round_off(value)) for value in values)
        cells.append([metric_heading(key, result), *texts])
    notes = [kernel_distance_note(result)] if "kid" in shown else []
    return "\n".join([*markdown_table(cells), "", *notes, describe_measurement(result["settings"], result)])


def read_result(path: Path) -> dict[str, Any]:
    """A run's result.json.

    Raises:
        ValueError: the file is absent, damaged, or no result of a run.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check_result(result)
    except (OSError, ValueError) as error:
        run = path.parent if (path.parent / "config.yaml").is_file() else path.parent.parent  # of a stage
        raise ValueError(f"cannot read {path} ({error}); remove it, and write it again with --resume {run}") from error
    return result


def _check_result(result: Any) -> None:
    """Checks the types of what tables, figures and statistics read.

    Raises:
        ValueError: a value is missing, or of another type.
    """
    kinds = {"student": str, "settings": dict, "env_config": dict, "models": dict, "floors": dict}
    if not isinstance(result, dict) or not kinds.keys() <= result.keys():
        raise ValueError("not a run's result")
    totals = dict.fromkeys(("num_updates", "teacher_nfe", "student_nfe"), int) | dict.fromkeys(PROVENANCE, str) | {"times": list}
    for name, kind in (kinds | totals).items():
        if not isinstance(result.get(name, kind()), kind):
            raise ValueError(f"{name} is {result[name]!r:.60}, need {kind.__name__}")
    if result["student"] not in result["models"]:
        raise ValueError(f"student is {result['student']!r:.60}, which is none of its models")
    for model, row in {**result["floors"], **result["models"]}.items():
        if not isinstance(row, dict):
            raise ValueError(f"{model} is {row!r:.60}, need its metrics by name")
        for name in row.keys() & (COLUMNS.keys() | DIRECTIONS.keys()):
            values = row[name] if isinstance(row[name], list) and name not in COLUMNS else [row[name]]
            if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in values):
                raise ValueError(f"{name} of {model} is {row[name]!r:.60}, need numbers")
