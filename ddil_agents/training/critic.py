"""The fake critic of distribution matching, and the discriminator that reads one of its layers (Yin et al. 2024, "DMD2")."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddil_env import Expert, NetworkDenoiser, Prediction


class Critic(nn.Module):
    """The score of the student's samples and, once added, a discriminator's head on the features of one layer.

    Args:
        denoiser: A twin of the student.
    """

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head: nn.Module | None = None
        self._features: Tensor | None = None

    def _keep(self, layer: nn.Module, given: object, output: Tensor) -> None:
        self._features = output

    @torch.no_grad()
    def add_head(self, expert: Expert, t: Tensor) -> None:
        """The discriminator: GroupNorm, SiLU and convolutions to one map, on the layer that the expert names.

        Args:
            expert: Whose `critic_features` is read; one forward at t (1,) shows the shape of its output.

        Raises:
            ValueError: the expert names no layer.
        """
        expert.critic_features(self.denoiser).register_forward_hook(self._keep)
        self.denoiser.predict(torch.zeros(1, *expert.sample_shape, device=expert.device), t, expert.sample_condition(1))
        channels, axes = self._read().shape[1], self._read().ndim - 2
        groups = math.gcd(channels, 8) if channels >= 32 else 1  # a group of one entry would leave a constant, of two a sign
        conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], (groups, channels)
        layers = [nn.GroupNorm(*norm), nn.SiLU(), conv(channels, channels, 3, padding=1)]
        self.head = nn.Sequential(*layers, nn.GroupNorm(*norm), nn.SiLU(), conv(channels, 1, 1)).to(expert.device)

    def _read(self) -> Tensor:
        """The layer's output in the forward just done, (b, channels, *any), with at least one axis after the channels."""
        assert self._features is not None
        return self._features[..., None] if self._features.ndim == 2 else self._features

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> tuple[Prediction, Tensor]:
        """The critic's belief, and how real it finds each input, (b,); 0 without a head."""
        pred = self.denoiser(x_t, t, c)
        if self.head is None:
            return pred, torch.zeros_like(t)
        return pred, self.head(self._read().float()).flatten(1).mean(1)
