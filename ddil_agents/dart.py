"""DART: behaviour cloning on perturbed states (Laskey et al. 2017), which on diffused data is input perturbation (Ning et al. 2023).

Noise around the expert's states takes the student to states like those that its own errors lead to, without student rollouts:

    forward:  x_t = α_t x_0 + σ_t (ε + γ ξ) ,   ξ ~ N(0, I)                 Ning et al. 2023, γ = 0.1
    teacher:  x_s = a*(x_t) + σ_s γ ξ ,   the next state of its rollout      Laskey et al. 2017: noise in the supervisor's action
    label:    a*(x_t), the expert's action at the perturbed state

There are two differences. Ning et al. regress to ε, the noise without the perturbation, so that their network learns to remove the
perturbation too; the expert, at the perturbed state, treats it as a state of noise level t like any other. And Laskey et al. fit the
noise to the student's error, where here γ is a setting; √action_mse_own of a run's result.json, divided by σ_s, is the γ of that error.

    python -m ddil_agents.dart --env digits --perturbation .1
    python -m ddil_agents.dart --env digits --beta.forward 0 --beta.teacher 1       # data-free
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.collect import Collector, rank_stream_seed
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid


@dataclass(frozen=True)
class DartConfig(ActionMatchingConfig):
    """Settings of DART: those of behaviour cloning and the size of the noise."""

    perturbation: float = 0.1
    """γ, the standard deviation of the perturbation as a fraction of the noise level σ_t; 0 is behaviour cloning."""

    forwards_formula = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.perturbation < math.inf:
            raise ValueError(f"perturbation={self.perturbation}: need a finite number ≥ 0, such as 0.1; 0 is behaviour cloning")


class PerturbedCollector(Collector):
    """Collects forward states and teacher trajectories with a perturbation in every state.

    Args:
        perturbation: γ.
    """

    def __init__(
        self, expert_policy: ExpertPolicy, student_policy: StudentPolicy, grid: TimeGrid, seed: int, *, perturbation: float, **settings: Any
    ) -> None:
        super().__init__(expert_policy, student_policy, grid, seed, **settings)
        self.perturbation = perturbation
        self.streams["disturbance"] = torch.Generator(self.expert.device).manual_seed(rank_stream_seed(seed, "disturbance"))

    def add_noise(self, x_0: Tensor, t: Tensor) -> Tensor:
        return self.perturb(super().add_noise(x_0, t), t)

    def step(self, x_t: Tensor, t: Tensor, u: Tensor, *rest: Any) -> Tensor:
        return self.perturb(super().step(x_t, t, u, *rest), u)

    def perturb(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns x + σ_t γ ξ, (n, *sample_shape)."""
        _, sigma = self.expert.schedule(t, x)
        xi = torch.randn(x.shape, generator=self.streams["disturbance"], device=x.device)
        return x + sigma * self.perturbation * xi


class Dart(ActionMatching):
    """Behaviour cloning on perturbed states."""

    name = "dart"
    Config: ClassVar[type[LearnerConfig]] = DartConfig
    config: DartConfig
    interactive = False

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **settings: Any) -> Collector:
        return super().make_collector(student_policy, PerturbedCollector, perturbation=self.config.perturbation)


def main(argv: list[str] | None = None) -> None:
    run(Dart, argv)


if __name__ == "__main__":
    main()
