"""The agent of a run, loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.commands.parse import expert_and_config, find_agent, parse
from ddil_agents.evaluation.judge import Judge
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.checkpoint import read_support
from ddil_agents.training.stages import judged, learners, plan
from ddil_env.presets import read_yaml


def read_run(directory: Path) -> tuple[type[Agent], ArgumentParser, Namespace]:
    """The agent that a run's config.yaml names, its parser and what it reads, for the device that is here."""
    agent = find_agent(str(read_yaml(directory / "config.yaml").get("agent")))
    parser, cfg = parse(agent, ["--config", str(directory / "config.yaml")])
    if "device" in vars(cfg.env):
        cfg.env.device = "cuda" if torch.cuda.is_available() else "cpu"
    return agent, parser, cfg


def load_run(directory: Path, guidance_scale: float | None = None, **env: Any) -> Agent:
    """The agent of a finished run's config with its saved student, on whatever device is here.

    Args:
        directory: The run's.
        guidance_scale: w for the teacher and a student that is told it; default: the run's own.
        env: Arguments of the expert that differ from the run's, such as other prompts.

    Raises:
        ValueError: no finished run there, or a damaged one; a guidance that its student was not trained for.
    """
    if not (directory / "result.json").is_file():
        raise ValueError(f"{directory} holds no finished run (no result.json); finish it with --resume {directory}")
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{directory} has no config.yaml; a stage of a run is loaded through the run's own directory, {directory.parent}")
    agent, parser, cfg = read_run(directory)
    if unknown := sorted(env.keys() - vars(cfg.env).keys()):
        raise ValueError(f"{cfg.env.expert}, the expert of {directory}, takes no {', '.join(unknown)}; leave it out")
    vars(cfg.env).update(env)
    expert, config = expert_and_config(agent, parser, cfg)
    settings = judged(config, plan(config)[-1].config)
    if guidance_scale is not None:
        if getattr(settings, "guidance_range", None) is None:
            raise ValueError(f"guidance_scale={guidance_scale:g}: the student of {directory} is not told it, but has that of its training")
        settings = replace(settings, guidance_scale=guidance_scale)
    learner = agent(expert, settings, read_support(directory)[0])
    student = expert.load_student(directory / "student", **learner.student_options)
    learner.average.load_state_dict(student.state_dict())
    return learner


def load(directory: str | Path) -> Agent:
    """The agent of a run: with its saved student where it has finished, else as its last checkpoint has it, of the stage that it is in.

    Args:
        directory: The run's.

    Raises:
        ValueError: no run there, no checkpoint yet, or damaged files.
    """
    place = Path(directory)
    if (place / "result.json").is_file() or not (place / "config.yaml").is_file():
        return load_run(place)
    agent, parser, cfg = read_run(place)
    expert, config = expert_and_config(agent, parser, cfg)
    for stage, learner in learners(agent, expert, plan(config), place):
        if not (place / stage.directory / "result.json").is_file():
            if not learner.step:
                raise ValueError(f"{place / stage.directory} has no checkpoint yet; wait for one, or see --checkpoint_every")
            return learner
    raise ValueError(f"{place} has finished but for its result.json; go on with --resume {place}")


def judge_of(learner: Agent, **settings: Any) -> Judge:
    """A judge on the learner's own expert policy and grid."""
    return Judge(learner.reference, learner.grid, Evaluation(**settings))
