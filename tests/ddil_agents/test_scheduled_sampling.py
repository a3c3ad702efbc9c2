"""Scheduled sampling: the expert's share of the steps, and what it equals at its ends."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import MIXTURE, N, learn, make, same, weights

from ddil_agents import Dagger
from ddil_agents.scheduled_sampling import ScheduledSampling

pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("constant", [0.05, 0.05, 0.05]),
        ("linear", [1, 0.5, 0.05]),
        ("exponential", [1, math.exp(-5), 0.05]),
        ("inverse_sigmoid", [math.exp(5) / (math.exp(5) + 1), 0.5, 0.05]),
    ],
)
def test_the_experts_share_of_the_steps_falls_to_its_floor(mixing: str, expected: list[float]) -> None:
    learner = make(ScheduledSampling, mixing=mixing, p_expert=0.05, num_updates=100)
    shares = []
    for step in (0, 50, 100):
        learner.step = step
        shares.append(learner.p_expert())
    assert shares == pytest.approx([max(p, 0.05) for p in expected])


def test_the_inverse_sigmoid_is_bengios() -> None:
    rate = 6.0
    k = math.exp(rate / 2)
    length = k * rate  # of the run in Bengio's iterations i, ε_i = k/(k + e^(i/k))
    learner = make(ScheduledSampling, mixing="inverse_sigmoid", mixing_rate=rate, num_updates=12)
    for step in range(13):
        learner.step = step
        i = length * step / 12
        assert learner.p_expert() == pytest.approx(k / (k + math.exp(i / k)))


def test_rollouts_begin_as_the_experts_and_end_as_the_students() -> None:
    learner = make(ScheduledSampling, num_updates=10, collect_size=400)
    shares = []
    for step in range(11):
        learner.step = step
        states = learner.trainer.collect()
        steps = int((learner.grid.times > states["t"][:, None]).sum())
        assert steps == 400 * (N - 1) / 2
        shares.append(int(states["actors"].sum()) / steps)
    assert shares[0] == 1
    assert shares[-1] == 0
    for i, share in enumerate(shares):
        p = 1 - i / 10
        assert abs(share - p) <= 4 * (p * (1 - p) / 600) ** 0.5


@pytest.mark.parametrize("p_expert", [0.0, 0.3, 1.0])
def test_scheduled_sampling_at_a_constant_share_is_dagger(p_expert: float) -> None:
    scheduled, plain = (learn(make(agent, p_expert=p_expert, beta=MIXTURE, **own)) for agent, own in (
        (ScheduledSampling, {"mixing": "constant"}), (Dagger, {}),
    ))  # fmt: skip
    assert torch.equal(weights(scheduled.student), weights(plain.student))
    assert same(scheduled.buffer.state_dict(), plain.buffer.state_dict())
