"""The schedule `adaptive`: shares that follow the alignment of gradients on new states of each source."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import guided, weights
from line_world import Steersman

from ddil_agents import DMD2, Batch, Beta, Dagger, DaggerConfig, DMD2Config, GailConfig
from ddil_agents.gail import Gail
from ddil_agents.states.adaptive import AdaptiveShares
from ddil_agents.states.beta import ADAPTIVE_FLOOR
from ddil_agents.training.alignment import align_gradients

BETA = Beta(0.5, 0.1, 0.4, schedule="adaptive")


def config(**settings: Any) -> DaggerConfig:
    return DaggerConfig(**{"num_updates": 40, "updates_per_collect": 8, "num_steps": 2, "teacher_steps": 4, "beta": BETA, **settings})


def test_shares_follow_the_integral_of_the_alignment() -> None:
    shares = AdaptiveShares(BETA)
    assert shares() == pytest.approx([floored(share) for share in BETA.shares])  # at the start
    shares.update((-0.2, 0.1, 0.6), 25, 100)
    shares.update((0.4, 0.0, 0.8), 75, 100)
    z = [20 * (0.25 * a + 0.5 * b) for a, b in ((-0.2, 0.4), (0.1, 0.0), (0.6, 0.8))]  # 40 · decay = 20
    factors = [share * math.exp(x) for share, x in zip(BETA.shares, z, strict=True)]
    assert shares() == pytest.approx([floored(w / sum(factors)) for w in factors])
    assert sum(shares()) == pytest.approx(1)
    before = shares()
    shares.update((0.0, 0.0, 1.0), 100, 400)  # the run was made longer: what has been learnt is not taken back
    assert shares()[2] > before[2]


def floored(share: float) -> float:
    return ADAPTIVE_FLOOR + (1 - 3 * ADAPTIVE_FLOOR) * share


def test_shares_keep_to_their_floors_and_absent_sources_stay_absent() -> None:
    shares = AdaptiveShares(Beta(0.5, 0, 0.5, schedule="adaptive"))
    shares.update((-1000.0, 1000.0, 1000.0), 1, 1)
    assert shares() == pytest.approx((ADAPTIVE_FLOOR, 0, 1 - ADAPTIVE_FLOOR))
    assert Beta(0.5, 0, 0.5, schedule="adaptive").largest_shares() == pytest.approx([1 - ADAPTIVE_FLOOR, 0, 1 - ADAPTIVE_FLOOR])
    with pytest.raises(FloatingPointError, match="the gradient on new forward states is not finite"):
        shares.update((math.nan, 0.0, 0.0), 1, 1)


def test_alignment_is_the_first_order_change_of_the_loss_on_own_states() -> None:
    agent = Dagger(guided(), config())
    states = agent.trainer.collect()
    a = align_gradients(agent, states)
    student, of = agent.networks["student"], [states[states["source"] == i][:64] for i in range(3)]

    def mean_loss(rows: Any) -> torch.Tensor:
        return agent.loss(Batch(rows)).mean()

    parameters = list(student.parameters())
    halves = [torch.autograd.grad(mean_loss(of[2][i::2]), parameters) for i in (0, 1)]
    own = [(x + y) / 2 for x, y in zip(*halves, strict=True)]
    norms = math.prod(math.sqrt(sum(float(x.square().sum()) for x in half)) for half in halves)
    for i in (0, 1):  # d/dη of the own loss after a step of size η on source i
        g = torch.autograd.grad(mean_loss(of[i]), parameters)
        assert a[i] == pytest.approx(sum(float((x * y).sum()) for x, y in zip(g, own, strict=True)) / norms, rel=1e-4)
    assert a[2] == pytest.approx(sum(float((x * y).sum()) for x, y in zip(*halves, strict=True)) / norms, rel=1e-4)
    assert all(p.grad is None for p in parameters)


def test_a_run_follows_its_gradients_and_resumes_to_the_same_shares(tmp_path: Path) -> None:
    whole = Dagger(guided(), config()).learn(out=tmp_path / "whole", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["beta"] != rows[-1]["beta"]
    assert sum(rows[-1]["beta"].values()) == pytest.approx(1)
    assert whole.beta() != BETA.shares
    saved = Dagger(guided(), config()).learn(20, progress=False)
    saved.save(tmp_path / "saved")
    loaded = Dagger(guided(), config()).load(tmp_path / "saved")
    saved.learn(20, progress=False)
    loaded.learn(20, progress=False)
    assert loaded.beta() == saved.beta()
    assert torch.equal(weights(loaded.networks["student"]), weights(saved.networks["student"]))


def test_a_student_that_cannot_realise_the_expert_moves_to_its_own_states() -> None:
    # One hidden unit cannot steer at all distances; the demonstrations lie at distances that its own episodes leave at once.
    settings = {"num_updates": 200, "beta": Beta(0.5, 0, 0.5, schedule="adaptive"), "student": {"width": 1, "depth": 1}}
    agent = Dagger(Steersman(), config(**settings, learning_rate=0.01)).learn(progress=False)
    assert agent.beta()[2] > 0.6


def test_what_has_no_comparable_error_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="give the student and one of the others a share"):
        Beta(0.5, 0.5, 0, schedule="adaptive")
    with pytest.raises(ValueError, match="the loss of dmd2 is no error that sources can be compared by"):
        DMD2(guided(), DMD2Config(beta=BETA))
    with pytest.raises(ValueError, match="the loss of gail is no error"):
        Gail(guided(), GailConfig(beta=replace(BETA, forward=0.0, teacher=0.5, student=0.5)))
