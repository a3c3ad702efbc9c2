"""Precision, recall, density and coverage measure fidelity and diversity separately: a collapsed sampler loses recall and coverage alone.

The manifold of a set is estimated by balls around its samples; the radius is the distance to the k-th neighbour in the same set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ddil_agents.evaluation.metrics.distances import as_pair
from ddil_agents.evaluation.metrics.features import Features

CHUNK = 2**24  # distances in memory at once: 128 MB in float64


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage.

    Attributes:
        precision: Fraction of fake samples inside some real ball.
        recall: Fraction of real samples inside some fake ball.
        density: Number of real balls that contain a fake sample, mean over the fake samples, divided by k; it can exceed 1.
        coverage: Fraction of real balls that contain some fake sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _rows_of_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances between a (n, d) and b (m, d): yields a few rows of a at a time, and their distances (rows, m)."""
    rows = max(1, CHUNK // len(b))
    for start in tqdm(range(0, len(a), rows), desc="neighbours", unit="chunk", disable=len(a) <= rows, leave=False):
        part = slice(start, start + rows)
        # Without the matrix-product shortcut, whose round-off would break the tie d(x, y) = radius.
        yield part, torch.cdist(a[part], b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th neighbour in its own set, itself not counted, (n,)."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for _, d in _rows_of_distances(x, x)])


def precision_recall_density_coverage(real: Tensor | Features, fake: Tensor | Features, k: int = 5) -> PRDC:
    """Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

        B(x) = {y : ‖y − x‖ ≤ distance of x to its k-th neighbour}
        precision = mean_j 1[∃ i: y_j ∈ B(x_i)]          recall   = mean_i 1[∃ j: x_i ∈ B(y_j)]
        density   = 1/k mean_j Σ_i 1[y_j ∈ B(x_i)]       coverage = mean_i 1[∃ j: y_j ∈ B(x_i)]

    All four depend on n, coverage most, so both sets must have the same n. The balls are closed; those of the `prdc` package are open,
    which makes a difference only on exact ties.

    Args:
        real: Features x of real samples, (n, d).
        fake: Features y of generated samples, (n, d).
        k: Which neighbour sets the radius.

    Raises:
        ValueError: the sets differ in extractor, number or width; features are not finite; or k < 1 or k ≥ n.
    """
    real, fake = as_pair(real, fake, equal_n=True)
    n = len(real)
    if not 1 <= k < n:
        raise ValueError(f"k={k} with {n} samples: need 1 ≤ k < n, since a sample is not its own neighbour")
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)  # (n,)
    in_some_real_ball = torch.zeros(n, dtype=torch.bool, device=real.device)
    recalled = covered = pairs = 0
    for part, distance in _rows_of_distances(real, fake):  # (rows, n)
        inside = distance <= real_radius[part, None]
        in_some_real_ball |= inside.any(0)
        covered += int(inside.any(1).sum())
        pairs += int(inside.sum())
        recalled += int((distance <= fake_radius).any(1).sum())
    return PRDC(precision=int(in_some_real_ball.sum()) / n, recall=recalled / n, density=pairs / (k * n), coverage=covered / n)
