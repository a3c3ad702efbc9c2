"""A pipeline's network as a function of condition ids: (x_t, t, c), and w with a guidance embedding → an output of x_t's shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ddil_env.guidance import GUIDANCE_FEATURES, guidance_features, zero_projection
from ddil_env.pipelines.prompts import Lookup


class PipelineNetwork(nn.Module, ABC):
    """One of diffusers' networks, computing in its own dtype, with the embeddings that it looks up for condition ids.

    Attributes:
        interface: Entries of the network's configuration that a student must share with its teacher.
    """

    interface: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels")

    @property
    @abstractmethod
    def core(self) -> Any:
        """diffusers' network."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The network's output, (b, *sample_shape).

        Args:
            x_t: Latents, (b, *sample_shape).
            t: Times, (b,).
            c: Condition ids, (b,); None is the null condition.
            w: Guidance scales, (b,), for a network with a guidance embedding.
        """

    @abstractmethod
    def features(self, sample_shape: tuple[int, ...]) -> nn.Module:
        """The layer in the middle of the network, whose output (b, channels, *any) a discriminator reads."""

    def add_guidance_embedding(self) -> None:
        """Gives the network an input for the guidance scale w, in place.

        Raises:
            ValueError: a network of this kind cannot have one.
        """
        raise ValueError(
            f"{type(self.core).__name__} has no input for the guidance scale, and no pipeline could tell it; "
            "train without guidance_range (guidance_embedding=False)"
        )

    @staticmethod
    def has_guidance_embedding(config: dict[str, Any]) -> bool:
        """Whether a network of that configuration has an input for the guidance scale w."""
        return False


class PromptedUNet(PipelineNetwork):
    """A UNet that attends to a text: (x_t, t, c) → unet(x_t, t, text of c), with w as diffusers' `timestep_cond`.

    Args:
        unet: The UNet, in its own dtype.
        embeddings: The table `text`, (prompts + 1, tokens, channels).
    """

    interface = ("in_channels", "out_channels", "cross_attention_dim")

    def __init__(self, unet: UNet2DConditionModel, embeddings: Lookup) -> None:
        super().__init__()
        self.unet = unet
        self.embeddings = embeddings

    @property
    def core(self) -> UNet2DConditionModel:
        return self.unet

    def add_guidance_embedding(self) -> None:
        """Gives the UNet an input for w, diffusers' own `time_cond_proj_dim`: its pipelines then embed guidance_scale − 1."""
        time_embedding = self.unet.time_embedding
        time_embedding.cond_proj = zero_projection(time_embedding.linear_1.in_features).to(time_embedding.linear_1.weight.device)
        self.unet.register_to_config(time_cond_proj_dim=GUIDANCE_FEATURES)

    @staticmethod
    def has_guidance_embedding(config: dict[str, Any]) -> bool:
        return config.get("time_cond_proj_dim") == GUIDANCE_FEATURES

    def features(self, sample_shape: tuple[int, ...]) -> nn.Module:
        """The UNet's middle, (b, channels, h, w)."""
        return self.unet.mid_block

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype  # `unet.dtype` visits every parameter: 0.4 ms a call on a small UNet
        rows = {name: row.to(dtype) for name, row in self.embeddings.rows(c, len(x_t)).items()}
        h = None if w is None else guidance_features(w).to(dtype)  # (b, 256)
        output: Tensor = self.unet(x_t.to(dtype), t, rows["text"], timestep_cond=h, added_cond_kwargs=self.added_conditions(rows)).sample
        return output

    def added_conditions(self, rows: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Further conditions of the UNet, diffusers' `added_cond_kwargs`, from the rows of the tables."""
        return None


class TokenMap(nn.Module):
    """Arranges the tokens (b, h·w, channels) of a transformer's block as a map (b, channels, h, w) for a discriminator."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = height, width

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.size)


def token_features(
    blocks: nn.ModuleList, patch: int, sample_shape: tuple[int, ...], tokens: Callable[[Any], Tensor] = lambda output: output
) -> nn.Module:
    """Adds a layer that is called with the middle block's tokens whenever that block runs, and returns them as a map (b, channels, h, w).

    Args:
        blocks: The transformer's blocks.
        patch: Side of a token, in latent pixels.
        sample_shape: (channels, height, width).
        tokens: Takes the picture's tokens, (b, h·w, channels), from a block's output.
    """
    layer = TokenMap(*(side // patch for side in sample_shape[1:]))

    def call_layer(block: nn.Module, inputs: object, output: Any) -> None:
        layer(tokens(output))

    blocks[math.ceil(len(blocks) / 2) - 1].register_forward_hook(call_layer)
    return layer
