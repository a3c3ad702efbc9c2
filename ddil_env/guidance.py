"""The guidance scale: what values mean, and the guidance embedding, by which a network takes it as an input (Meng et al. 2023, §3.1).

    h(w) = [sin(1000 (w − 1) f_i), cos(1000 (w − 1) f_i)] ,   f_i = 10000^(−i/(d/2 − 1))

Here w is the guidance scale of uncond + w (cond − uncond), where 1 is no guidance. Papers that write (1 + ω) cond − ω uncond mean
ω = w − 1, and so do diffusers' pipelines, which embed `guidance_scale − 1`: this is the one place where 1 is subtracted.
A projection of h is added to the features of the time. It starts at zero, so that a student starts as its teacher.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

GUIDANCE_FEATURES = 256  # d, as in latent consistency models


class GuidanceConditioning(NamedTuple):
    """The range of guidance scales that a student with a guidance embedding was trained on, and the scale that it is evaluated at."""

    low: float
    high: float
    evaluated_at: float


LARGEST = 1e6  # guidance scale: estimates stay finite in half precision far below


def no_guidance_below_1(guidance_scale: float) -> float:
    """Returns the scale, or 1 for one below.

    Raises:
        ValueError: it is not finite, or beyond any use.
    """
    if not math.isfinite(guidance_scale) or guidance_scale > LARGEST:
        raise ValueError(f"guidance_scale={guidance_scale}: need a finite number up to {LARGEST:g}; 1 or less is no guidance")
    return max(guidance_scale, 1.0)


def guidance_features(w: Tensor, d: int = GUIDANCE_FEATURES) -> Tensor:
    """h(w), (b,) → (b, d) float32: the same as diffusers' `get_guidance_scale_embedding(w − 1)`."""
    phase = 1000 * (w.float() - 1)[:, None] * _frequencies(d, w.device)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


@cache
def _frequencies(d: int, device: torch.device) -> Tensor:
    """The frequencies f, (d/2,), kept on each device: copying them there would synchronise with it."""
    # The order of operations is diffusers': a phase of 10⁴ radians has only three digits after the point in float32.
    step = torch.log(torch.tensor(10000.0, device="cpu")) / (d // 2 - 1)
    return torch.exp(torch.arange(d // 2, dtype=torch.float32, device="cpu") * -step).to(device)


def zero_projection(width: int, d: int = GUIDANCE_FEATURES) -> nn.Linear:
    """The projection of h(w), (b, d) → (b, width), that is added to a network's features of the time: no bias, weights 0."""
    projection = nn.Linear(d, width, bias=False)
    nn.init.zeros_(projection.weight)
    return projection
