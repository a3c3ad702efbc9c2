"""Stages: a chain of runs in one command, each student starting from the last one's weights.

    stages:                                              # progressive distillation, Salimans & Ho 2021, Alg. 2
      - {num_steps: 16, num_updates: 5000}               # 32 → 16; its teacher is the expert
      - {num_steps: 8, num_updates: 6000}                # 16 → 8; its teacher is the last stage's student
      - {num_steps: 8, num_updates: 4000, expert: same}  # the same teacher again, with a new warm-up (DDIL §5)

The next stage's teacher is whichever of the student's weights, the average over its steps or the last, errs less on held-out states.

Conversion and guidance conditioning are stages too, with as many student steps as teacher steps: one step of the student is
then one of the teacher, and the target is the teacher's own x̂_0. A student that teaches is asked
at no times but those that it was trained on, so its own student's must be among them. Each stage leaves a run's files in
`stage_N/`; what is resumed, reported and loaded is the whole.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from jsonargparse import ArgumentParser
from torch import nn

from ddil_agents.devices import sharding
from ddil_agents.settings import build, check, refuse_unknown
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
    """One run of the chain.

    Attributes:
        config: Its settings.
        teacher: last, same or original.
        directory: Its place below the run's, `.` where it is the only one.
    """

    config: LearnerConfig
    teacher: str
    directory: str


def plan(config: LearnerConfig) -> list[Stage]:
    """Every stage's settings, checked before the first begins.

    `teacher_steps` of a stage defaults to the steps of its teacher: of the last student, or of the last stage's teacher.

    Raises:
        ValueError: a setting that does not exist or does not fit, an unknown teacher; names the stage.
    """
    if not config.stages:
        return [Stage(config, "original", ".")]
    stages: list[Stage] = []
    taught = False  # whether the teacher is a student, which has been trained at its own times alone
    absorbed = False  # whether the teacher's guidance is built into its weights
    for number, changes in enumerate(config.stages, 1):
        changes = dict(changes)
        teacher = changes.pop("expert", config.teachers[0] if stages else "original")
        try:
            if teacher not in config.teachers or (not stages and teacher != "original"):
                raise ValueError(f"expert={teacher!r}: choose one of {', '.join(config.teachers)}; the first stage's is the original")
            for key, why in (("stages", "a stage has none of its own"), ("mixed_precision", "it holds for the whole process")):
                if key in changes:
                    raise ValueError(f"{key} cannot be set for one stage: {why}")
            last = stages[-1].config if stages else config
            steps = {"last": last.num_steps, "same": last.teacher_steps, "original": config.teacher_steps}[teacher]
            taught = {"last": True, "same": taught, "original": False}[teacher]
            absorbed = {"last": last.guidance_range is None, "same": absorbed, "original": False}[teacher]
            own = {
                "init": config.init if not stages else None,
                "teacher_steps": steps,
                "seed": stream_seed(config.seed, f"stage {number}"),
            } | changes
            if absorbed:
                asked = {key: changes.get(key, getattr(config, key)) for key in ("guidance_range", "guidance_scale")}
                if asked["guidance_range"] is not None or changes.get("guidance_scale") is not None:
                    raise ValueError(
                        f"{asked}: its teacher is a student with one guidance built in; use expert: original, or set both to null"
                    )
                own |= {"guidance_scale": None, "guidance_range": None}
            if taught and steps % own["teacher_steps"]:
                raise ValueError(
                    f"teacher_steps={own['teacher_steps']}: its teacher is a student of {steps} steps, which it was trained on alone; "
                    f"leave it out, or choose a divisor of {steps}"
                )
            made = _changed(config, own)
        except (ValueError, TypeError) as error:
            raise ValueError(f"stage {number} of {len(config.stages)}: {error}") from error
        stages.append(Stage(made, teacher, f"stage_{number}"))
    return stages


def _changed(config: LearnerConfig, changes: dict[str, Any]) -> LearnerConfig:
    """The config with some settings changed, of nested ones those that are given; types are checked as in a YAML file."""
    settings, hints = dataclasses.asdict(config) | {"stages": []}, get_type_hints(type(config))
    for key, value in changes.items():
        if key not in settings:
            refuse_unknown(key, [*settings])
        nested = dataclasses.is_dataclass(getattr(config, key))
        if nested and not isinstance(value, dict):
            raise ValueError(f"{key}={value!r}: need a mapping of {', '.join(settings[key])}")
        check(key, value, hints[key])
        settings[key] = settings[key] | value if nested else value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(type(config), None)
    return build(type(config), parser.parse_object(settings))


def learners(agent: type[Agent], expert: Expert, stages: list[Stage], out: Path | None = None) -> Iterator[tuple[Stage, Agent]]:
    """Each stage's learner, when the one before it has been trained; one that an earlier run finished or began is taken up.

    Args:
        agent: The class of learner, or an agent of one stage.
        expert: The original teacher.
        stages: From `plan`.
        out: The run directory to take up, if any.
    """
    if len(stages) > 1:
        _rehearse(agent, expert, stages)
    teacher = expert
    last: NetworkDenoiser | None = None  # the last stage's student, no more than this: its optimiser and its buffer may go
    told: float | None = None  # the guidance that it answers for, if it has an embedding
    grid: TimeGrid | None = None  # the times that it was trained on
    before = stages[0].config
    support: Support | None = None
    for stage in stages:
        if last is not None and stage.teacher == "last":
            teacher = Distilled(expert, last, told, grid)
        elif stage.teacher == "original":
            teacher = expert
        place = None if out is None else out / stage.directory
        stored, nfe = (None, 0) if place is None else read_support(place)
        if stored is not None or before.thresholding != stage.config.thresholding:
            support = stored
        learner: Any = agent(teacher, stage.config, support)  # a TrainedAgent, if there are stages or checkpoints
        learner.teacher_nfe += nfe
        if last is not None:
            learner.start_from(last)
        if place is not None and checkpoints(place / "checkpoints"):
            learner.load(place / "checkpoints")
        yield stage, learner
        if sharding.asked():
            learner.trainer.unshard()  # a teacher answers each rank by itself
        if stage is stages[-1]:
            return
        comparable = learner.kernel == "ddim" and not sharding.asked()  # sharded, the last weights are on many ranks
        last = better_weights(learner)[1] if comparable else learner.ema_student
        grid, before, support = learner.grid, stage.config, learner.support
        told = None if before.guidance_range is None else learner.teacher_policy.guidance_scale
        del learner
        gc.collect()  # an agent and its trainer refer to each other


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Inside, the network is as it will be used: without dropout, and with the statistics that it has."""
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)


@torch.no_grad()
def better_weights(learner: TrainedAgent, n: int = 64) -> tuple[dict[str, float], NetworkDenoiser]:
    """The errors of the average and of the last weights, E (a − a*)² per entry, and the network with the lesser one.

    On n states at times of the grid, the same for both: held-out data, diffused, or without any the teacher's own rollouts. As an
    evaluation's, its forwards of the teacher are not counted among those of training.
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


def _rehearse(agent: type[Any], expert: Expert, stages: list[Stage]) -> None:
    """Builds each stage's learner once, on the original expert, so that what it refuses is refused before any training.

    Raises:
        ValueError: so, or its times are not among those that its teacher was trained on; names the stage.
    """
    last: NetworkDenoiser | None = None
    grid: TimeGrid | None = None  # of the last student
    known: TimeGrid | None = None  # of the teacher; None: it knows all times
    for number, stage in enumerate(stages, 1):
        try:
            learner = agent(expert, stage.config, Unbounded())  # no calibration
            if last is not None:
                learner.start_from(last)
            known = {"last": grid, "same": known, "original": None}[stage.teacher]
            if known is not None and (strange := [t for t in learner.grid.times.tolist() if t not in known.times]):
                raise ValueError(
                    f"grid={learner.grid.kind}, num_steps={learner.grid.num_steps}: t = {strange[0]:g} is not among the {known.num_steps} "
                    f"times that its teacher, a student, was trained on; set grid to linspace or trailing in both, or expert to original"
                )
        except ValueError as error:
            raise ValueError(f"stage {number} of {len(stages)}: {error}") from error
        last, grid = learner.ema_student, learner.grid


def evaluated_as(config: LearnerConfig, stage: LearnerConfig) -> LearnerConfig:
    """A stage's settings as its student is evaluated: against the original teacher, at the run's own teacher_steps.

    Where those are no multiple of the stage's steps, against the teacher in as many steps as the student.
    """
    steps = config.teacher_steps if config.teacher_steps % stage.num_steps == 0 else stage.num_steps
    scale = config.guidance_scale if stage.guidance_range is None else stage.guidance_scale
    return dataclasses.replace(stage.for_evaluation(), teacher_steps=steps, guidance_scale=scale)
