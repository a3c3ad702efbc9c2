"""After the training of a run, or of one of its stages: saves the student, evaluates it and writes result.json and pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ddil_agents.agent import Agent
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks, sharding
from ddil_agents.evaluation.animation import save_episodes
from ddil_agents.evaluation.evaluator import Evaluator, evaluate_student
from ddil_agents.evaluation.pictures import save_pictures
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.checkpoint import folder_atomically, write_atomically
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.stages import better_weights, in_eval_mode
from ddil_agents.training.trained_agent import TrainedAgent
from ddil_env import Expert, ExpertPolicy


def save_and_evaluate(
    learner: Agent,
    out: Path,
    evaluation: Evaluation,
    env: dict[str, Any],
    config: LearnerConfig,
    expert: Expert,
    nfe: tuple[int, int],
) -> None:
    """Saves the student, evaluates it beside the original teacher, and writes result.json, samples.png and, in a world, episodes.gif.

    Args:
        learner: The trained agent.
        out: Its run directory, or that of its stage.
        evaluation: Settings of the evaluation.
        env: Name and settings of the env, to record in the result.
        config: The settings that the student is evaluated under: num_steps, grid, teacher_steps, guidance_scale.
        expert: The original teacher.
        nfe: Teacher and student forwards of the training, summed over all processes.
    """
    name = f"{learner.name}@{config.num_steps}"
    with folder_atomically(out / "student") as student:
        expert.save_student(learner.ema_student, student, config.num_steps, config.grid, learner.kernel, *learner.guidance_conditioning())
    store = out / "evaluation" if evaluation.n > evaluation.batch_size else None  # where a killed evaluation goes on
    evaluator = Evaluator(ExpertPolicy(expert, config.substeps, config.guidance_scale), learner.grid, evaluation, store)
    rows = read_metrics(out / "metrics.jsonl")
    cost: dict[str, Any] = dict(zip(("teacher_nfe", "student_nfe"), nfe, strict=True))
    seconds = {"train_seconds": rows[-1]["seconds"] if rows else None}
    models = evaluate_student(evaluator, learner.name, learner.student_policy, learner.kernel, config.grid)
    models[name] = cost | seconds | models[name]
    weights: dict[str, Any] = {}
    if isinstance(learner, TrainedAgent) and not sharding.is_requested():  # the last weights of a sharded network are on many ranks
        last_weights = learner.policy(learner.networks["student"], learner.student_policy.support)
        with in_eval_mode(learner.networks["student"]):
            models[f"{name}, last weights"] = cost | seconds | evaluator.evaluate(last_weights, kernel=learner.kernel)
        if learner.kernel == "ddim":
            weights["error_of_weights"] = better_weights(learner)[0]
    result = {
        "agent": learner.name,
        **env,
        "student": name,
        "training_seed": learner.config.seed,
        "num_updates": learner.step,
        "processes": ranks.world_size(),
        "grid": config.grid,
        "times": learner.grid.times.tolist(),
        **cost,
        **weights,
        "settings": evaluator.describe(),
        "floors": evaluator.floors(),
        "models": models,
        **provenance(expert.device),
    }
    save_pictures(
        out / "samples.png",
        evaluator,
        {**evaluator.baselines(), name: evaluator.sample(learner.student_policy, learner.grid, learner.kernel)},
    )
    if evaluator.episodes is not None:
        student_policy = learner.student_policy, learner.grid, learner.kernel
        save_episodes(out / "episodes.gif", evaluator.episodes, {name: student_policy})
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    if store is not None:
        shutil.rmtree(store)
