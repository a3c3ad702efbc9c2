"""The fast path through the MDP: whole denoisings over plain tensors, into one preallocated block, with no sync a step."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ddil_env.mdp import Kernel
from ddil_env.policy import DdimPolicy
from ddil_env.time_grid import TimeGrid


@torch.no_grad()
def unroll(
    policy: DdimPolicy,
    grid: TimeGrid,
    x_T: Tensor,
    c: Tensor | None = None,
    *,
    kernel: Kernel = "ddim",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoises x_T to the end: x at every time of the grid, (n, N + 1, *sample_shape), noise first, sample last.

    Args:
        policy: Whose actions are followed.
        grid: N steps.
        x_T: Noise at t_max, (n, *sample_shape).
        c: Condition ids, (n,), or None.
        kernel: `ddim` follows the actions; `renoise` diffuses each action's estimate to the next time anew.
        generator: Of the fresh noise of `renoise`.
    """
    n = len(x_T)
    x = x_T.new_empty(n, grid.num_steps + 1, *x_T.shape[1:])
    x[:, 0] = x_t = x_T
    for i, (t, s) in enumerate(pairwise(grid.times)):
        if kernel == "renoise" and i + 1 < grid.num_steps:
            noise = torch.randn(x_T.shape, generator=generator, device=x_T.device, dtype=x_T.dtype)
            x_t = policy.jump(x_t, t.expand(n), s.expand(n), noise, c)
        else:
            x_t = policy.act(x_t, t.expand(n), s.expand(n), c)  # x_t is contiguous, a column of x is not
        x[:, i + 1] = x_t
    return x
