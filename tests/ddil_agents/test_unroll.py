"""`--unroll k`: the loss that flows through k denoisings in a row, in a differentiable world."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import guided
from line_world import Line, Steersman
from torch import Tensor

from ddil_agents import BCConfig, BehaviourCloning, Beta, Dagger, DaggerConfig
from ddil_agents.commands.plan import forwards
from ddil_env import unroll
from ddil_env.worlds import Autoregressive, Fork, World

BETA = Beta(0.5, 0, 0.5)


def agent(k: int, **settings: Any) -> Dagger:
    settings = {"num_steps": 2, "teacher_steps": 4, "beta": BETA, "unroll": k, "student": {"width": 4, "depth": 1}, **settings}
    return Dagger(Steersman(wall=1.5), DaggerConfig(**settings))


def worlds() -> list[World]:
    def initial(generators: Any) -> Tensor:
        return torch.stack([torch.randn(2, 3, generator=generator) for generator in generators])

    return [
        Fork(64, num_rows=3),
        Autoregressive(64, initial, (3,), history=2, num_frames=40, increment=0.3, bound=2.0),
        Autoregressive(64, initial, (3,), history=2, num_frames=40),
        Line(64, wall=2.0),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_transition_is_what_the_world_does(number: int) -> None:
    world, generator = worlds()[number], torch.Generator().manual_seed(0)
    c, seen = world.reset([torch.Generator().manual_seed(i) for i in range(64)]), 0
    rows = torch.arange(64)
    for _ in range(world.num_frames - 1):
        x_0 = torch.randn(len(rows), *world.sample_shape, generator=generator) + torch.tensor(1.0 if number == 0 else 0.0)
        following, ended = world.transition(c, x_0)
        c, reward, done = world.step(x_0, rows.tolist())
        last_row = done & ~ended  # a board's last row ends an episode, which its condition does not know
        assert torch.equal(done & ~last_row, ended)
        assert not (last_row & (reward < 1)).any()
        torch.testing.assert_close(following[~done], c[~done], atol=2e-6, rtol=0)
        rows, c, seen = rows[~done], c[~done], seen + int(ended.sum())
        if not len(rows):
            break
    assert seen > 5 or number == 2


def test_the_gradient_is_that_of_the_whole_chain() -> None:
    learner = agent(3)
    c_0 = 0.5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
    stream = learner.collector.streams["loss"]
    state = stream.get_state()
    weights = list(learner.networks["student"].parameters())
    found = torch.autograd.grad(learner.unrolled_error(c_0).mean(), weights)

    stream.set_state(state)
    error, c, running = torch.zeros(32), c_0, torch.ones(32, dtype=torch.bool)
    for _ in range(3):
        x = x_T = torch.randn(32, 2, generator=stream)
        label = unroll(learner.expert_policy, learner.grid, x_T, c.detach())[:, -1]
        for t, s in pairwise(learner.grid.times):
            x = learner.student(x, t.expand(32), c).latent(s.expand(32), learner.expert.schedule)
        error = error + running * (x - label).square().mean(1)
        c = c + x
        running = running & (c.detach().abs() <= 1.5).all(1)
    assert 0 < int(running.sum()) < 32  # some episodes ended, and their later terms do not count
    expected = torch.autograd.grad(error.mean() / 3, weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_it_is_learnt_and_counted_as_planned() -> None:
    learner = agent(2, num_updates=48, updates_per_collect=16, batch_size=16, collect_size=64, learning_rate=0.01)
    c = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = float(learner.unrolled_error(c).mean())
    calls = learner.expert.nfe, learner.student_nfe
    learner.learn(progress=False)
    planned = forwards(learner.config, beta=BETA.shares)
    assert learner.expert.nfe - calls[0] == pytest.approx(48 * planned.teacher)
    visits = learner.collector.world_steps * 2  # whole episodes, of which a part is labelled
    rest = planned.student_nfe - planned.student + 16 * 2 * 2  # without rollouts
    assert learner.student_nfe - calls[1] - visits == pytest.approx(48 * rest)
    with torch.no_grad():
        assert float(learner.unrolled_error(c).mean()) < 0.7 * before


def test_what_it_needs_is_checked_before_training() -> None:
    with pytest.raises(ValueError, match="unroll=1: the gradient flows through a differentiable world, and GaussianMixtureExpert has none"):
        Dagger(guided(), DaggerConfig(unroll=1))
    with pytest.raises(ValueError, match="unroll=1: bc trains on data alone"):
        BehaviourCloning(Steersman(), BCConfig(unroll=1))
    with pytest.raises(ValueError, match=r"unroll=1\.5: need a whole number of at least 0"):
        DaggerConfig(unroll=1.5)
    with pytest.raises(ValueError, match="is not differentiable"):
        World.transition(Fork(1), torch.zeros(1, 2), torch.zeros(1, 2))
