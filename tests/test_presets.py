"""Every preset of configs/ is a run that could start: it parses, its stages fit together, and its learner can be built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from tiny_sd import write_tiny_sd

from ddil_agents import Algorithm, BehaviourCloning, Dagger, DistributionMatching, LatentConsistency, dagger, dmd2, lcm
from ddil_agents.commands.load import load_run
from ddil_agents.commands.parse import expert_and_config, parse
from ddil_agents.training.stages import Stage, plan
from ddil_env import Expert
from ddil_env.presets import config_dir, preset_names

AGENTS: tuple[type[Algorithm], ...] = (BehaviourCloning, Dagger, LatentConsistency, DistributionMatching)
CASES = [(agent, name) for agent in AGENTS for name in preset_names(agent.name)]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture
def run(tiny_folder: Path) -> Any:
    """The expert and the stages of a preset; those of Stable Diffusion on a tiny pipeline."""

    def read(agent: type[Algorithm], name: str) -> tuple[Expert, list[Stage]]:
        env = ["--env", "digits8"] if name in ("demo", "staged") else ["--env", "sd15", "--env.model", str(tiny_folder)]
        parser, cfg = parse(agent, [*env, "--config", name])
        expert, config = expert_and_config(agent, parser, cfg)
        return expert, plan(config)

    return read


@pytest.mark.parametrize(("agent", "name"), CASES, ids=[f"{agent.name}-{name}" for agent, name in CASES])
def test_a_presets_learner_can_be_built(agent: type[Algorithm], name: str, run: Any) -> None:
    expert, stages = run(agent, name)
    for stage in stages:
        config = dataclasses.replace(
            stage.config, mixed_precision="no", thresholding=dataclasses.replace(stage.config.thresholding, samples=2)
        )
        if stage.teacher == "original":
            assert agent(expert, config).grid.num_steps == config.num_steps


def test_every_agent_has_the_papers_run_and_a_small_one() -> None:
    for agent in AGENTS:
        assert {"demo", "sd15"} <= set(preset_names(agent.name))
        for name in preset_names(agent.name):
            text = (config_dir() / agent.name / f"{name}.yaml").read_text()
            if name != "demo":
                assert "DDIL §" in text, f"{agent.name}/{name} names no section of the paper"


def test_progressive_distillation_halves_from_32_to_2_as_the_paper_does(run: Any) -> None:
    for agent in (BehaviourCloning, Dagger):
        _, stages = run(agent, "sd15")
        assert [(s.config.teacher_steps, s.config.num_steps, s.config.num_updates) for s in stages] == [
            (32, 32, 4000), (32, 32, 6000), (32, 16, 5000), (16, 8, 6000), (16, 8, 4000),
            (8, 4, 8000), (8, 4, 6000), (4, 2, 8000), (4, 2, 6000),
        ]  # fmt: skip
        assert [s.teacher for s in stages] == ["original", "original", "last", "last", "same", "last", "same", "last", "same"]
        student = [s.config.beta.student for s in stages]
        assert student == ([0] * 9 if agent is BehaviourCloning else [0, 0, 0, 0, 0.5, 0, 0.5, 0, 0.5])


def test_dmd2s_small_batch_is_the_papers(run: Any) -> None:
    _, (stage,) = run(DistributionMatching, "ssd1b")
    config: Any = stage.config
    assert (config.batch_size, config.critic_updates, config.num_updates, config.learning_rate) == (7, 10, 30000, 1e-5)
    assert config.thresholding.roles == ("teacher", "student", "critic")


def test_lcm_trains_8k_updates_with_the_papers_guidance(run: Any) -> None:
    _, (stage,) = run(LatentConsistency, "sd15")
    assert (stage.config.num_updates, stage.config.guidance_range, stage.config.ema) == (8000, (6, 16), 0.95)


@pytest.mark.parametrize(("main", "agent", "steps"), [(dagger.main, "dagger", 2), (lcm.main, "lcm", 4), (dmd2.main, "dmd2", 4)])
def test_the_papers_run_reaches_a_pipeline_when_it_is_shrunk(
    main: Callable[[list[str]], None], agent: str, steps: int, tiny_folder: Path, tmp_path: Path
) -> None:
    """The whole of configs/AGENT/sd15.yaml, every stage of it, in two updates each on a tiny pipeline."""
    config = yaml.safe_load((config_dir() / agent / "sd15.yaml").read_text())
    for stage in config.get("stages", []):
        stage["num_updates"] = 2
    config |= {"num_updates": 2, "batch_size": 4, "gradient_accumulation": 1, "collect_size": 64, "capacity": 128, "mixed_precision": "no"}
    config["thresholding"]["samples"], config["evaluate"] = 4, {"n": 10, "n_action": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    main(["--env", "sd15", "--env.model", str(tiny_folder), "--config", str(tmp_path / "small.yaml"), "--out", str(run)])
    result = json.loads((run / "result.json").read_text())
    assert result["student"] == f"{agent}@{steps}"
    assert result["num_updates"] == 2 * max(len(config.get("stages", [])), 1)
    assert json.loads((run / "support.json").read_text())["kind"] == "quantile"
    pipeline = StableDiffusionPipeline.from_pretrained(run / "student", use_safetensors=True)
    assert pipeline.unet.config.time_cond_proj_dim == (None if agent == "dmd2" else 256)
    assert load_run(run).config.num_steps == steps
