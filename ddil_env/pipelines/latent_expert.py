"""Experts that denoise the latents of a VAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddil_env.data.cache import Embed
from ddil_env.data.pairs import Pairs
from ddil_env.data.sources import Source, read_pairs
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import PipelineExpert, to_uint8
from ddil_env.pipelines.folder import PipelineFolder


class LatentExpert(PipelineExpert):
    """A pipeline that denoises the latents of a VAE.

    The support is unbounded: unlike pixels, which lie in ±1, latents have no bound that is known without data.
    """

    extractor = "latent_pool8"

    @staticmethod
    def latent_shape(files: PipelineFolder, height: int | None, width: int | None, multiple: int = 1) -> tuple[int, int, int]:
        """The shape (channels, height, width) of the latents of a picture.

        Args:
            files: The files of the pipeline.
            height, width: Size of the picture, in pixels; default: what the denoiser was trained on.
            multiple: Latent pixels that a side must be a multiple of.

        Raises:
            ValueError: a denoiser of other channels than the VAE's, or a size that is not a positive multiple of the latents' stride.
        """
        name = next(iter(files.models))
        vae, config = files.config("vae"), files.config(name)
        channels: int = vae.get("latent_channels", 4)
        files.require(name, "a denoiser over this VAE", in_channels=channels)
        stride = vae_stride(vae)
        trained = config.get("sample_size") or 64
        sides = (trained, trained) if isinstance(trained, int) else trained
        height, width = (side * stride if given is None else given for side, given in zip(sides, (height, width), strict=True))
        if height % (stride * multiple) or width % (stride * multiple) or min(height, width) < 1:
            raise ValueError(f"height={height}, width={width}: both must be positive multiples of {stride * multiple}, the latents' stride")
        return channels, height // stride, width // stride

    @property
    def picture_size(self) -> tuple[int, int]:
        stride = vae_stride(self.files.config("vae"))
        height, width = (side * stride for side in self.sample_shape[-2:])
        return height, width

    def open_pairs(self, own: OwnData, embed: Embed, read: Callable[[str, str | None], Source] = read_pairs) -> Pairs:
        pairs = super().open_pairs(own, embed, read)
        self.release()
        return pairs

    def release(self) -> None:
        self.__dict__.pop("vae", None)  # the cached property loads it again for the next picture

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, loaded when a picture needs it: training does not.

        It is in float32 where its configuration says that it overflows in float16 (`force_upcast`, as SDXL's does).
        """
        upcast = self.dtype == torch.float16 and bool(self.files.config("vae").get("force_upcast"))
        return self.files.load("vae", torch.float32 if upcast else self.dtype).to(self.device)

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Encodes pictures to latents (b, *sample_shape) float32: (mean − shift_factor) × scaling_factor of the VAE's posterior.

        Args:
            samples: uint8 (b, height, width, 3), or floats in [−1, 1], (b, 3, height, width).

        Raises:
            ValueError: pictures of another shape.
        """
        height, width = self.picture_size
        expected = (height, width, 3) if samples.dtype == torch.uint8 else (3, height, width)
        if tuple(samples.shape[1:]) != expected:
            raise ValueError(f"{samples.dtype} pictures of shape {tuple(samples.shape)}: need (b, {', '.join(map(str, expected))})")
        if samples.dtype == torch.uint8:
            samples = samples.permute(0, 3, 1, 2) / 127.5 - 1  # (b, h, w, 3) → (b, 3, h, w)
        config, dtype = self.vae.config, self.vae.dtype
        # Eight at a time: the VAE's activations are as large as the picture, which has 64 times the pixels of the latent.
        means = [self.vae.encode(chunk.to(self.device, dtype)).latent_dist.mean.float() for chunk in samples.split(8)]
        return (torch.cat(means) - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        config = self.vae.config
        latents = (x_0 / config.scaling_factor + (config.shift_factor or 0.0)).to(self.device, self.vae.dtype)
        return to_uint8(torch.cat([self.vae.decode(chunk).sample.float() for chunk in latents.split(8)]))


def vae_stride(vae: dict[str, Any]) -> int:
    """Pixels of a picture's side for each pixel of its latent's side, from the VAE's configuration."""
    return int(2 ** (len(vae.get("block_out_channels", [0])) - 1))
