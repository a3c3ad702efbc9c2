"""What the page shows of each arm: its untrained student's scores, pictures and recorded denoisings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from tqdm import tqdm

from ddil_agents.commands.load import load_run
from ddil_agents.comparison.arms import Comparison, Run
from ddil_agents.comparison.results import Rows
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.evaluation.trajectories import record
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy
from ddil_env.mdp import Kernel
from ddil_env.presets import read_yaml

SHOWN = 10  # trajectories of each arm that the page can play


def portray(comparison: Comparison, runs: list[Run]) -> dict[str, Rows]:
    """Judges each run's untrained student, and records the first seed's trajectories, each arm's and the teacher's on its times.

    They are kept in the run's own directory, and so never outlive it.

    Returns:
        What each arm's students scored untrained, by seed.
    """
    evaluators, known, initial = dict[str, Evaluator](), dict[str, dict[str, Any]](), dict[str, Rows]()
    for run in tqdm(runs, desc="untrained students", unit="run"):
        path, files = run.directory / "untrained.json", [run.directory / f"{who}.safetensors" for who in ("trajectories", "teacher")]
        shown = run.seed == comparison.first_seed and not all(file.is_file() for file in files)
        row = json.loads(path.read_text()) if path.is_file() else {}
        if comparison.primary in row and not shown:
            initial.setdefault(run.arm, {})[run.seed] = row
            continue
        learner = load_run(run.directory)
        given = read_yaml(run.directory / "config.yaml")
        told = Evaluation(**given["evaluate"])
        scores = tuple(score for score in told.scores if score == comparison.primary)  # of what costs most, what is asked for
        told = dataclasses.replace(told, also_steps=(), scores=scores, lpips=told.lpips and comparison.primary == "lpips")
        key = repr((run.seed, learner.grid.times.tolist(), learner.config.substeps, learner.teacher_policy.guidance_scale))
        if key not in evaluators:
            evaluators[key] = Evaluator(learner.teacher_policy, learner.grid, told)
        evaluator = evaluators[key]
        untrained = type(learner)(learner.expert, dataclasses.replace(learner.config, init=given.get("init")), learner.support)
        thresholding = learner.config.thresholding if "student" in learner.config.thresholding.roles else None
        start = repr((key, learner.kernel, thresholding, untrained.ema_student.prediction_type, weights_digest(untrained.ema_student)))
        if start not in known:  # most arms of a seed start as the same student
            known[start] = evaluator.evaluate(untrained.student_policy, learner.grid, learner.kernel)
        initial.setdefault(run.arm, {})[run.seed] = known[start]
        write_atomically(path, json.dumps(known[start]))
        if shown:
            noise, c = evaluator.noise()[:SHOWN], None if evaluator.c is None else evaluator.c[:SHOWN]
            actors: list[tuple[DdimPolicy, Kernel]] = [(learner.student_policy, learner.kernel), (evaluator.expert_policy, "ddim")]
            for file, (policy, kernel) in zip(files, actors, strict=True):
                generator = torch.Generator(learner.expert.device).manual_seed(stream_seed(run.seed, "shown"))
                record(policy, evaluator.expert_policy, learner.grid, noise, c, kernel=kernel, generator=generator).save(file)
    return initial


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of the names and bytes of its parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
