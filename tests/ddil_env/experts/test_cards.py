"""The code of a saved student's model card, run as it stands, draws the pictures that this library draws: for every family and setting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import trained
from PIL import Image
from tiny_pipelines import WRITERS
from tiny_sd import write_tiny_sd

from ddil_agents import DMD2, BCConfig, BehaviourCloning, Beta, DMD2Config
from ddil_env import StudentPolicy, TimeGrid, Unbounded, load_expert, unroll
from ddil_env.guidance import GuidanceConditioning
from ddil_env.support import Thresholding

SEED = 7
FAMILIES = {"sd15": write_tiny_sd, **WRITERS}
WIDE = {"height": 24, "width": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in FAMILIES.items()}


def expert_of(family: str, folder: Path, **options: Any) -> Any:
    texts = {} if family in ("dit", "ddpm") else {"prompts": ["a prompt"]}  # as the card's code has it
    return load_expert(family, model=str(folder), **texts, **options)


def picture_of_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    (code,) = re.findall(r"```python\nfrom diffusers import DiffusionPipeline\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)  # whose folder `student` is
    torch.manual_seed(SEED)
    exec(f"from diffusers import DiffusionPipeline\n{code}", {})
    return np.asarray(Image.open(folder.parent / "sample.png"))


def our_picture(expert: Any, student: Any, num_steps: int, grid: Any, kernel: Any, scale: float | None) -> np.ndarray[Any, Any]:
    n = 4 if expert.files.pipeline.__name__ == "DDPMPipeline" else 1  # the card's batch_size
    generator = torch.Generator().manual_seed(SEED)
    x_T = torch.randn(n, *expert.sample_shape, generator=generator)
    c = torch.zeros(n, dtype=torch.int64) if expert.num_conditions else None
    policy = student if isinstance(student, StudentPolicy) else StudentPolicy(student, expert, guidance_scale=scale)
    x_0 = unroll(policy, TimeGrid(expert.schedule, num_steps, grid), x_T, c, kernel=kernel, generator=generator)[:, -1]
    return expert.decode(x_0)[0].numpy()


@pytest.mark.parametrize(
    ("family", "options", "guidance", "grid", "kernel"),
    [
        ("sd15", {}, None, "linspace", "ddim"),
        ("sd15", WIDE, GuidanceConditioning(2.0, 4.0, 3.0), "linspace", "ddim"),
        ("sd15", WIDE, None, "lcm", "renoise"),
        ("sd15", {"height": 24, "width": 24}, None, "dmd2", "ddim"),
        ("ssd1b", {}, None, "lcm", "renoise"),
        ("ssd1b", WIDE, GuidanceConditioning(2.0, 4.0, 3.0), "linspace", "ddim"),
        ("ssd1b", {"height": 24, "width": 24}, None, "linspace", "ddim"),
        ("sd3", {}, None, "linspace", "ddim"),
        ("sd3", {"height": 24, "width": 20}, None, "lcm", "renoise"),
        ("dit", {}, None, "linspace", "ddim"),
        ("ddpm", {}, None, "linspace", "ddim"),
        ("ddpm", {}, None, "lcm", "renoise"),
    ],
)
def test_a_cards_code_draws_our_picture(
    family: str,
    options: dict[str, int],
    guidance: GuidanceConditioning | None,
    grid: str,
    kernel: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expert = expert_of(family, folders[family], **options)
    student = trained(expert, guidance_embedding=guidance is not None)
    expert.save_student(student, tmp_path / "student", 4, grid, kernel, guidance)
    theirs = picture_of_the_card(tmp_path / "student", monkeypatch)
    ours = our_picture(expert, student, 4, grid, kernel, None if guidance is None else guidance.evaluated_at)
    assert theirs.shape == ours.shape
    assert np.abs(theirs.astype(int) - ours).max() <= 1
    sampling = json.loads((tmp_path / "student" / "sampling.json").read_text())
    assert {key: sampling["call"].get(key) for key in options} == options
    if guidance is not None:
        assert (sampling["call"]["guidance_scale"], sampling["guidance_range"]) == (3.0, [2.0, 4.0])
        assert "any of the range that it was trained on, 2 to 4;" in (tmp_path / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "agent", "config", "kind"),
    [
        ("ddpm", DMD2, DMD2Config, "expert"),
        ("ddpm", BehaviourCloning, BCConfig, "expert"),
        ("sd15", BehaviourCloning, BCConfig, "quantile"),
    ],
)
def test_a_student_that_training_projects_samples_as_its_pipeline(
    family: str, agent: Any, config: Any, kind: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholding = Thresholding(kind=kind, roles=("teacher", "student"), calibrate_on="teacher", samples=4)
    expert = expert_of(family, folders[family])
    with pytest.warns(UserWarning, match="its samples and scores are without the projection, as the pipeline's"):
        learner = agent(expert, config(num_steps=4, teacher_steps=4, beta=Beta(0, 1, 0), thresholding=thresholding))
    assert not isinstance(learner.support, Unbounded)
    (tmp_path / "student").mkdir()
    expert.save_student(learner.ema_student, tmp_path / "student", 4, learner.config.grid, learner.kernel)
    theirs = picture_of_the_card(tmp_path / "student", monkeypatch)
    ours = our_picture(expert, learner.student_policy, 4, learner.config.grid, learner.kernel, None)
    assert np.abs(theirs.astype(int) - ours).max() <= 1


def test_the_size_is_in_the_saved_configuration_where_its_class_has_room_for_it(folders: dict[str, Path], tmp_path: Path) -> None:
    for options, size in ((WIDE, [12, 20]), ({"height": 24, "width": 24}, 12), ({}, 8)):
        expert = expert_of("sd15", folders["sd15"], **options)
        expert.save_student(expert.make_student(), tmp_path / str(size), 4)
        assert json.loads((tmp_path / str(size) / "unet" / "config.json").read_text())["sample_size"] == size
        assert expert_of("sd15", tmp_path / str(size)).picture_size == expert.picture_size  # as a teacher again


def test_an_agent_says_what_its_student_is_told(folders: dict[str, Path]) -> None:
    expert = expert_of("sd15", folders["sd15"])
    config = BCConfig(num_steps=2, teacher_steps=4, guidance_range=(2.0, 4.0), guidance_scale=3.0)
    assert BehaviourCloning(expert, config).guidance_conditioning() == [GuidanceConditioning(2.0, 4.0, 3.0)]
    assert BehaviourCloning(expert, BCConfig(num_steps=2, teacher_steps=4)).guidance_conditioning() == []
