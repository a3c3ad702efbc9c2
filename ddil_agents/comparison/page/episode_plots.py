"""The figures of a comparison's page over the frames of an episode, for experts with a world."""

from __future__ import annotations

import math
from typing import Any

from ddil_agents.comparison.page.figures import Group, Line, line_figure
from ddil_agents.comparison.page.plots import BAND, count_runs, models, step_values

Row = dict[str, Any]
SPANS: dict[str, tuple[str, str, str]] = {  # key of a list over parts of an episode → title, y axis, what to look for
    "survival": ("Survival", "share of episodes that go on", "An episode may end early because it succeeded: read it beside the success."),
    "error_own": ("Error on the model's own conditions", "E (x_0 − x_0*)²",
                  "Squared error of a sample, per entry, against the teacher's from the same noise, on the conditions of own episodes."),
    "error_expert": ("Error on the teacher's conditions", "E (x_0 − x_0*)²", "The same on the conditions of the teacher's episodes."),
    "error_growth": ("Own conditions against data's", "error, own / held-out data",
                     "1: own conditions are no harder than data. Where errors feed back, the ratio grows along the episode."),
}  # fmt: skip


def episode_figures(result: dict[str, Any], budget: str) -> Group:
    """All metrics that have a value for each part of an episode."""
    group = Group("Along an episode", [])
    for key, (title, y, look_for) in SPANS.items():
        lines, n = [], 0
        for name, style, rows in models(result, budget):
            lists = [values for row in rows if (values := span_values(row, key))]
            if lists:
                spans = len(lists[0])
                lines.append(Line.over(name, style, [(i + 1) / spans for i in range(spans)], lists))
                n = max(n, len(lists) if name in result["arms"] else 0)
        if n:
            caption = f"{look_for} {count_runs(n)} an arm. {BAND}."
            group.add(line_figure(f"{key}-{budget}", title, caption, lines, "part of the longest possible episode", y), lines)
    return group


def span_values(row: Row, key: str) -> list[float]:
    """A row's values by part of an episode, NaN where no episode is so long; empty without such values."""
    if key != "error_growth":
        return step_values(row, key)
    data = row.get("error_data")
    return [own / data if data else math.nan for own in step_values(row, "error_own")]
