"""The Kuramoto–Sivashinsky equation: its solver, its world, the surrogate and the solver as experts."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddil_env import ExpertPolicy, TimeGrid, check_expert, unroll
from ddil_env.conv1d import TimeConditionedConv1d
from ddil_env.experts.kuramoto import Kuramoto, KuramotoSolver
from ddil_env.worlds import Episodes, run_episodes
from ddil_env.worlds.kuramoto import KuramotoSivashinsky, spectrum, valid_time


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.fixture(scope="module")
def equation() -> KuramotoSivashinsky:
    return KuramotoSivashinsky()


@pytest.fixture(scope="module")
def states(equation: KuramotoSivashinsky) -> torch.Tensor:
    return equation.on_attractor(generators(4))


@pytest.fixture(scope="module")
def expert() -> Kuramoto:
    return Kuramoto()


@pytest.fixture(scope="module")
def solver() -> KuramotoSolver:
    return KuramotoSolver()


@pytest.mark.parametrize("mode", [1, 2, 3, 5, 8])
def test_small_modes_grow_and_decay_at_their_linear_rate(mode: int, equation: KuramotoSivashinsky) -> None:
    q = 2 * math.pi * mode / equation.length
    wave = 1e-7 * torch.cos(2 * math.pi * mode * torch.arange(48, dtype=torch.float64) / 48)
    torch.testing.assert_close(equation.solve(wave, 1.0), wave * math.exp(q**2 - q**4), rtol=1e-5, atol=1e-15)


def test_the_mean_is_conserved_and_carries_the_solution_along(equation: KuramotoSivashinsky, states: torch.Tensor) -> None:
    moving = equation.solve(states + 0.1, 2.0)
    torch.testing.assert_close(moving.mean(1), torch.full((4,), 0.1, dtype=torch.float64))
    k = 2 * math.pi / equation.length * torch.arange(25)
    carried = torch.fft.irfft(torch.fft.rfft(equation.solve(states, 2.0)) * torch.exp(-1j * k * 0.1 * 2.0), 48)
    torch.testing.assert_close(moving - 0.1, carried, rtol=0, atol=1e-3)  # Galilei's invariance


def test_the_error_falls_with_the_fourth_power_of_the_time_step(states: torch.Tensor) -> None:
    truth, *found = (KuramotoSivashinsky(time_step=2.0**-k).solve(states, 0.5) for k in (10, 7, 6))
    fine, coarse = (float((u - truth).abs().max()) for u in found)
    assert 12 < coarse / fine < 18
    assert float((KuramotoSivashinsky().solve(states, 0.5) - truth).abs().max()) < 1e-4


def test_shifts_and_reflections_of_a_solution_are_solutions(equation: KuramotoSivashinsky, states: torch.Tensor) -> None:
    later = equation.solve(states, 5.0)
    torch.testing.assert_close(equation.solve(states.roll(7, -1), 5.0), later.roll(7, -1))
    torch.testing.assert_close(equation.solve(-states.flip(-1), 5.0), -later.flip(-1))


def test_a_time_between_steps_is_refused(equation: KuramotoSivashinsky, states: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"time=0.3: need a multiple of the solver's step 0.125; pass a time_step that divides it"):
        equation.solve(states, 0.3)


def test_the_attractor_is_bounded_and_each_start_is_of_its_own_generator(equation: KuramotoSivashinsky, states: torch.Tensor) -> None:
    assert 0.9 < float(states.std()) < 1.5
    assert float(states.abs().max()) < 4
    assert float(states.mean(1).abs().max()) < 1e-12
    torch.testing.assert_close(equation.on_attractor(generators(3)), states[:3])


def test_valid_time_and_spectrum() -> None:
    truth = torch.ones(5, 2, 1, 8)
    frames = truth + torch.tensor([0.0, 0.3, 0.5, 0.0, 0.0]).reshape(5, 1, 1, 1) * torch.tensor([1.0, 0.1]).reshape(1, 2, 1, 1)
    assert valid_time(frames, truth).tolist() == [2, 5]
    wave = 3 * torch.cos(2 * math.pi * 2 * torch.arange(16) / 16) + 1
    torch.testing.assert_close(spectrum(wave[None]), torch.tensor([1, 0, 1.5**2, *[0] * 6], dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_oracles_episode_is_the_solution_and_a_rollout_that_leaves_the_bound_ends(solver: KuramotoSolver) -> None:
    world, policy, grid = solver.make_world(3, num_frames=6), ExpertPolicy(solver), TimeGrid(solver.schedule, 2)
    x_T = torch.randn(3, 1, 48)

    def act(c: torch.Tensor, rows: torch.Tensor, frame: int) -> torch.Tensor:
        sample = unroll(policy, grid, x_T[rows], c)[:, -1]
        return sample + 100 * ((rows == 1) & (frame == 3)).reshape(-1, 1, 1)  # the second one blows up in its fourth frame

    episodes = run_episodes(world, generators(3), act)
    truth = solver.equation.trajectory(solver.equation.on_attractor(generators(3)), 6, solver.dt) / solver.std
    torch.testing.assert_close(episodes.c[:, [0, 2], 0, 0], truth[:, [0, 2]].float(), atol=1e-4, rtol=1e-3)
    assert episodes.length.tolist() == [6, 4, 6]
    assert episodes.total_reward.tolist() == [6, 3, 6]
    assert world.succeeded(episodes.total_reward).tolist() == [True, False, True]
    metrics = world.metrics(episodes)
    assert metrics["valid_time"] == pytest.approx((6 + 4 + 6) / 3)
    assert metrics["late_shift"] > 0.01  # the one that blew up stays at its last frame within the bound
    alone = world.metrics(Episodes(*(x[:, [0, 0, 0]] for x in episodes)))
    assert alone["late_shift"] < 1e-3
    assert alone["high_modes"] == pytest.approx(1, abs=1e-3)
    assert alone["valid_time"] == 6
    picture = world.render(0)
    assert picture.dtype == torch.uint8
    assert picture.shape == (4 * 48, 4 * 128, 3)
    assert (picture[:, : 4 * (128 - 7)] == 255).all()  # before the start
    assert (picture[:, 4 * (128 - 7) :] < 255).any()


def test_gradients_flow_from_a_frame_to_the_samples_before_it(solver: KuramotoSolver) -> None:
    world = solver.make_world(2)
    world.reset(generators(2))
    samples = [torch.zeros(2, 1, 48, requires_grad=True) for _ in range(2)]
    for x_0 in samples:
        c, _, _ = world.step(x_0)
    for slope in torch.autograd.grad(c.sum(), samples):
        torch.testing.assert_close(slope, torch.full_like(slope, solver.increment))


def test_the_solver_answers_the_recorded_increments_whatever_the_noise(solver: KuramotoSolver) -> None:
    check_expert(solver)
    x_0, c = solver.reference_data(16, held_out=True)
    for t in (1.0, 50.0, 99.0):
        pred = solver.predict(torch.randn(16, 1, 48), torch.full((16,), t), c)
        torch.testing.assert_close(pred.x_0, x_0, atol=1e-4, rtol=0)


def test_samples_may_be_the_next_frames_themselves(solver: KuramotoSolver, tmp_path: Path) -> None:
    save_file({name: value for name, value in solver.stored.items() if name != "increment"}, tmp_path / "absolute.safetensors")
    absolute = KuramotoSolver(weights=str(tmp_path / "absolute.safetensors"))
    assert absolute.increment is None
    x_0, c = absolute.reference_data(16, held_out=True)
    increments, _ = solver.reference_data(16, held_out=True)
    torch.testing.assert_close(x_0, c[:, 0] + solver.increment * increments)
    pred = absolute.predict(torch.randn(16, 1, 48), torch.full((16,), 50.0), c)
    torch.testing.assert_close(pred.x_0, x_0, atol=1e-4, rtol=0)
    following, _ = absolute.make_world(16).transition(c, x_0)
    assert torch.equal(following[:, 0], x_0)


def test_the_surrogate_conforms_and_foretells_the_next_frame(expert: Kuramoto) -> None:
    check_expert(expert)
    x_0, c = expert.reference_data(64, held_out=True)
    generator = torch.Generator().manual_seed(0)
    x_T, noise = (torch.randn(shape, generator=generator) for shape in (x_0.shape, c.shape))
    policy, grid = ExpertPolicy(expert), TimeGrid(expert.schedule, 8)
    assert float((unroll(policy, grid, x_T, c)[:, -1] - x_0).square().mean()) < 0.006
    noised = unroll(policy, grid, x_T, c + 0.1 * noise)[:, -1]
    off = 0.1 * noise[:, 0] + expert.increment * (noised - x_0)
    assert float(off.square().mean().sqrt()) < 0.1 * 0.6  # it leads back
    assert expert.identity()["weights"] is not None
    assert expert.identity() != KuramotoSolver().identity()


def test_students_of_both_experts(expert: Kuramoto, solver: KuramotoSolver) -> None:
    same, small = expert.make_student(), expert.make_student(channels=24, depth=2)
    sizes = [sum(p.numel() for p in student.parameters()) for student in (same, small)]
    assert sizes == [249_922, 15_098]
    x, t, c = torch.randn(3, 1, 48), torch.full((3,), 40.0), torch.randn(3, 1, 1, 48)
    torch.testing.assert_close(same.predict(x, t, c).x_0, expert.predict(x, t, c).x_0)
    for student in (small, solver.make_student(channels=24, depth=2)):
        seen: list[torch.Tensor] = []
        hook = expert.critic_features(student).register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        student.predict(x, t, c).x_0.sum().backward()
        hook.remove()
        assert seen[0].shape == (3, 24, 24)
        assert all(p.grad is not None for p in student.parameters())
    with pytest.raises(ValueError, match="channels=0, depth=5"):
        expert.make_student(channels=0)
    with pytest.raises(ValueError, match=r"num_sequences=40: there are 40, and one at least is held out; need 1 to 39"):
        KuramotoSolver(num_sequences=40)


def test_the_network_is_periodic_folds_patches_and_refuses_what_does_not_fit() -> None:
    network = TimeConditionedConv1d((2, 12), 99.0, 8, 1, condition_shape=(3, 2, 12), patch=3)
    x, t, c = torch.randn(4, 2, 12), torch.full((4,), 9.0), torch.randn(4, 3, 2, 12)
    assert torch.equal(network._unfold(network._fold(x)), x)
    torch.testing.assert_close(network(x.roll(3, -1), t, c.roll(3, -1)), network(x, t, c).roll(3, -1))
    assert TimeConditionedConv1d((2, 12), 99.0, 8, 1, padding_mode="zeros")(x, t).shape == x.shape
    with pytest.raises(ValueError, match=r"c=None: this network needs a condition of shape \(3, 2, 12\)"):
        network(x, t)
    with pytest.raises(ValueError, match="patch=5: need a divisor of the 12 points"):
        TimeConditionedConv1d((2, 12), 99.0, 8, 1, patch=5)
    with pytest.raises(ValueError, match=r"sample_shape=\(2, 12\), condition_shape=\(1, 24\): need"):
        TimeConditionedConv1d((2, 12), 99.0, 8, 1, condition_shape=(1, 24))
