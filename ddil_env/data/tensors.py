"""Draws pairs (x_0, c) from tensors in the device's memory."""

from __future__ import annotations

import torch
from torch import Tensor


class TensorData:
    """A data set of clean latents and condition ids that fits in the device's memory.

    Args:
        x_0: Clean latents, (n, *sample_shape).
        c: Condition ids, (n,) int64, or None.

    Raises:
        ValueError: no samples, NaN or infinite values, or lengths that differ.
    """

    def __init__(self, x_0: Tensor, c: Tensor | None = None) -> None:
        if len(x_0) == 0:
            raise ValueError("the data set is empty: give it at least one sample")
        bad = (~torch.isfinite(x_0)).flatten(1).any(1)
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {len(x_0)} samples hold NaN or infinite values, the first at {int(bad.nonzero()[0])}; remove them"
            )
        if c is not None and len(c) != len(x_0):
            raise ValueError(f"{len(x_0)} samples but {len(c)} conditions: there must be one for each sample")
        self.x_0, self.c = x_0, c

    def __len__(self) -> int:
        return len(self.x_0)

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draws n pairs with replacement: x_0 (n, *sample_shape), c (n,) or None."""
        index = torch.randint(len(self.x_0), (n,), generator=generator, device=self.x_0.device)
        return self.x_0[index], None if self.c is None else self.c[index]
