"""Behaviour cloning of the diffusion expert, which is progressive distillation (Salimans & Ho 2021).

    s ~ ρ_forward                                                β = (1, 0, 0), or without data the teacher's trajectories
    L = w_t ‖x̂_θ(x_t, t, c) − x_tgt‖²                            action_matching.py

x_tgt is the x̂_0 whose single DDIM step t → s ends at the expert's action, where k steps of the teacher end.
The complete method is a sequence of such runs, 32 → 16 → 8 → 4 → 2 steps, after a change of the prediction type and guidance
conditioning (training/stages.py).

    python -m ddil_agents.bc --env digits --num_steps 4
    python -m ddil_agents.bc --env digits --config staged
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig


@dataclass(frozen=True)
class BCConfig(ActionMatchingConfig):
    """Settings of progressive distillation."""

    forwards_formula = "labels"


class BehaviourCloning(ActionMatching):
    """Progressive distillation on forward-diffused data, or without data on the teacher's trajectories.

    Raises:
        ValueError: beta.student is not 0; training on the student's states is DAgger.
    """

    name = "bc"
    Config: ClassVar[type[LearnerConfig]] = BCConfig
    config: BCConfig
    interactive = False


def main(argv: list[str] | None = None) -> None:
    run(BehaviourCloning, argv)


if __name__ == "__main__":
    main()
