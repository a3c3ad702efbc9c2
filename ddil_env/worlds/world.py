"""A world is an environment that maps a generated sample to the next condition and a reward.

    (x_t, t, s, c) → … → x_0 ;   (c', r, done) = world.step(x_0) ;   the next denoising starts at x_T ~ N(0, I), t_max, c'

A diffusion policy's world is a simulator: a sample is an action, a condition an observation. An autoregressive model's world is its own
history: a sample is a frame, a condition the frames before it. In a world a student's samples determine its next conditions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddil_env.worlds.episodes import Episodes


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, by one sum: such a term makes it NaN or infinite (∞ − ∞ is NaN)."""
    return math.isfinite(float(tensor.sum(dtype=torch.float64)))


class World(ABC):
    """A batch of independent worlds. A subclass implements `start`, `advance` and optionally `transition` and `render`.

    Args:
        num_worlds: How many.
        sample_shape: Shape of what a world takes, one sample of the expert.
        condition_shape: Shape of what it answers with.
        num_frames: Samples after which an episode ends, if it has not ended before.
        device: Where conditions are.

    Raises:
        ValueError: fewer than one world or frame.
    """

    def __init__(
        self,
        num_worlds: int,
        sample_shape: tuple[int, ...],
        condition_shape: tuple[int, ...],
        num_frames: int,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_worlds", num_worlds), ("num_frames", num_frames)):
            if value < 1:
                raise ValueError(f"{name}={value}: need at least 1")
        self.num_worlds, self.num_frames = num_worlds, num_frames
        self.sample_shape, self.condition_shape = tuple(sample_shape), tuple(condition_shape)
        self.device = torch.device(device)
        self.frames = [0] * num_worlds  # samples that each world has taken in its present episode

    @abstractmethod
    def start(self, rows: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        """Begins new episodes in the worlds `rows`, a generator each, and returns their conditions, (len(rows), *condition_shape)."""

    @abstractmethod
    def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Puts samples x_0 (len(rows), *sample_shape) into the worlds `rows`.

        Returns:
            The next conditions (len(rows), *condition_shape), the rewards and whether the episodes ended, (len(rows),) each.
        """

    def transition(self, c: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """What `advance` does to conditions, as a differentiable function, for worlds whose state is their condition.

        Args:
            c: Conditions, (n, *condition_shape).
            x_0: Samples, (n, *sample_shape).

        Returns:
            The next conditions (n, *condition_shape), with gradients by both arguments, and whether episodes end there, (n,) bool.

        Raises:
            ValueError: this world has no such function.
        """
        raise ValueError(f"{type(self).__name__} is not differentiable: it implements no `transition`")

    @property
    def differentiable(self) -> bool:
        """Whether it implements `transition`."""
        return type(self).transition is not World.transition

    def render(self, row: int = 0) -> Tensor | None:
        """A picture of a world, uint8 (height, width, 3); None if it cannot be rendered."""
        return None

    @property
    def can_render(self) -> bool:
        """Whether `render` gives pictures."""
        return type(self).render is not World.render

    def succeeded(self, total_reward: Tensor) -> Tensor | None:
        """Of episodes with these sums of rewards (n,), which were a success, (n,) bool; None if success is undefined."""
        return None

    def metrics(self, episodes: Episodes) -> dict[str, float | None]:
        """What this kind of world measures besides rewards, of whole episodes in it, one in each world; None where it is undefined."""
        return {}

    def reset(self, generators: Sequence[torch.Generator], rows: Sequence[int] | None = None) -> Tensor:
        """Begins new episodes, in all worlds or in the given ones.

        Args:
            generators: One for each of them; an episode depends on its own alone.
            rows: Which worlds; default: all.

        Returns:
            Their conditions, (n, *condition_shape).
        """
        chosen = list(range(self.num_worlds)) if rows is None else list(rows)
        for row in chosen:
            self.frames[row] = 0
        return self._checked(self.start(chosen, generators), "start", chosen)

    def step(self, x_0: Tensor, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Puts samples into worlds whose episodes have not ended.

        Args:
            x_0: Samples, (n, *sample_shape).
            rows: Into which worlds; default: all.

        Returns:
            The next conditions (n, *condition_shape), rewards (n,) float32 and whether the episodes ended (n,) bool, on the device.

        Raises:
            ValueError: samples of another shape; conditions, rewards or ends of another shape, or ends that are not bool.
            FloatingPointError: samples, conditions or rewards that are not finite.
        """
        chosen = list(range(self.num_worlds)) if rows is None else list(rows)
        if tuple(x_0.shape) != (len(chosen), *self.sample_shape):
            raise ValueError(f"samples of shape {tuple(x_0.shape)}: {len(chosen)} worlds take {(len(chosen), *self.sample_shape)}")
        if not is_finite(x_0):
            raise FloatingPointError("a sample for the world is not finite; look at the policy's network")
        c, reward, done = self.advance(chosen, x_0)
        for name, value in (("rewards", reward), ("ends of episodes", done)):
            if tuple(value.shape) != (len(chosen),):
                raise ValueError(f"{type(self).__name__}.advance gave {name} of shape {tuple(value.shape)}; need ({len(chosen)},)")
        if done.dtype != torch.bool:
            raise ValueError(f"{type(self).__name__}.advance gave ends of episodes as {done.dtype}; need bool")
        for row in chosen:
            self.frames[row] += 1
        done = done.to(self.device)
        if any(full := [self.frames[row] >= self.num_frames for row in chosen]):
            done = done | torch.tensor(full, device=self.device)
        c = self._checked(c, "advance", chosen)
        if not is_finite(reward):
            raise FloatingPointError(f"{type(self).__name__}.advance gave a reward that is not finite")
        return c, reward.float().to(self.device), done

    def _checked(self, c: Tensor, where: str, rows: list[int]) -> Tensor:
        expected = (len(rows), *self.condition_shape)
        if tuple(c.shape) != expected:
            raise ValueError(f"{type(self).__name__}.{where} gave conditions of shape {tuple(c.shape)}; need {expected}")
        if not is_finite(c):
            raise FloatingPointError(f"{type(self).__name__}.{where} gave a condition that is not finite; end such an episode, or clip it")
        return c.to(self.device)
