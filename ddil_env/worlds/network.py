"""A denoiser for samples of few numbers, conditioned on a tensor: diffusion policies, small surrogates."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddil_env.guidance import guidance_features, zero_projection


class ConditionedMLP(nn.Module):
    """An MLP over (x_t, features of t, condition), each flattened, to an output of x_t's shape.

    Args:
        sample_shape, condition_shape: Shapes of a sample and of a condition.
        t_max: The time of pure noise.
        width, depth: Units of a hidden layer, and hidden layers.
        guidance_embedding: Whether it takes a guidance scale; its features are added before the first activation.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        condition_shape: tuple[int, ...],
        t_max: float,
        width: int,
        depth: int,
        guidance_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)
        self.t_max = t_max
        d = math.prod(sample_shape)
        widths = [d + 13 + math.prod(condition_shape), *[width] * depth]
        hidden = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], d))
        self.cond_proj = zero_projection(width) if guidance_embedding else None

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None, w: Tensor | None = None) -> Tensor:
        assert c is not None  # an expert in a world is conditional
        u = (t / self.t_max)[:, None]  # (b, 1)
        waves = [(u * self.frequencies).sin(), (u * self.frequencies).cos()]
        first, *rest = self.layers
        hidden = first(torch.cat([x_t.flatten(1), u, *waves, c.flatten(1)], dim=1))  # (b, width)
        if self.cond_proj is not None and w is not None:
            hidden = hidden + self.cond_proj(guidance_features(w))
        for layer in rest:
            hidden = layer(hidden)
        return hidden.reshape(x_t.shape)
