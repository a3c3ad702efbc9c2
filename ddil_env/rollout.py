"""Whole rollouts of the MDP over plain tensors: faster than an environment, without synchronising with the device at each step."""

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
    """Denoises x_T with a policy.

    Args:
        policy: Chooses the actions.
        grid: The times of the N steps.
        x_T: Noise at t_max, (n, *sample_shape).
        c: Condition ids, (n,), or None.
        kernel: The transition: `ddim` moves to the action; `renoise` diffuses the action's estimate of x_0 to the next time.
        generator: Draws the fresh noise of `renoise`.

    Returns:
        x at every time of the grid, (n, N + 1, *sample_shape): the noise first, the sample last.
    """
    n = len(x_T)
    x = x_T.new_empty(n, grid.num_steps + 1, *x_T.shape[1:])
    x[:, 0] = x_t = x_T
    for i, (t, s) in enumerate(pairwise(grid.times)):
        if kernel == "renoise" and i + 1 < grid.num_steps:
            noise = torch.randn(x_T.shape, generator=generator, device=x_T.device, dtype=x_T.dtype)
            x_t = policy.act_renoise(x_t, t.expand(n), s.expand(n), noise, c)
        else:
            x_t = policy.act(x_t, t.expand(n), s.expand(n), c)  # x_t is contiguous, a column of x is not
        x[:, i + 1] = x_t
    return x
