"""The critic of distribution matching, and the discriminator on the features of one of its layers (Yin et al. 2024, "DMD2")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddil_env import Expert, NetworkDenoiser, Prediction


class Critic(nn.Module):
    """A denoiser that learns the score of the student's samples, with an optional discriminator head on the features of one layer.

    Args:
        denoiser: A network of the student's architecture.
    """

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head: nn.Module | None = None
        self._features: Tensor | None = None

    def _save_features(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        self._features = output

    @torch.no_grad()
    def add_head(self, expert: Expert, t: Tensor) -> None:
        """Adds the discriminator head: GroupNorm, SiLU and convolutions to one channel, on the layer that the expert names.

        Args:
            expert: Its `critic_features` names the layer.
            t: A time (1,), for one forward that shows the shape of the layer's output.

        Raises:
            ValueError: the expert names no layer.
        """
        expert.critic_features(self.denoiser).register_forward_hook(self._save_features)
        self.denoiser.predict(torch.zeros(1, *expert.sample_shape, device=expert.device), t, expert.sample_condition(1))
        features = self._last_features()
        channels, axes = features.shape[1], features.ndim - 2
        groups = math.gcd(channels, 8) if channels >= 32 else 1  # a group of one channel normalises to a constant, of two to a sign
        conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], (groups, channels)
        layers = [nn.GroupNorm(*norm), nn.SiLU(), conv(channels, channels, 3, padding=1)]
        self.head = nn.Sequential(*layers, nn.GroupNorm(*norm), nn.SiLU(), conv(channels, 1, 1)).to(expert.device)

    def _last_features(self) -> Tensor:
        """The layer's output in the last forward, (b, channels, *axes), with at least one axis after the channels."""
        assert self._features is not None
        return self._features[..., None] if self._features.ndim == 2 else self._features

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> tuple[Prediction, Tensor]:
        """Returns the critic's prediction, and how real the discriminator finds each input, (b,); 0 without a head."""
        pred = self.denoiser(x_t, t, c)
        if self.head is None:
            return pred, torch.zeros_like(t)
        return pred, self.head(self._last_features().float()).flatten(1).mean(1)
