"""Chosen starts, partial resets and autoreset, on every view of the environment."""

from __future__ import annotations

import math
from typing import Any, get_args

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import expert_action, latents, mixture
from tensordict import TensorDict

from ddil_env import DenoisingEnv, DenoisingGymEnv, DenoisingVectorEnv, ExpertPolicy
from ddil_env.mdp import Kernel

KERNELS = get_args(Kernel)


# Chosen starts and partial resets


def test_an_episode_can_start_at_a_chosen_state_off_the_grid() -> None:
    expert = mixture()
    x_t, t, c = latents(3, 2), torch.tensor([999.0, 600.0, 3.0]), torch.tensor([0, 1, 2])  # 2, "no class", is never drawn
    expected = torch.tensor([749.0, 500.0, 0.0])
    env = DenoisingEnv(expert, 4, batch_size=[3])
    td = env.reset(TensorDict({"x_t": x_t, "t": t, "c": c}, batch_size=[3]), set_state=True)
    assert torch.equal(td["x_t"], x_t)
    assert torch.equal(td["t"], t)
    assert torch.equal(td["s"], expected)
    assert torch.equal(td["c"], c)
    after = env.step(ExpertPolicy(expert)(td))["next"]
    assert after["t"].tolist() == expected.tolist()
    assert after["terminated"][:, 0].tolist() == [False, False, True]
    drawn = env.reset(TensorDict({"x_t": x_t, "t": t}, batch_size=[3]), set_state=True)
    assert torch.equal(drawn["x_t"], x_t)
    assert ((drawn["c"] >= 0) & (drawn["c"] < 2)).all()
    assert (env.reset(TensorDict({"x_t": x_t, "t": t}, batch_size=[3]), set_state=False)["t"] == 999).all()

    vector = DenoisingVectorEnv(expert, 3, 4)
    observation, _ = vector.reset(options={"x_t": x_t, "t": t, "c": c})
    assert np.array_equal(observation["x_t"], x_t.numpy())
    assert observation["s"][:, 0].tolist() == expected.tolist()
    single = DenoisingGymEnv(expert, 4)
    mine = x_t[1].numpy().copy()
    observation, _ = single.reset(options={"x_t": mine, "t": 600, "c": 1})
    assert np.array_equal(observation["x_t"], x_t[1].numpy())
    assert (float(observation["t"][0]), float(observation["s"][0]), int(observation["c"])) == (600, 500, 1)
    mine += 1  # the env keeps its own copy
    torch.testing.assert_close(single.unwrapped._state.x_t[0], x_t[1])  # type: ignore[attr-defined]


def test_a_flow_schedule_starts_between_whole_times() -> None:
    env = DenoisingGymEnv(mixture(schedule="flow"), 4)
    observation, _ = env.reset(options={"t": 0.5})
    assert (float(observation["t"][0]), float(observation["s"][0])) == (0.5, 0)
    assert np.isfinite(env.step(expert_action(env))[0]["x_t"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 0}, r"cannot start at t=\[0.0\]: need 0 < t ≤ 999"),
        ({"t": 1000}, r"need 0 < t ≤ 999"),
        ({"t": math.nan}, r"need 0 < t ≤ 999"),
        ({"t": 0.5}, r"cannot start at t=\[0.5\]: a scaled_linear schedule has whole times only"),
        ({"c": 3}, r"cannot start with c=\[3\]: condition ids are 0 … 2"),  # 2 is "no condition"
        ({"c": -1}, r"cannot start with c=\[-1\]: condition ids are 0 … 2"),
        ({"x_t": [0.0, 1.0, 2.0]}, r"reset option 'x_t' of shape \(3,\): need \(1, 2\)"),
        ({"x": [0.0, 1.0]}, r"unknown reset options \['x'\]; known: x_t, t, c, and reset_mask"),
    ],
)
def test_bad_starts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingGymEnv(mixture()).reset(options=options)
    with pytest.raises(ValueError, match=message):
        DenoisingVectorEnv(mixture(), 1).reset(options=options)


def test_a_torchrl_start_needs_latent_and_time() -> None:
    env = DenoisingEnv(mixture(), batch_size=[3])
    with pytest.raises(ValueError, match="set_state=True needs `x_t` and `t`; t is missing"):
        env.reset(TensorDict({"x_t": latents(3, 2)}, batch_size=[3]), set_state=True)
    with pytest.raises(ValueError, match=r"cannot start at t=\[0.0, 5.0, 2000.0\]"):
        env.reset(TensorDict({"x_t": latents(3, 2), "t": torch.tensor([0.0, 5.0, 2000.0])}, batch_size=[3]), set_state=True)


@pytest.mark.parametrize("mask", [[True, False, True], [False, False, True], [True, True, True]])
def test_a_partial_reset_in_torchrl_leaves_the_other_rows(mask: list[bool]) -> None:
    env = DenoisingEnv(mixture(), 4, batch_size=[3])
    env.set_seed(5)
    td = env.reset()
    before = env.step(td.set("action", latents(3, 2)))["next"].clone()
    chosen = torch.tensor(mask)
    after = env.reset(before.clone().set("_reset", chosen[:, None]), set_state=False)
    for key in ("x_t", "t", "s", "c"):
        assert torch.equal(after[key][~chosen], before[key][~chosen])
    assert (after["t"][chosen] == 999).all()
    assert not torch.isclose(after["x_t"][chosen], before["x_t"][chosen]).any()
    assert not after["done"][chosen].any()
    ours = DenoisingGymEnv(mixture())  # a row that starts anew goes on with its own stream
    for i in chosen.nonzero()[:, 0].tolist():
        ours.reset(seed=5 + i)
        assert np.array_equal(ours.reset()[0]["x_t"], after["x_t"][i].numpy())


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_partial_reset_of_the_vector_env_leaves_the_other_rows(mode: AutoresetMode) -> None:
    env = DenoisingVectorEnv(mixture(), 3, 4, autoreset_mode=mode)
    env.reset(seed=5)
    before = env.step(latents(3, 2))[0]
    held = {key: value.copy() for key, value in before.items()}
    mask = np.array([True, False, True])
    after, _ = env.reset(options={"reset_mask": mask})
    for key in before:
        assert np.array_equal(after[key][~mask], before[key][~mask])
        assert np.array_equal(before[key], held[key])  # what the caller holds stays as it was
    assert (after["t"][mask] == 999).all()
    assert not np.isclose(after["x_t"][mask], before["x_t"][mask]).any()
    chosen, _ = env.reset(options={"reset_mask": mask, "t": [600, 700]})  # one value a row that is reset
    assert chosen["t"][:, 0].tolist() == [600, 749, 700]


def test_bad_reset_masks_are_refused() -> None:
    env = DenoisingVectorEnv(mixture(), 3)
    with pytest.raises(gymnasium.error.ResetNeeded, match="the first reset must start every environment"):
        env.reset(options={"reset_mask": np.array([True, False, True])})
    env.reset()
    for mask in ([True, False], [False, False, False]):
        with pytest.raises(ValueError, match=r"need \(3,\) with at least one True"):
            env.reset(options={"reset_mask": np.array(mask)})


# Autoreset, against gymnasium's own vector env over single envs


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_autoreset_equals_gymnasiums_vector_env(mode: AutoresetMode, kernel: Kernel) -> None:
    options: dict[str, Any] = {"num_steps": 3, "kernel": kernel, "reward": "expert_l2"}
    theirs = SyncVectorEnv([lambda: DenoisingGymEnv(mixture(), **options)] * 3, autoreset_mode=mode)
    ours = DenoisingVectorEnv(mixture(), 3, autoreset_mode=mode, **options)
    assert ours.metadata["autoreset_mode"] == mode
    assert ours.observation_space == theirs.observation_space

    def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_allclose(a[key], b[key], atol=1e-6, err_msg=key)
            assert a[key].dtype == b[key].dtype
            assert a[key].shape == b[key].shape

    compare(ours.reset(seed=4)[0], theirs.reset(seed=4)[0])
    terminations = 0
    for step, action in enumerate(latents(12, 3, 2).numpy()):
        if step == 1:  # from here on the episodes end at different steps
            mask = np.array([False, True, False])
            compare(ours.reset(options={"reset_mask": mask})[0], theirs.reset(options={"reset_mask": mask.copy()})[0])
        (obs, reward, terminated, truncated, info), expected = ours.step(action), theirs.step(action)
        compare(obs, expected[0])
        np.testing.assert_allclose(reward, expected[1], rtol=1e-5, atol=1e-6)
        assert terminated.tolist() == expected[2].tolist()
        assert truncated.tolist() == expected[3].tolist()
        assert ("final_obs" in info) == ("final_obs" in expected[4])
        if "final_obs" in info:
            assert info["_final_obs"].tolist() == expected[4]["_final_obs"].tolist() == terminated.tolist()
            for i in terminated.nonzero()[0]:
                final = expected[4]["final_obs"][i]
                for key in final:
                    np.testing.assert_allclose(info["final_obs"][key][i], final[key], atol=1e-6)
                assert info["final_obs"]["t"][i, 0] == 0
                assert obs["t"][i, 0] == 999
        if mode == AutoresetMode.DISABLED and terminated.any():
            with pytest.raises(gymnasium.error.ResetNeeded, match="an episode has ended; reset it"):
                ours.step(action)
            compare(ours.reset(options={"reset_mask": terminated})[0], theirs.reset(options={"reset_mask": terminated.copy()})[0])
        terminations += int(terminated.sum())
    assert terminations >= 8


def test_next_step_mode_spends_one_step_on_the_reset() -> None:
    env = DenoisingVectorEnv(mixture(), 1, 1, reward="expert_l2", autoreset_mode="NextStep")
    env.reset(seed=0)
    observation, reward, terminated, _, info = env.step(np.ones((1, 2)))
    assert (terminated.tolist(), observation["t"].tolist(), info) == ([True], [[0]], {})
    assert reward[0] < 0
    observation, reward, terminated, _, _ = env.step(np.full((1, 2), 99.0))  # ignored
    assert (terminated.tolist(), reward.tolist(), observation["t"].tolist()) == ([False], [0], [[999]])
    assert np.abs(observation["x_t"]).max() < 10
