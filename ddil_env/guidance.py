"""How a network is told the guidance scale that it shall answer for (guidance distillation, Meng et al. 2023, §3.1).

    h(w) = [sin(1000 (w − 1) f_i), cos(1000 (w − 1) f_i)] ,   f_i = 10000^(−i/(d/2 − 1))

Here w is the guidance scale, uncond + w (cond − uncond), 1 for none. Papers that write (1 + ω) cond − ω uncond mean
ω = w − 1, and so do diffusers' pipelines, which embed `guidance_scale − 1`: this is the one place where 1 is subtracted.
The projection of h that is added to the features of time starts at zero, so that a student starts as its teacher.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

GUIDANCE_FEATURES = 256  # d, as in latent consistency models


def guidance_features(w: Tensor, d: int = GUIDANCE_FEATURES) -> Tensor:
    """h(w), (b,) → (b, d) float32; diffusers' `get_guidance_scale_embedding(w − 1)`."""
    phase = 1000 * (w.float() - 1)[:, None] * _frequencies(d, w.device)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


@cache
def _frequencies(d: int, device: torch.device) -> Tensor:
    """f, (d/2,), copied to a device once: a copy waits for it."""
    # In diffusers' order of operations: a phase of 10⁴ radians keeps three digits after the point in float32.
    step = torch.log(torch.tensor(10000.0, device="cpu")) / (d // 2 - 1)
    return torch.exp(torch.arange(d // 2, dtype=torch.float32, device="cpu") * -step).to(device)


def zero_projection(width: int, d: int = GUIDANCE_FEATURES) -> nn.Linear:
    """The bias-free projection of h(w) to a network's features of time, (b, d) → (b, width), 0 at the start."""
    projection = nn.Linear(d, width, bias=False)
    nn.init.zeros_(projection.weight)
    return projection
