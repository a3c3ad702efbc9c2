"""Judging a policy: its samples against data, and its trajectories against the expert's from the same noise."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ddil_agents.evaluation.metrics.coverage import precision_recall_density_coverage
from ddil_agents.evaluation.metrics.distances import mmd2, sliced_wasserstein, split_half
from ddil_agents.evaluation.metrics.diversity import LPIPS, pairwise_distance
from ddil_agents.evaluation.metrics.features import Features
from ddil_agents.evaluation.metrics.frechet import frechet_distance, gaussian_w2
from ddil_agents.evaluation.metrics.kid import kernel_distance
from ddil_agents.evaluation.metrics.pictures import RESIZE, load_pictures, picture_files
from ddil_agents.evaluation.metrics.vendi import vendi_score
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.samples import Drawn, Samples, kept
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy, Expert, ExpertPolicy, TimeGrid
from ddil_env.mdp import Kernel
from ddil_env.time_grid import GridKind
from ddil_env.weights import read_tensors

if TYPE_CHECKING:
    from ddil_agents.agent import Agent

KEPT = 1024  # real pictures whose features are written at a time


class Evaluator(Samples):
    """What every model of one comparison is held against: data, noise, conditions and the expert's trajectories, drawn once."""

    def __init__(self, expert_policy: ExpertPolicy, grid: TimeGrid, settings: Evaluation | None = None, store: Path | None = None) -> None:
        super().__init__(expert_policy, grid, settings, store)
        self.few_steps = ExpertPolicy(self.expert, 1, expert_policy.guidance_scale, expert_policy.project)
        self.expert_drawn = self._draw(expert_policy, grid, "ddim", self._baseline_names()[0])
        self.expert_path = self.expert_drawn.path
        self.real_features = self._real_features()
        self.training_read = None if self.training is None or self.settings.images is not None else self._read(self.training)
        if self.real is not None:
            self.real_noised = self._noised(self.real, self._generator("forward"))

    def _real_features(self) -> Features | None:
        """Of the folder of pictures, or else of the expert's own reference."""
        if self.settings.images is None or self._images is None:
            return None if self.real is None else self._read(self.real)[0]
        files, values = picture_files(Path(self.settings.images)), []
        digest = self._images.rpartition(" ")[2]
        with tqdm(total=len(files), desc="real pictures", unit="picture") as bar:
            for start in range(0, len(files), KEPT):
                part, read = files[start : start + KEPT], []
                place = None if self.shared is None else self.shared / f"images-{digest}-{start:06d}.safetensors"
                if place is not None and place.is_file():
                    values.append(read_tensors(place, "remove it, and its pictures are read again")["features"])
                    bar.update(len(part))
                    continue
                for pictures in load_pictures(part):
                    read.append(self.extractor.features(pictures))
                    bar.update(len(pictures))
                values.append(torch.cat(read).cpu())
                if place is not None:
                    write_atomically(place, save({"features": values[-1]}))
        return Features(self.extractor.name, torch.cat(values).to(self.expert.device))

    def _noised(self, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """The forward marginals at the times of the grid, (N, m, *sample_shape), m ≤ n_paths."""
        x_0, draws = x_0[: self.settings.n_paths], []
        for t in self.grid.times[:-1]:
            eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
            draws.append(self.expert.schedule.add_noise(x_0, eps, t.expand(len(x_0))))
        return torch.stack(draws)

    def to_data(self, features: Features, classes: Tensor | None = None, c: Tensor | None = None) -> dict[str, Any]:
        """Fréchet and kernel distance, precision, recall, density, coverage, Vendi score; accuracy where classes (n,) can be told."""
        result: dict[str, Any] = {"vendi": vendi_score(features)}
        if self.real_features is not None:
            result |= _compared(self.real_features, features)
        if self.training_read is not None:  # by which a model that memorises does better than by held-out data
            found = _compared(self.training_read[0], features)
            result |= {f"{name}_train": found[name] for name in ("frechet", "recall", "coverage")}
        if classes is not None and c is not None:
            result["accuracy"] = float((classes == c).double().mean())
        return result

    def floors(self) -> dict[str, Any]:
        """What a perfect model would score: no model can be asked for less.

        Returns:
            training_data: against the held-out reference, as a perfect model; in the columns `_train` as one that has memorised them.
            real_halves, teacher_halves: two halves of the reference, or of the expert's own states and samples.
            n and n_paths are the numbers of samples and of trajectories on each side. The teacher's halves are matched by class.
            Their frechet_to_expert is the floor of samplers that draw fresh noise, and so share none with the expert: of n samples
            even a perfect one is about half of it away, since this bias goes as 1/n, and nearer where no two samples share a condition,
            which halves then cannot be matched by.
        """
        found: dict[str, Any] = {}
        if self.real is not None and (halves := self._halves(self.real_noised.transpose(0, 1))):
            found["real_halves"] = {"n": halves["n_paths"], **halves}
        theirs = self._halves(self.expert_path[:, :-1])
        theirs = {name + "_to_expert" * (name != "n_paths"): value for name, value in theirs.items()}
        if (half := self.n // 2) >= 2:
            found["teacher_halves"] = {"n": half, "frechet_to_expert": self._between_teachers(half), **theirs}
        if self.settings.images is not None and self.real_features is not None:
            distance = split_half(frechet_distance, self.real_features)
            found.setdefault("real_halves", {}).update({"n": len(self.real_features) // 2, "frechet": distance})
        if self.training is not None and self.training_read is not None:
            noised = self._noised(self.training, self._generator("forward training"))
            m = len(self.training)
            scores = self.to_data(*self.training_read, None if self.c is None else self.c[:m]) | self._shift(noised.transpose(0, 1))
            found["training_data"] = {"n": m, "n_paths": noised.shape[1], **scores}
        return found

    def _shift(self, path: Tensor) -> dict[str, list[float]]:
        """Covariate shift by step: between visited states (m, N or N + 1, *sample_shape) and the forward marginals."""
        if self.real is None:
            return {}
        pairs = [(path[: len(x), i], x[: len(path)]) for i, x in enumerate(self.real_noised)]
        return self._between(pairs, list(self.real_noised), paired=True)

    def _shift_to_expert(self, path: Tensor) -> dict[str, list[float]]:
        """The same from the expert's states, each from the same noise as the policy's of its index: 0 for the expert itself."""
        theirs = [self.expert_path[:, i] for i in range(self.grid.num_steps)]
        found = self._between([(path[:, i], x) for i, x in enumerate(theirs)], theirs, paired=True)
        return {f"{name}_to_expert": values for name, values in found.items()}

    def _halves(self, path: Tensor) -> dict[str, Any]:
        """The floor of all three: between random halves of states (m, N, *sample_shape), where both have two."""
        states = list(path.transpose(0, 1))
        if len(path) < 4:
            return {}
        return {"n_paths": len(path) // 2, **self._between([split_half(lambda a, b: (a, b), x) for x in states], states)}

    def _between_teachers(self, half: int) -> float:
        """Fréchet distance between two sets of the expert's own samples, every other one in order of class."""
        order = torch.arange(self.n) if self.c is None else self.c.argsort(stable=True)
        even, odd = (self.expert_drawn.features[order[k : 2 * half : 2]] for k in (0, 1))
        return frechet_distance(even, odd)

    def _between(self, pairs: list[tuple[Tensor, Tensor]], scale: list[Tensor], paired: bool = False) -> dict[str, list[float]]:
        """Distances by step between two sets of states, each (m, *sample_shape).

        Args:
            pairs: The two sets at each step.
            scale: States that set the width of the kernel.
            paired: Whether two states of one index are of one condition, or started from one noise: the MMD² leaves such pairs out.
        """
        return {
            "shift": [sliced_wasserstein(a, b) for a, b in pairs],
            "mmd_shift": [mmd2(a, b, _width(x), paired=paired) for (a, b), x in zip(pairs, scale, strict=True)],
            "gaussian_shift": [gaussian_w2(a, b) for a, b in pairs],
        }

    @torch.no_grad()
    def evaluate(
        self, policy: DdimPolicy, grid: TimeGrid | None = None, kernel: Kernel = "ddim", name: str | None = None
    ) -> dict[str, Any]:
        """Every metric of one policy; lists run over the steps of the grid.

        Args:
            policy: Who is judged.
            grid: Its times, if they are others than the judge's.
            kernel: How it samples.
            name: Under which its batches are kept in the store.

        Returns:
            frechet, kid, precision, recall, density, coverage, vendi, accuracy: samples against the reference.
            frechet_train, recall_train, coverage_train: samples against training data, where the reference is held out.
            frechet_to_expert: samples against the expert's own.
            endpoint_rmse, path_rmse: samples, and the latents after each step, against the expert's from the same noise; None
                where `renoise` draws more noise on the way, which even a perfect student then answers otherwise.
            clip_score, hpsv2, lpips: where they were asked for.
            action_mse_own, action_mse_expert, action_mse_forward: E (a − a*)² per entry on the policy's own states, on the
                expert's and on the forward-diffused reference; action_ratio, the first over the last (over the second without data).
            shift, mmd_shift, gaussian_shift: sliced W2, unbiased MMD² and Gaussian W2 between visited latents and
                the forward-diffused reference; shift_to_expert, mmd_shift_to_expert, gaussian_shift_to_expert: between them and those that
                the expert visits from the same noise, 0 for the expert; this MMD² leaves out the pairs that share their noise.
            diversity: mean distance between two visited latents, per entry.
            nfe_per_sample, seconds: cost of sampling.
            With a grid of its own only the samples are judged: its states are at other times. Under the `renoise` kernel
            the actions are still the next latents of DDIM, taken at the states that the fresh noise leads to.
        """
        drawn = self._draw(policy, grid or self.grid, kernel, name)
        path, m = drawn.path, min(self.settings.n_action, len(drawn.path))
        result = self._scored(drawn, policy, grid or self.grid, kernel, name)
        if grid is not None:
            return result
        c = None if self.c is None else self.c[:m]
        own, theirs, forward = [], [], []
        for i, (t, s) in enumerate(zip(self.grid.times[:-1], self.grid.times[1:], strict=True)):
            at, to = t.expand(m), s.expand(m)
            expert_action = self.expert_policy.act(path[:m, i], at, to, c)
            taken = path[:m, i + 1] if kernel == "ddim" else policy.act(path[:m, i], at, to, c)
            own.append(float((taken - expert_action).square().mean()))
            action = policy.act(self.expert_path[:m, i], at, to, c)
            theirs.append(float((action - self.expert_path[:m, i + 1]).square().mean()))
            if self.real is not None:
                x_t, expert_action = self._forward_actions[i]
                k = len(x_t)
                action = policy.act(x_t, t.expand(k), s.expand(k), None if self.real_c is None else self.real_c[:k])
                forward.append(float((action - expert_action).square().mean()))
        result |= {
            "path_rmse": [_rmse(path[:, i + 1], self.expert_path[:, i + 1]) for i in range(self.grid.num_steps)]
            if _follows(self.grid, kernel)
            else None,
            "action_mse_own": own,
            "action_mse_expert": theirs,
            "action_mse_forward": forward or None,
            "action_ratio": [a / b if b else None for a, b in zip(own, forward or theirs, strict=True)],
            "diversity": [pairwise_distance(path[:, i]) for i in range(self.grid.num_steps + 1)],
        }
        return result | {"shift": None, **self._shift(path), **self._shift_to_expert(path)}

    @cached_property
    def _forward_actions(self) -> list[tuple[Tensor, Tensor]]:
        """Forward-diffused states at each time, and the expert's actions there, each (m, *sample_shape)."""
        noised = self.real_noised[:, : self.settings.n_action]
        m = noised.shape[1]
        c = None if self.real_c is None else self.real_c[:m]
        place = self._place(f"{self._baseline_names()[0]}-on-data", self.expert_policy, self.grid, "ddim", "actions.safetensors")
        if place is not None and place.is_file():
            return list(zip(noised, read_tensors(place, "remove it, and it is made again")["actions"].to(noised.device), strict=True))
        pairs = zip(noised, self.grid.times[:-1], self.grid.times[1:], strict=True)
        actions = torch.stack([self.expert_policy.act(x_t, t.expand(m), s.expand(m), c) for x_t, t, s in pairs])
        if place is not None:
            write_atomically(place, save({"actions": actions.cpu()}))
        return list(zip(noised, actions, strict=True))

    def baselines(self) -> dict[str, Tensor]:
        """The expert's samples by its full sampler, and by as few steps as the student has."""
        full, few = self._baseline_names()
        return {full: self.expert_path[:, -1], few: self.sample(self.few_steps, self.grid)}

    def evaluate_baselines(self) -> dict[str, Any]:
        """The metrics of the two; those of few steps are kept in the store, with what the expert would have done instead."""
        full, few = self._baseline_names()
        asked = "-".join(["scores", *self.settings.scores, *["lpips"] * self.settings.lpips])
        place = self._place(f"{few}-beside-{full}", self.few_steps, self.grid, "ddim", f"{asked}.json")
        return {full: self.score_expert(), few: kept(place, lambda: self.evaluate(self.few_steps, name=few))}

    def score_expert(self) -> dict[str, Any]:
        """The metrics of the expert's own samples, which are there already."""
        scored = self._scored(self.expert_drawn, self.expert_policy, self.grid, "ddim", self._baseline_names()[0])
        at_no_distance = {"frechet_to_expert": 0.0, "endpoint_rmse": 0.0}
        return scored | at_no_distance | self._shift(self.expert_path) | self._shift_to_expert(self.expert_path)

    def _scored(self, drawn: Drawn, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None) -> dict[str, Any]:
        """What a policy's samples score and cost."""
        result = self.to_data(drawn.features, drawn.classes, self.c) | {
            "nfe_per_sample": policy.nfe_per_action * grid.num_steps,
            "frechet_to_expert": frechet_distance(self.expert_drawn.features, drawn.features),
            "endpoint_rmse": _rmse(drawn.path[:, -1], self.expert_path[:, -1]) if _follows(grid, kernel) else None,
            "seconds": drawn.seconds,
            **drawn.scores,
        }
        if self.settings.lpips:
            result["lpips"] = self.lpips_diversity(policy, grid, kernel, name)
        return result

    def describe(self) -> dict[str, Any]:
        """What a result must say of how it was measured: results that differ in it are not compared."""
        s, found = self.settings, self._measure()
        if s.protocol is not None:
            found["protocol"] = s.protocol
        if self.extractor.of_pictures or s.scores or s.lpips:
            found["resize"] = RESIZE
        if self._images is not None:
            found["images"] = self._images
        if s.scores:
            found["scores"] = {name: scorer.name for name, scorer in self.scorers.items()}
        if s.lpips:
            found["lpips"] = LPIPS
        if (captions := self._captions()) is not None:
            found["captions"] = captions
        return found


def _compared(real: Features, fake: Features) -> dict[str, float]:
    """Two distances; precision, recall, density and coverage of as many of each, since these move with n."""
    m = min(len(real), len(fake))
    distances = {"frechet": frechet_distance(real, fake), "kid": kernel_distance(real, fake, 100 if m > 1000 else 1, min(m, 1000))[0]}
    return distances | dataclasses.asdict(precision_recall_density_coverage(real[:m], fake[:m]))


def _follows(grid: TimeGrid, kernel: Kernel) -> bool:
    """Whether x_T alone determines the sample."""
    return kernel == "ddim" or grid.num_steps == 1


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def _width(x: Tensor) -> float:
    """The bandwidth of the kernel that all models' states at one time are compared under: the forward marginal's median distance."""
    x = x.flatten(1).double()[:1000]
    return float(torch.pdist(x).median())


def evaluate_expert(
    expert: Expert, steps: list[int], settings: Evaluation, guidance_scale: float | None = None, store: Path | None = None
) -> dict[str, Any]:
    """The expert's own quality at each number of steps, against the data."""
    most = max(steps)
    evaluator = Evaluator(ExpertPolicy(expert, 1, guidance_scale), TimeGrid(expert.schedule, most).to(expert.device), settings, store)
    models = {}
    for n in steps:
        grid = TimeGrid(expert.schedule, n).to(expert.device)
        name, policy = f"teacher@{n}", ExpertPolicy(expert, 1, guidance_scale)
        models[name] = evaluator.score_expert() if n == most else evaluator.evaluate(policy, grid, name=name)
    return {"settings": evaluator.describe(), "floors": evaluator.floors(), "models": models, **provenance(expert.device)}


def evaluate_student(evaluator: Evaluator, agent: str, policy: DdimPolicy, kernel: Kernel, kind: GridKind) -> dict[str, Any]:
    """A student's rows and its teacher's, on the judge's grid and in `also_steps` steps.

    Args:
        evaluator: Against what.
        agent: What the rows are called, `agent@4`.
        policy: The student.
        kernel, kind: How it samples.
    """
    own = f"{agent}@{evaluator.grid.num_steps}"
    models = evaluator.evaluate_baselines() | {own: evaluator.evaluate(policy, kernel=kernel, name=own)}
    for more in evaluator.settings.also_steps:
        grid = TimeGrid(evaluator.expert.schedule, more, kind).to(evaluator.expert.device)
        models.setdefault(few := f"teacher@{more}", evaluator.evaluate(evaluator.few_steps, grid, name=few))
        models.setdefault(own := f"{agent}@{more}", evaluator.evaluate(policy, grid, kernel, own))
    return models


def evaluate_run(learner: Agent, settings: Evaluation, store: Path | None = None) -> dict[str, Any]:
    """A student's quality beside its teacher's, on the learner's own grid."""
    evaluator = Evaluator(learner.teacher_policy, learner.grid, settings, store)
    models = evaluate_student(evaluator, learner.name, learner.student_policy, learner.kernel, learner.config.grid)
    return {"settings": evaluator.describe(), "floors": evaluator.floors(), "models": models, **provenance(learner.expert.device)}
