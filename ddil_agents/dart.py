"""DART: behaviour cloning on perturbed states (Laskey et al. 2017), which on diffused data is input perturbation (Ning et al. 2023).

Noise around the expert's states takes the student to states like those that its own errors lead to, without student rollouts:

    forward:  x_t = α_t x_0 + σ_t (ε + γ ξ) ,   ξ ~ N(0, I)                 Ning et al. 2023, γ = 0.1
    teacher:  x_s = a*(x_t) + σ_s γ ξ ,   the next state of its rollout      Laskey et al. 2017: noise in the supervisor's action
    label:    a*(x_t), the expert's action at the perturbed state

In a world noise is also added to what feeds back, which is where Laskey et al. add it:

    teacher:  world.step(x_0 + ν ξ)         what is executed of the expert's samples, ν = execution_noise: Laskey et al.
    forward:  c + κ ξ                       the conditions of demonstrations, κ = condition_noise; the label is the expert's there

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

    execution_noise: float = 0.0
    """ν, the standard deviation of the noise in what a world is given of the samples of rollouts."""
    condition_noise: float = 0.0
    """κ, the standard deviation of the noise in the conditions of forward states, where conditions are tensors."""

    forwards_formula = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perturbation", "execution_noise", "condition_noise"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value}: need a finite number ≥ 0, such as 0.1; 0 disturbs nothing")


class PerturbedCollector(Collector):
    """Collects forward states and teacher trajectories with a perturbation in every state.

    Args:
        perturbation: γ.
        execution_noise: ν.
        condition_noise: κ.
    """

    def __init__(
        self,
        expert_policy: ExpertPolicy,
        student_policy: StudentPolicy,
        grid: TimeGrid,
        seed: int,
        *,
        perturbation: float,
        execution_noise: float = 0.0,
        condition_noise: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(expert_policy, student_policy, grid, seed, **settings)
        self.perturbation, self.execution_noise, self.condition_noise = perturbation, execution_noise, condition_noise
        self.streams["disturbance"] = torch.Generator(self.expert.device).manual_seed(rank_stream_seed(seed, "disturbance"))

    def add_noise(self, x_0: Tensor, t: Tensor) -> Tensor:
        return self.perturb(super().add_noise(x_0, t), t)

    def step(self, x_t: Tensor, t: Tensor, u: Tensor, *rest: Any) -> Tensor:
        return self.perturb(super().step(x_t, t, u, *rest), u)

    def draw_data(self, n: int) -> tuple[Tensor, Tensor | None]:
        x_0, c = super().draw_data(n)
        return x_0, self.disturb(c, self.condition_noise) if self.condition_noise and c is not None else c

    def execute(self, x_0: Tensor) -> Tensor:
        return self.disturb(x_0, self.execution_noise) if self.execution_noise else x_0

    def disturb(self, x: Tensor, size: float) -> Tensor:
        """Returns x + size · ξ."""
        return x + size * torch.randn(x.shape, generator=self.streams["disturbance"], device=x.device)

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
        if self.config.execution_noise and self.expert.make_world(1) is None:
            raise ValueError(f"execution_noise={self.config.execution_noise}: {type(self.expert).__name__} has no world; leave it at 0")
        if self.config.condition_noise and self.expert.condition_shape is None:
            raise ValueError(f"condition_noise={self.config.condition_noise}: conditions are ids here, not tensors; leave it at 0")
        own = ("perturbation", "execution_noise", "condition_noise")
        settings |= {name: getattr(self.config, name) for name in own}
        return super().make_collector(student_policy, PerturbedCollector, **settings)


def main(argv: list[str] | None = None) -> None:
    run(Dart, argv)


if __name__ == "__main__":
    main()
