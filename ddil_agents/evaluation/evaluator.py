"""Evaluating a policy: its samples against data, and its trajectories against the expert's from the same noise.

samples.py    draws samples and holds the data     quality.py    FID, recall and other scores of samples
cache.py      the files of the cache               shift.py      covariate shift, step by step
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddil_agents.evaluation.cache import read_cached, read_or_compute, write_cached
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.evaluation.metrics.distances import split_half
from ddil_agents.evaluation.metrics.diversity import LPIPS, pairwise_distance
from ddil_agents.evaluation.metrics.features import Features
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_agents.evaluation.metrics.pictures import RESIZE
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.quality import frechet_between_halves, read_folder_features, score_features
from ddil_agents.evaluation.samples import DrawnSamples, SampleDrawer
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.evaluation.shift import shift_between_halves, shift_from_data, shift_from_expert
from ddil_env import DdimPolicy, Expert, ExpertPolicy, TimeGrid
from ddil_env.mdp import Kernel
from ddil_env.time_grid import GridKind

if TYPE_CHECKING:
    from ddil_agents.agent import Agent


class Evaluator(SampleDrawer):
    """Evaluates policies under one set of settings: all share the data, the noise, the conditions and the expert's trajectories.

    Attributes:
        few_step_expert: The expert in as few steps as the student.
        expert_samples: The expert's samples, drawn at the start.
        expert_path: Its first trajectories on the grid, (n_paths, N + 1, *sample_shape).
        real_features: Features of the reference, or of the folder of pictures; None without either.
        training_features: Features (m, d) and classes (m,) of the training data, where the reference is held-out data; else None.
        real_noised: Draws of the forward marginals from the reference, (N, m, *sample_shape); without data there is no such attribute.
    """

    def __init__(self, expert_policy: ExpertPolicy, grid: TimeGrid, settings: Evaluation | None = None, store: Path | None = None) -> None:
        super().__init__(expert_policy, grid, settings, store)
        self.few_step_expert = ExpertPolicy(self.expert, 1, expert_policy.guidance_scale, expert_policy.project)
        self.expert_samples = self._draw(expert_policy, grid, "ddim", self._baseline_names()[0])
        self.expert_path = self.expert_samples.path
        self.real_features = self._read_real_features()
        self.training_features: tuple[Features, Tensor | None] | None = None
        if self.training is not None and self.settings.images is None:
            self.training_features = self.extract_features(self.training)
        if self.real is not None:
            self.real_noised = self._draw_marginals(self.real, self._generator("forward"))

    def _read_real_features(self) -> Features | None:
        """Features of the folder of pictures if there is one, else of the expert's reference."""
        if self.settings.images is None or self._image_folder_digest is None:
            return None if self.real is None else self.extract_features(self.real)[0]
        folder_id = self._image_folder_digest.rpartition(" ")[2]
        return read_folder_features(self.extractor, Path(self.settings.images), folder_id, self.expert_cache, self.expert.device)

    def _draw_marginals(self, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """Noises data (k, *sample_shape) to the times of the grid, (N, m, *sample_shape), m = min(k, n_paths)."""
        x_0, draws = x_0[: self.settings.n_paths], []
        for t in self.grid.times[:-1]:
            eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
            draws.append(self.expert.schedule.add_noise(x_0, eps, t.expand(len(x_0))))
        return torch.stack(draws)

    def floors(self) -> dict[str, Any]:
        """Scores of real data and of the expert against themselves: no model can be expected to score better.

        Returns:
            training_data: The training data in the place of a model's samples. Against the held-out reference they score as a perfect
                model does; in the columns `_train`, as a model does that has memorised them.
            real_halves: One half of the reference against the other.
            teacher_halves: One half of the expert's states and samples against the other; samples are matched by class. Their
                frechet_to_expert is the floor for samplers that draw fresh noise, and so share no noise with the expert. Since the bias
                of the distance is proportional to 1/n, n samples of a perfect model are about half of it away.
            n and n_paths are the numbers of samples and of trajectories on each side.
        """
        floors: dict[str, Any] = {}
        if self.real is not None and (halves := shift_between_halves(self.real_noised.transpose(0, 1))):
            floors["real_halves"] = {"n": halves["n_paths"], **halves}
        if (half := self.n // 2) >= 2:
            shift = shift_between_halves(self.expert_path[:, :-1])
            shift = {name + "_to_expert" * (name != "n_paths"): value for name, value in shift.items()}
            frechet = frechet_between_halves(self.expert_samples.features, self.c, half)
            floors["teacher_halves"] = {"n": half, "frechet_to_expert": frechet, **shift}
        if self.settings.images is not None and self.real_features is not None:
            distance = split_half(frechet_distance, self.real_features)
            floors.setdefault("real_halves", {}).update({"n": len(self.real_features) // 2, "frechet": distance})
        if self.training is not None and self.training_features is not None:
            noised, m = self._draw_marginals(self.training, self._generator("forward training")), len(self.training)
            scores = self._score(*self.training_features, None if self.c is None else self.c[:m])
            floors["training_data"] = {"n": m, "n_paths": noised.shape[1], **scores, **self._shift_from_data(noised.transpose(0, 1))}
        for name, values in {} if self.episodes is None else self.episodes.floors().items():
            floors.setdefault(name, {}).update(values)
        return floors

    def _score(self, features: Features, classes: Tensor | None, c: Tensor | None) -> dict[str, Any]:
        """Scores of samples against the reference and the training data."""
        training = None if self.training_features is None else self.training_features[0]
        return score_features(features, self.real_features, training, classes, c)

    def _shift_from_data(self, path: Tensor) -> dict[str, list[float]]:
        """Covariate shift of states (m, N or N + 1, *sample_shape) from noised data; empty without data."""
        return {} if self.real is None else shift_from_data(path, self.real_noised)

    @torch.no_grad()
    def evaluate(
        self, policy: DdimPolicy, grid: TimeGrid | None = None, kernel: Kernel = "ddim", name: str | None = None
    ) -> dict[str, Any]:
        """Every metric of one policy. Lists have a value for each step of the grid.

        With another grid than the evaluator's only the samples are evaluated, because its states are at other times. Under the
        `renoise` kernel actions are still next latents of DDIM, taken at the states that the fresh noise leads to.

        Args:
            policy: The policy.
            grid: The times that it samples at; default: the evaluator's.
            kernel: The transition that it samples with.
            name: The name under which its batches are cached; None caches nothing.

        Returns:
            frechet, kid, precision, recall, density, coverage, vendi, accuracy: samples against the reference.
            frechet_train, recall_train, coverage_train: samples against training data, where the reference is held-out data.
            frechet_to_expert: samples against the expert's.
            endpoint_rmse, path_rmse: samples, and latents after each step, against the expert's from the same noise; None where the
                policy draws more noise on the way, so that even a perfect student has other samples.
            clip_score, hpsv2, lpips: if the settings ask for them.
            action_mse_own, action_mse_expert, action_mse_forward: E (a − a*)² per entry on the policy's own states, on the expert's and
                on the noised reference. action_ratio: the first over the last; over the second without data.
            shift, mmd_shift, gaussian_shift: sliced W2, unbiased MMD² and Gaussian W2 between visited latents and the noised reference.
            shift_to_expert, mmd_shift_to_expert, gaussian_shift_to_expert: between visited latents and the expert's from the same
                noise, 0 for the expert; the MMD² leaves out the pairs that share their noise.
            diversity: mean distance between two visited latents, per entry.
            nfe_per_sample, seconds: cost of sampling.
            return, success, length, error_own, …: of episodes, where the expert has a world (episodes.py).
        """
        samples = self._draw(policy, grid or self.grid, kernel, name)
        path, m = samples.path, min(self.settings.n_action, len(samples.path))
        result = self._score_samples(samples, policy, grid or self.grid, kernel, name)
        if grid is not None:
            return result
        c = None if self.c is None else self.c[:m]
        own, on_expert, on_forward = [], [], []
        for i, (t, s) in enumerate(zip(self.grid.times[:-1], self.grid.times[1:], strict=True)):
            t_b, s_b = t.expand(m), s.expand(m)
            expert_action = self.expert_policy.act(path[:m, i], t_b, s_b, c)
            action = path[:m, i + 1] if kernel == "ddim" else policy.act(path[:m, i], t_b, s_b, c)
            own.append(float((action - expert_action).square().mean()))
            action = policy.act(self.expert_path[:m, i], t_b, s_b, c)
            on_expert.append(float((action - self.expert_path[:m, i + 1]).square().mean()))
            if self.real is not None:
                x_t, expert_action = self._forward_actions[i]
                k = len(x_t)
                action = policy.act(x_t, t.expand(k), s.expand(k), None if self.real_c is None else self.real_c[:k])
                on_forward.append(float((action - expert_action).square().mean()))
        path_rmse = None
        if is_deterministic(self.grid, kernel):
            path_rmse = [_rmse(path[:, i + 1], self.expert_path[:, i + 1]) for i in range(self.grid.num_steps)]
        result |= {
            "path_rmse": path_rmse,
            "action_mse_own": own,
            "action_mse_expert": on_expert,
            "action_mse_forward": on_forward or None,
            "action_ratio": [a / b if b else None for a, b in zip(own, on_forward or on_expert, strict=True)],
            "diversity": [pairwise_distance(path[:, i]) for i in range(self.grid.num_steps + 1)],
        }
        shift_to_expert = shift_from_expert(path, self.expert_path, self.grid.num_steps)
        return result | {"shift": None, **self._shift_from_data(path), **shift_to_expert}

    @cached_property
    def _forward_actions(self) -> list[tuple[Tensor, Tensor]]:
        """Noised data at each time, and the expert's actions there, each (m, *sample_shape)."""
        noised = self.real_noised[:, : self.settings.n_action]
        m = noised.shape[1]
        c = None if self.real_c is None else self.real_c[:m]
        path = self._cache_path(f"{self._baseline_names()[0]}-on-data", self.expert_policy, self.grid, "ddim", "actions.safetensors")
        if (cached := read_cached(path, "it is computed")) is not None:
            return list(zip(noised, cached["actions"].to(noised.device), strict=True))
        steps = zip(noised, self.grid.times[:-1], self.grid.times[1:], strict=True)
        actions = torch.stack([self.expert_policy.act(x_t, t.expand(m), s.expand(m), c) for x_t, t, s in steps])
        write_cached(path, {"actions": actions})
        return list(zip(noised, actions, strict=True))

    def baselines(self) -> dict[str, Tensor]:
        """The expert's samples in its full number of steps, and in as few as the student has, each (b, *sample_shape)."""
        full, few = self._baseline_names()
        return {full: self.expert_path[:, -1], few: self.sample(self.few_step_expert, self.grid)}

    def evaluate_baselines(self) -> dict[str, Any]:
        """The metrics of the expert in its full number of steps, and in as few as the student has; the latter are cached."""
        full, few = self._baseline_names()
        scores = "-".join(["scores", *(f"{name}-{digest}" for name, digest in self.digests_of_weights().items())])
        path = self._cache_path(f"{few}-beside-{full}", self.few_step_expert, self.grid, "ddim", f"{scores}.json")
        return {full: self.score_expert(), few: read_or_compute(path, lambda: self.evaluate(self.few_step_expert, name=few))}

    def score_expert(self) -> dict[str, Any]:
        """The metrics of the expert's samples that were drawn at the start."""
        scores = self._score_samples(self.expert_samples, self.expert_policy, self.grid, "ddim", self._baseline_names()[0])
        distances = {"frechet_to_expert": 0.0, "endpoint_rmse": 0.0}
        shift_to_expert = shift_from_expert(self.expert_path, self.expert_path, self.grid.num_steps)
        return scores | distances | self._shift_from_data(self.expert_path) | shift_to_expert

    def _score_samples(self, samples: DrawnSamples, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None) -> dict[str, Any]:
        """What a policy's samples score and cost."""
        deterministic = is_deterministic(grid, kernel)
        result = self._score(samples.features, samples.classes, self.c) | {
            "nfe_per_sample": policy.nfe_per_action * grid.num_steps,
            "frechet_to_expert": frechet_distance(self.expert_samples.features, samples.features),
            "endpoint_rmse": _rmse(samples.path[:, -1], self.expert_path[:, -1]) if deterministic else None,
            "seconds": samples.seconds,
            **samples.scores,
        }
        if self.settings.lpips:
            result["lpips"] = self.lpips_diversity(policy, grid, kernel, name)
        return result if self.episodes is None else result | self.episodes.evaluate(policy, kernel, grid)

    @cached_property
    def episodes(self) -> EpisodeEvaluator | None:
        """Runs episodes, of an expert that has a world."""
        if self.expert.make_world(1) is None:
            return None
        return EpisodeEvaluator(self.expert_policy, self.grid, self.settings.n_episodes, self.settings.seed)

    def describe(self) -> dict[str, Any]:
        """How this evaluator measures, as a result records it: results that differ in it are not compared."""
        s, described = self.settings, self._base_settings()
        if self.episodes is not None:
            described["n_episodes"] = s.n_episodes
        if s.protocol is not None:
            described["protocol"] = s.protocol
        if self.extractor.of_pictures or s.scores or s.lpips:
            described["resize"] = RESIZE
        if self._image_folder_digest is not None:
            described["images"] = self._image_folder_digest
        if s.scores:
            described["scores"] = {name: scorer.name for name, scorer in self.scorers.items()}
        if s.lpips:
            described["lpips"] = LPIPS
        if weights := self.digests_of_weights():
            described["weights"] = weights
        if (captions := self._captions_digest()) is not None:
            described["captions"] = captions
        return described


def is_deterministic(grid: TimeGrid, kernel: Kernel) -> bool:
    """Whether x_T alone determines the sample: no more noise is drawn on the way."""
    return kernel == "ddim" or grid.num_steps == 1


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def evaluate_expert(
    expert: Expert, steps: list[int], settings: Evaluation, guidance_scale: float | None = None, store: Path | None = None
) -> dict[str, Any]:
    """The expert's own metrics at each number of steps.

    Args:
        expert: The teacher.
        steps: Numbers of sampling steps; the largest is the one that the others are compared with.
        settings: Of the evaluation.
        guidance_scale: w; default: the expert's.
        store: Folder of the cache; None caches nothing.
    """
    most = max(steps)
    evaluator = Evaluator(ExpertPolicy(expert, 1, guidance_scale), TimeGrid(expert.schedule, most).to(expert.device), settings, store)
    models = {}
    for n in steps:
        grid = TimeGrid(expert.schedule, n).to(expert.device)
        name, policy = f"teacher@{n}", ExpertPolicy(expert, 1, guidance_scale)
        models[name] = evaluator.score_expert() if n == most else evaluator.evaluate(policy, grid, name=name)
    return {"settings": evaluator.describe(), "floors": evaluator.floors(), "models": models, **provenance(expert.device)}


def evaluate_student(evaluator: Evaluator, agent: str, policy: DdimPolicy, kernel: Kernel, kind: GridKind) -> dict[str, Any]:
    """The metrics of a student and of its teacher, on the evaluator's grid and in `also_steps` steps.

    Args:
        evaluator: Of the student's grid and teacher.
        agent: Name of the algorithm; the student is then called `agent@4`.
        policy: The student.
        kernel: The transition that it samples with.
        kind: How the grids of `also_steps` are spaced.
    """
    own = f"{agent}@{evaluator.grid.num_steps}"
    models = evaluator.evaluate_baselines() | {own: evaluator.evaluate(policy, kernel=kernel, name=own)}
    for more in evaluator.settings.also_steps:
        grid = TimeGrid(evaluator.expert.schedule, more, kind).to(evaluator.expert.device)
        models.setdefault(few := f"teacher@{more}", evaluator.evaluate(evaluator.few_step_expert, grid, name=few))
        models.setdefault(own := f"{agent}@{more}", evaluator.evaluate(policy, grid, kernel, own))
    return models


def evaluate_run(learner: Agent, settings: Evaluation, store: Path | None = None) -> dict[str, Any]:
    """A student's metrics beside its teacher's, on the agent's own grid; `store` is the folder of the cache."""
    evaluator = Evaluator(learner.teacher_policy, learner.grid, settings, store)
    models = evaluate_student(evaluator, learner.name, learner.student_policy, learner.kernel, learner.config.grid)
    return {"settings": evaluator.describe(), "floors": evaluator.floors(), "models": models, **provenance(learner.expert.device)}
