"""Worlds: what they take and answer, whole episodes in them, and the MDP with a world behind it."""

import importlib.util
from typing import Any

import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from line_world import Line, Steersman
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from ddil_env import DenoisingEnv, DenoisingGymEnv, DenoisingVectorEnv, ExpertPolicy, TimeGrid, check_expert, unroll
from ddil_env.worlds import Autoregressive, GymWorld, run_episodes


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def test_episodes_end_raggedly_and_a_finished_world_is_asked_nothing_more() -> None:
    world, asked = Line(5, num_frames=8, wall=2.0), []

    def away(c: Tensor, rows: Tensor, frame: int) -> Tensor:
        asked.append(rows.tolist())
        return 0.3 * (1 + rows.float())[:, None] * c.sign()  # the later worlds leave sooner

    episodes = run_episodes(world, generators(5), away)
    starts = torch.stack([torch.randn(2, generator=g) for g in generators(5)])
    for i in range(5):
        c, length = starts[i], 0
        for _ in range(8):
            c, length = c + 0.3 * (1 + i) * c.sign(), length + 1
            if bool((c.abs() > 2).any()):
                break
        assert int(episodes.length[i]) == length
        assert int(episodes.alive[:, i].sum()) == sum(i in rows for rows in asked) == length
    assert world.steps == int(episodes.alive.sum()) < 5 * 8
    assert not episodes.reward[~episodes.alive].any()
    torch.testing.assert_close(episodes.c[1][episodes.alive[1]], (episodes.c[0] + episodes.x_0[0])[episodes.alive[1]])


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_an_episode_of_the_environment_is_many_denoisings(kernel: str) -> None:
    expert = Steersman(num_frames=3)
    env = DenoisingEnv(expert, 2, [4], kernel=kernel)  # type: ignore[arg-type]
    env.set_seed(0)
    path = env.rollout(20, ExpertPolicy(expert))
    assert path.shape == (4, 6)  # 3 frames of 2 steps
    c, x_0 = path["c"], path["action"][:, 1::2]  # the second action of each denoising is the sample
    torch.testing.assert_close(c[:, 0], c[:, 1])
    torch.testing.assert_close(c[:, 2], c[:, 0] + x_0[:, 0])
    torch.testing.assert_close(c[:, 4], c[:, 2] + x_0[:, 1])
    assert path["t"][0].tolist() == [99, 50, 99, 50, 99, 50]
    reward = path["next", "reward"][..., 0]
    assert not reward[:, ::2].any()
    torch.testing.assert_close(reward[:, 1::2], -(c[:, ::2] + x_0)[..., 0].abs())
    assert path["next", "done"][..., 0].tolist() == [[False] * 5 + [True]] * 4
    assert 0.5 < float(path["x_t"][:, ::2].std()) < 1.5  # each denoising starts from noise of its own
    check_env_specs(env)


def test_the_environment_and_the_fast_path_see_the_same_conditions() -> None:
    expert = Steersman(num_frames=3)
    policy, grid = ExpertPolicy(expert), TimeGrid(expert.schedule, 2)
    env = DenoisingEnv(expert, 2, [4])
    env.set_seed(0)
    path = env.rollout(6, policy)
    noises = path["x_t"][:, ::2]
    world = expert.make_world(4)
    world.reset(generators(4))
    world.c = path["c"][:, 0].clone()
    c = world.c
    for frame in range(3):
        torch.testing.assert_close(c, path["c"][:, 2 * frame])
        c, _, _ = world.step(unroll(policy, grid, noises[:, frame], c)[:, -1])


def test_without_a_world_the_same_expert_makes_one_denoising() -> None:
    env = DenoisingEnv(Steersman(), 2, [4], world=None)
    assert env.rollout(20, ExpertPolicy(env.expert)).shape == (4, 2)


def test_an_autoregressive_world_is_its_own_history() -> None:
    world = Autoregressive(3, lambda g: torch.zeros(len(g), 2, 4), (4,), history=2, num_frames=2, increment=0.5)
    c = world.reset(generators(3))
    assert c.shape == (3, 2, 4)
    x = torch.ones(3, 4, requires_grad=True)
    c, reward, done = world.step(x)
    assert torch.equal(c[:, 0], torch.zeros(3, 4))
    assert torch.equal(c[:, 1], torch.full((3, 4), 0.5))
    assert not done.any()
    assert not reward.any()
    c, _, done = world.step(torch.ones(3, 4))
    assert done.all()
    assert torch.equal(c[:, 1], torch.ones(3, 4))
    (slope,) = torch.autograd.grad(c[:, 1].sum(), x)  # through two frames
    assert torch.equal(slope, torch.full((3, 4), 0.5))


def test_a_gymnasium_environment_is_a_world() -> None:
    world = GymWorld("Pendulum-v1", 2, chunk=3, execute=2, history=2, mean=[0, 0, 1], std=[1, 1, 2])
    assert (world.sample_shape, world.condition_shape, world.num_frames) == ((3, 1), (6,), 100)
    c = world.reset(generators(2))
    assert torch.equal(c[:, :3], c[:, 3:])  # the first observation, twice
    again, reward, done = world.step(torch.zeros(2, 3, 1))
    assert again.shape == (2, 6)
    assert reward.shape == (2,)
    assert not done.any()
    assert torch.equal(world.reset(generators(2)), c)
    env = world.envs[0].unwrapped
    env.reset(seed=int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0))))
    expected = [env.step([2.0 * 0])[0] for _ in range(2)]
    mean, std = torch.tensor([0, 0, 1.0]), torch.tensor([1, 1, 2.0])
    torch.testing.assert_close(again[0], torch.cat([(torch.tensor(observation) - mean) / std for observation in expected]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CartPole-v1", 1), "has actions in Discrete.*a world needs a Box of them"),
        (("NoSuchEnv-v0", 1), "cannot make 'NoSuchEnv-v0'"),
        (("Pendulum-v1", 0), "num_worlds=0: need at least 1"),
    ],
)
def test_what_is_no_world_is_refused(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GymWorld(*arguments)


def test_samples_and_conditions_that_are_not_finite_or_of_another_shape_are_refused() -> None:
    world = Line(2)
    world.reset(generators(2))
    with pytest.raises(FloatingPointError, match="a sample for the world is not finite"):
        world.step(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"samples of shape \(2, 3\): 2 worlds take \(2, 2\)"):
        world.step(torch.zeros(2, 3))
    world.c[:] = torch.inf
    with pytest.raises(FloatingPointError, match=r"Line.advance gave a condition that is not finite"):
        world.step(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"2 worlds for batch_size=\[3\]: need one for each environment"):
        DenoisingEnv(Steersman(), 2, [3], world=Line(2))
    with pytest.raises(ValueError, match=r"the world takes samples \(2,\) and answers \(2,\), the expert's are"):
        DenoisingEnv("gaussian_mixture", 2, [2], world=Line(2))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c, r, d: (c, r * torch.nan, d), "gave a reward that is not finite"),
        (lambda c, r, d: (c, r[:1], d), r"gave rewards of shape \(1,\); need \(2,\)"),
        (lambda c, r, d: (c, r, d.float()), "gave ends of episodes as torch.float32; need bool"),
    ],
)
def test_a_world_that_breaks_its_contract_is_named_by_the_check(answer: Any, message: str) -> None:
    class Broken(Line):
        def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return answer(*super().advance(rows, x_0))  # type: ignore[no-any-return]

    class Misled(Steersman):
        def make_world(self, num_worlds: int, **options: Any) -> Line:
            return Broken(num_worlds)

    with pytest.raises(ValueError, match=message):
        check_expert(Misled())


@pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="needs Box2D: pip install 'ddil[worlds]'")
def test_the_landers_teacher_lands() -> None:
    from ddil_agents.evaluation.episodes import EpisodeEvaluator
    from ddil_env.experts.lunar_lander import LunarLander

    expert = LunarLander()
    evaluator = EpisodeEvaluator(ExpertPolicy(expert), TimeGrid(expert.schedule, 1), n=4)
    found = evaluator.evaluate(evaluator.expert_policy)
    assert found["success"] == 1
    assert found["return"] > 230


def test_gymnasiums_views_step_through_the_world() -> None:
    expert = Steersman(num_frames=3)
    envs = DenoisingVectorEnv(expert, num_envs=2, num_steps=2, output="torch", autoreset_mode="SameStep")
    observation, _ = envs.reset(seed=0)
    single = DenoisingGymEnv(expert, num_steps=2)
    alone, _ = single.reset(seed=1)
    policy, c = ExpertPolicy(expert), observation["c"].clone()
    for step in range(6):
        action = policy.act(observation["x_t"], observation["t"][:, 0], observation["s"][:, 0], observation["c"])
        torch.testing.assert_close(torch.tensor(alone["c"]), observation["c"][1])
        alone, reward, ended, _, _ = single.step(action[1].numpy())
        observation, rewards, terminated, _, info = envs.step(action)
        assert float(rewards[1]) == pytest.approx(reward)
        assert terminated.tolist() == [step == 5] * 2 == [ended] * 2
        if step % 2 and step < 5:
            torch.testing.assert_close(observation["c"], c + action)
            c = observation["c"].clone()
    torch.testing.assert_close(info["final_obs"]["c"], c + action)  # and then new episodes began
    assert not torch.allclose(observation["c"], info["final_obs"]["c"])
    gymnasium_check_env(DenoisingGymEnv(expert, num_steps=2))
