"""DAgger with a robust loss: a learner for ddil in a package of its own.

    L = w_t (√(‖x̂_θ − x_tgt‖² + h²) − h)

This is the pseudo-Huber distance in the place of the square.

    python -m ddil_agents my_agent.HuberDagger --env digits8 --huber_h .1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDict
from torch import Tensor

from ddil_agents import Dagger, DaggerConfig, LearnerConfig
from ddil_env import invert_ddim


@dataclass(frozen=True)
class HuberDaggerConfig(DaggerConfig):
    """Settings of DAgger with a robust loss: DAgger's, and where it turns from square to linear."""

    huber_h: float = 0.1
    """h, in the units of a sample."""


class HuberDagger(Dagger):
    """DAgger's states and labels, held against in the pseudo-Huber distance."""

    name = "huber_dagger"
    Config: ClassVar[type[LearnerConfig]] = HuberDaggerConfig
    config: HuberDaggerConfig

    def loss(self, batch: TensorDict) -> Tensor:
        x_t, t, x_s, s, c = (batch.get(key, None) for key in ("x_t", "t", "x_s", "s", "c"))
        x_tgt = invert_ddim(self.expert.schedule, x_t, t, x_s, s).x_0  # the x̂_0 whose step t → s lands on the label x_s
        squared = (self.student(x_t, t, c).x_0 - x_tgt).square().flatten(1).mean(1)
        return self.weight(t).to(squared.dtype) * ((squared + self.config.huber_h**2).sqrt() - self.config.huber_h)  # (b,)
