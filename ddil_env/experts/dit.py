"""Class-conditional transformers over latents as an expert: any `DiTPipeline` (Peebles & Xie 2023).

    [ε̂, Σ̂] = Transformer(x_t, t, c)        channels in that order; Σ̂, where it is learned, is for ancestral sampling and unused here

A condition c is a class; the last id, `null_condition`, is "no class".

    python -m ddil_agents.dagger --env dit --env.model ./DiT-XL-2-256
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ddil_env.expert import NetworkDenoiser
from ddil_env.pipelines.expert import Dtype, LatentExpert
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.networks import PipelineNetwork, token_features
from ddil_env.pipelines.samplers import DiffusionNoise

MODELS = {"transformer": DiTTransformer2DModel, "vae": AutoencoderKL}


class DiT(PipelineNetwork):
    """A transformer that reads classes: (x_t, t, c) → ε̂; c None is "no class"."""

    interface = ("in_channels", "out_channels", "num_embeds_ada_norm", "sample_size")

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        for block in transformer.transformer_blocks:
            # In training mode it would replace a tenth of the classes by "no class", which the loss knows nothing of.
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def core(self) -> DiTTransformer2DModel:
        return self.transformer

    def features(self, sample_shape: tuple[int, ...]) -> nn.Module:
        """The tokens of the block in the middle, (b, channels, h, w)."""
        return token_features(self.transformer.transformer_blocks, self.transformer.config.patch_size, sample_shape)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        null = self.transformer.config.num_embeds_ada_norm
        c = torch.full((len(x_t),), null, device=x_t.device) if c is None else c
        output: Tensor = self.transformer(x_t.to(self.transformer.pos_embed.proj.weight.dtype), timestep=t, class_labels=c).sample
        return output[:, : x_t.shape[1]]  # (b, 2 · channels, h, w) → (b, channels, h, w)


class ClassConditionalDiT(LatentExpert):
    """A DiT teacher. No pipeline can tell its students the guidance scale: they have no guidance embedding.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        guidance_scale: Classifier-free guidance in diffusers' convention, 1 is none.
        dtype: Of the transformer and the VAE. x̂_0 and ε̂ are float32 in any case.
        max_batch: Samples put through the transformer at once (a guided pair counts as one) when states are labelled or sampled.
        local_files_only: Never ask the hub.
        device: Where it computes.

    Raises:
        ValueError: no weights to be had, weights that are damaged, pickled or of another pipeline, an unsupported noise schedule,
            an absent device.
    """

    noise_kind = DiffusionNoise
    example = "class_labels=[0]"

    def __init__(
        self,
        model: str = "facebook/DiT-XL-2-256",
        guidance_scale: float = 4.0,
        dtype: Dtype = "float32",
        max_batch: int = 16,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        files = PipelineFolder.find(model, DiTPipeline, MODELS, local_files_only=local_files_only)
        config = files.config("transformer")
        shape = self.latent_shape(files, None, None)
        if (out := config.get("out_channels") or shape[0]) not in (shape[0], 2 * shape[0]):
            raise ValueError(f"{files.part('transformer')} has out_channels={out}; need {shape[0]}, or twice that with a learned variance")
        classes = config.get("num_embeds_ada_norm") or 1000
        super().__init__(
            files,
            shape,
            num_conditions=classes,
            null_condition=classes,
            guidance_scale=guidance_scale,
            dtype=dtype,
            max_batch=max_batch,
            model=model,
            device=device,
        )
        self.labels: dict[str, str] = files.index.get("id2label") or {}
        self.network = self.load_network()

    def wrap(self, core: Any) -> DiT:
        return DiT(core)

    def captions(self, c: Tensor) -> list[str]:
        if not self.labels:
            raise ValueError(f"{self.folder / 'model_index.json'} has no id2label, the classes' names; leave out the scores of captions")
        return [self.labels[str(i)] for i in c.tolist()]

    def save_student(self, student: NetworkDenoiser, directory: Path, num_steps: int, grid: str = "linspace", kernel: str = "ddim") -> None:
        super().save_student(student, directory, num_steps, grid, kernel)
        if self.labels:  # the classes' names, which DiTPipeline reads but does not write
            path = directory / "model_index.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": self.labels}, indent=2))
