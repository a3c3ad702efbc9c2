"""The learners' mathematics where every quantity has a closed form: Gaussian data N(μ, λ I), by every schedule and time grid.

On z = x − α_t μ a DDIM step t → u of the expert is a number, M_{t→u} = (α_t α_u λ + σ_t σ_u)/v_t² , v_t² = α_t² λ + σ_t².
Labels, targets and consistency functions follow from products of such numbers, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any, get_args

import pytest
import torch
from helpers import MEANS
from tensordict import TensorDict
from torch import Tensor, nn

from ddil_agents import LCM, Algorithm, Beta, Dagger, DaggerConfig, LCMConfig
from ddil_agents.action_matching import Weighting
from ddil_agents.lcm import Distance
from ddil_agents.states.batch import Batch
from ddil_env import ExpertPolicy, GaussianMixtureExpert, NetworkDenoiser, NoiseSchedule, TimeGrid, invert_ddim, unroll
from ddil_env.experts.digits import Digits
from ddil_env.schedule import Kind
from ddil_env.support import Thresholding
from ddil_env.time_grid import GridKind

pytestmark = pytest.mark.usefixtures("own_generator")

KINDS, GRIDS = get_args(Kind), get_args(GridKind)
NUM_STEPS = range(1, 9)
D = 3
EXACT: Any = {"atol": 1e-9, "rtol": 1e-9}  # float64; at t_max α is as small as 5e-5
SINGLE: Any = {"atol": 1e-4, "rtol": 1e-4}

everywhere = pytest.mark.parametrize(("kind", "grid"), list(product(KINDS, GRIDS)))
schedules = pytest.mark.parametrize("kind", KINDS)


ClosedForm = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # (x_t, t, c, w) → x̂_0


class PlusOffset(nn.Module):
    """x̂_0 of a closed form, plus an offset that is trained."""

    def __init__(self, x_0: ClosedForm) -> None:
        super().__init__()
        self.x_0 = x_0
        self.offset = nn.Parameter(torch.zeros(D, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None, w: Tensor | None = None) -> Tensor:
        return self.x_0(x_t, t, c, w) + self.offset


class Knowing(GaussianMixtureExpert):
    """A mixture whose students know a closed form, `x_0`."""

    x_0: ClosedForm

    def make_student(self, *, guidance_embedding: bool = False) -> NetworkDenoiser:  # type: ignore[override]
        return NetworkDenoiser(PlusOffset(lambda *state: self.x_0(*state)), self.schedule, "x_0", guidance_embedding)


class Gaussian(Knowing):
    """N(μ, λ I) with a random mean μ (d,) and a random λ in 0.01 … 4."""

    def __init__(self, kind: Kind, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mu = torch.randn(D, generator=generator, dtype=torch.float64)
        self.lam = 10 ** (-2 + 2.6 * float(torch.rand(1, generator=generator)))
        super().__init__(self.mu[None], math.sqrt(self.lam), schedule=kind)

    def gain(self, t: float, u: float, schedule: NoiseSchedule | None = None) -> float:
        """M_{t→u}, u read by `schedule`."""
        (alpha_t, sigma_t), (alpha_u, sigma_u) = at(self.schedule, t), at(schedule or self.schedule, u)
        return (alpha_t * alpha_u * self.lam + sigma_t * sigma_u) / (alpha_t**2 * self.lam + sigma_t**2)

    def chain(self, times: list[float]) -> float:
        """Π M along the times."""
        return math.prod(self.gain(t, u) for t, u in pairwise(times))

    def deviation(self, x_t: Tensor, t: float) -> Tensor:
        """z = x − α_t μ."""
        return x_t - at(self.schedule, t)[0] * self.mu


def at(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """α_t and σ_t as numbers."""
    alpha, sigma = schedule.coefficients(torch.tensor([t]))
    return float(alpha), float(sigma)


def same_time(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t)


def substeps(schedule: NoiseSchedule, t: float, s: float, k: int) -> list[float]:
    """The k + 1 times from t to s, of equal strides, whole ones rounded up."""
    times = [((k - i) * t + i * s) / k for i in range(k + 1)]
    return [math.ceil(time) for time in times] if schedule.discrete else [float(torch.tensor(time)) for time in times]


def latents(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeds(kind: Kind, grid: GridKind = "linspace") -> int:
    """A seed of its own for each schedule and grid."""
    return 17 * KINDS.index(kind) + GRIDS.index(grid)


def knowing(learner: Algorithm, x_0: ClosedForm) -> None:
    """Tells the learner's students a closed form."""
    learner.expert.x_0 = x_0  # type: ignore[attr-defined]


def offset(denoiser: NetworkDenoiser) -> nn.Parameter:
    """The one thing that a knowing student can learn."""
    assert isinstance(denoiser.network, PlusOffset)
    return denoiser.network.offset


def gradient(learner: Algorithm, batch: TensorDict) -> tuple[Tensor, float]:
    """The loss of each state (b,), and the norm of the mean's gradient."""
    learner.student.zero_grad()
    loss = learner.loss(Batch(batch))
    loss.mean().backward()
    slope = offset(learner.student).grad
    assert slope is not None
    return loss.detach(), float(slope.norm())


def in_double(learner: Algorithm, batch: TensorDict) -> TensorDict:
    """The states in float64, with the labels that they have there."""
    x_t, t, s, c, w = (batch.get(key, None) for key in ("x_t", "t", "s", "c", "w"))
    x_s = learner.expert_policy.act(x_t.double(), t, s, c, w)
    torch.testing.assert_close(x_s.float(), batch["x_s"], **SINGLE)
    return batch.set("x_t", x_t.double()).set("x_s", x_s)


# DDIM: one step is one number, and numbers multiply


@schedules
@pytest.mark.parametrize("seed", range(3))
def test_a_ddim_step_multiplies_the_deviation_by_its_gain(kind: Kind, seed: int) -> None:
    expert = Gaussian(kind, seed)
    draw = torch.rand(20, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * expert.schedule.t_max
    pairs = [(math.ceil(max(pair)), math.floor(min(pair))) for pair in draw.tolist()]
    for t, u in [*pairs, (expert.schedule.t_max, 0), (1, 0)]:
        x_t = latents(4, seed)
        x_u = ExpertPolicy(expert).act(x_t, same_time(x_t, t), same_time(x_t, u))
        torch.testing.assert_close(expert.deviation(x_u, u), expert.gain(t, u) * expert.deviation(x_t, t), **EXACT)


@everywhere
def test_the_visited_states_of_a_rollout_have_the_mean_and_variance_of_the_product(kind: Kind, grid: GridKind) -> None:
    expert = Gaussian(kind, seeds(kind, grid))
    x_T = latents(32)
    x_T = (x_T - x_T.mean(0)) / x_T.std(0, unbiased=False)  # the moments of N(0, I), exactly
    alpha_T = at(expert.schedule, expert.schedule.t_max)[0]
    for n, k in product(NUM_STEPS, (1, 3)):
        times = TimeGrid(expert.schedule, n, grid).times.tolist()
        path = unroll(ExpertPolicy(expert, k), TimeGrid(expert.schedule, n, grid), x_T)
        assert path.dtype == torch.float64
        g = 1.0
        for i, (t, u) in enumerate(pairwise(times), 1):
            g *= expert.chain(substeps(expert.schedule, t, u, k))
            alpha_u = at(expert.schedule, u)[0]
            torch.testing.assert_close(path[:, i], alpha_u * expert.mu + g * (x_T - alpha_T * expert.mu), **EXACT)
            torch.testing.assert_close(path[:, i].var(0, unbiased=False), torch.full((D,), g**2, dtype=torch.float64), **EXACT)
            torch.testing.assert_close(path[:, i].mean(0), (alpha_u - g * alpha_T) * expert.mu, **EXACT)


# Progressive distillation


def pd_target(expert: Gaussian, x_t: Tensor, t: float, u: float, k: int) -> Tensor:
    """x_tgt = μ + (g − σ_u/σ_t)/(α_u − σ_u α_t/σ_t) z ,  g the product of the gains of k steps from t to u."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = at(expert.schedule, t), at(expert.schedule, u)
    g = expert.chain(substeps(expert.schedule, t, u, k))
    return expert.mu + (g - sigma_u / sigma_t) / (alpha_u - sigma_u * alpha_t / sigma_t) * expert.deviation(x_t, t)


@everywhere
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_progressive_distillations_target_is_the_product_of_gains(kind: Kind, grid: GridKind, k: int) -> None:
    expert = Gaussian(kind, seeds(kind, grid) + 100 * k)
    policy, x_t = ExpertPolicy(expert, k), latents(4, k)
    for n in NUM_STEPS:
        for t, u in pairwise(TimeGrid(expert.schedule, n, grid).times.tolist()):
            now, then = same_time(x_t, t), same_time(x_t, u)
            target = invert_ddim(expert.schedule, x_t, now, policy.act(x_t, now, then), then).x_0
            torch.testing.assert_close(target, pd_target(expert, x_t, t, u, k), atol=1e-8, rtol=1e-8)
            if k == 1:  # one step of the expert's is its own estimate
                torch.testing.assert_close(target, expert.predict(x_t, now).x_0, atol=1e-8, rtol=1e-8)


@everywhere
@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_a_student_that_predicts_the_target_has_no_loss(kind: Kind, grid: GridKind, weighting: Weighting) -> None:
    seed = seeds(kind, grid)
    n, k = 1 + seed % 8, 1 + seed % 4
    small: dict[str, Any] = {"num_steps": n, "teacher_steps": n * k, "grid": grid, "weighting": weighting}
    learner = Dagger(expert := Gaussian(kind, seed), DaggerConfig(**small, beta=Beta(1, 1, 1)))
    steps = dict(pairwise(learner.grid.times.tolist()))

    def x_tgt(x_t: Tensor, t: Tensor, *_: Tensor | None) -> Tensor:
        return torch.stack([pd_target(expert, x, time, steps[time], k) for x, time in zip(x_t, t.tolist(), strict=True)])

    knowing(learner, x_tgt)
    batch = in_double(learner, learner.collector.collect(3 * 2 * n, (1 / 3, 1 / 3, 1 / 3), 0))
    assert batch["source"].unique().tolist() == [0, 1, 2]
    loss, slope = gradient(learner, batch)
    assert loss.max() < 1e-12
    assert slope < 1e-6
    with torch.no_grad():
        offset(learner.student).fill_(0.1)
    loss, slope = gradient(learner, batch)  # w_t 0.1², and the mean of 2 w_t 0.1 / d in each of d directions
    torch.testing.assert_close(loss, 0.01 * learner.weight(batch["t"]), atol=0, rtol=1e-4)
    assert slope == pytest.approx(0.2 / math.sqrt(D) * float(learner.weight(batch["t"]).mean()), rel=1e-4)


# Consistency


def boundary(expert: Gaussian) -> NoiseSchedule:
    """The schedule that LCM's solver ends on: level ᾱ_0 at t = 0."""
    return expert.schedule.ending_at_alpha_0()


def gains_to_the_boundary(expert: Gaussian, times: list[float]) -> dict[float, float]:
    """Π M from each time of the solver down to its boundary."""
    product, gains = 1.0, {}
    for t, u in reversed(list(pairwise(times))):
        product *= expert.gain(t, u, boundary(expert))
        gains[t] = product
    return gains


@schedules
@pytest.mark.parametrize("seed", range(2))
def test_the_solvers_steps_end_at_the_discrete_consistency_function(kind: Kind, seed: int) -> None:
    learner = LCM(expert := Gaussian(kind, seed), LCMConfig())
    times = TimeGrid(expert.schedule, 50, "trailing").times.tolist()
    gains, alpha_0 = gains_to_the_boundary(expert, times), at(boundary(expert), 0)[0]
    assert (alpha_0 < 1) == expert.schedule.discrete
    x = {t: latents(3, seed) for t in times[:-1]}
    for start in (times[0], times[13], times[30], times[-2]):
        x_t = x[start]
        for t, u in pairwise(times[times.index(start) :]):
            x_t = learner.expert_policy.act(x_t, same_time(x_t, t), same_time(x_t, u))
        torch.testing.assert_close(x_t, alpha_0 * expert.mu + gains[start] * expert.deviation(x[start], start), **EXACT)


@schedules
@pytest.mark.parametrize("seed", range(3))
def test_the_continuous_consistency_function_is_the_limit_of_many_steps(kind: Kind, seed: int) -> None:
    expert = Gaussian(kind, seed)
    x_T = latents(3, seed)
    t = expert.schedule.t_max
    alpha, sigma = at(expert.schedule, t)
    limit = expert.mu + math.sqrt(expert.lam / (alpha**2 * expert.lam + sigma**2)) * expert.deviation(x_T, t)

    def error(n: int) -> float:
        x_0 = unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, n), x_T)[:, -1]
        return float((x_0 - limit).norm() / expert.deviation(x_T, t).norm())

    assert error(5) > 2 * error(20) > 4 * error(80) > 8 * error(320)
    assert error(999 if expert.schedule.discrete else 1000) < 0.01


@schedules
@pytest.mark.parametrize("distance", get_args(Distance))
def test_a_student_that_is_the_consistency_function_has_no_loss(kind: Kind, distance: Distance) -> None:
    learner = LCM(expert := Gaussian(kind, seeds(kind)), LCMConfig(distance=distance, beta=Beta(1, 1, 1)))
    gains, alpha_0 = gains_to_the_boundary(expert, TimeGrid(expert.schedule, 50, "trailing").times.tolist()), at(boundary(expert), 0)[0]

    def x_hat(x_t: Tensor, t: Tensor, *_: Tensor | None) -> Tensor:
        """(f* − c_skip x)/c_out, so that c_skip x + c_out x̂_0 is f*."""
        rows = []
        for x, time in zip(x_t.double(), t.tolist(), strict=True):
            s = 10 * time
            c_skip, c_out = 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)
            f = x if time == 0 else alpha_0 * expert.mu + gains[time] * expert.deviation(x, time)
            rows.append(x if time == 0 else (f - c_skip * x) / c_out)
        return torch.stack(rows)

    knowing(learner, x_hat)
    batch = in_double(learner, learner.collector.collect(150, (0.4, 0.4, 0.2), 0))
    assert batch["source"].unique().tolist() == [0, 1, 2]
    assert (batch["s"] == 0).any()
    loss, slope = gradient(learner, batch)
    assert loss.max() < 1e-12
    assert slope < 1e-6
    with torch.no_grad():
        offset(learner.student).fill_(0.1)
    loss, slope = gradient(learner, batch)  # c_out is 1 to five digits at t ≥ 19
    away, down = (math.sqrt(0.01 + 1e-6) - 1e-3, 1.0) if distance == "huber" else (0.01, 0.2)
    torch.testing.assert_close(loss, torch.full_like(loss, away), atol=0, rtol=1e-3)
    assert slope == pytest.approx(down / math.sqrt(D), rel=1e-3)
    with torch.no_grad():  # an error that the average shares is seen at the boundary alone, where f is the identity
        offset(learner.ema_student).fill_(0.1)
    loss, _ = gradient(learner, batch)
    assert loss[batch["s"] > 0].max() < 1e-8
    torch.testing.assert_close(loss[batch["s"] == 0], torch.full_like(loss[batch["s"] == 0], away), atol=0, rtol=1e-3)


# Guidance


def labelled(kind: Kind = "scaled_linear", guidance_scale: float = 2.0) -> Knowing:
    return Knowing(MEANS, 0.3, [1, 2, 3], labels=[0, 1, 1], schedule=kind, guidance_scale=guidance_scale)


@schedules
@pytest.mark.parametrize("b", [3, 5])  # as many as the latent is wide, and more
def test_guidance_w_is_1_plus_the_omega_of_papers_on_both_estimates(kind: Kind, b: int) -> None:
    expert = labelled(kind)
    x_t, t = latents(b), torch.linspace(1, 999, b).round()
    c = torch.arange(b) % 2
    cond, uncond = expert.predict(x_t, t, c), expert.predict(x_t, t, torch.full_like(c, 2))
    assert not torch.allclose(cond.x_0, uncond.x_0, atol=1e-3)
    scales = torch.tensor([0.0, 0.5, 1.0, 2.0, 7.5, 15.0], dtype=torch.float64)
    for w in [*scales.tolist(), *(scales[i : i + b] for i in range(7 - b)), None]:
        pred = expert.guided(x_t, t, c, w)
        each = torch.as_tensor(2.0 if w is None else w, dtype=torch.float64).clamp(min=1)  # 1 or less is no guidance
        each = each[:, None] if each.ndim else each
        omega = each - 1
        for guided, conditional, null in ((pred.x_0, cond.x_0, uncond.x_0), (pred.eps, cond.eps, uncond.eps)):
            torch.testing.assert_close(guided, null + each * (conditional - null), **EXACT)
            torch.testing.assert_close(guided, (1 + omega) * conditional - omega * null, **EXACT)
        torch.testing.assert_close(pred.latent(t), x_t, **EXACT)  # α x̂_0 + σ ε̂ is still x_t


# Labels


def relabelled(learner: Algorithm, batch: TensorDict, k: int, last: tuple[float, float] = (1.0, 0.0), bound: float | None = None) -> Tensor:
    """The expert's action at each state, one state at a time in plain numbers: k guided DDIM steps, t = 0 at level `last`."""
    expert, labels = learner.expert, []
    for state in batch:
        c, w = state["c"][None], float(state.get("w", torch.tensor(2.0)))
        x = state["x_t"][None].double()
        for t, u in pairwise(substeps(expert.schedule, float(state["t"]), float(state["s"]), k)):
            (alpha, sigma), (alpha_u, sigma_u) = at(expert.schedule, t), last if u == 0 else at(expert.schedule, u)
            cond, uncond = (expert.predict(x, same_time(x, t), ids).x_0 for ids in (c, torch.full_like(c, 2)))
            x_0 = uncond + w * (cond - uncond)
            if bound is not None:
                x_0 = x_0.clamp(-bound, bound)
            x = alpha_u * x_0 + sigma_u * (x - alpha * x_0) / sigma
        labels.append(x[0])
    return torch.stack(labels)


def stored(learner: Algorithm, collections: int = 3) -> TensorDict:
    """What the buffer holds after some collections, a draw of it."""
    for _ in range(collections):
        learner.trainer.collect()
    return learner.draw()


@schedules
@pytest.mark.parametrize("guidance_range", [None, (1.0, 5.0)])
@pytest.mark.parametrize("roles", [("teacher",), ("student",)])
def test_a_stored_label_is_the_expert_recomputed(kind: Kind, guidance_range: Any, roles: Any) -> None:
    config = DaggerConfig(
        num_steps=4,
        teacher_steps=8,
        beta=Beta(0.4, 0.3, 0.3),
        p_expert=0.5,
        guidance_range=guidance_range,
        thresholding=Thresholding(kind="static", bound=0.6, roles=roles),
        collect_size=40,
        batch_size=40,
    )
    learner = Dagger(expert := labelled(kind), config)
    knowing(learner, lambda x_t, t, c, w: expert.predict(x_t, t, c).x_0 + 0.3)
    batch = stored(learner)
    assert batch["source"].unique().tolist() == [0, 1, 2]
    bound = 0.6 if roles == ("teacher",) else None
    torch.testing.assert_close(batch["x_s"].double(), relabelled(learner, batch, 2, bound=bound), **SINGLE)
    other = relabelled(learner, batch, 2, bound=None if bound else 0.6)
    assert not torch.allclose(batch["x_s"].double(), other, atol=1e-2)  # the projection moves some of them
    if guidance_range is None:
        assert "w" not in batch
    else:
        assert ((batch["w"] >= 1) & (batch["w"] <= 5)).all()
        assert len(batch["w"].unique()) > 10


@schedules
@pytest.mark.parametrize("guidance_range", [None, (1.0, 5.0)])
def test_a_stored_consistency_label_is_one_solver_step_recomputed(kind: Kind, guidance_range: Any) -> None:
    config = LCMConfig(
        beta=Beta(0.5, 0.25, 0.25),
        guidance_range=guidance_range,
        thresholding=Thresholding(kind="static", bound=0.6),
        collect_size=200,
        batch_size=120,
        seed=1,  # a seed whose draw holds s = 0, as one in six does not
    )
    learner = LCM(expert := labelled(kind), config)
    knowing(learner, lambda x_t, t, c, w: expert.predict(x_t, t, c).x_0 + 0.3)
    batch = stored(learner)
    assert batch["source"].unique().tolist() == [0, 1, 2]
    assert (batch["s"] == 0).any()
    last = at(expert.schedule.ending_at_alpha_0(), 0)
    torch.testing.assert_close(batch["x_s"].double(), relabelled(learner, batch, 1, last, bound=0.6), **SINGLE)
    if kind != "flow":  # the last step does not reach the data
        at_the_end = batch[batch["s"] == 0]
        data = relabelled(learner, at_the_end, 1, bound=0.6)
        assert (at_the_end["x_s"] - data).abs().max() > 1e-3 * at(expert.schedule, 19)[1]


# Students that are their teachers


@pytest.mark.parametrize("w", [1.0, 2.0, 7.5, 15.0])
@pytest.mark.parametrize("agent", [Dagger, LCM])
def test_a_told_digits_student_starts_as_its_teacher_for_every_scale(agent: type[Algorithm], w: float) -> None:
    learner = agent(expert := Digits("digits8"), agent.Config(guidance_range=(1.0, 15.0)))
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([19.0, 339.0, 679.0, 999.0])
    c = expert.sample_condition(4, generator)
    teacher = expert.predict(x_t, t, c)
    for student in (learner.student, learner.ema_student):
        with torch.no_grad():
            pred = student.predict(x_t, t, c, torch.full((4,), w))
        if agent is Dagger:
            assert torch.equal(pred.x_0, teacher.x_0)
            assert torch.equal(pred.eps, teacher.eps)
        else:  # the teacher, read as a consistency function
            s = 10 * t[:, None, None, None].double()
            f = 0.25 / (s**2 + 0.25) * x_t + s / (s**2 + 0.25).sqrt() * teacher.x_0
            torch.testing.assert_close(pred.x_0, f.float(), atol=1e-5, rtol=1e-5)


SIMPLEX = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5), (1 / 3, 1 / 3, 1 / 3)]


@pytest.mark.parametrize(("beta", "p_expert"), [(beta, p) for beta in SIMPLEX for p in (0.0, 0.5) if beta[2] or not p])
@pytest.mark.parametrize("guidance_range", [None, (1.0, 5.0)])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_under_any_beta(beta: Any, p_expert: float, guidance_range: Any) -> None:
    config = DaggerConfig(teacher_steps=4, beta=Beta(*beta), p_expert=p_expert, guidance_range=guidance_range, collect_size=48)
    learner = Dagger(expert := labelled(), config)
    knowing(learner, lambda x_t, t, c, w: expert.guided(x_t, t, c, w).x_0)  # w None: the expert's own scale
    batch = stored(learner)
    assert batch["source"].unique().tolist() == [i for i, share in enumerate(beta) if share]
    loss, slope = gradient(learner, batch)
    assert loss.max() < 1e-8
    assert slope < 1e-4
    with torch.no_grad():
        offset(learner.student).fill_(0.1)
    loss, slope = gradient(learner, batch)
    assert loss.min() > 0.005
    assert slope > 0.05


@pytest.fixture(scope="module")
def digits8() -> Digits:
    return Digits("digits8")


@pytest.mark.parametrize("roles", [(), ("teacher", "student")])
def test_mixed_rollouts_of_a_student_that_is_its_teacher_are_the_teachers(digits8: Digits, roles: Any) -> None:
    def states(beta: Beta, p_expert: float = 0.0) -> TensorDict:
        config = DaggerConfig(teacher_steps=4, beta=beta, p_expert=p_expert, thresholding=Thresholding(roles=roles), collect_size=12)
        return Dagger(digits8, config).collect()

    teacher = states(Beta(0, 1, 0))
    assert len(teacher) == 12
    for p_expert in (0.0, 0.5, 1.0):
        mixed = states(Beta(0, 0, 1), p_expert)
        for key in ("t", "s", "c"):
            assert torch.equal(mixed[key], teacher[key]), key
        rounding = 1e-5 if p_expert == 0.5 else 0  # each actor steps its own states alone, in batches of another size
        for key in ("x_t", "x_s"):
            torch.testing.assert_close(mixed[key], teacher[key], atol=rounding, rtol=rounding, msg=lambda said, key=key: f"{key}: {said}")
        acted = mixed["actors"].any(1)[mixed["t"] < 999]
        assert (bool(acted.any()), bool(acted.all())) == (p_expert > 0, p_expert == 1)


# No gradient through rollouts


@pytest.mark.parametrize("make", [Dagger, LCM])
def test_states_hold_no_graph_and_stay_while_the_student_changes(make: type[Algorithm]) -> None:
    config = make.Config(beta=Beta(1, 1, 1), collect_size=300, batch_size=300, student={"width": 8})
    learner = make(GaussianMixtureExpert(MEANS, 0.3), config)
    states = learner.trainer.collect()
    assert states["source"].unique().tolist() == [0, 1, 2]
    for key, value in states.items():
        assert not value.requires_grad, key
        assert value.grad_fn is None, key
    before = {key: value.clone() for key, value in states.items()}
    held = learner.buffer.replay.storage[:].clone()
    with torch.no_grad():
        for p in learner.student.parameters():
            p.add_(0.5)
    assert all(torch.equal(states[key], value) for key, value in before.items())
    now = learner.buffer.replay.storage[:]
    assert all(torch.equal(now[key], held[key]) for key in held.keys())  # noqa: SIM118
    learner.loss(Batch(learner.draw())).mean().backward()  # and the loss still reaches the student
    assert all(p.grad is not None for p in learner.student.parameters())


def test_the_gradient_is_that_of_the_states_as_given() -> None:
    learner = Dagger(GaussianMixtureExpert(MEANS, 0.3), DaggerConfig(beta=Beta(0, 0, 1), collect_size=32, student={"width": 8}))
    learner.trainer.collect()
    batch = learner.draw()
    learner.loss(Batch(batch)).mean().backward()
    own = [p.grad.clone() for p in learner.student.parameters() if p.grad is not None]
    learner.student.zero_grad()
    copies = TensorDict({key: torch.tensor(batch[key].tolist()) for key in ("x_t", "t", "x_s", "s")}, batch_size=batch.batch_size)
    learner.loss(Batch(copies)).mean().backward()
    assert own
    for p, expected in zip(learner.student.parameters(), own, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, expected)
