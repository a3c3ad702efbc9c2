"""DAgger with a robust loss: a learner for ddil in a package of its own.

    L = w_t (√(‖x̂_θ − x_tgt‖² + h²) − h)

This is the pseudo-Huber distance in the place of the square.

    python -m ddil_agents my_agent.HuberDagger --env digits8 --huber_h .1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ddil_agents import Batch, Dagger, DaggerConfig, LearnerConfig
from ddil_env import invert_ddim


@dataclass(frozen=True)
class HuberDaggerConfig(DaggerConfig):
    """Settings of DAgger with a robust loss: DAgger's, and where it turns from square to linear."""

    huber_h: float = 0.1
    """h, in the units of a sample."""


class HuberDagger(Dagger):
    """DAgger's states and labels, with the pseudo-Huber distance as loss."""

    name = "huber_dagger"
    Config: ClassVar[type[LearnerConfig]] = HuberDaggerConfig
    config: HuberDaggerConfig

    def loss(self, batch: Batch) -> Tensor:
        # The label is the expert's action, a latent at s; x_tgt is the x̂_0 whose step t → s lands there.
        x_tgt = invert_ddim(self.expert.schedule, batch.x_t, batch.t, batch.expert_action, batch.s).x_0
        squared = (self.student(batch.x_t, batch.t, batch.c).x_0 - x_tgt).square().flatten(1).mean(1)
        return self.weight(batch.t).to(squared.dtype) * ((squared + self.config.huber_h**2).sqrt() - self.config.huber_h)  # (b,)
