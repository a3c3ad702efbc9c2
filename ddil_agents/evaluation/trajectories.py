"""Recorded trajectories: at every step the state, the action, the clean sample that it implies, who acted, and the error of the action.

    x_t → a → x_s ,   x̂_0 = the clean sample that the action implies (App. G of Salimans & Ho 2021, inverted)

They are stored as safetensors; the viewer on a comparison's page shows them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy, ExpertPolicy, TimeGrid, invert_ddim
from ddil_env.mdp import Kernel
from ddil_env.steps import renoise_step


@dataclass(frozen=True)
class Trajectories:
    """n trajectories of N steps.

    Attributes:
        x_t: States, from noise to sample, (n, N + 1, *sample_shape).
        x_0: Clean samples that the actions imply, (n, N, *sample_shape).
        error: Squared error of each action against the expert's at the same state, mean over the entries of the latent, (n, N).
        by_expert: Whether the expert acted, (n, N) bool.
        times: The N times of the grid, and 0, (N + 1,).
        c: Condition ids (n,), −1 where there are none.
    """

    x_t: Tensor
    x_0: Tensor
    error: Tensor
    by_expert: Tensor
    times: Tensor
    c: Tensor

    def save(self, path: Path) -> None:
        """Writes safetensors."""
        write_atomically(path, save({name: tensor.cpu().contiguous() for name, tensor in asdict(self).items()}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads the file that `save` wrote.

        Raises:
            ValueError: the file is absent, damaged, or holds no trajectories.
        """
        try:
            tensors = load_file(path)
            return cls(**{field.name: tensors[field.name] for field in fields(cls)})
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"cannot read the trajectories {path} ({error}); remove it, and it is recorded anew") from error


@torch.no_grad()
def record(
    policy: DdimPolicy,
    expert_policy: ExpertPolicy,
    grid: TimeGrid,
    x_T: Tensor,
    c: Tensor | None = None,
    *,
    kernel: Kernel = "ddim",
    generator: torch.Generator | None = None,
) -> Trajectories:
    """Records trajectories of a policy from x_T, and the error of each action against the expert's.

    Args:
        policy: The policy that acts.
        expert_policy: The expert whose actions are the reference.
        grid: N steps.
        x_T: Noise, (n, *sample_shape).
        c: Condition ids, (n,), or None.
        kernel: The transition, as in `unroll`.
        generator: Draws the fresh noise of the `renoise` kernel.
    """
    x_t, states, estimates, errors, actors = x_T, [x_T], [], [], []
    for t, s in pairwise(grid.times):
        t, s = t.expand(len(x_T)), s.expand(len(x_T))
        action = policy.act(x_t, t, s, c)
        actors.append(
            torch.as_tensor(policy.acted_by_expert, device=x_T.device).expand(len(x_T))
        )  # before the expert acts, which may be the same object
        errors.append((action - expert_policy.act(x_t, t, s, c)).square().flatten(1).mean(1))  # (n,)
        pred = invert_ddim(policy.schedule, x_t, t, action, s)
        estimates.append(pred.x_0)
        if kernel == "renoise" and len(states) < grid.num_steps:
            action = renoise_step(pred, s, torch.randn(x_T.shape, generator=generator, device=x_T.device, dtype=x_T.dtype))
        states.append(x_t := action)
    ids = torch.full((len(x_T),), -1) if c is None else c
    x_t, x_0, error, by_expert = (torch.stack(each, 1) for each in (states, estimates, errors, actors))
    return Trajectories(x_t, x_0, error, by_expert, grid.times, ids)
