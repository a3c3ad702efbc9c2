"""Every preset of configs/ is a run that could start: it parses, its stages fit together, and its learner can be built."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from tiny_sd import write_tiny_sd

from ddil_agents import DMD2, LCM, Algorithm, BehaviourCloning, Dagger, dagger, dmd2, lcm
from ddil_agents.commands.load import load_run
from ddil_agents.commands.parse import build_config, expert_and_config, parse
from ddil_agents.commands.plan import forwards
from ddil_agents.training.stages import Stage, plan_stages
from ddil_env import Expert
from ddil_env.presets import config_dir, preset_names

AGENTS: tuple[type[Algorithm], ...] = (BehaviourCloning, Dagger, LCM, DMD2)
WORLDS = ("fork", "kuramoto", "lunar_lander")
CASES = [(agent, name) for agent in AGENTS for name in preset_names(agent.name)]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture
def run(tiny_folder: Path) -> Any:
    """The expert and the stages of a preset; those of Stable Diffusion on a tiny pipeline."""

    def read(agent: type[Algorithm], name: str) -> tuple[Expert, list[Stage]]:
        envs = {"demo": ["digits8"], "staged": ["digits8"]} | {world: [world] for world in WORLDS}
        env = ["--env", *envs.get(name, ["sd15", "--env.model", str(tiny_folder)])]
        parser, cfg = parse(agent, [*env, *([] if name in ("text_to_image", *WORLDS) else ["--config", name])])
        expert, config = expert_and_config(agent, parser, cfg)
        return expert, plan_stages(config)

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
        assert {"demo", "paper", "text_to_image"} <= set(preset_names(agent.name))
        for name in preset_names(agent.name):
            text = (config_dir() / agent.name / f"{name}.yaml").read_text()
            if name not in ("demo", "text_to_image", *WORLDS):  # which the paper does not have
                assert "DDIL §" in text, f"{agent.name}/{name} names no section of the paper"


def test_progressive_distillation_halves_from_32_to_2_as_the_paper_does(run: Any) -> None:
    for agent in (BehaviourCloning, Dagger):
        _, stages = run(agent, "paper")
        assert [(s.config.teacher_steps, s.config.num_steps, s.config.num_updates) for s in stages] == [
            (32, 32, 4000), (32, 32, 6000), (32, 16, 5000), (16, 8, 6000), (16, 8, 4000),
            (8, 4, 8000), (8, 4, 6000), (4, 2, 8000), (4, 2, 6000),
        ]  # fmt: skip
        assert [s.teacher for s in stages] == ["original", "original", "last", "last", "same", "last", "same", "last", "same"]
        student = [s.config.beta.student for s in stages]
        assert student == ([0] * 9 if agent is BehaviourCloning else [0, 0, 0, 0, 0.5, 0, 0.5, 0, 0.5])


def test_dmd2s_small_batch_is_the_papers(run: Any) -> None:
    _, (stage,) = run(DMD2, "paper_ssd1b")
    config: Any = stage.config
    assert (config.batch_size, config.critic_updates, config.num_updates, config.learning_rate) == (7, 10, 30000, 1e-5)
    assert config.thresholding.roles == ("teacher", "student", "critic")


def test_lcm_trains_8k_updates_with_the_papers_guidance(run: Any) -> None:
    _, (stage,) = run(LCM, "paper")
    assert (stage.config.num_updates, stage.config.guidance_range, stage.config.ema) == (8000, (6, 16), 0.95)


@pytest.mark.parametrize("env", preset_names("learner"))
def test_an_advertised_env_takes_hours_of_one_gpu_and_its_file_says_how_many(env: str, tmp_path: Path) -> None:
    text = (config_dir() / "learner" / f"{env}.yaml").read_text()
    told = " ".join(text.replace("\n#", " ").split())
    operations = float(re.findall(r"([\d.]+)e12 operations", told)[0]) * 1e12
    alone = dict(re.findall(r"(bc|dagger|lcm|dmd2) ([\d.]+) h", told))
    with_data = re.findall(r"[\d.]+", re.findall(r"with --data (.* h)\.", told)[0])
    for place, agent in enumerate((BehaviourCloning, Dagger, LCM, DMD2)):
        for given, said in (([], alone[agent.name]), (["--data", str(tmp_path)], with_data[place])):
            parser, cfg = parse(agent, ["--env", env, *given])
            config = build_config(agent, parser, cfg)
            work = config.num_updates * forwards(config, guided=True).work(checkpointing=True)
            hours = work * operations / 35e12 / 3600
            assert hours == pytest.approx(float(said), rel=0.03)
            assert 1 < hours < 12
            assert (len(plan_stages(config)), config.num_steps, config.mixed_precision) == (1, 4, "bf16")
            assert config.lora is not None
            assert cfg.env.dtype != "float32"
            shares = config.beta.shares
            assert bool(shares[0]) == bool(given)
            assert agent is BehaviourCloning or shares[1] * shares[2] > 0


def test_the_papers_run_has_none_of_the_defaults_of_one_gpu(tmp_path: Path) -> None:
    for agent in AGENTS:
        for given in ([], ["--data", str(tmp_path)]):
            parser, cfg = parse(agent, ["--env", "sd15", "--config", "paper", *given])
            config = build_config(agent, parser, cfg)
            kept = (config.lora, cfg.env.dtype, config.student.get("gradient_checkpointing"), cfg.checkpoint_every, config.thresholding)
            assert kept[:4] == (None, "float32", None, 500)
            assert config.thresholding.calibrate_on == ("data" if given else "teacher")
            assert config.learning_rate == 1e-5


def test_a_setting_of_the_user_goes_over_that_of_one_gpu() -> None:
    _, cfg = parse(Dagger, ["--env", "sd15", "--env.dtype", "float32", "--lora", "null", "--batch_size", "16"])
    assert (cfg.env.dtype, cfg.lora, cfg.batch_size) == ("float32", None, 16)


@pytest.mark.parametrize(("main", "agent", "steps"), [(dagger.main, "dagger", 2), (lcm.main, "lcm", 4), (dmd2.main, "dmd2", 4)])
def test_the_papers_run_reaches_a_pipeline_when_it_is_shrunk(
    main: Callable[[list[str]], None], agent: str, steps: int, tiny_folder: Path, tmp_path: Path
) -> None:
    """The whole of configs/AGENT/paper.yaml, every stage of it, in two updates each on a tiny pipeline."""
    config = yaml.safe_load((config_dir() / agent / "paper.yaml").read_text())
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
