"""The schedule `adaptive`: shares that rise where a source's states teach what the student's own states need.

    βᵢ ∝ βᵢ⁰ exp(40 · decay · ∫ aᵢ du) ,   u the progress of the run ;   no source falls below `ADAPTIVE_FLOOR`

    aᵢ = ⟨gᵢ, g_student⟩ / (‖g‖ ‖g′‖)                             gᵢ: gradient of the mean loss on new states of source i

A policy is only as good as it is on its own states (Ross et al. 2011), so that the loss on them is what all sources are to lower. To first
order, a gradient step on states of source i lowers it by ⟨gᵢ, g_student⟩ (as the domains of DoGE, Fan et al. 2024). For the student's own
source the product is that of two halves of its states, g and g′: without it, noise would count as alignment.

A student that can realise the expert everywhere comes to gradients of mean zero on every source, and the shares stay where they are. One
that cannot reaches a compromise, at which forward and own gradients are opposite: there the shares move to its own states.

A collection costs gradients of up to a batch of its states of each source more, and no forward of the expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ddil_agents.states.beta import ADAPTIVE_FLOOR, SOURCES, Beta


class AdaptiveShares:
    """Shares that follow the alignment of gradients.

    Args:
        beta: The shares at the start and the rate, `decay`.
    """

    def __init__(self, beta: Beta) -> None:
        self.beta = beta
        self.exponents = [0.0] * len(beta.shares)
        self.step = 0

    def __call__(self) -> tuple[float, float, float]:
        """The present shares, which sum to 1."""
        highest = max(self.exponents)
        weights = [share * math.exp(z - highest) for share, z in zip(self.beta.shares, self.exponents, strict=True)]
        floors = [ADAPTIVE_FLOOR * (share > 0) for share in self.beta.shares]
        free = 1 - sum(floors)
        forward, teacher, student = (floor + free * w / sum(weights) for floor, w in zip(floors, weights, strict=True))
        return forward, teacher, student

    def update(self, alignment: Sequence[float], step: int, total_updates: int) -> None:
        """Takes the alignment of each source into account, as that of the updates since the last call.

        Args:
            alignment: aᵢ; of a source without new states 0 is no news.
            step: Updates so far.
            total_updates: Updates of the run, of which those since the last call are the part du; a run may have been made longer.

        Raises:
            FloatingPointError: an alignment that is not finite.
        """
        if broken := [name for name, a in zip(SOURCES, alignment, strict=True) if not math.isfinite(a)]:
            raise FloatingPointError(f"the gradient on new {broken[0]} states is not finite; lower learning_rate or raise warmup_updates")
        gain = 40 * self.beta.decay * (step - self.step) / total_updates
        self.exponents = [z + gain * a for z, a in zip(self.exponents, alignment, strict=True)]
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"exponents": list(self.exponents), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.exponents, self.step = list(state["exponents"]), state["step"]
