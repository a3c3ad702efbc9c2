"""The fake critic of distribution matching, and the discriminator that reads one of its layers (Yin et al. 2024, §4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddil_env import Expert, NetworkDenoiser, Prediction


class Critic(nn.Module):
    """The score of the student's samples and, on the features of one layer, the discriminator's head.

    Args:
        denoiser: A twin of the student.
        layer: Of the denoiser, whose output (b, channels, *any) the head reads; None: no head.
    """

    def __init__(self, denoiser: NetworkDenoiser, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head: nn.Module | None = None
        self._features: Tensor | None = None
        if layer is not None:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, given: object, output: Tensor) -> None:
        self._features = output

    @torch.no_grad()
    def build_head(self, x_t: Tensor, t: Tensor, expert: Expert) -> None:
        """GroupNorm, SiLU and convolutions to one map, for features of the shape that one forward shows."""
        self.denoiser.predict(x_t, t, expert.sample_condition(len(x_t)))
        channels, axes = self._read().shape[1], self._read().ndim - 2
        conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], (math.gcd(channels, 8), channels)
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
