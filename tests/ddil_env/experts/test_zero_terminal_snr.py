"""Models whose noise ends at α = 0 (Lin et al. 2024): steps and exports are those of diffusers' own schedulers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from helpers import assert_same_samples, trained
from tiny_sd import WORDS, write_tiny_sd

from ddil_env import ExpertPolicy, NoiseSchedule, StudentPolicy, TimeGrid, check_expert, unroll
from ddil_env.experts.stable_diffusion import StableDiffusion
from ddil_env.steps import ddim_step, invert_ddim

SCHEDULER = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
SCHEDULER |= {"set_alpha_to_one": True}


def write_zero_snr(folder: Path, prediction_type: str) -> Path:
    path = write_tiny_sd(folder, prediction_type, **SCHEDULER) / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheduler": ["diffusers", "DDIMScheduler"]}))
    return folder


@pytest.fixture(scope="module", params=["v_prediction", "sample"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zero_snr(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def expert(folder: Path) -> StableDiffusion:
    return StableDiffusion(str(folder), WORDS)


@pytest.mark.parametrize(("kind", "name"), [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_the_levels_are_diffusers(kind: Any, name: str) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    schedule = NoiseSchedule(kind, **betas, zero_terminal_snr=True)
    theirs = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True, **betas).alphas_cumprod
    alpha, sigma = schedule.coefficients(torch.arange(1000).float())
    assert (float(alpha[-1]), float(sigma[-1])) == (0.0, 1.0)
    torch.testing.assert_close(alpha[1:].float() ** 2, theirs[1:], atol=2e-6, rtol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    ended = schedule.ending_at_alpha_0().coefficients(torch.tensor([0.0, 999.0]))[0]
    torch.testing.assert_close(ended.float(), torch.tensor([float(theirs[0].sqrt()), 0.0]))


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_each_step_is_diffusers(num_steps: int) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
    theirs = DDIMScheduler(**config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(num_steps)
    schedule = NoiseSchedule(zero_terminal_snr=True)
    grid = TimeGrid(schedule, num_steps, "trailing")
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, s in pairwise(grid.times):
        output = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(int(t)))
        pred = schedule.prediction(output, x_t, t.expand(2), "v")
        x_s = ddim_step(pred, s.expand(2))
        torch.testing.assert_close(x_s, theirs.step(output, int(t), x_t).prev_sample, atol=1e-4, rtol=0)
        back = invert_ddim(schedule, x_t, t.expand(2), x_s, s.expand(2))  # the target of progressive distillation
        torch.testing.assert_close(back.x_0, pred.x_0, atol=1e-4, rtol=1e-4)
        x_t = x_s


def test_the_contract_holds(expert: StableDiffusion) -> None:
    check_expert(expert)


@pytest.mark.parametrize(("num_steps", "kernel", "grid"), [(5, "ddim", "trailing"), (1, "ddim", "linspace"), (4, "renoise", "linspace")])
def test_teacher_and_student_are_pipelines_that_draw_our_samples(
    expert: StableDiffusion, folder: Path, tmp_path: Path, num_steps: int, kernel: Any, grid: Any
) -> None:
    x_T, c = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    times = TimeGrid(expert.schedule, num_steps, grid)
    student = trained(expert)
    expert.save_student(student, tmp_path, num_steps, grid, kernel)
    call = json.loads((tmp_path / "sampling.json").read_text())["call"]
    cases: list[tuple[Path, Any, dict[str, Any]]] = [(tmp_path, StudentPolicy(student, expert), call)]
    if kernel == "ddim":
        cases.append((folder, ExpertPolicy(expert), {"num_inference_steps": num_steps, "guidance_scale": 7.5}))
    for path, policy, arguments in cases:
        pipeline = DiffusionPipeline.from_pretrained(path)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.scheduler.config.rescale_betas_zero_snr
        assert isinstance(pipeline.scheduler, DDIMScheduler if kernel == "ddim" else LCMScheduler)
        generator = torch.Generator().manual_seed(3)
        theirs = pipeline(WORDS, latents=x_T, output_type="latent", generator=generator, **arguments).images
        ours = unroll(policy, times, x_T, c, kernel=kernel, generator=torch.Generator().manual_seed(3))[:, -1]
        assert_same_samples(ours, theirs)
    again = StableDiffusion(str(tmp_path), WORDS)  # a saved student is a teacher again
    assert again.schedule.zero_terminal_snr
    assert again.prediction_type == expert.prediction_type


def test_what_its_schedulers_cannot_step_over_is_refused_before_training(expert: StableDiffusion) -> None:
    for num_steps, grid in ((4, "linspace"), (16, "trailing"), (3, "dmd2")):
        with pytest.raises(
            ValueError, match=r"zero terminal SNR: DDIMScheduler.*choose grid trailing and a number of steps that divides 1000"
        ):
            expert.check_export(num_steps, grid)
    expert.check_export(4, "dmd2")
    expert.check_export(16, "trailing", "renoise")


def test_noise_says_nothing_of_the_data_there_and_is_not_predicted(expert: StableDiffusion, tmp_path: Path) -> None:
    message = "'eps' does not go with the 'scaled_linear' schedule of zero terminal SNR: .*`eps` needs α > 0 at t_max"
    with pytest.raises(ValueError, match=message):
        expert.make_student(prediction_type="eps")
    with pytest.raises(ValueError, match=f"scheduler_config.json: .*{message}.*see that its entries are the model's"):
        StableDiffusion(str(write_zero_snr(tmp_path, "epsilon")), WORDS)
    with pytest.raises(ValueError, match=r"zero_terminal_snr=True with the 'flow' schedule"):
        NoiseSchedule("flow", zero_terminal_snr=True)
