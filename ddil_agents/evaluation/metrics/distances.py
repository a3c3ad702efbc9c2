"""Distances between two sets of samples or features, and the noise floor of a distance: its value between two halves of one set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.features import Features, comparable_values, values_of

CHUNK = 2**24  # kernel values in memory at once: 128 MB in float64
MAX_MEDIAN_SAMPLES = 2000  # samples that the median heuristic reads: 2 million pairs
Samples = TypeVar("Samples", Tensor, Features)
Result = TypeVar("Result")


def as_matrix(x: Tensor | Features, which: str = "only") -> Tensor:
    """A set of samples (n, *shape) as a float64 matrix (n, d).

    Args:
        which: Name of the set in an error message.

    Raises:
        ValueError: x has fewer than two axes, or holds NaN or infinite values.
    """
    x = values_of(x)
    if x.ndim < 2:
        raise ValueError(f"samples of shape {tuple(x.shape)}: must be (n, *shape)")
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} samples of the {which} set hold NaN or infinite values: the sampler or extractor diverged")
    return x.flatten(1).double()


def as_pair(a: Tensor | Features, b: Tensor | Features, *, equal_n: bool = False) -> tuple[Tensor, Tensor]:
    """Two sets of samples, (n, *shape) and (m, *shape), as float64 matrices (n, d) and (m, d).

    Args:
        equal_n: Whether both sets must have the same number of samples.

    Raises:
        ValueError: the sets differ in extractor or shape; NaN or infinite values; or n ≠ m under `equal_n`.
    """
    a, b = comparable_values(a, b)
    if a.ndim < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"samples of shapes {tuple(a.shape)} and {tuple(b.shape)}: both must be (n, *shape) with one shape")
    if equal_n and len(a) != len(b):
        raise ValueError(f"{len(a)} samples against {len(b)}: this metric depends on n, so draw the same number of each")
    return as_matrix(a, "first"), as_matrix(b, "second")


def sliced_wasserstein(
    a: Tensor | Features, b: Tensor | Features, num_projections: int = 256, generator: torch.Generator | None = None
) -> float:
    """Sliced 2-Wasserstein distance: mean over random directions, along each of which optimal transport pairs the sorted samples.

        SW_2² = E_θ [ 1/n Σᵢ (⟨θ, a⟩₍ᵢ₎ − ⟨θ, b⟩₍ᵢ₎)² ] ,   θ uniform on the sphere      Bonneel et al. 2015

    The distance of a set from itself shifted by δ is ‖δ‖/√d. Between two draws from one distribution it is positive: report that floor too.

    Args:
        a, b: Samples, each (n, *shape).
        num_projections: Number of directions θ.
        generator: Draws θ, on the generator's device; default: seed 0 on the CPU, so that all calls use the same directions.

    Raises:
        ValueError: the sets differ in shape or number, are empty or not finite; or there is no projection.
    """
    a, b = as_pair(a, b, equal_n=True)
    if len(a) == 0 or num_projections < 1:
        raise ValueError(f"{len(a)} samples and num_projections={num_projections}: need at least 1 of each")
    generator = generator or torch.Generator().manual_seed(0)
    theta = torch.randn(a.shape[1], num_projections, dtype=torch.float64, generator=generator, device=generator.device).to(a.device)
    theta = theta / theta.norm(dim=0)  # (d, p)
    gap = (a @ theta).sort(0).values - (b @ theta).sort(0).values  # (n, p)
    return float(gap.square().mean().sqrt())


def _median_distance(x: Tensor) -> float:
    """Median of the distances between the samples (n, d), of at most `MAX_MEDIAN_SAMPLES` of them, evenly spaced."""
    return float(torch.pdist(x[:: -(-len(x) // MAX_MEDIAN_SAMPLES)]).median())


def _kernel_sum(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Sum of exp(−‖xᵢ − yⱼ‖²/2h²) over all i and j, a few rows at a time."""
    rows = max(1, CHUNK // len(y))
    return sum(float(torch.cdist(part, y).square().div(-2 * bandwidth**2).exp().sum()) for part in x.split(rows))


def mmd2(a: Tensor | Features, b: Tensor | Features, bandwidth: float | None = None, *, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy (MMD²) under a Gaussian kernel: 0 on average between two draws from one distribution.

        MMD² = mean_{i≠j} k(aᵢ, aⱼ) + mean_{i≠j} k(bᵢ, bⱼ) − 2 mean_{i,j} k(aᵢ, bⱼ)      Gretton et al. 2012
        k(x, y) = exp(−‖x − y‖² / 2h²)

    The estimate can be negative. Values under different bandwidths are not comparable: to compare models, pass the same h for all.

    With `paired`, the last mean is over i ≠ j as well, which is a U-statistic of the pairs (aᵢ, bᵢ): aᵢ and bᵢ may then depend on each
    other, as samples from the same noise do, and the MMD² of a set from itself is exactly 0.

    Args:
        a, b: Samples, (n, *shape) and (m, *shape); n ≠ m is allowed unless paired.
        bandwidth: h; default: the median distance between the samples of both sets.
        paired: Whether aᵢ depends on bᵢ; the pairs are independent of each other.

    Raises:
        ValueError: fewer than 2 samples, different shapes, non-finite values, h ≤ 0, a median distance of 0, or n ≠ m with `paired`.
    """
    a, b = as_pair(a, b, equal_n=paired)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} samples: without bias, MMD needs at least 2 of each")
    centre = b.mean(0)  # cdist uses a matrix product, which loses digits where the mean is large
    a, b = a - centre, b - centre
    h = _median_distance(torch.cat([a, b])) if bandwidth is None else bandwidth
    if not 0 < h < float("inf"):
        cure = "most samples are equal, so pass a bandwidth" if bandwidth is None else "need a finite bandwidth above 0"
        raise ValueError(f"bandwidth={h}: {cure}")
    within = (_kernel_sum(a, a, h) - n) / (n * (n - 1)) + (_kernel_sum(b, b, h) - m) / (m * (m - 1))  # k(x, x) = 1 left out
    if not paired:
        return within - 2 * _kernel_sum(a, b, h) / (n * m)
    own = float((a - b).square().sum(1).div(-2 * h**2).exp().sum())  # Σᵢ k(aᵢ, bᵢ)
    return within - 2 * (_kernel_sum(a, b, h) - own) / (n * (n - 1))


def split_half(metric: Callable[[Samples, Samples], Result], x: Samples, generator: torch.Generator | None = None) -> Result:
    """The noise floor of a metric: its value between two random halves of one set.

    The halves have n/2 samples each, so compare the floor with values at n/2 samples.

    Args:
        metric: Compares two sets of samples.
        x: Samples or features, (n, ...); for odd n one of them is left out.
        generator: Draws the halves, on the CPU; default: seed 0.

    Raises:
        ValueError: fewer than 2 samples, or the metric raises it.
    """
    half = len(x) // 2
    if half < 1:
        raise ValueError(f"{len(x)} samples have no two halves: need at least 2")
    order = torch.randperm(len(x), generator=generator or torch.Generator().manual_seed(0))
    return metric(x[order[:half]], x[order[half : 2 * half]])
