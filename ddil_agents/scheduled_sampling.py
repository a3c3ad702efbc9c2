"""Scheduled sampling (Bengio et al. 2015): DAgger with mixed rollouts, in which the expert takes fewer and fewer of the steps.

The expert takes each step of a rollout with probability p, else the student does; p falls with the progress u = 0 … 1 of the run:

    linear            p = max(ε, 1 − u)
    exponential       p = max(ε, e^(−k u))
    inverse_sigmoid   p = max(ε, K/(K + e^(k u))) ,  K = e^(k/2)          the paper's k/(k + e^(i/k)), half-way at u = ½

ε is `p_expert`. In imitation learning this is DAgger's mixture policy π_i = β_i π* + (1 − β_i) π̂_i (Ross et al. 2011), with the
actor drawn anew in every step. The paper has no expert: its label is the next token of the training sequence, whatever the rollout has
generated, and training to such labels is inconsistent (Huszár 2015). Here the label is the expert's action at the state reached.

    python -m ddil_agents.scheduled_sampling --env digits --mixing exponential
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from tensordict import TensorDict

from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.beta import Beta

Mixing = Literal["constant", "linear", "exponential", "inverse_sigmoid"]


@dataclass(frozen=True)
class ScheduledSamplingConfig(ActionMatchingConfig):
    """Settings of scheduled sampling: those of DAgger and the schedule of the expert's share of the steps."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, student=1.0))
    """Probabilities of the sources; (0, 0, 1), as in the paper, trains on mixed rollouts only and needs no data."""
    p_expert: float = 0.0
    """Probability that the expert takes a step of a student rollout at the end of the run: the floor ε."""
    mixing: Mixing = "linear"
    """How that probability falls from 1: linear, exponential, inverse_sigmoid, or constant (p_expert from the start: DAgger)."""
    mixing_rate: float = 10.0
    """Rate k of the schedules exponential and inverse_sigmoid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing not in get_args(Mixing):
            raise ValueError(f"unknown mixing {self.mixing!r}; choose one of: {', '.join(get_args(Mixing))}")
        if not 0 < self.mixing_rate < 1000:
            raise ValueError(f"mixing_rate={self.mixing_rate}: need a positive number below 1000; 10 falls to 0 within the run")
        if self.beta.student == 0:
            raise ValueError("beta.student=0: the expert's share falls in student rollouts, and there are none; give them a share")


class ScheduledSampling(ActionMatching):
    """DAgger with mixed rollouts whose share of expert steps falls over the run."""

    name = "scheduled_sampling"
    Config: ClassVar[type[LearnerConfig]] = ScheduledSamplingConfig
    config: ScheduledSamplingConfig

    def p_expert(self) -> float:
        """p at the current update."""
        u, k = self.step / self.total_updates, self.config.mixing_rate
        falling = {
            "constant": 0.0,
            "linear": 1 - u,
            "exponential": math.exp(-k * u),
            "inverse_sigmoid": 1 / (1 + math.exp(k * (u - 0.5))),  # K/(K + e^(k u))
        }
        return max(self.config.p_expert, falling[self.config.mixing])

    def collect(self) -> TensorDict:
        self.collector.p_expert = self.p_expert()
        return super().collect()


def main(argv: list[str] | None = None) -> None:
    run(ScheduledSampling, argv)


if __name__ == "__main__":
    main()
