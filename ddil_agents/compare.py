"""Comparing agents on one expert, over paired seeds and at equal budgets; the results are tables and an HTML page.

    python -m ddil_agents.compare --config four_agents --out runs/four
    python -m ddil_agents.compare --env digits --agents dagger lcm --betas forward half --num_updates 400 --out runs/priors-of-two
    python -m ddil_agents.compare --config priors --jobs 8 --out runs/priors

An arm is an agent with settings. Arms of one seed share the initial weights, the order of the data, all noise and, in the evaluation,
x_T and conditions, so that their differences are paired. Every arm first takes the same number of gradient steps. With --equal, arms are
trained again with as many steps as cost the baseline's teacher forwards, forwards of both networks, or seconds. The same command resumes
a comparison that was interrupted.

    comparison.json         all numbers           matched.json    gradient steps at the other budgets
    report.html             the page              runs/           each run, with recorded trajectories and untrained.json
    table.csv, table.tex    the tables
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.checks import check_command_line
from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.help import help_of
from ddil_agents.commands.parse import resolve_presets
from ddil_agents.comparison.animation import animate_arms
from ddil_agents.comparison.arms import BETAS, Budget, Comparison, Run, arm_settings, make_arms, merge_settings, run_settings
from ddil_agents.comparison.page import write_page
from ddil_agents.comparison.runs import MATCHED, has_result, matched_entry, matched_updates, read_matched, recorded_updates, train
from ddil_agents.comparison.summary import collect_results
from ddil_agents.comparison.tables import csv_table, latex_table, markdown, summary_line
from ddil_agents.evaluation.results import read_result
from ddil_agents.settings import read_arguments
from ddil_agents.training.checkpoint import write_atomically
from ddil_env.presets import preset_names, read_yaml

FIRST = ("out", "config", "env", "agents", "betas", "num_updates", "seeds", "jobs", "equal", "report_only")  # in --help


def compare(comparison: Comparison, out: Path, jobs: int, command: str = "", report_only: bool = False) -> dict[str, Any]:
    """Trains and evaluates all runs of a comparison, and writes comparison.json, table.csv and table.tex.

    Args:
        comparison: Arms, seeds and budgets.
        out: Directory of the comparison.
        jobs: Runs at a time.
        command: The command line, for the record.
        report_only: Whether to train nothing and only collect the results of finished runs.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: an agent refuses its settings, which is found before any training; or runs were evaluated differently.
    """
    if report_only and not out.is_dir():
        raise ValueError(f"no comparison in {out} to report; leave --report_only out to train one, or name another --out")
    check_comparison(comparison, out)
    out.mkdir(parents=True, exist_ok=True)
    tiers: dict[Budget, list[Run]] = {}
    updates: dict[str, int] | None = None
    for budget in comparison.equal:
        runs = [
            Run(budget, arm, seed, out / "runs" / budget / f"{arm}-s{seed}") for seed in comparison.all_seeds for arm in comparison.arms
        ]
        if budget != "updates":
            done = {
                arm: [read_result(r.directory / "result.json") for r in tiers["updates"] if r.arm == arm and has_result(r)]
                for arm in comparison.arms
            }
            done = {arm: results for arm, results in done.items() if results}
            if comparison.baseline_arm not in done:  # a baseline that diverged gives no budget; the other runs are still shown
                continue
            updates = matched_updates(comparison, budget, done) | recorded_updates(comparison, budget, out)
            if not report_only:
                matched = read_matched(out)
                entry = matched_entry(comparison, updates)
                matched[budget] = merge_settings(matched.get(budget, {}), entry)  # keeps arms that are not compared now
                write_atomically(out / MATCHED, json.dumps(matched, indent=1))
            at_equal_updates = {arm: results[0]["num_updates"] for arm, results in done.items()}
            runs = [run for run in runs if run.arm in done]
            for i, run in enumerate(runs):  # reuse the run at equal updates if its number of steps differs by less than 1 %
                if abs(updates[run.arm] - at_equal_updates[run.arm]) < 0.01 * at_equal_updates[run.arm]:
                    runs[i] = run._replace(directory=out / "runs" / "updates" / run.directory.name)
        tiers[budget] = runs
        if not report_only:
            train([run for run in runs if run.directory.parent.name == budget], comparison, out, updates, jobs)
    result = collect_results(comparison, out, tiers, command)
    write_atomically(out / "comparison.json", json.dumps(result, indent=1))
    write_atomically(out / "table.csv", csv_table(result))
    write_atomically(out / "table.tex", latex_table(result))
    return result


def check_comparison(comparison: Comparison, out: Path) -> None:
    """Checks a comparison before any run starts.

    Raises:
        ValueError: an agent refuses its settings, arms would be evaluated differently, or `out` holds runs of other settings.
    """
    if out.is_file() or (out / "config.yaml").is_file():
        kind = "file" if out.is_file() else "run"
        raise ValueError(f"--out {out}: it is a {kind}; name a new folder, or that of an interrupted comparison")
    expert = None
    measures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in comparison.arms:
            path = Path(folder) / "arm.yaml"
            try:
                agent, settings = arm_settings(comparison, arm)
                path.write_text(yaml.safe_dump(settings))
                expert, config, evaluation = check_command_line(find_agent(agent), ["--env", comparison.env, "--config", str(path)], expert)
            except ValueError as error:
                raise ValueError(f"arm {arm}: {error}") from error
            guidance = expert.guidance_scale if config.guidance_scale is None else expert.check_guidance(config.guidance_scale)
            measures[arm] = {"guidance_scale": guidance, "teacher_steps": config.teacher_steps, **dataclasses.asdict(evaluation)}
            measures[arm] |= {"seed": None, "also_steps": None}
    expert = None
    torch.cuda.empty_cache()  # the runs need the memory
    (first, measure), *others = measures.items()
    for arm, other in others:
        if differing := [key for key in measure if measure[key] != other[key]]:
            values = "; ".join(f"{key} is {measure[key]} and {other[key]}" for key in differing)
            raise ValueError(f"arms {first} and {arm} would be evaluated differently: {values}. Give them one value, in `shared`")
    for budget, seed, arm in itertools.product(comparison.equal, comparison.all_seeds, comparison.arms):
        file = out / "runs" / budget / f"{arm}-s{seed}.yaml"
        ignored = {} if budget == "updates" else {"num_updates": None}  # computed from the cost of the runs at equal updates
        if file.is_file() and read_yaml(file) | ignored != run_settings(comparison, arm, seed) | ignored:
            runs = out / "runs" / "*" / f"{arm}-s*"
            raise ValueError(f"{file} holds other settings than arm {arm} has now; choose another --out, or remove its runs, {runs}")
    for budget in comparison.equal:
        recorded_updates(comparison, budget, out)


def make_parser() -> ArgumentParser:
    """Makes the parser of this command."""
    parser = ArgumentParser(prog="python -m ddil_agents.compare", description=__doc__)
    presets = ", ".join(preset_names("ablations"))
    parser.add_argument("--config", action="config", help=f"settings as YAML: a file, or one of configs/ablations: {presets}")
    parser.add_class_arguments(Comparison, None, instantiate=False)
    parser.add_argument("--agents", type=str, default=[], nargs="+", help="agents to compare, each an arm; beside the arms of --config")
    parser.add_argument(
        "--betas",
        type=str,
        default=["own"],
        nargs="+",
        help=f"β presets; one arm per agent and preset: own (the agent's default), {', '.join(BETAS)}",
    )
    parser.add_argument(
        "--num_updates", type=PositiveInt | None, default=None, help="gradient steps of every arm; null: those of its settings"
    )
    jobs = torch.cuda.device_count() or os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=PositiveInt, default=jobs, help="runs at a time; default: one for each GPU, or for each core without GPUs"
    )
    parser.add_argument("--out", type=str, required=True, help="directory of the comparison; an interrupted one is resumed")
    parser.add_argument("--report_only", type=bool, default=False, help="train nothing, report the finished runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    with one_line_errors(parser):
        if {"--help", "-h"} & set(argv):
            print(help_of(parser, "--out DIR (--config NAME|FILE | --env NAME --agents AGENT …) [--SETTING VALUE …]", FIRST))
            return
        args = read_arguments(parser, resolve_presets("ablations", argv))
        if not args.out:
            raise ValueError("--out '': need the name of a directory")
        settings = {f.name: args[f.name] for f in dataclasses.fields(Comparison)}
        more = make_arms(args.agents, args.betas)
        if twice := sorted(more.keys() & settings["arms"].keys()):
            raise ValueError(f"--agents {' '.join(twice)}: --config has an arm of this name already; leave it out, or rename that arm")
        settings["arms"] = {**more, **settings["arms"]}
        if args.num_updates is not None:
            settings["shared"] = merge_settings(settings["shared"], {"num_updates": int(args.num_updates)})
        command = shlex.join(["python", "-m", "ddil_agents.compare", *argv])
        result = compare(Comparison(**settings), Path(args.out), args.jobs, command, args.report_only)
        print(markdown(result))
        animated = animate_arms(result, Path(args.out))
        write_page(result, Path(args.out))
    print(f"\n{args.out}: report.html, comparison.json, table.csv, table.tex{', episodes.gif' if animated else ''}\n{summary_line(result)}")


if __name__ == "__main__":
    main()
