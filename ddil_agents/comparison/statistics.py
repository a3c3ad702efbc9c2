"""Statistics for comparing agents over a few paired seeds, which also tell when the seeds are too few to show a difference.

    scores of one agent and one metric: (seeds,) or (seeds, tasks)      tasks: numbers of steps, environments, …

The estimators are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", whose package
rliable is archived. The unit of every test is the seed, because tasks of one seed share weights and noise and are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

MAX_ENUMERATED = 16  # seeds up to which all sign flips are enumerated: 2^15 rows
NUM_DRAWS = 100_000  # sign flips drawn for more seeds
ROUND_OFF = 1e-12  # of Σ|d|: flips that tie with the observed sum count as ties


@dataclass(frozen=True)
class PairedComparison:
    """Result of comparing agent a with agent b on the same seeds.

    Attributes:
        n: Number of seeds.
        mean: Mean of a − b.
        low: Lower end of its Student's t interval; NaN for one seed.
        high: Upper end.
        p: p-value of the sign-flip test for this comparison alone; `holm` adjusts the p-values of several comparisons.
        smallest_p: The smallest p that n seeds can reach.
        shown: Whether a difference is significant: the adjusted p is at most 1 − level.
        conclusion: The conclusion as a sentence.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    smallest_p: float
    shown: bool
    conclusion: str


def _as_finite(x: ArrayLike, name: str) -> Floats:
    x = np.asarray(x, dtype=np.float64)
    if bad := np.count_nonzero(~np.isfinite(x)):
        raise ValueError(f"{name}: {bad} of {x.size} values are not finite; leave the seed out of every agent, or score the failure")
    return x


def _as_scores(x: ArrayLike, name: str) -> Floats:
    """Checks scores, and returns them as (seeds, tasks)."""
    x = _as_finite(x, name)
    if x.ndim not in (1, 2) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}: need (seeds,) or (seeds, tasks), with at least one of each")
    return x.reshape(len(x), -1)


def _alpha(level: float, comparisons: int = 1) -> float:
    """Checks both arguments, and returns 1 − level."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}: need 0 < level < 1, such as 0.95")
    if comparisons < 1:
        raise ValueError(f"comparisons={comparisons}: need at least 1, the comparison itself")
    return 1 - level


def interquartile_mean(x: ArrayLike, axis: int | None = None) -> np.float64 | Floats:
    """Mean of the middle half of the runs, all tasks pooled; it is more robust than the mean and varies less than the median.

        IQM = mean of x_(k+1) … x_(N−k) ,   k = ⌊N / 4⌋             Agarwal et al. 2021

    Of fewer than four runs none is dropped, so that the IQM is the mean.

    Args:
        x: Scores, any shape.
        axis: The axis of the runs; None pools all values.

    Raises:
        ValueError: no scores, or non-finite ones, which trimming would drop as extremes.
    """
    x = _as_finite(x, "x")
    if x.size == 0:
        raise ValueError(f"x has shape {x.shape}: need at least one score")
    return stats.trim_mean(x, 0.25, axis=axis)


def bootstrap_interval(
    x: ArrayLike, statistic: Callable[..., np.float64 | Floats], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of the pooled runs, stratified over tasks.

        x*_im = x_{I(i,m), m} ,   I(i, m) ~ U{1 … n}                 Agarwal et al. 2021
        interval = quantiles (1 ∓ level) / 2 of statistic(x*)

    Seeds are drawn separately for each task. The interval is valid for these tasks, and neglects correlation between tasks of one seed.
    For few seeds it is too narrow: with Gaussian scores, 95 % intervals cover the mean in 74 % (n = 3), 84 % (5) and 90 % (10) of cases,
    and the interquartile mean in 74 %, 91 % and 93 % (measured in tests/ddil_agents/comparison/test_statistics.py).

    Args:
        x: Scores, (seeds,) or (seeds, tasks).
        statistic: Called once as statistic(samples, axis=-1) on (resamples, seeds · tasks): `interquartile_mean`, `np.mean`, `np.median`.
        level: Nominal coverage.
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Raises:
        ValueError: fewer than two seeds, non-finite scores, a level outside (0, 1), or a statistic that does not reduce `axis`.
    """
    x, alpha = _as_scores(x, "x"), _alpha(level)
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
    """The smallest p that a two-sided sign-flip test of n seeds can reach, 2 / 2ⁿ, when all differences have the same sign."""
    if n < 1:
        raise ValueError(f"n={n}: need at least 1 seed")
    return 2.0 ** (1 - n)


def seeds_needed(comparisons: int = 1, level: float = 0.95) -> int:
    """The fewest seeds that can show a difference: the smallest n with comparisons · 2 / 2ⁿ ≤ 1 − level, as in Holm's first step."""
    alpha = _alpha(level, comparisons)
    return next(n for n in itertools.count(1) if comparisons * smallest_p(n) <= alpha)


@cache
def _sign_flips(n: int) -> Floats:
    """All flips of n signs but the first, (2^(n−1), n): s and −s have the same |Σ|."""
    return np.array([(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=n - 1)])


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p-value of the mean paired difference, under the null hypothesis that each difference has either sign equally likely.

        p = P_s( |Σᵢ sᵢ dᵢ| ≥ |Σᵢ dᵢ| ) ,   sᵢ = ±1                  Fisher 1935

    For n ≤ 16 all 2ⁿ flips are enumerated. For larger n, m = 100,000 flips are drawn and p = (k + 1) / (m + 1), where k flips reach the
    observed sum, so that p is never 0 (Phipson & Smyth 2010). The test assumes that differences are symmetric about 0, not Gaussian.

    Args:
        differences: a − b of each seed, (seeds,), or (seeds, tasks), of which the mean over tasks is tested.
        seed: Seed of the drawn flips.

    Raises:
        ValueError: no differences or non-finite ones.
    """
    d = _as_scores(differences, "differences").mean(1)  # (n,)
    n, observed = len(d), abs(d.sum()) - ROUND_OFF * abs(d).sum()
    if n <= MAX_ENUMERATED:
        return float(np.mean(abs(_sign_flips(n) @ d) >= observed))
    generator, rows = np.random.default_rng(seed), 1000
    drawn = (2 * generator.integers(2, size=(rows, n)) - 1 for _ in range(NUM_DRAWS // rows))
    return float(sum(np.count_nonzero(abs(flips @ d) >= observed) for flips in drawn) + 1) / (NUM_DRAWS + 1)


def holm(pvalues: ArrayLike) -> Floats:
    """Adjusted p-values of Holm's step-down method, in the order given; rejecting those ≤ α has a family-wise error rate ≤ α.

        p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j))               Holm 1979

    Raises:
        ValueError: not a list of numbers in [0, 1].
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"pvalues={p.tolist()}: need a list of numbers in [0, 1], one for each comparison")
    order = p.argsort()
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]).clip(max=1)
    return adjusted


def probability_of_improvement(x: ArrayLike, y: ArrayLike, lower_is_better: bool = False) -> float:
    """Probability that a run of X is better than a run of Y, mean over tasks.

        mean_m  P(X_m > Y_m) + ½ P(X_m = Y_m)   =   mean_m U_m / (n_x n_y)         Mann & Whitney 1947

    Args:
        x: Scores of X, (seeds,) or (seeds, tasks).
        y: Scores of Y, of the same tasks; the seeds need not match.
        lower_is_better: Whether X is better than Y where X < Y.

    Raises:
        ValueError: different numbers of tasks, no scores, or non-finite ones.
    """
    x, y = _as_scores(x, "x"), _as_scores(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} tasks and y has {y.shape[1]}: need the same tasks in both, in the same order")
    wins = np.sign(x[:, None] - y[None])  # (n_x, n_y, tasks)
    return float((1 - wins.mean() if lower_is_better else 1 + wins.mean()) / 2)


def performance_profile(x: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Fraction of runs, all tasks pooled, that score at least τ, for each threshold τ.

        F(τ) = 1/(n M) Σ_i Σ_m 1[x_im ≥ τ]                           Agarwal et al. 2021, with > in place of ≥

    Args:
        x: Scores, (seeds,) or (seeds, tasks), normalised where tasks have different scales.
        thresholds: τ, (k,).

    Raises:
        ValueError: no scores or non-finite ones.
    """
    return (_as_scores(x, "x").ravel() >= np.asarray(thresholds)[..., None]).mean(-1)


def normalise(m: ArrayLike, m_init: ArrayLike, m_teacher: ArrayLike) -> np.float64 | Floats:
    """Normalises a metric: 0 for the untrained student, 1 for the teacher, whether lower or higher is better.

        (m − m_init) / (m_teacher − m_init)

    Args:
        m: The metric, (seeds,) or (seeds, tasks).
        m_init: The metric of the untrained student; a number, or an array that broadcasts, such as (tasks,).
        m_teacher: The metric of the teacher, likewise.

    Raises:
        ValueError: m_init and m_teacher are equal somewhere, or a value is not finite.
    """
    m, m_init, m_teacher = _as_finite(m, "m"), _as_finite(m_init, "m_init"), _as_finite(m_teacher, "m_teacher")
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
) -> PairedComparison:
    """Compares a and b on the same seeds: the mean difference with its interval, and whether it is significant.

        d_i = mean_m (a_im − b_im)          interval = d̄ ± t_{n−1, (1+level)/2} · sd(d) / √n

    The interval is Student's t, which is exact for Gaussian differences. Three to six seeds are too few for a bootstrap: three seeds have
    only 10 distinct resamples, the variance lacks a factor n / (n − 1), and the tails are too light (see `bootstrap_interval`).

    The conclusion is that of the sign-flip test, which assumes no Gaussians: a difference is shown if its adjusted p is at most 1 − level.
    The interval is not adjusted for several comparisons, and may exclude 0 although the seeds are too few to show a difference.

    Args:
        a: Scores of one agent, (seeds,) or (seeds, tasks).
        b: Scores of the other, of the same seeds and tasks in the same order.
        names: Names of both agents, for the conclusion.
        comparisons: Number of comparisons in the family, this one included.
        level: Confidence level of the interval; 1 − level is the family-wise error rate of the comparisons.
        adjusted_p: p of this comparison after `holm`; default: comparisons · p, as in Holm's first step.

    Raises:
        ValueError: different shapes, no scores, non-finite ones, a level outside (0, 1), or comparisons < 1.
    """
    alpha = _alpha(level, comparisons)
    a, b = _as_scores(a, names[0]), _as_scores(b, names[1])
    if a.shape != b.shape:
        raise ValueError(f"(seeds, tasks) of {names[0]} are {a.shape} and of {names[1]} {b.shape}: pair the same seeds and tasks")
    d = (a - b).mean(1)  # (n,)
    n, mean, p = len(d), float(d.mean()), sign_flip_test(d)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1) * d.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    at = f"at {100 * alpha:g} %" + f" over {comparisons} comparisons" * (comparisons > 1)
    shown = (comparisons * p if adjusted_p is None else adjusted_p) <= alpha
    if shown:  # possible with fewer seeds than `seeds_needed`, because Holm's later steps need less
        conclusion = f"{names[0]} is {'lower' if mean < 0 else 'higher'} than {names[1]} {at}"
    elif n < (needed := seeds_needed(comparisons, level)):
        conclusion = f"{n} seed{'s' * (n > 1)} cannot show a difference {at}: need at least {needed}"
    else:
        conclusion = f"no difference shown {at}"
    return PairedComparison(
        n=n, mean=mean, low=mean - half, high=mean + half, p=p, smallest_p=smallest_p(n), shown=shown, conclusion=conclusion
    )
