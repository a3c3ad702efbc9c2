"""What a fair comparison of agents over a few paired seeds needs, and when the seeds are too few to show anything.

    scores of one agent and one metric: (seeds,) or (seeds, tasks)      tasks: numbers of steps, environments, …

Estimators of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice"; their package
rliable is archived. The seed is the unit of every test: a seed's tasks share weights and noise and are no new evidence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

EXACT = 16  # seeds up to which all sign flips are enumerated: 2^15 rows
DRAWS = 100_000  # sign flips drawn beyond that
ROUND_OFF = 1e-12  # of Σ|d|: flips that tie with the observed sum count as ties


@dataclass(frozen=True)
class Paired:
    """Agent a against agent b on the same seeds.

    Attributes:
        n: Number of seeds.
        mean: Mean of a − b.
        low: Lower end of its Student's t interval; NaN for one seed.
        high: Upper end.
        p: Of the sign-flip test, for this comparison alone: hand the p of all comparisons to `holm`.
        smallest_p: The smallest p that n seeds can reach.
        shown: Whether a difference is: the adjusted p is at most 1 − level.
        conclusion: What may be said, in a sentence.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    smallest_p: float
    shown: bool
    conclusion: str


def _finite(x: ArrayLike, name: str) -> Floats:
    x = np.asarray(x, dtype=np.float64)
    if bad := np.count_nonzero(~np.isfinite(x)):
        raise ValueError(f"{name}: {bad} of {x.size} values are not finite; leave the seed out of every agent, or score the failure")
    return x


def _scores(x: ArrayLike, name: str) -> Floats:
    """Scores as (seeds, tasks)."""
    x = _finite(x, name)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: need (seeds,) or (seeds, tasks), with at least one of each")
    return x.reshape(len(x), -1)


def _alpha(level: float, comparisons: int = 1) -> float:
    """1 − level, once both arguments are seen to make sense."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}: need 0 < level < 1, such as 0.95")
    if comparisons < 1:
        raise ValueError(f"comparisons={comparisons}: need at least 1, the comparison itself")
    return 1 - level


def interquartile_mean(x: ArrayLike, axis: int | None = None) -> np.float64 | Floats:
    """Mean of the middle half of the runs, all tasks pooled: steadier than the mean, finer than the median.

        IQM = mean of x_(k+1) … x_(N−k) ,   k = ⌊N / 4⌋             Agarwal et al. 2021

    Fewer than four runs lose none: their IQM is the mean.

    Args:
        x: Scores, any shape.
        axis: The axis of the runs; None pools all.

    Raises:
        ValueError: no scores, or non-finite ones, which would be trimmed as if they were the best.
    """
    x = _finite(x, "x")
    if x.size == 0:
        raise ValueError(f"x has shape {x.shape}: need at least one score")
    return stats.trim_mean(x, 0.25, axis=axis)


def bootstrap_interval(
    x: ArrayLike, statistic: Callable[..., np.float64 | Floats], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of the pooled runs, by a bootstrap stratified over tasks.

        x*_im = x_{I(i,m), m} ,   I(i, m) ~ U{1 … n}                 Agarwal et al. 2021
        interval = quantiles (1 ∓ level) / 2 of statistic(x*)

    Each task draws its seeds on its own, so the interval holds for these tasks and neglects what a seed's tasks share.
    It is too narrow for few seeds: of Gaussian scores, 95 % intervals cover the mean in 74 % (n = 3), 84 % (5), 90 % (10), and the
    interquartile mean in 74 %, 91 % and 93 % (measured in tests/ddil_agents/comparison/test_statistics.py).

    Args:
        x: Scores, (seeds,) or (seeds, tasks).
        statistic: Called once as statistic(samples, axis=-1) on (resamples, seeds · tasks): `interquartile_mean`, `np.mean`, `np.median`.
        level: Nominal coverage.
        resamples: Number of bootstrap samples.
        seed: Of the draws.

    Raises:
        ValueError: fewer than two seeds, non-finite scores, a level outside (0, 1), or a statistic that does not reduce `axis`.
    """
    x, alpha = _scores(x, "x"), _alpha(level)
    n, tasks = x.shape
    if n < 2:
        raise ValueError("x has 1 seed: a bootstrap over seeds needs at least 2")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: need at least 1")
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n, tasks))
    values = np.asarray(statistic(x[drawn, np.arange(tasks)].reshape(resamples, -1), axis=-1))
    if values.shape != (resamples,):
        raise ValueError(f"statistic returned shape {values.shape}, need ({resamples},): reduce `axis` only, as np.mean does")
    low, high = np.quantile(values, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def smallest_p(n: int) -> float:
    """The smallest p that a two-sided sign-flip test of n seeds can reach, 2 / 2ⁿ: all differences have one sign."""
    if n < 1:
        raise ValueError(f"n={n}: need at least 1 seed")
    return 2.0 ** (1 - n)


def seeds_needed(comparisons: int = 1, level: float = 0.95) -> int:
    """The fewest seeds that can show a difference: the least n with comparisons · 2 / 2ⁿ ≤ 1 − level, Holm's first step."""
    alpha = _alpha(level, comparisons)
    return next(n for n in itertools.count(1) if comparisons * smallest_p(n) <= alpha)


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of the mean paired difference, where under the null each difference might as well have had the other sign.

        p = P_s( |Σᵢ sᵢ dᵢ| ≥ |Σᵢ dᵢ| ) ,   sᵢ = ±1                  Fisher 1935

    All 2ⁿ flips for n ≤ 16; beyond, (k + 1) / (m + 1) for k of m = 100,000 drawn ones, so p is never 0 (Phipson & Smyth 2010).
    It assumes differences symmetric about 0 under the null, not Gaussian ones.

    Args:
        differences: a − b of each seed, (seeds,), or (seeds, tasks), whose mean over tasks flips as one.
        seed: Of the drawn flips.

    Raises:
        ValueError: no differences or non-finite ones.
    """
    d = _scores(differences, "differences").mean(1)  # (n,)
    n, observed = len(d), abs(d.sum()) - ROUND_OFF * abs(d).sum()
    if n <= EXACT:  # s and −s have the same |Σ|: the first sign stays
        flips = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=n - 1)])  # (2^(n−1), n)
        return float(np.mean(abs(flips @ d) >= observed))
    generator, rows = np.random.default_rng(seed), 1000
    drawn = (2 * generator.integers(2, size=(rows, n)) - 1 for _ in range(DRAWS // rows))
    return float(sum(np.count_nonzero(abs(flips @ d) >= observed) for flips in drawn) + 1) / (DRAWS + 1)


def holm(pvalues: ArrayLike) -> Floats:
    """Step-down adjusted p-values, in the order given: those ≤ α are wrong with probability ≤ α all together.

        p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j))               Holm 1979

    Raises:
        ValueError: not a list of numbers in [0, 1].
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"pvalues={p.tolist()}: need a list of numbers in [0, 1], one a comparison")
    order = p.argsort()
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]).clip(max=1)
    return adjusted


def probability_of_improvement(x: ArrayLike, y: ArrayLike, lower_is_better: bool = False) -> float:
    """How likely a run of X is to beat a run of Y, averaged over tasks.

        mean_m  P(X_m > Y_m) + ½ P(X_m = Y_m)   =   mean_m U_m / (n_x n_y)         Mann & Whitney 1947

    Args:
        x: Scores of X, (seeds,) or (seeds, tasks).
        y: Scores of Y, of the same tasks; the seeds need not match.
        lower_is_better: X beats Y where X < Y.

    Raises:
        ValueError: numbers of tasks that differ, no scores or non-finite ones.
    """
    x, y = _scores(x, "x"), _scores(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} tasks and y has {y.shape[1]}: need the same tasks in both, in the same order")
    wins = np.sign(x[:, None] - y[None])  # (n_x, n_y, tasks)
    return float((1 - wins.mean() if lower_is_better else 1 + wins.mean()) / 2)


def performance_profile(x: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Fraction of runs, all tasks pooled, that score at least τ, for each threshold τ.

        F(τ) = 1/(n M) Σ_i Σ_m 1[x_im ≥ τ]                           Agarwal et al. 2021, who ask for >

    Args:
        x: Scores, (seeds,) or (seeds, tasks), normalised where tasks have different scales.
        thresholds: τ, (k,).

    Raises:
        ValueError: no scores or non-finite ones.
    """
    return (_scores(x, "x").ravel() >= np.asarray(thresholds)[..., None]).mean(-1)


def normalised(m: ArrayLike, m_init: ArrayLike, m_teacher: ArrayLike) -> np.float64 | Floats:
    """A metric on the scale from the untrained student to the teacher, whichever way it points.

        (m − m_init) / (m_teacher − m_init)         0 at init, 1 at the teacher

    Args:
        m: The metric, (seeds,) or (seeds, tasks).
        m_init: That of the student's initial weights; a number, or of a shape that broadcasts, such as (tasks,).
        m_teacher: That of the teacher, likewise.

    Raises:
        ValueError: m_init and m_teacher are equal somewhere, or a value is not finite.
    """
    m, m_init, m_teacher = _finite(m, "m"), _finite(m_init, "m_init"), _finite(m_teacher, "m_teacher")
    span = m_teacher - m_init
    if (span == 0).any():
        shared = np.broadcast_to(m_init, span.shape)[span == 0].flat[0]
        raise ValueError(f"m_init = m_teacher = {shared:g}: a scale needs two ends; take a metric or a task on which they differ")
    return (m - m_init) / span


def paired_comparison(
    a: ArrayLike,
    b: ArrayLike,
    names: tuple[str, str] = ("a", "b"),
    comparisons: int = 1,
    level: float = 0.95,
    adjusted_p: float | None = None,
) -> Paired:
    """Whether a and b differ on the seeds they share, and by how much.

        d_i = mean_m (a_im − b_im)          interval = d̄ ± t_{n−1, (1+level)/2} · sd(d) / √n

    Student's t, which is exact for Gaussian differences, since three to six seeds are too few for a bootstrap: three have 10
    distinct samples, the variance lacks a factor n / (n − 1), and the tails are not t's (see `bootstrap_interval`).

    The conclusion is the sign-flip test's, which does not assume Gaussians; the interval, which is of this comparison alone,
    may exclude 0 where the seeds cannot show a difference. One is shown if its adjusted p is at most 1 − level.

    Args:
        a: Scores of one agent, (seeds,) or (seeds, tasks).
        b: Scores of the other, of the same seeds and tasks in the same order.
        names: Of the two, for the sentence.
        comparisons: How many comparisons are made together, this one counted.
        level: Coverage of the interval; 1 − level is the chance of any false difference among the comparisons.
        adjusted_p: Of this comparison by `holm`; default: comparisons · p, Holm's first step.

    Raises:
        ValueError: shapes that differ, no scores or non-finite ones, a level outside (0, 1), or comparisons < 1.
    """
    alpha = _alpha(level, comparisons)
    a, b = _scores(a, names[0]), _scores(b, names[1])
    if a.shape != b.shape:
        raise ValueError(f"(seeds, tasks) of {names[0]} are {a.shape} and of {names[1]} {b.shape}: pair the same seeds and tasks")
    d = (a - b).mean(1)  # (n,)
    n, mean, p = len(d), float(d.mean()), sign_flip_test(d)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1) * d.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    at = f"at {100 * alpha:g} %" + f" over {comparisons} comparisons" * (comparisons > 1)
    shown = (comparisons * p if adjusted_p is None else adjusted_p) <= alpha
    if shown:  # by fewer seeds than are needed, too, where others had more: Holm's later steps ask for less
        conclusion = f"{names[0]} is {'lower' if mean < 0 else 'higher'} than {names[1]} {at}"
    elif n < (needed := seeds_needed(comparisons, level)):
        conclusion = f"{n} seed{'s' * (n > 1)} cannot show a difference {at}: need at least {needed}"
    else:
        conclusion = f"no difference shown {at}"
    return Paired(n=n, mean=mean, low=mean - half, high=mean + half, p=p, smallest_p=smallest_p(n), shown=shown, conclusion=conclusion)
