"""What the tests of a comparison say, in sentences and tables."""

from __future__ import annotations

import re
import statistics
from typing import Any, NamedTuple

from ddil_agents.comparison.page.figures import number
from ddil_agents.comparison.statistics import bootstrap_interval, interquartile_mean
from ddil_agents.evaluation.results import COLUMNS, METRICS, heading

BUDGETS = {
    "updates": "gradient steps",
    "teacher_nfe": "teacher forwards",
    "nfe": "forwards of teacher and student",
    "seconds": "seconds of training",
}
MEASURED = {
    "n": "Samples a model",
    "n_reference": "… of the reference",
    "n_paths": "… for paths",
    "n_action": "… for action errors",
    "guidance_scale": "Guidance",
}
COSTS = {"num_updates": ("gradient steps", "{:,.0f}")} | {
    key: (label, form.replace("d}", ".0f}")) for key, (label, form) in COLUMNS.items() if key not in METRICS
}  # as means over runs, which are no whole numbers


class Cell(NamedTuple):
    """Of a table: its text, a smaller line below it, and whether a test supports its being better."""

    text: str
    small: str = ""
    strong: bool = False


def percent(x: float) -> str:
    return f"{100 * x:.3g} %"


def unbroken(heading: str) -> str:
    """Its arrow or unit stays with its last word."""
    return re.sub(r" (?=.$)", "\N{NO-BREAK SPACE}", heading)


def signed(x: float) -> str:
    return f"{x:+.3g}".replace("-", "−")


def conclusions(result: dict[str, Any]) -> list[str]:
    """What the tests of the primary metric say; arms and budgets that share a conclusion share a sentence."""
    parts, said = result["comparison"], dict[str, list[str]]()
    for budget, tier in result["budgets"].items():
        found, arms = tier["statistics"].get(parts["primary"]), dict[str, list[str]]()
        for arm, pair in found["pairs"].items() if found else ():
            arms.setdefault(str(pair["conclusion"]), []).append(arm)
        texts = [f"{', '.join(own)} against {parts['baseline']}: {text}" if text.startswith("no") else text for text, own in arms.items()]
        nothing = "nothing can be tested: that takes two seeds of the baseline and of another arm" if found else "nothing was measured"
        said.setdefault("; ".join(texts) or nothing, []).append(f"at equal {BUDGETS[budget]}")
    return [f"In {heading(parts['primary'], result)} {' and '.join(budgets)}, {text}." for text, budgets in said.items()]


def supported(result: dict[str, Any], budget: str, metric: str) -> set[str]:
    """Arms shown to be better than the baseline; or the baseline, where all others are shown to be worse."""
    parts, found = result["comparison"], result["budgets"][budget]["statistics"][metric]
    gains = {arm: METRICS[metric][2] * pair["mean"] for arm, pair in found["pairs"].items() if pair["shown"]}
    worse = sum(gain < 0 for gain in gains.values())
    return {parts["baseline"]} if worse and worse == len(result["arms"]) - 1 else {arm for arm, gain in gains.items() if gain > 0}


def unfinished(result: dict[str, Any]) -> list[str]:
    """Runs that left no result, nor a flag that says why."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for budget, tier in result["budgets"].items():
        for run in tier["runs"]:
            if not run["done"] and not any(flag.startswith(f"{run['directory'].removeprefix('runs/')}:") for flag in result["flags"]):
                seeds.setdefault((run["arm"], BUDGETS[budget]), []).append(str(run["seed"]))
    return [f"{arm}: no result of seed {', '.join(own)} (equal {budget})" for (arm, budget), own in seeds.items()]


def settings(result: dict[str, Any]) -> dict[str, str]:
    """What was compared, how it was measured, and on what."""
    parts, made = result["comparison"], dict(result["provenance"])
    expert = ", ".join(f"{key} = {value}" for key, value in result["env_config"].items() if value is not None)
    return {
        "Expert": f"{result['env']} ({expert})",
        "Seeds": f"{parts['seeds']}, from {parts['first_seed']} on, paired",
        "Budgets": "; ".join(f"equal {BUDGETS[budget]}" for budget in parts["equal"]),
        "Baseline": parts["baseline"],
        "Primary metric": heading(parts["primary"], result),
        **{MEASURED.get(key, key.replace("_", " ").capitalize()): str(value) for key, value in result["settings"].items()},
        "Made": f"{made.pop('date')} on {made.pop('hardware')}",
        "Versions": ", ".join(f"{package} {version}" for package, version in made.items()),
    }


def located(values: list[float], form: str, level: float, strong: bool = False) -> Cell:
    """The interquartile mean and its interval."""
    low_high = bootstrap_interval(values, interquartile_mean, level) if len(values) > 1 else ()
    return Cell(form.format(interquartile_mean(values)), f"[{', '.join(map(form.format, low_high))}]" if low_high else "", strong)


def average(rows: list[dict[str, Any]], key: str, form: str) -> Cell:
    """Over rows that have the key."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return Cell(form.format(statistics.fmean(values)) if values else "–")


def tables(result: dict[str, Any], budget: str) -> dict[str, Any]:
    """One budget's scores, paired differences, scores between untrained and teacher, and every run."""
    found, runs, level = result["budgets"][budget]["statistics"], result["budgets"][budget]["runs"], result["comparison"]["level"]
    costs = {key: spec for key, spec in COSTS.items() if any(run.get(key) is not None for run in runs)}
    forms = {metric: METRICS[metric][1] for metric in found} | {key: form for key, (_, form) in costs.items()}
    best = {metric: supported(result, budget, metric) for metric in found}
    scores, scaled = {}, {}
    for arm in result["arms"]:
        done = [run for run in runs if run["arm"] == arm and run["done"]]
        own = {metric: found[metric]["arms"].get(arm, {}) for metric in found}
        cells = [located(o["values"], METRICS[m][1], level, arm in best[m]) if o else Cell("–") for m, o in own.items()]
        scores[arm] = [Cell(str(len(done))), *cells, *(average(done, key, form) for key, (_, form) in costs.items())]
        if any("normalised" in o for o in own.values()):
            scaled[arm] = [located(o["normalised"], "{:.2f}", level) if "normalised" in o else Cell("–") for o in own.values()]
    return {
        "budget": budget,
        "metrics": [unbroken(heading(metric, result)) for metric in found],
        "costs": [unbroken(label) for label, _ in costs.values()],
        "references": {
            name: [Cell(str(len(rows))), *(average(rows, key, form) for key, form in forms.items())]
            for name, rows in result["references"].items()
            if rows[0].keys() & METRICS.keys()
        },
        "scores": scores,
        "scaled": scaled,
        "pairs": {
            metric: [
                [
                    arm,
                    Cell(signed(pair["mean"]), f"[{signed(pair['low'])}, {signed(pair['high'])}]"),
                    *(Cell(number(pair[key])) for key in ("p", "p_holm")),
                    Cell(percent(pair["probability_of_improvement"])),
                    pair["conclusion"],
                ]
                for arm, pair in found[metric]["pairs"].items()
            ]
            for metric in found
            if found[metric]["pairs"]
        },
        "each": [
            [
                run["arm"],
                str(run["seed"]),
                *(form.format(run[key]) if run.get(key) is not None else "–" for key, form in forms.items()),
                "finished" if run["done"] else "not finished",
            ]
            for run in runs
        ],
    }
