"""The board of pegs: its geometry in closed form, routes that are counted, and the policy that finds its way."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_env import DenoisingVectorEnv, ExpertPolicy, TimeGrid, load_expert
from ddil_env.experts.train_fork import demonstrations, guide, positions
from ddil_env.worlds import Episodes, Fork, run_episodes
from ddil_env.worlds.fork import HALF_WIDTH, ROW, SPEED


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def follow(sides: list[list[int]]) -> tuple[Fork, Episodes]:
    """Points that pass each row on the side that is said, straight towards the middle of the gap."""
    world, row = Fork(len(sides), num_rows=len(sides[0])), torch.tensor(sides)

    def act(c: Tensor, rows: Tensor, frame: int) -> Tensor:
        side = row[rows, world.passed[rows]]
        way = torch.stack([side * ROW / 2 - c[:, 0], c[:, 1] + 1 + 1e-3], 1)
        return way / way.norm(dim=1, keepdim=True)

    return world, run_episodes(world, generators(len(sides)), act)


def test_every_route_is_possible_and_their_entropy_is_counted() -> None:
    sides = [[2 * (i >> k & 1) - 1 for k in range(3)] for i in range(8)]
    world, episodes = follow(sides)
    assert world.succeeded(episodes.total_reward).all()
    assert world.metrics(episodes)["route_entropy"] == pytest.approx(3 * math.log(2) + 7 / 16)  # Miller's correction
    assert int(episodes.length.max()) <= 3 * math.ceil(math.hypot(ROW, ROW / 2) / SPEED) + 3
    end = torch.tensor(sides).float().sum(1) * ROW / 2
    torch.testing.assert_close(world.position[:, 0], end, atol=SPEED / 2, rtol=0)
    nobody = episodes._replace(reward=torch.zeros_like(episodes.reward))
    assert world.metrics(nobody) == {"route_entropy": None}  # and not 0, which would say that all took one way
    world, episodes = follow(sides[:1] * 2 + sides[3:4] * 2)
    assert world.metrics(episodes)["route_entropy"] == pytest.approx(math.log(2) + 1 / 8)


def test_a_gap_is_the_same_from_either_side_of_its_middle() -> None:
    """Beyond the middle of a gap the nearest peg is the next one: the route is the gap's, not the side of a peg."""
    world = Fork(2, num_rows=1, num_frames=20)
    aims = torch.tensor([[0.9], [1.1]])

    def act(c: Tensor, rows: Tensor, frame: int) -> Tensor:
        return torch.cat([(aims[rows] - world.position[rows, :1]) * 2, torch.ones(len(rows), 1)], 1)

    episodes = run_episodes(world, generators(2), act)
    assert world.succeeded(episodes.total_reward).all()
    assert (world.position[:, 0] - 1).sign().tolist() == [-1, 1]
    assert world.metrics(episodes) == {"route_entropy": 0}


@pytest.mark.parametrize(("x", "passes"), [(0.0, False), (HALF_WIDTH - 0.02, False), (HALF_WIDTH + 0.02, True), (-1.2, True), (1.3, False)])
def test_a_row_is_passed_between_its_pegs(x: float, passes: bool) -> None:
    world = Fork(1, num_rows=2)
    world.reset(generators(1))
    world.position = torch.tensor([[x, ROW - 0.1]])
    c, reward, done = world.step(torch.tensor([[0.0, 5.0]]))  # longer than 1: SPEED is the limit
    assert (float(reward), bool(done)) == ((1, False) if passes else (0, True))
    if passes:  # the next row is shifted by half the distance of pegs
        torch.testing.assert_close(c, torch.tensor([[(x - ROW / 2 + 1) % ROW - 1, ROW - SPEED + 0.1 - 1]]))


def test_conditions_are_differentiable_by_samples() -> None:
    world = Fork(2)
    c = world.reset(generators(2))
    a = torch.full((2, 2), 0.5, requires_grad=True)
    for _ in range(2):
        c, _, _ = world.step(a)
    (slope,) = torch.autograd.grad(c[:, 0].sum(), a)
    torch.testing.assert_close(slope[:, 0], torch.full((2,), 2 * SPEED))


def test_the_guide_finds_its_way_on_both_sides_and_says_so_everywhere() -> None:
    torch.manual_seed(0)
    world = Fork(200)
    episodes = run_episodes(world, generators(200), lambda c, rows, frame: guide(c))
    assert float(world.succeeded(episodes.total_reward).float().mean()) > 0.97
    assert world.metrics(episodes)["route_entropy"] > 3.2
    assert guide(positions(64)).norm(dim=1).allclose(torch.ones(64))
    demos = demonstrations(2, 0)
    assert demos["episode"].unique().tolist() == [0, 1]
    torch.testing.assert_close(demos["c"][1, 0] - demos["c"][0, 0], SPEED * demos["x_0"][0, 0])  # whole episodes, in their order
    assert world.render().shape == (264, 312, 3)


def test_a_teacher_of_one_step_averages_the_ways() -> None:
    expert = load_expert("fork")
    evaluators = [EpisodeEvaluator(ExpertPolicy(expert), TimeGrid(expert.schedule, steps), n=200) for steps in (16, 1)]
    many, one = (evaluator.evaluate(evaluator.expert_policy) for evaluator in evaluators)
    assert many["success"] > 0.97
    assert one["success"] < many["success"] - 0.03
    assert one["route_entropy"] < many["route_entropy"] - 0.3


def test_a_board_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows=0: need at least 1"):
        Fork(1, num_rows=0)


def test_gymnasiums_views_render_the_board() -> None:
    env = gymnasium.make("ddil/Fork-v0", num_steps=1, render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert before.shape == (264, 312, 3)  # type: ignore[union-attr]
    env.step(np.array([0.0, 1.0], np.float32))
    assert not np.array_equal(env.render(), before)  # type: ignore[arg-type]
    envs = DenoisingVectorEnv("fork", num_envs=2, num_steps=1, render_mode="rgb_array")
    envs.reset(seed=0)
    assert [picture.shape for picture in envs.render()] == [(264, 312, 3)] * 2  # type: ignore[union-attr]
