"""A comparison as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

from ddil_agents.evaluation.results import METRICS, describe_measurement, kernel_distance_note, markdown_table, metric_heading


def table_rows(result: dict[str, Any], budget: str, intervals: bool = True) -> list[list[str]]:
    """Cells of a table at one budget: the headings, then a line for each reference (means) and each arm (interquartile means).

    Args:
        result: What comparison.json holds.
        budget: The budget.
        intervals: Whether to add the arms' bootstrap intervals.
    """
    metrics = result["budgets"][budget]["statistics"]
    lines = []
    for name, rows in result["references"].items():
        cells = [
            METRICS[key][1].format(statistics.fmean(row[key] for row in rows)) if rows[0].get(key) is not None else "" for key in metrics
        ]
        if any(cells):  # some floors have only values by step
            lines.append([name, str(len(rows)), *cells])
    for arm in result["arms"]:
        cells, n = [], 0
        for key in metrics:
            scores = metrics[key]["arms"].get(arm)
            n = max(n, len(scores["values"]) if scores else 0)
            form, interval = METRICS[key][1], ""
            if intervals and scores and scores["low"] is not None:
                interval = f" [{form.format(scores['low'])}, {form.format(scores['high'])}]"
            cells.append(form.format(scores["iqm"]) + interval if scores else "")
        lines.append([arm, str(n), *cells])
    return [["model", "runs", *(metric_heading(key, result) for key in metrics)], *lines]


def csv_table(result: dict[str, Any]) -> str:
    """A CSV table with a line for each run: budget, arm, seed, scores and costs."""
    file = io.StringIO()
    keys = ["budget", "arm", "seed", "done", "num_updates", *METRICS, "teacher_nfe", "student_nfe", "train_seconds", "extractor", "n"]
    settings = {key: result["settings"][key] for key in ("extractor", "n")}
    writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for budget, tier in result["budgets"].items():
        for run in tier["runs"]:
            writer.writerow({"budget": budget, **settings, **{k: "" if v is None else v for k, v in run.items()}})
    return file.getvalue()


def latex_table(result: dict[str, Any]) -> str:
    """LaTeX with a booktabs table for each budget; a comment above each says how it was measured."""
    escapes = str.maketrans(
        {c: f"\\{c}" for c in "{}$"}
        | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$"}
        | {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "é": r"\'e", "²": "$^2$"}
    )
    parts = []
    for budget in result["budgets"]:
        cells = table_rows(result, budget)
        body = [" & ".join(cell.translate(escapes) for cell in line) + r" \\" for line in cells]
        body.insert(1, r"\midrule")
        rows = "\n".join(body)
        columns = "ll" + "r" * (len(cells[0]) - 2)
        parts.append(
            f"% {result['title']}, equal {budget}: interquartile means, {result['comparison']['level']:.0%} bootstrap intervals; "
            f"{describe_measurement(result['settings'], result['provenance'])}\n"
            f"{''.join(f'% {note}' + chr(10) for note in table_notes(result, budget))}"
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{rows}\n\\bottomrule\n\\end{{tabular}}\n"
        )
    return "\n".join(parts)


def markdown(result: dict[str, Any]) -> str:
    """The tables, the paired differences of the primary metric with their intervals, and the warnings, as Markdown for a terminal."""
    parts, notes, primary, baseline = [], list[str](), result["comparison"]["primary"], result["comparison"]["baseline"]
    for budget, tier in result["budgets"].items():
        pairs = tier["statistics"].get(primary, {}).get("pairs", {})
        differences = [
            f"{arm} − {baseline}: {pair['mean']:+.3g} [{pair['low']:+.3g}, {pair['high']:+.3g}]; {pair['conclusion']}"
            for arm, pair in pairs.items()
        ]
        paired = [f"{metric_heading(primary, result)}, paired differences", *differences, ""] if differences else []
        parts += [f"equal {budget}", "", *markdown_table(table_rows(result, budget, intervals=False)), "", *paired]
        notes = notes or table_notes(result, budget)
    measurement = describe_measurement(result["settings"], result["provenance"])
    return "\n".join([*parts, *notes, measurement, *(f"! {flag}" for flag in result["flags"])])


def table_notes(result: dict[str, Any], budget: str) -> list[str]:
    """Footnotes of the table at one budget."""
    return [kernel_distance_note(result)] if "kid" in result["budgets"][budget]["statistics"] else []


def summary_line(result: dict[str, Any]) -> str:
    """One line: the primary metric of every arm, and of the teacher in all its steps, as means over seeds at equal updates."""
    primary, runs = result["comparison"]["primary"], result["budgets"]["updates"]["runs"]
    found: dict[str, list[float]] = {}
    for run in runs:
        if (value := run.get(primary)) is not None:
            found.setdefault(run["arm"], []).append(value)
    heading, form = metric_heading(primary, result), METRICS[primary][1]
    means = {arm: form.format(statistics.fmean(values)) for arm, values in found.items()}
    line = f"{heading[:-2]}: {', '.join(f'{arm} {mean}' for arm, mean in means.items()) or 'not measured'}"
    teacher = next((name for name in result["references"] if name.startswith("teacher@")), None)
    values = [row[primary] for row in result["references"].get(teacher, ()) if row.get(primary) is not None]
    if values:
        line += f"; {teacher} {form.format(statistics.fmean(values))}"
    seeds = max(map(len, found.values()), default=0)
    return f"{line} (means over {seeds} seed{'s' * (seeds != 1)})"
