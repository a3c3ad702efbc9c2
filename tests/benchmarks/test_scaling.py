"""The cost model's forwards are those that a run counts, its network is Stable Diffusion's, and its page says what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import ROOT
from scaling import SD15, Cluster, Network, all_reduce, example, memory, moved, tables, update_seconds
from torch.utils.flop_counter import FlopCounterMode

from ddil_agents import DMD2, LCM, Algorithm, BehaviourCloning, Beta, Dagger
from ddil_agents.commands.plan import Forwards, forwards
from ddil_env import GaussianMixtureExpert

OWN, TEACHERS = Beta(0, 0, 1), Beta(0, 1, 0)
SMALL: dict[str, Any] = {
    "num_updates": 20,
    "teacher_steps": 8,
    "batch_size": 8,
    "updates_per_collect": 4,
    "student": {"width": 8, "depth": 1},
}


def run(agent: type[Algorithm], guidance: float, **changed: Any) -> Algorithm:
    expert = GaussianMixtureExpert([[-0.8, 0.2], [0.8, -0.4]], 0.2, labels=[0, 1], guidance_scale=guidance)
    return agent(expert, agent.Config(**{**SMALL, **changed})).learn(progress=False)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        (BehaviourCloning, {"collect_size": 40}),
        # As many states of a source as stop at each time equally often, or are whole rollouts: 4 and 16.
        (Dagger, {"collect_size": 40, "beta": Beta(0.5, 0.1, 0.4)}),
        (Dagger, {"collect_size": 40, "beta": Beta(0.5, 0.1, 0.4), "states_per_rollout": "all"}),
        (Dagger, {"collect_size": 40, "beta": OWN, "p_expert": 1.0, "gradient_accumulation": 2}),
        (LCM, {"collect_size": 400, "beta": Beta(0.5, 0.25, 0.25), "inference_steps": (4,)}),
        (LCM, {"collect_size": 480, "beta": OWN, "inference_steps": (3,), "states_per_rollout": "all"}),
        (DMD2, {"beta": OWN, "noise_level": 499}),
        (DMD2, {"beta": TEACHERS, "noise_level": 499, "critic_updates": 2}),
        (DMD2, {"beta": OWN, "noise_level": 499, "p_expert": 1.0, "gan_weight": 0.1}),
        (DMD2, {"beta": OWN, "noise_level": 499, "on_policy": False, "collect_size": 24}),
        (DMD2, {"beta": Beta(1, 0, 0), "noise_level": 499}),
    ],
)
def test_forwards_are_those_that_are_counted(agent: type[Algorithm], settings: dict[str, Any], guidance: float) -> None:
    learner = run(agent, guidance, **settings)
    counted = forwards(learner.config, guided=guidance != 1, j=2)
    assert learner.teacher_nfe == pytest.approx(20 * counted.teacher, rel=1e-12)
    assert learner.student_nfe == pytest.approx(20 * counted.student_nfe, rel=1e-12)


def test_the_actors_of_mixed_rollouts_share_the_steps() -> None:
    learner = run(Dagger, 2.0, collect_size=40, beta=OWN, p_expert=0.3)
    counted = forwards(learner.config, guided=True)
    acted = (learner.teacher_nfe / 4 - 5 * 40, 20 * (counted.teacher / 4 - 10))  # of 5 collections' 300 steps, k = 2, g = 2
    assert acted == pytest.approx((90, 90), abs=4 * (300 * 0.3 * 0.7) ** 0.5)
    assert acted[1] == pytest.approx(90)
    assert acted[0] + learner.student_nfe == 20 * 8 + 300
    assert 20 * counted.student_nfe == pytest.approx(20 * 8 + 210)


def test_the_levels_of_a_random_j_cost_their_mean() -> None:
    config = run(DMD2, 1.0, num_updates=5, beta=OWN).config
    each = [forwards(config, j=j).student for j in range(4)]
    assert forwards(config).student == pytest.approx(sum(each) / 4)


def test_a_backward_is_two_forwards_and_checkpointing_a_third() -> None:
    counted = Forwards(10, 5, 1, 2, 3)
    assert (counted.work(), counted.work(checkpointing=True)) == (31, 36)


def test_the_networks_figures_are_those_of_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        with FlopCounterMode(display=False) as once, torch.no_grad():
            sample = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
            unet(*sample)
        with FlopCounterMode(display=False) as both:
            unet(*sample).sample.sum().backward()
    assert sum(p.numel() for p in unet.parameters()) == SD15.parameters
    assert once.get_total_flops() == SD15.flops
    assert both.get_total_flops() == pytest.approx(3 * SD15.flops, rel=2e-3)


def test_memory_and_bytes_by_hand() -> None:
    config, network = example(), Network(1000, 1.0)
    assert memory(config, network) == {"teacher": 2000, "student": 16000, "critic": 16000, "average": 4000}
    assert memory(config, network, ranks=4) == {"teacher": 2000, "student": 4000, "critic": 4000, "average": 1000, "gathered": 8000}
    assert moved(config, network, 1) == moved(config, network, 1, sharded=True) == 0
    assert moved(config, network, 4) == pytest.approx(2 * 3 / 4 * 4000 * (1 + 1 / 10))  # critic in each update, student in the tenth


def test_what_a_backward_hides_is_no_time() -> None:
    slow, fast = Cluster(inside=1e9), Cluster(inside=1e15, latency=0)
    assert all_reduce(SD15, 1, slow) == 0
    assert update_seconds(example(), SD15, 8, fast)["reduce"] == 0
    assert update_seconds(example(), SD15, 8, slow)["reduce"] > 1
    assert update_seconds(example(), SD15, 8, slow)["compute"] == update_seconds(example(), SD15, 1, slow)["compute"]


def test_the_page_shows_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "reference" / "scaling.md").read_text()
    assert tables([1, 8, 64, 256], Cluster()) in page
