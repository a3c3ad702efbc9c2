"""Measures what states of each source teach about the student's own: the gradients that the schedule `adaptive` compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict

from ddil_agents.devices import ranks
from ddil_agents.states.beta import SOURCES

if TYPE_CHECKING:
    from ddil_agents.algorithm import Algorithm

STUDENT = SOURCES.index("student")


def align_gradients(algorithm: Algorithm, states: TensorDict) -> list[float]:
    """How much a gradient step on new states of each source lowers the loss on the student's own: aᵢ of states/adaptive.py.

    Args:
        algorithm: Whose student and loss.
        states: Of a collection. Up to `batch_size` of each source are used, the student's in two halves.

    Returns:
        aᵢ of each source, the mean over processes; 0 for a source of which there are no new states.
    """
    config, student = algorithm.config, algorithm.trainer.trainables["student"]
    size = config.batch_size // algorithm.trainer.gradient_accumulation
    by_source = [states[states["source"] == i][: config.batch_size] for i in range(len(SOURCES))]
    alignment = torch.zeros(len(SOURCES), device=states.device)
    if len(own := by_source[STUDENT]) >= 2:
        g, g_other = (student.gradient(algorithm.loss, own[half::2], size) for half in (0, 1))
        norms = (g.norm() * g_other.norm()).clamp(min=torch.finfo(g.dtype).tiny)
        alignment[STUDENT] = g @ g_other / norms
        for i, each in enumerate(by_source):
            if i != STUDENT and len(each):
                alignment[i] = student.gradient(algorithm.loss, each, size) @ (g + g_other) / 2 / norms
    return (ranks.sum_over_ranks(alignment) / ranks.world_size()).tolist()
