"""Stable Diffusion 1.x and 2.x as an expert: any `StableDiffusionPipeline` in a local folder, in the hub's cache or on the hub.

    ε̂, v̂ or x̂_0 = UNet(x_t, t, text(c))        Rombach et al. 2022; latents at 1/8 of the picture's size

A condition c is the number of a prompt; the last id, `null_condition`, is the empty prompt "" that guidance pushes away
from. Every prompt is read by the text encoder once, before the first step, and the encoder is then let go: what remains
is one table of embeddings, shared by the expert and all of its students.

    python -m ddil_agents.dagger --env sd15 --env.model ./stable-diffusion-v1-5 --env.prompts prompts.txt

Weights are read from safetensors alone, and no code is taken from a model's folder.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ddil_env.expert import Expert, NetworkDenoiser
from ddil_env.guidance import GUIDANCE_FEATURES, guidance_features, zero_projection
from ddil_env.mdp import Kernel
from ddil_env.schedule import LCM_SOLVER_STEPS, Kind, NoiseSchedule, Prediction, PredictionType, TimeGrid
from ddil_env.support import Unbounded

Dtype = Literal["float32", "float16", "bfloat16"]

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bicycle leaning against a white brick wall",
    "a bowl of fresh fruit on a wooden table",
    "two dogs playing on a sandy beach at sunset",
    "a steam train crossing a stone bridge in the mountains",
    "a bedroom with a blue blanket and a large window",
    "an old man reading a newspaper in a cafe",
    "a tabby cat asleep on a laptop keyboard",
    "a plate of pasta with tomatoes and basil",
    "a surfer riding a tall green wave",
    "a watercolour painting of a harbour full of boats",
    "a street market in the rain, people with umbrellas",
    "a giraffe standing beside an acacia tree",
    "a vase of yellow tulips, oil on canvas",
    "a snowy village at night under the northern lights",
    "a close-up portrait of a woman wearing a straw hat",
)

# The name of a component's weights; other files of its folder (half-precision variants, pickles) are never opened.
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/merges.txt",
    *(f"{name}/config.json" for name in WEIGHTS),
    *(f"{name}/{stem}.safetensors" for name, stem in WEIGHTS.items()),
    *(f"{name}/{stem}-*-of-*.safetensors" for name, stem in WEIGHTS.items()),
    *(f"{name}/{stem}.safetensors.index.json" for name, stem in WEIGHTS.items()),
]
KINDS: dict[str, Kind] = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


def locate(model: str, local_files_only: bool = False) -> Path:
    """The folder of a pipeline: `model` itself, or a hub id's snapshot, from the cache if it is there.

    The cache goes first, so that a rerun reads the same weights; an unreachable hub is given up after seconds.

    Raises:
        ValueError: neither a folder nor to be had from the cache or the hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    cure = "pass --env.model PATH to a folder that holds model_index.json"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):  # a hub id is owner/name
        raise ValueError(f"no Stable Diffusion weights: there is no folder {folder.absolute()}; {cure}, or a hub id such as owner/name")
    try:
        return Path(snapshot_download(model, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    cause: Exception | None = None
    if local_files_only or constants.HF_HUB_OFFLINE:
        hub = "the hub was not asked (" + ("local_files_only" if local_files_only else "HF_HUB_OFFLINE is set") + ")"
    else:
        try:
            model_info(model, timeout=3)  # one quick question first: the download itself would retry for minutes
            return Path(snapshot_download(model, allow_patterns=FILES))
        except Exception as error:  # of requests, httpx or httpx2, by the hub client's version
            cause, hub = error, f"the hub {constants.ENDPOINT} did not give it ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    raise ValueError(
        f"no Stable Diffusion weights: {model!r} is neither a folder ({folder.absolute()}) nor in the hub's cache "
        f"({constants.HF_HUB_CACHE}), and {hub}; {cure}, or run `hf download {model}` on a machine with a network"
    ) from cause


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is absent or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); a pipeline's folder is what diffusers' save_pretrained writes") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def check_weights(folder: Path, name: str) -> None:
    """Refuses a component whose weights are absent, pickled or cut short, from the safetensors headers alone.

    Raises:
        ValueError: so.
    """
    read_json(folder / name / "config.json")
    stem = WEIGHTS[name]
    paths = [*(folder / name).glob(f"{stem}.safetensors"), *(folder / name).glob(f"{stem}-*-of-*.safetensors")]
    if not paths:
        others = ", ".join(sorted(p.name for p in (folder / name).iterdir() if p.name != "config.json")) or "nothing"
        raise ValueError(
            f"no {stem}.safetensors in {folder / name} (there: {others}); only safetensors is read, since a pickle can run any code: "
            "fetch it again, or convert a pickle that you trust with diffusers' save_pretrained(safe_serialization=True)"
        )
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error


def check_pipeline(folder: Path) -> None:
    """Refuses a folder that is no complete StableDiffusionPipeline, before anything is loaded.

    Raises:
        ValueError: no or another model_index.json, or a component that `check_weights` refuses.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"no model_index.json in {folder.absolute()}: pass the pipeline's own folder, as diffusers' save_pretrained writes it"
        )
    found = read_json(folder / "model_index.json").get("_class_name")
    if found != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {found}; this expert reads a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x)")
    for name in WEIGHTS:
        check_weights(folder, name)


def load_component(component: Any, folder: Path, name: str, **dtype: torch.dtype) -> Any:
    """One model of a pipeline on the CPU, in evaluation mode and without gradient.

    Raises:
        ValueError: the weights do not fit the configuration, or hold NaN or infinite values.
    """
    try:
        model, info = component.from_pretrained(
            folder / name, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"cannot load {folder / name} as {component.__name__} ({error}); fetch it again") from error
    if info["missing_keys"]:  # diffusers would fill them with random numbers and go on
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{folder / name} lacks {len(missing)} of {component.__name__}'s tensors, the first is {missing[0]!r}; fetch it again"
        )
    for tensor_name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder / name} holds non-finite values in {tensor_name!r}; fetch it again")
    return model.eval().requires_grad_(False)


def read_noise(folder: Path) -> dict[str, Any]:
    """What a pipeline's scheduler says about the noise that its network was trained on, in diffusers' names.

    Raises:
        ValueError: an unknown scheduler, or noise that `NoiseSchedule` does not describe.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    class_name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, class_name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"{path} names the scheduler {class_name!r}, which diffusers {diffusers.__version__} does not have")
    supported: dict[str, tuple[Any, ...]] = {
        "beta_schedule": tuple(KINDS),
        "prediction_type": tuple(PREDICTION_TYPES),
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False, None),
    }
    defaults = {name: parameter.default for name, parameter in inspect.signature(scheduler_class).parameters.items()}
    config = {**dict.fromkeys(supported), "prediction_type": "epsilon", **defaults, **config}
    for key, values in supported.items():
        if config[key] not in values:
            raise ValueError(f"{path}: {class_name} with {key}={config[key]!r} is not supported; supported: {', '.join(map(str, values))}")
    return {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")}


def read_prompts(prompts: str | list[str] | None) -> tuple[str, ...]:
    """The prompts: a list, the lines of a text file (empty ones left out), COCO's captions, or the built-in ones.

    Of a COCO captions file (.json), one caption an image, the one of lowest id, in the order of image ids.

    Raises:
        ValueError: an unreadable file, or no prompt.
    """
    if prompts is None:
        return PROMPTS
    source = "the list of prompts"
    if isinstance(prompts, str):
        source = f"the prompts file {Path(prompts).expanduser().absolute()}"
        try:
            text = Path(prompts).expanduser().read_text(encoding="utf-8")
            prompts = coco_captions(text) if prompts.endswith(".json") else text.splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {source} ({error}); it must be a UTF-8 text file with one prompt a line") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{source} is no COCO captions file ({error!r}); it holds annotations with image_id, id and caption"
            ) from error
    kept = tuple(line.strip() for line in prompts if line.strip())
    if not kept:
        raise ValueError(f"{source} holds no prompt; give one a line, or leave prompts out to use the {len(PROMPTS)} built-in ones")
    return kept


def coco_captions(text: str) -> list[str]:
    """The first caption of each image of a COCO captions file."""
    first: dict[int, str] = {}
    for annotation in sorted(json.loads(text)["annotations"], key=lambda a: (a["image_id"], a["id"])):
        first.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
    return list(first.values())


def embed_prompts(folder: Path, prompts: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Text embeddings in the prompts' order, (n, tokens, channels): 77 × 768 numbers a prompt for Stable Diffusion 1.x.

    The encoder runs in float32, which costs nothing: it runs once.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # transformers' tokenizers raise whatever their parsers do
        raise ValueError(f"cannot load {folder / 'tokenizer'} as CLIPTokenizer ({error}); fetch it again") from error
    encoder = load_component(CLIPTextModel, folder, "text_encoder").float().to(device)
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    cut = [prompt for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True) if len(ids) > length]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(prompts)} prompts are cut to the {length} tokens that CLIP reads; the first: {cut[0]!r}", stacklevel=3
        )
    table = []
    for start in range(0, len(prompts), 64):
        batch = list(prompts[start : start + 64])
        tokens = tokenizer(batch, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        table.append(encoder(tokens.input_ids.to(device))[0].to(dtype))
    return torch.cat(table)


class PromptedUNet(nn.Module):
    """A UNet that is given the ids of prompts: (x_t, t, c) → unet(x_t, t, table[c]), and w if it has a guidance embedding.

    Copies share the table (118 kB a prompt for Stable Diffusion 1.x in half precision), and it is in no state_dict.

    Args:
        unet: Computes in its own dtype.
        table: Text embeddings, (prompts + 1, tokens, channels); the last is the empty prompt, and stands in where c is None.
    """

    def __init__(self, unet: UNet2DConditionModel, table: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptedUNet:
        twin = PromptedUNet(copy.deepcopy(self.unet, memo), self.table)
        twin.training = self.training
        return twin

    def embed_guidance(self) -> None:
        """Lets the network be told w, by diffusers' own `time_cond_proj_dim`: its pipelines then embed guidance_scale − 1."""
        time_embedding = self.unet.time_embedding
        time_embedding.cond_proj = zero_projection(time_embedding.linear_1.in_features).to(time_embedding.linear_1.weight.device)
        self.unet.register_to_config(time_cond_proj_dim=GUIDANCE_FEATURES)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        text = self.table[-1:].expand(len(x_t), -1, -1) if c is None else self.table[c]  # (b, tokens, channels)
        dtype = self.unet.conv_in.weight.dtype  # `unet.dtype` walks every parameter: 0.4 ms a time on a small UNet
        h = None if w is None else guidance_features(w).to(dtype)  # (b, 256)
        output: Tensor = self.unet(x_t.to(dtype), t, encoder_hidden_states=text.to(dtype), timestep_cond=h).sample
        return output


class StableDiffusion(Expert):
    """A Stable Diffusion 1.x or 2.x teacher.

    The support is unbounded: latents have no bound that is known without data (pixels would have ±1).

    Args:
        model: A folder that holds model_index.json, or a hub id.
        prompts: A list, a text file with one prompt a line, or COCO's captions (.json); default: 16 built-in ones. All
            embeddings stay on the device.
        guidance_scale: Classifier-free guidance in diffusers' convention, 1 is none.
        dtype: Of the UNet and the VAE. x̂_0 and ε̂ are float32 in any case: at t = 999 an error in ε̂ is 14.6 × in x̂_0.
        height, width: Of the pictures, in pixels; default: what the UNet was trained on.
        max_batch: Samples put through the UNet at once (a guided pair counts as one) when states are labelled or sampled.
        local_files_only: Never ask the hub.
        device: Where it computes.

    Raises:
        ValueError: no weights to be had, weights that are damaged, pickled or of another pipeline, an unsupported noise
            schedule, unreadable prompts, a size that the VAE does not divide, an absent device.
    """

    extractor = "latent_pool8"

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
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"unknown dtype {dtype!r}; choose one of: {', '.join(get_args(Dtype))}")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: need at least 1")
        self.max_batch = max_batch
        self.prompts = read_prompts(prompts)
        self.folder = locate(model, local_files_only)
        check_pipeline(self.folder)
        self.noise = read_noise(self.folder)
        self.prediction_type = PREDICTION_TYPES[self.noise["prediction_type"]]
        unet_config, vae_config = (read_json(self.folder / name / "config.json") for name in ("unet", "vae"))
        channels = vae_config.get("latent_channels", 4)
        for key, expected in {"in_channels": channels, "out_channels": channels, "time_cond_proj_dim": None}.items():
            found = unet_config.get(key, expected)
            if found != expected:
                raise ValueError(
                    f"{self.folder / 'unet'} has {key}={found}, but a text-to-image UNet over this VAE has {expected}: "
                    "inpainting, upscaling and guidance-distilled networks are not supported"
                )
        self.vae_scale = 2 ** (len(vae_config.get("block_out_channels", [0])) - 1)
        trained = unet_config.get("sample_size") or 64
        trained_height, trained_width = (trained, trained) if isinstance(trained, int) else trained
        height = trained_height * self.vae_scale if height is None else height
        width = trained_width * self.vae_scale if width is None else width
        if height % self.vae_scale or width % self.vae_scale or min(height, width) < 1:
            raise ValueError(f"height={height}, width={width}: both must be positive multiples of {self.vae_scale}, the VAE's stride")
        super().__init__(
            NoiseSchedule(
                KINDS[self.noise["beta_schedule"]], self.noise["beta_start"], self.noise["beta_end"], self.noise["num_train_timesteps"]
            ),
            (channels, height // self.vae_scale, width // self.vae_scale),
            num_conditions=len(self.prompts),
            null_condition=len(self.prompts),
            guidance_scale=guidance_scale,
            support=Unbounded(),
            device=device,
        )
        self.dtype: torch.dtype = getattr(torch, dtype)
        table = embed_prompts(self.folder, (*self.prompts, ""), self.dtype, self.device)
        unet = load_component(UNet2DConditionModel, self.folder, "unet", torch_dtype=self.dtype).to(self.device)
        self.network = PromptedUNet(unet, table).eval()

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        return self.schedule.prediction(self.network(x_t, t, c), x_t, t, self.prediction_type)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """Loaded at the first picture: training on latents never needs it."""
        return load_component(AutoencoderKL, self.folder, "vae", torch_dtype=self.dtype).to(self.device)

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Pictures → latents (b, *sample_shape) float32: the VAE's mean, (mean − shift) × scaling_factor.

        Args:
            samples: uint8 (b, height, width, 3), or floats in [−1, 1], (b, 3, height, width).

        Raises:
            ValueError: another shape.
        """
        height, width = (side * self.vae_scale for side in self.sample_shape[1:])
        expected = (height, width, 3) if samples.dtype == torch.uint8 else (3, height, width)
        if tuple(samples.shape[1:]) != expected:
            raise ValueError(f"{samples.dtype} pictures of shape {tuple(samples.shape)}: need (b, {', '.join(map(str, expected))})")
        if samples.dtype == torch.uint8:
            samples = samples.permute(0, 3, 1, 2) / 127.5 - 1  # (b, h, w, 3) → (b, 3, h, w)
        config = self.vae.config
        # Eight at a time: the VAE's activations have the picture's size, 64 × the latent's.
        means = [self.vae.encode(chunk.to(self.device, self.dtype)).latent_dist.mean.float() for chunk in samples.split(8)]
        return (torch.cat(means) - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def captions(self, c: Tensor) -> list[str]:
        return [self.prompts[i] for i in c.tolist()]

    def decode(self, x_0: Tensor) -> Tensor:
        config = self.vae.config
        latents = (x_0 / config.scaling_factor + (config.shift_factor or 0.0)).to(self.device, self.dtype)
        pictures = torch.cat([self.vae.decode(chunk).sample.float() for chunk in latents.split(8)])  # (b, 3, h, w)
        return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def _student(
        self, network: PromptedUNet, prediction_type: PredictionType, gradient_checkpointing: bool, guidance_embedding: bool
    ) -> NetworkDenoiser:
        network.unet.float()  # master weights; mixed precision is the trainer's
        if gradient_checkpointing:
            network.unet.enable_gradient_checkpointing()
        network.unet.requires_grad_(True)
        return NetworkDenoiser(network.train(), self.schedule, prediction_type, guidance_embedding)

    def make_student(
        self,
        *,
        gradient_checkpointing: bool = False,
        prediction_type: PredictionType | None = None,
        guidance_embedding: bool = False,
    ) -> NetworkDenoiser:
        """A UNet in float32 that starts from the teacher's weights, and reads the teacher's table of prompts.

        Args:
            gradient_checkpointing: Recompute activations in the backward pass: less memory, one more forward.
            prediction_type: What its output means; another than the teacher's takes a stage of conversion. Default: the teacher's.
            guidance_embedding: Whether it is told the guidance scale.

        Raises:
            ValueError: a prediction type that the schedule does not hold for.
        """
        kind = prediction_type or self.prediction_type
        self.schedule.check_prediction_type(kind)
        network = copy.deepcopy(self.network)
        if guidance_embedding:
            network.embed_guidance()
        return self._student(network, kind, gradient_checkpointing, guidance_embedding)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The UNet's middle, (b, channels, h, w)."""
        if not isinstance(student.network, PromptedUNet):
            raise ValueError(
                f"cannot take features of a {type(student.network).__name__}; a student of {type(self).__name__} is a PromptedUNet"
            )
        mid_block: nn.Module = student.network.unet.mid_block
        return mid_block

    def save_student(self, student: NetworkDenoiser, directory: Path, num_steps: int, grid: str = "linspace", kernel: str = "ddim") -> None:
        """Writes a pipeline that `DiffusionPipeline.from_pretrained` loads and that samples as this library does.

        Its scheduler depends on the kernel (the tests compare its samples to this library's, to 1e-4):

        `ddim`     first-order DPM-Solver++ ending at σ = 0, which is DDIM; diffusers' DDIMScheduler does not take these times.
        `renoise`  LCMScheduler, whose c_skip x_t + c_out x̂_0 is x̂_0 but for c_skip = 0.25/(0.25 + (10 t)²), 7e-6 at t = 19.

        The number of steps and the guidance are arguments of a pipeline's call, which README.md beside it gives.

        Raises:
            ValueError: the student is not one of this expert's, an impossible grid, or an unknown kernel.
        """
        if not isinstance(student.network, PromptedUNet):
            raise ValueError(
                f"cannot save a {type(student.network).__name__} as a pipeline; a student of {type(self).__name__} is a PromptedUNet"
            )
        if kernel not in get_args(Kernel):
            raise ValueError(f"unknown kernel {kernel!r}; choose one of: {', '.join(get_args(Kernel))}")
        times = TimeGrid(self.schedule, num_steps, grid).times[:-1].long().tolist()  # type: ignore[arg-type]  # checked there
        names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
        options: dict[str, Any] = {**self.noise, "prediction_type": names[student.prediction_type]}
        options["steps_offset"] = 1  # unused by these two; another value makes the pipeline warn
        if kernel == "renoise":
            solver_steps = min(max(LCM_SOLVER_STEPS, num_steps), self.schedule.num_train_steps)
            scheduler = LCMScheduler(**options, original_inference_steps=solver_steps)
        else:
            scheduler = DPMSolverMultistepScheduler(
                **options,
                solver_order=1,
                algorithm_type="dpmsolver++",
                final_sigmas_type="zero",
                timestep_spacing="linspace" if grid == "linspace" else "trailing",
            )
        scheduler.set_timesteps(num_steps)
        steps = f"num_inference_steps={num_steps}" if scheduler.timesteps.tolist() == times else f"timesteps={times}"
        StableDiffusionPipeline(
            vae=load_component(AutoencoderKL, self.folder, "vae"),
            text_encoder=load_component(CLIPTextModel, self.folder, "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True),
            unet=student.network.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(directory, safe_serialization=True)
        card = CARD.format(
            num_steps=num_steps,
            steps=steps,
            guidance_scale=float(self.guidance_scale) if student.guidance_embedding else 1.0,
            guidance=TOLD if student.guidance_embedding else LEARNED,
            noise=RENOISED if kernel == "renoise" else "",
        )
        (directory / "README.md").write_text(card, encoding="utf-8")

    def load_student(
        self,
        directory: Path,
        *,
        gradient_checkpointing: bool = False,
        prediction_type: PredictionType | None = None,
        guidance_embedding: bool = False,
    ) -> NetworkDenoiser:
        """Reads the UNet and the prediction type of what `save_student` wrote, with the options of `make_student`.

        Raises:
            ValueError: the folder is absent or damaged, its UNet does not take this expert's latents and prompts, or it was
                made with another prediction type or guidance embedding than is asked for.
        """
        check_weights(directory, "unet")
        saved_type = PREDICTION_TYPES[read_noise(directory)["prediction_type"]]
        if prediction_type not in (None, saved_type):
            raise ValueError(f"{directory} predicts {saved_type}; pass prediction_type={saved_type!r}, not {prediction_type!r}")
        features = read_json(directory / "unet" / "config.json").get("time_cond_proj_dim")
        if features != (GUIDANCE_FEATURES if guidance_embedding else None):
            raise ValueError(
                f"{directory / 'unet'} has time_cond_proj_dim={features}, which does not go with guidance_embedding={guidance_embedding}; "
                "pass the options that the student was made with"
            )
        unet = load_component(UNet2DConditionModel, directory, "unet").to(self.device)
        for key in ("in_channels", "out_channels", "cross_attention_dim"):
            theirs, ours = unet.config[key], self.network.unet.config[key]
            if theirs != ours:
                raise ValueError(f"{directory / 'unet'} has {key}={theirs}, this expert {ours}: it is the student of another model")
        return self._student(PromptedUNet(unet, self.network.table), saved_type, gradient_checkpointing, guidance_embedding)


CARD = """A {num_steps}-step student of a diffusion model, trained by imitation of its teacher with ddil_agents.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("student", use_safetensors=True)
    pipe("a prompt", {steps}, guidance_scale={guidance_scale})

{guidance}{noise}"""

LEARNED = """`guidance_scale=1.0` runs the network once a step; it is right for a student of a guided teacher, which has learned the
guidance. A student of an unguided teacher can be guided like any pipeline.
"""

TOLD = """The network is told `guidance_scale`: any of the range that it was trained on, 1.0 for no guidance. It runs once a step
whatever the scale.
"""

RENOISED = """
Every step but the last draws fresh noise; for the same picture again, pass `generator=torch.Generator().manual_seed(0)`.
Where `timesteps` are given, the scheduler may warn that they are not its own: they are the student's.
"""
