"""Evaluating a policy: its samples against data, and its trajectories against the expert's from the same noise.

    python -m ddil_agents.evaluate --env digits --steps 32 8 4 2 1        # the expert itself, by number of steps
    python -m ddil_agents.evaluate --run runs/mine --n 5000               # a student, beside its teacher
    python -m ddil_agents.evaluate --run runs/sd --config coco2017_5k --captions captions.json --images val2017 --weights_dir DIR

Every result records the feature extractor, the number of samples and the seed. Real data are evaluated beside the models, because they
show the score of a perfect model (the floor). Samples are drawn a batch at a time and reduced to features; with --out, a killed evaluation
continues at its last batch.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.help import help_of
from ddil_agents.commands.load import Checkpoint, load_run
from ddil_agents.commands.parse import resolve_presets
from ddil_agents.evaluation.evaluator import evaluate_expert, evaluate_run
from ddil_agents.evaluation.results import table
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.settings import read_arguments
from ddil_agents.training.checkpoint import is_regular, write_atomically
from ddil_env import load_expert
from ddil_env.presets import find_expert, preset_names, read_env, read_yaml

FIRST = ("run", "env", "steps", "config", "n", "out", "device", "guidance_scale", "captions", "images", "scores", "seeds")  # in --help


def _read_expert_settings(run: str | None, env: str) -> dict[str, Any]:
    """Settings of the expert: in a run's config.yaml, empty if there is no such file; without a run, in the preset or file `env`."""
    if run is None:
        return read_env(env)
    config = Path(run) / "config.yaml"
    return read_yaml(config).get("env") or {} if config.is_file() else {}


def make_parser() -> ArgumentParser:
    """Makes the parser of this command."""
    parser = ArgumentParser(prog="python -m ddil_agents.evaluate", description=__doc__)
    presets = ", ".join(preset_names("evaluate"))
    parser.add_argument("--config", action="config", help=f"settings as YAML: a file, or one of configs/evaluate: {presets}")
    parser.add_argument("--run", type=str | None, default=None, help="run directory whose student to evaluate; null: the expert itself")
    parser.add_argument(
        "--checkpoint",
        type=Checkpoint,
        default="last",
        help="which checkpoint of --run to evaluate: last (the saved student, or the newest checkpoint of an unfinished run), "
        "best (with --evaluate_every), or a step",
    )
    parser.add_argument("--env", type=str | None, default=None, help="preset or YAML file of the expert; null: digits; not with --run")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="numbers of sampling steps; default: 32 8 4 2 1; not with --run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the noise; the evaluation runs once per seed")
    parser.add_argument(
        "--guidance_scale",
        type=float | None,
        default=None,
        help="w; null: the expert's, or the run's; with --run only for a student that takes w as an input",
    )
    parser.add_argument(
        "--captions",
        type=str | None,
        default=None,
        help="prompts that replace those of the expert or of its data: a text file or COCO's JSON",
    )
    parser.add_argument("--device", type=str | None, default=None, help="device, such as cuda; null: the expert's default")
    parser.add_argument(
        "--out", type=str | None, default=None, help="JSON file for the results; finished batches are cached beside it until the end"
    )
    parser.add_class_arguments(Evaluation, None, skip={"seed"})
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    with one_line_errors(parser):
        if {"--help", "-h"} & set(argv):
            print(help_of(parser, "[--env NAME|FILE] [--steps N …] | --run DIR  [--SETTING VALUE …]", FIRST))
            return
        args = read_arguments(parser, resolve_presets("evaluate", argv))
        settings = {f.name: args[f.name] for f in dataclasses.fields(Evaluation) if f.name != "seed"}
        out = None if args.out is None else Path(args.out)
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out}: need a file in a folder that exists")
        if out is not None and is_regular(out) and out.is_file() and not holds_results(out):
            raise ValueError(f"--out {out} holds something else than results of an evaluation; name another file")
        cached = out is not None and is_regular(out)
        env_name = "digits" if args.env is None else args.env
        env: dict[str, Any] = {key: value for key, value in (("device", args.device), ("prompts", args.captions)) if value is not None}
        if args.protocol is not None and args.captions is None:
            raise ValueError(
                f"--protocol {args.protocol}: its samples need the protocol's captions, not the expert's prompts; "
                "pass them as --captions FILE, or --protocol null for other numbers"
            )
        for name in ("seeds", "steps"):
            if len(set(args[name])) < len(args[name]):
                raise ValueError(f"--{name} {' '.join(map(str, args[name]))}: each may stand once; its results would be the same")
        if args.run is None and args.checkpoint != "last":
            raise ValueError(f"--checkpoint {args.checkpoint}: it is a run's; name the run as --run DIR, or leave it out")
        if args.run is not None and (args.env is not None or args.steps):
            raise ValueError("--run names expert and steps; leave --env and --steps out (--also_steps evaluates the run in more steps)")
        if args.run is None and args.captions is not None:
            parameters = inspect.signature(find_expert(read_env(env_name)["expert"])).parameters
            if "prompts" not in parameters:
                raise ValueError(f"--captions {args.captions}: the expert of {args.env or 'digits'} takes no captions; leave it out")
        if args.captions is not None:  # an expert has either prompts, or data with captions
            own = _read_expert_settings(args.run, env_name)
            env |= dict.fromkeys(key for key in ("data", "images", "data_cache") if key in own)
        learner = None if args.run is None else load_run(Path(args.run), args.checkpoint, args.guidance_scale, **env)
        expert = load_expert(env_name, **env) if learner is None else learner.expert
        results = []
        for seed in args.seeds:
            cache = None if out is None or not cached else out.with_name(f".{out.name}.seed{seed}")
            evaluation = Evaluation(seed=seed, **settings)
            if learner is None:
                results.append(evaluate_expert(expert, args.steps or [32, 8, 4, 2, 1], evaluation, args.guidance_scale, cache))
            else:
                results.append(evaluate_run(learner, evaluation, cache))
            print(table(results[-1]), flush=True)
        if out is not None:
            write_atomically(out, json.dumps(results, indent=1))
            for seed in args.seeds if cached else ():
                shutil.rmtree(out.with_name(f".{out.name}.seed{seed}"))


def holds_results(path: Path) -> bool:
    """Whether a file is empty or what this command writes: a list of results."""
    try:
        results = json.loads(path.read_text(encoding="utf-8") or "[]")
    except (OSError, ValueError):
        return False
    return isinstance(results, list) and all(isinstance(result, dict) and "models" in result for result in results)


if __name__ == "__main__":
    main()
