"""Class-conditional transformers of latents as an expert: any `DiTPipeline` (Peebles & Xie 2023).

    [ε̂, Σ̂] = Transformer(x_t, t, c)        channels in that order; Σ̂, if it is learned, is for ancestral sampling and unused here

A condition id c is a class; the last id, `null_condition`, is "no class". Data are a folder that holds a folder of pictures for each class.

    python -m ddil_agents.dagger --env dit --env.model ./DiT-XL-2-256 --data ./imagenet/train
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ddil_env.data.pairs import Pairs
from ddil_env.data.sources import Source, read_pictures
from ddil_env.denoiser import NetworkDenoiser
from ddil_env.guidance import GuidanceConditioning
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.expert import Dtype
from ddil_env.pipelines.find import read_json
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.latent_expert import LatentExpert
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
            # In training mode the block would replace a tenth of the classes by "no class", which the loss does not know of.
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def core(self) -> DiTTransformer2DModel:
        return self.transformer

    def features(self, sample_shape: tuple[int, ...]) -> nn.Module:
        """A layer that returns the tokens of the block in the middle, (b, channels, h, w)."""
        return token_features(self.transformer.transformer_blocks, self.transformer.config.patch_size, sample_shape)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        null = self.transformer.config.num_embeds_ada_norm
        c = torch.full((len(x_t),), null, device=x_t.device) if c is None else c
        output: Tensor = self.transformer(x_t.to(self.transformer.pos_embed.proj.weight.dtype), timestep=t, class_labels=c).sample
        return output[:, : x_t.shape[1]]  # (b, 2 · channels, h, w) → (b, channels, h, w)


def read_classes(path: str, classes: int) -> Source:
    """Lists the pictures of a folder with a folder for each class; the caption of a picture is the number of its class.

    Args:
        path: The folder. `classes.json` in it may give the number of each folder's class.
        classes: Number of the model's classes.

    Raises:
        ValueError: there are no pictures, a folder has no class, or there is no classes.json and not one folder for each class.
    """
    source = read_pictures(path, ("classes.json",))
    names = sorted({pair.caption for pair in source.pairs})
    listing = Path(path).expanduser() / "classes.json"
    numbers = read_json(listing) if listing.is_file() else {name: i for i, name in enumerate(names)}
    if not listing.is_file() and len(names) != classes:
        raise ValueError(
            f"{path!r} holds pictures in {len(names)} folders, and the model has {classes} classes: "
            f'say in {listing} which class each is, {{"{names[0] or "folder"}": 0}}'
        )
    if wrong := [name for name in names if type(numbers.get(name)) is not int or numbers[name] not in range(classes)]:
        raise ValueError(f"{listing} gives the folder {wrong[0]!r} the class {numbers.get(wrong[0])!r}; classes are 0 to {classes - 1}")
    return replace(source, pairs=[pair._replace(caption=f"{numbers[pair.caption]:d}") for pair in source.pairs])


class ClassConditionalDiT(LatentExpert):
    """A DiT teacher. Its students have no guidance embedding, since DiTPipeline cannot pass the guidance scale to a network.

    Args:
        model: A folder that holds model_index.json, or a hub id.
        guidance_scale: Scale of classifier-free guidance in diffusers' convention; 1 or less is none, the class alone.
        dtype: Precision of the transformer and the VAE. x̂_0 and ε̂ are float32 in any case.
        max_batch: Largest batch that goes through the transformer at once (a guided pair counts as one) when states are labelled or
            sampled.
        local_files_only: Whether the hub is never asked.
        variant: Which weights to read of the components that have several, such as fp16.
        data: A folder with a folder of pictures for each class, or a cache of it. Classes are numbered in the order of the folders'
            names, of which there must be one for each class, or as `classes.json` beside them says, {"folder": class}.
        data_cache: Folder of the cache; default: the name of the data with .pairs at its end.
        held_out: Share of the pictures that is held out of training, for evaluation; default: a twentieth, at least 10, if there are 40.
        workers: Number of processes that read pictures.
        device: Where it computes.

    Raises:
        ValueError: weights that cannot be found, are damaged or pickled, or are of another pipeline; an unsupported noise schedule;
            data that cannot be read; or an unavailable device.
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
        variant: str | None = None,
        data: str | None = None,
        data_cache: str | None = None,
        held_out: float | None = None,
        workers: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        own = OwnData(data, None, data_cache, held_out, workers)
        files = PipelineFolder.find(model, DiTPipeline, MODELS, variant=variant, local_files_only=local_files_only)
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
        if own.data is not None:
            self.pairs = self.open_pairs(
                own,
                lambda numbers: {"class": torch.tensor([int(number or classes) for number in numbers])},
                lambda path, _: read_classes(path, classes),
            )
        self.network = self.load_network()

    def wrap(self, core: Any) -> DiT:
        return DiT(core)

    def conditions(self, pairs: Pairs, ids: Tensor) -> Tensor:
        return pairs.embeddings(ids)["class"].to(self.device)

    def captions(self, c: Tensor) -> list[str]:
        if not self.labels:
            raise ValueError(f"{self.folder / 'model_index.json'} has no id2label, the classes' names; leave out the scores of captions")
        return [self.labels[str(i)] for i in c.tolist()]

    def save_student(
        self,
        student: NetworkDenoiser,
        directory: Path,
        num_steps: int,
        grid: str = "linspace",
        kernel: str = "ddim",
        guidance: GuidanceConditioning | None = None,
    ) -> None:
        super().save_student(student, directory, num_steps, grid, kernel, guidance)
        if self.labels:  # the classes' names, which DiTPipeline reads but does not write
            path = directory / "model_index.json"
            path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "id2label": self.labels}, indent=2))
