"""Vendi score: the effective number of different samples in a set; it needs no real data."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import as_matrix
from ddil_agents.evaluation.metrics.features import Features


def vendi_score(x: Tensor | Features) -> float:
    """Exponential of the entropy of the eigenvalues of the similarity matrix: 1 for equal features, n for orthogonal ones.

        VS = exp(−Σᵢ λᵢ log λᵢ) ,   λ the eigenvalues of K/n ,   K_ij = ⟨xᵢ, xⱼ⟩/(‖xᵢ‖ ‖xⱼ‖)      Friedman & Dieng 2023

    It is at most min(n, d), so compare only sets of the same size and extractor.

    Args:
        x: Features, (n, d).

    Raises:
        ValueError: no samples, non-finite features, or a feature of length 0, whose cosine is undefined.
    """
    features = as_matrix(x)
    n, d = features.shape
    if n == 0:
        raise ValueError("0 samples have no Vendi score: need at least 1")
    lengths = features.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise ValueError(f"{int((lengths == 0).sum())} of {n} features are all 0 and have no cosine: choose another extractor")
    unit = features / lengths
    gram = unit @ unit.T if n <= d else unit.T @ unit  # their eigenvalues above 0 are the same
    return float(torch.special.entr(torch.linalg.eigvalsh(gram / n).clamp(min=0)).sum().exp())
