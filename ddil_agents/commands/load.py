"""Makes the agent of a command, untrained, and loads that of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.parse import expert_and_config, parse
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.checkpoint import checkpoints, read_support
from ddil_agents.training.stages import Stage, evaluation_config, iter_learners, plan_stages
from ddil_env import Expert
from ddil_env.presets import read_yaml

Checkpoint = Literal["last", "best"] | int


def read_run(directory: Path) -> tuple[type[Agent], ArgumentParser, Namespace]:
    """Reads a run's config.yaml: the agent's class, its parser and the parsed settings, with the device of this machine."""
    agent = find_agent(str(read_yaml(directory / "config.yaml").get("agent")))
    parser, cfg = parse(agent, ["--config", str(directory / "config.yaml")])
    if "device" in vars(cfg.env):
        cfg.env.device = "cuda" if torch.cuda.is_available() else "cpu"
    return agent, parser, cfg


def load_run(directory: Path, checkpoint: Checkpoint = "last", guidance_scale: float | None = None, **env: Any) -> Agent:
    """Loads the agent of a run, finished or not, on the device of this machine.

    Args:
        directory: The run directory.
        checkpoint: `last`, the saved student of a finished run or the newest checkpoint of another; `best`, the student that the
            evaluation while training found best; or the step of a checkpoint.
        guidance_scale: Guidance scale w of the teacher, and of a student that is conditioned on it; default: the run's.
        env: Arguments of the expert that replace the run's, such as other prompts.

    Raises:
        ValueError: there is no run or no such checkpoint, its files are damaged, or its student was not trained for this guidance.
    """
    if not (directory / "config.yaml").is_file():
        if (directory.parent / "config.yaml").is_file():
            raise ValueError(
                f"{directory} has no config.yaml; a stage of a run is loaded through the run's own directory, {directory.parent}"
            )
        raise ValueError(f"{directory} holds no run (no config.yaml)")
    agent, parser, cfg = read_run(directory)
    if unknown := sorted(env.keys() - vars(cfg.env).keys()):
        raise ValueError(f"{cfg.env.expert}, the expert of {directory}, takes no {', '.join(unknown)}; leave it out")
    vars(cfg.env).update(env)
    expert, config = expert_and_config(agent, parser, cfg)
    stages = plan_stages(config)
    if checkpoint == "best":
        with_best = [stage for stage in stages if (directory / stage.directory / "best" / "student").is_dir()]
        if not with_best:
            raise ValueError(f"{directory} has no best student; a run has one if it was trained with --evaluate_every")
        settings, student = evaluation_config(config, with_best[-1].config), directory / with_best[-1].directory / "best" / "student"
    elif checkpoint == "last" and (directory / "result.json").is_file():
        settings, student = evaluation_config(config, stages[-1].config), directory / "student"
    else:
        return _load_checkpoint(agent, expert, stages, directory, checkpoint)
    if guidance_scale is not None:
        if getattr(settings, "guidance_range", None) is None:
            raise ValueError(
                f"guidance_scale={guidance_scale:g}: the student of {directory} is not conditioned on it, and has that of its training"
            )
        settings = replace(settings, guidance_scale=guidance_scale)
    learner = agent(expert, settings, read_support(directory)[0])
    learner.ema_student.load_state_dict(expert.load_student(student, **learner.student_options).state_dict())
    return learner


def _load_checkpoint(agent: type[Agent], expert: Expert, stages: list[Stage], directory: Path, checkpoint: Checkpoint) -> Agent:
    """Loads the agent of the stage that an unfinished run is in, from a checkpoint."""
    for stage, learner in iter_learners(agent, expert, stages, directory):
        stage_directory = directory / stage.directory
        if stage is not stages[-1] and (stage_directory / "result.json").is_file():
            continue
        steps = {int(path.name.partition("_")[2]): path for path in checkpoints(stage_directory / "checkpoints")}
        if not steps:
            raise ValueError(f"{stage_directory} has no checkpoint yet; wait for one, or see --checkpoint_every")
        if checkpoint != "last":
            if checkpoint not in steps:
                raise ValueError(f"{stage_directory} has no checkpoint of step {checkpoint}; it has those of {', '.join(map(str, steps))}")
            learner.load(steps[checkpoint])  # type: ignore[attr-defined]
        return learner
    raise AssertionError("a run has at least one stage")


def load(directory: str | Path, checkpoint: Checkpoint = "last") -> Agent:
    """Loads the agent of a run, finished or not: `load("runs/mine").sample(16)`.

    Args:
        directory: The run directory.
        checkpoint: `last`, the saved student of a finished run or the newest checkpoint of another; `best`, the student that the
            evaluation while training found best; or the step of a checkpoint.

    Raises:
        ValueError: there is no run or no such checkpoint, or its files are damaged.
    """
    return load_run(Path(directory), checkpoint)


def make(agent: str, env: str, config: str | None = None, **settings: Any) -> Agent:
    """Makes an agent with the settings of its command, untrained: `make("dagger", "fork", config="fork", num_updates=500)`.

    Args:
        agent: Name of the agent, or the class path of your own.
        env: A preset of configs/env, or a YAML file.
        config: A preset of configs/AGENT, or a YAML file; default: what the command takes for this env.
        settings: Settings that replace those of the presets, as the command's flags do; `**{"env.model": "folder"}` is the expert's.

    Raises:
        ValueError: there is no such agent, preset or setting, or a value is refused.
    """
    kind = find_agent(agent)
    argv = ["--env", env, *([] if config is None else ["--config", config])]
    for key, value in settings.items():
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        argv.append(f"--{key}={plain if isinstance(plain, str) else json.dumps(plain)}")
    parser, cfg = parse(kind, argv)
    return kind(*expert_and_config(kind, parser, cfg))


def make_evaluator(learner: Agent, **settings: Any) -> Evaluator:
    """Makes an evaluator with the teacher policy and the grid of an agent; `settings` are those of `Evaluation`."""
    return Evaluator(learner.teacher_policy, learner.grid, Evaluation(**settings))
