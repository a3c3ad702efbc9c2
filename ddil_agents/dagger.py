"""DAgger on the diffusion MDP: DDIL with the loss of progressive distillation (DDIL §4.2, "PD + DDIL"; Ross et al. 2011).

    s ~ Σᵢ βᵢ ρᵢ ,  i ∈ {forward, teacher, student}              DDIL Alg. 1
    L = w_t ‖x̂_θ(x_t, t, c) − x_tgt‖²                            action_matching.py, on those states

x_tgt is the x̂_0 whose single DDIM step t → s ends at the expert's action, where k steps of the teacher end.
The student is unrolled without gradient, the expert labels states that it visits, and the buffer aggregates the labelled states: the
newest ones (streaming), or with `--capacity null` all states of the run (per-round aggregation).

    python -m ddil_agents.dagger --env digits --beta.forward .5 --beta.teacher .1 --beta.student .4
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.beta import Beta


@dataclass(frozen=True)
class DaggerConfig(ActionMatchingConfig):
    """Settings of DAgger: those of progressive distillation with states from all three sources."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.5, teacher=0.1, student=0.4))
    """Probabilities of the sources: forward states for diversity, the teacher's states, and the student's own."""

    forwards_formula = "labels"


class Dagger(ActionMatching):
    """Progressive distillation on the β-mixture of forward, teacher and student states."""

    name = "dagger"
    Config: ClassVar[type[LearnerConfig]] = DaggerConfig
    config: DaggerConfig


def main(argv: list[str] | None = None) -> None:
    run(Dagger, argv)


if __name__ == "__main__":
    main()
