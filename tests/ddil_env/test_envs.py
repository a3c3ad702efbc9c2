"""Facts about the environments: TorchRL, Gymnasium single and vector are three views of one Markov decision process."""

from __future__ import annotations

import ast
import math
import pickle
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.wrappers import FlattenObservation, RecordVideo
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from helpers import expert_action, latents, mixture, preset
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from tensordict.nn import TensorDictModule
from tiny_sd import write_tiny_sd
from torch import Tensor
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs.utils import check_env_specs

import ddil_env
from ddil_agents import DMD2, LCM, Algorithm, Dagger, DaggerConfig
from ddil_env import (
    DenoisingEnv,
    DenoisingGymEnv,
    DenoisingVectorEnv,
    ExpertPolicy,
    StudentPolicy,
    TimeGrid,
    load_expert,
    unroll,
)
from ddil_env.mdp import Kernel, Reward

KERNELS, REWARDS = get_args(Kernel), get_args(Reward)
PRESETS = {"gaussian_mixture": "ddil/GaussianMixture-v0", "digits8": "ddil/Digits8-v0", "digits": "ddil/Digits-v0", "sd15": "ddil/SD15-v0"}
SHAPES: dict[str, tuple[int, ...]] = {"1-D": (1,), "2-D": (2,), "video": (2, 3, 4, 4)}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_sd(tmp_path_factory.mktemp("tiny_sd")))


def preset_options(name: str, tiny_folder: str) -> dict[str, Any]:
    return {"model": tiny_folder, "prompts": ["a bee", "two seas"]} if name == "sd15" else {}


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
    expert = preset("gaussian_mixture")
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
    expert = preset(name)
    env = DenoisingEnv(expert, num_steps=3, batch_size=[4])
    policy = ExpertPolicy(expert, substeps=k, guidance_scale=2.0)
    rollout = env.rollout(3, policy)
    x = unroll(policy, env.mdp.grid, rollout["x_t"][:, 0], rollout["c"][:, 0])
    assert torch.equal(rollout["x_t"], x[:, :-1])
    assert torch.equal(rollout["next", "x_t"], x[:, 1:])
    assert torch.equal(rollout["action"], x[:, 1:])


def test_a_student_policy_is_the_experts_twin() -> None:
    expert = preset("digits8")
    student = expert.make_student().eval()
    x_T, c = latents(2, 1, 8, 8), torch.tensor([3, 4])
    grid = TimeGrid(expert.schedule, 2)
    torch.testing.assert_close(
        unroll(StudentPolicy(student, expert), grid, x_T, c), unroll(ExpertPolicy(expert, project=False), grid, x_T, c)
    )
    rollout = DenoisingEnv(expert, 2, batch_size=[2]).rollout(2, StudentPolicy(student, expert))
    assert rollout.shape == (2, 2)


# Kernels and rewards
# What users build on it


@pytest.mark.parametrize("name", PRESETS)
def test_rendering_shows_pictures_that_a_person_can_see(name: str, tiny_folder: str) -> None:
    expert = preset(name) if name != "sd15" else load_expert(name, **preset_options(name, tiny_folder))
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


@pytest.mark.parametrize("agent", [Dagger, LCM, DMD2])
def test_agents_policies_and_environments_can_be_pickled(agent: type[Algorithm]) -> None:
    config = agent.Config(num_steps=2, batch_size=4, collect_size=8, student={"width": 8, "depth": 1})
    learner = agent(mixture(), config)
    x_t, t, s = torch.randn(3, 2), torch.full((3,), 999.0), torch.full((3,), 500.0)
    again, env = pickle.loads(pickle.dumps((learner, learner.make_env([3]))))
    for policy, copy in ((learner.student_policy, again.student_policy), (learner.teacher_policy, again.teacher_policy)):
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
        ({"num_steps": 0}, "num_steps=0: need a whole number from 1 to 999"),
        ({"num_steps": 1000}, "num_steps=1000: need a whole number from 1 to 999"),
        ({"substeps": 0}, "substeps=0: need a whole number from 1 to 999"),
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


def test_bad_torchrl_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"batch_size=\[3, 0\]: every axis needs at least one environment"):
        DenoisingEnv(mixture(), batch_size=[3, 0])
    with pytest.raises(ValueError, match="device 'meta' is not to be had"):
        DenoisingEnv(mixture(), device="meta")
    with monkeypatch.context() as patch:  # as where there is a GPU, and the expert is not on it
        patch.setattr("ddil_env.denoising_env.check_device", torch.device)
        with pytest.raises(ValueError, match="device='cuda', but the expert is on 'cpu'; build the expert with device='cuda'"):
            DenoisingEnv(mixture(), device="cuda")
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


def test_an_environment_of_other_times_or_another_kernel_than_the_students_is_refused() -> None:
    expert = mixture()
    agent = DMD2(expert, DMD2.Config(student={"width": 8, "depth": 1}))  # 999, 749, 499, 249 by renoise
    agent.make_env([2]).rollout(4, agent.student_policy)
    other_times = DenoisingEnv(expert, 4, [2], kernel="renoise")  # 999, 749, 500, 250
    with pytest.raises(ValueError, match=r"steps to t = 500, and this student was trained to step through 999, 749, 499, 249, 0; make"):
        other_times.rollout(4, agent.student_policy)
    with pytest.raises(ValueError, match=r"kernel=ddim, and this student samples by renoise; .*make_env"):
        DenoisingEnv(expert, 4, [2], grid="dmd2").rollout(4, agent.student_policy)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None, 10**9])
def test_what_is_no_number_of_steps_is_refused(value: object) -> None:
    expert = load_expert("gaussian_mixture")
    with pytest.raises(ValueError, match=rf"substeps={value!r}: need a whole number from 1 to 999"):
        ExpertPolicy(expert, substeps=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"num_steps={value!r}: need a whole number from 1 to 999"):
        TimeGrid(expert.schedule, value)  # type: ignore[arg-type]


def test_actions_and_starts_that_an_environment_would_have_to_guess_at_are_refused() -> None:
    env = DenoisingEnv("gaussian_mixture", 2, [4])
    start = env.reset()
    for action in (torch.zeros(4, 1, 2), torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"actions of shape .*: need \(4, 2\), torch.float32"):
            env.step(start.clone().set("action", action))
    single = DenoisingGymEnv("gaussian_mixture", num_steps=2)
    for options, message in (({"t": True}, "'t' holds true or false"), ({"x_t": [math.nan, 0.0]}, "'x_t' holds NaN or infinity")):
        with pytest.raises(ValueError, match=message):
            single.reset(options=options)
    with pytest.raises(ValueError, match="reset option 'c'=None: need an array of real numbers"):
        single.reset(options={"c": None})
    several = DenoisingVectorEnv("gaussian_mixture", 1, num_steps=2)
    for each in (single, several):
        each.reset(seed=0)
        for action, message in (
            (np.ones(2, complex), "complex numbers"),
            ([True, False], "true or false"),
            (["a", "b"], "an array of"),
        ):
            with pytest.raises(ValueError, match=message):
                each.step(np.array(action) if each is single else np.array([action]))
    with pytest.raises(ValueError, match=r"reset_mask of torch\.float64: need true and false"):
        several.reset(options={"reset_mask": np.array([0.5])})
    with pytest.raises(ValueError, match=r"num_envs=1\.5: need a whole number"):
        DenoisingVectorEnv("gaussian_mixture", 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_actions_that_are_not_finite_are_refused(value: float) -> None:
    message = "actions with NaN or infinite values in 1 of 1 running environments; look at the policy"
    single = DenoisingGymEnv(mixture(), 2)
    single.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        single.step(np.full(2, value))
    for output in ("numpy", "torch"):
        several = DenoisingVectorEnv(mixture(), 2, num_steps=2, output=output)
        several.reset(seed=0)
        actions = torch.zeros(2, 2)
        actions[1] = value
        with pytest.raises(ValueError, match=message.replace("1 of 1", "1 of 2")):
            several.step(actions.numpy() if output == "numpy" else actions)
    several.step(torch.zeros(2, 2))
    several.step(torch.zeros(2, 2))
    several.step(torch.full((2, 2), value))  # the step of an autoreset, which takes no action


def test_torchrls_environment_refuses_them_at_once_on_a_cpu_and_without_waiting_on_a_gpu() -> None:
    env = DenoisingEnv(mixture(), 2, [3])
    broken = env.reset().set("action", torch.tensor([[0.0, 0.0], [float("nan"), 0.0], [0.0, float("inf")]]))
    with pytest.raises(ValueError, match="actions with NaN or infinite values in 2 running environments"):
        env.step(broken)
    env._checks_each_step = False  # as on a GPU
    env.step(broken)
    with pytest.raises(ValueError, match="in 2 running environments"):
        env.reset()
    env.reset()
    with pytest.raises(ValueError, match="in 6 running environments"):
        env.rollout(2, lambda td: td.set("action", torch.full((3, 2), float("nan"))), break_when_any_done=False)
    env.rollout(2)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_gymnasiums_statistics_are_around_numpy(mode: str) -> None:
    options: dict[str, Any] = {"num_steps": 2, "reward": "expert_l2", "autoreset_mode": mode}
    env = RecordEpisodeStatistics(DenoisingVectorEnv(mixture(), 3, **options))
    env.reset(seed=0)
    rewards = [env.step(np.zeros((3, 2), np.float32)) for _ in range(2)]
    info = rewards[1][4].get("final_info") or rewards[1][4]
    np.testing.assert_allclose(info["episode"]["r"], rewards[0][1] + rewards[1][1])
    assert info["episode"]["l"].tolist() == [2, 2, 2]
    around_torch = RecordEpisodeStatistics(DenoisingVectorEnv(mixture(), 3, output="torch", **options))
    around_torch.reset(seed=0)
    with pytest.raises(TypeError):
        around_torch.step(torch.zeros(3, 2))
    assert "RecordEpisodeStatistics" in str(DenoisingVectorEnv.__doc__)  # where the cure is
