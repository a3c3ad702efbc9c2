"""Facts about the Stable Diffusion expert, on a small pipeline of random weights and diffusers' real classes."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from helpers import assert_same_samples, trained
from huggingface_hub import constants
from safetensors.torch import load, save_file
from tiny_sd import WORDS, write_tiny_sd
from torch import Tensor
from transformers import CLIPTextModel

from ddil_agents import Dagger, DaggerConfig
from ddil_env.denoiser import Denoiser, NetworkDenoiser
from ddil_env.expert import Expert
from ddil_env.experts.stable_diffusion import PROMPTS, Dtype, PromptedUNet, StableDiffusion
from ddil_env.mdp import Kernel
from ddil_env.pipelines import find as pipeline_folder
from ddil_env.policy import StudentPolicy
from ddil_env.rollout import unroll
from ddil_env.steps import ddim_step
from ddil_env.time_grid import TimeGrid


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def expert(folder: Path) -> StableDiffusion:
    return StableDiffusion(str(folder), WORDS)


@pytest.fixture(scope="module")
def eps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("eps"))


@pytest.fixture(scope="module")
def eps_expert(eps_folder: Path) -> StableDiffusion:
    return StableDiffusion(str(eps_folder), WORDS)


@pytest.fixture
def broken(eps_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline to break."""
    return Path(shutil.copytree(eps_folder, tmp_path / "broken"))


def start(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n) % len(WORDS)


def rollout(denoiser: Denoiser, num_steps: int, guidance_scale: float = 1.0, grid: str = "linspace") -> Tensor:
    """DDIM from the common noise, one prompt a sample."""
    x_t, c = start()
    times = TimeGrid(denoiser.schedule, num_steps, grid).times  # type: ignore[attr-defined, arg-type]
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            t, s = t.expand(len(x_t)), s.expand(len(x_t))
            pred = denoiser.guided(x_t, t, c, guidance_scale) if isinstance(denoiser, Expert) else denoiser.predict(x_t, t, c)
            x_t = ddim_step(pred, s)
    return x_t


def pipeline_latents(pipeline: StableDiffusionPipeline, guidance_scale: float, **steps: Any) -> Tensor:
    x_t, c = start()
    pipeline.set_progress_bar_config(disable=True)
    prompts = [WORDS[i] for i in c]
    return pipeline(prompts, latents=x_t, guidance_scale=guidance_scale, output_type="latent", **steps).images


def table_of(expert: StableDiffusion) -> Tensor:
    return expert.embeddings.tables["text"]


def network_of(student: NetworkDenoiser) -> PromptedUNet:
    assert isinstance(student.network, PromptedUNet)
    return student.network


# What the expert computes


def test_the_contract_holds(expert: StableDiffusion) -> None:
    assert expert.sample_shape == (4, 8, 8)
    assert (expert.num_conditions, expert.null_condition) == (3, 3)
    assert table_of(expert).shape == (4, 16, 16)  # 3 prompts and ""; 16 tokens of 16 channels
    x_t, c = start()
    pred = expert.predict(x_t, torch.full((3,), 500.0), c)
    alpha, sigma = expert.schedule(pred.t, x_t)
    torch.testing.assert_close(alpha * pred.x_0 + sigma * pred.eps, x_t, atol=1e-5, rtol=1e-5)
    drawn = expert.sample_condition(100)
    assert drawn is not None
    assert drawn.max() < 3  # "" is never drawn


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_ddim_rollout_equals_diffusers_own_pipeline(expert: StableDiffusion, folder: Path, guidance_scale: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, solver_order=1, algorithm_type="dpmsolver++", timestep_spacing="linspace", final_sigmas_type="zero"
    )
    theirs = pipeline_latents(pipeline, guidance_scale, num_inference_steps=4)
    assert_same_samples(rollout(expert, 4, guidance_scale), theirs)


def test_other_noise_schedules_equal_diffusers(tmp_path: Path) -> None:
    schedulers: dict[str, dict[str, Any]] = {
        "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    }
    for name, scheduler in schedulers.items():
        expert = StableDiffusion(str(write_tiny_sd(tmp_path / name, "v_prediction", **scheduler)), WORDS)
        assert expert.schedule.kind == name
        expert.save_student(expert.make_student(), tmp_path / f"{name}_student", 4)
        theirs = pipeline_latents(DiffusionPipeline.from_pretrained(tmp_path / f"{name}_student"), 7.5, num_inference_steps=4)
        assert_same_samples(rollout(expert, 4, 7.5), theirs)


def test_prompts_and_guidance_change_the_samples(expert: StableDiffusion) -> None:
    (x_t, c), t = start(), torch.full((3,), 999.0)
    with_c, without = expert.predict(x_t, t, c).x_0, expert.predict(x_t, t).x_0
    assert (with_c - without).abs().max() > 0.01  # else the equalities above would prove nothing about prompts
    torch.testing.assert_close(without, expert.predict(x_t, t, torch.full_like(c, 3)).x_0)
    torch.testing.assert_close(expert.guided(x_t, t, c, 7.5).x_0, without + 7.5 * (with_c - without), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("b", [3, 8, 16])  # 8 is the latent's side, 16 the text's width
def test_a_guided_pair_is_one_forward_of_2b(eps_expert: StableDiffusion, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    hook = eps_expert.network.core.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    monkeypatch.setattr(eps_expert, "nfe", 0)
    pred = eps_expert.guided(*(start(b)[0], torch.full((b,), 999.0), start(b)[1]))
    hook.remove()
    assert batches == [2 * b]
    assert eps_expert.nfe == 2 * b
    assert pred.x_0.shape == (b, 4, 8, 8)


def test_reading_prompts_runs_the_text_encoder_once(eps_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, batches = CLIPTextModel.forward, []

    def counted(self: object, input_ids: Tensor, **kwargs: object) -> object:
        batches.append(len(input_ids))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    expert = StableDiffusion(str(eps_folder), [f"{i}" for i in range(100)])
    assert batches == [64, 37]
    expert.guided(*(start()[0], torch.full((3,), 999.0), start()[1]))
    assert batches == [64, 37]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_expert_reasons_in_float32(eps_folder: Path, eps_expert: StableDiffusion, dtype: Dtype) -> None:
    half = StableDiffusion(str(eps_folder), WORDS, dtype=dtype)
    assert half.network.core.dtype == table_of(half).dtype == getattr(torch, dtype)
    (x_t, c), t = start(), torch.full((3,), 250.0)
    pred, exact = half.predict(x_t, t, c), eps_expert.predict(x_t, t, c)
    assert pred.x_0.dtype == pred.eps.dtype == torch.float32
    torch.testing.assert_close(pred.x_0, exact.x_0, atol=0.05, rtol=0.05)
    assert network_of(half.make_student()).unet.dtype == torch.float32
    assert half.encode(half.decode(x_t)).dtype == torch.float32


# Pictures


def test_pictures_become_latents_and_back(expert: StableDiffusion) -> None:
    latents = start(9)[0]  # more than one batch of the VAE
    pictures = expert.decode(latents)
    assert pictures.shape == (9, 16, 16, 3)
    assert (pictures.dtype, pictures.device.type) == (torch.uint8, "cpu")
    from_uint8, from_float = expert.encode(pictures), expert.encode(pictures.permute(0, 3, 1, 2) / 127.5 - 1)
    assert (from_uint8.shape, from_uint8.dtype) == ((9, 4, 8, 8), torch.float32)
    torch.testing.assert_close(from_uint8, from_float)
    assert expert.decode(from_uint8).dtype == torch.uint8


def test_decode_equals_diffusers_own_pipeline(eps_expert: StableDiffusion, eps_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(eps_folder)
    latents = start()[0]
    theirs = pipeline.image_processor.postprocess(pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.detach(), "np")
    assert (eps_expert.decode(latents) == torch.from_numpy((theirs * 255).round()).byte()).all()


def test_encode_is_scaled_as_in_training(eps_expert: StableDiffusion) -> None:
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = eps_expert.vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(eps_expert.encode(pictures), mean * 0.18215)


def test_height_and_width_set_the_latents_shape(eps_folder: Path) -> None:
    expert = StableDiffusion(str(eps_folder), WORDS, height=24, width=32)
    assert expert.sample_shape == (4, 12, 16)
    assert expert.decode(torch.randn(1, *expert.sample_shape)).shape == (1, 24, 32, 3)


# Students


def test_student_starts_as_the_teacher(expert: StableDiffusion) -> None:
    student = expert.make_student()
    (x_t, c), t = start(), torch.tensor([999.0, 500.0, 250.0])
    torch.testing.assert_close(student.predict(x_t, t, c).x_0, expert.predict(x_t, t, c).x_0)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in expert.network.parameters())


def test_student_and_its_copies_share_the_table(eps_expert: StableDiffusion) -> None:
    student = eps_expert.make_student()
    for denoiser in (student, copy.deepcopy(student)):
        assert network_of(denoiser).embeddings is eps_expert.embeddings
    assert {name.split(".")[1] for name in student.state_dict()} == {"unet"}
    teacher, own = eps_expert.network.core.conv_in.weight, network_of(student).unet.conv_in.weight
    assert own.data_ptr() != teacher.data_ptr()


def test_gradient_checkpointing_leaves_the_gradient(eps_expert: StableDiffusion) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = eps_expert.make_student(gradient_checkpointing=checkpointing)
        student.predict(start()[0], torch.full((3,), 500.0), start()[1]).eps.square().mean().backward()
        assert network_of(student).unet.is_gradient_checkpointing == checkpointing
        gradients.append(network_of(student).unet.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_saved_student_is_a_pipeline_that_gives_our_samples(expert: StableDiffusion, tmp_path: Path) -> None:
    student = trained(expert)
    expert.save_student(student, tmp_path / "student", 4)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", use_safetensors=True)
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.safety_checker is None
    ours = rollout(student, 4)
    assert_same_samples(ours, pipeline_latents(pipeline, 1.0, num_inference_steps=4))
    assert (ours - rollout(expert, 4)).abs().max() > 0.01  # it is the student that was saved
    guided = StableDiffusion(str(tmp_path / "student"), WORDS)  # a saved student is a teacher again, guidance and all
    assert_same_samples(rollout(guided, 4, 7.5), pipeline_latents(pipeline, 7.5, num_inference_steps=4))


def test_saved_student_reads_back_bit_for_bit(expert: StableDiffusion, tmp_path: Path) -> None:
    student = trained(expert)
    expert.save_student(student, tmp_path, 4)
    again = expert.load_student(tmp_path, gradient_checkpointing=True)
    assert again.prediction_type == student.prediction_type
    assert network_of(again).embeddings is expert.embeddings
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def call_of(folder: Path) -> dict[str, Any]:
    """The arguments of the call that the student's README.md gives."""
    arguments = re.search(r'"a prompt", (.*)\)\n', (folder / "README.md").read_text())
    assert arguments is not None
    return dict(eval(f"dict({arguments[1]})"))


@pytest.mark.parametrize(
    ("num_steps", "grid", "call"),
    [
        (4, "dmd2", "num_inference_steps=4"),
        (16, "trailing", "num_inference_steps=16"),
        (3, "dmd2", "timesteps=["),
        (4, "lcm", "timesteps=["),
    ],
)
def test_saved_student_follows_its_grid(eps_expert: StableDiffusion, tmp_path: Path, num_steps: int, grid: str, call: str) -> None:
    student = trained(eps_expert)
    eps_expert.save_student(student, tmp_path, num_steps, grid)
    assert call in (tmp_path / "README.md").read_text()
    theirs = pipeline_latents(DiffusionPipeline.from_pretrained(tmp_path), **call_of(tmp_path))
    assert_same_samples(rollout(student, num_steps, grid=grid), theirs)


def unrolled(
    expert: StableDiffusion, student: NetworkDenoiser, num_steps: int, grid: str, kernel: Kernel, guidance_scale: float | None = None
) -> Tensor:
    """Samples of the student's policy from the common noise."""
    policy = StudentPolicy(student, expert, guidance_scale=guidance_scale)
    times = TimeGrid(expert.schedule, num_steps, grid)  # type: ignore[arg-type]
    return unroll(policy, times, *start(), kernel=kernel, generator=torch.Generator().manual_seed(3))[:, -1]


@pytest.mark.parametrize(
    ("num_steps", "grid", "call"),
    [
        (4, "lcm", "num_inference_steps=4,"),
        (3, "lcm", "num_inference_steps=3,"),
        (1, "lcm", "num_inference_steps=1,"),
        (4, "dmd2", "num_inference_steps=4,"),
        (3, "dmd2", "timesteps=[999, 666, 333],"),
        (4, "linspace", "timesteps=[999, 749, 500, 250],"),
        (60, "trailing", "timesteps=[999, 982, "),
    ],
)
def test_a_student_of_the_renoise_kernel_is_a_pipeline_that_draws_our_samples(
    expert: StableDiffusion, tmp_path: Path, num_steps: int, grid: str, call: str
) -> None:
    student = trained(expert)
    expert.save_student(student, tmp_path, num_steps, grid, kernel="renoise")
    card = (tmp_path / "README.md").read_text()
    assert call in card
    assert ("draws fresh noise" in card) == (num_steps > 1)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    theirs = pipeline_latents(pipeline, generator=torch.Generator().manual_seed(3), **call_of(tmp_path))
    ours = unrolled(expert, student, num_steps, grid, "renoise")
    assert_same_samples(ours, theirs)
    if num_steps > 1:
        assert (ours - unrolled(expert, student, num_steps, grid, "ddim")).abs().max() > 0.01


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5, 14.0])
@pytest.mark.parametrize(("grid", "kernel"), [("linspace", "ddim"), ("lcm", "renoise")])
def test_a_told_student_is_a_pipeline_that_hears_the_scale(
    expert: StableDiffusion, tmp_path: Path, grid: str, kernel: Kernel, guidance_scale: float
) -> None:
    student = trained(expert, guidance_embedding=True)
    expert.save_student(student, tmp_path, 4, grid, kernel)
    assert call_of(tmp_path) == {"num_inference_steps": 4, "guidance_scale": 7.5}
    assert "any of the range that it was trained on" in (tmp_path / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    theirs = pipeline_latents(pipeline, guidance_scale, num_inference_steps=4, generator=torch.Generator().manual_seed(3))
    ours = unrolled(expert, student, 4, grid, kernel, guidance_scale)
    assert_same_samples(ours, theirs)
    assert (ours - unrolled(expert, student, 4, grid, kernel, guidance_scale + 1)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_a_student_of_any_prediction_type_is_saved_as_that(expert: StableDiffusion, tmp_path: Path, kind: Any, kernel: Kernel) -> None:
    student = trained(expert, prediction_type=kind)
    expert.save_student(student, tmp_path, 4, "lcm", kernel)
    theirs = pipeline_latents(DiffusionPipeline.from_pretrained(tmp_path), generator=torch.Generator().manual_seed(3), **call_of(tmp_path))
    assert_same_samples(unrolled(expert, student, 4, "lcm", kernel), theirs)
    assert expert.load_student(tmp_path).prediction_type == expert.load_student(tmp_path, prediction_type=kind).prediction_type == kind
    assert StableDiffusion(str(tmp_path), WORDS).prediction_type == kind  # a saved student is a teacher again


def test_a_saved_student_loads_with_its_own_options_alone(eps_expert: StableDiffusion, tmp_path: Path) -> None:
    for told in (False, True):
        eps_expert.save_student(eps_expert.make_student(guidance_embedding=told), tmp_path / f"{told}", 4)
        with pytest.raises(ValueError, match=f"was made with guidance_embedding={told}, not {not told}; pass the options"):
            eps_expert.load_student(tmp_path / f"{told}", guidance_embedding=not told)
        assert eps_expert.load_student(tmp_path / f"{told}", guidance_embedding=told).guidance_embedding == told
    with pytest.raises(ValueError, match="predicts eps; pass prediction_type='eps', not 'v'"):
        eps_expert.load_student(tmp_path / "False", prediction_type="v")
    assert eps_expert.network.core.config.time_cond_proj_dim is None  # the teacher's own configuration is untouched
    with pytest.raises(ValueError, match="has time_cond_proj_dim=256, but a text-to-image UNet"):
        StableDiffusion(str(tmp_path / "True"), WORDS)


# Prompts


def test_prompts_come_from_a_file_a_list_or_the_package(eps_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red bee\n\n  two seas \n", encoding="utf-8")
    assert StableDiffusion(str(eps_folder), str(tmp_path / "prompts.txt")).prompts == ("a red bee", "two seas")
    assert StableDiffusion(str(eps_folder), WORDS).prompts == tuple(WORDS)
    with pytest.warns(UserWarning, match="16 of 17 prompts are cut to the 16 tokens"):
        assert StableDiffusion(str(eps_folder)).prompts == PROMPTS


def test_unreadable_or_empty_prompts_are_refused(eps_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    cases: list[tuple[str | list[str], str]] = [
        (str(tmp_path / "absent.txt"), "cannot read the prompts file .*absent.txt"),
        (str(tmp_path / "latin.txt"), "UTF-8 text file"),
        (str(tmp_path / "empty.txt"), "empty.txt holds no prompt"),
        ([], "the list of prompts holds no prompt"),
    ]
    for prompts, message in cases:
        with pytest.raises(ValueError, match=message):
            StableDiffusion(str(eps_folder), prompts)


# No weights, or the wrong ones


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path / 'nowhere'}; pass --env.model PATH"):
        StableDiffusion(str(tmp_path / "nowhere"))


def test_an_absent_hub_model_names_all_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"(?s)'nobody/nothing'.*cache \({tmp_path}\).*local_files_only.*hf download nobody/nothing"):
        StableDiffusion("nobody/nothing", local_files_only=True)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pipeline_folder, "model_info", unreachable)
    with pytest.raises(ValueError, match=r"did not give it .*no route to host"):
        StableDiffusion("nobody/nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        StableDiffusion("nobody/nothing")


def test_a_cached_hub_model_needs_no_hub(eps_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pipeline_folder, "model_info", None)  # a call would raise
    repository, commit = tmp_path / "models--nobody--tiny", "0" * 40
    shutil.copytree(eps_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert StableDiffusion("nobody/tiny", WORDS).folder == repository / "snapshots" / commit


def test_a_folder_that_is_no_pipeline_is_refused(broken: Path) -> None:
    index = broken / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match="holds a StableDiffusionXLPipeline; this expert reads a StableDiffusionPipeline"):
        StableDiffusion(str(broken))
    index.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*model_index.json"):
        StableDiffusion(str(broken))
    index.unlink()
    with pytest.raises(ValueError, match=f"no model_index.json in {broken}"):
        StableDiffusion(str(broken))


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_cut_short_pickled_or_absent_are_refused(broken: Path, name: str) -> None:
    path = broken / f"{name}.safetensors"
    whole = path.read_bytes()
    for damage in (whole[:-100], whole[:4], b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            StableDiffusion(str(broken), WORDS)
    path.unlink()
    with pytest.raises(ValueError, match=r"there: nothing.*fetch it again"):
        StableDiffusion(str(broken), WORDS)
    torch.save({}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=f"there: {path.stem}.bin.*a pickle can run any code"):
        StableDiffusion(str(broken), WORDS)
    shutil.rmtree(path.parent)
    with pytest.raises(ValueError, match=r"cannot read .*config.json"):
        StableDiffusion(str(broken), WORDS)


def test_weights_that_do_not_fill_the_network_are_refused(broken: Path) -> None:
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load(path.read_bytes())  # a mapped file would be written over while it is read
    cases: list[tuple[dict[str, Any], str]] = [
        ({"conv_in.weight": None}, r"lacks 1 of UNet2DConditionModel's tensors, the first is 'conv_in.weight'"),
        ({"conv_in.weight": torch.zeros(3, 3)}, r"cannot load .*unet as UNet2DConditionModel"),
        ({"conv_in.weight": torch.full((16, 4, 3, 3), torch.nan)}, r"non-finite values in 'conv_in.weight'"),
    ]
    for change, message in cases:
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            StableDiffusion(str(broken), WORDS)


def test_a_text_encoder_or_tokenizer_that_does_not_load_is_refused(broken: Path) -> None:
    path = broken / "text_encoder" / "model.safetensors"
    whole = load(path.read_bytes())
    save_file(dict(list(whole.items())[1:]), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of CLIPTextModel's tensors"):
        StableDiffusion(str(broken), WORDS)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(ValueError, match="lacks the folder tokenizer, of its CLIPTokenizer"):
        StableDiffusion(str(broken), WORDS)


def test_checkpoints_of_stable_diffusions_own_age_load(eps_expert: StableDiffusion, broken: Path) -> None:
    encoder, vae = broken / "text_encoder" / "model.safetensors", broken / "vae" / "diffusion_pytorch_model.safetensors"
    texts = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load(encoder.read_bytes()).items()}
    save_file({**texts, "text_model.embeddings.position_ids": torch.arange(16)[None]}, encoder, metadata={"format": "pt"})
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # attention's names of diffusers 0.2
    pictures = load(vae.read_bytes())
    for now, then in old.items():
        pictures = {name.replace(now, then) if "attentions" in name else name: tensor for name, tensor in pictures.items()}
    save_file(pictures, vae, metadata={"format": "pt"})
    expert = StableDiffusion(str(broken), WORDS)
    assert torch.equal(table_of(expert), table_of(eps_expert))
    assert torch.equal(expert.decode(start()[0]), eps_expert.decode(start()[0]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"beta_schedule": "sigmoid"}, r"beta_schedule='sigmoid' is not supported; supported: scaled_linear, linear, squaredcos_cap_v2"),
        (
            {"prediction_type": "flow_prediction"},
            r"prediction_type='flow_prediction' is not supported; supported: epsilon, v_prediction, sample",
        ),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas=\[0.1, 0.2\] is not supported; supported: None"),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr=True is not supported; supported: False"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None},
            "FlowMatchEulerDiscreteScheduler with beta_schedule=None",
        ),
        ({"_class_name": "MyScheduler"}, "names the scheduler 'MyScheduler'"),
    ],
)
def test_noise_that_is_not_ours_is_refused(broken: Path, entry: dict[str, object], message: str) -> None:
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(ValueError, match=message):
        StableDiffusion(str(broken), WORDS)


@pytest.mark.parametrize("entry", [{"in_channels": 9}, {"out_channels": 8}, {"time_cond_proj_dim": 256}])
def test_a_unet_for_another_task_is_refused(broken: Path, entry: dict[str, int]) -> None:
    path = broken / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    ((key, value),) = entry.items()
    with pytest.raises(ValueError, match=f"has {key}={value}, but a"):
        StableDiffusion(str(broken), WORDS)


def test_bad_arguments_are_refused(eps_folder: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "float8"}, "unknown dtype 'float8'; choose one of: float32, float16, bfloat16"),
        ({"height": 15}, "height=15, width=16: both must be positive multiples of 2"),
        ({"width": 0}, "height=16, width=0"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not to be had"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            StableDiffusion(str(eps_folder), WORDS, **arguments)


def test_pictures_of_another_size_are_refused(eps_expert: StableDiffusion) -> None:
    with pytest.raises(ValueError, match=r"need \(b, 16, 16, 3\)"):
        eps_expert.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"need \(b, 3, 16, 16\)"):
        eps_expert.encode(torch.zeros(1, 3, 8, 8))


def test_students_that_do_not_belong_are_refused(eps_expert: StableDiffusion, tmp_path: Path) -> None:
    student = eps_expert.make_student()
    with pytest.raises(TypeError, match="channels"):
        eps_expert.make_student(channels=(8, 8))  # type: ignore[call-arg]
    student.network = torch.nn.Identity()
    with pytest.raises(ValueError, match="cannot save a Identity as a pipeline"):
        eps_expert.save_student(student, tmp_path / "new", 4)
    with pytest.raises(ValueError, match="num_steps=0"):
        eps_expert.save_student(eps_expert.make_student(), tmp_path / "new", 0)
    with pytest.raises(ValueError, match="unknown kernel 'ddpm'; choose one of: ddim, renoise"):
        eps_expert.save_student(eps_expert.make_student(), tmp_path / "new", 4, kernel="ddpm")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"no model_index\.json in"):
        eps_expert.load_student(tmp_path)
    eps_expert.save_student(eps_expert.make_student(), tmp_path, 4)
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": 32}))
    with pytest.raises(ValueError, match="cannot load"):
        eps_expert.load_student(tmp_path)


def test_prompts_of_ones_own_are_sampled_as_if_the_expert_had_them(eps_folder: Path, eps_expert: StableDiffusion) -> None:
    texts = ["a blue cat", "a dog"]
    theirs = Dagger(StableDiffusion(str(eps_folder), texts), DaggerConfig(num_steps=2, teacher_steps=4))
    agent = Dagger(eps_expert, DaggerConfig(num_steps=2, teacher_steps=4))
    samples = agent.sample(prompts=texts, seed=3)
    assert torch.equal(samples, theirs.sample(2, c=[0, 1], seed=3))
    assert not torch.equal(samples[0], agent.sample(prompts="a dog", seed=3)[0])
    assert agent.sample(3, prompts="a dog").shape == (3, 4, 8, 8)
    with eps_expert.prompted(texts) as ids:  # the teacher under guidance, whose batch holds the null condition too
        own = eps_expert.guided(torch.ones(2, 4, 8, 8), torch.full((2,), 500.0), ids, 4.0).x_0
    expected = theirs.expert.guided(torch.ones(2, 4, 8, 8), torch.full((2,), 500.0), torch.arange(2), 4.0).x_0
    assert torch.equal(own, expected)
    assert eps_expert.embeddings.added is None
    for arguments in ({"n": 3, "prompts": texts}, {"n": 2, "c": 0, "prompts": texts}):
        with pytest.raises(ValueError, match="need one text for all of n="):
            agent.sample(**arguments)  # type: ignore[arg-type]


def test_prompts_of_an_expert_without_texts_are_refused() -> None:
    agent = Dagger("digits8", DaggerConfig(num_steps=2, teacher_steps=4))
    with pytest.raises(ValueError, match="is not conditioned on text; pass condition ids, c"):
        agent.sample(prompts="a seven")
