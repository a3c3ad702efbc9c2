"""The states of distribution matching, by hand, and how they are collected and replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import ALL, FORWARD, MEANS, STUDENT, TEACHER, flow, guided, learn, matching, space, stream, video
from tensordict import TensorDict
from torch import Tensor

from ddil_agents import DMD2, Beta
from ddil_env import Expert, GaussianMixtureExpert

everywhere = pytest.mark.parametrize("make", [space, guided, video, flow])


pytestmark = pytest.mark.usefixtures("own_generator")


@everywhere
@pytest.mark.parametrize("beta", [FORWARD, TEACHER, STUDENT], ids=["forward", "teacher", "student"])
def test_the_first_steps_state_is_pure_noise_whatever_the_source(make: Callable[[], Expert], beta: Beta) -> None:
    learner = matching(make(), beta=beta, noise_level=1000.0, batch_size=5)
    states = learner.trainer.collect()
    drawn = torch.randn(5, *learner.expert.sample_shape, generator=stream("noise" if beta.forward else "rollout"))
    assert torch.equal(states["x_t"], drawn)
    assert (states["t"] == learner.expert.schedule.t_max).all()
    assert not states["actors"].any()


def test_forward_states_are_independent_of_the_data_at_the_first_step_alone() -> None:
    class Elsewhere(GaussianMixtureExpert):
        def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
            x_0, c = super().sample_data(n, generator)
            return x_0 + 7, c

    for level, equal in ((999.0, True), (500.0, False)):
        here, there = (matching(cls(MEANS, 0.2), beta=FORWARD, noise_level=level).collect() for cls in (GaussianMixtureExpert, Elsewhere))
        assert torch.equal(here["x_t"], there["x_t"]) == equal


@everywhere
@pytest.mark.parametrize("n", [4, 7])  # as many as the latent is wide, and not
def test_forward_states_are_data_diffused_to_the_step(make: Callable[[], Expert], n: int) -> None:
    learner = matching(make(), beta=FORWARD, noise_level=500.0, batch_size=n)
    expert, states = learner.expert, learner.trainer.collect()
    x_0, c = expert.sample_data(n, stream("data"))
    eps = torch.randn(x_0.shape, generator=stream("noise"))
    assert torch.equal(states["x_t"], expert.schedule.add_noise(x_0, eps, states["t"]))
    assert c is None or torch.equal(states["c"], c)


def by_hand(learner: DMD2, n: int, j: int, p_expert: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """x_{t_j}, c and who acted: the student renoises its x̂_0 at every step, the expert takes its DDIM steps."""
    expert, generator, k = learner.expert, stream("rollout"), learner.config.substeps
    x = torch.randn(n, *expert.sample_shape, generator=generator)
    c = expert.sample_condition(n, generator)
    by_expert = torch.rand(n, j, generator=stream("path")) < p_expert
    broadcast = (-1, *(1,) * len(expert.sample_shape))
    for i, (t, s) in enumerate(pairwise(learner.grid.times.tolist()[: j + 1])):
        theirs, strides = x, [t + (s - t) * m / k for m in range(k + 1)]
        for now, then in pairwise([math.ceil(u) if expert.schedule.discrete else u for u in strides]):
            theirs = expert.guided(theirs, torch.full((n,), now), c).latent(torch.full((n,), then))
        if not by_expert[:, i].all():
            with torch.no_grad():
                x_0 = learner.student.predict(x, torch.full((n,), t), c).x_0
            noise = torch.zeros(x.shape)  # drawn where the student acts alone
            noise[~by_expert[:, i]] = torch.randn(int((~by_expert[:, i]).sum()), *expert.sample_shape, generator=generator)
            own = expert.schedule.add_noise(x_0, noise, torch.full((n,), s))
            theirs = torch.where(by_expert[:, i].reshape(broadcast), theirs, own)
        x = theirs
    return x, c, by_expert


@everywhere
@pytest.mark.parametrize("n", [4, 7])
@pytest.mark.parametrize("j", [1, 3])
@pytest.mark.parametrize(("beta", "p_expert"), [(STUDENT, 0.0), (STUDENT, 0.5), (TEACHER, 0.0)], ids=["student", "mixed", "teacher"])
def test_backward_simulation_by_hand(make: Callable[[], Expert], n: int, j: int, beta: Beta, p_expert: float) -> None:
    learner = matching(make(), beta=beta, p_expert=p_expert, noise_level=999 - 250.0 * j, batch_size=n)
    states, spent = learner.trainer.collect(), learner.expert.nfe
    x, c, by_expert = by_hand(learner, n, j, 1.0 if beta.teacher else p_expert)
    torch.testing.assert_close(states["x_t"], x, atol=2e-4, rtol=1e-4)  # the student's x̂_0 is read back from its action
    assert torch.equal(states["t"], learner.grid.times[j].expand(n))
    assert torch.equal(states["s"], learner.grid.times[j + 1].expand(n))
    assert torch.equal(states["actors"][:, :j], by_expert)
    assert not states["actors"][:, j:].any()
    assert spent == int(states["nfe"].sum()) == int(by_expert.sum()) * learner.expert_policy.nfe_per_action
    assert c is None or torch.equal(states["c"], c)
    assert not any(value.requires_grad for value in states.values())


@pytest.mark.parametrize(("level", "time"), [(1000, 999), (900, 999), (800, 749), (500, 499), (499, 499), (380, 499), (370, 249), (0, 249)])
def test_a_noise_level_is_the_grids_nearest_time_in_every_collection(level: float, time: float) -> None:
    learner = matching(noise_level=float(level), beta=ALL)
    for _ in range(3):
        assert (learner.trainer.collect()["t"] == time).all()


def test_one_step_is_drawn_for_each_collection_and_all_are_as_likely() -> None:
    learner = matching(beta=ALL, batch_size=4, student={"width": 4, "depth": 1}, teacher_steps=4)
    generator, counts = stream("time"), [0, 0, 0, 0]
    for _ in range(200):
        t = learner.collector.collect(4, learner.beta(), 0)["t"]
        j = int(torch.randint(4, (1,), generator=generator))
        assert (t == learner.grid.times[j]).all()
        counts[j] += 1
    assert max(abs(count - 50) for count in counts) < 4 * math.sqrt(200 * 0.25 * 0.75)


def test_each_collection_is_one_batch_and_its_shares_are_those_of_beta() -> None:
    learner = matching(beta=ALL, batch_size=10, noise_level=999.0)
    counts = torch.zeros(3)
    for _ in range(100):
        states = learner.trainer.collect()
        assert len(states) == 10
        counts += torch.bincount(states["source"].long(), minlength=3)
        assert torch.equal(learner.draw()["x_t"], states["x_t"])
    for count, share in zip(counts.tolist(), learner.beta(), strict=True):
        assert abs(count - 1000 * share) < 4 * math.sqrt(1000 * share * (1 - share))
    assert len({tuple(learner.collector.counts(10, (0.5, 0.2, 0.3))) for _ in range(20)}) > 3


@pytest.mark.parametrize("on_policy", [True, False])
def test_states_are_replayed_unless_on_policy(on_policy: bool) -> None:
    learner = matching(on_policy=on_policy, beta=ALL, num_updates=8)
    versions: list[set[int]] = []
    update = learner.trainer.update

    def seen(batch: TensorDict) -> dict[str, Tensor]:
        assert len(batch) == 8
        versions.append(set(batch["version"].tolist()))
        return update(batch)

    learner.trainer.update = seen  # type: ignore[method-assign]
    learn(learner)
    if on_policy:
        assert versions == [{i} for i in range(8)]
    else:
        assert set.union(*versions) == {0, 2, 4, 6}  # 16 states after each second update
        assert max(map(len, versions)) > 1
