"""Checks before a run: what would fail or mislead after hours of training is an error before it."""

from __future__ import annotations

from contextlib import suppress

import torch

from ddil_agents.agent import Agent
from ddil_agents.commands.conflicts import name_owners
from ddil_agents.commands.parse import build_config, expert_and_config, parse
from ddil_agents.config import LearnerConfig
from ddil_agents.evaluation.metrics.diversity import lpips_distance
from ddil_agents.evaluation.settings import Evaluation, extractor_for, load_scorers
from ddil_agents.training.stages import Stage, evaluation_config, iter_learners, plan_stages
from ddil_env import Expert, NoDataError, TimeGrid, check_expert


def check_command_line(agent: type[Agent], arguments: list[str], expert: Expert | None = None) -> tuple[Expert, LearnerConfig, Evaluation]:
    """Builds everything that a command line describes, without training.

    Args:
        agent: The agent's class.
        arguments: The command line, as `run` takes it.
        expert: An expert that an earlier call returned, to use again; default: built from the command line.

    Returns:
        The expert, the settings that the student is evaluated under, and those of the evaluation.

    Raises:
        ValueError: the config, the expert, the agent or the evaluation refuse the settings.
    """
    parser, cfg = parse(agent, arguments)
    if expert is None:
        expert, config = expert_and_config(agent, parser, cfg)
        check_expert(expert)
    else:
        config = build_config(agent, parser, cfg)
    with name_owners(agent):
        stages = plan_stages(config)
    check_data(agent, expert, stages)
    next(iter_learners(agent, expert, stages))
    evaluation = Evaluation(**vars(cfg.evaluate))
    check_evaluation(agent, expert, stages, evaluation)
    return expert, evaluation_config(config, stages[-1].config), evaluation


def check_data(agent: type[Agent], expert: Expert, stages: list[Stage]) -> None:
    """Checks that the expert has data if β draws forward states.

    Raises:
        NoDataError: it has none; the message says how to give it data, and how to train without.
    """
    for beta in (stage.config.beta for stage in stages):
        if beta.forward == 0 and beta.schedule == "constant":
            continue
        try:
            expert.sample_data(1, torch.Generator(expert.device))
        except NoDataError as error:
            given = f"beta.forward={beta.forward:g}" + (f", beta.schedule={beta.schedule}" if beta.schedule != "constant" else "")
            others = "--beta.teacher .5 --beta.student .5" if getattr(agent, "interactive", True) else "--beta.teacher 1"
            constant = " --beta.schedule constant" if beta.schedule != "constant" else ""
            raise NoDataError(
                f"{given}: forward states are diffused data, and {type(expert).__name__} has none; give it data (pictures by --data where "
                f"it takes them; an expert of your own by a method `sample_data`), or train without: --beta.forward 0 {others}{constant}"
            ) from error


def check_evaluation(agent: type[Agent], expert: Expert, stages: list[Stage], evaluation: Evaluation) -> None:
    """Checks that the student of every stage can be saved, and evaluated as the settings say.

    Raises:
        ValueError: weights of a metric are absent, the extractor does not fit, there are too few reference samples, `protocol` is given,
            or the student cannot be exported.
    """
    if evaluation.protocol is not None:
        raise ValueError(
            f"evaluate.protocol={evaluation.protocol}: a run is evaluated on its own prompts, not on the protocol's; leave it out, and "
            f"evaluate the run afterwards by python -m ddil_agents.evaluate --run OUT --config {evaluation.protocol} --captions FILE"
        )
    extractor_for(expert, evaluation)
    load_scorers(evaluation, expert.device)
    if evaluation.lpips:
        lpips_distance(evaluation.weights, device=expert.device)
    with suppress(NoDataError):
        for held_out in (False, True):
            if (m := len(expert.reference_data(evaluation.n, held_out)[0])) < 10:
                raise ValueError(
                    f"the expert has {m} {'held-out' if held_out else 'training'} samples to compare with; the metrics need 10: "
                    "give it more data, or another --env.held_out, 0 for none, where it takes one"
                )
    for config in (stage.config for stage in stages):
        expert.check_export(config.num_steps, config.grid, agent.kernel, config.student.get("prediction_type"))
        for num_steps in evaluation.also_steps:
            TimeGrid(expert.schedule, num_steps, config.grid)
