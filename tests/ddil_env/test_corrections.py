"""Corrections at inference: scaled ε, shifted times and mixed actors, each by its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CORNERS, N, corners, labelled
from torch import Tensor

from ddil_agents import Evaluation, Evaluator
from ddil_agents.evaluation.trajectories import Trajectories, record
from ddil_env import DdimPolicy, DenoisingEnv, ExpertPolicy, GaussianMixtureExpert, Prediction, StudentPolicy, TimeGrid, unroll
from ddil_env.broadcast import broadcast
from ddil_env.corrections import Mixed, ScaledEpsilon, TimeShifted
from ddil_env.mdp import Kernel


def gaussian(std: float = 1.0, d: int = 2) -> GaussianMixtureExpert:
    return GaussianMixtureExpert([[0.0] * d], std)


pytestmark = pytest.mark.usefixtures("own_generator")


def student_policy(expert: GaussianMixtureExpert, width: int = 16) -> StudentPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StudentPolicy(expert.make_student(width=width), expert)


def noise(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def at(policy: DdimPolicy, n: int, step: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A state of a 4-step denoising, in the middle."""
    times = TimeGrid(policy.schedule, N).times
    return noise(n, seed=1), times[step].expand(n), times[step + 1].expand(n)


@pytest.mark.parametrize("scale", [1.005, 0.9])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
def test_a_scaled_epsilon_moves_x_0_so_that_both_still_make_the_latent(scale: float, schedule: Any) -> None:
    expert = GaussianMixtureExpert(CORNERS, 0.25, schedule=schedule)
    scaled, plain = ScaledEpsilon(ExpertPolicy(expert), scale), ExpertPolicy(expert)
    x, t, s = at(plain, 7)
    pred = scaled.predict(x, t, None, None)
    torch.testing.assert_close(pred.eps, expert.predict(x, t).eps / scale)
    torch.testing.assert_close(pred.latent(t), x)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = expert.schedule(t, x), expert.schedule(s, x)
    expected = alpha_s / alpha_t * x + (sigma_s - alpha_s * sigma_t / alpha_t) * expert.predict(x, t).eps / scale  # x_s
    torch.testing.assert_close(scaled.act(x, t, s), expected)
    first = at(plain, 7, step=0)
    assert torch.equal(scaled.act(*first), plain.act(*first))
    assert ScaledEpsilon(ExpertPolicy(expert, 3), scale).nfe_per_action == 3


class Exaggerating(GaussianMixtureExpert):
    """A network that finds too much noise, by a factor, from its second step on."""

    factor = 1.05

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        pred = super().predict(x_t, t, c)
        off = broadcast((self.factor - 1) * (t < self.schedule.t_max), x_t) * pred.eps
        alpha, sigma = self.schedule(t, x_t)
        return Prediction(pred.x_0 - sigma / alpha * off, pred.eps + off, t, self.schedule)


def test_epsilon_scaling_mends_a_network_that_finds_too_much_noise() -> None:
    right, wrong = ExpertPolicy(corners()), ExpertPolicy(Exaggerating(CORNERS, 0.25, [1, 2, 3, 4]))
    grid = TimeGrid(right.schedule, 8)
    truth, off, mended = (unroll(p, grid, noise(50))[:, -1] for p in (right, wrong, ScaledEpsilon(wrong, 1.05)))
    torch.testing.assert_close(mended, truth, atol=1e-3, rtol=1e-3)
    assert (off - truth).abs().mean() > 0.03


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_corrections_that_correct_nothing_change_nothing(kernel: Kernel) -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 3)
    c = torch.arange(20) % 2
    grid = TimeGrid(expert.schedule, N)

    def path(policy: DdimPolicy) -> Tensor:
        return unroll(policy, grid, noise(20), c, kernel=kernel, generator=torch.Generator().manual_seed(1))

    for policy in (ScaledEpsilon(student, 1), TimeShifted(student, 0, 0), TimeShifted(student, 100, 999), Mixed(teacher, student, 0)):
        assert torch.equal(path(policy), path(student))
    for policy in (ScaledEpsilon(teacher, 1), TimeShifted(teacher, 0, 0), Mixed(teacher, student, 1)):
        assert torch.equal(path(policy), path(teacher))


def noised(expert: GaussianMixtureExpert, t: Tensor) -> Tensor:
    """States of N(0, 0.5²) data at t (n,)."""
    x_0, eps = (noise(len(t), expert.sample_shape[0], seed) for seed in (1, 2))
    return expert.schedule.add_noise(0.5 * x_0, eps, t)


@pytest.mark.parametrize("wrong", [-40, -7, 0, 12, 40])
def test_the_time_shift_finds_the_time_whose_noise_a_state_holds(wrong: int) -> None:
    expert = gaussian(0.5, d=200_000)
    t = torch.full((4,), 300.0)
    x = noised(expert, t + wrong)
    policy = TimeShifted(ExpertPolicy(expert), 100, 200, data_variance=0.25)
    shifted = policy.shifted(x, t, t - 200)
    assert (shifted - (t + wrong)).abs().max() <= 5  # the variance of so many entries is known to 0.3 %, which is 1.3 steps
    assert torch.equal(shifted, shifted.round())


def test_the_time_shift_keeps_to_its_bounds() -> None:
    policy = ExpertPolicy(gaussian(0.5, d=100))
    t, first, x = torch.full((4,), 600.0), torch.full((4,), 999.0), noise(4, 100)
    assert torch.equal(TimeShifted(policy, 100, 600).shifted(0 * x, t, t - 300), t)  # the cutoff
    assert torch.equal(TimeShifted(policy, 7, 200).shifted(0 * x, t, t - 300), t - 3)  # the window
    assert torch.equal(TimeShifted(policy, 2000, 0).shifted(0 * x, t, t - 100), t - 99)  # later than s
    assert torch.equal(TimeShifted(policy, 2000, 0).shifted(9 * x, t, t - 100), first)  # within the chain
    assert torch.equal(TimeShifted(policy, 2000, 0).shifted(0 * x, first, t), first)  # pure noise


@pytest.mark.parametrize("wrong", [-60, 60])
def test_the_time_shift_mends_a_state_that_holds_too_much_noise_or_too_little(wrong: int) -> None:
    expert = gaussian(0.5, d=5000)
    t, s = torch.full((40,), 400.0), torch.full((40,), 200.0)
    x = noised(expert, t + wrong)
    plain = ExpertPolicy(expert, 50)
    alpha, sigma = expert.schedule.coefficients(s[:1])
    true = float((alpha**2 * 0.25 + sigma**2).sqrt())
    off = [abs(float(p.act(x, t, s).std()) / true - 1) for p in (plain, TimeShifted(plain, 200, 0, data_variance=0.25))]
    assert off[0] > 0.04
    assert off[1] < 0.01


def test_a_shifted_step_is_the_policys_own_from_the_other_time() -> None:
    expert = gaussian(0.5, d=500)
    t, s = torch.full((3,), 600.0), torch.full((3,), 300.0)
    x, fresh = 1.1 * noise(3, 500, seed=1), noise(3, 500, seed=2)
    inner = ExpertPolicy(expert, 2)
    policy = TimeShifted(inner, 200, 100)
    other = policy.shifted(x, t, s)
    assert (other > t).all()
    assert torch.equal(policy.act(x, t, s), inner.act(x, other, s))
    assert torch.equal(policy.act_renoise(x, t, s, fresh), inner.act_renoise(x, other, s, fresh))


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_in_turns_each_sample_is_acted_on_by_one_of_the_two(p: float) -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 3)
    x, t, s = at(teacher, 400)
    c = torch.arange(400) % 2
    theirs, own = teacher.act(x, t, s, c), student.act(x, t, s, c)
    expert.nfe = student.student.nfe = 0
    mixed = Mixed(teacher, student, p, seed=3)
    taken = mixed.act(x, t, s, c)
    by_teacher = torch.rand(400, generator=torch.Generator().manual_seed(3)) < p
    torch.testing.assert_close(taken, torch.where(by_teacher[:, None], theirs, own))
    assert expert.nfe == 6 * int(by_teacher.sum())
    assert student.student.nfe == int((~by_teacher).sum())
    assert mixed.nfe_per_action == pytest.approx(6 * p + 1 - p)
    assert not torch.equal(mixed.act(x, t, s, c), taken)  # the draws go on
    assert torch.equal(Mixed(teacher, student, p, seed=3).act(x, t, s, c), taken)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_recorded_denoising_says_who_acted_in_each_step(shifted: bool, tmp_path: Path) -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 3)
    grid, c = TimeGrid(expert.schedule, N), torch.arange(20) % 2
    mixed = Mixed(teacher, student, 0.5, seed=3)
    policy = TimeShifted(mixed, 0, 0) if shifted else mixed
    taken = record(policy, teacher, grid, noise(20), c)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([torch.rand(20, generator=generator) < 0.5 for _ in range(N)], 1)
    assert torch.equal(taken.by_expert, drawn)
    torch.testing.assert_close(taken.error[taken.by_expert], torch.zeros(int(drawn.sum())))
    assert (taken.error[~taken.by_expert] > 0).all()
    assert not record(student, teacher, grid, noise(20), c).by_expert.any()
    assert record(ScaledEpsilon(teacher, 1.01), teacher, grid, noise(20), c).by_expert.all()
    taken.save(tmp_path / "taken.safetensors")
    assert torch.equal(Trajectories.load(tmp_path / "taken.safetensors").by_expert, taken.by_expert)


def test_the_judge_and_the_environment_take_a_corrected_policy() -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 4)
    evaluator = Evaluator(teacher, TimeGrid(expert.schedule, N), Evaluation(n=40, n_action=10))
    plain = evaluator.evaluate(student)
    for policy, nfe in (
        (ScaledEpsilon(student, 1.01), 4),
        (TimeShifted(ScaledEpsilon(student, 1.01), 60, 100), 4),
        (Mixed(teacher, TimeShifted(student, 60, 100), 0.5), 18),
    ):
        for kernel in ("ddim", "renoise"):
            result = evaluator.evaluate(policy, kernel=kernel)  # type: ignore[arg-type]
            assert result.keys() == plain.keys()
            assert result["nfe_per_sample"] == nfe
            assert result["frechet"] > 0
        path = DenoisingEnv(expert, num_steps=N, batch_size=[6]).rollout(N, policy)
        assert path["next", "x_t"].shape == (6, N, 2)
    assert evaluator.evaluate(Mixed(teacher, student, 0.8))["endpoint_rmse"] < plain["endpoint_rmse"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: ScaledEpsilon(p, 0.0), "scale=0.0: .*need a positive number near 1"),
        (lambda p: ScaledEpsilon(TimeShifted(p, 4, 0), 1.1), "a TimeShifted wraps other policies; apply ScaledEpsilon to the inner policy"),
        (lambda p: TimeShifted(p, -1, 0), "window=-1: need a number ≥ 0"),
        (lambda p: TimeShifted(p, 4, math.nan), "cutoff=nan"),
        (lambda p: Mixed(p, p, 1.2), r"p=1.2: need a probability in \[0, 1\]"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(build: Callable[[DdimPolicy], DdimPolicy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ExpertPolicy(corners()))
