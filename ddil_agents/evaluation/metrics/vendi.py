"""Vendi score: how many different samples a set is worth, without data to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import as_matrix
from ddil_agents.evaluation.metrics.features import Features


def vendi_score(x: Tensor | Features) -> float:
    """The exponential of the entropy of the similarities' eigenvalues, from 1 for equal features to n for orthogonal ones.

        VS = exp(−Σᵢ λᵢ log λᵢ) ,   λ the eigenvalues of K/n ,   K_ij = ⟨xᵢ, xⱼ⟩/(‖xᵢ‖ ‖xⱼ‖)      Friedman & Dieng 2023

    It is at most min(n, d), so compare sets of one size and one extractor.

    Args:
        x: Features, (n, d).

    Raises:
        ValueError: no samples, non-finite features, or a feature of length 0, which has no direction.
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
