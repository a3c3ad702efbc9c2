"""The loss of behaviour cloning, DAgger and their relatives: the student's actions are regressed to the expert's.

The student at (x_t, t) learns the x̂_0 whose single DDIM step t → s ends where k steps of the teacher end:

    x_tgt = (x_s − r x_t)/(α_s − r α_t) ,  r = σ_s/σ_t          DDIL App. G
    L     = w_t ‖x̂_θ(x_t, t, c) − x_tgt‖²                        Salimans & Ho 2021, §4; w_t = max(α²/σ², 1), 1 + α²/σ² or 1/σ²

In a differentiable world the gradient may flow from a denoising to the next: with `--unroll k`, k denoisings follow one another,

    L    += 1/k Σ_j ‖x_0(c_j) − sg x_0*(c_j)‖² ,   c_{j+1} = world(c_j, x_0(c_j)) ,   j = 0 … k − 1

where x_0(c) and x_0*(c) are the samples of student and teacher from the same noise (unrolled training with the expert's answers on the
student's own frames: trainax's diverted chain; List et al. 2024 measure what the gradient adds). Each denoising is computed again in the
backward pass, so that memory holds one at a time.

The algorithms that derive from it differ in the states that they train on, and in who acts on the way there. A label, the expert's action
x_s, is made where its state is collected: `Collector.label` in states/collect.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddil_agents.algorithm import Algorithm
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks
from ddil_agents.states.batch import Batch
from ddil_env import Expert, Support, invert_ddim, unroll
from ddil_env.broadcast import broadcast
from ddil_env.errors import check_whole

Weighting = Literal["truncated_snr", "snr_plus_one", "velocity"]


@dataclass(frozen=True)
class ActionMatchingConfig(LearnerConfig):
    """Settings of a regression to the expert's actions."""

    weighting: Weighting = "truncated_snr"
    """Weight w_t of the squared x_0 error, where SNR = α²/σ²: truncated_snr, max(SNR, 1); snr_plus_one, 1 + SNR; velocity, 1/σ², which is
    the squared error of v, or of u on a flow schedule. The last two are equal on variance-preserving schedules (α² + σ² = 1)."""

    unroll: int = 0
    """Number of denoisings in a row that a second term of the loss flows through, for an expert with a differentiable world; 0: none. Each
    takes teacher_steps forwards of the teacher and 2 num_steps of the student for each state of a batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("unroll", self.unroll, 0)
        if self.unroll and self.guidance_range is not None:
            raise ValueError(f"unroll={self.unroll} with guidance_range={self.guidance_range}: choose one of them")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"unknown weighting {self.weighting!r}; choose one of: {', '.join(get_args(Weighting))}")


class ActionMatching(Algorithm):
    """Regression to the expert's actions at the states of the batch; a subclass needs a `name`.

    Raises:
        ValueError: beta.student is not 0 and the class is not interactive.
    """

    Config: ClassVar[type[LearnerConfig]] = ActionMatchingConfig
    config: ActionMatchingConfig
    interactive: ClassVar[bool] = True  # whether it may train on the student's states

    def __init__(self, expert: Expert | str, config: ActionMatchingConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config, support)
        if self.config.unroll and (self.collector.world is None or not self.collector.world.differentiable):
            raise ValueError(
                f"unroll={self.config.unroll}: the gradient flows through a differentiable world, and {type(self.expert).__name__} has "
                "none; use 0, or implement `transition` in its world"
            )

    def _check_config(self) -> None:
        super()._check_config()
        student, k = self.config.beta.student, self.config.unroll
        if student > 0 and not self.interactive:
            raise ValueError(f"beta.student={student}: behaviour cloning sees no student states; set it to 0, or use ddil_agents.dagger")
        if k and not self.interactive:
            raise ValueError(f"unroll={k}: {self.name} trains on data alone, and unrolled denoisings are the student's; use dagger")
        if k and ranks.world_size() > 1:
            raise ValueError(f"unroll={k} runs in one process; there are {ranks.world_size()}")

    def loss(self, batch: Batch) -> Tensor:
        x_t, t, s = batch.x_t, batch.t, batch.s
        x_tgt = invert_ddim(self.expert.schedule, x_t, t, batch.expert_action, s).projected(self.thresholds["target"]).x_0
        x_hat = self.student(x_t, t, batch.c, batch.w).projected(self.thresholds["student"], straight_through=True).x_0
        error = self.weight(t).to(x_hat.dtype) * (x_hat - x_tgt).square().flatten(1).mean(1)  # ‖x̂_θ − x_tgt‖² per entry, (b,)
        return error + self.unrolled_error(batch.c) if self.config.unroll else error

    def unrolled_error(self, c: Tensor | None) -> Tensor:
        """1/k Σ_j ‖x_0(c_j) − sg x_0*(c_j)‖² per entry, from conditions c_0 (b, *condition_shape) on, (b,); it ends with an episode."""
        world = self.collector.world
        assert c is not None
        assert world is not None
        error, going_on = torch.zeros(len(c), device=c.device), torch.ones(len(c), dtype=torch.bool, device=c.device)
        for _ in range(self.config.unroll):
            x_T = torch.randn(len(c), *self.expert.sample_shape, generator=self.collector.streams["loss"], device=c.device)
            label = unroll(self.expert_policy, self.grid, x_T, c.detach())[:, -1]
            x_0 = checkpoint(self.denoise, x_T, c, use_reentrant=False)
            error = error + torch.where(going_on, (x_0 - label).square().flatten(1).mean(1), 0)
            following, ended = world.transition(c, x_0)
            going_on = going_on & ~ended
            c = torch.where(broadcast(going_on, c), following, c.detach())
        return error / self.config.unroll

    def denoise(self, x_t: Tensor, c: Tensor) -> Tensor:
        """The student's sample from noise x_t (b, *sample_shape), with its gradient."""
        for t, s in pairwise(self.grid.times):
            pred = self.student(x_t, t.expand(len(c)), c).projected(self.thresholds["student"], straight_through=True)
            x_t = pred.latent(s.expand(len(c)), self.expert.schedule)
        return x_t

    def weight(self, t: Tensor) -> Tensor:
        """Weight w_t of the squared x_0 error at times t, (b,)."""
        alpha, sigma = self.expert.schedule.coefficients(t)
        snr = (alpha / sigma) ** 2
        match self.config.weighting:
            case "truncated_snr":
                return snr.clamp(min=1)
            case "snr_plus_one":
                return 1 + snr
            case "velocity":
                return 1 / sigma**2
