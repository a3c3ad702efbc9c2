"""Reflected diffusion: where a clean sample may lie, and how an estimate is brought back there.

A projection acts on x̂_0 alone; `Prediction.projected` recomputes ε̂ so that α x̂_0 + σ ε̂ = x_t still holds.
Lou & Ermon 2023; DDIL §4.1, "Reflected Diffusion Distillation".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Support(Protocol):
    """The set on which clean samples lie."""

    def project(self, x_0: Tensor) -> Tensor:
        """Brings x_0 (b, *sample_shape) onto the support; a sample inside is returned bit for bit."""


@dataclass(frozen=True)
class Unbounded:
    """All of space: nothing is projected."""

    def project(self, x_0: Tensor) -> Tensor:
        return x_0


@dataclass(frozen=True)
class Box:
    """Every coordinate in [−bound, bound]; pixels scaled to ±1 have bound 1.

    Raises:
        ValueError: bound is not positive.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound}: a box needs a positive half-width")

    def project(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(-self.bound, self.bound)
