"""Autoregressive models: a sample is the next frame, a condition the frames before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddil_env.worlds.world import World


class Autoregressive(World):
    """A condition is the last H frames, oldest first; a sample the next frame, or what is added to the last one.

    Frames are those of the model, normalised as it was trained. Nothing here breaks the gradient from one frame to the next.

    Args:
        num_worlds: How many.
        initial: Draws n histories, one for each generator: → (n, H, *frame).
        frame_shape: Shape of a frame.
        history: H.
        num_frames: Frames of an episode.
        increment: A sample times this number is added to the last frame; None: a sample is the frame itself.
        bound: An episode ends where a value of a frame is larger than this. Each frame within earns 1, and an episode is a success if all
            of its frames were; None: no frame ends an episode, and none earns anything.
        device: Where the frames are.
    """

    def __init__(
        self,
        num_worlds: int,
        initial: Callable[[Sequence[torch.Generator]], Tensor],
        frame_shape: tuple[int, ...],
        *,
        history: int = 1,
        num_frames: int,
        increment: float | None = None,
        bound: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_worlds, frame_shape, (history, *frame_shape), num_frames, device)
        self.initial, self.increment, self.bound = initial, increment, bound
        self.histories = torch.zeros(num_worlds, history, *frame_shape, device=self.device)

    def start(self, rows: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        histories = self.histories.clone()
        histories[rows] = self.initial(generators).to(self.histories)
        self.histories = histories
        return histories[rows]

    def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        following, outside = self.transition(self.histories[rows], x_0)
        histories = self.histories.clone()  # a copy, so that what a graph holds is left alone
        histories[rows] = following
        self.histories = histories
        reward = torch.zeros(len(rows), device=self.device) if self.bound is None else (~outside).float()
        return histories[rows], reward, outside

    def transition(self, c: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
        frame = x_0 if self.increment is None else c[:, -1] + self.increment * x_0
        if self.bound is None:
            outside = torch.zeros(len(c), dtype=torch.bool, device=c.device)
        else:
            outside = ~(frame.detach().abs() <= self.bound).flatten(1).all(1)  # so are values that are not finite
        return torch.cat([c[:, 1:], frame[:, None]], 1), outside

    def succeeded(self, total_reward: Tensor) -> Tensor | None:
        return None if self.bound is None else total_reward >= self.num_frames
