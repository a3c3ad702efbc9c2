"""Diffusers pipelines as experts: what every family shares.

A family is one file: which pipeline and which of its components it reads, how its network is called, and how its texts, if
any, are embedded. `PipelineExpert` makes students of it, writes them as pipelines, and draws from the user's data; `LatentExpert`
has a VAE, `PromptedExpert` texts as conditions too.
"""

from __future__ import annotations

import copy
import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import yaml
from torch import Tensor, nn

from ddil_env.adapters import LORA_FILE, LoRA, adapted, adapters, load_adapters, merge, save_adapters
from ddil_env.data.pairs import Pairs
from ddil_env.data.sources import Source, read_pairs
from ddil_env.expert import Expert, NetworkDenoiser
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.folder import HUB_ID, PipelineFolder
from ddil_env.pipelines.networks import PipelineNetwork
from ddil_env.pipelines.prompts import Embeddings, Lookup, look_up
from ddil_env.pipelines.samplers import Noise, Sampler
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.support import Support
from ddil_env.time_grid import TimeGrid

Dtype = Literal["float32", "float16", "bfloat16"]
Embed = Callable[[Sequence[str]], dict[str, Tensor]]  # n texts → the rows of the tables, name → (n, *any)


class PipelineExpert(Expert):
    """A pipeline's denoiser, with students that are pipelines again.

    A family sets `network`, after it has called this constructor.

    Args:
        files: The pipeline's.
        sample_shape: Shape of one latent.
        dtype: Of the denoiser. x̂_0 and ε̂ are float32 in any case: at t = 999 an error in ε̂ is 14.6 × in x̂_0.
        max_batch: Samples put through the denoiser at once (a guided pair counts as one) when states are labelled or sampled.
        model: The folder or hub id that the user gave, for the model card.
        num_conditions, null_condition, guidance_scale, support, device: As in `Expert`.

    Raises:
        ValueError: an unknown dtype, max_batch below 1, or what `Expert` refuses.
    """

    noise_kind: ClassVar[type[Noise]]
    example: ClassVar[str]  # the first argument of its call, as a model card shows it
    task: ClassVar[str | None] = None  # the hub's name for it, its `pipeline_tag`; None where the hub has none

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
        support: Support | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"unknown dtype {dtype!r}; choose one of: {', '.join(get_args(Dtype))}")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: need at least 1")
        self.noise = self.noise_kind.read(files)
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
        """diffusers' network as a function of condition ids."""

    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's constructor."""
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
        """Name of the component that is imitated."""
        return next(iter(self.files.models))

    def load_network(self) -> PipelineNetwork:
        """The teacher's network on the device.

        Raises:
            ValueError: its weights are damaged.
        """
        return self.wrap(self.files.load(self.denoiser, self.dtype).to(self.device)).eval()

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        return self.schedule.prediction(self.network(x_t, t, c), x_t, t, self.prediction_type)

    # Data

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        height, width = self.sample_shape[-2:]
        return height, width

    def fingerprint(self) -> str:
        """What a cache of pairs depends on: size, dtype, and the files of the VAE, the text encoders and the tokenizers.

        Not the denoiser's: fine-tunes of one model share a cache.
        """
        names = [name for name in (*self.files.models, *self.files.tokenizers) if name != self.denoiser]
        height, width = self.picture_size
        kind = f"{self.files.pipeline.__name__} {height}x{width} {str(self.dtype).removeprefix('torch.')}"
        return f"{kind} {self.files.sha256(names)[:16]}"

    def open_pairs(self, own: OwnData, embed: Embed, read: Callable[[str, str | None], Source] = read_pairs) -> Pairs:
        """The user's data as latents, in float32 or float16, and what `embed` makes of their captions.

        Raises:
            ValueError: what cannot be read, a cache of another model, or of latents of another shape.
        """
        kept = torch.float32 if self.dtype == torch.float32 else torch.float16
        pairs = own.open(read, lambda pictures: self.encode(pictures).to(kept), embed, self.fingerprint(), *self.picture_size)
        if pairs.sample_shape != self.sample_shape:
            raise ValueError(
                f"{pairs.folder} holds latents of shape {pairs.sample_shape}, this expert's are {self.sample_shape}; cache anew"
            )
        return pairs

    def conditions(self, pairs: Pairs, ids: Tensor) -> Tensor | None:
        """The conditions of pairs, on the device: their own numbers."""
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

    def _student(
        self, network: PipelineNetwork, prediction_type: PredictionType, gradient_checkpointing: bool, guidance_embedding: bool
    ) -> NetworkDenoiser:
        network.core.float()  # master weights, an adapted network's without the teacher's; mixed precision is the trainer's
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
        """A network in float32 that starts from the teacher's weights, and reads the teacher's tables.

        Args:
            gradient_checkpointing: Recompute activations in the backward pass: less memory, one more forward.
            prediction_type: What its output means; another than the teacher's takes a stage of conversion. Default: the teacher's.
            guidance_embedding: Whether it is told the guidance scale.
            lora: Adapters over the teacher's own weights, which stay in its dtype, in the place of a copy.

        Raises:
            ValueError: a prediction type that the schedule does not hold for or no pipeline samples with, a network that cannot be
                told the scale, or what `adapted` refuses.
        """
        kind = prediction_type or self.prediction_type
        self.noise.check_student(kind)
        network = copy.deepcopy(self.network) if lora is None else adapted(self.network, lora)
        if guidance_embedding:
            network.embed_guidance()
        return self._student(network, kind, gradient_checkpointing, guidance_embedding)

    def _own(self, student: NetworkDenoiser, purpose: str) -> PipelineNetwork:
        network = student.network
        if not isinstance(network, type(self.network)):
            raise ValueError(
                f"cannot {purpose.format(type(network).__name__)}; a student of {type(self).__name__} is a {type(self.network).__name__}"
            )
        return network

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The middle of the network, (b, channels, h, w)."""
        return self._own(student, "take features of a {}").features(self.sample_shape)

    def check_export(
        self, num_steps: int, grid: str = "linspace", kernel: str = "ddim", prediction_type: PredictionType | None = None
    ) -> None:
        """Refuses an impossible grid, an unknown kernel, and times that the pipeline's call cannot be given.

        Raises:
            ValueError: so.
        """
        self._sampler(prediction_type or self.prediction_type, num_steps, grid, kernel)

    def _sampler(self, prediction_type: PredictionType, num_steps: int, grid: str, kernel: str) -> Sampler:
        sampler = self.noise.sampler(prediction_type, TimeGrid(self.schedule, num_steps, grid), kernel)  # type: ignore[arg-type]  # checked there
        takes = inspect.signature(self.files.pipeline.__call__).parameters
        if strange := [name for name in sampler.arguments if name not in takes]:
            raise ValueError(
                f"grid={grid!r} in {num_steps} steps with kernel={kernel!r}: a {self.files.pipeline.__name__} takes a number of steps and "
                f"no {strange[0]}, and these are not {type(sampler.scheduler).__name__}'s own; "
                f"choose grid {'linspace or trailing' if kernel == 'ddim' else 'lcm'}"
            )
        return sampler

    def save_student(self, student: NetworkDenoiser, directory: Path, num_steps: int, grid: str = "linspace", kernel: str = "ddim") -> None:
        """Writes a pipeline that `DiffusionPipeline.from_pretrained` loads and that samples as this library does.

        The tests compare its samples to this library's from the same noise, to 1e-4. Its scheduler is that of samplers.py. The number of
        steps and the guidance are arguments of a pipeline's call, which README.md beside it gives. A student of adapters is written with
        the weights that they make, and the adapters as a file for `load_lora_weights`, over the teacher's pipeline, beside them.

        Raises:
            ValueError: the student is not one of this expert's, or what `check_export` refuses.
        """
        network = self._own(student, "save a {} as a pipeline")
        sampler = self._sampler(student.prediction_type, num_steps, grid, kernel)
        files = self.files
        others = {name: files.load(name) for name in files.models if name != self.denoiser}
        others |= {name: files.tokenizer(name) for name in files.tokenizers} | dict.fromkeys(files.absent)
        parts = {self.denoiser: self._whole(student).core, **others, "scheduler": sampler.scheduler}
        files.pipeline(**parts, **self.pipeline_options()).save_pretrained(directory, safe_serialization=True)
        if adapters(network.core):
            save_adapters(network.core, directory / LORA_FILE, self.denoiser)
        card = self._card(student, num_steps, sampler, kernel)
        (directory / "README.md").write_text(card, encoding="utf-8")

    def _whole(self, student: NetworkDenoiser) -> PipelineNetwork:
        """The student's network; a plain one of the same weights, in float32, where it is adapted."""
        if not adapters(student.network):
            return student.network  # type: ignore[return-value]  # `_own` has seen it
        plain = self.make_student(prediction_type=student.prediction_type, guidance_embedding=student.guidance_embedding).network
        merge(student.network, plain)
        return plain  # type: ignore[return-value]

    def load_student(
        self,
        directory: Path,
        *,
        gradient_checkpointing: bool = False,
        prediction_type: PredictionType | None = None,
        guidance_embedding: bool = False,
        lora: LoRA | None = None,
    ) -> NetworkDenoiser:
        """Reads the network and the prediction type of what `save_student` wrote, with the options of `make_student`.

        Without `lora` any student is read whole; with it one of adapters, as adapters.

        Raises:
            ValueError: the folder is absent or damaged, its network does not take this expert's latents and conditions, or it was
                made with another prediction type, guidance embedding or LoRA than is asked for, or over another teacher's weights.
        """
        saved = PipelineFolder(directory, self.files.pipeline, {self.denoiser: self.files.models[self.denoiser]})
        saved_type = self.noise_kind.read(saved).prediction_type
        if prediction_type not in (None, saved_type):
            raise ValueError(f"{directory} predicts {saved_type}; pass prediction_type={saved_type!r}, not {prediction_type!r}")
        told = self.network.is_told(saved.config(self.denoiser))
        if told != guidance_embedding:
            raise ValueError(
                f"{directory / self.denoiser} was made with guidance_embedding={told}, not {guidance_embedding}; "
                "pass the options that the student was made with"
            )
        core = saved.load(self.denoiser).to(self.device)
        for key in self.network.interface:
            found, own = core.config[key], self.network.core.config[key]
            if found != own:
                raise ValueError(f"{directory / self.denoiser} has {key}={found}, this expert {own}: it is the student of another model")
        if lora is None:
            return self._student(self.wrap(core), saved_type, gradient_checkpointing, guidance_embedding)
        student = self.make_student(
            gradient_checkpointing=gradient_checkpointing, prediction_type=saved_type, guidance_embedding=guidance_embedding, lora=lora
        )
        load_adapters(self._own(student, "").core, directory / LORA_FILE, self.denoiser)
        ours = self._whole(student).core.state_dict()
        for name, theirs in core.named_parameters():
            if (theirs - ours[name]).norm() > 0.01 * theirs.norm():  # in half precision where it was not, the teacher differs by .002
                raise ValueError(
                    f"{directory} differs from this teacher with its adapters in {name!r}: they were trained over other weights; "
                    "pass the model that they were made with, or leave lora out to read the student whole"
                )
        return student

    def _card(self, student: NetworkDenoiser, num_steps: int, sampler: Sampler, kernel: str) -> str:
        """The model card: how the student is called, and under which licence its teacher is."""
        guided = "guidance_scale" in inspect.signature(self.files.pipeline.__call__).parameters
        arguments = dict(sampler.arguments)
        if guided:
            arguments["guidance_scale"] = float(self.guidance_scale) if student.guidance_embedding else 1.0
        licence = self.files.licence()
        head: dict[str, Any] = {"library_name": "diffusers", "license": "unknown", **licence, "tags": ["ddil", "distillation", "few-step"]}
        if self.task is not None:
            head["pipeline_tag"] = self.task
        if re.fullmatch(HUB_ID, self.model) and not Path(self.model).is_dir():
            head["base_model"] = self.model
        guidance = (TOLD if student.guidance_embedding else LEARNED) if guided else ""
        stated = f"`{licence.get('license_name', licence['license'])}`, as its model card states" if "license" in licence else UNSTATED
        return CARD.format(
            head=yaml.safe_dump(head, sort_keys=False),
            num_steps=num_steps,
            pipeline=self.files.pipeline.__name__,
            absent="".join(f", {name}=None" for name in self.files.absent),  # diffusers takes their absence from the call alone
            call=", ".join([self.example, *(f"{name}={value}" for name, value in arguments.items())]),
            guidance=guidance,
            noise=(RENOISED if kernel == "renoise" and num_steps > 1 else "") + self._on_adapters(student),
            states=self._states(),
            licence=stated,
        )

    def _states(self) -> str:
        """What the states of training are made of."""
        if self.pairs is not None:
            return f"{len(self.pairs)} pictures of its maker's, less what was held out to judge it by"
        return (
            f"noise and {self.num_conditions} conditions (prompts or classes), without pictures" if self.num_conditions else "noise alone"
        )

    def _on_adapters(self, student: NetworkDenoiser) -> str:
        """What the model card says of the adapters' file."""
        if not adapters(student.network):
            return ""
        pipeline = self.files.pipeline
        if student.guidance_embedding:
            use = "holds the guidance embedding too, which\n`load_lora_weights` refuses: the student is this folder."
        elif not hasattr(pipeline, "load_lora_weights"):
            use = f"holds them alone,\nand a {pipeline.__name__} reads no such file: the student is this folder."
        else:
            use = OVER_ITS_TEACHER
        return ADAPTED.format(file=LORA_FILE, use=use)


class LatentExpert(PipelineExpert):
    """A pipeline whose samples are a VAE's latents.

    The support is unbounded: latents have no bound that is known without data (pixels would have ±1).
    """

    extractor = "latent_pool8"

    @staticmethod
    def latent_shape(files: PipelineFolder, height: int | None, width: int | None, multiple: int = 1) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of pictures of that size; default: what the denoiser was trained on.

        Args:
            files: The pipeline's.
            height, width: In pixels.
            multiple: Latent pixels that a side must be a multiple of.

        Raises:
            ValueError: a denoiser of other channels than the VAE's, or a size that does not divide.
        """
        name = next(iter(files.models))
        vae, config = files.config("vae"), files.config(name)
        channels: int = vae.get("latent_channels", 4)
        files.require(name, "a denoiser over this VAE", in_channels=channels)
        stride = _stride(vae)
        trained = config.get("sample_size") or 64
        sides = (trained, trained) if isinstance(trained, int) else trained
        height, width = (side * stride if given is None else given for side, given in zip(sides, (height, width), strict=True))
        if height % (stride * multiple) or width % (stride * multiple) or min(height, width) < 1:
            raise ValueError(f"height={height}, width={width}: both must be positive multiples of {stride * multiple}, the latents' stride")
        return channels, height // stride, width // stride

    @property
    def picture_size(self) -> tuple[int, int]:
        stride = _stride(self.files.config("vae"))
        height, width = (side * stride for side in self.sample_shape[-2:])
        return height, width

    def open_pairs(self, own: OwnData, embed: Embed, read: Callable[[str, str | None], Source] = read_pairs) -> Pairs:
        pairs = super().open_pairs(own, embed, read)
        self.release()
        return pairs

    def release(self) -> None:
        self.__dict__.pop("vae", None)  # it is read again at the next picture

    @cached_property
    def vae(self) -> Any:
        """Loaded at the first picture, and at the first after training, which never needs it.

        In float32 where its configuration says that it overflows in float16 (`force_upcast`, as SDXL's does).
        """
        upcast = self.dtype == torch.float16 and bool(self.files.config("vae").get("force_upcast"))
        return self.files.load("vae", torch.float32 if upcast else self.dtype).to(self.device)

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Pictures → latents (b, *sample_shape) float32: the VAE's mean, (mean − shift) × scaling_factor.

        Args:
            samples: uint8 (b, height, width, 3), or floats in [−1, 1], (b, 3, height, width).

        Raises:
            ValueError: another shape.
        """
        height, width = self.picture_size
        expected = (height, width, 3) if samples.dtype == torch.uint8 else (3, height, width)
        if tuple(samples.shape[1:]) != expected:
            raise ValueError(f"{samples.dtype} pictures of shape {tuple(samples.shape)}: need (b, {', '.join(map(str, expected))})")
        if samples.dtype == torch.uint8:
            samples = samples.permute(0, 3, 1, 2) / 127.5 - 1  # (b, h, w, 3) → (b, 3, h, w)
        config, dtype = self.vae.config, self.vae.dtype
        # Eight at a time: the VAE's activations have the picture's size, 64 × the latent's.
        means = [self.vae.encode(chunk.to(self.device, dtype)).latent_dist.mean.float() for chunk in samples.split(8)]
        return (torch.cat(means) - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        config = self.vae.config
        latents = (x_0 / config.scaling_factor + (config.shift_factor or 0.0)).to(self.device, self.vae.dtype)
        return to_uint8(torch.cat([self.vae.decode(chunk).sample.float() for chunk in latents.split(8)]))


class PromptedExpert(LatentExpert):
    """A text-to-image pipeline: a condition c is the number of a prompt, and the last id, `null_condition`, is that of guidance.

    Every prompt is read by the text encoders once, before the first step, and the encoders are then let go: what remains is one table
    of embeddings, on the device, shared by the expert and all of its students. With data the prompts are their captions, a cache
    holds the table, and where it is there already no encoder is loaded.

    Args:
        prompts: The texts; none with data.
        own: The user's data.
        rest: As in `PipelineExpert`.

    Attributes:
        embeddings_on_device: Bytes of a cache's embeddings that are put on the device; larger ones stay on the disk.

    Raises:
        ValueError: as `PipelineExpert`, or data that cannot be read.
    """

    example = '"a prompt"'
    task = "text-to-image"
    embeddings_on_device: ClassVar[int] = 2**31

    def __init__(self, files: PipelineFolder, sample_shape: tuple[int, ...], prompts: tuple[str, ...], own: OwnData, **rest: Any) -> None:
        super().__init__(files, sample_shape, num_conditions=len(prompts), null_condition=len(prompts), **rest)
        self.prompts = prompts
        if own.data is None:
            self.embeddings: Lookup = Embeddings(self.embedder()((*prompts, "")))
        else:
            encoders = cache(self.embedder)  # loaded at the first caption that is in no cache
            self.pairs = self.open_pairs(own, lambda texts: encoders()(texts))
            self.num_conditions = self.null_condition = len(self.pairs)
            self.embeddings = look_up(self.pairs, self.device, self.embeddings_on_device)
        self.network = self.load_network()

    @abstractmethod
    def embedder(self) -> Embed:
        """What turns texts into rows of the tables, in the expert's dtype; "" into the null condition's. It holds the text encoders."""

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """n condition ids, uniform, (n,): of all prompts, or of the captions that are not held out."""
        return super().sample_condition(n, generator) if self.pairs is None else self.pairs.draw_ids(n, generator).to(self.device)

    def captions(self, c: Tensor) -> list[str]:
        return [self.prompts[i] for i in c.tolist()] if self.pairs is None else self.pairs.captions(c)


def to_uint8(pictures: Tensor) -> Tensor:
    """Floats in [−1, 1], (b, 3 or 1, h, w) → uint8 (b, h, w, 3) on the CPU."""
    grey = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return grey.expand(-1, -1, -1, 3).contiguous().cpu()


def _stride(vae: dict[str, Any]) -> int:
    """Pixels of a picture's side in one of its latent's."""
    return int(2 ** (len(vae.get("block_out_channels", [0])) - 1))


CARD = """---
{head}---
A {num_steps}-step student of a diffusion model, trained by imitation of its teacher with ddil_agents.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("student", use_safetensors=True{absent})  # a {pipeline}
output = pipe({call})
output.images[0].save("sample.png")
```

{guidance}{noise}
Its data: {states}.

Licence of the teacher, which holds for its students too: {licence}.
"""

UNSTATED = "unknown: its folder states none; look it up before you pass the student on, and enter it above"

LEARNED = """`guidance_scale=1.0` runs the network once a step; it is right for a student of a guided teacher, which has learned the
guidance. A student of an unguided teacher can be guided like any pipeline.
"""

TOLD = """The network is told `guidance_scale`: any of the range that it was trained on, 1.0 for no guidance. It runs once a step
whatever the scale.
"""

RENOISED = """
Every step but the last draws fresh noise; for the same picture again, call `torch.manual_seed(0)` before, and pass no generator.
Where `timesteps` are given, the scheduler may warn that they are not its own: they are the student's.
"""

ADAPTED = """
The network is its teacher's with LoRA adapters added to the weights. `{file}` {use}
"""

OVER_ITS_TEACHER = """holds them alone: over the
teacher's own pipeline, `teacher`, they make the same student.

```python
teacher.load_lora_weights("student")
teacher.scheduler = pipe.scheduler
```"""
