"""Conclusions of the statistical tests as sentences, and the tables of the page."""

from __future__ import annotations

import re
import statistics
from typing import Any, NamedTuple

from ddil_agents.comparison.page.figures import format_number
from ddil_agents.comparison.statistics import bootstrap_interval, interquartile_mean
from ddil_agents.comparison.tables import table_notes
from ddil_agents.evaluation.results import COLUMNS, METRICS, metric_heading

BUDGETS = {
    "updates": "gradient steps",
    "teacher_nfe": "teacher forwards",
    "nfe": "forwards of teacher and student",
    "seconds": "seconds of training",
}
SETTING_LABELS = {
    "n": "Samples of each model",
    "n_reference": "Samples of the reference",
    "n_paths": "Trajectories compared step by step",
    "n_action": "Trajectories with action errors",
    "guidance_scale": "Guidance",
}
COSTS = {"num_updates": ("gradient steps", "{:,.0f}")} | {
    key: (label, form.replace("d}", ".0f}")) for key, (label, form) in COLUMNS.items() if key not in METRICS
}  # means over runs need no whole-format_number format


class Cell(NamedTuple):
    """A cell of a table: text, a smaller line below, and whether a test shows it to be better (bold)."""

    text: str
    small: str = ""
    strong: bool = False


def format_percent(x: float) -> str:
    """Formats a fraction in per cent."""
    return f"{100 * x:.3g} %"


def join_last_word(heading: str) -> str:
    """Puts a no-break space before the arrow or unit at the end of a heading."""
    return re.sub(r" (?=.$)", "\N{NO-BREAK SPACE}", heading)


def format_signed(x: float) -> str:
    """Formats a number with its sign and three digits."""
    return f"{x:+.3g}".replace("-", "−")


def conclusions(result: dict[str, Any]) -> list[str]:
    """Conclusions of the tests of the primary metric as sentences; arms and budgets with the same conclusion share a sentence."""
    settings, budgets_by_text = result["comparison"], dict[str, list[str]]()
    for budget, tier in result["budgets"].items():
        metric, arms_by_conclusion = tier["statistics"].get(settings["primary"]), dict[str, list[str]]()
        for arm, pair in metric["pairs"].items() if metric else ():
            arms_by_conclusion.setdefault(str(pair["conclusion"]), []).append(arm)
        texts = [
            f"{', '.join(arms)} against {settings['baseline']}: {text}" if text.startswith("no") else text
            for text, arms in arms_by_conclusion.items()
        ]
        untested = "nothing can be tested: a test needs two seeds of the baseline and of another arm" if metric else "nothing was measured"
        budgets_by_text.setdefault("; ".join(texts) or untested, []).append(f"at equal {BUDGETS[budget]}")
    name = metric_heading(settings["primary"], result)
    return [f"In {name} {' and '.join(budgets)}, {text}." for text, budgets in budgets_by_text.items()]


def better_arms(result: dict[str, Any], budget: str, metric: str) -> set[str]:
    """Arms that are significantly better than the baseline; or the baseline, if all other arms are significantly worse."""
    pairs = result["budgets"][budget]["statistics"][metric]["pairs"]
    gains = {arm: METRICS[metric][2] * pair["mean"] for arm, pair in pairs.items() if pair["shown"]}
    worse = sum(gain < 0 for gain in gains.values())
    return (
        {result["comparison"]["baseline"]}
        if worse and worse == len(result["arms"]) - 1
        else {arm for arm, gain in gains.items() if gain > 0}
    )


def find_unfinished(result: dict[str, Any]) -> list[str]:
    """Warnings about runs without a result that no other warning explains."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for budget, tier in result["budgets"].items():
        for run in tier["runs"]:
            if not run["done"] and not any(flag.startswith(f"{run['directory'].removeprefix('runs/')}:") for flag in result["flags"]):
                seeds.setdefault((run["arm"], BUDGETS[budget]), []).append(str(run["seed"]))
    return [f"{arm}: no result of seed {', '.join(arm_seeds)} (equal {budget})" for (arm, budget), arm_seeds in seeds.items()]


def describe_setup(result: dict[str, Any]) -> dict[str, str]:
    """Settings, measurement and provenance of a comparison, as labels and texts."""
    settings, provenance = result["comparison"], dict(result["provenance"])
    expert = ", ".join(f"{key} = {value}" for key, value in result["env_config"].items() if value is not None)
    return {
        "Expert": f"{result['env']} ({expert})",
        "Seeds": f"{settings['seeds']}, from {settings['first_seed']} on, paired",
        "Budgets": "; ".join(f"equal {BUDGETS[budget]}" for budget in settings["equal"]),
        "Baseline": settings["baseline"],
        "Primary metric": metric_heading(settings["primary"], result),
        **{SETTING_LABELS.get(key, key.replace("_", " ").capitalize()): str(value) for key, value in result["settings"].items()},
        "Date and hardware": f"{provenance.pop('date')}, {provenance.pop('hardware')}",
        "Versions": ", ".join(f"{package} {version}" for package, version in provenance.items()),
    }


def iqm_cell(values: list[float], form: str, level: float, strong: bool = False) -> Cell:
    """A cell with the interquartile mean, and its bootstrap interval below."""
    low_high = bootstrap_interval(values, interquartile_mean, level) if len(values) > 1 else ()
    return Cell(form.format(interquartile_mean(values)), f"[{', '.join(map(form.format, low_high))}]" if low_high else "", strong)


def mean_cell(rows: list[dict[str, Any]], key: str, form: str) -> Cell:
    """A cell with the mean over the rows that have the key."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return Cell(form.format(statistics.fmean(values)) if values else "–")


def score_tables(result: dict[str, Any], budget: str) -> dict[str, Any]:
    """The tables of one budget: scores, paired differences, normalised scores, and every run."""
    metrics, runs, level = result["budgets"][budget]["statistics"], result["budgets"][budget]["runs"], result["comparison"]["level"]
    costs = {key: spec for key, spec in COSTS.items() if any(run.get(key) is not None for run in runs)}
    forms = {metric: METRICS[metric][1] for metric in metrics} | {key: form for key, (_, form) in costs.items()}
    better = {metric: better_arms(result, budget, metric) for metric in metrics}
    scores, normalised = {}, {}
    for arm in result["arms"]:
        done = [run for run in runs if run["arm"] == arm and run["done"]]
        by_metric = {metric: metrics[metric]["arms"].get(arm, {}) for metric in metrics}
        cells = [iqm_cell(s["values"], METRICS[m][1], level, arm in better[m]) if s else Cell("–") for m, s in by_metric.items()]
        scores[arm] = [Cell(str(len(done))), *cells, *(mean_cell(done, key, form) for key, (_, form) in costs.items())]
        if any("normalised" in s for s in by_metric.values()):
            normalised[arm] = [iqm_cell(s["normalised"], "{:.2f}", level) if "normalised" in s else Cell("–") for s in by_metric.values()]
    return {
        "budget": budget,
        "metrics": [join_last_word(metric_heading(metric, result)) for metric in metrics],
        "costs": [join_last_word(label) for label, _ in costs.values()],
        "references": {
            name: [Cell(str(len(rows))), *(mean_cell(rows, key, form) for key, form in forms.items())]
            for name, rows in result["references"].items()
            if rows[0].keys() & METRICS.keys()
        },
        "scores": scores,
        "normalised": normalised,
        "notes": table_notes(result, budget),
        "pairs": {
            metric: [
                [
                    arm,
                    Cell(format_signed(pair["mean"]), f"[{format_signed(pair['low'])}, {format_signed(pair['high'])}]"),
                    *(Cell(format_number(pair[key])) for key in ("p", "p_holm")),
                    Cell(format_percent(pair["probability_of_improvement"])),
                    pair["conclusion"],
                ]
                for arm, pair in metrics[metric]["pairs"].items()
            ]
            for metric in metrics
            if metrics[metric]["pairs"]
        },
        "runs": [
            [
                run["arm"],
                str(run["seed"]),
                *(form.format(run[key]) if run.get(key) is not None else "–" for key, form in forms.items()),
                "finished" if run["done"] else "not finished",
            ]
            for run in runs
        ],
    }
