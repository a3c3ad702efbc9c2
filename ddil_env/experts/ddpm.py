"""Unconditional diffusion of pixels as an expert: any `DDPMPipeline` (Ho et al. 2020).

ε̂ = UNet(x_t, t) ,   x in [−1, 1]

python -m ddil_agents.dagger --env ddpm --env.model ./ddpm-cifar10-32 --data ./pictures
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from ddil_env.data.pairs import Pairs
from ddil_env.data.pictures import to_uint8
from ddil_env.data.sources import read_pictures
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import Dtype, PipelineExpert
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.networks import PipelineNetwork
from ddil_env.pipelines.samplers import DiffusionNoise

MODELS = {"unet": UNet2DModel}
FOLLOWS = {"unet": ["class_embed_type", "num_class_embeds"]}


class UnconditionalUNet(PipelineNetwork):
    """A UNet without conditions: (x_t, t) → ε̂."""

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
    """An unconditional teacher of pictures. Its support is the range to which its scheduler clips estimates, as a rule ±1.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        dtype: Precision of the UNet. x̂_0 and ε̂ are float32 in any case.
        max_batch: Largest batch that goes through the UNet at once when states are labelled or sampled.
        local_files_only: Whether the hub is never asked.
        variant: Which weights to read of the components that have several, such as fp16.
        data: A folder of pictures, or a cache of it.
        data_cache: Folder of the cache; default: the name of the data with .pairs at its end.
        held_out: Share of the pictures that is held out of training, for evaluation; default: a twentieth, at least 10, if there are 40.
        workers: Number of processes that read pictures.
        device: Where it computes.

    Raises:
        ValueError: weights that cannot be found, are damaged or pickled, or are of another pipeline; an unsupported noise schedule;
            a UNet that learns its variance or reads classes; data that cannot be read or have other channels; or an unavailable device.
    """

    extractor = "latent_pool8"  # there are too many pixels to be features themselves, and averages of them need no weights
    noise_kind = DiffusionNoise
    example = "batch_size=4"
    of_pixels = True
    task = "unconditional-image-generation"

    def __init__(
        self,
        model: str = "google/ddpm-cifar10-32",
        dtype: Dtype = "float32",
        max_batch: int = 64,
        local_files_only: bool = False,
        variant: str | None = None,
        data: str | None = None,
        data_cache: str | None = None,
        held_out: float | None = None,
        workers: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        own = OwnData(data, None, data_cache, held_out, workers)
        files = PipelineFolder.find(model, DDPMPipeline, MODELS, follows=FOLLOWS, variant=variant, local_files_only=local_files_only)
        config = files.config("unet")
        channels, side = config.get("in_channels", 3), config.get("sample_size")
        if side is None:
            raise ValueError(f"{files.part('unet')} names no sample_size; write the side of its pictures into its config.json")
        files.require("unet", "a UNet of this pipeline", out_channels=channels, class_embed_type=None, num_class_embeds=None)
        shape = (channels, *((side, side) if isinstance(side, int) else side))
        super().__init__(files, shape, dtype=dtype, max_batch=max_batch, model=model, device=device)
        if own.data is not None:
            if channels != 3:
                raise ValueError(f"data={data!r}: pictures are read with 3 channels, and this UNet has {channels}; leave data out")
            self.pairs = self.open_pairs(own, lambda _: {}, lambda path, _: read_pictures(path))
        self.network = self.load_network()

    def wrap(self, core: Any) -> UnconditionalUNet:
        return UnconditionalUNet(core)

    def conditions(self, pairs: Pairs, ids: Tensor) -> None:
        return None

    def encode(self, samples: Tensor) -> Tensor:
        """Converts pictures uint8 (b, h, w, 3) to floats (b, 3, h, w) in [−1, 1]; returns floats as they are."""
        return samples.permute(0, 3, 1, 2) / 127.5 - 1 if samples.dtype == torch.uint8 else samples

    def decode(self, x_0: Tensor) -> Tensor:
        return to_uint8(x_0)
