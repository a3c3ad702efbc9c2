"""Experts that denoise the latents of a VAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddil_env.data.cache import Embed
from ddil_env.data.pairs import Pairs
from ddil_env.data.pictures import to_uint8
from ddil_env.data.sources import Source, read_pairs
from ddil_env.errors import BROKEN_LATENTS, check_finite
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import PipelineExpert
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
        statistics = [vae.get(key) for key in ("latents_mean", "latents_std")]
        if statistics.count(None) == 1 or any(values is not None and len(values) != channels for values in statistics):
            raise ValueError(f"{files.part('vae')} needs latents_mean and latents_std of {channels} numbers each, or neither")
        for key in ("scaling_factor", "shift_factor"):
            if not isinstance(value := vae.get(key, 1.0), int | float) and not (key == "shift_factor" and value is None):
                raise ValueError(f"{files.part('vae')} has {key}={value!r}: need a number")
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

    def own_picture_size(self) -> tuple[int, int]:
        _, height, width = self.latent_shape(self.files, None, None)
        stride = vae_stride(self.files.config("vae"))
        return height * stride, width * stride

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{'' if self.files.config('vae').get('latents_std') is None else ' normalised'}"

    def open_pairs(self, own: OwnData, embed: Embed, read: Callable[[str, str | None], Source] = read_pairs) -> Pairs:
        pairs = super().open_pairs(own, embed, read)
        self.release()
        return pairs

    def release(self) -> None:
        self.__dict__.pop("vae", None)  # the cached property loads it again for the next picture

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, loaded when a picture needs it: training does not.

        It is in float32 where its configuration does not say that it fits float16 (`force_upcast: false`), as diffusers has it.
        """
        upcast = self.dtype == torch.float16 and bool(self.files.config("vae").get("force_upcast", True))
        return self.files.load("vae", torch.float32 if upcast else self.dtype).to(self.device)

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Encodes pictures to latents (b, *sample_shape) float32: the mean of the VAE's posterior, shifted and scaled as the pipeline does.

        Args:
            samples: uint8 (b, height, width, 3), or floats in [−1, 1], (b, 3, height, width).

        Raises:
            ValueError: pictures of another shape, or a VAE that overflows.
        """
        height, width = self.picture_size
        expected = (height, width, 3) if samples.dtype == torch.uint8 else (3, height, width)
        if tuple(samples.shape[1:]) != expected:
            raise ValueError(f"{samples.dtype} pictures of shape {tuple(samples.shape)}: need (b, {', '.join(map(str, expected))})")
        if samples.dtype == torch.uint8:
            samples = samples.permute(0, 3, 1, 2) / 127.5 - 1  # (b, h, w, 3) → (b, 3, h, w)
        dtype, (shift, scale) = self.vae.dtype, self._shift_and_scale()
        # Eight at a time: the VAE's activations are as large as the picture, which has 64 times the pixels of the latent.
        means = [self.vae.encode(chunk.to(self.device, dtype)).latent_dist.mean.float() for chunk in samples.split(8)]
        latents = (torch.cat(means) - shift) * scale
        check_finite(latents, f"the VAE gave NaN or infinite latents for {{}} pictures; {self._cure_of_overflow()}")
        return latents

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Decodes latents (b, *sample_shape) to uint8 pictures (b, height, width, 3) on the CPU.

        Raises:
            ValueError: latents that are not finite, or a VAE that overflows.
        """
        check_finite(x_0, BROKEN_LATENTS)
        shift, scale = self._shift_and_scale()
        latents = (x_0.to(self.device) / scale + shift).to(self.vae.dtype)
        pictures = torch.cat([self.vae.decode(chunk).sample.float() for chunk in latents.split(8)])
        check_finite(pictures, f"the VAE gave NaN or infinite pictures for {{}} latents; {self._cure_of_overflow()}")
        return to_uint8(pictures)

    def _cure_of_overflow(self) -> str:
        if self.vae.dtype == torch.float32:
            return "it computes in float32: look at its weights"
        return (
            f"it overflows in {str(self.vae.dtype).removeprefix('torch.')}: pass --env.dtype float32, or write "
            f'"force_upcast": true into {self.files.part("vae") / "config.json"} and pass --env.dtype float16, for a VAE in float32 alone'
        )

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        """What is subtracted from the VAE's latents, and what they are then multiplied by: each a number, or of each channel."""
        config = self.vae.config
        shift, scale = torch.tensor(config.shift_factor or 0.0), torch.tensor(config.scaling_factor)
        if config.latents_std is not None:
            mean, std = (torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
            shift, scale = mean, scale / std
        return shift.to(self.device), scale.to(self.device)


def vae_stride(vae: dict[str, Any]) -> int:
    """Pixels of a picture's side for each pixel of its latent's side, from the VAE's configuration."""
    return int(2 ** (len(vae.get("block_out_channels", [0])) - 1))
