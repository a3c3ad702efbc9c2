"""The command of every agent, from its command line to a finished run directory.

    python -m ddil_agents.dagger --env digits --num_updates 2000 --out runs/mine
    python -m ddil_agents.dagger --resume runs/mine

Settings come from the config's dataclass, then from presets, then from --config, then from flags; the later win. An env is a preset
of configs/env or a YAML file; the arguments of its expert are flags, such as `--env.guidance_scale 3`. The file
configs/<agent>/<env>.yaml, if there is one, holds defaults for this env, and configs/<agent>/data/<env>.yaml further defaults if
`--data` names pictures of your own. A run directory holds

    config.yaml    all settings; --config config.yaml runs the same again
    metrics.jsonl, tensorboard/, checkpoints/, student/, samples.png, episodes.gif (in a world), result.json
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.commands.agents import command_of, identify
from ddil_agents.commands.card import complete_card
from ddil_agents.commands.checks import check_data, check_evaluation
from ddil_agents.commands.combine_stages import combine_stages
from ddil_agents.commands.conflicts import name_owners
from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.hub import check_push, push
from ddil_agents.commands.parse import expert_and_config, name_of_env, parse, take_flag
from ddil_agents.commands.plan import print_plan
from ddil_agents.commands.resume import parse_resumed
from ddil_agents.commands.save_and_evaluate import save_and_evaluate
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks
from ddil_agents.evaluation.callback import EvalCallback
from ddil_agents.evaluation.results import read_result, table
from ddil_agents.evaluation.settings import Evaluation, Validation
from ddil_agents.states.collect import rank_stream_seed
from ddil_agents.training.callbacks import Callback
from ddil_agents.training.checkpoint import write_atomically
from ddil_agents.training.stages import evaluation_config, iter_learners, plan_stages
from ddil_agents.training.tracking import check_tracker
from ddil_agents.training.trained_agent import TrainedAgent
from ddil_env import Expert, ExpertPolicy, check_expert

LOCK = ".lock"  # a file in a run directory


def run(agent: type[Agent], argv: list[str] | None = None) -> None:
    """Runs an agent's command: parses its command line, checks it, trains, evaluates, and writes the run directory."""
    argv = list(sys.argv[1:] if argv is None else argv)
    outer = argparse.ArgumentParser(prog=shlex.join(["python", *command_of(identify(agent))]))
    ranks.choose_device()
    with one_line_errors(outer), ExitStack() as locks:
        # Parse and build.
        resume = take_flag(argv, "--resume")
        resumed = None if resume is None else Path(resume)
        with ranks.sync_errors():
            if resumed is not None and resumed.is_dir() and ranks.is_main():
                lock_run(resumed, locks)
        parser, cfg = parse(agent, argv) if resumed is None else parse_resumed(agent, resumed, argv)
        expert, config = expert_and_config(agent, parser, cfg)
        with name_owners(agent):
            stages = plan_stages(config)
        check_data(agent, expert, stages)
        learners = iter_learners(agent, expert, stages, resumed)
        torch.manual_seed(rank_stream_seed(config.seed, "dropout"))  # of a student; all else draws from streams of its own
        first = next(learners)

        # Check what would fail after the training.
        evaluation = Evaluation(**vars(cfg.evaluate))
        check_tracker(cfg.track)
        make_callbacks(agent, parser, cfg, evaluation_config(config, stages[0].config), expert)
        with ranks.sync_errors():
            check_expert(expert, student=first[1].ema_student)
            if ranks.is_main():
                check_evaluation(agent, expert, stages, evaluation)
                if cfg.push_to_hub is not None:
                    check_push(cfg.push_to_hub)

        # Create the run directory and announce the run.
        out = ranks.broadcast_from_main(lambda: create_run_directory(agent, parser, cfg, locks)) if resumed is None else resumed
        if not (out / "config.yaml").is_file():
            raise ValueError(f"rank {ranks.rank()} does not see {out}; give an --out on a disk that all machines share")
        if ranks.is_main() and resumed is None:
            print_plan(agent, config, stages, expert, evaluation, out, cfg.checkpoint_every)

        # Train and evaluate each stage; a run without stages is a single one.
        env = {"env": name_of_env(cfg), "env_config": {key: value for key, value in vars(cfg.env).items() if key != "device"}}
        learners = itertools.chain([first], learners)
        del first  # each agent is freed before the next one is built
        for stage, learner in learners:
            directory = out / stage.directory
            if config.stages and (directory / "result.json").is_file():
                continue
            if config.stages and ranks.is_main():
                print(f"{directory}: {stage.config.num_steps} steps, teacher: {stage.teacher}", file=sys.stderr)
            if learner.step and ranks.is_main():
                print(f"resuming {directory} at step {learner.step} of {learner.total_updates}", file=sys.stderr)
            settings = evaluation_config(config, stage.config)
            learner.train(
                directory,
                checkpoint_every=cfg.checkpoint_every,
                log_every=cfg.log_every,
                track=cfg.track,
                callbacks=make_callbacks(agent, parser, cfg, settings, expert),
            )
            nfe = learner.total_nfe()
            if stage is stages[-1]:
                ranks.leave_group()  # the other ranks end without waiting for the evaluation
            with ranks.sync_errors():
                if ranks.is_main():
                    save_and_evaluate(learner, directory, evaluation, env, settings, expert, nfe)
            del learner

        # Complete and publish the run.
        if not ranks.is_main():
            return
        if config.stages:
            combine_stages(out, [out / stage.directory for stage in stages], config.seed)
        complete_card(out, config)
        print(table(read_result(out / "result.json")))
        pictures = "".join(f", {name}" for name in ("samples.png", "episodes.gif") if (out / name).is_file())
        print(f"\n{out}: config.yaml, metrics.jsonl, result.json, student/{pictures}")
        if cfg.push_to_hub is not None:
            print(push(out / "student", cfg.push_to_hub, cfg.hub_private))


def make_callbacks(agent: type[Agent], parser: ArgumentParser, cfg: Namespace, settings: LearnerConfig, expert: Expert) -> list[Callback]:
    """Makes the user's callbacks and, with --evaluate_every, that of the evaluation while training; new ones for each stage.

    Args:
        agent: The agent's class.
        parser: The parser of the command line.
        cfg: What it has parsed.
        settings: The settings that the stage's student is evaluated under.
        expert: The original teacher.

    Raises:
        ValueError: the settings of a callback do not fit, or the agent has no callbacks.
    """
    callbacks: list[Callback] = list(parser.instantiate(cfg).callbacks)
    if cfg.evaluate_every is not None:
        teacher = ExpertPolicy(expert, settings.substeps, settings.guidance_scale)
        callbacks.append(EvalCallback(cfg.evaluate_every, Validation(**vars(cfg.validation)), teacher))
    if callbacks and not issubclass(agent, TrainedAgent):
        raise ValueError(
            f"callbacks: {agent.name} is trained by stable-baselines3 and does not support callbacks; leave --callbacks and "
            "--evaluate_every out"
        )
    return callbacks


def create_run_directory(agent: type[Agent], parser: ArgumentParser, cfg: Namespace, locks: ExitStack) -> Path:
    """Creates the run directory with its config.yaml and returns its path: --out, or one in runs/ that is named after the run.

    Raises:
        ValueError: it is a file, or exists and is not empty.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(cfg.out or f"runs/{agent.name}-{name_of_env(cfg)}-s{cfg.seed}-{stamp}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    lock_run(out, locks)
    check_empty(out)  # another process may have begun there
    write_atomically(out / "config.yaml", parser.dump(Namespace({**vars(cfg.clone()), "out": None, "config": None})))
    return out


def check_empty(out: Path) -> None:
    """Refuses a folder that holds anything but what a killed run may have left: .partial files and its lock."""
    if out.exists() and any(path.suffix != ".partial" and path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; continue it with --resume {out}, or choose another --out")


def lock_run(out: Path, locks: ExitStack) -> None:
    """Locks a run directory until `locks` ends, or the process.

    Raises:
        ValueError: another process has locked it.
    """
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{out} is in use by another process, which trains there; wait until it ends, or choose another --out") from error
    locks.callback(lock.release)
    locks.callback((out / LOCK).unlink, missing_ok=True)  # while it is held
