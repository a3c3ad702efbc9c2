"""GAIL (Ho & Ermon 2016): a discriminator learns to tell the expert's transitions from the student's, and the student to deceive it.

    L_D = softplus(−D(x_t, t, a*)) + softplus(D(x_t, t, a_θ)) + γd/2 ‖∂D/∂a*‖²           R1, Mescheder et al. 2018
    L   = softplus(−D(x_t, t, a_θ(x_t, t, c)))

Transitions are deterministic and the action is the student's output. The student's gradient is therefore taken through the action
(Baram et al. 2017), without likelihood ratio or TRPO, and the state is held fixed. D takes the action as the x̂_0 that it implies, times
√w_t = max(α_t/σ_t, 1), so that an error has the weight of action_matching.py's truncated_snr. Each state has a single right action; the
game converges because of R1, which grows with the number d of entries of an action, and because the discriminator learns faster than the
student.

By default the actions of both are compared at the same states, x_t from the β-mixture, and the expert labels all of them, as in DAgger.
`--paired false` is the method of Ho & Ermon: the expert's rollouts against the student's, whose states have no label. It is weaker, and
can make a student worse that starts from the teacher's weights.

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
from ddil_agents.states.beta import SOURCES, Beta
from ddil_agents.states.collect import Collector, stream_seed
from ddil_agents.training.trainer import GradientStep
from ddil_env import Expert, StudentPolicy, invert_ddim
from ddil_env.broadcast import broadcast

STUDENT = SOURCES.index("student")


@dataclass(frozen=True)
class GailConfig(LearnerConfig):
    """Settings of GAIL."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, teacher=0.5, student=0.5))
    """Probabilities of the sources; half teacher and half student states, as in the paper, needs no data."""
    paired: bool = True
    """Compare the actions of expert and student at the same states, all labelled by the expert; false: compare transitions of the
    expert's rollouts and forward states with those of the student's rollouts, which are not labelled."""
    discriminator_learning_rate: float = 1e-3
    """Learning rate of AdamW for the discriminator, which needs to learn faster than the student: ten times as fast by default."""
    discriminator_width: int = 64
    """Number of channels of the discriminator's hidden layers."""
    gradient_penalty: float = 2.5
    """Weight γ of the gradient penalty R1, per entry of the action."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW for the student, after the warm-up."""
    adam_betas: tuple[float, float] = (0.5, 0.99)
    """β1 and β2 of AdamW for both networks; adversarial training needs a smaller β1 than usual."""

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
            raise ValueError(f"p_expert={self.p_expert} with paired=false: the expert does not act in student rollouts there; use 0")
        if self.guidance_range is not None:
            raise ValueError(f"guidance_range={self.guidance_range}: the discriminator takes no w; leave it null, and set guidance_scale")
        if self.prioritised:
            raise ValueError("prioritised=true: GAIL's loss is the discriminator's belief, not the error at a state; leave it false")


class Discriminator(nn.Module):
    """Scores how much a transition looks like the expert's: convolutions over (x_t, action), conditioned on t and c; for vectors an MLP.

    Args:
        expert: Its sample_shape, conditions and schedule set the sizes.
        width: Number of channels of the hidden layers.
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
        shape = expert.condition_shape
        self.condition = nn.Embedding(expert.num_conditions + 1, width) if shape is None else nn.Linear(math.prod(shape), width)
        halving = [layer for _ in range(2) for layer in (nn.SiLU(), conv(width, width, kernel, stride=2, padding=pad))]
        self.rest = nn.Sequential(*halving, nn.SiLU(), conv(width, 1, 1))

    def forward(self, x_t: Tensor, t: Tensor, action: Tensor, c: Tensor | None) -> Tensor:
        self.nfe += len(x_t)
        u = (t / self.t_max)[:, None]
        embedding = self.time(torch.cat([u, (u * self.frequencies).sin(), (u * self.frequencies).cos()], dim=1))
        c = torch.zeros_like(t, dtype=torch.int64) if c is None else c.flatten(1) if c.is_floating_point() else c
        embedding = embedding + self.condition(c)  # (b, width)
        transition = torch.cat([x_t, action], dim=1)  # (b, 2 channels, *axes)
        hidden = self.first(transition[..., None] if transition.ndim == 2 else transition)
        return self.rest(hidden + embedding.reshape(*embedding.shape, *(1,) * (hidden.ndim - 2))).flatten(1).mean(1)


class UnlabelledStudentCollector(Collector):
    """A collector that does not label the states of student rollouts: their x_s is x_t."""

    labels = True  # whether the states of the current source are labelled

    def forward(self, n: int) -> TensorDict:
        self.labels = True
        return super().forward(n)

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        self.labels = p_expert >= 1
        return super().rollout(n, p_expert)

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        return super().label(x_t, t, s, c, w) if self.labels else x_t


class Gail(Algorithm):
    """Adversarial imitation on the β-mixture of states."""

    name = "gail"
    adapts_beta = False
    Config: ClassVar[type[LearnerConfig]] = GailConfig
    config: GailConfig

    def make_networks(self) -> dict[str, nn.Module]:
        if sharding.is_requested():
            raise ValueError("gail differentiates its discriminator twice, which sharded networks do not allow; leave fsdp out")
        with torch.random.fork_rng():  # leaves torch's global generator as it is
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
        action = batch.generated = self.weight_action(batch, x_hat)
        _, student_weight = self.state_weights(batch)
        return student_weight * softplus(-self.realness(batch, action))

    def discriminator_loss(self, batch: Batch) -> Tensor:
        """softplus(−D(a*)) + softplus(D(a_θ)) + γd/2 ‖∂D/∂a*‖², (b,)."""
        assert batch.generated is not None  # set by the student's step, which comes first in every update
        x_0 = invert_ddim(self.expert.schedule, batch.x_t, batch.t, batch.expert_action, batch.s).projected(self.thresholds["target"]).x_0
        action = self.weight_action(batch, x_0).requires_grad_()  # a*
        realness = self.realness(batch, action)
        (gradient,) = torch.autograd.grad(realness.sum(), action, create_graph=True)  # ∂D/∂a*
        penalty = 0.5 * self.config.gradient_penalty * gradient[0].numel() * gradient.square().flatten(1).sum(1)
        expert_weight, student_weight = self.state_weights(batch)
        return expert_weight * (softplus(-realness) + penalty) + student_weight * softplus(self.realness(batch, batch.generated))

    def realness(self, batch: Batch, action: Tensor) -> Tensor:
        """D(x_t, t, action), (b,)."""
        return self.wrapped_network("discriminator")(batch.x_t, batch.t, action, batch.c)

    def weight_action(self, batch: Batch, x_0: Tensor) -> Tensor:
        """Returns √w_t x_0 with w_t = max(SNR, 1), the form in which D takes an action."""
        alpha, sigma = self.expert.schedule.coefficients(batch.t)
        return broadcast((alpha / sigma).clamp(min=1).to(x_0.dtype), x_0) * x_0

    def state_weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weights of each state in the expert's and in the student's term of the losses, (b,) each, with a mean of 1."""
        if self.config.paired:
            return (torch.ones_like(batch.t),) * 2
        masks = (batch.source != STUDENT).float(), (batch.source == STUDENT).float()
        expert_weight, student_weight = (mask / mask.mean().clamp(min=1 / len(mask)) for mask in masks)
        return expert_weight, student_weight

    @property
    def student_nfe(self) -> int:
        return super().student_nfe + int(self.networks["discriminator"].nfe)

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **settings: Any) -> Collector:
        return super().make_collector(student_policy, Collector if self.config.paired else UnlabelledStudentCollector)


def main(argv: list[str] | None = None) -> None:
    run(Gail, argv)


if __name__ == "__main__":
    main()
