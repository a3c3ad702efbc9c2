"""Predictions: a denoiser's estimates of the clean sample and of the noise at (x_t, t), and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.errors import check_choice

if TYPE_CHECKING:
    from ddil_env.schedule import NoiseSchedule
    from ddil_env.support import Support

PredictionType = Literal["eps", "v", "x_0", "flow"]


@dataclass(frozen=True)
class Prediction:
    """A denoiser's estimates at (x_t, t): the clean sample x̂_0 and the noise ε̂, with α_t x̂_0 + σ_t ε̂ = x_t.

    `NoiseSchedule.prediction` makes one of a network's output.

    Attributes:
        x_0: Estimate of the clean sample, (b, *sample_shape), float32 or wider.
        eps: Estimate of the noise, same shape.
        t: The time at which the estimates were made, (b,).
        schedule: The schedule that t refers to.
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor
    schedule: NoiseSchedule

    @property
    def v(self) -> Tensor:
        """v = α_t ε̂ − σ_t x̂_0 (Salimans & Ho 2021, App. D), (b, *sample_shape)."""
        alpha, sigma = self.schedule(self.t, self.x_0)
        return alpha * self.eps - sigma * self.x_0

    def output(self, kind: PredictionType) -> Tensor:
        """The output of a network of that prediction type that makes this prediction: the inverse of `NoiseSchedule.prediction`.

        Raises:
            ValueError: an unknown prediction type.
        """
        check_choice("prediction type", kind, PredictionType)
        if kind == "eps":
            return self.eps
        if kind == "v":
            return self.v
        return self.x_0 if kind == "x_0" else self.eps - self.x_0

    def guided_by(self, uncond: Prediction, guidance_scale: Tensor | float) -> Prediction:
        """Classifier-free guidance, uncond + w (cond − uncond), on x̂_0 and ε̂ alike (Ho & Salimans 2022, with w = 1 + their w).

        Args:
            uncond: The prediction without the condition, at the same state.
            guidance_scale: w, a number or (b,); 1 gives this prediction back.
        """
        w = broadcast(guidance_scale.to(self.x_0.dtype), self.x_0) if isinstance(guidance_scale, Tensor) else guidance_scale
        return Prediction(torch.lerp(uncond.x_0, self.x_0, w), torch.lerp(uncond.eps, self.eps, w), self.t, self.schedule)

    def latent(self, s: Tensor, schedule: NoiseSchedule | None = None) -> Tensor:
        """The latent at time s that these estimates give, α_s x̂_0 + σ_s ε̂, (b, *sample_shape).

        Args:
            s: Times, (b,).
            schedule: Gives α_s and σ_s; default: the prediction's own.
        """
        alpha_s, sigma_s = (schedule or self.schedule)(s, self.x_0)
        return alpha_s * self.x_0 + sigma_s * self.eps

    def projected(self, support: Support, straight_through: bool = False) -> Prediction:
        """Moves x̂_0 onto the data's support and keeps α x̂_0 + σ ε̂ = x_t (reflected diffusion, Lou & Ermon 2023).

        ε̂' = ε̂ + (α/σ)(x̂_0 − x̂_0')        bit for bit unchanged where x̂_0 already lies inside

        Args:
            support: Where x̂_0 is moved.
            straight_through: The values are those of the projection, the gradients those of the estimates before it. A clamp
                has no gradient outside the support, so that a student whose estimates lie there would never learn to come back.
        """
        x_0 = support.project(self.x_0)
        if x_0 is self.x_0:  # an unbounded support
            return self
        if straight_through:
            x_0 = x_0.detach() + (self.x_0 - self.x_0.detach())  # the bracket is 0, exactly
        alpha, sigma = self.schedule(self.t, x_0)
        return Prediction(x_0, self.eps + (alpha / sigma) * (self.x_0 - x_0), self.t, self.schedule)
