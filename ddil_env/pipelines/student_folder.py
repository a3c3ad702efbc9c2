"""A student as a pipeline's folder: written so that diffusers loads it, and read back."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from ddil_env.adapters import LORA_FILE, LoRA, adapter_layers, load_adapters, merge_adapters, save_adapters
from ddil_env.denoiser import NetworkDenoiser
from ddil_env.guidance import GuidanceConditioning
from ddil_env.pipelines.find import read_json
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.model_card import model_card
from ddil_env.pipelines.networks import PipelineNetwork
from ddil_env.prediction import PredictionType

if TYPE_CHECKING:
    from ddil_env.pipelines.expert import PipelineExpert

SAMPLING = "sampling.json"  # how a student samples: the arguments of its pipeline's call, and what they come from


def write_student(
    expert: PipelineExpert,
    student: NetworkDenoiser,
    directory: Path,
    num_steps: int,
    grid: str,
    kernel: str,
    guidance: GuidanceConditioning | None,
) -> None:
    """Writes the pipeline, the adapters if the student has any, how it is called, and the model card; errors as in `save_student`.

    Args:
        expert: Gives the pipeline and its other components.
        student: One of its students.
        directory: An existing folder.
        num_steps, grid, kernel, guidance: How the student samples, as in `Expert.save_student`.
    """
    network = expert.network_of(student, "save a {} as a pipeline")
    sampler = expert.sampler(student.prediction_type, num_steps, grid, kernel)
    files = expert.files
    components = {expert.denoiser: _merged(expert, student).core, "scheduler": sampler.scheduler}
    components |= {name: files.load(name) for name in files.models if name != expert.denoiser}
    components |= {name: files.tokenizer(name) for name in files.tokenizers} | dict.fromkeys(files.absent)
    pipeline = files.pipeline(**components, **expert.pipeline_options())
    pipeline.save_pretrained(directory, safe_serialization=True)
    _write_size(expert, directory / expert.denoiser / "config.json")
    if adapter_layers(network.core):
        save_adapters(network.core, directory / LORA_FILE, expert.denoiser)
    call = sampler.arguments | _call(expert, student, guidance)
    sampling = {"call": call, "num_steps": num_steps, "grid": grid, "kernel": kernel, "dtype": "float32"}
    sampling |= {} if guidance is None else {"guidance_range": [guidance.low, guidance.high]}
    (directory / SAMPLING).write_text(json.dumps(sampling, indent=1), encoding="utf-8")
    (directory / "README.md").write_text(model_card(expert, student, num_steps, call, kernel, guidance), encoding="utf-8")


def _write_size(expert: PipelineExpert, path: Path) -> None:
    """Makes a UNet's configuration name the size of the student's pictures, which its pipeline draws by default."""
    if expert.picture_size == expert.own_picture_size() or not isinstance(expert.network.core, UNet2DConditionModel):
        return  # transformers build their embedding of positions from their size
    height, width = expert.sample_shape[-2:]
    if height == width or expert.files.pipeline is StableDiffusionPipeline:  # SDXL's knows squares alone; its call names the size
        config = {**read_json(path), "sample_size": height if height == width else [height, width]}
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _call(expert: PipelineExpert, student: NetworkDenoiser, guidance: GuidanceConditioning | None) -> dict[str, Any]:
    """The arguments of the pipeline's call beside its times and its subject, as far as they are not what the pipeline does by itself."""
    takes, call = inspect.signature(expert.files.pipeline.__call__).parameters, {}
    if "guidance_scale" in takes:
        scale = guidance.evaluated_at if guidance is not None else expert.guidance_scale
        call["guidance_scale"] = float(scale) if student.guidance_embedding else 1.0
    if "height" in takes and expert.picture_size != expert.own_picture_size():
        call["height"], call["width"] = expert.picture_size
    return call


def read_student(
    expert: PipelineExpert,
    directory: Path,
    *,
    gradient_checkpointing: bool,
    prediction_type: PredictionType | None,
    guidance_embedding: bool,
    lora: LoRA | None,
) -> NetworkDenoiser:
    """Reads the network and the prediction type that `write_student` wrote; arguments and errors as in `PipelineExpert.load_student`."""
    follows = {expert.denoiser: (*expert.files.follows.get(expert.denoiser, ()), "time_cond_proj_dim")}  # which is checked below
    models = {expert.denoiser: expert.files.models[expert.denoiser]}
    saved = PipelineFolder(directory, expert.files.pipeline, models, follows=follows)
    saved_type = expert.noise_kind.read(saved).prediction_type
    if prediction_type not in (None, saved_type):
        raise ValueError(f"{directory} predicts {saved_type}; pass prediction_type={saved_type!r}, not {prediction_type!r}")
    saved_embedding = expert.network.has_guidance_embedding(saved.config(expert.denoiser))
    if saved_embedding != guidance_embedding:
        raise ValueError(
            f"{directory / expert.denoiser} was made with guidance_embedding={saved_embedding}, not {guidance_embedding}; "
            "pass the options that the student was made with"
        )
    core = saved.load(expert.denoiser).to(expert.device)
    for key in expert.network.interface:
        found, own = core.config[key], expert.network.core.config[key]
        if found != own:
            raise ValueError(
                f"{directory / expert.denoiser} has {key}={found}, this expert {own}: it is the student of another model; "
                "pass the model that it was made with"
            )
    if lora is None:
        return expert.as_student(expert.wrap(core), saved_type, gradient_checkpointing, guidance_embedding)
    student = expert.make_student(
        gradient_checkpointing=gradient_checkpointing, prediction_type=saved_type, guidance_embedding=guidance_embedding, lora=lora
    )
    load_adapters(expert.network_of(student, "load adapters into a {}").core, directory / LORA_FILE, expert.denoiser)
    merged = _merged(expert, student).core.state_dict()
    for name, weight in core.named_parameters():
        if (weight - merged[name]).norm() > 0.01 * weight.norm():  # a teacher in half precision differs by .002 from one in float32
            raise ValueError(
                f"{directory} differs from this teacher with its adapters in {name!r}: they were trained over other weights; "
                "pass the model that they were made with, or leave lora out to read the student whole"
            )
    return student


def _merged(expert: PipelineExpert, student: NetworkDenoiser) -> PipelineNetwork:
    """The student's network without adapters: itself if it has none, else a float32 network of the same weights."""
    network = expert.network_of(student, "save a {} as a pipeline")
    if not adapter_layers(network):
        return network
    plain = expert.make_student(prediction_type=student.prediction_type, guidance_embedding=student.guidance_embedding)
    merge_adapters(network, plain.network)
    return expert.network_of(plain, "merge adapters into a {}")
