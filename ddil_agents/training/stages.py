"""Stages: successive trainings in one run, each student initialised from the previous one.

    stages:                                              # progressive distillation, Salimans & Ho 2021, Alg. 2
      - {num_steps: 16, num_updates: 5000}               # 32 → 16; its teacher is the expert
      - {num_steps: 8, num_updates: 6000}                # 16 → 8; its teacher is the previous stage's student
      - {num_steps: 8, num_updates: 4000, expert: same}  # the same teacher again, with a new warm-up (DDIL §5)

A stage's student teaches the next stage with its averaged weights or with those of its last update, whichever have the smaller error
on held-out states.

A change of the prediction type and guidance conditioning are stages too, with as many student steps as teacher steps: a step of the
student is then one of the teacher, and the target is the teacher's x̂_0. A student was trained at its own times only; when it teaches,
the times of the next student must therefore be among them. Each stage writes its files to `stage_N/`; the commands resume, report and
load the run as a whole.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from ddil_agents.devices import sharding
from ddil_agents.settings import UnknownSettingError, build_dataclass, check_setting, explain, refuse_unknown
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.checkpoint import checkpoints, read_support
from ddil_env import Expert, NetworkDenoiser, NoDataError, Support, TimeGrid, Unbounded, unroll
from ddil_env.experts.distilled import Distilled

if TYPE_CHECKING:
    from ddil_agents.agent import Agent
    from ddil_agents.config import LearnerConfig
    from ddil_agents.training.trained_agent import TrainedAgent


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        config: The settings of the stage.
        teacher: last (the previous stage's student), same (the previous stage's teacher) or original (the expert).
        directory: Its directory in the run's, `.` if it is the only stage.
    """

    config: LearnerConfig
    teacher: str
    directory: str


def plan_stages(config: LearnerConfig) -> list[Stage]:
    """Returns the stages of a run, with the settings of each.

    `teacher_steps` of a stage defaults to the number of steps of its teacher: of the previous student, or of the previous stage's teacher.

    Raises:
        ValueError: a setting of a stage is unknown or does not fit, or its teacher is unknown; the message names the stage.
    """
    if not config.stages:
        return [Stage(config, "original", ".")]
    stages: list[Stage] = []
    from_student = False  # whether the teacher is a student, which was trained at its own times only
    has_guidance = False  # whether the teacher's weights include the guidance
    for number, changes in enumerate(config.stages, 1):
        changes = dict(changes)
        teacher = changes.pop("expert", config.teachers[0] if stages else "original")
        try:
            if teacher not in config.teachers or (not stages and teacher != "original"):
                raise ValueError(f"expert={teacher!r}: choose one of {', '.join(config.teachers)}; the first stage's is the original")
            for key, reason in (("stages", "a stage has none of its own"), ("mixed_precision", "it holds for the whole process")):
                if key in changes:
                    raise ValueError(f"{key} cannot be set for one stage: {reason}")
            previous = stages[-1].config if stages else config
            steps = {"last": previous.num_steps, "same": previous.teacher_steps, "original": config.teacher_steps}[teacher]
            from_student = {"last": True, "same": from_student, "original": False}[teacher]
            has_guidance = {"last": previous.guidance_range is None, "same": has_guidance, "original": False}[teacher]
            settings = {
                "init": config.init if not stages else None,
                "teacher_steps": steps,
                "seed": stream_seed(config.seed, f"stage {number}"),
            } | changes
            if has_guidance:
                guidance = {key: changes.get(key, getattr(config, key)) for key in ("guidance_range", "guidance_scale")}
                if guidance["guidance_range"] is not None or changes.get("guidance_scale") is not None:
                    raise ValueError(
                        f"{guidance}: its teacher is a student with one guidance built in; use expert: original, or set both to null"
                    )
                settings |= {"guidance_scale": None, "guidance_range": None}
            if from_student and steps % settings["teacher_steps"]:
                raise ValueError(
                    f"teacher_steps={settings['teacher_steps']}: its teacher is a student of {steps} steps, trained at their times only; "
                    f"leave it out, or choose a divisor of {steps}"
                )
            stage_config = replace_settings(config, settings)
        except UnknownSettingError as error:
            raise UnknownSettingError(f"stage {number} of {len(config.stages)}: {error}", error.setting) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"stage {number} of {len(config.stages)}: {error}") from error
        stages.append(Stage(stage_config, teacher, f"stage_{number}"))
    return stages


def replace_settings(config: LearnerConfig, changes: dict[str, Any]) -> LearnerConfig:
    """Returns a config with some settings changed; values are checked and converted as in a YAML file.

    Args:
        config: The config.
        changes: The new values by name; a mapping for nested settings changes only those that it has.

    Raises:
        ValueError: a setting is unknown, or a value does not fit.
    """
    settings, hints = dataclasses.asdict(config) | {"stages": []}, get_type_hints(type(config))
    for key, value in changes.items():
        if key not in settings:
            refuse_unknown(str(key), [*settings])
        nested = dataclasses.is_dataclass(getattr(config, key))
        if nested and not isinstance(value, dict):
            raise ValueError(f"{key}={value!r}: need a mapping of {', '.join(settings[key])}")
        check_setting(key, value, hints[key])
        settings[key] = settings[key] | value if nested else value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(type(config), None)
    try:
        return build_dataclass(type(config), parser.parse_object(settings))
    except ArgumentError as error:
        raise ValueError(explain(error, {action.dest: action for action in parser._actions})) from error


def iter_learners(agent: type[Agent], expert: Expert, stages: list[Stage], out: Path | None = None) -> Iterator[tuple[Stage, Agent]]:
    """Yields each stage with its agent; the caller trains one before it takes the next.

    Args:
        agent: The agent's class.
        expert: The original teacher.
        stages: From `plan_stages`.
        out: The directory of a run to continue: an agent with checkpoints there is loaded from the newest.

    Raises:
        ValueError: an agent refuses the settings of its stage; all are checked before the first is yielded.
    """
    if len(stages) > 1:
        _check_stages(agent, expert, stages)
    teacher = expert
    student: NetworkDenoiser | None = None  # of the previous stage; not its agent, whose optimiser and buffer take memory
    guidance: float | None = None  # the scale that it is used with as a teacher, if it has a guidance embedding
    grid: TimeGrid | None = None  # the times that it was trained at
    previous = stages[0].config
    support: Support | None = None
    for stage in stages:
        if student is not None and stage.teacher == "last":
            teacher = Distilled(expert, student, guidance, grid)
        elif stage.teacher == "original":
            teacher = expert
        directory = None if out is None else out / stage.directory
        stored, nfe = (None, 0) if directory is None else read_support(directory)
        if stored is not None or previous.thresholding != stage.config.thresholding:
            support = stored
        learner: Any = agent(teacher, stage.config, support)  # a TrainedAgent, if there are stages or checkpoints
        learner.teacher_nfe += nfe
        if student is not None:
            learner.start_from(student)
        if directory is not None and checkpoints(directory / "checkpoints"):
            learner.load(directory / "checkpoints")
        yield stage, learner
        if sharding.is_requested():
            learner.trainer.unshard()  # as a teacher it is called by each rank on its own
        if stage is stages[-1]:
            return
        comparable = learner.kernel == "ddim" and not sharding.is_requested()  # the last weights of a sharded student are spread over ranks
        student = better_weights(learner)[1] if comparable else learner.ema_student
        grid, previous, support = learner.grid, stage.config, learner.support
        guidance = None if previous.guidance_range is None else learner.teacher_policy.guidance_scale
        del learner
        gc.collect()  # an agent and its trainer refer to each other, and are freed by the garbage collector only


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Sets the network to evaluation mode inside the block."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@torch.no_grad()
def better_weights(learner: TrainedAgent, n: int = 64) -> tuple[dict[str, float], NetworkDenoiser]:
    """Compares the averaged weights with those of the last update on n held-out states at times of the grid.

    The states are held-out data, diffused, or without data the teacher's rollouts. As in an evaluation, the teacher's forwards are not
    added to `teacher_nfe`.

    Returns:
        The error E (a − a*)² per entry of each, by the names `average` and `last`, and the network with the smaller error.
    """
    expert, grid, generator = learner.expert, learner.grid, torch.Generator(learner.expert.device)
    generator.manual_seed(stream_seed(learner.config.seed, "held out"))
    step = torch.randint(grid.num_steps, (n,), generator=generator, device=expert.device)
    t = grid.times[step]
    try:
        x_0, c = expert.reference_data(n, held_out=True)
        t = t[: len(x_0)]
        eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_t = expert.schedule.add_noise(x_0, eps, t)
    except NoDataError:
        x_T, c = torch.randn(n, *expert.sample_shape, generator=generator, device=expert.device), expert.sample_condition(n, generator)
        x_t = unroll(learner.teacher_policy, grid, x_T, c)[torch.arange(n, device=expert.device), step]
    s, errors = grid.previous(t), {}
    target = learner.teacher_policy.act(x_t, t, s, c)
    networks = {"average": learner.ema_student, "last": learner.networks["student"]}
    for name, network in networks.items():
        with in_eval_mode(network):
            action = learner.policy(network, learner.student_policy.support).act(x_t, t, s, c)
        errors[name] = float((action - target).square().mean())
    return errors, networks[min(errors, key=errors.__getitem__)]


def _check_stages(agent: type[Any], expert: Expert, stages: list[Stage]) -> None:
    """Builds the agent of each stage once, on the original expert, so that errors appear before any training.

    Raises:
        ValueError: an agent refuses its settings, or its times are not among those that its teacher was trained at; the message names the
            stage.
    """
    student: NetworkDenoiser | None = None  # of the previous stage
    grid: TimeGrid | None = None  # of the previous student
    teacher_grid: TimeGrid | None = None  # the times that the teacher was trained at; None: all
    for number, stage in enumerate(stages, 1):
        try:
            learner = agent(expert, stage.config, Unbounded())  # no calibration
            if student is not None:
                learner.start_from(student)
            teacher_grid = {"last": grid, "same": teacher_grid, "original": None}[stage.teacher]
            if teacher_grid is not None and (missing := [t for t in learner.grid.times.tolist() if t not in teacher_grid.times]):
                raise ValueError(
                    f"grid={learner.grid.kind}, num_steps={learner.grid.num_steps}: t = {missing[0]:g} is not among the "
                    f"{teacher_grid.num_steps} times that its teacher, a student, was trained on; set grid to linspace or trailing in "
                    "both, or expert to original"
                )
        except ValueError as error:
            raise ValueError(f"stage {number} of {len(stages)}: {error}") from error
        student, grid = learner.ema_student, learner.grid


def evaluation_config(config: LearnerConfig, stage: LearnerConfig) -> LearnerConfig:
    """Returns the settings that a stage's student is evaluated under: against the original teacher, with the run's teacher_steps.

    If those are not a multiple of the stage's num_steps, the teacher takes as many steps as the student.
    """
    steps = config.teacher_steps if config.teacher_steps % stage.num_steps == 0 else stage.num_steps
    scale = config.guidance_scale if stage.guidance_range is None else stage.guidance_scale
    return dataclasses.replace(stage.for_evaluation(), teacher_steps=steps, guidance_scale=scale)
