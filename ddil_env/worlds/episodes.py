"""Whole episodes in a world, over plain tensors: finished worlds cost no forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_env.worlds.world import World


class Episodes(NamedTuple):
    """What happened in n worlds over K frames; after its end a world's rows are zeros."""

    c: Tensor
    """Conditions, (K, n, *condition_shape)."""
    x_0: Tensor
    """Samples, (K, n, *sample_shape)."""
    reward: Tensor
    """(K, n)."""
    alive: Tensor
    """Whether the world took a sample in this frame, (K, n) bool."""

    @property
    def total_reward(self) -> Tensor:
        """Sum of the rewards of each episode, (n,)."""
        return self.reward.sum(0)

    @property
    def length(self) -> Tensor:
        """Frames of each episode, (n,) int64."""
        return self.alive.sum(0)


def run_episodes(
    world: World, generators: Sequence[torch.Generator], act: Callable[[Tensor, Tensor, int], Tensor], num_frames: int | None = None
) -> Episodes:
    """Runs an episode in every world, each until it ends.

    Args:
        world: n worlds.
        generators: Where each episode starts.
        act: (conditions (k, *condition_shape) of the k worlds that go on, their numbers (k,) on the host, the frame) → samples
            (k, *sample_shape).
        num_frames: Frames after which to stop; default: the world's own.
    """
    c = world.reset(generators)
    rows, frames = torch.arange(world.num_worlds), []
    for frame in range(num_frames or world.num_frames):
        x_0 = act(c, rows, frame)
        following, reward, done = world.step(x_0, rows.tolist())
        frames.append((rows, c, x_0, reward))
        if bool(done.any()):
            running = ~done
            c, rows = following[running], rows[running.cpu()]
            if not len(rows):
                break
        else:
            c = following
    frame_of = torch.arange(len(frames)).repeat_interleave(torch.tensor([len(at) for at, *_ in frames]))
    at, c, x_0, reward = (torch.cat(column) for column in zip(*frames, strict=True))
    where = frame_of.to(world.device, non_blocking=True), at.to(world.device, non_blocking=True)
    shape = len(frames), world.num_worlds
    conditions = torch.zeros(*shape, *world.condition_shape, device=world.device)
    samples = torch.zeros(*shape, *world.sample_shape, device=world.device)
    rewards, alive = torch.zeros(shape, device=world.device), torch.zeros(shape, dtype=torch.bool, device=world.device)
    conditions[where], samples[where], rewards[where], alive[where] = c, x_0.to(samples), reward, True
    return Episodes(conditions, samples, rewards, alive)
