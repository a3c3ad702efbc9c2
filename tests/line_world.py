"""A world in closed form: a point on a line that a policy steers towards 0, and a teacher that knows how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddil_env import Expert, NetworkDenoiser, NoiseSchedule, Prediction
from ddil_env.mlp import TimeConditionedMLP
from ddil_env.worlds import World

GAIN, SPREAD = -0.5, 0.05


class Line(World):
    """c' = c + x_0, two numbers; the reward is −|c'| of the first; an episode ends where |c'| exceeds `wall`."""

    def __init__(self, num_worlds: int, num_frames: int = 6, wall: float = 10.0) -> None:
        super().__init__(num_worlds, (2,), (2,), num_frames)
        self.c, self.wall, self.steps = torch.zeros(num_worlds, 2), wall, 0

    def start(self, rows: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        self.c[rows] = torch.stack([torch.randn(2, generator=generator) for generator in generators])
        return self.c[rows]

    def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.steps += len(rows)
        self.c[rows] = self.c[rows] + x_0
        return self.c[rows], -self.c[rows][:, 0].abs(), (self.c[rows].abs() > self.wall).any(1)

    def transition(self, c: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
        following = c + x_0
        return following, (following.abs() > self.wall).any(1)

    def succeeded(self, total_reward: Tensor) -> Tensor:
        return total_reward > -3


class Steersman(Expert):
    """p(x_0 | c) = N(−c/2, .05²), whose posterior mean is closed-form; its recordings are of c ~ N(0, 1)."""

    def __init__(self, num_frames: int = 6, wall: float = 10.0) -> None:
        super().__init__(NoiseSchedule("cosine", num_train_steps=100), (2,), condition_shape=(2,))
        self.num_frames, self.wall = num_frames, wall

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        assert c is not None
        alpha, sigma = (a[:, None] for a in self.schedule.coefficients(t))
        mean = GAIN * c.double()
        x_0 = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2).clamp(min=1e-12) * (x_t.double() - alpha * mean)
        eps = (x_t.double() - alpha * x_0) / sigma.clamp(min=1e-9)
        return Prediction(x_0.float(), eps.float(), t, self.schedule)

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(n, 2, generator=generator)

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        c = self.sample_condition(n, generator)
        return GAIN * c + SPREAD * torch.randn(n, 2, generator=generator), c

    def make_student(self, *, width: int = 16, depth: int = 2) -> NetworkDenoiser:
        network = TimeConditionedMLP((2,), 0, self.schedule.t_max, width, depth, condition_shape=self.condition_shape)
        return NetworkDenoiser(network, self.schedule, "v")

    def make_world(self, num_worlds: int, **options: Any) -> Line:
        return Line(num_worlds, **{"num_frames": self.num_frames, "wall": self.wall, **options})
