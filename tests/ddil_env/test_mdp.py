"""Kernels and rewards of the diffusion MDP."""

from __future__ import annotations

import math
from typing import Any, get_args

import gymnasium
import numpy as np
import pytest
import torch
from helpers import latents, mixture

from ddil_env import DenoisingEnv, DenoisingGymEnv, DenoisingMDP, DenoisingVectorEnv, ExpertPolicy, NoiseSchedule
from ddil_env.mdp import LOGLIK_MIN_STD, Kernel, State

KERNELS = get_args(Kernel)


@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
def test_the_ddim_kernel_puts_the_action_in_place(schedule: Any) -> None:
    env = DenoisingGymEnv(mixture(schedule=schedule))
    env.reset(seed=0)
    action = np.array([3.0, -4.0], np.float32)
    assert np.array_equal(env.step(action)[0]["x_t"], action)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
def test_the_renoise_kernel_diffuses_the_actions_estimate_anew(schedule: Any) -> None:
    mdp = DenoisingMDP(mixture(schedule=schedule), 4, kernel="renoise")
    t = torch.cat([mdp.grid.times[:-1], torch.tensor([600.0])])
    x_t, x_0, fresh, c = latents(5, 2), latents(5, 2, seed=2), latents(5, 2, seed=3), torch.zeros(5, dtype=torch.int64)
    state = State(x_t, t, mdp.grid.previous(t), c)
    action = mdp.expert.schedule.prediction(x_0, x_t, t, "x_0").latent(state.s)  # implies x̂_0 = x_0
    after, _, _ = mdp.step(state, action, lambda: fresh)
    alpha_s, sigma_s = mdp.expert.schedule(state.s, x_t)
    torch.testing.assert_close(after.x_t, alpha_s * x_0 + sigma_s * fresh, atol=1e-4, rtol=1e-4)
    assert torch.equal(after.x_t[3], action[3])  # s = 0: no noise, bit for bit
    assert after.t.tolist() == state.s.tolist()


def test_the_renoise_kernel_ends_at_the_action_also_where_the_schedule_does_not_end_at_the_data() -> None:
    expert = mixture(schedule=NoiseSchedule(set_alpha_to_one=False))  # at time 0 it still holds a little noise
    mdp = DenoisingMDP(expert, 4, kernel="renoise")
    state = mdp.state_at(latents(3, 2), torch.tensor([250.0, 250.0, 500.0]), None)
    action = mdp.expert_action(state)
    after, _, terminated = mdp.step(state, action, lambda: latents(3, 2, seed=3))
    assert terminated.tolist() == [True, True, False]
    assert torch.equal(after.x_t[:2], action[:2])
    assert not torch.isclose(after.x_t[2], action[2]).any()


@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_expert_l2_is_zero_for_the_expert_and_negative_for_others(kernel: Kernel, schedule: Any) -> None:
    mdp = DenoisingMDP(mixture(schedule=schedule), 4, kernel=kernel, reward="expert_l2", substeps=2)
    state = mdp.start([torch.Generator().manual_seed(i) for i in range(5)])
    best = ExpertPolicy(mdp.expert, substeps=2).act(*state)
    assert (mdp.step(state, best, lambda: torch.zeros(5, 2))[1] == 0).all()
    shift = torch.tensor([[0.1, 0.0]]) * torch.arange(1, 6)[:, None]
    reward = mdp.step(state, best + shift, lambda: torch.zeros(5, 2))[1]
    torch.testing.assert_close(reward, -0.5 * (0.1 * torch.arange(1, 6)) ** 2, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
def test_expert_loglik_is_the_density_of_the_ddpm_posterior_around_the_expert(schedule: Any) -> None:
    mdp = DenoisingMDP(mixture((2, 3, 4, 4), schedule=schedule), 4, reward="expert_loglik")
    x_t, c = latents(3, 2, 3, 4, 4), torch.tensor([0, 1, 0])
    for t in mdp.grid.times[:-1]:
        state = mdp.state_at(x_t, t.expand(3).clone(), c)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (map(float, mdp.expert.schedule.coefficients(u[0])) for u in (state.t, state.s))
        # Gaussian x_s | x_0 of variance σ_s², seen through x_t | x_s = N((α_t/α_s) x_s, σ_t² − (α_t/α_s)² σ_s²): precisions add
        ratio = alpha_t / alpha_s
        forward = sigma_t**2 - (ratio * sigma_s) ** 2
        std = max(math.sqrt(1 / (1 / sigma_s**2 + ratio**2 / forward)) if sigma_s else 0.0, LOGLIK_MIN_STD)
        best = mdp.expert_action(state)
        at_best = mdp.step(state, best, lambda: x_t)[1]
        for action in (best, best + 0.05 * latents(3, 2, 3, 4, 4, seed=5), torch.zeros_like(best)):
            reward = mdp.step(state, action, lambda: x_t)[1]
            expected = torch.distributions.Normal(best, std).log_prob(action).flatten(1).mean(1)
            torch.testing.assert_close(reward, expected, atol=1e-4, rtol=1e-4)
            assert (reward <= at_best).all()
        assert (at_best > mdp.step(state, best + 0.01, lambda: x_t)[1]).all()


def test_reward_none_is_zero_and_calls_no_expert() -> None:
    expert = mixture()
    env = DenoisingVectorEnv(expert, 3)
    env.reset(seed=0)
    before = expert.nfe
    assert env.step(latents(3, 2))[1].tolist() == [0, 0, 0]
    assert expert.nfe == before


def test_every_view_gives_the_same_reward() -> None:
    options: dict[str, Any] = {"num_steps": 2, "reward": "expert_loglik"}
    td_env, vector, single = (
        DenoisingEnv(mixture(), batch_size=[3], **options),
        DenoisingVectorEnv(mixture(), 3, **options),
        DenoisingGymEnv(mixture(), **options),
    )
    action = latents(3, 2)
    td_env.set_seed(2)
    torchrl_reward = td_env.step(td_env.reset().set("action", action))["next", "reward"][:, 0]
    vector.reset(seed=2)
    vector_reward = vector.step(action.numpy())[1]
    np.testing.assert_allclose(vector_reward, torchrl_reward, rtol=1e-5)
    for i in range(3):
        single.reset(seed=2 + i)
        assert single.step(action[i].numpy())[1] == pytest.approx(float(torchrl_reward[i]), rel=1e-5)


def test_the_experts_action_is_in_info_on_request_alone() -> None:
    env = DenoisingGymEnv(mixture(), 2, expert_action=True, reward="expert_l2")
    _, info = env.reset(seed=0)
    _, reward, _, _, info = env.step(info["expert_action"])
    assert reward == 0
    _, reward, terminated, _, last = env.step(info["expert_action"])
    assert (reward, terminated, last) == (0, True, {})
    assert DenoisingGymEnv(mixture()).reset(seed=0)[1] == {}
    vector = DenoisingVectorEnv(mixture(), 3, 2, reward="expert_l2")
    with pytest.raises(gymnasium.error.ResetNeeded, match="every environment must be in the middle of an episode"):
        vector.expert_action()
    vector.reset(seed=0)
    np.testing.assert_allclose(vector.step(vector.expert_action())[1], 0, atol=1e-12)
