"""DART: its states and labels, and what it equals without noise."""

from __future__ import annotations

import pytest
import torch
from helpers import CORNERS, MIXTURE, K, N, corners, fields, labelled, learn, make, only, stream, weights

from ddil_agents import BehaviourCloning, Beta
from ddil_agents.dart import Dart
from ddil_env import ExpertPolicy, GaussianMixtureExpert

pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.mark.parametrize("beta", [Beta(), Beta(0.5, 0.5, 0)])
def test_dart_without_noise_is_behaviour_cloning(beta: Beta) -> None:
    disturbed, plain = learn(make(Dart, perturbation=0.0, beta=beta)), learn(make(BehaviourCloning, beta=beta))
    assert torch.equal(weights(disturbed.student), weights(plain.student))
    assert torch.equal(weights(disturbed.ema_student), weights(plain.ema_student))
    assert not torch.equal(weights(learn(make(Dart, beta=beta)).student), weights(plain.student))


@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("expert", [corners(), labelled(), GaussianMixtureExpert(CORNERS, 0.25, schedule="flow")])
def test_darts_forward_states_are_ning_et_als_and_its_labels_the_experts_there(expert: GaussianMixtureExpert, gamma: float) -> None:
    learner = make(Dart, expert, perturbation=gamma)
    x_t, t, s, c, _, x_s = fields(learner.collector.collect(30, only(0), 0))
    x_0, _ = expert.sample_data(30, stream("data"))
    eps, xi = torch.randn(30, 2, generator=stream("noise")), torch.randn(30, 2, generator=stream("disturbance"))
    alpha, sigma = expert.schedule(t, x_0)
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * (eps + gamma * xi))  # y = √ᾱ x_0 + √(1 − ᾱ) (ε + γ ξ)
    torch.testing.assert_close(x_s, ExpertPolicy(expert, K).act(x_t, t, s, c))


def test_darts_teacher_disturbs_what_it_does_and_labels_what_it_would_have_done() -> None:
    learner = make(Dart, perturbation=0.3, beta=Beta(0, 1, 0), states_per_rollout="all")
    states = learner.collector.collect(5 * N, only(1), 0)
    x, x_s, t = (states[key].unflatten(0, (5, N)) for key in ("x_t", "x_s", "t"))
    draws = stream("disturbance")
    for i in range(N - 1):
        _, sigma = learner.expert.schedule(t[:, i + 1], x[:, 0])
        torch.testing.assert_close(x[:, i + 1], x_s[:, i] + sigma * 0.3 * torch.randn(5, 2, generator=draws))
    torch.testing.assert_close(x_s.flatten(0, 1), ExpertPolicy(learner.expert, K).act(*fields(states)[:3]))
    assert torch.equal(x[:, 0], torch.randn(5, 2, generator=stream("rollout")))


def test_a_state_of_darts_teacher_is_where_its_disturbed_rollout_stops() -> None:
    learner = make(Dart, perturbation=0.3, beta=Beta(0, 1, 0))
    states = learner.collector.collect(2 * N, only(1), 0)
    rollouts, draws, times = stream("rollout"), stream("disturbance"), learner.grid.times
    x = torch.randn(2 * N, 2, generator=rollouts)
    for i in range(N - 1):  # two rollouts stop at each time
        on = 2 * (N - 1 - i)
        t, u = times[i].expand(on), times[i + 1].expand(on)
        _, sigma = learner.expert.schedule(u, x[:on])
        x[:on] = ExpertPolicy(learner.expert, K).act(x[:on], t, u) + sigma * 0.3 * torch.randn(on, 2, generator=draws)
    order = torch.rand(2 * N, generator=rollouts).argsort()
    torch.testing.assert_close(states["x_t"], x[order])
    assert torch.equal(states["t"], times[:-1].flip(0).repeat_interleave(2)[order])
    torch.testing.assert_close(states["x_s"], ExpertPolicy(learner.expert, K).act(*fields(states)[:3]))


def test_dart_sees_no_student_states() -> None:
    with pytest.raises(ValueError, match=r"beta.student=0.4: behaviour cloning sees no student states"):
        make(Dart, beta=MIXTURE)


@pytest.mark.parametrize(("noise", "message"), [("execution_noise", "has no world"), ("condition_noise", "conditions are ids here")])
def test_noise_of_a_world_is_refused_without_one(noise: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{noise}=0.1: .*{message}"):
        make(Dart, **{noise: 0.1})
    with pytest.raises(ValueError, match=f"{noise}=-1: need a finite number ≥ 0"):
        make(Dart, **{noise: -1})
