"""Shapes: a number for each sample, ready to multiply a batch of latents."""

from __future__ import annotations

from torch import Tensor


def broadcast(per_sample: Tensor, like: Tensor) -> Tensor:
    """(b,) → (b, 1, …, 1), ready to multiply `like` (b, *sample_shape)."""
    return per_sample.reshape(-1, *(1,) * (like.ndim - 1))
