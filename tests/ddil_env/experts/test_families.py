"""Facts about the diffusers-backed families beside Stable Diffusion: SDXL, SD3, DiT and DDPM, on small pipelines of random weights.

The same facts for each: what the expert computes is what the pipeline's own network does, whole samplings agree, and a student saved
as a pipeline draws our samples from the same noise.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from helpers import trained
from PIL import Image
from tiny_pipelines import WRITERS, write_tiny_ddpm, write_tiny_dit, write_tiny_sd3, write_tiny_sdxl
from tiny_sd import WORDS
from torch import Tensor

from ddil_agents import dagger, dmd2, lcm
from ddil_agents.commands.load import load_run
from ddil_agents.training.critic import Critic
from ddil_env import Expert, ExpertPolicy, StudentPolicy, TimeGrid, check_expert, load_expert, unroll
from ddil_env.experts.ddpm import DDPM
from ddil_env.experts.dit import ClassConditionalDiT
from ddil_env.experts.stable_diffusion_3 import T5_TOKENS, StableDiffusion3
from ddil_env.experts.stable_diffusion_xl import StableDiffusionXL

N, SEED = 3, 7
FAMILIES = tuple(WRITERS)
TOLD = ("ssd1b",)  # whose network has an input for the guidance scale


def options(family: str) -> dict[str, Any]:
    """What a test's expert is built with: texts that the small tokenizer knows."""
    return {"prompts": WORDS} if family in ("ssd1b", "sd3") else {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}


@pytest.fixture(scope="module")
def experts(folders: dict[str, Path]) -> dict[str, Any]:
    return {family: load_expert(family, model=str(folder), **options(family)) for family, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(folder: Path) -> Any:
    """The pipeline of a folder; diffusers wants to be told of components that are not there."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    card = folder / "README.md"
    assert not card.is_file() or f"use_safetensors=True{''.join(f', {name}=None' for name in absent)})" in card.read_text()
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **absent)


def conditions(expert: Expert) -> Tensor | None:
    return torch.arange(N) % expert.num_conditions if expert.num_conditions else None


def sampled(policy: Any, expert: Expert, num_steps: int, grid: Any = "linspace", kernel: Any = "ddim") -> Tensor:
    """Our samples, with noise as torch's global generator seeded by SEED would draw it."""
    generator = torch.Generator().manual_seed(SEED)
    x_T = torch.randn(N, *expert.sample_shape, generator=generator)
    times = TimeGrid(expert.schedule, num_steps, grid)
    return unroll(policy, times, x_T, conditions(expert), kernel=kernel, generator=generator)[:, -1]


def drawn(pipeline: Any, **arguments: Any) -> Tensor:
    """The latents that a pipeline ends with, as the last step of its scheduler left them."""
    subject: dict[str, dict[str, Any]] = {
        "StableDiffusionXLPipeline": {"prompt": WORDS},
        "StableDiffusion3Pipeline": {"prompt": WORDS},
        "DiTPipeline": {"class_labels": list(range(N))},
        "DDPMPipeline": {"batch_size": N},
    }
    kept: list[Tensor] = []
    step = pipeline.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        kept.append(output[0])
        return output

    pipeline.scheduler.step = recorded
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    pipeline(**subject[type(pipeline).__name__], output_type="pt", **arguments)
    return kept[-1][:N]  # DiT's are doubled under guidance


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, in units of the latents' spread: a random ε-network's have spread 16 to 280, where float32 resolves no 1e-5."""
    assert torch.isfinite(ours).all()
    return float((ours - theirs).abs().max()) / max(1.0, float(ours.std()))


def assert_same_samples(ours: Tensor, theirs: Tensor) -> None:
    assert difference(ours, theirs) <= 1e-5


# What the experts compute


def test_every_family_keeps_the_contract(family: str, experts: dict[str, Any]) -> None:
    check_expert(experts[family])


def test_the_network_is_called_as_the_pipeline_calls_it(family: str, experts: dict[str, Any], folders: dict[str, Path]) -> None:
    expert = experts[family]
    pipeline = opened(folders[family])
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        calls.append((time, output[0] if isinstance(output, tuple) else output.sample))
        inputs.append(given)

    inputs: list[Tensor] = []
    getattr(pipeline, expert.denoiser).register_forward_hook(record, with_kwargs=True)
    guidance = {} if family == "ddpm" else {"guidance_scale": 5.0}
    drawn(pipeline, num_inference_steps=2, **guidance)
    c = conditions(expert)
    null = None if c is None else torch.full_like(c, expert.null_condition)
    both = [c] if family == "ddpm" else [c, null] if family == "dit" else [null, c]
    for x_t, (time, theirs) in zip(inputs, calls, strict=True):
        sigma = time.flatten()[:1].double() / 1000
        t = sigma / (3 - 2 * sigma) * 1000 if family == "sd3" else time.flatten()[:1]  # u of σ = 3u/(1 + 2u)
        t = t.float().expand(N)
        with torch.no_grad():
            ours = torch.cat([expert.network(x, t, ids) for x, ids in zip(x_t.split(N), both, strict=True)])
        torch.testing.assert_close(ours, theirs[:, : expert.sample_shape[0]], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_ddim_rollout_equals_the_pipelines_own_sampling(
    family: str, guidance_scale: float, experts: dict[str, Any], folders: dict[str, Path]
) -> None:
    expert = experts[family]
    if family == "ddpm" and guidance_scale != 1:
        pytest.skip("unconditional")
    pipeline = opened(folders[family])
    steps: dict[str, Any] = {"num_inference_steps": 4}
    if family == "sd3":
        steps = {"sigmas": [1.0, 0.75, 0.5, 0.25]}  # shifted by the pipeline's own scheduler
    else:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config, solver_order=1, algorithm_type="dpmsolver++", timestep_spacing="linspace", final_sigmas_type="zero"
        )
    guidance = {} if family == "ddpm" else {"guidance_scale": guidance_scale}
    ours = sampled(ExpertPolicy(expert, guidance_scale=guidance_scale, project=False), expert, 4)
    assert_same_samples(ours, drawn(pipeline, **steps, **guidance))


@pytest.mark.parametrize("family", ["ssd1b", "sd3", "dit"])
def test_conditions_change_the_prediction(family: str, experts: dict[str, Any]) -> None:
    expert = experts[family]
    x_t = torch.randn(1, *expert.sample_shape, generator=torch.Generator().manual_seed(1)).expand(3, -1, -1, -1)
    t = torch.full((3,), 900.0)
    pred = expert.predict(x_t, t, torch.tensor([0, 1, expert.null_condition])).x_0
    assert min(float((pred[i] - pred[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    torch.testing.assert_close(expert.predict(x_t, t).x_0[0], pred[2], atol=1e-4, rtol=1e-4)  # no condition is the null condition


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_reasons_in_float32(family: str, dtype: str, experts: dict[str, Any], folders: dict[str, Path]) -> None:
    half: Any = load_expert(family, model=str(folders[family]), dtype=dtype, **options(family))
    x_t = torch.randn(N, *half.sample_shape, generator=torch.Generator().manual_seed(1))
    t, c = torch.full((N,), 250.0), conditions(half)
    pred, exact = half.predict(x_t, t, c), experts[family].predict(x_t, t, c)
    assert half.network.core.dtype == getattr(torch, dtype)
    assert pred.x_0.dtype == pred.eps.dtype == torch.float32
    torch.testing.assert_close(pred.x_0, exact.x_0, atol=0.1, rtol=0.1)
    assert half.make_student().network.core.dtype == torch.float32
    assert half.decode(x_t).dtype == torch.uint8


def test_pictures_are_the_pipelines(family: str, experts: dict[str, Any], folders: dict[str, Path]) -> None:
    expert, pipeline = experts[family], opened(folders[family])
    x_0 = torch.randn(N, *expert.sample_shape, generator=torch.Generator().manual_seed(1))
    pictures = x_0
    if family != "ddpm":
        shift = pipeline.vae.config.shift_factor or 0.0
        pictures = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor + shift).sample.detach()
    expected = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    assert (expert.decode(x_0) == expected).all()


# Students


def test_a_student_starts_as_its_teacher_and_shares_its_tables(family: str, experts: dict[str, Any]) -> None:
    expert = experts[family]
    student = expert.make_student(gradient_checkpointing=True)
    x_t = torch.randn(N, *expert.sample_shape, generator=torch.Generator().manual_seed(1))
    t, c = torch.full((N,), 500.0), conditions(expert)
    for _ in range(3):  # in training mode, with no draw of its own
        torch.testing.assert_close(student.predict(x_t, t, c).x_0, expert.predict(x_t, t, c).x_0)
    student.predict(x_t, t, c).x_0.square().mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in student.parameters() if p.grad is not None) > 0
    if family in ("ssd1b", "sd3"):
        assert copy.deepcopy(student).network.embeddings is expert.embeddings
    assert {name.split(".")[1] for name in student.state_dict()} == {expert.denoiser}


def test_a_discriminator_reads_the_middle(family: str, experts: dict[str, Any]) -> None:
    expert = experts[family]
    critic = Critic(expert.make_student())
    critic.add_head(expert, torch.tensor([999.0]))
    x_t = torch.randn(N, *expert.sample_shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pred, realness = critic(x_t, torch.full((N,), 500.0), conditions(expert))
    assert realness.shape == (N,)
    assert pred.x_0.shape == x_t.shape
    (gradient,) = torch.autograd.grad(realness.sum(), x_t)
    assert gradient.abs().max() > 0
    assert critic._features is not None
    assert critic._features.ndim == 4


CASES = [
    ("ssd1b", 4, "linspace", "ddim", {"num_inference_steps": 4}),
    ("ssd1b", 3, "dmd2", "ddim", {"timesteps": [999, 666, 333]}),
    ("ssd1b", 4, "lcm", "renoise", {"num_inference_steps": 4}),
    ("ssd1b", 4, "linspace", "renoise", {"timesteps": [999, 749, 500, 250]}),
    ("dit", 4, "linspace", "ddim", {"num_inference_steps": 4}),
    ("dit", 7, "trailing", "ddim", {"num_inference_steps": 7}),
    ("dit", 4, "lcm", "renoise", {"num_inference_steps": 4}),
    ("dit", 4, "dmd2", "renoise", {"num_inference_steps": 4}),
    ("ddpm", 4, "linspace", "ddim", {"num_inference_steps": 4}),
    ("ddpm", 4, "dmd2", "ddim", {"num_inference_steps": 4}),
    ("ddpm", 4, "lcm", "renoise", {"num_inference_steps": 4}),
    ("ddpm", 4, "dmd2", "renoise", {"num_inference_steps": 4}),
    ("sd3", 4, "linspace", "ddim", {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    ("sd3", 1, "linspace", "ddim", {"sigmas": [1.0]}),
    ("sd3", 4, "lcm", "ddim", {"sigmas": [1.0, 0.76, 0.5, 0.26]}),
    ("sd3", 4, "lcm", "renoise", {"sigmas": [1.0, 0.76, 0.5, 0.26]}),
    ("sd3", 2, "dmd2", "renoise", {"sigmas": [1.0, 0.5]}),
]


def call_of(folder: Path) -> dict[str, Any]:
    """The arguments of the call that the student's README.md gives, less its subject."""
    text = re.search(r"pipe\((.*)\)\n", (folder / "README.md").read_text())
    assert text is not None
    call = dict(eval(f"dict({text[1].removeprefix(chr(34) + 'a prompt' + chr(34) + ', ')})"))
    return {name: value for name, value in call.items() if name not in ("class_labels", "batch_size")}


@pytest.mark.parametrize(("family", "num_steps", "grid", "kernel", "call"), CASES)
def test_a_saved_student_is_a_pipeline_that_draws_our_samples(
    family: str, num_steps: int, grid: str, kernel: str, call: dict[str, Any], experts: dict[str, Any], tmp_path: Path
) -> None:
    expert = experts[family]
    student = trained(expert)
    expert.save_student(student, tmp_path, num_steps, grid, kernel)
    found = call_of(tmp_path)
    assert found.pop("guidance_scale", 1.0) == 1.0
    assert found.keys() == call.keys()
    for name, value in call.items():
        assert found[name] == pytest.approx(value, abs=1e-6)
    guidance = {} if family == "ddpm" else {"guidance_scale": 1.0}
    theirs = drawn(opened(tmp_path), **found, **guidance)
    ours = sampled(StudentPolicy(student, expert), expert, num_steps, grid, kernel)
    assert_same_samples(ours, theirs)
    teachers = sampled(ExpertPolicy(expert, guidance_scale=1.0, project=False), expert, num_steps, grid, kernel)
    assert difference(ours, teachers) > 1e-3  # it is the student that was saved


@pytest.mark.parametrize(("grid", "kernel"), [("linspace", "ddim"), ("lcm", "renoise")])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_told_student_is_a_pipeline_that_hears_the_scale(
    grid: str, kernel: str, guidance_scale: float, experts: dict[str, Any], tmp_path: Path
) -> None:
    expert = experts["ssd1b"]
    student = trained(expert, guidance_embedding=True)
    expert.save_student(student, tmp_path, 4, grid, kernel)
    assert call_of(tmp_path) == {"num_inference_steps": 4, "guidance_scale": 9.0}
    theirs = drawn(opened(tmp_path), num_inference_steps=4, guidance_scale=guidance_scale)
    ours = sampled(StudentPolicy(student, expert, guidance_scale=guidance_scale), expert, 4, grid, kernel)
    assert_same_samples(ours, theirs)
    other = sampled(StudentPolicy(student, expert, guidance_scale=guidance_scale + 1), expert, 4, grid, kernel)
    assert difference(ours, other) > 1e-3
    assert expert.load_student(tmp_path, guidance_embedding=True).guidance_embedding


def test_a_student_that_no_pipeline_could_tell_its_scale_is_refused(family: str, experts: dict[str, Any]) -> None:
    if family in TOLD:
        assert experts[family].make_student(guidance_embedding=True).guidance_embedding
        return
    with pytest.raises(ValueError, match=r"has no input for the guidance scale.*train without guidance_range"):
        experts[family].make_student(guidance_embedding=True)


def test_saved_students_read_back_bit_for_bit(family: str, experts: dict[str, Any], tmp_path: Path) -> None:
    expert = experts[family]
    student = trained(expert)
    expert.save_student(student, tmp_path, 4)
    again = expert.load_student(tmp_path)
    assert again.prediction_type == student.prediction_type
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    teacher: Any = type(expert)(str(tmp_path), **options(family))  # a saved student is a teacher again
    x_t = torch.randn(N, *expert.sample_shape, generator=torch.Generator().manual_seed(1))
    t, c = torch.full((N,), 500.0), conditions(expert)
    assert teacher.schedule.shift == expert.schedule.shift
    torch.testing.assert_close(teacher.predict(x_t, t, c).x_0, student.predict(x_t, t, c).x_0)


@pytest.mark.parametrize("family", ["dit", "ddpm"])
def test_times_that_a_pipelines_call_cannot_be_given_are_refused(family: str, experts: dict[str, Any], tmp_path: Path) -> None:
    expert = experts[family]
    for num_steps, grid, kernel, cure in ((4, "lcm", "ddim", "linspace or trailing"), (4, "linspace", "renoise", "lcm")):
        with pytest.raises(ValueError, match=rf"grid='{grid}' in 4 steps .* takes a number of steps and no timesteps.*choose grid {cure}"):
            expert.check_export(num_steps, grid, kernel)
        with pytest.raises(ValueError, match="takes a number of steps"):
            expert.save_student(expert.make_student(), tmp_path / "student", num_steps, grid, kernel)
    assert not (tmp_path / "student").exists()
    expert.check_export(5, "lcm", "ddim")  # every tenth of 50 times is trailing's


@pytest.mark.parametrize("kind", ["v", "x_0"])
def test_students_of_any_prediction_type_are_saved_as_that(family: str, kind: Any, experts: dict[str, Any], tmp_path: Path) -> None:
    expert = experts[family]
    if family == "sd3":
        with pytest.raises(ValueError, match=r"'x_0': FlowMatchEuler.* reads velocities alone|'v' does not go with the 'flow' schedule"):
            expert.make_student(prediction_type=kind)
        return
    student = trained(expert, prediction_type=kind)
    expert.save_student(student, tmp_path, 4)
    guidance = {} if family == "ddpm" else {"guidance_scale": 1.0}
    theirs = drawn(opened(tmp_path), num_inference_steps=4, **guidance)
    assert_same_samples(sampled(StudentPolicy(student, expert), expert, 4), theirs)
    assert expert.load_student(tmp_path).prediction_type == kind


def test_the_model_cards_snippet_draws_a_picture_as_it_is_written(
    family: str, experts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = experts[family]
    expert.save_student(trained(expert), tmp_path / "student", 4, "lcm", "renoise")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "student" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)  # whose folder `student` is
    exec(snippet, {})
    with Image.open("sample.png") as picture:
        assert picture.size == expert.picture_size


def test_the_model_card_names_the_teachers_licence(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "teacher"))
    expert: Any = load_expert(family, model=str(folder), **options(family))
    expert.save_student(expert.make_student(), tmp_path / "plain", 4)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: unknown\ntags:\n")
    assert "which holds for its students too: unknown: its folder states none; look it up" in card
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: open-weights-1\nlicense_link: LICENSE.md\n---\n# A teacher\n")
    expert.save_student(expert.make_student(), tmp_path / "licensed", 4)
    card = (tmp_path / "licensed" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: other\nlicense_name: open-weights-1\nlicense_link: LICENSE.md\ntags:\n")
    assert "Licence of the teacher, which holds for its students too: `open-weights-1`, as its model card states." in card


# Commands


@pytest.mark.parametrize(("main", "agent"), [(dagger.main, "dagger"), (lcm.main, "lcm"), (dmd2.main, "dmd2")])
def test_a_learners_command_ends_in_a_pipeline(
    family: str, main: Callable[[list[str]], None], agent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    env = ["--env", family, "--env.model", str(folders[family]), "--env.dtype", "float32"]
    env += ["--env.prompts", json.dumps(WORDS)] if options(family) else []
    sizes = [
        "--num_updates",
        "2",
        "--batch_size",
        "4",
        "--gradient_accumulation",
        "1",
        "--num_steps",
        "2",
        "--teacher_steps",
        "4",
        "--mixed_precision",
        "no",
    ]
    if agent != "dmd2":
        sizes += ["--collect_size", "200" if agent == "lcm" else "16"]
    judged = ["--evaluate.n", "10", "--evaluate.n_paths", "4", "--evaluate.n_action", "2", "--thresholding.kind", "expert"]
    main([*env, *sizes, *judged, "--beta.forward", "0", "--beta.teacher", ".5", "--beta.student", ".5", "--out", str(run)])
    result = json.loads((run / "result.json").read_text())
    assert (result["student"], result["num_updates"], result["env_config"]["model"]) == (f"{agent}@2", 2, str(folders[family]))
    assert result["teacher_nfe"] > 0
    assert (run / "samples.png").is_file()
    learner = load_run(run)
    student = StudentPolicy(learner.ema_student, learner.expert)
    ours = sampled(student, learner.expert, 2, learner.config.grid, learner.kernel)
    assert_same_samples(ours, drawn(opened(run / "student"), **call_of(run / "student")))


# What belongs to one family


def test_sdxl_guides_away_from_zeros_only_where_its_pipeline_does(folders: dict[str, Path], tmp_path: Path) -> None:
    forced = StableDiffusionXL(str(folders["ssd1b"]), WORDS)
    assert forced.embeddings.tables["text"].shape == (4, 16, 40)  # 3 prompts and ""; 16 tokens of 16 + 24 channels
    assert forced.embeddings.tables["pooled"].shape == (4, 12)
    assert all((table[-1] == 0).all() and (table[:-1] != 0).any() for table in forced.embeddings.tables.values())
    folder = write_tiny_sdxl(tmp_path / "encoded", force_zeros=False)
    encoded = StableDiffusionXL(str(folder), WORDS)
    assert all((table[-1] != 0).any() for table in encoded.embeddings.tables.values())
    pipeline = opened(folder)
    _, theirs, _, pooled = pipeline.encode_prompt(WORDS[0], negative_prompt="")
    torch.testing.assert_close(encoded.embeddings.tables["text"][-1:], theirs.detach())
    torch.testing.assert_close(encoded.embeddings.tables["pooled"][-1:], pooled.detach())
    encoded.save_student(encoded.make_student(), tmp_path / "student", 4)
    assert opened(tmp_path / "student").config.force_zeros_for_empty_prompt is False


def test_sdxl_is_told_the_size_of_its_pictures(folders: dict[str, Path]) -> None:
    assert StableDiffusionXL(str(folders["ssd1b"]), WORDS).time_ids == (16, 16, 0, 0, 16, 16)
    wide: Any = StableDiffusionXL(str(folders["ssd1b"]), WORDS, height=24, width=32)
    assert wide.time_ids == (24, 32, 0, 0, 24, 32)
    pipeline = opened(folders["ssd1b"])
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, solver_order=1, algorithm_type="dpmsolver++", timestep_spacing="linspace", final_sigmas_type="zero"
    )
    theirs = drawn(pipeline, num_inference_steps=2, guidance_scale=5.0, height=24, width=32)
    assert_same_samples(sampled(ExpertPolicy(wide, guidance_scale=5.0), wide, 2), theirs)


def test_sdxls_vae_is_in_float32_where_float16_makes_it_overflow(folders: dict[str, Path]) -> None:
    half: Any = StableDiffusionXL(str(folders["ssd1b"]), WORDS, dtype="float16")
    assert (half.network.core.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert StableDiffusionXL(str(folders["ssd1b"]), WORDS, dtype="bfloat16").vae.dtype == torch.bfloat16


def test_an_sdxl_refiner_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["ssd1b"], tmp_path / "refiner"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None], "tokenizer": [None, None]}))
    with pytest.raises(ValueError, match="leaves out text_encoder, tokenizer, which this expert reads; pass a whole pipeline"):
        StableDiffusionXL(str(folder), WORDS)


def test_sd3_reads_t5_where_it_is_there_and_wanted(tmp_path: Path) -> None:
    folder = write_tiny_sd3(tmp_path / "t5", t5=True)
    whole, less = StableDiffusion3(str(folder), WORDS), StableDiffusion3(str(folder), WORDS, t5=False)
    assert whole.embeddings.tables["t5"].shape == (4, T5_TOKENS, 48)
    assert "t5" not in less.embeddings.tables
    pipeline = opened(folder)
    sigmas = {"sigmas": [1.0, 0.5], "guidance_scale": 5.0}
    with_t5 = sampled(ExpertPolicy(whole, guidance_scale=5.0), whole, 2)
    assert_same_samples(with_t5, drawn(pipeline, **sigmas))
    without = sampled(ExpertPolicy(less, guidance_scale=5.0), less, 2)
    assert difference(with_t5, without) > 1e-3
    for expert in (whole, less):
        student = trained(expert)
        expert.save_student(student, tmp_path / f"{expert is whole}", 2)
        saved = opened(tmp_path / f"{expert is whole}")
        assert (saved.text_encoder_3 is not None) == (expert is whole)
        assert_same_samples(sampled(StudentPolicy(student, expert), expert, 2), drawn(saved, sigmas=[1.0, 0.5], guidance_scale=1.0))


def test_sd3s_one_step_is_the_schedulers_own(experts: dict[str, Any], folders: dict[str, Path]) -> None:
    theirs = drawn(opened(folders["sd3"]), num_inference_steps=1, guidance_scale=7.0)
    assert_same_samples(sampled(ExpertPolicy(experts["sd3"]), experts["sd3"], 1), theirs)


def test_sd3s_times_are_shifted_as_its_schedulers(experts: dict[str, Any], tmp_path: Path) -> None:
    expert = experts["sd3"]
    alpha, sigma = expert.schedule.coefficients(torch.tensor([1000.0, 500.0, 0.0]))
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64))
    torch.testing.assert_close(alpha + sigma, torch.ones(3, dtype=torch.float64))
    assert StableDiffusion3(str(write_tiny_sd3(tmp_path, shift=1.0)), WORDS).schedule.shift == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"use_dynamic_shifting": True}, r"use_dynamic_shifting=True is not supported; supported: False"),
        ({"shift_terminal": 0.02}, r"shift_terminal=0.02 is not supported"),
        ({"use_karras_sigmas": True}, r"use_karras_sigmas=True is not supported"),
        ({"_class_name": "DDIMScheduler"}, r"DDIMScheduler is not supported; supported: FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_flow_noise_that_is_not_ours_is_refused(entry: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "sd3"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(ValueError, match=message):
        StableDiffusion3(str(folder), WORDS)


def test_dit_names_its_classes_and_so_do_its_students(experts: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    expert = experts["dit"]
    assert (expert.num_conditions, expert.null_condition) == (1000, 1000)
    assert expert.captions(torch.tensor([2, 0])) == ["thing 2, object 2", "thing 0, object 0"]
    expert.save_student(expert.make_student(), tmp_path / "student", 4)
    assert opened(tmp_path / "student").get_label_ids(["thing 7"]) == [7]
    index = Path(shutil.copytree(folders["dit"], tmp_path / "nameless")) / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "id2label"}))
    with pytest.raises(ValueError, match="has no id2label, the classes' names"):
        ClassConditionalDiT(str(index.parent)).captions(torch.tensor([0]))


def test_a_dit_of_the_time_of_transformer_2d_model_loads(experts: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    config = Path(shutil.copytree(folders["dit"], tmp_path / "old")) / "transformer" / "config.json"
    old = {"_class_name": "Transformer2DModel", "attention_type": "default", "cross_attention_dim": None, "num_vector_embeds": None}
    config.write_text(json.dumps({**json.loads(config.read_text()), **old}))  # as facebook/DiT-XL-2-256 has it
    expert: Any = ClassConditionalDiT(str(tmp_path / "old"))
    x_t, t, c = torch.randn(N, *expert.sample_shape), torch.full((N,), 500.0), conditions(expert)
    assert torch.equal(expert.predict(x_t, t, c).eps, experts["dit"].predict(x_t, t, c).eps)


def test_a_dit_without_a_learned_variance_and_of_other_classes_fits_too(tmp_path: Path) -> None:
    expert = ClassConditionalDiT(str(write_tiny_dit(tmp_path / "dit", classes=10, learned_sigma=False)))
    assert (expert.num_conditions, expert.null_condition) == (10, 10)
    check_expert(expert)
    student = trained(expert)
    expert.save_student(student, tmp_path / "student", 4)
    theirs = drawn(opened(tmp_path / "student"), **call_of(tmp_path / "student"))
    assert_same_samples(sampled(StudentPolicy(student, expert), expert, 4), theirs)


def test_ddpms_support_is_the_pixels_range(experts: dict[str, Any]) -> None:
    expert = experts["ddpm"]
    x_0 = torch.tensor([-3.0, 0.5, 2.0])
    assert expert.support.project(x_0).tolist() == [-1.0, 0.5, 1.0]
    assert (expert.num_conditions, expert.null_condition) == (0, None)
    assert (expert.decode(torch.ones(1, 3, 8, 8)) == 255).all()


@pytest.mark.parametrize(
    ("entries", "largest"),
    [({"clip_sample": False}, math.inf), ({"clip_sample_range": 2.0}, 2.0), ({"clip_sample": False, "thresholding": True}, 1.0)],
)
def test_ddpm_clips_estimates_as_its_scheduler(entries: dict[str, Any], largest: float, folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["ddpm"], tmp_path / "model")) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    expert = DDPM(str(tmp_path / "model"))
    scheduler = DDIMScheduler.from_pretrained(path.parent)
    x_t, t = 3 * torch.randn(2, *expert.sample_shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 700.0)
    prediction = expert.predict(x_t, t)
    scheduler.set_timesteps(10)
    theirs = scheduler.step(prediction.eps, 700, x_t).pred_original_sample
    torch.testing.assert_close(prediction.projected(expert.support).x_0, theirs, atol=1e-4, rtol=1e-4)
    assert theirs.abs().max() <= largest
    assert prediction.x_0.abs().max() > 2
    assert expert.identity()["support"] == repr(expert.support)


def test_a_scheduler_that_clips_latents_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["dit"], tmp_path / "model")) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip_sample": True}))
    with pytest.raises(ValueError, match=r"has clip_sample or thresholding, by which the pipeline clips latents to ±1: .*set both"):
        load_expert("dit", model=str(tmp_path / "model"))


def test_a_pipeline_of_one_model_may_lie_at_the_top_of_its_folder(
    folders: dict[str, Path], experts: dict[str, Any], tmp_path: Path
) -> None:
    for part in ("model_index.json", "unet", "scheduler"):  # as the first repositories of diffusers have it
        source = folders["ddpm"] / part
        for path in [source] if source.is_file() else source.iterdir():
            shutil.copy(path, tmp_path)
    expert = DDPM(str(tmp_path))
    x_t = torch.randn(2, *expert.sample_shape)
    assert torch.equal(expert.predict(x_t, torch.full((2,), 500.0)).x_0, experts["ddpm"].predict(x_t, torch.full((2,), 500.0)).x_0)


def test_a_ddpm_that_learns_its_variance_or_reads_classes_is_refused(tmp_path: Path) -> None:
    for key, value in {"out_channels": 6, "num_class_embeds": 10}.items():
        with pytest.raises(ValueError, match=f"has {key}={value}, but a UNet of this pipeline has"):
            DDPM(str(write_tiny_ddpm(tmp_path / key, **{key: value})))


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_or_pickled_weights_are_refused(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "broken"))
    for path in sorted(folder.rglob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            load_expert(family, model=str(folder), **options(family))
        path.unlink()
        torch.save({}, path.with_suffix(".bin"))
        with pytest.raises(ValueError, match=f"there: {path.stem}.bin.*a pickle can run any code"):
            load_expert(family, model=str(folder), **options(family))
        path.with_suffix(".bin").unlink()
        path.write_bytes(whole)


def test_another_familys_pipeline_is_refused(family: str, folders: dict[str, Path]) -> None:
    other = FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]
    with pytest.raises(ValueError, match=r"holds a \w+Pipeline; this expert reads a \w+Pipeline"):
        load_expert(family, model=str(folders[other]), **options(family))
