"""Distances between two sets of samples or features, and the floor that a distance has between two draws of one set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.features import Features, comparable_values, values_of

CHUNK = 2**24  # kernel values held at once: 128 MB in float64
POOLED = 2000  # samples whose distances the median heuristic looks at: 2 M pairs
Samples = TypeVar("Samples", Tensor, Features)
Result = TypeVar("Result")


def as_matrix(x: Tensor | Features, which: str = "only") -> Tensor:
    """A set of samples (n, *shape) as a float64 matrix (n, d).

    Args:
        which: What an error calls the set.

    Raises:
        ValueError: no axis of samples, or NaN or infinite values.
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
        equal_n: Whether the metric is only fair between sets of one size.

    Raises:
        ValueError: features of two extractors, shapes that differ, NaN or infinite values, or, under `equal_n`, n ≠ m.
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
    """Sliced 2-Wasserstein distance: in one dimension the best transport pairs the sorted samples.

        SW_2² = E_θ [ 1/n Σᵢ (⟨θ, a⟩₍ᵢ₎ − ⟨θ, b⟩₍ᵢ₎)² ] ,   θ uniform on the sphere      Bonneel et al. 2015

    A set shifted by δ is at ‖δ‖/√d. Two draws from one distribution are at a positive floor: print it beside.

    Args:
        a, b: Samples, each (n, *shape).
        num_projections: Directions θ.
        generator: Draws θ on its own device; default: seed 0 on the CPU, so that all calls share their directions.

    Raises:
        ValueError: shapes or numbers of samples that differ, none at all, non-finite values, or fewer than 1 projection.
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
    """Median of the distances between the samples (n, d), of at most `POOLED` of them, evenly spaced."""
    return float(torch.pdist(x[:: -(-len(x) // POOLED)]).median())


def _kernel_sum(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Sum of exp(−‖xᵢ − yⱼ‖²/2h²) over all i and j, a few rows at a time."""
    rows = max(1, CHUNK // len(y))
    return sum(float(torch.cdist(part, y).square().div(-2 * bandwidth**2).exp().sum()) for part in x.split(rows))


def mmd2(a: Tensor | Features, b: Tensor | Features, bandwidth: float | None = None, *, paired: bool = False) -> float:
    """Squared maximum mean discrepancy under a Gaussian kernel, without bias: its mean is 0 between two draws of one distribution.

        MMD² = mean_{i≠j} k(aᵢ, aⱼ) + mean_{i≠j} k(bᵢ, bⱼ) − 2 mean_{i,j} k(aᵢ, bⱼ)      Gretton et al. 2012
        k(x, y) = exp(−‖x − y‖² / 2h²)

    Paired, the last mean is over i ≠ j too, the U-statistic of their h(zᵢ, zⱼ): aᵢ and bᵢ may then depend on each other, as samples
    from one noise do, and a set is at exactly 0 from itself. It can fall below 0. Numbers of two bandwidths do not compare: for
    several models, pass one h.

    Args:
        a, b: Samples, (n, *shape) and (m, *shape); n ≠ m is allowed unless paired.
        bandwidth: h; default: the median distance between the pooled samples.
        paired: Whether aᵢ and bᵢ belong together, each pair drawn independently of the others.

    Raises:
        ValueError: fewer than 2 samples, shapes that differ, non-finite values, h ≤ 0, a median distance of 0, or n ≠ m where paired.
    """
    a, b = as_pair(a, b, equal_n=paired)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} samples: without bias, MMD needs at least 2 of each")
    centre = b.mean(0)  # cdist multiplies matrices, and a far-off mean would take its digits
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
    """The floor of a metric: what it says of two random halves of one set.

    It is the floor at n/2 samples, so print it beside numbers of n/2 samples each.

    Args:
        metric: Compares two sets of samples.
        x: Samples or features, (n, ...); with odd n one is left out.
        generator: Draws the halves, on the CPU; default: seed 0.

    Raises:
        ValueError: fewer than 2 samples, and whatever the metric raises.
    """
    half = len(x) // 2
    if half < 1:
        raise ValueError(f"{len(x)} samples have no two halves: need at least 2")
    order = torch.randperm(len(x), generator=generator or torch.Generator().manual_seed(0))
    return metric(x[order[:half]], x[order[half : 2 * half]])
