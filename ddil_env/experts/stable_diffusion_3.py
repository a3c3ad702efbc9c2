"""Stable Diffusion 3 and 3.5 as an expert: any `StableDiffusion3Pipeline`, a flow-matching transformer (Esser et al. 2024).

    û = Transformer(x_t, 1000 σ_t, [text₁(c), text₂(c); T5(c)], [pooled₁(c), pooled₂(c)]) ,   u = ε − x_0
    x_t = (1 − σ_t) x_0 + σ_t ε ,   σ_t = s u/(1 + (s − 1) u) ,  u = t/1000          s: the scheduler's shift

The third text encoder, T5, may be absent from the folder or left out. Zeros then replace its tokens, as in the pipeline, and diffusers
loads the student's folder with `text_encoder_3=None, tokenizer_3=None`, as the README.md in the folder says. Students that cannot be
written as a pipeline are refused: those of another prediction type than flow, and those with a guidance embedding.

    python -m ddil_agents.dagger --env sd3 --env.model ./stable-diffusion-3.5-medium --env.prompts prompts.txt --env.t5 false
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ddil_env.data.cache import Embed
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import Dtype
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.networks import PipelineNetwork, token_features
from ddil_env.pipelines.prompted_expert import PromptedExpert
from ddil_env.pipelines.prompts import Lookup, TextReader
from ddil_env.pipelines.samplers import FlowNoise
from ddil_env.schedule import NoiseSchedule

MODELS = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}
FOLLOWS = {"vae": ["shift_factor"]}
T5 = ("text_encoder_3", "tokenizer_3")
T5_TOKENS = 256  # the pipeline's max_sequence_length


class SD3(PipelineNetwork):
    """A transformer of the tokens of picture and text together: (x_t, t, c) → û.

    Args:
        transformer: The transformer, in its own dtype.
        embeddings: The tables `clip`, (prompts + 1, tokens, channels), `pooled`, (prompts + 1, channels), and, unless the third encoder
            is left out, `t5`, (prompts + 1, 256, channels).
        schedule: Gives the network's time, 1000 σ_t.
    """

    interface = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "patch_size")

    def __init__(self, transformer: SD3Transformer2DModel, embeddings: Lookup, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.transformer = transformer
        self.embeddings = embeddings
        self.schedule = schedule

    @property
    def core(self) -> SD3Transformer2DModel:
        return self.transformer

    def features(self, sample_shape: tuple[int, ...]) -> nn.Module:
        """A layer that returns the picture's tokens after the block in the middle, (b, channels, h, w)."""
        blocks, patch = self.transformer.transformer_blocks, self.transformer.config.patch_size
        return token_features(blocks, patch, sample_shape, lambda output: output[1])  # [0] is the text

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        dtype = self.transformer.pos_embed.proj.weight.dtype
        rows = {name: row.to(dtype) for name, row in self.embeddings.rows(c, len(x_t)).items()}
        width = self.transformer.config.joint_attention_dim
        clip = pad(rows["clip"], (0, width - rows["clip"].shape[-1]))  # (b, tokens, width)
        t5 = rows["t5"] if "t5" in rows else clip.new_zeros(len(x_t), T5_TOKENS, width)
        _, sigma = self.schedule.coefficients(t, torch.float32)
        output: Tensor = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=sigma * self.schedule.num_train_steps,
            encoder_hidden_states=torch.cat([clip, t5], dim=1),
            pooled_projections=rows["pooled"],
        ).sample
        return output


class StableDiffusion3(PromptedExpert):
    """A Stable Diffusion 3 or 3.5 teacher.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        prompts: A list, a text file with one prompt a line, or COCO's captions (.json); default: 16 built-in ones.
        guidance_scale: Scale of classifier-free guidance in diffusers' convention; 1 or less is none, the prompt alone.
        t5: Whether to read the third text encoder, 9 GB in half precision, if the folder has one; students are then saved with it.
        dtype: Precision of the transformer and the VAE. x̂_0 and ε̂ are float32 in any case.
        height, width: Size of the pictures, in pixels; default: what the transformer was trained on.
        max_batch: Largest batch that goes through the transformer at once (a guided pair counts as one) when states are labelled or
            sampled.
        local_files_only: Whether the hub is never asked.
        variant: Which weights to read of the components that have several, such as fp16.
        data: Pictures with captions, which serve as the prompts: a folder, COCO's, webdataset shards, or a cache of them.
        images: COCO's folder of pictures, if it is not beside the captions.
        data_cache: Folder of the cache of latents and embeddings; default: the name of the data with .pairs at its end.
        held_out: Share of the pictures that is held out of training, for evaluation; default: a twentieth, at least 10, if there are 40.
        workers: Number of processes that read pictures.
        device: Where it computes.

    Raises:
        ValueError: as in `StableDiffusion`; also a scheduler that is not FlowMatchEulerDiscreteScheduler with a fixed shift.
    """

    noise_kind = FlowNoise

    def __init__(
        self,
        model: str = "stabilityai/stable-diffusion-3.5-medium",
        prompts: str | list[str] | None = None,
        guidance_scale: float = 7.0,
        t5: bool = True,
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
        without = () if t5 else T5
        files = PipelineFolder.find(model, StableDiffusion3Pipeline, MODELS, TOKENIZERS, T5, without, FOLLOWS, variant, local_files_only)
        shape = self.latent_shape(files, height, width, files.config("transformer").get("patch_size", 2))
        files.require("transformer", "a text-to-image transformer over this VAE", out_channels=shape[0])
        pooled = sum(files.text_config(name).projection_dim for name in ("text_encoder", "text_encoder_2"))
        files.require("transformer", "a transformer over these text encoders", pooled_projection_dim=pooled)
        if "text_encoder_3" in files.models:
            files.require("transformer", "a transformer over this T5", joint_attention_dim=files.text_config("text_encoder_3").d_model)
        super().__init__(
            files, shape, texts, own, guidance_scale=guidance_scale, dtype=dtype, max_batch=max_batch, model=model, device=device
        )

    def wrap(self, core: Any) -> SD3:
        return SD3(core, self.embeddings, self.schedule)

    def embedder(self) -> Embed:
        first, second = (TextReader(self.files, number, self.device) for number in ("", "_2"))
        third = TextReader(self.files, "_3", self.device, T5_TOKENS) if "text_encoder_3" in self.files.models else None

        def embed(texts: Sequence[str]) -> dict[str, Tensor]:
            clips = [reader(texts, lambda output: (output.hidden_states[-2], output.text_embeds)) for reader in (first, second)]
            text, pooled = (torch.cat(column, dim=-1) for column in zip(*clips, strict=True))
            rows = {"clip": text, "pooled": pooled}  # (n, tokens, both's channels), (n, both's channels)
            if third is not None:
                (rows["t5"],) = third(texts, lambda output: (output.last_hidden_state,))  # (n, 256, channels)
            return {name: row.to(self.dtype) for name, row in rows.items()}

        return embed
