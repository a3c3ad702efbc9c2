"""Distances between two sets of samples that need no features: for vectors, mixtures and other small spaces."""

from __future__ import annotations

import torch
from torch import Tensor


def as_pair(a: Tensor, b: Tensor, *, equal_n: bool = False) -> tuple[Tensor, Tensor]:
    """Two sets of samples, (n, *shape) and (m, *shape), as float64 matrices (n, d) and (m, d).

    Args:
        equal_n: Whether the metric is only fair between sets of one size.

    Raises:
        ValueError: shapes that differ, NaN or infinite values, or, under `equal_n`, n ≠ m.
    """
    if a.ndim < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"samples of shapes {tuple(a.shape)} and {tuple(b.shape)}: both must be (n, *shape) with one shape")
    if equal_n and len(a) != len(b):
        raise ValueError(f"{len(a)} samples against {len(b)}: this metric depends on n, so draw the same number of each")
    for which, x in (("first", a), ("second", b)):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(x)} samples of the {which} set hold NaN or infinite values: the sampler or extractor diverged")
    return a.flatten(1).double(), b.flatten(1).double()


def sliced_wasserstein(a: Tensor, b: Tensor, num_projections: int = 256, generator: torch.Generator | None = None) -> float:
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
