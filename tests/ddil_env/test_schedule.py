"""Facts about the noise schedule, the DDIM step, its inversion and the time grids."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddil_env import (
    Box,
    ExpertPolicy,
    GaussianMixtureExpert,
    NoiseSchedule,
    Prediction,
    TimeGrid,
    Unbounded,
    ddim_step,
    invert_ddim,
    renoise_step,
    unroll,
)
from ddil_env.prediction import PredictionType
from ddil_env.schedule import Kind
from ddil_env.time_grid import LCM_SOLVER_STEPS, GridKind, substep_times

KINDS = get_args(Kind)
VP = [kind for kind in KINDS if kind != "flow"]
BATCHES = [1, 3, 5]  # the samples below have width 5: where batch and width agree a wrong broadcast hides


def times(schedule: NoiseSchedule, n: int, seed: int = 0, first: int = 1) -> Tensor:
    """n random whole times, `first` … t_max."""
    return torch.randint(first, int(schedule.t_max) + 1, (n,), generator=torch.Generator().manual_seed(seed)).float()


def earlier(t: Tensor, seed: int = 1) -> Tensor:
    """A random whole time before each t, 0 among them."""
    u = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed))
    return (u * t).floor()


def latents(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def diffusers_twin(kind: str, beta_start: float = 0.00085, beta_end: float = 0.012, **options: object) -> DDIMScheduler:
    schedule = {"cosine": "squaredcos_cap_v2"}.get(kind, kind)
    return DDIMScheduler(beta_schedule=schedule, beta_start=beta_start, beta_end=beta_end, clip_sample=False, **options)


# The table


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_are_float64_and_obey_their_identity(kind: Kind) -> None:
    schedule = NoiseSchedule(kind)
    alpha, sigma = schedule.coefficients(torch.arange(int(schedule.t_max) + 1).float())
    assert alpha.dtype == sigma.dtype == torch.float64
    total = alpha + sigma if kind == "flow" else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-14, rtol=0)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_time_zero_is_clean_data(kind: Kind) -> None:
    alpha, sigma = NoiseSchedule(kind).coefficients(torch.zeros(2))
    assert alpha.tolist() == [1, 1]
    assert sigma.tolist() == [0, 0]


def test_without_set_alpha_to_one_time_zero_is_the_tables_first_level() -> None:
    alpha, sigma = NoiseSchedule("scaled_linear", set_alpha_to_one=False).coefficients(torch.zeros(1))
    assert float(alpha) == pytest.approx(math.sqrt(1 - 0.00085), rel=1e-14)
    assert float(sigma) == pytest.approx(math.sqrt(0.00085), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "beta_start", "beta_end"), [("scaled_linear", 0.00085, 0.012), ("linear", 1e-4, 0.02), ("cosine", 1e-4, 0.02)]
)
def test_table_equals_diffusers(kind: Kind, beta_start: float, beta_end: float) -> None:
    alpha, sigma = NoiseSchedule(kind, beta_start, beta_end, set_alpha_to_one=False).coefficients(torch.arange(1000))
    theirs = diffusers_twin(kind, beta_start, beta_end).alphas_cumprod.double()  # a float32 product of 1000 factors
    torch.testing.assert_close(alpha**2, theirs, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(sigma**2, 1 - theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", VP)
def test_small_sigma_keeps_the_digits_that_float32_loses(kind: Kind) -> None:
    alpha, sigma = NoiseSchedule(kind).coefficients(torch.arange(1, 20))
    if kind == "cosine":
        angle = (np.arange(1001, dtype=np.longdouble) / 1000 + np.longdouble("0.008")) / np.longdouble("1.008") * np.longdouble(math.pi) / 2
        kept = np.cos(angle[1:]) ** 2 / np.cos(angle[:-1]) ** 2
    elif kind == "scaled_linear":
        kept = 1 - np.linspace(np.longdouble(0.00085**0.5), np.longdouble(0.012**0.5), 1000) ** 2
    else:
        kept = 1 - np.linspace(np.longdouble(0.00085), np.longdouble(0.012), 1000)
    exact = torch.from_numpy(np.sqrt(1 - np.cumprod(kept)[1:20]).astype(np.float64))  # in 64 bits of mantissa
    torch.testing.assert_close(sigma, exact, atol=0, rtol=1e-10)
    in_float32 = (1 - alpha.float() ** 2).sqrt()
    assert (in_float32 / exact - 1).abs().max() > 1e-6


def test_coefficients_leave_broadcast_in_float32_or_wider() -> None:
    schedule, t = NoiseSchedule(), torch.tensor([10.0, 20.0])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        for coefficient in schedule(t, torch.zeros(2, 3, 4, 5, dtype=dtype)):
            assert coefficient.shape == (2, 1, 1, 1)
            assert coefficient.dtype == expected


# Conversions


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(s, p) for s in KINDS for p in get_args(PredictionType) if (s, p) != ("flow", "v") and (p != "flow" or s == "flow")],
)
def test_conversions_are_mutually_inverse(schedule: Kind, kind: PredictionType, b: int) -> None:
    noise = NoiseSchedule(schedule)
    # float32 divides by α or σ: away from the two ends, where that costs digits (the ends are held in float64 below)
    t = times(noise, b, first=100).clamp(max=900)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        x_t, output = latents(b, 2, 5, dtype=dtype), latents(b, 2, 5, seed=3, dtype=dtype)
        pred = noise.prediction(output, x_t, t, kind)
        torch.testing.assert_close(pred.output(kind), output, atol=tolerance, rtol=tolerance)
        alpha, sigma = noise(t, x_t)
        torch.testing.assert_close(alpha * pred.x_0 + sigma * pred.eps, x_t, atol=tolerance, rtol=tolerance)
        for other in ("eps", "x_0", "flow" if schedule == "flow" else "v"):  # through every other reading and back
            again = noise.prediction(pred.output(other), x_t, t, other)
            torch.testing.assert_close(again.x_0, pred.x_0, atol=10 * tolerance, rtol=10 * tolerance)
            torch.testing.assert_close(again.eps, pred.eps, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("kind", VP)
def test_conversions_hold_at_both_ends_in_float64(kind: Kind) -> None:
    noise = NoiseSchedule(kind)
    t = torch.tensor([1.0, noise.t_max])
    x_t, v = latents(2, 5, dtype=torch.float64), latents(2, 5, seed=3, dtype=torch.float64)
    pred = noise.prediction(v, x_t, t, "v")
    torch.testing.assert_close(noise.prediction(pred.eps, x_t, t, "eps").v, v, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(noise.prediction(pred.x_0, x_t, t, "x_0").v, v, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
def test_bfloat16_outputs_are_converted_in_float32(kind: PredictionType) -> None:
    noise, t = NoiseSchedule(), torch.tensor([999.0, 20.0])
    x_t, output = latents(2, 5, dtype=torch.bfloat16), latents(2, 5, seed=3, dtype=torch.bfloat16)
    pred, wide = noise.prediction(output, x_t, t, kind), noise.prediction(output.float(), x_t.float(), t, kind)
    assert pred.x_0.dtype == pred.eps.dtype == torch.float32
    torch.testing.assert_close(pred.x_0, wide.x_0, atol=0, rtol=0)
    torch.testing.assert_close(pred.eps, wide.eps, atol=0, rtol=0)


def test_prediction_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown prediction type 'score'; choose one of: eps, v, x_0, flow"):
        NoiseSchedule().prediction(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), "score")  # type: ignore[arg-type]
    for schedule, kind in (("flow", "v"), ("cosine", "flow")):
        with pytest.raises(ValueError, match=rf"'{kind}' does not go with the '{schedule}' schedule"):
            NoiseSchedule(schedule).check_prediction_type(kind)  # type: ignore[arg-type]


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule kind 'sigmoid'; choose one of: scaled_linear, linear, cosine, flow"):
        NoiseSchedule("sigmoid")  # type: ignore[arg-type]
    for beta_start, beta_end in ((0.0, 0.01), (0.02, 0.01), (0.01, 1.0), (math.nan, 0.01)):
        with pytest.raises(ValueError, match=r"need 0 < beta_start ≤ beta_end < 1"):
            NoiseSchedule("linear", beta_start, beta_end)
    with pytest.raises(ValueError, match="num_train_steps=1: a chain needs at least 2 steps"):
        NoiseSchedule(num_train_steps=1)


# Steps


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_step_to_zero_returns_x_0(kind: Kind, b: int) -> None:
    noise = NoiseSchedule(kind)
    pred = noise.prediction(latents(b, 5), latents(b, 5, seed=3), times(noise, b), "x_0")
    assert torch.equal(ddim_step(pred, torch.zeros(b)), pred.x_0)


@pytest.mark.parametrize("kind", VP)
@pytest.mark.parametrize(("t", "s"), [(999, 749), (999, 20), (640, 639), (77, 1), (300, 0), (1, 0)])
def test_ddim_step_equals_diffusers(kind: Kind, t: int, s: int) -> None:
    theirs = diffusers_twin(kind, set_alpha_to_one=False)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    noise = NoiseSchedule(kind, set_alpha_to_one=False)  # diffusers' time 0 is a noise level of its table
    theirs.alphas_cumprod = noise.coefficients(torch.arange(1000))[0] ** 2  # the tables are compared above; this is about the step
    theirs.num_inference_steps = Fraction(1000, t - s)  # its only handle on the stride: T // n
    x_t, eps = latents(3, 5, dtype=torch.float64), latents(3, 5, seed=3, dtype=torch.float64)
    ours = ddim_step(noise.prediction(eps, x_t, torch.full((3,), float(t)), "eps"), torch.full((3,), float(s)))
    torch.testing.assert_close(ours, theirs.step(eps, t, x_t).prev_sample, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_renoise_step_is_x_0_diffused_anew_and_x_0_itself_at_zero(kind: Kind) -> None:
    noise = NoiseSchedule(kind)
    pred = noise.prediction(latents(3, 5), latents(3, 5, seed=3), torch.tensor([900.0, 500.0, 20.0]), "x_0")
    fresh = latents(3, 5, seed=4)
    assert torch.equal(renoise_step(pred, torch.zeros(3), fresh), pred.x_0)
    s = torch.tensor([400.0, 10.0, 3.0])
    alpha, sigma = noise.coefficients(s)
    expected = alpha[:, None] * pred.x_0 + sigma[:, None] * fresh
    torch.testing.assert_close(renoise_step(pred, s, fresh).double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("s", [500.0, 501.0, 999.0])
def test_a_step_away_from_the_data_is_refused(s: float) -> None:
    noise, x_t = NoiseSchedule(), latents(2, 5)
    pred = noise.prediction(x_t, x_t, torch.tensor([999.0, 500.0]), "eps")
    target = torch.tensor([20.0, s])  # one bad row is enough
    for step in (
        lambda: ddim_step(pred, target),
        lambda: renoise_step(pred, target, x_t),
        lambda: invert_ddim(noise, x_t, pred.t, x_t, target),
    ):
        with pytest.raises(ValueError, match="a step must lead toward the data, to a time earlier than t"):
            step()


# Inversion


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_ddim_step_with_the_inverted_target_lands_on_x_s(kind: Kind, b: int) -> None:
    noise = NoiseSchedule(kind)
    for seed in range(20):
        t = times(noise, b, seed)
        s = earlier(t, seed)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            x_t, x_s = latents(b, 2, 5, seed=seed, dtype=dtype), latents(b, 2, 5, seed=seed + 100, dtype=dtype)
            pred = invert_ddim(noise, x_t, t, x_s, s)
            # neighbours in time make x̂_0 large: the error is measured against it, for that is what float32 resolves
            scale = tolerance * max(1.0, float(pred.x_0.abs().max()))
            torch.testing.assert_close(ddim_step(pred, s), x_s, atol=scale, rtol=0)
            alpha, sigma = noise(t, x_t)
            torch.testing.assert_close(alpha * pred.x_0 + sigma * pred.eps, x_t, atol=scale, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_substeps_invert_to_one_step_that_lands_where_they_did(kind: Kind, k: int) -> None:
    expert = GaussianMixtureExpert([[-1.0, 0.3], [0.5, 1.0]], [0.2, 0.4], schedule=kind)
    t, s = torch.tensor([float(expert.schedule.t_max), 750.0, 250.0]), torch.tensor([500.0, 500.0, 0.0])
    x_t = latents(3, 2)
    x_s = ExpertPolicy(expert, substeps=k).act(x_t, t, s)
    torch.testing.assert_close(ddim_step(invert_ddim(expert.schedule, x_t, t, x_s, s), s), x_s, atol=1e-5, rtol=1e-5)
    if k == 1:  # one substep's target is the expert's own estimate
        torch.testing.assert_close(invert_ddim(expert.schedule, x_t, t, x_s, s).x_0, expert.predict(x_t, t).x_0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_steps_target_is_x_s(kind: Kind) -> None:
    noise = NoiseSchedule(kind)
    x_t, x_s = latents(6, 5), latents(6, 5, seed=3)
    assert torch.equal(invert_ddim(noise, x_t, times(noise, 6), x_s, torch.zeros(6)).x_0, x_s)


@pytest.mark.parametrize("kind", VP)
def test_inversion_at_small_sigma_is_accurate_where_float32_coefficients_are_not(kind: Kind) -> None:
    noise = NoiseSchedule(kind)
    t, s = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 1.0])
    x_t, x_s = latents(2, 5), latents(2, 5, seed=3)
    exact = invert_ddim(noise, x_t.double(), t, x_s.double(), s).x_0
    ours = invert_ddim(noise, x_t, t, x_s, s).x_0
    scale = float(exact.abs().max())
    assert float((ours - exact).abs().max()) / scale < 1e-6
    (a_t, _), (a_s, _) = ((a.float()[:, None], b) for a, b in map(noise.coefficients, (t, s)))
    ratio = (1 - a_s**2).sqrt() / (1 - a_t**2).sqrt()
    naive = (x_s - ratio * x_t) / (a_s - ratio * a_t)
    lost = float((naive - exact).abs().max()) / scale
    assert lost > (1e-5 if kind == "cosine" else 1e-6)  # cosine's σ_1 is a sixth of the others'


# Predictions


@pytest.mark.parametrize("b", BATCHES)
def test_guidance_is_linear_in_the_scale(b: int) -> None:
    noise, t = NoiseSchedule(), torch.full((b,), 500.0)
    x_t = latents(b, 2, 5)
    cond, uncond = (noise.prediction(latents(b, 2, 5, seed=seed), x_t, t, "eps") for seed in (3, 4))
    assert torch.equal(cond.guided_by(uncond, 1.0).x_0, cond.x_0)
    assert torch.equal(cond.guided_by(uncond, 0.0).eps, uncond.eps)
    w = torch.linspace(0.5, 9, b)
    each = cond.guided_by(uncond, w)
    for i in range(b):
        one = cond.guided_by(uncond, float(w[i]))
        for ours, c, u, same in ((one.x_0, cond.x_0, uncond.x_0, each.x_0), (one.eps, cond.eps, uncond.eps, each.eps)):
            torch.testing.assert_close(ours[i], u[i] + w[i] * (c[i] - u[i]), atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(same[i], ours[i])
    alpha, sigma = noise(t, x_t)
    torch.testing.assert_close(alpha * each.x_0 + sigma * each.eps, x_t, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_projection_keeps_x_t_and_leaves_what_lies_inside(kind: Kind) -> None:
    noise = NoiseSchedule(kind)
    t, x_t, x_0 = torch.tensor([900.0, 500.0, 20.0]), latents(3, 5), 0.9 * latents(3, 5, seed=3)
    pred = noise.prediction(x_0, x_t, t, "x_0")
    outside = x_0.abs() > 1
    assert outside.any()
    projected = pred.projected(Box(1.0))
    assert torch.equal(projected.x_0, x_0.clamp(-1, 1))
    assert torch.equal(projected.x_0[~outside], x_0[~outside])
    assert torch.equal(projected.eps[~outside], pred.eps[~outside])
    assert not torch.equal(projected.eps, pred.eps)
    alpha, sigma = noise(t, x_t)
    torch.testing.assert_close(alpha * projected.x_0 + sigma * projected.eps, x_t, atol=1e-5, rtol=1e-5)
    for support in (Box(10.0), Unbounded()):
        same = pred.projected(support)
        assert torch.equal(same.x_0, pred.x_0)
        assert torch.equal(same.eps, pred.eps)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_box_without_width_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="a box needs a positive half-width"):
        Box(bound)


# Grids


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linspace", [999, 749, 500, 250, 0]), ("dmd2", [999, 749, 499, 249, 0]), ("trailing", [999, 749, 499, 249, 0])],
)
def test_grids_of_four_steps(kind: GridKind, expected: list[int]) -> None:
    assert TimeGrid(NoiseSchedule(), 4, kind).times.tolist() == expected


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 50, 999])
def test_the_papers_grid_is_a_rounded_linspace(num_steps: int) -> None:
    expected = np.linspace(0, 999, num_steps + 1).round()[::-1]
    assert TimeGrid(NoiseSchedule(), num_steps).times.tolist() == expected.tolist()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 16, 32, 50, 64, 500, 666])  # at 16, 32 and 64 halves are rounded
def test_trailing_grid_equals_diffusers(num_steps: int) -> None:
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(num_steps)
    assert TimeGrid(NoiseSchedule(), num_steps, "trailing").times.tolist() == [*theirs.timesteps.tolist(), 0]


def test_flow_grids_start_at_pure_noise_and_need_not_be_whole() -> None:
    flow = NoiseSchedule("flow")
    for kind in get_args(GridKind):
        expected = [1000, 760, 500, 260, 0] if kind == "lcm" else [1000, 750, 500, 250, 0]  # lcm: every 20th time alone
        assert TimeGrid(flow, 4, kind).times.tolist() == expected
    torch.testing.assert_close(TimeGrid(flow, 3).times, torch.tensor([3000, 2000, 1000, 0]) / 3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_shifted_flow_has_diffusers_own_sigmas(shift: float) -> None:
    schedule, grid = NoiseSchedule("flow", shift=shift), TimeGrid(NoiseSchedule("flow", shift=shift), 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=(grid.times[:-1] / 1000).tolist())
    alpha, sigma = schedule.coefficients(grid.times)
    torch.testing.assert_close(sigma.float(), scheduler.sigmas)
    torch.testing.assert_close(alpha + sigma, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "shift"), [("flow", 0.0), ("flow", math.inf), ("flow", math.nan), ("cosine", 3.0)])
def test_a_shift_that_is_not_positive_or_not_of_flow_is_refused(kind: Kind, shift: float) -> None:
    with pytest.raises(ValueError, match=f"shift={shift} with the '{kind}' schedule: need a positive, finite number, and 1 unless"):
        NoiseSchedule(kind, shift=shift)


@pytest.mark.parametrize("kind", get_args(GridKind))
def test_every_grid_falls_strictly_to_zero(kind: GridKind) -> None:
    for schedule in (NoiseSchedule(), NoiseSchedule("cosine", num_train_steps=10), NoiseSchedule("flow")):
        most = int(2 * schedule.num_train_steps // 3)
        for num_steps in (1, 5, 6, min(most, LCM_SOLVER_STEPS) if kind == "lcm" else most):
            grid = TimeGrid(schedule, num_steps, kind).times
            assert grid.shape == (num_steps + 1,)
            assert grid.dtype == torch.float32
            assert (grid[0], grid[-1]) == (schedule.t_max, 0)
            assert (grid.diff() < 0).all()


def test_previous_is_the_latest_grid_time_before_t() -> None:
    grid = TimeGrid(NoiseSchedule(), 4)
    t = torch.tensor([999, 998, 750, 749, 748, 501, 500, 250, 249, 1, 0]).float()
    assert grid.previous(t).tolist() == [749, 749, 749, 500, 500, 500, 250, 0, 0, 0, 0]
    assert grid.previous(t[::2]).tolist() == [749, 749, 500, 250, 0, 0]  # also of a view


@pytest.mark.parametrize("num_steps", [0, -1, 1000])
def test_a_grid_longer_than_the_chain_or_empty_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps={num_steps}: need a whole number from 1 to 999"):
        TimeGrid(NoiseSchedule(), num_steps)


def test_a_trailing_grid_that_would_end_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps=667: a trailing grid of so many steps reaches 0 early; need at most 666"):
        TimeGrid(NoiseSchedule(), 667, "trailing")


def test_an_unknown_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown time grid 'karras'; choose one of: linspace, dmd2, trailing"):
        TimeGrid(NoiseSchedule(), 4, "karras")  # type: ignore[arg-type]


def test_substeps_are_whole_strides_that_reach_zero_last() -> None:
    noise = NoiseSchedule()
    for t, s in ((999, 749), (999, 0), (750, 500), (500, 250), (7, 0), (1, 0)):
        for k in (1, 2, 3, 5, 8, 9, 15, 27, 50):
            grid = substep_times(noise, torch.tensor([float(t)]), torch.tensor([float(s)]), k)[:, 0]
            exact = [math.ceil(t - Fraction(i * (t - s), k)) for i in range(k + 1)]  # float error must not push one up
            assert grid.tolist() == exact
            assert (grid[0], grid[-1]) == (t, s)
            assert (grid[:-1] > 0).all()


def test_substeps_of_each_row_are_its_own_and_real_for_flow() -> None:
    t, s = torch.tensor([900.0, 100.0]), torch.tensor([600.0, 0.0])
    assert substep_times(NoiseSchedule(), t, s, 2).tolist() == [[900, 100], [750, 50], [600, 0]]
    assert substep_times(NoiseSchedule("flow"), torch.tensor([5.0]), torch.tensor([0.0]), 2).tolist() == [[5], [2.5], [0]]


def test_a_substep_between_equal_times_stays() -> None:
    expert = GaussianMixtureExpert([[0.5], [-1.0]], 0.1)
    x_t, t, s = latents(3, 1), torch.full((3,), 2.0), torch.zeros(3)
    many, two = (ExpertPolicy(expert, substeps=k).act(x_t, t, s) for k in (7, 2))  # 2, 2, 2, 2, 1, 1, 1, 0
    torch.testing.assert_close(many, two, atol=1e-5, rtol=1e-5)


# Closed forms for Gaussian data N(μ, λ I): algorithms.md 8

GAUSSIANS = [(kind, seed) for kind in KINDS for seed in range(3)]


def gaussian(kind: Kind, seed: int, d: int = 3) -> tuple[GaussianMixtureExpert, Tensor, float]:
    """An expert on one Gaussian, with its random mean (d,) and variance in 0.01 … 4."""
    rng = np.random.default_rng(seed)
    mu, lam = torch.from_numpy(rng.normal(size=d)), float(10 ** rng.uniform(-2, 0.6))
    return GaussianMixtureExpert(mu[None], math.sqrt(lam), schedule=kind), mu, lam


def at(expert: GaussianMixtureExpert, t: float) -> tuple[float, float]:
    alpha, sigma = expert.schedule.coefficients(torch.tensor([float(t)]))
    return float(alpha), float(sigma)


def gain(expert: GaussianMixtureExpert, lam: float, t: float, u: float) -> float:
    """M_{t→u} = (α_t α_u λ + σ_t σ_u)/v_t² on z = x − α μ."""
    (a_t, s_t), (a_u, s_u) = at(expert, t), at(expert, u)
    return (a_t * a_u * lam + s_t * s_u) / (a_t**2 * lam + s_t**2)


@pytest.mark.parametrize(("kind", "seed"), GAUSSIANS)
def test_gaussian_posterior_mean(kind: Kind, seed: int) -> None:
    expert, mu, lam = gaussian(kind, seed)
    t = torch.tensor([1.0, 20, 400, 999, expert.schedule.t_max])
    x_t = latents(5, 3)
    alpha, sigma = (c[:, None] for c in expert.schedule.coefficients(t))
    v_t = alpha**2 * lam + sigma**2
    pred = expert.predict(x_t, t)
    torch.testing.assert_close(pred.x_0.double(), mu + alpha * lam / v_t * (x_t - alpha * mu), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pred.eps.double(), sigma / v_t * (x_t - alpha * mu), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "seed"), GAUSSIANS)
def test_gaussian_ddim_step_is_a_known_gain(kind: Kind, seed: int) -> None:
    expert, mu, lam = gaussian(kind, seed)
    x_t = latents(1, 3)
    for t, u in ((expert.schedule.t_max, 750), (999, 0), (500, 499), (20, 1), (1, 0)):
        x_u = ddim_step(expert.predict(x_t, torch.tensor([float(t)])), torch.tensor([float(u)]))
        expected = at(expert, u)[0] * mu + gain(expert, lam, t, u) * (x_t - at(expert, t)[0] * mu)
        torch.testing.assert_close(x_u.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "seed"), GAUSSIANS)
def test_gaussian_rollout_visits_the_known_variance(kind: Kind, seed: int) -> None:
    expert, mu, lam = gaussian(kind, seed)
    grid = TimeGrid(expert.schedule, 4)
    x_T = latents(64, 3)
    visited = unroll(ExpertPolicy(expert), grid, x_T)
    product, times_ = 1.0, grid.times.tolist()
    for i in range(4):
        product *= gain(expert, lam, times_[i], times_[i + 1])
        variance = visited[:, i + 1].double().var(0)
        torch.testing.assert_close(variance, product**2 * x_T.double().var(0), atol=1e-5, rtol=1e-5)
        mean = at(expert, times_[i + 1])[0] * mu + product * (x_T.double().mean(0) - at(expert, times_[0])[0] * mu)
        torch.testing.assert_close(visited[:, i + 1].double().mean(0), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "seed"), GAUSSIANS)
def test_gaussian_progressive_distillation_target(kind: Kind, seed: int) -> None:
    expert, mu, lam = gaussian(kind, seed)
    x_t = latents(1, 3)
    for t, m, u in ((expert.schedule.t_max, 875, 750), (500, 375, 250), (250, 125, 0)):
        g = gain(expert, lam, t, m) * gain(expert, lam, m, u)
        (a_t, s_t), (a_u, s_u) = at(expert, t), at(expert, u)
        expected = mu + (g - s_u / s_t) / (a_u - s_u * a_t / s_t) * (x_t - a_t * mu)
        now, middle, then = (torch.tensor([float(time)]) for time in (t, m, u))
        x_m = ddim_step(expert.predict(x_t, now), middle)
        x_u = ddim_step(expert.predict(x_m, middle), then)
        pred = invert_ddim(expert.schedule, x_t, now, x_u, then)
        torch.testing.assert_close(pred.x_0.double(), expected, atol=1e-5, rtol=1e-5)
        if t != expert.schedule.t_max:  # (875 is not the middle of 999 … 750)
            assert torch.equal(ExpertPolicy(expert, substeps=2).act(x_t, now, then), x_u)


def test_prediction_is_plain_data() -> None:
    noise, t = NoiseSchedule(), torch.tensor([500.0])
    pred = Prediction(torch.ones(1, 2), torch.zeros(1, 2), t, noise)
    alpha, sigma = noise(t, pred.x_0)
    torch.testing.assert_close(pred.latent(t), alpha * pred.x_0)
    torch.testing.assert_close(pred.v, -sigma * pred.x_0)
