"""The network of denoisers for fields on a line: solutions of an equation, signals."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ddil_env.denoiser import NetworkDenoiser

Padding = Literal["zeros", "reflect", "replicate", "circular"]


class _Block(nn.Module):
    """x + conv(SiLU(a · conv(SiLU(x)) + b)), a and b from the time."""

    def __init__(self, channels: int, kernel_size: int, padding_mode: Padding) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(channels, 2 * channels)
        self.first, self.second = (nn.Conv1d(channels, channels, kernel_size, padding="same", padding_mode=padding_mode) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.scale_shift(time)[..., None].chunk(2, dim=1)  # (b, channels, 1) each
        hidden = self.first(nn.functional.silu(x)) * (1 + scale) + shift
        return x + self.second(nn.functional.silu(hidden))


class TimeConditionedConv1d(nn.Module):
    """A residual convolutional network: (x_t, t, c) → output of x_t's shape. A condition adds channels to the input.

    Args:
        sample_shape: (channels of the field, points).
        t_max: The time of pure noise.
        channels, depth: Channels of the hidden layers, and number of residual blocks of two convolutions each.
        condition_shape: (…, points), as a history of fields is (frames, channels, points); None: no condition.
        patch: Neighbouring points that become channels of one: the hidden layers see points / patch of them.
        kernel_size: Of the convolutions, an odd number.
        padding_mode: `circular` for a periodic field, else `zeros`, `reflect` or `replicate`.

    Raises:
        ValueError: shapes of other points, a patch that does not divide them, an even kernel, or no channel or block.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        t_max: float,
        channels: int,
        depth: int,
        *,
        condition_shape: tuple[int, ...] | None = None,
        patch: int = 1,
        kernel_size: int = 5,
        padding_mode: Padding = "circular",
    ) -> None:
        super().__init__()
        if len(sample_shape) != 2 or (condition_shape is not None and condition_shape[-1] != sample_shape[-1]):
            raise ValueError(f"sample_shape={sample_shape}, condition_shape={condition_shape}: need (channels, points) and (…, points)")
        field_channels, points = sample_shape
        if patch < 1 or points % patch:
            raise ValueError(f"patch={patch}: need a divisor of the {points} points")
        if kernel_size % 2 == 0 or min(kernel_size, channels, depth) < 1:
            raise ValueError(f"channels={channels}, depth={depth}, kernel_size={kernel_size}: need at least 1 of each, and an odd kernel")
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)
        self.t_max, self.patch, self.condition_shape = t_max, patch, condition_shape
        seen = field_channels + (0 if condition_shape is None else math.prod(condition_shape[:-1]))
        self.time = nn.Sequential(nn.Linear(13, channels), nn.SiLU())
        self.first = nn.Conv1d(seen * patch, channels, kernel_size, padding="same", padding_mode=padding_mode)
        self.blocks = nn.ModuleList(_Block(channels, kernel_size, padding_mode) for _ in range(depth))
        self.activation = nn.SiLU()
        self.last = nn.Conv1d(channels, field_channels * patch, kernel_size, padding="same", padding_mode=padding_mode)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        fields = x_t  # (b, channels, points)
        if self.condition_shape is not None:
            if c is None:
                raise ValueError(f"c=None: this network needs a condition of shape {self.condition_shape}; pass c (b, *condition_shape)")
            fields = torch.cat([x_t, c.reshape(len(c), -1, c.shape[-1])], 1)
        u = (t / self.t_max)[:, None]  # (b, 1)
        time = self.time(torch.cat([u, (u * self.frequencies).sin(), (u * self.frequencies).cos()], 1))
        hidden = self.first(self._fold(fields))
        for block in self.blocks:
            hidden = block(hidden, time)
        return self._unfold(self.last(self.activation(hidden)))

    def _fold(self, fields: Tensor) -> Tensor:
        """(b, channels, points) → (b, channels · patch, points / patch)."""
        return fields.unflatten(2, (-1, self.patch)).transpose(2, 3).flatten(1, 2)

    def _unfold(self, fields: Tensor) -> Tensor:
        """The inverse of `_fold`."""
        return fields.unflatten(1, (-1, self.patch)).transpose(2, 3).flatten(2)


def last_features(student: NetworkDenoiser) -> nn.Module:
    """The layer of a convolutional network whose output (b, channels, points / patch) a discriminator can read.

    Raises:
        ValueError: the student's network is another.
    """
    return student.network_as(TimeConditionedConv1d).activation
