"""Kernel distance between two sets of features: unlike Fréchet's it takes nothing for a Gaussian, and iid sets leave it no bias in n.

Of Inception-v3 features it is KID, the Kernel Inception Distance. Sets that are matched class by class, as the judge's are, are not
iid, and of one distribution they lie below 0: real digits against others of the same classes at about −10 (`docs/four_agents`).
There equality is where the row of held-out data is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import as_pair
from ddil_agents.evaluation.metrics.features import Features


def _cubic_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² between (n, d) and (n, d) under the cubic kernel."""
    n, d = x.shape
    k_xx, k_yy, k_xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))  # (n, n)
    within = k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()
    return within / (n * (n - 1)) - 2 * k_xy.mean()


def kernel_distance(
    a: Tensor | Features, b: Tensor | Features, subsets: int = 100, subset_size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the cubic kernel, over random subsets of the two sets.

        MMD² = mean_{i≠j} k(aᵢ, aⱼ) + mean_{i≠j} k(bᵢ, bⱼ) − 2 mean_{i,j} k(aᵢ, bⱼ)      Bińkowski et al. 2018
        k(x, y) = (⟨x, y⟩/d + 1)³

    Args:
        a, b: Features, (n, d) and (m, d).
        subsets: How many pairs of subsets, each drawn without replacement.
        subset_size: Samples in each.
        generator: Draws the subsets, on the CPU; default: seed 0.

    Returns:
        Mean and standard deviation over the subsets. These overlap, so the deviation is that of one subset, not of the mean.

    Raises:
        ValueError: widths or extractors that differ, non-finite features, no subset, or one of fewer than 2 or more than n or m.
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
