"""The loss of behaviour cloning, DAgger and their relatives: the student's actions are regressed to the expert's.

The student at (x_t, t) learns the x̂_0 whose single DDIM step t → s ends where k steps of the teacher end:

    x_tgt = (x_s − r x_t)/(α_s − r α_t) ,  r = σ_s/σ_t          DDIL App. G
    L     = w_t ‖x̂_θ(x_t, t, c) − x_tgt‖²                        Salimans & Ho 2021, §4; w_t = max(α²/σ², 1), 1 + α²/σ² or 1/σ²

The algorithms that derive from it differ in the states that they train on, and in who acts on the way there. A label, the expert's action
x_s, is made where its state is collected: `Collector.label` in states/collect.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ddil_agents.algorithm import Algorithm
from ddil_agents.config import LearnerConfig
from ddil_agents.states.batch import Batch
from ddil_env import Expert, Support, invert_ddim

Weighting = Literal["truncated_snr", "snr_plus_one", "velocity"]


@dataclass(frozen=True)
class ActionMatchingConfig(LearnerConfig):
    """Settings of a regression to the expert's actions."""

    weighting: Weighting = "truncated_snr"
    """Weight w_t of the squared x_0 error, where SNR = α²/σ²: truncated_snr, max(SNR, 1); snr_plus_one, 1 + SNR; velocity, 1/σ², which is
    the squared error of v, or of u on a flow schedule. The last two are equal on variance-preserving schedules (α² + σ² = 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if config is not None and config.beta.student > 0 and not self.interactive:
            raise ValueError(
                f"beta.student={config.beta.student}: behaviour cloning sees no student states; set it to 0, or use ddil_agents.dagger"
            )
        super().__init__(expert, config, support)

    def loss(self, batch: Batch) -> Tensor:
        x_t, t, s = batch.x_t, batch.t, batch.s
        x_tgt = invert_ddim(self.expert.schedule, x_t, t, batch.expert_action, s).projected(self.thresholds["target"]).x_0
        x_hat = self.student(x_t, t, batch.c, batch.w).projected(self.thresholds["student"], straight_through=True).x_0
        return self.weight(t).to(x_hat.dtype) * (x_hat - x_tgt).square().flatten(1).mean(1)  # ‖x̂_θ − x_tgt‖² per entry, (b,)

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
