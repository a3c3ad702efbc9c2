"""Evaluating the untrained student of each run, and recording the trajectories that the page plays."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ddil_agents.agent import Agent
from ddil_agents.commands.load import load_run
from ddil_agents.comparison.arms import Comparison, Run
from ddil_agents.comparison.results import Rows
from ddil_agents.evaluation.cache import read_numbers
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.evaluation.trajectories import record
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy
from ddil_env.mdp import Kernel
from ddil_env.presets import read_yaml

NUM_TRAJECTORIES = 10  # of each arm, on the page


def evaluate_untrained(comparison: Comparison, runs: list[Run]) -> dict[str, Rows]:
    """Evaluates the untrained student of each run, and records trajectories of the runs of the first seed.

    The results are cached in the run's directory: untrained.json, trajectories.safetensors and teacher.safetensors.

    Returns:
        By arm and seed, the metrics of the untrained student.
    """
    evaluators, results, initial = dict[str, Evaluator](), dict[str, dict[str, Any]](), dict[str, Rows]()
    for run in tqdm(runs, desc="untrained students", unit="run"):
        path, files = run.directory / "untrained.json", [run.directory / f"{who}.safetensors" for who in ("trajectories", "teacher")]
        needs_trajectories = run.seed == comparison.first_seed and not all(file.is_file() for file in files)
        row = read_numbers(path) if path.is_file() else {}
        if comparison.primary in row and not needs_trajectories:
            initial.setdefault(run.arm, {})[run.seed] = row
            continue
        learner = load_run(run.directory)
        config = read_yaml(run.directory / "config.yaml")
        evaluation = Evaluation(**config["evaluate"])
        scores = tuple(score for score in evaluation.scores if score == comparison.primary)  # scores and LPIPS are expensive
        lpips = evaluation.lpips and comparison.primary == "lpips"
        evaluation = dataclasses.replace(evaluation, also_steps=(), scores=scores, lpips=lpips)
        key = repr((run.seed, learner.grid.times.tolist(), learner.config.substeps, learner.teacher_policy.guidance_scale))
        if key not in evaluators:
            evaluators[key] = Evaluator(learner.teacher_policy, learner.grid, evaluation)
        evaluator = evaluators[key]
        untrained = type(learner)(learner.expert, dataclasses.replace(learner.config, init=config.get("init")), learner.support)
        thresholding = learner.config.thresholding if "student" in learner.config.thresholding.roles else None
        student = repr((key, learner.kernel, thresholding, untrained.ema_student.prediction_type, weights_digest(untrained.ema_student)))
        if student not in results:  # most arms of a seed start from the same student
            results[student] = evaluator.evaluate(untrained.student_policy, learner.grid, learner.kernel)
        initial.setdefault(run.arm, {})[run.seed] = results[student]
        write_atomically(path, json.dumps(results[student]))
        if needs_trajectories:
            record_trajectories(learner, evaluator, run.seed, *files)
    return initial


def record_trajectories(learner: Agent, evaluator: Evaluator, seed: int, student_file: Path, teacher_file: Path) -> None:
    """Records trajectories of a student, and of the teacher at the student's times, from the same noise."""
    x_T = evaluator.noise()[:NUM_TRAJECTORIES]
    c = None if evaluator.c is None else evaluator.c[:NUM_TRAJECTORIES]
    policies: list[tuple[Path, DdimPolicy, Kernel]] = [
        (student_file, learner.student_policy, learner.kernel),
        (teacher_file, evaluator.expert_policy, "ddim"),
    ]
    for file, policy, kernel in policies:
        generator = torch.Generator(learner.expert.device).manual_seed(stream_seed(seed, "shown"))
        record(policy, evaluator.expert_policy, learner.grid, x_T, c, kernel=kernel, generator=generator).save(file)


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of the names and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
