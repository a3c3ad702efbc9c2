"""Stable Diffusion 1.x and 2.x as an expert: any `StableDiffusionPipeline` in a local folder, in the hub's cache or on the hub.

    ε̂, v̂ or x̂_0 = UNet(x_t, t, text(c))        Rombach et al. 2022; latents at 1/8 of the picture's size

A condition id c is the number of a prompt; the last id, `null_condition`, is the empty prompt "" that guidance pushes away from.
A student with a guidance embedding takes the guidance scale as an input, and so does its pipeline.

    python -m ddil_agents.dagger --env sd15 --env.model ./stable-diffusion-v1-5 --env.prompts prompts.txt
    python -m ddil_agents.dagger --env sd15 --env.model ./stable-diffusion-v1-5 --data ./coco
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ddil_env.data.cache import Embed
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import Dtype
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.networks import PromptedUNet
from ddil_env.pipelines.prompted_expert import PromptedExpert
from ddil_env.pipelines.prompts import PROMPTS, TextReader, coco_captions, read_prompts
from ddil_env.pipelines.samplers import DiffusionNoise

__all__ = ["PROMPTS", "Dtype", "PromptedUNet", "StableDiffusion", "coco_captions", "read_prompts"]

MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
TOKENIZERS = {"tokenizer": CLIPTokenizer}
FOLLOWS = {"unet": ["time_cond_proj_dim"]}


class StableDiffusion(PromptedExpert):
    """A Stable Diffusion 1.x or 2.x teacher.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        prompts: A list, a text file with one prompt a line, or COCO's captions (.json); default: 16 built-in ones. All
            embeddings stay in the device's memory.
        guidance_scale: Scale of classifier-free guidance in diffusers' convention; 1 or less is none, the prompt alone.
        dtype: Precision of the UNet and the VAE. x̂_0 and ε̂ are float32 in any case: at t = 999 an error in ε̂ is 14.6 times as large in x̂_0.
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
        ValueError: weights that cannot be found, are damaged or pickled, or are of another pipeline; an unsupported noise schedule;
            prompts or data that cannot be read; both prompts and data; a size that the VAE's stride does not divide; or an unavailable
            device.
    """

    noise_kind = DiffusionNoise

    def __init__(
        self,
        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        prompts: str | list[str] | None = None,
        guidance_scale: float = 7.5,
        dtype: Dtype = "float32",
        height: int | None = None,
        width: int | None = None,
        max_batch: int = 16,
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
            model, StableDiffusionPipeline, MODELS, TOKENIZERS, follows=FOLLOWS, variant=variant, local_files_only=local_files_only
        )
        shape = self.latent_shape(files, height, width)
        files.require("unet", "a text-to-image UNet over this VAE", out_channels=shape[0], time_cond_proj_dim=None)
        files.require("unet", "a UNet over this text encoder", cross_attention_dim=files.text_config("text_encoder").hidden_size)
        super().__init__(
            files, shape, texts, own, guidance_scale=guidance_scale, dtype=dtype, max_batch=max_batch, model=model, device=device
        )

    def pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def wrap(self, core: Any) -> PromptedUNet:
        return PromptedUNet(core, self.embeddings)

    def embedder(self) -> Embed:
        reader = TextReader(self.files, "", self.device)

        def embed(texts: Sequence[str]) -> dict[str, Tensor]:
            (text,) = reader(texts, lambda output: (output.last_hidden_state,))
            return {"text": text.to(self.dtype)}  # (n, tokens, channels)

        return embed
