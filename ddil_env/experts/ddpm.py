"""Unconditional diffusion in pixels as an expert: any `DDPMPipeline` (Ho et al. 2020).

ε̂ = UNet(x_t, t) ,   x in [−1, 1]

python -m ddil_agents.dagger --env ddpm --env.model ./ddpm-cifar10-32
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from ddil_env.pipelines.expert import Dtype, PipelineExpert, to_uint8
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.networks import PipelineNetwork
from ddil_env.pipelines.samplers import DiffusionNoise
from ddil_env.support import Box

MODELS = {"unet": UNet2DModel}


class UnconditionalUNet(PipelineNetwork):
    """A UNet of pictures alone."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    @property
    def core(self) -> UNet2DModel:
        return self.unet

    def features(self, sample_shape: tuple[int, ...]) -> nn.Module:
        """The UNet's middle, (b, channels, h, w)."""
        middle: nn.Module = self.unet.mid_block
        return middle

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        output: Tensor = self.unet(x_t.to(self.unet.conv_in.weight.dtype), t).sample
        return output


class DDPM(PipelineExpert):
    """An unconditional teacher of pictures, whose support is ±1.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        dtype: Of the UNet. x̂_0 and ε̂ are float32 in any case.
        max_batch: Samples put through the UNet at once when states are labelled or sampled.
        local_files_only: Never ask the hub.
        device: Where it computes.

    Raises:
        ValueError: no weights to be had, weights that are damaged, pickled or of another pipeline, an unsupported noise schedule,
            a UNet that learns its variance or reads classes, an absent device.
    """

    extractor = "latent_pool8"  # its pixels are too many to be features, and their averages are always to be had
    noise_kind = DiffusionNoise
    example = "batch_size=4"

    def __init__(
        self,
        model: str = "google/ddpm-cifar10-32",
        dtype: Dtype = "float32",
        max_batch: int = 64,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        files = PipelineFolder.find(model, DDPMPipeline, MODELS, local_files_only=local_files_only)
        config = files.config("unet")
        channels, side = config.get("in_channels", 3), config.get("sample_size")
        if side is None:
            raise ValueError(f"{files.part('unet')} names no sample_size; write the side of its pictures into its config.json")
        files.require("unet", "a UNet of this pipeline", out_channels=channels, class_embed_type=None, num_class_embeds=None)
        shape = (channels, *((side, side) if isinstance(side, int) else side))
        super().__init__(files, shape, dtype=dtype, max_batch=max_batch, model=model, support=Box(1.0), device=device)
        self.network = self.load_network()

    def wrap(self, core: Any) -> UnconditionalUNet:
        return UnconditionalUNet(core)

    def decode(self, x_0: Tensor) -> Tensor:
        return to_uint8(x_0)
