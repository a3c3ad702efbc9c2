"""Fréchet distance between two sets of features, each taken for a Gaussian.

Its name is FID only of Inception-v3 features; `frechet_name` says it. A result names its extractor, its n and the floor that
real data reach at the same n, since with few samples even real against real is far from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import as_pair
from ddil_agents.evaluation.metrics.features import Features

FID_EXTRACTOR = "inception_v3_2015"


def frechet_name(extractor_name: str) -> str:
    """What a report may call the Fréchet distance between features of that extractor."""
    return "FID" if extractor_name == FID_EXTRACTOR else f"Fréchet distance ({extractor_name})"


def frechet_distance(a: Tensor | Features, b: Tensor | Features) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to two sets of features.

        d² = ‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^{1/2})      Dowson & Landau 1982; Heusel et al. 2017

    C_a C_b has the eigenvalues of the symmetric C_a^{1/2} C_b C_a^{1/2}, and those of (A Bᵀ)(A Bᵀ)ᵀ / (n − 1)(m − 1), A and B the
    centred features: the smaller matrix is taken, no root of a non-symmetric one is needed, and fewer samples than features,
    which leave C singular, do no harm.

    Args:
        a, b: Features, (n, d) and (m, d); n ≠ m is allowed.

    Raises:
        ValueError: fewer than 2 samples, widths or extractors that differ, non-finite features.
    """
    x, y = as_pair(a, b)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} samples: a covariance needs at least 2 of each")
    gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = (x - x.mean(0)) / (n - 1) ** 0.5, (y - y.mean(0)) / (m - 1) ** 0.5  # C = xᵀ x
    if min(n, m) < x.shape[1]:
        root_trace = torch.linalg.svdvals(x @ y.T).sum()
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^{1/2}; round-off can leave an eigenvalue at −1e-17
        root_trace = torch.linalg.eigvalsh(root @ (y.T @ y) @ root).clamp(min=0).sqrt().sum()
    return float((gap + x.square().sum() + y.square().sum() - 2 * root_trace).clamp(min=0))


def gaussian_w2(a: Tensor | Features, b: Tensor | Features) -> float:
    """2-Wasserstein distance between the Gaussians fitted to two sets of samples, in the samples' own units.

        W_2 = √d² ,   d² of `frechet_distance`

    Args:
        a, b: Samples, (n, *shape) and (m, *shape).

    Raises:
        ValueError: as `frechet_distance`.
    """
    return frechet_distance(a, b) ** 0.5
