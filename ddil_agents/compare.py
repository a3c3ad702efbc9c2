"""Comparing agents: every arm on one expert, over paired seeds, at equal budgets, and the page that shows it.

    python -m ddil_agents.compare --config four_agents --out runs/four
    python -m ddil_agents.compare --env digits --agents dagger lcm --betas forward half --num_updates 400 --out runs/priors-of-two
    python -m ddil_agents.compare --config priors --jobs 8 --out runs/priors

An arm is an agent with settings. Arms of one seed share the initial weights, the order of the data, all noise and, in the judging,
x_T and conditions, so their differences are paired. Budgets: every arm takes the same number of gradient steps; then, if asked for,
as many as the baseline's teacher forwards, forwards of both networks, or seconds allow. Run it again, and it goes on where it stopped.

    comparison.json    all numbers         report.html    the page         matched.json    steps at the other budgets
    table.csv, table.tex                   runs/          with each student's denoisings, the teacher's, and untrained.json
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

from ddil_agents.commands.checks import check_command_line
from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.help import help_of
from ddil_agents.commands.parse import find_agent, resolve_presets
from ddil_agents.comparison.arms import BETAS, Budget, Comparison, Run, arms_of, given_settings, merged, settings_of
from ddil_agents.comparison.gather import gather
from ddil_agents.comparison.runs import FIXED, fixed_by, fixed_updates, has_result, matched_updates, read_fixed, train
from ddil_agents.comparison.tables import csv_table, latex_table, markdown
from ddil_agents.evaluation.results import read_result
from ddil_agents.settings import read_arguments
from ddil_agents.training.checkpoint import write_atomically
from ddil_env.presets import preset_names, read_yaml

FIRST = ("out", "config", "env", "agents", "betas", "num_updates", "seeds", "jobs", "equal", "report_only")  # in --help


def compare(comparison: Comparison, out: Path, jobs: int, command: str = "", report_only: bool = False) -> dict[str, Any]:
    """Trains, judges and writes a comparison; returns what comparison.json holds.

    Raises:
        ValueError: settings that an agent refuses, before anything is trained; runs that were measured in different ways.
    """
    check(comparison, out)
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
            done = {arm: found for arm, found in done.items() if found}
            if comparison.reference not in done:  # a baseline that diverged sets no budget; what was trained is still to be shown
                continue
            updates = matched_updates(comparison, budget, done) | fixed_updates(comparison, budget, out)
            if not report_only:
                known = read_fixed(out)
                known[budget] = merged(known.get(budget, {}), fixed_by(comparison, updates))  # arms that are left out now keep theirs
                write_atomically(out / FIXED, json.dumps(known, indent=1))
            set_ = {arm: found[0]["num_updates"] for arm, found in done.items()}
            runs = [run for run in runs if run.arm in done]
            for i, run in enumerate(runs):  # a run that would differ by less than a hundredth is the one that is there
                if abs(updates[run.arm] - set_[run.arm]) < 0.01 * set_[run.arm]:
                    runs[i] = run._replace(directory=out / "runs" / "updates" / run.directory.name)
        tiers[budget] = runs
        if not report_only:
            train([run for run in runs if run.directory.parent.name == budget], comparison, out, updates, jobs)
    result = gather(comparison, out, tiers, command)
    write_atomically(out / "comparison.json", json.dumps(result, indent=1))
    write_atomically(out / "table.csv", csv_table(result))
    write_atomically(out / "table.tex", latex_table(result))
    return result


def check(comparison: Comparison, out: Path) -> None:
    """Refuses what an agent would refuse, arms judged in two ways, and runs begun with other settings, before any run begins."""
    expert = None
    measures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in comparison.arms:
            path = Path(folder) / "arm.yaml"
            try:
                agent, settings = settings_of(comparison, arm)
                path.write_text(yaml.safe_dump(settings))
                expert, config, evaluation = check_command_line(find_agent(agent), ["--env", comparison.env, "--config", str(path)], expert)
            except ValueError as error:
                raise ValueError(f"arm {arm}: {error}") from error
            guidance = config.guidance_scale if config.guidance_scale is not None else expert.guidance_scale
            measures[arm] = {"guidance_scale": guidance, "teacher_steps": config.teacher_steps, **dataclasses.asdict(evaluation)}
            measures[arm] |= {"seed": None, "also_steps": None}
    expert = None
    torch.cuda.empty_cache()  # the runs will need it
    (first, measure), *others = measures.items()
    for arm, other in others:
        if differing := [key for key in measure if measure[key] != other[key]]:
            told = "; ".join(f"{key} is {measure[key]} and {other[key]}" for key in differing)
            raise ValueError(f"arms {first} and {arm} would be judged in two ways: {told}. Give them one value, in `shared`")
    for budget, seed, arm in itertools.product(comparison.equal, comparison.all_seeds, comparison.arms):
        given = out / "runs" / budget / f"{arm}-s{seed}.yaml"
        matched = {} if budget == "updates" else {"num_updates": None}  # set by what the runs at equal updates cost
        if given.is_file() and read_yaml(given) | matched != given_settings(comparison, arm, seed) | matched:
            runs = out / "runs" / "*" / f"{arm}-s*"
            raise ValueError(f"{given} holds other settings than arm {arm} has now; choose another --out, or remove its runs, {runs}")
    for budget in comparison.equal:
        fixed_updates(comparison, budget, out)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="python -m ddil_agents.compare", description=__doc__)
    presets = ", ".join(preset_names("ablations"))
    parser.add_argument("--config", action="config", help=f"settings as YAML: a file, or one of configs/ablations: {presets}")
    parser.add_class_arguments(Comparison, None, instantiate=False)
    parser.add_argument("--agents", type=str, default=[], nargs="+", help="arms: these agents …")
    parser.add_argument("--betas", type=str, default=["own"], nargs="+", help=f"… with each of these priors: own, {', '.join(BETAS)}")
    parser.add_argument("--num_updates", type=PositiveInt | None, default=None, help="gradient steps of every arm; null: each arm's own")
    jobs = torch.cuda.device_count() or os.cpu_count() or 1
    parser.add_argument("--jobs", type=PositiveInt, default=jobs, help="runs at a time; if not given, one a GPU, or one a core")
    parser.add_argument("--out", type=str, required=True, help="directory of the comparison; it goes on with one that is there")
    parser.add_argument("--report_only", type=bool, default=False, help="train nothing, show what is there")
    with one_line_errors(parser):
        if {"--help", "-h"} & set(argv):
            print(help_of(parser, "--out DIR (--config NAME|FILE | --env NAME --agents AGENT …) [--SETTING VALUE …]", FIRST))
            return
        args = read_arguments(parser, resolve_presets("ablations", argv))
        given = {f.name: args[f.name] for f in dataclasses.fields(Comparison)}
        given["arms"] = {**arms_of(args.agents, args.betas), **given["arms"]}
        if args.num_updates is not None:
            given["shared"] = merged(given["shared"], {"num_updates": int(args.num_updates)})
        result = compare(
            Comparison(**given), Path(args.out), args.jobs, shlex.join(["python", "-m", "ddil_agents.compare", *argv]), args.report_only
        )
        print(markdown(result))
        from ddil_agents.comparison.page import write_page

        write_page(result, Path(args.out))
    print(f"\n{args.out}: report.html, comparison.json, table.csv, table.tex")


if __name__ == "__main__":
    main()
