"""GAIL: both players' losses, what moves whom, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import K, N, fields, labelled, learn, make, weights
from tensordict import TensorDict
from torch.nn.functional import softplus

from ddil_agents import Beta
from ddil_agents.gail import Discriminator, Gail
from ddil_agents.states.batch import Batch
from ddil_env import GaussianMixtureExpert, invert_ddim

pytestmark = pytest.mark.usefixtures("own_generator")


def played(**changed: Any) -> tuple[Any, TensorDict]:
    """A learner, and a batch whose student actions are known."""
    learner = make(Gail, labelled(), **changed)
    learner.trainer.collect()
    batch = learner.draw()
    return learner, batch


def test_gails_losses_are_softplus_of_what_the_discriminator_says() -> None:
    learner, batch = played(gradient_penalty=2.0)
    network = learner.networks["discriminator"]
    loss = learner.loss(Batch(batch))
    x_t, t, s, c, _, x_s = fields(batch)
    alpha, sigma = (a[:, None].float() for a in learner.expert.schedule.coefficients(t))
    weight = (alpha / sigma).clamp(min=1)
    own = weight * learner.student(x_t, t, c).x_0.detach()
    torch.testing.assert_close(loss, softplus(-network(x_t, t, own, c)))
    expert = weight * invert_ddim(learner.expert.schedule, x_t, t, x_s, s).x_0
    of_discriminator = learner.discriminator_loss(Batch(batch))
    for i in range(len(batch)):
        row = slice(i, i + 1)
        a = expert[row].clone().requires_grad_()
        real = network(x_t[row], t[row], a, c[row])
        (slope,) = torch.autograd.grad(real, a)
        fake = network(x_t[row], t[row], own[row], c[row])
        expected = softplus(-real) + softplus(fake) + 2.0 * 2 / 2 * slope.square().sum()  # γ d/2 ‖∂D/∂a*‖²
        torch.testing.assert_close(of_discriminator[row], expected, atol=1e-5, rtol=1e-5)


def test_each_player_moves_only_itself_and_the_student_through_its_action() -> None:
    learner, batch = played()
    student, other = learner.networks["student"], learner.networks["discriminator"]
    learner.loss(Batch(batch)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.network.layers.parameters())
    student.zero_grad(set_to_none=True)
    other.zero_grad(set_to_none=True)
    learner.discriminator_loss(Batch(batch)).mean().backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in other.parameters())
    before = weights(other)
    learner.trainer.trainables["discriminator"].step = lambda: torch.zeros(())
    learner.trainer.update(batch)
    assert torch.equal(weights(other), before)


def test_unpaired_gail_asks_nothing_of_the_students_states() -> None:
    paired, unpaired = (make(Gail, paired=p, collect_size=64) for p in (True, False))
    led = 32 * (N - 1) // 2  # the teacher's steps to its own states
    for learner, price in ((paired, (64 + led) * K), (unpaired, (32 + led) * K)):
        states = learner.trainer.collect()
        assert learner.teacher_nfe == learner.expert.nfe == int(states["nfe"].sum()) == price
        asked = (states["source"] == 1) | (learner is paired)
        assert torch.equal(states["nfe"], K * (asked + states["actors"].sum(1)))
    batch = unpaired.draw()
    of_expert, of_student = unpaired.state_weights(Batch(batch))
    assert torch.equal(of_expert > 0, batch["source"] == 1)
    assert torch.equal(of_student > 0, batch["source"] == 2)
    assert (float(of_expert.mean()), float(of_student.mean())) == pytest.approx((1, 1))
    assert all(float(share.sum()) == 0 for share in (unpaired.state_weights(Batch(batch[batch["source"] == 1]))[1],))


@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 8, 8), (2, 1, 4, 4)])
@pytest.mark.parametrize("n", [2, 5])
def test_the_discriminator_says_one_number_a_transition_of_any_shape(shape: tuple[int, ...], n: int) -> None:
    expert = GaussianMixtureExpert(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), 0.2, labels=[0, 1, 1])
    network = Discriminator(expert, 8)
    x, action = torch.randn(2, n, *shape, generator=torch.Generator().manual_seed(1))
    t, c = torch.linspace(1, 999, n), torch.arange(n) % 2
    together = network(x, t, action, c)
    assert together.shape == (n,)
    for i in range(n):
        row = slice(i, i + 1)
        torch.testing.assert_close(network(x[row], t[row], action[row], c[row]), together[row], atol=1e-5, rtol=1e-5)
    others = network(action, t, x, c), network(x, t - 1, action, c), network(x, t, action, 1 - c)
    assert all((other - together).abs().min() > 0 for other in others)


def test_gail_counts_its_discriminators_forwards() -> None:
    learner = learn(make(Gail, num_updates=4, collect_size=32, beta=Beta(0, 1, 0)))
    assert learner.student_nfe == 4 * 16 * (1 + 3)  # the student's, and D on a_θ twice, on a* once


def test_gails_accumulated_gradients_give_the_weights_of_the_whole_batch() -> None:
    whole, accumulated = (learn(make(Gail, gradient_accumulation=parts)) for parts in (1, 4))
    for name in ("student", "discriminator"):
        torch.testing.assert_close(weights(accumulated.networks[name]), weights(whole.networks[name]), atol=1e-4, rtol=0)
