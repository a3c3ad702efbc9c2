"""What a pipeline's folder says is followed as diffusers' own pipeline follows it, or refused by name."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import assert_same_samples
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import write_tiny_ddpm, write_tiny_sd3, write_tiny_sdxl
from tiny_sd import WORDS, write_tiny_sd

from ddil_agents import dagger
from ddil_agents.training.checkpoint import check_same_expert
from ddil_env import ExpertPolicy, TimeGrid, check_expert, unroll
from ddil_env.experts.ddpm import DDPM
from ddil_env.experts.digits import Digits
from ddil_env.experts.stable_diffusion import StableDiffusion
from ddil_env.experts.stable_diffusion_3 import StableDiffusion3
from ddil_env.experts.stable_diffusion_xl import StableDiffusionXL
from ddil_env.pipelines import find
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.supported_config import ARCHITECTURE, check_supported

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sd": (write_tiny_sd, StableDiffusion, {"prompts": WORDS}),
    "sdxl": (write_tiny_sdxl, StableDiffusionXL, {"prompts": WORDS}),
    "sd3": (write_tiny_sd3, StableDiffusion3, {"prompts": WORDS}),
    "ddpm": (write_tiny_ddpm, DDPM, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, (write, _, _) in FAMILIES.items()}


def edited(folder: Path, to: Path, file: str, **entries: Any) -> Path:
    """A copy whose JSON file has other entries."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return to


def opened(family: str, folder: Path, **options: Any) -> Any:
    _, expert, texts = FAMILIES[family]
    return expert(str(folder), **texts, **options)


# Whatever is said is followed or refused


@pytest.mark.parametrize(("name", "entries"), ARCHITECTURE.items())
def test_every_entry_is_on_a_list_or_refused_by_name(name: str, entries: set[str], tmp_path: Path) -> None:
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls).parameters
    assert entries <= parameters.keys()
    for key in parameters.keys() - entries:
        check_supported(tmp_path, {"_class_name": name, key: parameters[key].default}, cls, ())
        check_supported(tmp_path, {"_class_name": name, key: "strange"}, cls, [key])
        with pytest.raises(ValueError, match=f"has {key}='strange', which this expert does not support"):
            check_supported(tmp_path, {"_class_name": name, key: "strange"}, cls, ())
    with pytest.raises(ValueError, match=r"has of_tomorrow=1\.0, which the \w+ of diffusers .* does not know; update diffusers"):
        check_supported(tmp_path, {"of_tomorrow": 1.0}, cls, ())


@pytest.mark.parametrize(
    ("family", "file", "entries", "message"),
    [
        ("sd", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep', which this expert does not support"),
        ("sd", "unet/config.json", {"num_class_embeds": 10}, "num_class_embeds=10, which this expert does not support"),
        ("sd", "unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ("sd", "unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
        ("sd", "unet/config.json", {"attention_type": "gated"}, "attention_type='gated'"),
        ("sd", "unet/config.json", {"quantization_config": {"load_in_4bit": True}}, "quantization_config=.*does not know"),
        ("sd", "unet/config.json", {"cross_attention_dim": 24}, "cross_attention_dim=24, but a UNet over this text encoder has 16"),
        ("sd", "vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1, which this expert does not support"),
        ("sd", "vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean=.*, which this expert does not support"),
        ("sd", "vae/config.json", {"scaling_factor": None}, "has scaling_factor=None: need a number"),
        ("sd3", "scheduler/scheduler_config.json", {"shift": None}, "scheduler_config.json: .*; see that its entries are the model's"),
        ("sd", "text_encoder/config.json", {"hidden_size": "x"}, "as a text encoder's|this text encoder has x"),  # by transformers' version
        ("sd", "vae/config.json", {"in_channels": 4}, "in_channels=4, which this expert does not support"),
        ("sd", "text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask=True, which is not supported"),
        ("sd", "model_index.json", {"strength": 0.5}, "strength=0.5, which this expert does not support"),
        ("sdxl", "unet/config.json", {"addition_time_embed_dim": 16}, "projection_class_embeddings_input_dim=60, but a UNet over these"),
        ("sdxl", "unet/config.json", {"cross_attention_dim": 16}, "cross_attention_dim=16, but a UNet over these text encoders has 40"),
        ("sdxl", "vae/config.json", {"latents_std": [1.0] * 4}, "latents_mean and latents_std of 4 numbers each, or neither"),
        ("sd3", "transformer/config.json", {"pooled_projection_dim": 24}, "pooled_projection_dim=24, but a transformer over these"),
        ("sd", "scheduler/scheduler_config.json", {"predict_epsilon": False}, "predict_epsilon=False is not supported"),
        ("sd", "scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}, "snr_shift_scale=3.0 is not supported; supported: None"),
        (
            "sd",
            "scheduler/scheduler_config.json",
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type='continuous' is not supported; supported: 'discrete'",
        ),
        (
            "sd",
            "scheduler/scheduler_config.json",
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas=True is not supported; supported: False",
        ),
    ],
)
def test_what_is_not_followed_is_refused_by_name(
    family: str, file: str, entries: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(family, edited(folders[family], tmp_path / "model", file, **entries))


def test_a_long_value_is_cut_short_in_the_message(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders["sd"], tmp_path / "betas", "scheduler/scheduler_config.json", trained_betas=[0.1] * 1000)
    with pytest.raises(ValueError, match=r"trained_betas=\[0.1, .*\.\.\.\] is not supported") as error:
        opened("sd", folder)
    assert len(str(error.value)) < 300


def test_what_only_the_sampler_reads_is_let_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    sampler = {"use_karras_sigmas": True, "timestep_spacing": "trailing", "clip_sample": False, "solver_order": 3, "trained_betas": None}
    opened("sd", edited(folders["sd"], tmp_path / "model", "scheduler/scheduler_config.json", **sampler))


def test_two_files_that_name_two_schedulers_of_other_noise_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    euler = edited(folders["sd"], tmp_path / "same", "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert opened("sd", euler).fingerprint() == opened("sd", folders["sd"]).fingerprint()  # two classes that read it alike
    path = euler / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "beta_start"} | {"_class_name": "LCMScheduler"})
    )
    with pytest.raises(
        ValueError, match=r"is of a LCMScheduler and model_index.json names a EulerDiscreteScheduler, which reads it as other"
    ):
        opened("sd", euler)


def test_a_component_of_another_class_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "tiny"))
    shutil.rmtree(folder / "vae")
    AutoencoderTiny(
        encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,), num_decoder_blocks=(1,)
    ).save_pretrained(folder / "vae")
    with pytest.raises(
        ValueError, match=r"vae/config.json is of a AutoencoderTiny; this expert reads a AutoencoderKL there; pass a pipeline"
    ):
        opened("sd", folder)


def test_diffusers_goes_by_the_index_and_so_does_an_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = {"text_encoder": ["transformers", "T5EncoderModel"]}
    with pytest.raises(ValueError, match=r"model_index.json has a T5EncoderModel as text_encoder; this expert reads a CLIPTextModel there"):
        opened("sd", edited(folders["sd"], tmp_path / "t5", "model_index.json", **encoder))


def test_tensors_without_a_place_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["sd"], tmp_path / "more")) / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "ip_adapter.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"holds 1 tensors that a UNet2DConditionModel .* has no place for, the first is 'ip_adapter.weight'"
    ):
        opened("sd", path.parents[1])


# What is followed is what the pipeline does


def test_the_latents_mean_and_deviation_of_sdxls_vae_are_followed(folders: dict[str, Path], tmp_path: Path) -> None:
    statistics = {"latents_mean": [-1.6, 2.1, 0.3, -0.4], "latents_std": [8.4, 5.9, 0.5, 2.7], "scaling_factor": 0.5}
    folder = edited(folders["sdxl"], tmp_path / "playground", "vae/config.json", **statistics)
    expert, plain = opened("sdxl", folder), opened("sdxl", folders["sdxl"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    latents, decode = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), pipeline.vae.decode
    pipeline.vae.decode = lambda x, *args, **kwargs: decode(given.append(x) or x, *args, **kwargs)
    given: list[torch.Tensor] = []
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.step = lambda *args, **kwargs: (latents[:1],)  # whatever it samples, these come out
    (picture,) = pipeline("a red bee", num_inference_steps=1, output_type="np").images
    assert (expert.decode(latents[:1])[0].int() - torch.from_numpy((picture * 255).round()).int()).abs().max() <= 1
    mean, std = (torch.tensor(statistics[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(given[0], latents[:1] * std / 0.5 + mean)
    pictures = plain.decode(latents)
    torch.testing.assert_close(expert.encode(pictures), (plain.encode(pictures) / 0.13025 - mean) * 0.5 / std)
    assert expert.fingerprint() != plain.fingerprint()
    expert.save_student(expert.make_student(), tmp_path / "student", 1)
    assert json.loads((tmp_path / "student" / "vae" / "config.json").read_text())["latents_std"] == statistics["latents_std"]


def test_a_textual_inversion_of_several_vectors_is_all_of_them(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd"])
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    pipeline.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    pipeline.save_pretrained(tmp_path)
    expert = StableDiffusion(str(tmp_path), ["a <toy>", "two seas"])
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    theirs = pipeline(["a <toy>", "two seas"], latents=x_T, num_inference_steps=2, guidance_scale=7.5, output_type="latent").images
    assert_same_samples(unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, 2), x_T, torch.arange(2))[:, -1], theirs)


# Pictures that are none


def overflowing(folder: Path, to: Path, **entries: Any) -> Path:
    """A VAE whose activations do not fit float16."""
    path = edited(folder, to, "vae/config.json", **entries) / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(
        {k: 1e5 * v if k in ("decoder.conv_in.weight", "encoder.conv_out.weight") else v for k, v in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )
    return to


def test_a_vae_that_overflows_stops_with_the_cure(folders: dict[str, Path], tmp_path: Path) -> None:
    expert = opened("sd", overflowing(folders["sd"], tmp_path / "fp16", force_upcast=False), dtype="float16")
    x_0, cure = torch.randn(2, 4, 8, 8), r"overflows in float16: pass --env.dtype float32, or write \"force_upcast\": true"
    with pytest.raises(ValueError, match=rf"NaN or infinite pictures for 2 of 2 latents; it {cure}"):
        expert.decode(x_0)
    with pytest.raises(ValueError, match=rf"NaN or infinite latents for 1 of 1 pictures; it {cure}"):
        expert.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"decode raised ValueError: .*{cure}"):
        check_expert(expert)
    for entries in ({"force_upcast": True}, {}):  # diffusers' default is true
        again = opened("sd", overflowing(folders["sd"], tmp_path / f"{len(entries)}", **entries), dtype="float16")
        assert again.decode(x_0).shape == (2, 16, 16, 3)


def test_latents_that_are_not_finite_are_no_black_picture(folders: dict[str, Path]) -> None:
    for expert in (opened("sd", folders["sd"]), opened("ddpm", folders["ddpm"]), Digits("digits8")):
        x_0 = torch.zeros(3, *expert.sample_shape)
        x_0[1, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"non-finite values \(NaN or infinite\) in 1 of 3 samples"):
            expert.decode(x_0)


# How people keep their models


def with_variant(folder: Path, to: Path, only: str | None = None) -> Path:
    """A copy whose weights, or those of one component, are called fp16."""
    shutil.copytree(folder, to)
    for path in sorted(to.rglob("*.safetensors")):
        if only in (None, path.parent.name):
            path.rename(path.with_suffix(".fp16.safetensors"))
    return to


def test_a_variant_is_asked_for_and_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_variant(folders["sd"], tmp_path / "fp16")
    with pytest.raises(
        ValueError, match=r"no diffusion_pytorch_model.safetensors in .*unet, but weights of the variant fp16; pass --env.variant fp16"
    ):
        opened("sd", folder)
    expert, plain = opened("sd", folder, variant="fp16"), opened("sd", folders["sd"])
    x_t, t, c = torch.randn(3, 4, 8, 8), torch.full((3,), 500.0), torch.arange(3)
    assert torch.equal(expert.predict(x_t, t, c).x_0, plain.predict(x_t, t, c).x_0)
    assert torch.equal(expert.decode(x_t), plain.decode(x_t))
    mixed = opened("sd", with_variant(folders["sd"], tmp_path / "mixed", only="unet"), variant="fp16")
    assert torch.equal(mixed.predict(x_t, t, c).x_0, plain.predict(x_t, t, c).x_0)
    with pytest.raises(ValueError, match=r"variant='bf16': no component of .* has weights of that name; leave variant out"):
        opened("sd", folders["sd"], variant="bf16")


def test_a_hubs_cache_that_lacks_files_is_not_taken_for_whole(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--nobody--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folders["sd"], snapshot)
    (tmp_path / "models--nobody--tiny" / "refs").mkdir()
    (tmp_path / "models--nobody--tiny" / "refs" / "main").write_text("0" * 40)
    weights = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    kept = weights.rename(tmp_path / "kept")
    lacking = r"'nobody/tiny' is in the hub's cache without vae/diffusion_pytorch_model.safetensors .*hf download nobody/tiny"
    with pytest.raises(ValueError, match=lacking):
        StableDiffusion("nobody/tiny", WORDS, local_files_only=True)

    def fetched(model: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if not local_files_only:
            shutil.copy(kept, weights)
        return str(snapshot)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(find, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(find, "snapshot_download", fetched)
    assert StableDiffusion("nobody/tiny", WORDS).folder == snapshot


def test_a_shard_of_weights_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "sharded"))
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(folder / "unet", max_shard_size="50KB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    opened("sd", folder)
    first = min((folder / "unet").glob("*-of-*.safetensors"))
    first.unlink()
    with pytest.raises(ValueError, match=re.escape(f"unet lacks unet/{first.name}; fetch it again")):
        opened("sd", folder)


def with_lora(folder: Path, to: Path, fused: bool) -> Path:
    """A file of LoRA weights for a pipeline's UNet, or the pipeline with them in its UNet, not fused."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    if fused:
        pipeline.unet.save_pretrained(to / "unet")
    else:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        StableDiffusionPipeline.save_lora_weights(to, unet_lora_layers=layers)
    return to


def test_adapters_are_no_model_and_the_message_makes_one_of_them(folders: dict[str, Path], tmp_path: Path) -> None:
    lora = with_lora(folders["sd"], tmp_path / "lora", fused=False)
    file = lora / "pytorch_lora_weights.safetensors"
    for path in (file, lora):
        with pytest.raises(ValueError, match=r"holds adapters \(LoRA\) and no model; fuse them into the model BASE") as error:
            opened("sd", path)
    (code,) = re.findall(r'python -c "(.*)"$', str(error.value))
    exec(code.replace("BASE", str(folders["sd"])), {})
    expert = opened("sd", lora / "pytorch_lora_weights-folder")
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd"])
    pipeline.load_lora_weights(file)
    x_t, t = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0)
    with torch.no_grad():
        theirs = pipeline.unet(x_t, t, expert.embeddings.tables["text"][:2]).sample
        assert (theirs - opened("sd", folders["sd"]).network(x_t, t, torch.arange(2))).abs().max() > 1e-3
        torch.testing.assert_close(expert.network(x_t, t, torch.arange(2)), theirs, atol=1e-5, rtol=1e-4)


def test_adapters_that_are_not_fused_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_lora(folders["sd"], Path(shutil.copytree(folders["sd"], tmp_path / "unfused")), fused=True)
    with pytest.raises(
        ValueError, match=r"holds adapters that are not fused, such as .*pipe.fuse_lora\(\) and pipe.unload_lora_weights\(\)"
    ):
        opened("sd", folder)


def test_a_model_of_one_file_is_met_with_the_command_that_converts_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(1)}, file)
    command = r"P.from_single_file\('.*model.safetensors'\).save_pretrained\('.*model-folder'\)\"$"
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=rf"is a model of one file, convert it into a folder, .*prediction_type.*{command}"):
            opened("sd", path)
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"old.ckpt is a model of one file, which is a pickle and can run any code"):
        opened("sd", tmp_path / "old.ckpt")


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_a_device_that_is_not_there_takes_one_line(device: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' is not to be had: .*Available here: cpu") as error:
        opened("sd", folders["sd"], device=device)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_run_goes_on_with_its_model_in_another_place(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = Path(shutil.copytree(folders["ddpm"], tmp_path / "model")), str(tmp_path / "run")
    sizes = (
        "--num_updates 1 --num_steps 2 --teacher_steps 2 --batch_size 2 --collect_size 2 --beta.forward 0 --beta.teacher 1 --beta.student 0"
    )
    judged = "--mixed_precision no --evaluate.n 10 --evaluate.n_paths 2 --evaluate.n_action 2"
    dagger.main(["--env", "ddpm", "--env.model", str(model), *sizes.split(), *judged.split(), "--out", run])
    model.rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        dagger.main(["--resume", run])
    assert f"there is no folder {model}; pass --env.model PATH" in capsys.readouterr().err
    dagger.main(["--resume", run, "--env.model", str(tmp_path / "moved")])


def test_a_run_goes_on_with_its_prompts_in_another_place_and_with_no_others(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, prompts, moved = str(tmp_path / "run"), tmp_path / "prompts.txt", tmp_path / "moved.txt"
    prompts.write_text("\n".join(WORDS))
    sizes = "--num_updates 1 --num_steps 2 --teacher_steps 2 --batch_size 2 --collect_size 2 --lora null "
    judged = (
        "--gradient_accumulation 1 --mixed_precision no --env.guidance_scale 1 --evaluate.n 10 --evaluate.n_paths 2 --evaluate.n_action 2"
    )
    env = ["--env", "sd15", "--env.model", str(folders["sd"]), "--env.prompts", str(prompts)]
    dagger.main([*env, *sizes.split(), *judged.split(), "--out", run])
    prompts.rename(moved)
    with pytest.raises(SystemExit):
        dagger.main(["--resume", run])
    assert "If it was moved since a run began, resume that with --env.prompts PATH" in capsys.readouterr().err
    (tmp_path / "others.txt").write_text("\n".join(reversed(WORDS)))
    with pytest.raises(SystemExit):
        dagger.main(["--resume", run, "--env.prompts", str(tmp_path / "others.txt")])
    assert "was trained on another expert: its prompts is" in capsys.readouterr().err
    dagger.main(["--resume", run, "--env.prompts", str(moved)])


def test_another_schedule_or_prediction_type_is_another_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    own = opened("sd", folders["sd"]).identity()
    for key, entries in {"schedule": {"beta_end": 0.02}, "prediction_type": {"prediction_type": "v_prediction"}}.items():
        other = opened("sd", edited(folders["sd"], tmp_path / key, "scheduler/scheduler_config.json", **entries)).identity()
        assert {name for name in own if own[name] != other[name]} == {key}
        with pytest.raises(ValueError, match=f"run was trained on another expert: its {key} is"):
            check_same_expert(Path("run"), own, other)
        check_same_expert(Path("run"), {name: own[name] for name in ("model", "weights")}, other)  # of an earlier version


def test_a_command_to_convert_is_one_word_of_the_shell(tmp_path: Path) -> None:
    file = tmp_path / 'it\'s a "$HOME" `x`.safetensors'
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is a model of one file") as error:
        opened("sd", file)
    words = f'set -- {str(error.value).rpartition(": ")[2]}; printf %s "$#$3"'  # as a shell reads the command
    code = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True).stdout
    assert code.startswith(f"3from diffusers import StableDiffusionPipeline as P; P.from_single_file({str(file)!r})")


def test_a_folder_of_data_whose_name_looks_like_a_pattern_is_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "pics [1024px] {a,b}"
    data.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(WORDS[i % 3])
    assert len(StableDiffusion(str(folders["sd"]), data=str(data), workers=1).pairs or ()) == 12
    assert (tmp_path / "pics [1024px] {a,b}.pairs").is_dir()
    with pytest.raises(ValueError, match=r"matches several files; set --env.data_cache, the folder of the cache"):
        OwnData(str(tmp_path / "[01].tar"))
