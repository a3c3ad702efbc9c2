"""A diffusion policy that lands Gymnasium's LunarLander-v3 (continuous), taught by Gymnasium's own scripted controller.

    python -m ddil_agents.dagger --env lunar_lander
    python -m ddil_agents.dagger --env lunar_lander --data me/landings-v0       # on demonstrations of yours, a local Minari dataset
    python -m ddil_env.experts.train_lunar_lander --out lander.safetensors      # trains it again

Needs `pip install 'ddil[worlds]'` (Box2D).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ddil_env.data.minari import read_demonstrations
from ddil_env.experts.diffusion_policy import CLIP, DiffusionPolicy
from ddil_env.worlds.gym_world import GymWorld
from ddil_env.worlds.world import World

ENV = "LunarLander-v3"
WIDTH, DEPTH = 256, 3


class LunarLander(DiffusionPolicy):
    """The teacher: an MLP of 3 × 256 units over 8 observations and 2 actions.

    Args:
        num_demos: Demonstrations, whole landings, that forward states come from, of 40; the others are held out.
        weights: A safetensors file of another training; default: the shipped one.
        device: Where it computes.
        data: Id of a local Minari dataset of LunarLander-v3, whose episodes are the demonstrations in the place of the 40.
    """

    def __init__(
        self, num_demos: int = 20, weights: str | None = None, device: torch.device | str = "cpu", data: str | None = None
    ) -> None:
        shipped = Path(str(files("ddil_env") / "experts" / "weights" / "lunar_lander.safetensors"))
        demonstrations = None if data is None else read_demonstrations(data, ENV, (2,), (8,))
        super().__init__(Path(weights) if weights else shipped, WIDTH, DEPTH, num_demos, device, demonstrations)

    def make_world(self, num_worlds: int, **options: Any) -> World:
        settings = {"mean": self.mean, "std": self.std, "clip": CLIP, "continuous": True, "render_mode": "rgb_array", **options}
        return GymWorld(ENV, num_worlds, device=self.device, **settings)
