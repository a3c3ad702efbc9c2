"""GAIL (Ho & Ermon 2016): a discriminator tells the expert's transitions from the student's, and the student learns to deceive it.

    L_D = softplus(−D(x_t, t, a*)) + softplus(D(x_t, t, a_θ)) + γd/2 ‖∂D/∂a*‖²           R1, Mescheder et al. 2018
    L   = softplus(−D(x_t, t, a_θ(x_t, t, c)))

Transitions are deterministic and the action is the student's own output, so its gradient is taken through the action (Baram et
al. 2017): no likelihood ratio, no TRPO; the state is held fixed. D reads the action as the x̂_0 that it implies, times
√w_t = max(α_t/σ_t, 1): an error then shows as it weighs in bc.py. With one right action a state, it is R1 that makes the game
converge, stronger the more entries d an action has, and a discriminator that learns faster than the student.

By default both are compared at the same states, x_t from the β-mixture, and the expert is asked at all of them, as in DAgger.
`--paired false` is Ho & Ermon's: the expert's rollouts against the student's, no question asked. It is the weaker game, and can lead
a student that starts as the teacher astray.

    python -m ddil_agents.gail --env digits --init runs/bc
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_agents.algorithm import Algorithm
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import sharding
from ddil_agents.states.batch import Batch
from ddil_agents.states.beta import Beta
from ddil_agents.states.buffer import SOURCES
from ddil_agents.states.collect import Collector, stream_seed
from ddil_agents.training.trainer import GradientStep
from ddil_env import Expert, StudentPolicy, invert_ddim
from ddil_env.broadcast import broadcast

STUDENT = SOURCES.index("student")


@dataclass(frozen=True)
class GailConfig(LearnerConfig):
    """Settings of GAIL."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, teacher=0.5, student=0.5))
    """Source priors; half expert and half student, the paper's. Data-free."""
    paired: bool = True
    """Compare expert and student at the same states, where the expert is asked; false: the expert's own rollouts, and forward states,
    against the student's, where it is not."""
    discriminator_learning_rate: float = 1e-3
    """AdamW's, of the discriminator; it has to be ahead of the student, here ten times as fast."""
    discriminator_width: int = 64
    """Its channels."""
    gradient_penalty: float = 2.5
    """γ of R1, an entry of the action."""
    learning_rate: float = 1e-4
    """AdamW's, of the student."""
    adam_betas: tuple[float, float] = (0.5, 0.99)
    """AdamW's momenta, of both: in a game a long memory overshoots."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.discriminator_learning_rate < math.inf:
            raise ValueError(f"discriminator_learning_rate={self.discriminator_learning_rate}: need a positive, finite number")
        if self.discriminator_width < 1:
            raise ValueError(f"discriminator_width={self.discriminator_width}: need at least 1")
        if not 0 <= self.gradient_penalty < math.inf:
            raise ValueError(f"gradient_penalty={self.gradient_penalty}: need a finite number ≥ 0")
        if not self.paired and (self.beta.student == 0 or self.beta.teacher + self.beta.forward == 0):
            raise ValueError(
                "paired=false compares the student's rollouts with the expert's; give beta.student and beta.teacher a share each"
            )
        if not self.paired and self.p_expert:
            raise ValueError(f"p_expert={self.p_expert} with paired=false: there the expert is not asked in student rollouts; use 0")
        if self.guidance_range is not None:
            raise ValueError(f"guidance_range={self.guidance_range}: the discriminator is not told w; set guidance_scale")
        if self.prioritised:
            raise ValueError("prioritised=true: GAIL's loss says whom D believes, not how wrong a state is; leave it false")


class Discriminator(nn.Module):
    """How much like the expert's a transition looks, (b,): convolutions over (x_t, action), told t and c; for vectors they are an MLP.

    Args:
        expert: Gives the shapes.
        width: Channels.
    """

    def __init__(self, expert: Expert, width: int) -> None:
        super().__init__()
        channels, *axes = expert.sample_shape
        conv, kernel, pad = (nn.Conv1d, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(axes)], *((3, 1) if axes else (1, 0))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)
        self.t_max, self.nfe = expert.schedule.t_max, 0
        self.first = conv(2 * channels, width, kernel, padding=pad)
        self.time = nn.Linear(13, width)
        self.condition = nn.Embedding(expert.num_conditions + 1, width)
        halving = [layer for _ in range(2) for layer in (nn.SiLU(), conv(width, width, kernel, stride=2, padding=pad))]
        self.rest = nn.Sequential(*halving, nn.SiLU(), conv(width, 1, 1))

    def forward(self, x_t: Tensor, t: Tensor, action: Tensor, c: Tensor | None) -> Tensor:
        self.nfe += len(x_t)
        u = (t / self.t_max)[:, None]
        told = self.time(torch.cat([u, (u * self.frequencies).sin(), (u * self.frequencies).cos()], dim=1))
        told = told + self.condition(torch.zeros_like(t, dtype=torch.int64) if c is None else c)  # (b, width)
        both = torch.cat([x_t, action], dim=1)  # (b, 2 channels, *axes)
        hidden = self.first(both[..., None] if both.ndim == 2 else both)
        return self.rest(hidden + told.reshape(*told.shape, *(1,) * (hidden.ndim - 2))).flatten(1).mean(1)


class UnaskingCollector(Collector):
    """Student rollouts whose states have no label: x_s is x_t there."""

    asks = True

    def forward(self, n: int) -> TensorDict:
        self.asks = True
        return super().forward(n)

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        self.asks = p_expert >= 1
        return super().rollout(n, p_expert)

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        return super().label(x_t, t, s, c, w) if self.asks else x_t


class Gail(Algorithm):
    """Adversarial imitation on the β-mixture of states."""

    name = "gail"
    Config: ClassVar[type[LearnerConfig]] = GailConfig
    config: GailConfig

    def make_networks(self) -> dict[str, nn.Module]:
        if sharding.asked():
            raise ValueError("gail differentiates its discriminator twice, which sharded networks do not allow; leave fsdp out")
        with torch.random.fork_rng():  # seeded, and the caller's generator left alone
            torch.manual_seed(stream_seed(self.config.seed, "discriminator"))
            return {"discriminator": Discriminator(self.expert, self.config.discriminator_width).to(self.expert.device)}

    def gradient_steps(self) -> tuple[GradientStep, ...]:
        c = self.config
        return (
            GradientStep("student", self.loss, c.learning_rate, frozen=("discriminator",)),
            GradientStep("discriminator", self.discriminator_loss, c.discriminator_learning_rate),
        )

    def loss(self, batch: Batch) -> Tensor:
        x_hat = self.student(batch.x_t, batch.t, batch.c).projected(self.thresholds["student"], straight_through=True).x_0
        own = batch.generated = self.weighted(batch, x_hat)
        _, of_student = self.shares(batch)
        return of_student * softplus(-self.realness(batch, own))

    def discriminator_loss(self, batch: Batch) -> Tensor:
        """softplus(−D(a*)) + softplus(D(a_θ)) + γd/2 ‖∂D/∂a*‖², (b,)."""
        assert batch.generated is not None  # the student's step, which comes first in every update, leaves its actions there
        x_0 = invert_ddim(self.expert.schedule, batch.x_t, batch.t, batch.expert_action, batch.s).projected(self.thresholds["target"]).x_0
        expert = self.weighted(batch, x_0).requires_grad_()
        real = self.realness(batch, expert)
        (slope,) = torch.autograd.grad(real.sum(), expert, create_graph=True)
        penalty = 0.5 * self.config.gradient_penalty * slope[0].numel() * slope.square().flatten(1).sum(1)
        of_expert, of_student = self.shares(batch)
        return of_expert * (softplus(-real) + penalty) + of_student * softplus(self.realness(batch, batch.generated))

    def realness(self, batch: Batch, action: Tensor) -> Tensor:
        """D(x_t, t, action), (b,)."""
        return self.wrapped("discriminator")(batch.x_t, batch.t, action, batch.c)

    def weighted(self, batch: Batch, x_0: Tensor) -> Tensor:
        """√w_t x_0, w_t = max(SNR, 1)."""
        alpha, sigma = self.expert.schedule.coefficients(batch.t)
        return broadcast((alpha / sigma).clamp(min=1).to(x_0.dtype), x_0) * x_0

    def shares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weight of each state among the expert's and among the student's, (b,) each, of mean 1."""
        if self.config.paired:
            return (torch.ones_like(batch.t),) * 2
        masks = (batch.source != STUDENT).float(), (batch.source == STUDENT).float()
        of_expert, of_student = (mask / mask.mean().clamp(min=1 / len(mask)) for mask in masks)
        return of_expert, of_student

    @property
    def student_nfe(self) -> int:
        return super().student_nfe + int(self.networks["discriminator"].nfe)

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **own: Any) -> Collector:
        return super().make_collector(student_policy, Collector if self.config.paired else UnaskingCollector)


def main(argv: list[str] | None = None) -> None:
    run(Gail, argv)


if __name__ == "__main__":
    main()
