"""Judging a policy: its samples against data, and its trajectories against the expert's from the same noise.

    python -m ddil_agents.evaluate --env digits --steps 32 8 4 2 1        # the expert itself, by number of steps

Every result names its extractor, the number of samples and the seed. Real data are judged beside the models: no number
means anything without its floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_agents.checkpoint import write_atomically
from ddil_agents.metrics.coverage import precision_recall_density_coverage
from ddil_agents.metrics.distances import sliced_wasserstein
from ddil_agents.metrics.extractors import default_extractor, load_extractor
from ddil_agents.metrics.frechet import frechet_distance
from ddil_env import DdimPolicy, Expert, ExpertPolicy, NoDataError, TimeGrid, load_expert, unroll
from ddil_env.mdp import Kernel


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation."""

    n: int = 500
    """Samples of each model; the data are matched to them in number and classes."""
    seed: int = 0
    """Of the noise that every model starts from."""
    extractor: str | None = None
    """Whose features are compared; null: the expert's own."""
    n_action: int = 200
    """How many of the trajectories are labelled by the expert, for the action errors."""
    also_steps: tuple[int, ...] = ()
    """More numbers of steps at which the student's and the teacher's samples are judged."""

    def __post_init__(self) -> None:
        if self.n < 10:
            raise ValueError(f"n={self.n}: the metrics need at least 10 samples")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: need a whole number from 0 to 2^63 − 1")
        if self.n_action < 1:
            raise ValueError(f"n_action={self.n_action}: need at least 1")
        if not all(steps >= 1 for steps in self.also_steps):
            raise ValueError(f"also_steps={self.also_steps}: need whole numbers ≥ 1")


class Judge:
    """What every model of one comparison is held against: data, noise, conditions and the expert's trajectories, drawn once.

    Args:
        expert_policy: The expert as the models are to imitate it, on the grid below.
        grid: The N steps of the models.
        settings: How many, which seed, which extractor.

    Raises:
        ValueError: an unknown extractor.
    """

    def __init__(self, expert_policy: ExpertPolicy, grid: TimeGrid, settings: Evaluation | None = None) -> None:
        self.settings = settings or Evaluation()
        self.expert_policy, self.grid = expert_policy, grid
        self.expert = expert = expert_policy.expert
        self.few_steps = ExpertPolicy(expert, 1, expert_policy.guidance_scale, expert_policy.project)
        self.extractor = load_extractor(self.settings.extractor or default_extractor(expert))
        generator = torch.Generator(expert.device).manual_seed(self.settings.seed)
        self.real, (self.held_out, self.held_out_c), self.c = self._data(generator)
        n = self.settings.n if self.real is None else len(self.real)
        self.x_T = torch.randn(n, *expert.sample_shape, generator=generator, device=expert.device)
        self.expert_path = unroll(expert_policy, grid, self.x_T, self.c)  # (n, N + 1, *sample_shape)
        self.expert_features = self.extractor.features(self.expert_path[:, -1])
        if self.real is not None:
            self.real_features = self.extractor.features(self.real)
            self.real_noised = self._noised(self.real, generator)
            assert self.held_out is not None
            self.held_out_noised = self._noised(self.held_out, generator)

    def _data(self, generator: torch.Generator) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None], Tensor | None]:
        """Real samples, held-out samples and their conditions, and the conditions of every model."""
        try:
            real, c = self.expert.reference_data(self.settings.n)
        except NoDataError:  # data-free: no distance to data, the rest holds
            return None, (None, None), self.expert.sample_condition(self.settings.n, generator)
        return real, self.expert.reference_data(self.settings.n, held_out=True), c

    def _noised(self, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """The forward marginals at the times of the grid, (N, n, *sample_shape)."""
        draws = []
        for t in self.grid.times[:-1]:
            eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
            draws.append(self.expert.schedule.add_noise(x_0, eps, t.expand(len(x_0))))
        return torch.stack(draws)

    def to_data(self, samples: Tensor, c: Tensor | None) -> dict[str, Any]:
        """Fréchet distance, precision, recall, density, coverage and class accuracy of samples (n, *sample_shape) of conditions c (n,)."""
        if self.real is None:
            return {}
        features = self.extractor.features(samples)
        m = min(len(features), len(self.real_features))
        result = {"frechet": frechet_distance(self.real_features, features)}
        result |= dataclasses.asdict(precision_recall_density_coverage(self.real_features[:m], features[:m]))
        classes = self.extractor.classes(samples)
        if classes is not None and c is not None:
            result["accuracy"] = float((classes == c).double().mean())
        return result

    def floors(self) -> dict[str, Any]:
        """What real data that the expert has not seen score against the reference: no model can be asked for less."""
        if self.held_out is None:
            return {}
        n, m = len(self.x_T), len(self.held_out)
        shift = [sliced_wasserstein(a[: min(n, m)], b[: min(n, m)]) for a, b in zip(self.real_noised, self.held_out_noised, strict=True)]
        return {"held_out_real": {"n": m, **self.to_data(self.held_out, self.held_out_c), "shift": shift}}

    @torch.no_grad()
    def judge(self, policy: DdimPolicy, grid: TimeGrid | None = None, kernel: Kernel = "ddim") -> dict[str, Any]:
        """Every metric of one policy; lists run over the steps of the grid.

        Returns:
            frechet, precision, recall, density, coverage, accuracy: samples against data.
            frechet_to_expert: samples against the expert's own.
            endpoint_rmse: samples against the expert's from the same noise and condition, per entry.
            action_mse_own, action_mse_expert: E (a − a*)² per entry on the policy's own and on the expert's states.
            shift: sliced W2 between visited latents and forward-diffused data.
            nfe_per_sample, seconds: cost of sampling.
            With a grid of its own only the samples are judged: its states are at other times. Under the `renoise` kernel
            the actions are still the next latents of DDIM, taken at the states that the fresh noise leads to.
        """
        start = time.monotonic()
        path = self._unroll(policy, grid or self.grid, kernel)
        if path.is_cuda:
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
        samples = path[:, -1]
        result = self.to_data(samples, self.c) | {
            "nfe_per_sample": policy.nfe_per_action * (grid or self.grid).num_steps,
            "frechet_to_expert": frechet_distance(self.expert_features, self.extractor.features(samples)),
            "endpoint_rmse": float((samples - self.expert_path[:, -1]).square().mean().sqrt()),
            "seconds": seconds,
        }
        if grid is not None:
            return result
        own, theirs, shift = [], [], []
        m = self.settings.n_action
        c = None if self.c is None else self.c[:m]
        for i, (t, s) in enumerate(zip(self.grid.times[:-1], self.grid.times[1:], strict=True)):
            at, to = t.expand(len(path[:m])), s.expand(len(path[:m]))
            expert_action = self.expert_policy.act(path[:m, i], at, to, c)
            taken = path[:m, i + 1] if kernel == "ddim" else policy.act(path[:m, i], at, to, c)
            own.append(float((taken - expert_action).square().mean()))
            action = policy.act(self.expert_path[:m, i], at, to, c)
            theirs.append(float((action - self.expert_path[:m, i + 1]).square().mean()))
            if self.real is not None:
                shift.append(sliced_wasserstein(path[:, i], self.real_noised[i]))
        return result | {"action_mse_own": own, "action_mse_expert": theirs, "shift": shift or None}

    def sample(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel = "ddim") -> Tensor:
        """A policy's samples from the judge's noise and conditions, (n, *sample_shape)."""
        return self._unroll(policy, grid, kernel)[:, -1]

    def _unroll(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel) -> Tensor:
        """The trajectories; the fresh noise of `renoise` is the same for every model."""
        generator = torch.Generator(self.expert.device).manual_seed(self.settings.seed + 1)
        return unroll(policy, grid, self.x_T, self.c, kernel=kernel, generator=generator)

    def baselines(self) -> dict[str, Tensor]:
        """The expert's samples by its full sampler, and by as few steps as the student has."""
        full, few = self._baseline_names()
        return {full: self.expert_path[:, -1], few: self.sample(self.few_steps, self.grid)}

    def judge_baselines(self) -> dict[str, Any]:
        """The metrics of the two."""
        full, few = self._baseline_names()
        nfe = self.expert_policy.nfe_per_action * self.grid.num_steps
        return {
            full: {"nfe_per_sample": nfe, **self.to_data(self.expert_path[:, -1], self.c), "endpoint_rmse": 0.0},
            few: self.judge(self.few_steps),
        }

    def _baseline_names(self) -> tuple[str, str]:
        n = self.grid.num_steps
        return f"teacher@{n * self.expert_policy.substeps}", f"teacher@{n}"

    def describe(self) -> dict[str, Any]:
        """What a result must say of how it was measured."""
        return {
            "extractor": self.extractor.name,
            "n": len(self.x_T),
            "seed": self.settings.seed,
            "n_action": min(self.settings.n_action, len(self.x_T)),
            "guidance_scale": self.expert_policy.guidance_scale,
        }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path
        return "not installed"


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, date, and the hardware of the device."""
    packages = ("ddil", "torch", "diffusers", "tensordict", "torchrl", "gymnasium", "accelerate")
    on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        **{p: _version(p) for p in packages},
    }


def evaluate_expert(expert: Expert, steps: list[int], settings: Evaluation, guidance_scale: float | None = None) -> dict[str, Any]:
    """The expert's own quality at each number of steps, against the data."""
    most = max(steps)
    judge = Judge(ExpertPolicy(expert, 1, guidance_scale), TimeGrid(expert.schedule, most).to(expert.device), settings)
    models = {}
    for n in steps:
        grid = TimeGrid(expert.schedule, n).to(expert.device)
        models[f"teacher@{n}"] = judge.judge(ExpertPolicy(expert, 1, guidance_scale), grid)
    return {"settings": judge.describe(), "floors": judge.floors(), "models": models, **provenance(expert.device)}


def main(argv: list[str] | None = None) -> None:
    from ddil_agents.cli import clear_errors
    from ddil_agents.report import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="digits", help="preset or YAML file")
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 8, 4, 2, 1], help="numbers of sampling steps")
    parser.add_argument("--n", type=int, default=500, help="samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="noise seeds")
    parser.add_argument("--guidance_scale", type=float, default=None, help="default: the expert's own")
    parser.add_argument("--device", default=None, help="default: the expert's own")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the results")
    args = parser.parse_args(argv)
    with clear_errors(parser):
        if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
            raise ValueError(f"--out {args.out}: need a file in a folder that exists")
        expert = load_expert(args.env, **({} if args.device is None else {"device": args.device}))
        results = []
        for seed in args.seeds:
            results.append(evaluate_expert(expert, args.steps, Evaluation(n=args.n, seed=seed), args.guidance_scale))
            print(table(results[-1]), flush=True)
        if args.out is not None:
            write_atomically(args.out, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
