"""Diffusers pipelines as experts: what every family shares.

A family is one file of `ddil_env.experts`: which pipeline and which of its components it reads, how its network is called, and how its
texts, if any, are embedded. `PipelineExpert` makes students, writes them as pipelines, and draws from the user's data; its subclass
`LatentExpert` adds a VAE, and `PromptedExpert` adds texts as conditions.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ddil_env.adapters import LoRA, add_adapters
from ddil_env.data.cache import Embed
from ddil_env.data.pairs import Pairs
from ddil_env.data.sources import Source, read_pairs
from ddil_env.denoiser import NetworkDenoiser
from ddil_env.errors import check_choice
from ddil_env.expert import Expert
from ddil_env.guidance import GuidanceConditioning
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.networks import PipelineNetwork
from ddil_env.pipelines.samplers import Noise, Sampler, read_support
from ddil_env.pipelines.student_folder import read_student, write_student
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.support import Box, Support, Unbounded
from ddil_env.time_grid import TimeGrid

Dtype = Literal["float32", "float16", "bfloat16"]


class PipelineExpert(Expert):
    """A pipeline's denoiser as an expert, whose students are saved as pipelines again.

    A family calls this constructor, and then sets `network`.

    Args:
        files: The files of the pipeline.
        sample_shape: Shape of one latent.
        dtype: Precision of the denoiser. x̂_0 and ε̂ are float32 in any case: at t = 999 an error in ε̂ is 14.6 times as large in x̂_0.
        max_batch: Samples put through the denoiser at once (a guided pair counts as one) when states are labelled or sampled.
        model: The folder or hub id that the user gave, for the model card.
        num_conditions, null_condition, guidance_scale, device: As in `Expert`.

    Attributes:
        noise_kind: Reads the noise schedule of the pipeline's scheduler.
        example: The first argument of the pipeline's call, as a model card shows it.
        of_pixels: Whether it denoises pixels, which its scheduler may clip, and no latents.
        task: The hub's `pipeline_tag` of such pipelines; None where the hub has none.
        network: The teacher's network.
        pairs: The user's data; None if there are none.

    Raises:
        ValueError: an unknown dtype, max_batch below 1, a scheduler that clips latents, or what `Expert` refuses.
    """

    noise_kind: ClassVar[type[Noise]]
    example: ClassVar[str]
    of_pixels: ClassVar[bool] = False
    task: ClassVar[str | None] = None

    network: PipelineNetwork
    pairs: Pairs | None = None

    def __init__(
        self,
        files: PipelineFolder,
        sample_shape: tuple[int, ...],
        *,
        dtype: Dtype,
        max_batch: int,
        model: str,
        num_conditions: int = 0,
        null_condition: int | None = None,
        guidance_scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_choice("dtype", dtype, Dtype)
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: need at least 1")
        self.noise = self.noise_kind.read(files)
        support = read_support(files)
        if isinstance(support, Box) and not self.of_pixels:
            raise ValueError(
                f"{files.part('scheduler')} has clip_sample or thresholding, by which the pipeline clips latents to ±{support.bound:g}: "
                "latents lie beyond, and this expert does not clip them; set both to false there"
            )
        super().__init__(
            self.noise.schedule(),
            sample_shape,
            num_conditions=num_conditions,
            null_condition=null_condition,
            guidance_scale=guidance_scale,
            support=support,
            device=device,
        )
        self.files = files
        self.model = model
        self.max_batch = max_batch
        self.dtype: torch.dtype = getattr(torch, dtype)

    @abstractmethod
    def wrap(self, core: Any) -> PipelineNetwork:
        """Makes a function of condition ids of diffusers' network."""

    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that are not components."""
        return {}

    @property
    def folder(self) -> Path:
        """Where the pipeline's files are."""
        return self.files.path

    @property
    def prediction_type(self) -> PredictionType:
        """What the teacher's output means."""
        return self.noise.prediction_type

    @property
    def denoiser(self) -> str:
        """Name of the component that students imitate."""
        return next(iter(self.files.models))

    def load_network(self) -> PipelineNetwork:
        """Loads the teacher's network onto the device.

        Raises:
            ValueError: its weights are damaged.
        """
        return self.wrap(self.files.load(self.denoiser, self.dtype).to(self.device)).eval()

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        return self.schedule.prediction(self.network(x_t, t, c), x_t, t, self.prediction_type)

    # Data

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        height, width = self.sample_shape[-2:]
        return height, width

    def own_picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the pipeline of a student draws where its call names no size."""
        return self.picture_size

    def fingerprint(self) -> str:
        """Identifies what a cache of pairs depends on: size, dtype, and the files of the VAE, the text encoders and the tokenizers.

        The denoiser's files are left out, so that fine-tunes of one model share a cache.
        """
        names = [name for name in (*self.files.models, *self.files.tokenizers) if name != self.denoiser]
        height, width = self.picture_size
        kind = f"{self.files.pipeline.__name__} {height}x{width} {str(self.dtype).removeprefix('torch.')}"
        return f"{kind} {self.files.sha256(names)[:16]}"

    @cached_property
    def weights_digest(self) -> str:
        return self.files.sha256([self.denoiser])[:16]  # of the files, which is cheaper than of what was loaded

    def identity(self) -> dict[str, Any]:
        data = {"data": None} if self.pairs is None else self.pairs.identity()
        sampled = {"prediction_type": self.prediction_type, "support": repr(self.support)}
        return super().identity() | {"model": self.fingerprint(), **data, **sampled}

    def open_pairs(self, own: OwnData, embed: Embed, read: Callable[[str, str | None], Source] = read_pairs) -> Pairs:
        """Opens the user's data as latents, in float32 or float16, and embeddings; caches them first if that has not been done.

        Args:
            own: What the user says of the data.
            embed: b captions → rows of the tables, (b, *any) each.
            read: (data, images) → their listing.

        Raises:
            ValueError: data that cannot be read, a cache of another model, or latents of another shape.
        """
        dtype = torch.float32 if self.dtype == torch.float32 else torch.float16
        pairs = own.open(read, lambda pictures: self.encode(pictures).to(dtype), embed, self.fingerprint(), *self.picture_size)
        if pairs.sample_shape != self.sample_shape:
            raise ValueError(
                f"{pairs.folder} holds latents of shape {pairs.sample_shape}, this expert's are {self.sample_shape}; "
                "cache the pictures again, into another folder"
            )
        return pairs

    def conditions(self, pairs: Pairs, ids: Tensor) -> Tensor | None:
        """The condition ids (n,) of pairs with ids (n,), on the device: here the pairs' own ids."""
        return ids.to(self.device)

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        if self.pairs is None:
            return super().sample_data(n, generator)
        x_0, ids = self.pairs.draw(n, generator)
        return x_0.to(self.device), self.conditions(self.pairs, ids)

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor | None]:
        if self.pairs is None:
            return super().reference_data(n, held_out)
        x_0, ids = self.pairs.reference(n, held_out)
        return x_0.to(self.device), self.conditions(self.pairs, ids)

    # Students

    def as_student(
        self, network: PipelineNetwork, prediction_type: PredictionType, gradient_checkpointing: bool, guidance_embedding: bool
    ) -> NetworkDenoiser:
        """Makes a trainable denoiser of a network, in place: float32, in training mode, with gradients."""
        network.core.float()  # the weights that are trained: not the teacher's, over which adapters lie; autocast is up to the trainer
        if gradient_checkpointing:
            network.core.enable_gradient_checkpointing()
        network.core.requires_grad_(True)
        return NetworkDenoiser(network.train(), self.schedule, prediction_type, guidance_embedding)

    def make_student(
        self,
        *,
        gradient_checkpointing: bool = False,
        prediction_type: PredictionType | None = None,
        guidance_embedding: bool = False,
        lora: LoRA | None = None,
    ) -> NetworkDenoiser:
        """Makes a student in float32 that starts from the teacher's weights and shares the teacher's embeddings of conditions.

        Args:
            gradient_checkpointing: Recompute activations in the backward pass: less memory, one more forward.
            prediction_type: What its output means; default: the teacher's. A student of another type first has to learn the conversion.
            guidance_embedding: Whether the network takes the guidance scale as an input.
            lora: Train adapters over the teacher's own weights, which stay in their dtype, instead of a copy of the weights.

        Raises:
            ValueError: a prediction type that the schedule or the pipeline's schedulers do not support, a network that has no input
                for the guidance scale, or what `add_adapters` refuses.
        """
        kind = prediction_type or self.prediction_type
        self.noise.check_student(kind)
        network = copy.deepcopy(self.network) if lora is None else add_adapters(self.network, lora)
        if guidance_embedding:
            network.add_guidance_embedding()
        return self.as_student(network, kind, gradient_checkpointing, guidance_embedding)

    def network_of(self, student: NetworkDenoiser, purpose: str) -> PipelineNetwork:
        """The network of one of this expert's students.

        Args:
            student: Whose network.
            purpose: What it is for, with {} for the network's class, as in "save a {}".

        Raises:
            ValueError: the student is not one of this expert's.
        """
        return student.network_as(type(self.network), purpose)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The middle of the network, (b, channels, h, w)."""
        return self.network_of(student, "take features of a {}").features(self.sample_shape)

    def check_export(
        self, num_steps: int, grid: str = "linspace", kernel: str = "ddim", prediction_type: PredictionType | None = None
    ) -> None:
        """Refuses, before any training, a way to sample that the student's pipeline cannot be given; arguments as in `Expert`.

        Raises:
            ValueError: an impossible grid, an unknown kernel, or times that the pipeline's call does not take.
        """
        self.sampler(prediction_type or self.prediction_type, num_steps, grid, kernel)

    def sampling_support(self, support: Support) -> Support | None:
        """None, unless nothing is projected: a pipeline's scheduler has no such projection."""
        return support if isinstance(support, Unbounded) else None

    def sampler(self, prediction_type: PredictionType, num_steps: int, grid: str, kernel: str) -> Sampler:
        """The scheduler with which a student's pipeline samples as this library does; errors as in `check_export`."""
        sampler = self.noise.sampler(prediction_type, TimeGrid(self.schedule, num_steps, grid), kernel)  # type: ignore[arg-type]  # checked there
        parameters = inspect.signature(self.files.pipeline.__call__).parameters
        if unknown := [name for name in sampler.arguments if name not in parameters]:
            raise ValueError(
                f"grid={grid!r} in {num_steps} steps with kernel={kernel!r}: a {self.files.pipeline.__name__} takes a number of steps and "
                f"no {unknown[0]}, and these are not {type(sampler.scheduler).__name__}'s own; "
                f"choose grid {'linspace or trailing' if kernel == 'ddim' else 'lcm'}"
            )
        return sampler

    def save_student(
        self,
        student: NetworkDenoiser,
        directory: Path,
        num_steps: int,
        grid: str = "linspace",
        kernel: str = "ddim",
        guidance: GuidanceConditioning | None = None,
    ) -> None:
        """Writes a pipeline that `DiffusionPipeline.from_pretrained` loads and that samples as this library does; arguments as in `Expert`.

        From the same noise its samples are this library's, to 1e-4. Guidance, number of steps and a size other than the model's own are
        arguments of the pipeline's call, which the README.md in the folder shows and its sampling.json holds. A student of adapters is
        written with the weights that they make; beside these weights lies a file of the adapters, which `load_lora_weights` reads into
        the teacher's pipeline.

        Raises:
            ValueError: the student is not one of this expert's, or what `check_export` refuses.
        """
        write_student(self, student, directory, num_steps, grid, kernel, guidance)

    def load_student(
        self,
        directory: Path,
        *,
        gradient_checkpointing: bool = False,
        prediction_type: PredictionType | None = None,
        guidance_embedding: bool = False,
        lora: LoRA | None = None,
    ) -> NetworkDenoiser:
        """Reads the network and the prediction type that `save_student` wrote, with the options of `make_student`.

        Without `lora` it reads any student as a whole network; with `lora` it reads a student of adapters as adapters.

        Raises:
            ValueError: the folder is absent or damaged, its network does not take this expert's latents and conditions, or the student
                was made with another prediction type, guidance embedding or LoRA, or over another teacher's weights.
        """
        return read_student(
            self,
            directory,
            gradient_checkpointing=gradient_checkpointing,
            prediction_type=prediction_type,
            guidance_embedding=guidance_embedding,
            lora=lora,
        )

    def describe_data(self) -> str:
        """What a student's training states are made of, for its model card."""
        if self.pairs is not None:
            return f"{len(self.pairs)} pictures of its maker's, less those held out for evaluation"
        if self.num_conditions:
            return f"noise and {self.num_conditions} conditions (prompts or classes), without pictures"
        return "noise alone"
