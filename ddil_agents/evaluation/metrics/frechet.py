"""Fréchet distance between Gaussians fitted to two sets of features.

It is called FID on Inception-v3 features alone (`frechet_name`). With few samples it is far from 0 even between two sets of real data, so
results record n, the extractor and the distance of real data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import as_pair
from ddil_agents.evaluation.metrics.features import Features

FID_EXTRACTOR = "inception_v3_2015"


def frechet_name(extractor_name: str) -> str:
    """Name of the Fréchet distance between features of that extractor: FID on Inception-v3 features alone."""
    return "FID" if extractor_name == FID_EXTRACTOR else f"Fréchet distance ({extractor_name})"


def frechet_distance(a: Tensor | Features, b: Tensor | Features) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to two sets of features.

        d² = ‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^{1/2})      Dowson & Landau 1982; Heusel et al. 2017

    C_a C_b has the same nonzero eigenvalues as the symmetric C_a^{1/2} C_b C_a^{1/2} and as (A Bᵀ)(A Bᵀ)ᵀ / (n − 1)(m − 1), where A and
    B are the centred features. The smaller matrix is used. No root of a non-symmetric matrix is needed, and C may be singular, as it
    is with fewer samples than features.

    Args:
        a, b: Features, (n, d) and (m, d); n ≠ m is allowed.

    Raises:
        ValueError: fewer than 2 samples, different widths or extractors, non-finite features.
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
    """2-Wasserstein distance between the Gaussians fitted to two sets of samples, in units of the samples.

        W_2 = √d² ,   where d² is `frechet_distance`

    Args:
        a, b: Samples, (n, *shape) and (m, *shape).

    Raises:
        ValueError: as in `frechet_distance`.
    """
    return frechet_distance(a, b) ** 0.5
