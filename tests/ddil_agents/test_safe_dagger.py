"""SafeDAgger: where its gate opens, and what its budget buys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import MIXTURE, K, N, corners, fields, labelled, learn, make, only, same, settings, weights

from ddil_agents import Beta, Dagger
from ddil_agents.aggrevate import Aggrevate
from ddil_agents.safe_dagger import GatedCollector, SafeDagger, SafeDaggerConfig
from ddil_env import ExpertPolicy, GaussianMixtureExpert

pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.mark.parametrize(
    "changed", [{"beta": MIXTURE}, {"beta": Beta(0, 0, 1), "p_expert": 0.3}, {"beta": Beta(0.3, 0, 0.7, schedule="linear")}]
)
def test_an_open_gate_without_a_budget_is_dagger(changed: dict[str, Any]) -> None:
    gated, plain = learn(make(SafeDagger, gate=1.0, **changed)), learn(make(Dagger, **changed))
    assert torch.equal(weights(gated.student), weights(plain.student))
    assert same(gated.buffer.state_dict(), plain.buffer.state_dict())
    assert (gated.teacher_nfe, gated.student_nfe) == (plain.teacher_nfe, plain.student_nfe)


@pytest.mark.parametrize("make_expert", [corners, labelled])
@pytest.mark.parametrize("source", [0, 2])
@pytest.mark.parametrize("glance", [1, 3])
def test_the_gate_opens_where_a_glance_finds_most(make_expert: Callable[[], GaussianMixtureExpert], source: int, glance: int) -> None:
    gated = make(SafeDagger, expert := make_expert(), gate=0.25, check_substeps=glance, teacher_steps=16)
    everywhere = make(Dagger, make_expert(), teacher_steps=16).collector.collect(48, only(source), 0)
    x_t, t, s, c, *_ = fields(everywhere)
    own = gated.collector.student_policy.act(x_t, t, s, c)
    d = (own - ExpertPolicy(make_expert(), glance).act(x_t, t, s, c)).square().mean(1)
    relative = torch.stack([d[i] / d[t == t[i]].mean() for i in range(48)])
    most = sorted(relative.argsort(descending=True)[:12].tolist())
    states = gated.collector.collect(48, only(source), 0)
    for key in ("x_t", "t", "s", "x_s", "actors"):
        torch.testing.assert_close(states[key], everywhere[key][most], atol=1e-6, rtol=1e-5)
    pair = 1 if c is None else 2
    assert expert.nfe == pair * (48 * glance + 12 * 4)
    assert (states["nfe"] == pair * (glance + 4)).all()


def test_the_teachers_own_states_are_not_gated() -> None:
    gated, plain = make(SafeDagger, gate=0.1), make(Dagger)
    a, b = (learner.collector.collect(40, only(1), 0) for learner in (gated, plain))
    assert all(torch.equal(a[key], b[key]) for key in b.keys())  # noqa: SIM118
    assert gated.expert.nfe == int(a["nfe"].sum()) == 40 * K * (N + 1) / 2


@pytest.mark.parametrize(
    ("expert", "gate", "beta"),
    [(corners, 0.3, MIXTURE), (labelled, 0.3, Beta(0, 0, 1)), (corners, 1.0, Beta(0, 0, 1)), (labelled, 1.0, MIXTURE)],
)
def test_a_budget_is_spent_and_never_exceeded(expert: Callable[[], GaussianMixtureExpert], gate: float, beta: Beta) -> None:
    endless = learn(make(SafeDagger, expert(), gate=gate, beta=beta, num_updates=32))
    for share in (0.5, 1.0):
        budget = max(int(share * endless.teacher_nfe), 200)
        learner = learn(make(SafeDagger, expert(), gate=gate, beta=beta, num_updates=32, query_budget=budget))
        assert learner.step == 32
        assert learner.teacher_nfe == learner.expert.nfe <= budget
        collection = 32 * learner.expert_policy.nfe_per_action * 3 / 2
        assert learner.teacher_nfe > budget - collection
        if share == 1:
            assert torch.equal(weights(learner.student), weights(endless.student))


@pytest.mark.parametrize(
    "changed", [{"gate": 0.3}, {"gate": 1.0, "p_expert": 0.5}, {"gate": 0.3, "states_per_rollout": "all"}], ids=["gated", "mixed", "all"]
)
def test_the_price_of_a_collection_is_known_before_it_is_paid(changed: dict[str, Any]) -> None:
    learner = make(SafeDagger, labelled(), beta=MIXTURE, **changed)
    collector = learner.collector
    assert isinstance(collector, GatedCollector)
    told: list[int] = []
    price = collector.count_teacher_forwards
    collector.count_teacher_forwards = lambda counts: told.append(price(counts)) or told[-1]  # type: ignore[method-assign, func-returns-value]
    for _ in range(7):
        before = learner.expert.nfe
        learner.trainer.collect()
        assert learner.expert.nfe - before == told[-1]


# Of 16, 3 and 12 states, by source; the teacher takes 4 steps to its 3, of the 0 to 9 that there can be.
@pytest.mark.parametrize(
    ("changed", "price"), [({"gate": 1.0}, 2 * (31 + 4)), ({"gate": 0.25, "beta": Beta(0, 0, 1)}, 32 + 16), ({}, 28 + 2 * (14 + 3 + 4))]
)
def test_a_budget_below_the_first_collection_is_refused(changed: dict[str, Any], price: int) -> None:
    told = f"query_budget={price - 1}: the first collection, of 32 states, takes {price} forwards of the teacher; raise it, or"
    with pytest.raises(ValueError, match=told):
        make(SafeDagger, query_budget=price - 1, **changed)
    assert learn(make(SafeDagger, query_budget=price, **changed)).teacher_nfe == price


def test_a_budget_holds_where_states_have_a_guidance_of_their_own() -> None:
    guided = {"guidance_range": (1.0, 4.0), "num_updates": 32}
    learner = learn(make(SafeDagger, labelled(), query_budget=300, **guided))
    assert 200 < learner.teacher_nfe == learner.expert.nfe <= 300
    completed = make(Aggrevate, labelled(), **guided)
    states = completed.collector.collect(40, only(2), 0)
    assert int(states["nfe"].sum()) == completed.expert.nfe > 0


def test_a_student_that_is_judged_asks_nothing() -> None:
    judged = SafeDaggerConfig(**settings(gate=0.3, query_budget=10)).for_evaluation()
    assert (judged.gate, judged.query_budget, judged.init) == (1.0, None, None)
    assert replace(judged, teacher_steps=judged.num_steps).substeps == 1  # as where stages end in steps that do not divide the teacher's
