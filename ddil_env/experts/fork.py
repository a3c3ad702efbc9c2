"""A diffusion policy that finds its way through a board of pegs, either side of each: many right answers, which can be counted.

python -m ddil_agents.dagger --env fork
python -m ddil_env.experts.train_fork --out fork.safetensors      # trains it again
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ddil_env.experts.diffusion_policy import DiffusionPolicy
from ddil_env.worlds.fork import Fork
from ddil_env.worlds.world import World

WIDTH, DEPTH = 128, 3


class ForkPolicy(DiffusionPolicy):
    """The teacher: an MLP of 3 × 128 units over a position and a direction, 2 numbers each.

    Args:
        num_demos: Demonstrations, whole ways through a board of 5 rows, that forward states come from, of 40.
        num_rows: Rows of the board that its worlds are.
        weights: A safetensors file of another training; default: the shipped one.
        device: Where it computes.
    """

    def __init__(self, num_demos: int = 20, num_rows: int = 5, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        shipped = Path(str(files("ddil_env") / "experts" / "weights" / "fork.safetensors"))
        self.num_rows = num_rows
        super().__init__(Path(weights) if weights else shipped, WIDTH, DEPTH, num_demos, device)

    def make_world(self, num_worlds: int, **options: Any) -> World:
        return Fork(num_worlds, device=self.device, **{"num_rows": self.num_rows, **options})
