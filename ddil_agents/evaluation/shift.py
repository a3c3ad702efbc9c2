"""Covariate shift: distances, step by step, between the states that two samplers visit, or between those and noised data.

shift             sliced 2-Wasserstein distance
mmd_shift         unbiased squared MMD under a Gaussian kernel; it may be negative
gaussian_shift    2-Wasserstein distance between fitted Gaussians
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.distances import mmd2, sliced_wasserstein, split_half
from ddil_agents.evaluation.metrics.frechet import gaussian_w2


def shift_by_step(pairs: list[tuple[Tensor, Tensor]], reference: list[Tensor], paired: bool = False) -> dict[str, list[float]]:
    """The three distances between two sets of states at each step.

    Args:
        pairs: The two sets at each step, each (m, *sample_shape).
        reference: States at each step that set the bandwidth of the kernel, the same for all models, (k, *sample_shape).
        paired: Whether the i-th states of both sets share a condition or their noise; the MMD² then leaves these pairs out.
    """
    return {
        "shift": [sliced_wasserstein(a, b) for a, b in pairs],
        "mmd_shift": [mmd2(a, b, kernel_bandwidth(x), paired=paired) for (a, b), x in zip(pairs, reference, strict=True)],
        "gaussian_shift": [gaussian_w2(a, b) for a, b in pairs],
    }


def shift_from_data(path: Tensor, noised_data: Tensor) -> dict[str, list[float]]:
    """Distances between visited states and noised data.

    Args:
        path: Visited states, (m, N or N + 1, *sample_shape).
        noised_data: Draws of the forward marginals at the N times, (N, k, *sample_shape).
    """
    pairs = [(path[: len(x), i], x[: len(path)]) for i, x in enumerate(noised_data)]
    return shift_by_step(pairs, list(noised_data), paired=True)


def shift_from_expert(path: Tensor, expert_path: Tensor, num_steps: int) -> dict[str, list[float]]:
    """Distances between a policy's states and the expert's from the same noise, under the keys `…_to_expert`; 0 for the expert itself.

    Args:
        path, expert_path: States, each (m, N + 1, *sample_shape), the i-th of both from the same noise.
        num_steps: N.
    """
    expert_states = [expert_path[:, i] for i in range(num_steps)]
    shift = shift_by_step([(path[:, i], x) for i, x in enumerate(expert_states)], expert_states, paired=True)
    return {f"{name}_to_expert": values for name, values in shift.items()}


def shift_between_halves(path: Tensor) -> dict[str, Any]:
    """The noise floor of the three distances: between random halves of states (m, N, *sample_shape). Empty below four states.

    Returns:
        The distances, and n_paths, the number of states in each half.
    """
    states = list(path.transpose(0, 1))
    if len(path) < 4:
        return {}
    halves = [split_half(lambda a, b: (a, b), x) for x in states]
    return {"n_paths": len(path) // 2, **shift_by_step(halves, states)}


def kernel_bandwidth(x: Tensor) -> float:
    """Bandwidth of the kernel that all models' states at one time are compared under: the median distance between states (m, …)."""
    x = x.flatten(1).double()[:1000]
    return float(torch.pdist(x).median())
