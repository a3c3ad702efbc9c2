"""DART: behaviour cloning on disturbed states (Laskey et al. 2017), which on diffused data is input perturbation (Ning et al. 2023).

Noise around the expert's states shows the student where its own errors will lead it, and the expert is never asked about a rollout:

    forward:  x_t = α_t x_0 + σ_t (ε + γ ξ) ,   ξ ~ N(0, I)                 Ning et al. 2023, γ = 0.1
    teacher:  x_s = a*(x_t) + σ_s γ ξ ,   the next state of its rollout      Laskey et al. 2017: noise in the supervisor's action
    label:    a*(x_t), the expert's action at the state that the noise led to

Two differences. Ning et al. regress to ε, the noise before it was disturbed, so that their network learns to take the excess off;
the expert, asked at the disturbed state, takes it for a state of level t like any other. And Laskey et al. fit the noise to the
student's error, where here γ is one number; √action_mse_own of a run's result.json, over σ_s, is what that error asks for.

    python -m ddil_agents.dart --env digits --perturbation .1
    python -m ddil_agents.dart --env digits --beta.forward 0 --beta.teacher 1       # data-free
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddil_agents.bc import BCConfig, BehaviourCloning
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.collect import Collector, own_seed
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid


@dataclass(frozen=True)
class DartConfig(BCConfig):
    """Settings of DART: those of behaviour cloning, and the noise."""

    perturbation: float = 0.1
    """γ, the disturbance's share of the noise σ_t; 0 is behaviour cloning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.perturbation < math.inf:
            raise ValueError(f"perturbation={self.perturbation}: need a finite number ≥ 0, such as 0.1; 0 is behaviour cloning")


class DisturbedCollector(Collector):
    """Forward states and the teacher's steps with noise of their own.

    Args:
        perturbation: γ.
    """

    def __init__(
        self, expert_policy: ExpertPolicy, student_policy: StudentPolicy, grid: TimeGrid, seed: int, *, perturbation: float, **settings: Any
    ) -> None:
        super().__init__(expert_policy, student_policy, grid, seed, **settings)
        self.perturbation = perturbation
        self.streams["disturbance"] = torch.Generator(self.expert.device).manual_seed(own_seed(seed, "disturbance"))

    def noised(self, x_0: Tensor, t: Tensor) -> Tensor:
        return self.disturbed(super().noised(x_0, t), t)

    def follow(self, x_t: Tensor, t: Tensor, u: Tensor, *rest: Any) -> Tensor:
        return self.disturbed(super().follow(x_t, t, u, *rest), u)

    def disturbed(self, x: Tensor, t: Tensor) -> Tensor:
        """x + σ_t γ ξ, (n, *sample_shape)."""
        _, sigma = self.expert.schedule(t, x)
        xi = torch.randn(x.shape, generator=self.streams["disturbance"], device=x.device)
        return x + sigma * self.perturbation * xi


class Dart(BehaviourCloning):
    """Behaviour cloning on disturbed states."""

    name = "dart"
    Config: ClassVar[type[LearnerConfig]] = DartConfig
    config: DartConfig

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **own: Any) -> Collector:
        return super().make_collector(student_policy, DisturbedCollector, perturbation=self.config.perturbation)


def main(argv: list[str] | None = None) -> None:
    run(Dart, argv)


if __name__ == "__main__":
    main()
