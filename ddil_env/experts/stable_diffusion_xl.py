"""SDXL and its distilled variants (SSD-1B, Segmind-Vega) as an expert: any `StableDiffusionXLPipeline`.

    ε̂ or v̂ = UNet(x_t, t, [text₁(c), text₂(c)], pooled₂(c), sizes)        Podell et al. 2023, §2.2

The network reads the concatenated next-to-last layers of two text encoders, the pooled output of the second, and six numbers: original
size, crop and target size, here those of the whole picture. Guidance pushes away from zeros if the pipeline says so
(`force_zeros_for_empty_prompt`), and from the empty prompt otherwise.

    python -m ddil_agents.dmd2 --env ssd1b --env.model ./SSD-1B --env.prompts prompts.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ddil_env.data.cache import Embed
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import Dtype
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.latent_expert import vae_stride
from ddil_env.pipelines.networks import PromptedUNet
from ddil_env.pipelines.prompted_expert import PromptedExpert
from ddil_env.pipelines.prompts import Lookup, TextReader
from ddil_env.pipelines.samplers import DiffusionNoise

MODELS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
FOLLOWS = {
    "unet": ["time_cond_proj_dim", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"],
    "vae": ["latents_mean", "latents_std"],
}


class SDXLUNet(PromptedUNet):
    """A UNet that also reads pooled embeddings and sizes.

    Args:
        unet: The UNet, in its own dtype.
        embeddings: The tables `text`, (prompts + 1, tokens, channels), and `pooled`, (prompts + 1, channels).
        time_ids: Original height and width, top and left of the crop, target height and width, (6,).
    """

    def __init__(self, unet: UNet2DConditionModel, embeddings: Lookup, time_ids: Tensor) -> None:
        super().__init__(unet, embeddings)
        self.time_ids: Tensor
        self.register_buffer("time_ids", time_ids, persistent=False)

    def added_conditions(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = rows["pooled"]
        return {"text_embeds": pooled, "time_ids": self.time_ids.to(pooled.dtype).expand(len(pooled), -1)}  # (b, channels), (b, 6)


class StableDiffusionXL(PromptedExpert):
    """An SDXL or SSD-1B teacher.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        prompts: A list, a text file with one prompt a line, or COCO's captions (.json); default: 16 built-in ones.
        guidance_scale: Scale of classifier-free guidance in diffusers' convention; 1 or less is none, the prompt alone.
        dtype: Precision of the UNet and the VAE; a VAE that overflows in float16 is in float32.
        height, width: Size of the pictures, in pixels; default: what the UNet was trained on.
        max_batch: Largest batch that goes through the UNet at once (a guided pair counts as one) when states are labelled or sampled.
        local_files_only: Whether the hub is never asked.
        variant: Which weights to read of the components that have several, such as fp16.
        data: Pictures with captions, which serve as the prompts: a folder, COCO's, webdataset shards, or a cache of them.
        images: COCO's folder of pictures, if it is not beside the captions.
        data_cache: Folder of the cache of latents and embeddings; default: the name of the data with .pairs at its end.
        held_out: Share of the pictures that is held out of training, for evaluation; default: a twentieth, at least 10, if there are 40.
        workers: Number of processes that read pictures.
        device: Where it computes.

    Raises:
        ValueError: as in `StableDiffusion`.
    """

    noise_kind = DiffusionNoise

    def __init__(
        self,
        model: str = "stabilityai/stable-diffusion-xl-base-1.0",
        prompts: str | list[str] | None = None,
        guidance_scale: float = 5.0,
        dtype: Dtype = "float32",
        height: int | None = None,
        width: int | None = None,
        max_batch: int = 4,
        local_files_only: bool = False,
        variant: str | None = None,
        data: str | None = None,
        images: str | None = None,
        data_cache: str | None = None,
        held_out: float | None = None,
        workers: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        own = OwnData(data, images, data_cache, held_out, workers)
        texts = own.texts(prompts)
        files = PipelineFolder.find(
            model, StableDiffusionXLPipeline, MODELS, TOKENIZERS, follows=FOLLOWS, variant=variant, local_files_only=local_files_only
        )
        shape = self.latent_shape(files, height, width)
        files.require("unet", "an SDXL UNet over this VAE", out_channels=shape[0], time_cond_proj_dim=None, addition_embed_type="text_time")
        first, second = (files.text_config(name) for name in ("text_encoder", "text_encoder_2"))
        added = 6 * (files.config("unet").get("addition_time_embed_dim") or 0) + second.projection_dim  # six sizes and the pooled text
        widths = {"cross_attention_dim": first.hidden_size + second.hidden_size, "projection_class_embeddings_input_dim": added}
        files.require("unet", "a UNet over these text encoders", **widths)
        stride = vae_stride(files.config("vae"))
        size = (shape[1] * stride, shape[2] * stride)
        self.time_ids = (*size, 0, 0, *size)
        self.zero_null = bool(files.index.get("force_zeros_for_empty_prompt", True))
        super().__init__(
            files, shape, texts, own, guidance_scale=guidance_scale, dtype=dtype, max_batch=max_batch, model=model, device=device
        )

    def pipeline_options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zero_null, "add_watermarker": False}

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{' zero null' if self.zero_null else ''}"

    def wrap(self, core: Any) -> SDXLUNet:
        return SDXLUNet(core, self.embeddings, torch.tensor(self.time_ids, dtype=torch.float32, device=self.device))

    def embedder(self) -> Embed:
        first, second = (TextReader(self.files, number, self.device) for number in ("", "_2"))

        def embed(texts: Sequence[str]) -> dict[str, Tensor]:
            (text,) = first(texts, lambda output: (output.hidden_states[-2],))
            text_2, pooled = second(texts, lambda output: (output.hidden_states[-2], output.text_embeds))
            rows = {"text": torch.cat([text, text_2], dim=-1), "pooled": pooled}  # (n, tokens, both's channels), (n, channels)
            if self.zero_null:
                empty = torch.tensor([not text for text in texts], device=self.device)
                rows = {name: row.masked_fill(empty.reshape(-1, *(1,) * (row.ndim - 1)), 0.0) for name, row in rows.items()}
            return {name: row.to(self.dtype) for name, row in rows.items()}

        return embed
