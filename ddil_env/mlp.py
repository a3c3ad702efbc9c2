"""The network of denoisers for samples of few numbers: points in the plane, actions of a policy."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddil_env.denoiser import NetworkDenoiser
from ddil_env.guidance import guidance_features, zero_projection


class TimeConditionedMLP(nn.Module):
    """An MLP: (x_t, features of t, c) → output of x_t's shape. Condition ids are one-hot inputs, condition tensors are inputs as they are.

    With a guidance embedding the projected features of w are added before the first activation.

    Args:
        sample_shape: Shape of a sample.
        num_conditions: Number of condition ids, without the null condition; 0 if there are none.
        t_max: The time of pure noise.
        width, depth: Units of a hidden layer, and number of hidden layers.
        guidance_embedding: Whether it takes a guidance scale.
        condition_shape: Shape of a condition that is a tensor; None: conditions are ids.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_conditions: int,
        t_max: float,
        width: int,
        depth: int,
        guidance_embedding: bool = False,
        condition_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)
        self.t_max, self.condition_shape = t_max, condition_shape
        d = math.prod(sample_shape)
        self.num_ids = num_conditions + 1 if num_conditions else 0  # the last is the null condition
        conditions = self.num_ids if condition_shape is None else math.prod(condition_shape)
        widths = [d + 13 + conditions, *[width] * depth]
        hidden = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], d))
        self.cond_proj = zero_projection(width) if guidance_embedding else None  # last: the layers' weights are the same without it

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None, w: Tensor | None = None) -> Tensor:
        u = (t / self.t_max)[:, None]  # (b, 1)
        features = [x_t.flatten(1), u, (u * self.frequencies).sin(), (u * self.frequencies).cos()]
        if self.condition_shape is not None:
            if c is None:
                raise ValueError(f"c=None: this network needs a condition of shape {self.condition_shape}; pass c (b, *condition_shape)")
            features.append(c.flatten(1))
        elif self.num_ids:
            c = torch.full_like(t, self.num_ids - 1, dtype=torch.int64) if c is None else c
            features.append(nn.functional.one_hot(c, self.num_ids).to(x_t.dtype))
        first, *rest = self.layers
        hidden = first(torch.cat(features, dim=1))  # (b, width)
        if self.cond_proj is not None and w is not None:
            hidden = hidden + self.cond_proj(guidance_features(w))
        for layer in rest:
            hidden = layer(hidden)
        return hidden.reshape(x_t.shape)  # (b, d) → (b, *sample_shape)


def last_activation(student: NetworkDenoiser) -> nn.Module:
    """The layer of an MLP whose output (b, width) a discriminator can read.

    Raises:
        ValueError: the student's network is another.
    """
    return student.network_as(TimeConditionedMLP).layers[-2]
