"""A comparison as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

from ddil_agents.evaluation.results import METRICS, heading, markdown_table, measured


def table_rows(result: dict[str, Any], budget: str, intervals: bool = True) -> list[list[str]]:
    """Headings, and a line for each: a reference's mean, an arm's interquartile mean and, unless left out, its interval."""
    found = result["budgets"][budget]["statistics"]
    lines = []
    for name, rows in result["references"].items():
        cells = [
            METRICS[key][1].format(statistics.fmean(row[key] for row in rows)) if rows[0].get(key) is not None else "" for key in found
        ]
        if any(cells):  # some floors are of steps alone
            lines.append([name, str(len(rows)), *cells])
    for arm in result["arms"]:
        cells, n = [], 0
        for key in found:
            own = found[key]["arms"].get(arm)
            n = max(n, len(own["values"]) if own else 0)
            form = METRICS[key][1]
            span = f" [{form.format(own['low'])}, {form.format(own['high'])}]" if intervals and own and own["low"] is not None else ""
            cells.append(form.format(own["iqm"]) + span if own else "")
        lines.append([arm, str(n), *cells])
    return [["model", "runs", *(heading(key, result) for key in found)], *lines]


def csv_table(result: dict[str, Any]) -> str:
    """A line for each run: its budget, arm, seed, scores and costs."""
    file = io.StringIO()
    keys = ["budget", "arm", "seed", "done", "num_updates", *METRICS, "teacher_nfe", "student_nfe", "train_seconds", "extractor", "n"]
    how = {key: result["settings"][key] for key in ("extractor", "n")}
    writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for budget, tier in result["budgets"].items():
        for run in tier["runs"]:
            writer.writerow({"budget": budget, **how, **{k: "" if v is None else v for k, v in run.items()}})
    return file.getvalue()


def latex_table(result: dict[str, Any]) -> str:
    """A booktabs table for each budget."""
    plain = str.maketrans(
        {c: f"\\{c}" for c in "{}$"}
        | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$"}
        | {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "é": r"\'e", "²": "$^2$"}
    )
    parts = []
    for budget in result["budgets"]:
        cells = table_rows(result, budget)
        body = [" & ".join(cell.translate(plain) for cell in line) + r" \\" for line in cells]
        body.insert(1, r"\midrule")
        rows = "\n".join(body)
        columns = "ll" + "r" * (len(cells[0]) - 2)
        parts.append(
            f"% {result['title']}, equal {budget}: interquartile means, {result['comparison']['level']:.0%} bootstrap intervals; "
            f"{measured(result['settings'], result['provenance'])}\n"
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{rows}\n\\bottomrule\n\\end{{tabular}}\n"
        )
    return "\n".join(parts)


def markdown(result: dict[str, Any]) -> str:
    """The tables, and the paired differences of the primary metric with their intervals, for a terminal."""
    parts, primary, baseline = [], result["comparison"]["primary"], result["comparison"]["baseline"]
    for budget, tier in result["budgets"].items():
        pairs = tier["statistics"].get(primary, {}).get("pairs", {})
        said = [
            f"{arm} − {baseline}: {pair['mean']:+.3g} [{pair['low']:+.3g}, {pair['high']:+.3g}]; {pair['conclusion']}"
            for arm, pair in pairs.items()
        ]
        shown = [f"{heading(primary, result)}, paired", *said, ""] if said else []
        parts += [f"equal {budget}", "", *markdown_table(table_rows(result, budget, intervals=False)), "", *shown]
    return "\n".join([*parts, measured(result["settings"], result["provenance"]), *(f"! {flag}" for flag in result["flags"])])
