"""Kernel distance between two sets of features; on Inception-v3 features it is KID, the Kernel Inception Distance.

Unlike the Fréchet distance it assumes no Gaussians, and for iid samples it is unbiased at every n. An unbiased estimate of a distance near
0 may be negative. The sets of an evaluation have the same number of samples of each class, so they are not iid, and between two sets of
one distribution the mean is below 0: real digits against other real digits have about −10 (`docs/four_agents`). Compare a model with the
row of real data, not with 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import as_pair
from ddil_agents.evaluation.metrics.features import Features


def _cubic_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² between features (n, d) and (n, d) under the cubic kernel."""
    n, d = x.shape
    k_xx, k_yy, k_xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))  # (n, n)
    within = k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()
    return within / (n * (n - 1)) - 2 * k_xy.mean()


def kernel_distance(
    a: Tensor | Features, b: Tensor | Features, subsets: int = 100, subset_size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the cubic kernel, mean over random subsets of the two sets; it may be negative.

        MMD² = mean_{i≠j} k(aᵢ, aⱼ) + mean_{i≠j} k(bᵢ, bⱼ) − 2 mean_{i,j} k(aᵢ, bⱼ)      Bińkowski et al. 2018
        k(x, y) = (⟨x, y⟩/d + 1)³

    Args:
        a, b: Features, (n, d) and (m, d).
        subsets: Number of pairs of subsets, each drawn without replacement.
        subset_size: Samples in each subset.
        generator: Draws the subsets, on the CPU; default: seed 0.

    Returns:
        Mean and standard deviation over the subsets. The deviation is that of one subset; since subsets overlap, it gives no error of
            the mean.

    Raises:
        ValueError: different widths or extractors, non-finite features, no subset, or a subset_size below 2 or above n or m.
    """
    a, b = as_pair(a, b)
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        rule = "need subsets ≥ 1 and 2 ≤ subset_size ≤ the smaller set"
        raise ValueError(f"subsets={subsets} of subset_size={subset_size} from {len(a)} and {len(b)} samples: {rule}")
    generator = generator or torch.Generator().manual_seed(0)
    values = torch.stack(
        [_cubic_mmd2(*(x[torch.randperm(len(x), generator=generator)[:subset_size]] for x in (a, b))) for _ in range(subsets)]
    )
    return float(values.mean()), float(values.std(correction=0))
