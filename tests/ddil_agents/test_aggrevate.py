"""AggreVaTe: where a completion ends, and what a student that learns it samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import MIXTURE, K, N, corners, fields, labelled, make, only
from torch import Tensor

from ddil_agents.aggrevate import Aggrevate, AggrevateConfig
from ddil_agents.states.batch import Batch
from ddil_env import ExpertPolicy, GaussianMixtureExpert, NoiseSchedule, Prediction, TimeGrid, unroll

pytestmark = pytest.mark.usefixtures("own_generator")


@pytest.mark.parametrize("expert", [corners(), labelled()])
@pytest.mark.parametrize(("source", "states_per_rollout"), [(0, 1), (1, 1), (2, 1), (1, "all")])
def test_a_completion_is_where_the_teacher_ends(expert: GaussianMixtureExpert, source: int, states_per_rollout: Any) -> None:
    learner = make(Aggrevate, expert, beta=MIXTURE, states_per_rollout=states_per_rollout)
    before = expert.nfe
    states = learner.collector.collect(24, only(source), 0)
    spent, pair = expert.nfe - before, 1 if expert.guidance_scale == 1 else 2
    for state in states.split(1):
        x, t, _, c, _, end = fields(state)
        times = learner.grid.times[learner.grid.times <= t]
        for now, then in pairwise(times):
            x = ExpertPolicy(expert, K).act(x, now[None], then[None], c)
        torch.testing.assert_close(end, x, atol=1e-5, rtol=1e-5)
        own = 1 if states_per_rollout == "all" else N  # the teacher's own rollout ends there, and takes N steps in all
        assert state["nfe"] == (own if source == 1 else len(times) - 1) * K * pair
    assert not states["s"].any()
    assert spent == int(states["nfe"].sum())
    if source == 2:
        assert spent == 24 * K * pair * (N + 1) / 2


def test_aggrevates_loss_is_the_distance_to_the_completion() -> None:
    learner = make(Aggrevate, beta=MIXTURE)
    batch = learner.trainer.collect()
    x_hat = learner.student(batch["x_t"], batch["t"]).x_0
    expected = learner.weight(batch["t"]).float() * (x_hat - batch["x_s"]).square().mean(1)
    torch.testing.assert_close(learner.loss(Batch(batch)), expected)


class EndOfTheOde(GaussianMixtureExpert):
    """N(0, std²): a denoiser that knows where the ODE ends, x̂_0 = (std/v_t) x_t."""

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, sigma = self.schedule(t, x_t.double())
        std = float(self.stds[0])
        return self.schedule.prediction(std / (alpha**2 * std**2 + sigma**2).sqrt() * x_t.double(), x_t.double(), t, "x_0")


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_a_student_that_names_the_end_samples_the_data_with_fresh_noise_and_not_by_ddim(std: float) -> None:
    expert = EndOfTheOde([[0.0] * 64], std)
    grid, generator = TimeGrid(expert.schedule, N), torch.Generator().manual_seed(0)
    x_T = torch.randn(2000, 64, generator=generator, dtype=torch.float64)
    anew, along = (unroll(ExpertPolicy(expert), grid, x_T, kernel=k, generator=generator) for k in ("renoise", "ddim"))  # type: ignore[arg-type]
    alpha, sigma = expert.schedule.coefficients(grid.times)
    true = (alpha**2 * std**2 + sigma**2).sqrt()
    torch.testing.assert_close(anew.std((0, 2)), true, rtol=0.02, atol=0)
    assert (along.std((0, 2)) / true)[1:-1].min() > 1.02  # wider: the chord leaves the ODE


def test_regressing_to_the_completion_of_ones_own_step_has_another_fixed_point() -> None:
    """The docstring's 1.9: g = (1/v_s) M(g) for N(0, 1), M(g) = (α_s − r α_t) g + r the gain of the student's own step."""
    schedule = NoiseSchedule()
    times = TimeGrid(schedule, N).times
    alpha, sigma = schedule.coefficients(times)
    width = torch.ones((), dtype=torch.float64)
    for i in range(N - 1):
        r = sigma[i + 1] / sigma[i]
        k = alpha[i + 1] - r * alpha[i]
        g = torch.zeros((), dtype=torch.float64)
        for _ in range(2000):  # v_s = 1 for unit variance
            g = k * g + r
        width = width * (k * g + r)
    assert float(width) == pytest.approx(1.9, abs=0.01)


def test_aggrevate_refuses_mixed_rollouts() -> None:
    with pytest.raises(ValueError, match=r"p_expert=0.5: .*AggreVaTe has no mixed rollouts; use 0"):
        AggrevateConfig(p_expert=0.5)
