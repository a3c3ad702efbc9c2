"""The table of throughput.py: times, ratios with their intervals, and the share of the limit."""

from __future__ import annotations

import statistics
from typing import Any

from rollout import interval

TARGETS = {"rollout, unroll": (1.0, 1.5), "lcm, fresh": (1.15, 1.5)}  # the least ratio, on a CPU and on a GPU


def row(name: str, ours: list[float], theirs: list[float], limit: list[float], device: str) -> dict[str, Any]:
    """One line of the table."""
    return {
        "name": name,
        "ours_ms": 1e3 * statistics.median(ours),
        "theirs_ms": 1e3 * statistics.median(theirs),
        "ratio": interval([b / a for a, b in zip(ours, theirs, strict=True)]),
        "target": TARGETS.get(name, (None, None))[device.startswith("cuda")],
        "limit_ms": 1e3 * statistics.median(limit),
        "of_limit": interval([b / a for a, b in zip(ours, limit, strict=True)]),
        "theirs_of_limit": interval([b / a for a, b in zip(theirs, limit, strict=True)]),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"    {result['command']}",
        "",
        f"{result['model']} UNet ({result['parameters']:,} weights), batch {result['batch_size']}, {result['dtype']}"
        f"{', compiled' if result['compile'] else ''}; {result['rounds']} rounds; {result['hardware']}; "
        f"torch {result['torch']}, diffusers {result['diffusers']}; {result['date']}",
        "",
        "| | ours, ms | theirs, ms | theirs / ours | target | limit, ms | of limit | theirs of limit | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in result["rows"]:
        ratio, of_limit = ("{:.3f} ({:.3f} … {:.3f})".format(*line[key]) for key in ("ratio", "of_limit"))
        target = "" if line["target"] is None else f"≥ {line['target']:g}"
        lines.append(
            f"| {line['name']} | {line['ours_ms']:.2f} | {line['theirs_ms']:.2f} | {ratio} | {target} "
            f"| {line['limit_ms']:.2f} | {of_limit} | {line['theirs_of_limit'][0]:.3f} | {line['difference']:.0e} |"
        )
    return "\n".join(lines) + "\n"
