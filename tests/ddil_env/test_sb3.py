"""Facts about stable-baselines3 on the diffusion MDP: the vector environment and the policy wrapper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import batched, mixture
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize

from ddil_agents import Evaluation, Evaluator
from ddil_env import (
    DenoisingGymEnv,
    Expert,
    ExpertPolicy,
    GaussianMixtureExpert,
    StudentPolicy,
    TimeGrid,
    load_expert,
    unroll,
)
from ddil_env.corrections import Mixed, ScaledEpsilon, TimeShifted
from ddil_env.mdp import Kernel
from ddil_env.policy import DdimPolicy
from ddil_env.sb3 import SB3Policy

pytestmark = pytest.mark.usefixtures("elsewhere")


def one_by_one(expert: Expert | None = None, n: int = 5, num_steps: int = 3, **options: Any) -> DummyVecEnv:
    """The same as so many single environments, by stable-baselines3's own means."""
    given: dict[str, Any] = {"reward": "expert_l2", "action_bound": 5.0, **options}
    return DummyVecEnv([lambda: DenoisingGymEnv(expert or mixture(), num_steps, **given) for _ in range(n)])


def student_policy(expert: Expert | None = None, seed: int = 0) -> StudentPolicy:
    """A student with random weights."""
    expert = expert or mixture()
    torch.manual_seed(seed)
    return StudentPolicy(expert.make_student(width=16).eval(), expert)


# The vector environment


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_lives_the_episodes_of_single_environments(kernel: Kernel, labelled: bool) -> None:
    ours, theirs = batched(mixture((2,), labelled), kernel=kernel), one_by_one(mixture((2,), labelled), kernel=kernel)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for env in (ours, theirs):
        env.seed(7)
    rng = np.random.default_rng(0)
    observation, expected = ours.reset(), theirs.reset()
    for step in range(7):  # two episodes, and the first step of a third
        assert observation.keys() == expected.keys()
        for key in observation:
            assert observation[key].dtype == expected[key].dtype
            np.testing.assert_allclose(observation[key], expected[key], atol=1e-6, err_msg=f"{key} at {step}")
        action = rng.normal(size=(5, 2)).astype(np.float32)
        (observation, reward, done, infos), (expected, their_reward, their_done, their_infos) = ours.step(action), theirs.step(action)
        assert (reward.dtype, done.dtype) == (their_reward.dtype, their_done.dtype)
        np.testing.assert_allclose(reward, their_reward, rtol=1e-4, atol=1e-6)
        assert done.tolist() == their_done.tolist() == [step % 3 == 2] * 5
        for info, their_info in zip(infos, their_infos, strict=True):
            assert info.keys() == their_info.keys()
            assert info["TimeLimit.truncated"] is False
            if "terminal_observation" in info:
                assert float(info["terminal_observation"]["t"][0]) == 0
                for key, value in info["terminal_observation"].items():
                    np.testing.assert_allclose(value, their_info["terminal_observation"][key], atol=1e-6)
        assert ours.reset_infos == [{}] * 5


def test_a_seed_is_used_once_and_an_unseeded_reset_goes_on() -> None:
    env = batched()
    env.seed(3)
    first, second = env.reset()["x_t"], env.reset()["x_t"]
    assert not np.isclose(first, second).any()
    env.seed(3)
    assert np.array_equal(env.reset()["x_t"], first)
    assert np.array_equal(env.reset()["x_t"], second)


def test_reset_options_choose_the_starts() -> None:
    env = batched()
    env.set_options([{"x_t": np.full(2, i), "t": 500.0, "c": i % 2} for i in range(5)])
    observation = env.reset()
    assert observation["x_t"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert observation["t"][:, 0].tolist() == [500] * 5
    assert observation["c"].tolist() == [0, 1, 0, 1, 0]
    assert env.reset()["t"][:, 0].tolist() == [999] * 5  # they serve once
    env.set_options({"t": 333.0})
    assert env.reset()["t"][:, 0].tolist() == [333] * 5
    env.set_options([{"t": 333.0}, *({} for _ in range(4))])
    with pytest.raises(ValueError, match=r"reset options \[\['t'\], \[\], .*: every environment needs the same ones"):
        env.reset()


def test_attributes_and_methods_are_those_of_the_batch() -> None:
    env = batched(render_mode="rgb_array")
    env.seed(0)
    env.reset()
    assert env.get_attr("num_envs") == [5] * 5
    assert env.get_attr("render_mode", [0, 3]) == ["rgb_array"] * 2
    assert env.has_attr("mdp")
    assert not env.has_attr("nonsense")
    actions = env.env_method("expert_action")
    assert len(actions) == 5
    assert env.step(np.stack(actions))[1].tolist() == [0] * 5
    assert env.env_is_wrapped(Monitor) == [False] * 5
    env.set_attr("render_mode", None)
    assert env.get_attr("render_mode") == [None] * 5
    assert env.get_images() == [None] * 5
    for call in (lambda: env.set_attr("render_mode", None, 0), lambda: env.env_method("expert_action", indices=[0])):
        with pytest.raises(ValueError, match=r"indices=\[0\]: the 5 environments are one batch; leave indices out"):
            call()


def test_pictures_are_tiled() -> None:
    env = batched(n=4, render_mode="rgb_array")
    env.reset()
    picture = env.render("rgb_array")
    assert picture is not None
    assert picture.shape == (256, 256, 3)


@pytest.mark.parametrize("options", [{"autoreset_mode": "NextStep"}, {"output": "torch"}])
def test_only_same_step_reset_and_numpy_are_bridged(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="build the env with autoreset_mode='SameStep', output='numpy'"):
        batched(**options)


def test_stable_baselines3s_wrappers_and_ppo_run_on_it() -> None:
    env = VecNormalize(VecMonitor(VecCheckNan(batched(), raise_exception=True)), norm_obs_keys=["x_t", "t", "s"])
    agent = PPO("MultiInputPolicy", env, n_steps=6, batch_size=10, n_epochs=1, seed=0, device="cpu")
    agent.learn(60)
    assert agent.num_timesteps == 60
    assert {episode["l"] for episode in agent.ep_info_buffer} == {3}
    assert len(agent.ep_info_buffer) == 20


# Any policy as a model


@pytest.mark.parametrize("name", ["gaussian_mixture", "digits8", "unlabelled", "guided"])
@pytest.mark.parametrize("make", [batched, one_by_one])
def test_the_expert_scores_exactly_zero(name: str, make: Any) -> None:
    expert = mixture((3,), False) if name == "unlabelled" else load_expert("gaussian_mixture" if name == "guided" else name)
    guidance = 2.0 if name == "guided" else None
    env = make(expert, 1 if make is one_by_one else 4, 2, substeps=2, guidance_scale=guidance)  # a batch may round otherwise than one
    env.seed(0)
    policy = ExpertPolicy(expert, 2, guidance)
    assert evaluate_policy(SB3Policy(policy), env, n_eval_episodes=8, warn=False) == (0, 0)
    mean, _ = evaluate_policy(SB3Policy(ExpertPolicy(expert, 1, guidance)), env, n_eval_episodes=8, warn=False)
    assert mean < -1e-5  # the same sampler in fewer steps does worse


def test_a_single_env_is_scored_as_it_is() -> None:
    env = Monitor(DenoisingGymEnv(mixture(), 3, reward="expert_l2"))
    assert evaluate_policy(SB3Policy(ExpertPolicy(mixture())), env, n_eval_episodes=3) == (0, 0)


@pytest.mark.parametrize("expert", [mixture((3,)), mixture((2, 3, 4), labelled=False)], ids=["labelled", "video"])
@pytest.mark.parametrize("make", [batched, one_by_one])
def test_a_student_scores_minus_its_action_error(expert: Expert, make: Any) -> None:
    n, num_steps = 6, 4
    env, policy = make(expert, n, num_steps), student_policy(expert)
    env.seed(11)
    start = env.reset()
    env.seed(11)
    returns, lengths = evaluate_policy(SB3Policy(policy), env, n_eval_episodes=n, return_episode_rewards=True, warn=False)
    assert lengths == [num_steps] * n

    c = torch.from_numpy(start["c"]) if "c" in start else None
    grid = TimeGrid(expert.schedule, num_steps)
    path = unroll(policy, grid, torch.from_numpy(start["x_t"]), c)
    wanted = torch.zeros(n)
    for i in range(num_steps):
        t, s = grid.times[i].expand(n), grid.times[i + 1].expand(n)
        wanted -= (path[:, i + 1] - ExpertPolicy(expert).act(path[:, i], t, s, c)).square().flatten(1).mean(1)
    np.testing.assert_allclose(returns, wanted, rtol=1e-4)
    assert max(returns) < 0


def test_the_score_is_what_the_judge_measures() -> None:
    expert, n = load_expert("gaussian_mixture"), 300
    policy = student_policy(expert)
    judged = Evaluator(ExpertPolicy(expert, 2), TimeGrid(expert.schedule, 4), Evaluation(n=n, n_paths=n, n_action=n)).evaluate(policy)
    env = batched(expert, n, 4, substeps=2)
    env.seed(0)
    mean, std = evaluate_policy(SB3Policy(policy), env, n_eval_episodes=n, warn=False)
    assert mean == pytest.approx(-sum(judged["action_mse_own"]), abs=5 * std * math.sqrt(2 / n))  # both are means over n draws


def test_one_observation_alone_is_answered_by_one_action() -> None:
    env, policy = DenoisingGymEnv(mixture((2, 3)), 3), SB3Policy(ExpertPolicy(mixture((2, 3))))
    observation, _ = env.reset(seed=0)
    memory = (np.zeros(3),)
    action, state = policy.predict(observation, memory, np.ones(1, bool), deterministic=True)
    assert action.shape == (2, 3)
    assert state is memory
    assert env.action_space.contains(action)
    batch = {key: np.stack([value, value]) for key, value in observation.items()}
    np.testing.assert_allclose(policy.predict(batch)[0], np.stack([action, action]), atol=1e-6)


def test_an_observation_that_lacks_the_condition_is_refused() -> None:
    observation, _ = DenoisingGymEnv(mixture(labelled=False)).reset(seed=0)
    with pytest.raises(ValueError, match="the observation lacks c: this policy reads x_t, t, s, c; use the env of its expert"):
        SB3Policy(ExpertPolicy(mixture())).predict(observation)


def test_states_go_to_the_network_beneath_a_policy_made_of_others() -> None:
    expert = GaussianMixtureExpert(torch.eye(2), [0.5, 0.5])
    student, teacher = StudentPolicy(expert.make_student(width=16).to("meta"), expert), ExpertPolicy(expert)
    expert.device = torch.device("meta")
    made = [made_of for p in (student, teacher) for made_of in (p, ScaledEpsilon(p, 1.01), TimeShifted(ScaledEpsilon(p, 1.01), 4, 0))]
    for policy in [*made, Mixed(teacher, student, 0.5)]:
        assert SB3Policy(policy).device.type == "meta"
        assert SB3Policy(policy, "cpu").device.type == "cpu"


def test_a_policy_without_a_network_computes_on_the_cpu() -> None:
    expert = mixture()
    assert SB3Policy(DdimPolicy(expert.predict, expert.schedule)).device.type == "cpu"
