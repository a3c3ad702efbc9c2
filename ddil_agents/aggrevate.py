"""AggreVaTe (Ross & Bagnell 2014): the teacher completes what the student began, and the student learns where that ends.

The student goes to t_j by its own steps, j uniform; from there the teacher denoises to the end, by its own sampler:

    y = Φ(x_{t_j}, t_j → 0)                                      k teacher steps for each of the N − j steps that are left
    L = w_t ‖x̂_θ(x_{t_j}, t_j, c) − y‖²                          as in bc.py: x_tgt = y, an action that reaches to s = 0

DAgger's label says what the expert does next, AggreVaTe's what comes of it: errors weigh as they tell in the sample. It costs
k (N + 1)/2 forwards a state on average, where DAgger's costs k. At j = 0 it is the distillation of Luhman & Luhman 2021.

The label belongs to the state that the student's last step reached, not to the one that it left: there it would be the student's
own output at the last step, where nothing is left to complete, and before that a step that agrees with its own completion, which
is not the teacher's: for N(0, 1) data, N = 4 and Stable Diffusion's schedule such a student's states grow 1.9 times too wide.

The student's x̂_0 is then the end of the ODE, as a consistency model's, and so it is sampled with `renoise`: where x_t ~ p_t, x̂_0
is distributed as the data, and diffused to s it is as p_s. A DDIM step would go along the chord to that end, which the ODE does
not follow.

    python -m ddil_agents.aggrevate --env digits
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.dagger import Dagger, DaggerConfig
from ddil_agents.states.beta import Beta
from ddil_agents.states.collect import Collector
from ddil_env import StudentPolicy
from ddil_env.mdp import Kernel


@dataclass(frozen=True)
class AggrevateConfig(DaggerConfig):
    """Settings of AggreVaTe: DAgger's."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, student=1.0))
    """Source priors; (0, 0, 1), the student's states alone, is the paper's. Data-free."""

    teachers: ClassVar[tuple[str, ...]] = ("original", "same")  # its student names ends, and is no ODE to step along

    def __post_init__(self) -> None:
        if self.p_expert:
            raise ValueError(f"p_expert={self.p_expert}: the expert takes no step to noise anew, so AggreVaTe has no mixed rollouts; use 0")
        super().__post_init__()


class CompletingCollector(Collector):
    """Labels every state with the end of the teacher's trajectory from there: s = 0, and x_s that end."""

    along = False  # whether a rollout of the teacher's own comes to the end by itself

    def forward(self, n: int) -> TensorDict:
        self.along = False
        return self.reaching_0(super().forward(n))

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        self.along = p_expert >= 1 and self.states_per_rollout == "all"
        states = super().rollout(n, p_expert)
        if self.along:
            x_s = states["x_s"].unflatten(0, (n, -1))  # (n, N, *sample_shape)
            states["x_s"] = x_s[:, -1:].expand_as(x_s).flatten(0, 1)
        return self.reaching_0(states)

    def reaching_0(self, states: TensorDict) -> TensorDict:
        """The states, with the time that their labels reach to and the forwards that these took."""
        states["s"] = torch.zeros_like(states["t"])
        if not self.along:
            left = (self.grid.times[:-1] <= states["t"][:, None]).sum(1)  # N − j, (m,)
            states["nfe"] = (left + states["actors"].sum(1)) * self.cost(self.expert_policy)
        return states

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        if self.along:
            return super().label(x_t, t, s, c, w)
        x = x_t.clone()
        for now, then in pairwise(self.grid.times):
            on = t >= now  # the trajectories that have begun
            if on.any():
                c_on, w_on = (None if a is None else a[on] for a in (c, w))
                x[on] = super().label(x[on], t[on].clamp(max=now), then.expand(int(on.sum())), c_on, w_on)
        return x


class Aggrevate(Dagger):
    """Regression to the teacher's completion of the student's trajectories."""

    name = "aggrevate"
    Config: ClassVar[type[LearnerConfig]] = AggrevateConfig
    config: AggrevateConfig
    kernel: ClassVar[Kernel] = "renoise"

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **own: Any) -> Collector:
        return super().make_collector(student_policy, CompletingCollector)


def main(argv: list[str] | None = None) -> None:
    run(Aggrevate, argv)


if __name__ == "__main__":
    main()
