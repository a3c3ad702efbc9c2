"""Is DDIL worth its rollouts? Measures a finished student and says what a rule of thumb makes of it.

    python -m ddil_agents.advise --run runs/bc

In a world it runs episodes of the student and of its teacher from the same starts, and measures

    shortfall    teacher's success − student's
    ratio        error on the conditions of the student's own episodes / on held-out data's: the covariate shift

Where behaviour cloning falls short of its teacher, half of the labels on own states made up for most of it in the cells of
`benchmarks/worlds.py`; where it does not, they changed nothing (`benchmarks/rule.py`, which fits and tests the rule). The ratio tells
why a student falls short: by meeting conditions that its data do not have, or by being too weak on the data as well.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from ddil_agents.agent import Agent
from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.help import help_of
from ddil_agents.commands.load import load_run
from ddil_agents.comparison.statistics import paired_comparison
from ddil_agents.config import LearnerConfig
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.evaluation.results import markdown_table
from ddil_agents.settings import read_arguments
from ddil_agents.training.checkpoint import is_regular, write_atomically


class Rule(NamedTuple):
    """The rule of thumb; benchmarks/results/rule.json holds the same numbers."""

    shortfall: float
    """Success by which a student must fall short of its teacher."""
    ratio: float
    """Error on own conditions over that on data, from which on own conditions are the cause."""
    gained: int
    """Cells of the benchmark in which half and half gained as much, of those below."""
    fell_short: int
    """Cells in which behaviour cloning fell short by that much."""
    noise_ahead: int
    """Cells of those in which noise in the conditions of demonstrations had more success than half and half."""
    closed: tuple[float, float, float]
    """Part of the shortfall that half and half made up for where it gained: quartiles."""
    interim: bool
    """Whether runs of the benchmark are still missing."""


FIRST = ("run", "seeds", "n_episodes", "out")  # in --help
RULE = Rule(shortfall=0.05, ratio=2.78, gained=12, fell_short=12, noise_ahead=8, closed=(0.57, 0.75, 0.86), interim=False)


class Estimate(NamedTuple):
    """A mean over evaluations and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def estimate(values: list[float], geometric: bool = False) -> Estimate:
    """Mean and t-interval of at least two values; of positive ones, geometric ones."""
    values = [math.log(x) for x in values] if geometric else values
    pair = paired_comparison(values, [0.0] * len(values))
    found = Estimate(pair.mean, pair.low, pair.high)
    return Estimate(*map(math.exp, found)) if geometric else found


def measure(agent: Agent, seeds: int, n_episodes: int) -> dict[str, Any]:
    """Evaluates student and teacher in their world, on starts and noise of each of some seeds.

    Returns:
        shortfall and ratio, an `Estimate` each or None where the world knows no success, or the expert has no data; student and teacher,
        means of their success; own, expert and growth: mean errors by eighth of an episode on own and on the teacher's conditions, and
        own over data's; None where no episode is so long.
    """
    rows = []
    for seed in range(seeds):
        evaluator = EpisodeEvaluator(agent.teacher_policy, agent.grid, n_episodes, seed)
        rows.append((evaluator.evaluate(agent.student_policy, agent.kernel), evaluator.evaluate(evaluator.expert_policy)))

    def by_span(key: str) -> list[float | None]:
        spans = zip(*(student[key] for student, _ in rows), strict=True)
        return [statistics.fmean(x for x in span if x is not None) if any(x is not None for x in span) else None for span in spans]

    ratios = [student["error_ratio"] for student, _ in rows if student["error_ratio"]]
    success = [(student["success"], teacher["success"]) for student, teacher in rows if student["success"] is not None]
    own, data = by_span("error_own"), statistics.fmean(student["error_data"] or math.nan for student, _ in rows)
    return {
        "shortfall": estimate([teacher - student for student, teacher in success]) if success else None,
        "ratio": estimate(ratios, geometric=True) if ratios else None,
        "student": statistics.fmean(student for student, _ in success) if success else None,
        "teacher": statistics.fmean(teacher for _, teacher in success) if success else None,
        "own": own,
        "expert": by_span("error_expert"),
        "growth": [None if x is None or math.isnan(data) else x / data for x in own],
        "data": None if math.isnan(data) else data,
    }


def advise(found: dict[str, Any], rule: Rule = RULE) -> list[str]:
    """Sentences: the regime, what the rule recommends, and how often it was right."""
    shortfall, ratio = found["shortfall"], found["ratio"]
    said = []
    if ratio is not None:
        causes = [
            (ratio.low >= rule.ratio, "own conditions are much harder than data: errors feed back"),
            (ratio.high < rule.ratio, "own conditions are not much harder than data"),
            (True, "more episodes or seeds would tell whether own conditions are harder than data"),
        ]
        cause = next(text for applies, text in causes if applies)
        said.append(f"Error on own conditions is {ratio} times that on data (threshold {rule.ratio:g}): {cause}.")
    if shortfall is None:
        return [*said, "The world knows no success, so that the rule does not apply; compare returns by python -m ddil_agents.compare."]
    low, middle, high = rule.closed
    if shortfall.low >= rule.shortfall:
        weak = ratio is not None and ratio.high < rule.ratio
        said.append(
            f"The student falls short of its teacher by {shortfall} in success: DDIL is worth its rollouts. In the benchmark half of the "
            f"labels on own states made up for {middle:.0%} of that (quartiles {low:.0%} and {high:.0%}). Train again by "
            "python -m ddil_agents.dagger with --beta.forward .5 --beta.student .5, or with --beta.schedule adaptive beside."
        )
        said.append(
            f"Noise in the conditions of demonstrations needs no rollouts and did more in {rule.noise_ahead} of {rule.fell_short} such "
            "cells: try python -m ddil_agents.dart --perturbation 0 --condition_noise .3 too."
        )
        if weak:
            said.append("Since it is weak on data too, a larger student or more updates may help as much.")
    elif shortfall.high < rule.shortfall:
        return [*said, f"The student falls short of its teacher by {shortfall} in success: own states have nothing to mend; keep it."]
    else:
        said.append(f"It falls short of its teacher by {shortfall} in success, around the threshold {rule.shortfall:g}: raise --seeds.")
    interim = " (interim: not all of its runs are there)" if rule.interim else ""
    return [*said, f"In the benchmark half and half gained {rule.shortfall:g} in {rule.gained} of {rule.fell_short} such cells{interim}."]


def make_parser() -> ArgumentParser:
    """Makes the parser of this command."""
    parser = ArgumentParser(prog="python -m ddil_agents.advise", description=__doc__)
    parser.add_argument("--run", type=str | None, default=None, help="run directory of a student in a world")
    parser.add_argument("--seeds", type=int, default=4, help="evaluations, each of starts and noise of its own")
    parser.add_argument("--n_episodes", type=int, default=50, help="episodes of student and teacher in each")
    parser.add_argument("--out", type=str | None, default=None, help="JSON file for what was measured and said")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    with one_line_errors(parser):
        if {"--help", "-h"} & set(argv):
            print(help_of(parser, "--run DIR  [--SETTING VALUE …]", FIRST))
            return
        args = read_arguments(parser, argv)
        if args.run is None:
            raise ValueError("which student? pass --run DIR, the directory of a finished run")
        for name, least in (("seeds", 2), ("n_episodes", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}: need at least {least}")
        out = None if args.out is None else Path(args.out)
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out}: need a file in a folder that exists")
        if out is not None and is_regular(out) and out.is_file() and '"advice"' not in out.read_text(encoding="utf-8"):
            raise ValueError(f"--out {out} holds something else than advice; name another file")
        agent = load_run(Path(args.run))
        if agent.expert.make_world(1) is None:
            raise ValueError(
                f"--run {args.run}: {type(agent.expert).__name__} has no world, and the rule was measured in worlds. On pictures the ratio "
                "of errors has not told where own states help; compare the arms: python -m ddil_agents.compare --betas forward half"
            )
        if isinstance(agent.config, LearnerConfig) and agent.config.beta.student > 0:
            share = f"beta.student={agent.config.beta.student:g}"
            print(f"{args.run} was trained on own states too ({share}); the rule is of students of data alone.\n")
        found = measure(agent, args.seeds, args.n_episodes)
        print("\n".join([*markdown_table(span_rows(found)), "", *advise(found)]))
        if out is not None:
            write_atomically(out, json.dumps({**found, "rule": RULE._asdict(), "advice": advise(found)}, indent=1) + "\n")


def span_rows(found: dict[str, Any]) -> list[list[str]]:
    """A table of errors by eighth of an episode."""
    spans = len(found["own"])
    rows = [["part of the longest possible episode", *(f"{i + 1}/{spans}" for i in range(spans))]]
    titles = {"own": "error, own conditions", "expert": "error, teacher's conditions", "growth": "own / held-out data"}
    for key, title in titles.items():
        rows.append([title, *("–" if x is None else f"{x:.3g}" for x in found[key])])
    return rows


if __name__ == "__main__":
    main()
