"""Facts about the environments: TorchRL, Gymnasium single and vector are three views of one Markov decision process."""

from __future__ import annotations

import ast
import math
import pickle
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, RecordVideo
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tiny_sd import write_tiny_sd
from torch import Tensor
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs.utils import check_env_specs

import ddil_env
from ddil_agents import Algorithm, Dagger, DaggerConfig, DistributionMatching, LatentConsistency
from ddil_env import (
    DenoisingEnv,
    DenoisingGymEnv,
    DenoisingMDP,
    DenoisingVectorEnv,
    Expert,
    ExpertPolicy,
    GaussianMixtureExpert,
    NoiseSchedule,
    StudentPolicy,
    TimeGrid,
    load_expert,
    unroll,
)
from ddil_env.mdp import LOGLIK_MIN_STD, Kernel, Reward, State

KERNELS, REWARDS = get_args(Kernel), get_args(Reward)
PRESETS = {"gaussian_mixture": "ddil/GaussianMixture-v0", "digits8": "ddil/Digits8-v0", "digits": "ddil/Digits-v0", "sd15": "ddil/SD15-v0"}
SHAPES: dict[str, tuple[int, ...]] = {"1-D": (1,), "2-D": (2,), "video": (2, 3, 4, 4)}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_sd(tmp_path_factory.mktemp("tiny_sd")))


@cache
def cached_expert(name: str, **options: Any) -> Expert:
    return load_expert(name, **options)


def preset_options(name: str, tiny_folder: str) -> dict[str, Any]:
    return {"model": tiny_folder, "prompts": ["a bee", "two seas"]} if name == "sd15" else {}


@cache
def mixture(shape: tuple[int, ...] = (2,), labelled: bool = True, schedule: Any = "scaled_linear") -> GaussianMixtureExpert:
    """Four modes, in two classes if labelled; it has no pictures unless in the plane."""
    means = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixtureExpert(means, [0.1, 0.2, 0.3, 0.4], schedule=schedule, labels=[0, 0, 1, 1] if labelled else None)


def latents(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert_action(env: Any) -> np.ndarray:
    """The expert's action at a single env's present state."""
    action: Tensor = env.unwrapped.mdp.expert_action(env.unwrapped._state)[0]
    return action.cpu().numpy()


# Every checker, every shipped preset, every kernel and reward


@pytest.fixture(params=[(name, kernel, reward) for name in PRESETS for kernel in KERNELS for reward in REWARDS], ids="-".join)
def variant(request: pytest.FixtureRequest, tiny_folder: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    name, kernel, reward = request.param
    return name, {"kernel": kernel, "reward": reward}, preset_options(name, tiny_folder)


def test_torchrl_check_env_specs_passes(variant: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, options, expert_options = variant
    expert = load_expert(name, **expert_options)
    check_env_specs(DenoisingEnv(expert, num_steps=2, batch_size=[2], **options))


def test_gymnasium_check_env_passes(variant: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, options, expert_options = variant
    env = gymnasium.make(PRESETS[name], num_steps=3, expert_kwargs=expert_options, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it frowns on unbounded boxes, which is what latents are
        gymnasium_check_env(env.unwrapped)


def test_stable_baselines3_check_env_passes(variant: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, options, expert_options = variant
    env = gymnasium.make(PRESETS[name], num_steps=3, action_bound=5.0, expert_kwargs=expert_options, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sb3_check_env(env.unwrapped)


@pytest.mark.parametrize("batch_size", [[], [1], [2, 3]])
def test_torchrl_specs_hold_for_every_batch_shape(batch_size: list[int]) -> None:
    env = DenoisingEnv(mixture(), num_steps=2, batch_size=batch_size, kernel="renoise")
    check_env_specs(env)
    assert env.reset()["x_t"].shape == (*batch_size, 2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("labelled", [True, False])
def test_no_image_is_assumed(shape: tuple[int, ...], labelled: bool) -> None:
    expert = mixture(shape, labelled)
    check_env_specs(DenoisingEnv(expert, num_steps=2, batch_size=[3]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gymnasium_check_env(DenoisingGymEnv(expert, num_steps=2), skip_render_check=True)
    vector = DenoisingVectorEnv(expert, num_envs=3, num_steps=2)
    observation, _ = vector.reset(seed=0)
    assert observation["x_t"].shape == (3, *shape)
    assert ("c" in observation) == labelled
    assert vector.observation_space.contains(observation)
    assert vector.step(vector.action_space.sample())[0]["x_t"].shape == (3, *shape)


def test_registered_ids_make_single_and_batched_envs_in_one_process() -> None:
    vector = gymnasium.make_vec("ddil/GaussianMixture-v0", num_envs=5, num_steps=2)
    assert isinstance(vector.unwrapped, DenoisingVectorEnv)
    assert isinstance(gymnasium.make("ddil/GaussianMixture-v0").unwrapped, DenoisingGymEnv)
    assert set(PRESETS.values()) <= set(gymnasium.registry)


# Episodes


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_episode_ends_at_time_zero_after_num_steps(kernel: Kernel, num_steps: int) -> None:
    expert = mixture()
    grid = TimeGrid(expert.schedule, num_steps).times
    rollout = DenoisingEnv(expert, num_steps, batch_size=[3], kernel=kernel).rollout(50, ExpertPolicy(expert))
    assert rollout.shape == (3, num_steps)
    for row in range(3):
        assert torch.equal(rollout["t"][row], grid[:-1])
        assert torch.equal(rollout["s"][row], grid[1:])
        assert torch.equal(rollout["next", "t"][row], grid[1:])
    assert rollout["next", "terminated"][..., 0].tolist() == [[i == num_steps - 1 for i in range(num_steps)]] * 3
    assert torch.equal(rollout["next", "done"], rollout["next", "terminated"])

    env = DenoisingGymEnv(expert, num_steps, kernel=kernel)
    observation, _ = env.reset(seed=0)
    visited = [float(observation["t"][0])]
    terminated = False
    while not terminated:
        observation, _, terminated, truncated, _ = env.step(expert_action(env))
        visited.append(float(observation["t"][0]))
        assert not truncated
    assert visited == grid.tolist()
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"the episode has ended at t = 0; call reset\(\)"):
        env.step(env.action_space.sample())


@pytest.mark.parametrize("view", ["torchrl", "single", "vector"])
def test_the_condition_is_fixed_within_an_episode_and_varies_between(view: str) -> None:
    expert = cached_expert("gaussian_mixture")
    seen = []
    if view == "torchrl":
        env = DenoisingEnv(expert, 3, batch_size=[16])
        env.set_seed(0)
        c = env.rollout(3, ExpertPolicy(expert))["next", "c"]
        assert (c == c[:, :1]).all()
        seen = c[:, 0].tolist()
    elif view == "single":
        single = DenoisingGymEnv(expert, 3)
        for seed in range(16):
            first = single.reset(seed=seed)[0]["c"]
            seen.append(int(first))
            assert all(single.step(expert_action(single))[0]["c"] == first for _ in range(3))
    else:
        vector = DenoisingVectorEnv(expert, 16, 3)
        first = vector.reset(seed=0)[0]["c"]
        seen = first.tolist()
        for _ in range(3):
            assert (vector.step(vector.expert_action())[0]["c"] == first).all()
    assert len(set(seen)) > 1


def episode(view: str, seed: int, kernel: Kernel, n: int = 3, num_steps: int = 3) -> dict[str, Tensor]:
    """n episodes of fixed actions on one view: x_t (n, N + 1, 2) and c (n,)."""
    expert = mixture()
    actions = latents(num_steps, n, 2, seed=7)
    if view == "torchrl":
        env = DenoisingEnv(expert, num_steps, batch_size=[n], kernel=kernel)
        env.set_seed(seed)
        td = env.reset()
        x = [td["x_t"]]
        for action in actions:
            td = env.step(td.set("action", action))["next"]
            x.append(td["x_t"])
        return {"x_t": torch.stack(x, 1), "c": td["c"]}
    if view.startswith("vector"):
        vector = DenoisingVectorEnv(expert, n, num_steps, kernel=kernel, output="torch" if "torch" in view else "numpy")
        observation, _ = vector.reset(seed=seed)
        rows = [observation]
        for action in actions:
            rows.append(vector.step(action if "torch" in view else action.numpy())[0])
        return {"x_t": torch.stack([torch.as_tensor(row["x_t"]) for row in rows], 1), "c": torch.as_tensor(observation["c"])}
    single, every, conditions = DenoisingGymEnv(expert, num_steps, kernel=kernel), [], []
    for i in range(n):
        observation, _ = single.reset(seed=seed + i)
        conditions.append(int(observation["c"]))
        every.append(np.stack([observation["x_t"], *(single.step(action[i].numpy())[0]["x_t"] for action in actions)]))
    return {"x_t": torch.from_numpy(np.stack(every)), "c": torch.tensor(conditions)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_seed_is_one_episode_on_every_view(kernel: Kernel) -> None:
    reference = episode("single", 11, kernel)
    for view in ("single", "vector", "vector torch", "torchrl"):
        same = episode(view, 11, kernel)
        torch.testing.assert_close(same["x_t"], reference["x_t"], atol=1e-6, rtol=1e-6)
        assert torch.equal(same["x_t"][:, 0], reference["x_t"][:, 0])
        assert torch.equal(same["c"], reference["c"])
        other = episode(view, 12, kernel)  # whose first episode is the other's second
        assert torch.equal(other["x_t"][:-1, 0], reference["x_t"][1:, 0])
        assert not torch.isclose(other["x_t"][:, 0], reference["x_t"][:, 0]).any()
    if kernel == "renoise":  # fresh noise differs with the seed even where the actions are the same
        assert not torch.isclose(other["x_t"][:, 1], reference["x_t"][:, 1]).any()


def test_an_unseeded_reset_goes_on_with_the_stream_and_a_seed_begins_it_anew() -> None:
    env = DenoisingGymEnv(mixture())
    first, second = (env.reset(seed=s)[0]["x_t"] for s in (3, None))
    assert not np.isclose(first, second).any()
    assert np.array_equal(env.reset(seed=3)[0]["x_t"], first)
    assert np.array_equal(env.reset()[0]["x_t"], second)
    vector = DenoisingVectorEnv(mixture(), 2)
    rows = vector.reset(seed=[3, None])[0]["x_t"]
    assert np.array_equal(rows[0], first)
    assert np.array_equal(vector.reset(seed=[3, None])[0]["x_t"][0], first)
    with pytest.raises(ValueError, match="3 seeds for 2 environments: need one each"):
        vector.reset(seed=[1, 2, 3])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["gaussian_mixture", "digits8"])
def test_a_rollout_of_the_expert_equals_the_fast_path_bit_for_bit(name: str, k: int) -> None:
    expert = cached_expert(name)
    env = DenoisingEnv(expert, num_steps=3, batch_size=[4])
    policy = ExpertPolicy(expert, substeps=k, guidance_scale=2.0)
    rollout = env.rollout(3, policy)
    x = unroll(policy, env.mdp.grid, rollout["x_t"][:, 0], rollout["c"][:, 0])
    assert torch.equal(rollout["x_t"], x[:, :-1])
    assert torch.equal(rollout["next", "x_t"], x[:, 1:])
    assert torch.equal(rollout["action"], x[:, 1:])


def test_a_student_policy_is_the_experts_twin() -> None:
    expert = cached_expert("digits8")
    student = expert.make_student().eval()
    x_T, c = latents(2, 1, 8, 8), torch.tensor([3, 4])
    grid = TimeGrid(expert.schedule, 2)
    torch.testing.assert_close(
        unroll(StudentPolicy(student, expert), grid, x_T, c), unroll(ExpertPolicy(expert, project=False), grid, x_T, c)
    )
    rollout = DenoisingEnv(expert, 2, batch_size=[2]).rollout(2, StudentPolicy(student, expert))
    assert rollout.shape == (2, 2)


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


# Kernels and rewards


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
    state = mdp.at(latents(3, 2), torch.tensor([250.0, 250.0, 500.0]), None)
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
        state = mdp.at(x_t, t.expand(3).clone(), c)
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


# What users build on it


@pytest.mark.parametrize("name", PRESETS)
def test_rendering_shows_pictures_that_a_person_can_see(name: str, tiny_folder: str) -> None:
    expert = cached_expert(name) if name != "sd15" else load_expert(name, **preset_options(name, tiny_folder))
    env = DenoisingGymEnv(expert, 2, render_mode="rgb_array")
    assert env.render() is None  # nothing to show before the first reset
    env.reset(seed=0)
    vector = DenoisingVectorEnv(expert, 2, 2, render_mode="rgb_array")
    vector.reset(seed=0)
    frames = vector.render()
    assert frames is not None
    assert len(frames) == 2
    single = env.render()
    assert single is not None
    for picture in (single, *frames):
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 128
    assert np.abs(single.astype(int) - frames[0].astype(int)).max() <= 1  # one seed, one picture (a batch may round otherwise)
    assert not np.array_equal(frames[0], frames[1])
    assert DenoisingGymEnv(expert, 2).render() is None


def test_a_video_of_an_episode_is_written(tmp_path: Path) -> None:
    env = RecordVideo(
        gymnasium.make("ddil/GaussianMixture-v0", num_steps=2, render_mode="rgb_array"), str(tmp_path / "videos"), lambda episode: True
    )
    env.reset(seed=0)
    for _ in range(2):
        env.step(expert_action(env))
    env.close()
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000


def test_observations_flatten() -> None:
    env = FlattenObservation(gymnasium.make("ddil/GaussianMixture-v0", num_steps=2))
    flat, _ = env.reset(seed=0)
    plain, _ = gymnasium.make("ddil/GaussianMixture-v0", num_steps=2).reset(seed=0)
    assert flat.shape == (5 + 1 + 1 + 1 + 2,)  # c one-hot over 5 classes and "none", s, t, x_t, in alphabetical order
    assert flat[:6].argmax() == plain["c"]
    assert flat[6:8].tolist() == [500, 999]
    np.testing.assert_allclose(flat[8:], plain["x_t"])


def test_stable_baselines3_trains_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path))
    env = gymnasium.make("ddil/GaussianMixture-v0", num_steps=2, action_bound=5.0, reward="expert_l2")
    agent = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = [p.clone() for p in agent.policy.parameters()]
    agent.learn(16)
    assert agent.num_timesteps == 16
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


def test_torchrls_collector_runs_on_it() -> None:
    env = DenoisingEnv(mixture(), 2, batch_size=[4])
    collector = Collector(env, ExpertPolicy(env.expert), frames_per_batch=16, total_frames=32)
    batches = list(collector)
    collector.shutdown()
    assert [batch.numel() for batch in batches] == [16, 16]
    for batch in batches:  # two episodes of two steps a row: reset goes on by itself
        assert batch["t"].tolist() == [[999, 500, 999, 500]] * 4
        assert not torch.isclose(batch["x_t"][:, 0], batch["x_t"][:, 2]).any()


def digits_env() -> DenoisingEnv:
    return DenoisingEnv("digits8", 2, batch_size=[4])


def test_torchrls_processes_take_environment_and_student_with_them() -> None:
    agent = Dagger("digits8", DaggerConfig(num_steps=2))
    collector = MultiSyncCollector([digits_env, digits_env], agent.student_policy, frames_per_batch=16, total_frames=16, cat_results=0)
    (batch,) = list(collector)
    collector.shutdown()
    assert batch.shape == (8, 2)  # of two processes, four episodes each
    x_t, t, s, c = (batch[key].flatten(0, 1) for key in ("x_t", "t", "s", "c"))
    torch.testing.assert_close(batch["action"].flatten(0, 1), agent.student_policy.act(x_t, t, s, c), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("agent", [Dagger, LatentConsistency, DistributionMatching])
def test_agents_policies_and_environments_can_be_pickled(agent: type[Algorithm]) -> None:
    config = agent.Config(num_steps=2, batch_size=4, collect_size=8, student={"width": 8, "depth": 1})
    learner = agent(mixture(), config)
    x_t, t, s = torch.randn(3, 2), torch.full((3,), 999.0), torch.full((3,), 500.0)
    again, env = pickle.loads(pickle.dumps((learner, DenoisingEnv(mixture(), 2, batch_size=[3]))))
    for policy, copy in ((learner.student_policy, again.student_policy), (learner.reference, again.reference)):
        assert torch.equal(copy.act(x_t, t, s), policy.act(x_t, t, s))
    assert env.rollout(2, again.student_policy).shape == (3, 2)
    learner.trainer.collect()
    again.trainer.collect()
    assert torch.equal(learner.draw()["x_t"], again.draw()["x_t"])  # its streams go with it


def test_a_plain_module_is_a_policy() -> None:
    net = TensorDictModule(lambda x_t, t: 0.5 * x_t, in_keys=["x_t", "t"], out_keys=["action"])
    rollout = DenoisingEnv(mixture(), 2, batch_size=[3]).rollout(2, net)
    torch.testing.assert_close(rollout["next", "x_t"][:, 1], 0.25 * rollout["x_t"][:, 0])


def test_torch_output_stays_tensors_and_owns_its_memory() -> None:
    env = DenoisingVectorEnv(mixture(), 3, 2, output="torch", autoreset_mode="SameStep")
    observation, _ = env.reset(seed=0)
    for _ in range(2):
        held = {key: value.clone() for key, value in observation.items()}
        after, reward, terminated, truncated, info = env.step(env.expert_action())
        assert all(isinstance(v, Tensor) for v in (*observation.values(), reward, terminated, truncated))
        assert all(torch.equal(held[key], observation[key]) for key in held)
        observation = after
    assert isinstance(info["final_obs"]["x_t"], Tensor)
    assert isinstance(info["_final_obs"], Tensor)
    observation["x_t"] += 1  # the caller's copy
    assert not torch.equal(env._state.x_t, observation["x_t"])  # type: ignore[union-attr]


def test_the_caller_may_reuse_its_action_array() -> None:
    for env in (DenoisingGymEnv(mixture()), DenoisingVectorEnv(mixture(), 1)):
        env.reset(seed=0)
        action = np.ones(env.action_space.shape, np.float32)
        env.step(action)
        action[:] = 99
        assert float(env._state.x_t.max()) == 1  # type: ignore[attr-defined]


# Bad arguments


@pytest.mark.parametrize("env", [DenoisingEnv, DenoisingGymEnv, DenoisingVectorEnv])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "ddpm"}, "unknown kernel 'ddpm'; choose one of: ddim, renoise"),
        ({"reward": "expert"}, "unknown reward 'expert'; choose one of: none, expert_l2, expert_loglik"),
        ({"grid": "karras"}, "unknown time grid 'karras'; choose one of: linspace, dmd2, trailing"),
        ({"num_steps": 0}, "num_steps=0: need 1 ≤ num_steps ≤ 999"),
        ({"num_steps": 1000}, "num_steps=1000: need 1 ≤ num_steps ≤ 999"),
        ({"substeps": 0}, "substeps=0: an action takes at least one step"),
        ({"expert": "sd51"}, "unknown env 'sd51'; presets: "),
        ({"expert": "digits", "device": "cuda:99"}, "device 'cuda:99' is not to be had"),
    ],
)
def test_bad_arguments_are_refused_by_every_view(env: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env(**{"expert": mixture(), **options})


def test_guidance_without_a_null_condition_is_refused() -> None:
    with pytest.raises(ValueError, match="has no null condition to guide against"):
        DenoisingEnv(mixture(labelled=False), guidance_scale=3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs=0: need at least one environment"),
        ({"output": "jax"}, "unknown output 'jax'; choose one of: numpy, torch"),
        ({"autoreset_mode": "Never"}, "unknown autoreset_mode 'Never'; choose one of: NextStep, SameStep, Disabled"),
    ],
)
def test_bad_vector_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingVectorEnv(mixture(), **options)


def test_bad_torchrl_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=\[3, 0\]: every axis needs at least one environment"):
        DenoisingEnv(mixture(), batch_size=[3, 0])
    with pytest.raises(ValueError, match="device='meta', but the expert is on 'cpu'; build the expert with device='meta'"):
        DenoisingEnv(mixture(), device="meta")
    with pytest.raises(ValueError, match="device 'cuda:99' is not to be had"):
        DenoisingEnv(mixture(), device="cuda:99")


@pytest.mark.parametrize("env", [DenoisingGymEnv, DenoisingVectorEnv])
def test_bad_render_modes_and_bounds_are_refused(env: Any) -> None:
    with pytest.raises(ValueError, match="unknown render_mode 'human'; this expert offers: rgb_array"):
        env(mixture(), render_mode="human")
    with pytest.raises(ValueError, match="unknown render_mode 'rgb_array'; this expert offers: none, it has no pictures"):
        env(mixture((1,)), render_mode="rgb_array")
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="need a positive number, or None for an unbounded action"):
            env(mixture(), action_bound=bound)


def test_actions_of_another_shape_are_refused() -> None:
    single, vector = DenoisingGymEnv(mixture()), DenoisingVectorEnv(mixture(), 3)
    for env in (single, vector):
        with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\) before step\(\)"):
            env.step(np.zeros(2))
        env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action of shape \(3,\): need the latent's, \(2,\)"):
        single.step(np.zeros(3))
    with pytest.raises(ValueError, match=r"actions of shape \(2,\): need \(3, 2\)"):
        vector.step(np.zeros(2))


# The house


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_environment_knows_nothing_of_its_agents() -> None:
    package = Path(ddil_env.__file__).parent
    files = sorted(package.rglob("*.py"))
    assert len(files) > 10
    imports = {(path.name, name) for path in files for name in imports_of(path)}
    assert any(name.startswith("ddil_env") for _, name in imports)  # the walk sees imports at all
    assert not {found for found in imports if found[1].split(".")[0] == "ddil_agents"}


def test_the_grid_is_where_the_views_agree_on_time() -> None:
    expert = mixture()
    for grid in ("linspace", "dmd2", "trailing"):
        env = DenoisingGymEnv(expert, 4, grid=grid)  # type: ignore[arg-type]
        expected = TimeGrid(expert.schedule, 4, grid).times.tolist()  # type: ignore[arg-type]
        observation, _ = env.reset(seed=0)
        for t, s in pairwise(expected):
            assert (float(observation["t"][0]), float(observation["s"][0])) == (t, s)
            observation = env.step(env.action_space.sample())[0]


@pytest.mark.parametrize("shape", [[], [1], [2, 3], [2, 2]])
def test_policies_take_batches_of_any_shape(shape):
    env = DenoisingEnv("gaussian_mixture", num_steps=4, batch_size=shape)
    env.set_seed(0)
    policy = ExpertPolicy(env.expert, 2)
    trajectory = env.rollout(4, policy)
    assert trajectory["x_t"].shape == (*shape, 4, 2)
    relabelled = policy(trajectory.select("x_t", "t", "s", "c"))["action"]  # a trajectory has one axis more
    assert torch.allclose(relabelled, trajectory["action"], atol=1e-6)
