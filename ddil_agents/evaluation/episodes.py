"""Evaluates policies in a world: return, success, and error against the expert on the conditions that their episodes visit.

    e_own(frame)     E (x_0 − x_0*)²  on the conditions that the policy's own episodes visit
    e_expert(frame)  the same on those of the expert's episodes, from the same seeds
    e_data           the same on held-out demonstrations or recordings
    ratio            e_own / e_data: the covariate shift that matters

x_0* is the expert's sample from the same noise and condition. Beside the errors, the conditions: sliced 2-Wasserstein distance of
those that the policy's episodes visit to held-out demonstrations, and to those that the expert's episodes visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import sliced_wasserstein, split_half
from ddil_agents.states.collect import stream_seed
from ddil_env import DdimPolicy, Expert, ExpertPolicy, NoDataError, TimeGrid, unroll
from ddil_env.mdp import Kernel
from ddil_env.worlds import Episodes, run_episodes

CONDITIONS = 1000  # of each set, in a distance of sets of conditions
SPANS = 8  # of an episode, in which errors are averaged: the ends of the parts of num_frames


class EpisodeEvaluator:
    """Runs policies in one set of worlds.

    Args:
        expert_policy: The expert as students are to imitate it, on the grid below.
        grid: The N steps of the models.
        n: Episodes of each policy, all at a time.
        seed: Of their starts and of all noise.
        labelled: Conditions of each span of frames at which the expert's sample is compared.
    """

    def __init__(self, expert_policy: ExpertPolicy, grid: TimeGrid, n: int = 50, seed: int = 0, labelled: int = 64) -> None:
        self.expert_policy, self.grid, self.n, self.seed, self.labelled = expert_policy, grid, n, seed, labelled
        self.expert: Expert = expert_policy.expert
        world = self.expert.make_world(n)
        if world is None:
            raise ValueError(f"{type(self.expert).__name__} has no world; its samples are evaluated by Evaluator")
        self.world = world
        self.expert_episodes = self.run(expert_policy, grid)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.expert.device).manual_seed(stream_seed(self.seed, name))

    def run(
        self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel = "ddim", before_step: Callable[[int, list[int]], None] | None = None
    ) -> Episodes:
        """Runs an episode of the policy in each world; `before_step` is called with the frame and the worlds that go on."""
        noise, steps = self._generator("world x_T"), self._generator("world steps")

        def act(c: Tensor, rows: Tensor, frame: int) -> Tensor:
            if before_step is not None:
                before_step(frame, rows.tolist())
            x_T = torch.randn(self.n, *self.expert.sample_shape, generator=noise, device=self.expert.device)[rows.to(self.expert.device)]
            return unroll(policy, grid, x_T, c, kernel=kernel, generator=steps)[:, -1]

        starts = [torch.Generator().manual_seed(stream_seed(self.seed, f"world {i}")) for i in range(self.n)]
        return run_episodes(self.world, starts, act)

    def evaluate(self, policy: DdimPolicy, kernel: Kernel = "ddim", grid: TimeGrid | None = None) -> dict[str, Any]:
        """The metrics of one policy.

        Returns:
            return, return_std, success, length: means over episodes, and the spread of the returns.
            the world's own metrics, such as `route_entropy`.
            survival: the share of episodes that go on after each eighth of the longest possible one.
            error_own, error_expert: squared error of a sample per entry, by eighth of an episode; None where no episode is so long.
            error_data: the same on held-out data; error_ratio: mean error_own over error_data.
            condition_shift, condition_shift_to_expert: distances of the visited conditions to held-out data, and to the expert's.
        """
        grid = grid or self.grid
        episodes = self.expert_episodes if policy is self.expert_policy else self.run(policy, grid, kernel)
        total, world = episodes.total_reward, self.world
        success = world.succeeded(total)
        ends = [round(world.num_frames * (i + 1) / SPANS) for i in range(SPANS)]
        metrics: dict[str, Any] = {
            "return": float(total.mean()),
            "return_std": float(total.std()) if self.n > 1 else 0.0,
            "success": None if success is None else float(success.double().mean()),
            "length": float(episodes.length.double().mean()),
            "survival": [float((episodes.length >= end).double().mean()) for end in ends],
            "world_steps": int(episodes.alive.sum()),
            **world.metrics(episodes),
            **self._condition_shift(episodes),
        }
        if policy is self.expert_policy:
            return metrics
        metrics["error_own"] = self._errors(policy, grid, kernel, episodes, ends)
        metrics["error_expert"] = self._errors(policy, grid, kernel, self.expert_episodes, ends)
        if (c := self._held_out_conditions(self.labelled * SPANS)) is None:
            return metrics | {"error_data": None, "error_ratio": None}
        metrics["error_data"] = self._error(policy, grid, kernel, c)
        weights = [int(episodes.alive[a:b].sum()) for a, b in zip([0, *ends], ends, strict=False)]
        own = sum(w * e for w, e in zip(weights, metrics["error_own"], strict=True) if e is not None) / sum(weights)
        metrics["error_ratio"] = own / metrics["error_data"] if metrics["error_data"] else math.nan
        return metrics

    def floors(self) -> dict[str, dict[str, Any]]:
        """Distances of one half of a set of conditions to the other: no policy's can be expected to be lower at as many conditions."""
        halves, sets = {}, {"teacher_halves": ("condition_shift_to_expert", self._visited(self.expert_episodes))}
        if (data := self._held_out_conditions(2 * CONDITIONS)) is not None:
            sets["real_halves"] = ("condition_shift", data)
        for name, (key, c) in sets.items():
            if len(c) >= 4:
                halves[name] = {key: split_half(sliced_wasserstein, c)}
        return halves

    def _held_out_conditions(self, n: int) -> Tensor | None:
        """Up to n conditions of held-out data, (m, *condition_shape); None without data."""
        try:
            return self.expert.reference_data(n, held_out=True)[1]
        except NoDataError:
            return None

    def _visited(self, episodes: Episodes) -> Tensor:
        """Up to 2 · CONDITIONS of the conditions of episodes, drawn without replacement, (m, *condition_shape)."""
        c = episodes.c[episodes.alive]
        return c[torch.randperm(len(c), generator=self._generator("visited"), device=c.device)[: 2 * CONDITIONS]]

    def _condition_shift(self, episodes: Episodes) -> dict[str, float]:
        own, shift = self._visited(episodes), {}
        sets = {"condition_shift": self._held_out_conditions(CONDITIONS), "condition_shift_to_expert": self._visited(self.expert_episodes)}
        for key, others in sets.items():
            if others is not None:
                n = min(CONDITIONS, len(own), len(others))
                shift[key] = sliced_wasserstein(own[:n], others[:n])
        if episodes is self.expert_episodes:  # beside itself: two halves
            shift["condition_shift_to_expert"] = split_half(sliced_wasserstein, own) if len(own) > 1 else 0.0
        return shift

    def _errors(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, episodes: Episodes, ends: Sequence[int]) -> list[float | None]:
        errors: list[float | None] = []
        for first, last in zip([0, *ends], ends, strict=False):
            c = episodes.c[first:last][episodes.alive[first:last]]
            rows = torch.randperm(len(c), generator=self._generator(f"labelled {first}"), device=c.device)[: self.labelled]
            errors.append(self._error(policy, grid, kernel, c[rows]) if len(c) else None)
        return errors

    def _error(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, c: Tensor) -> float:
        x_T = torch.randn(len(c), *self.expert.sample_shape, generator=self._generator("error"), device=self.expert.device)
        own = unroll(policy, grid, x_T, c, kernel=kernel, generator=self._generator("error steps"))[:, -1]
        return float((own - unroll(self.expert_policy, self.grid, x_T, c)[:, -1]).square().mean())
