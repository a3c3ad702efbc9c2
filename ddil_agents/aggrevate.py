"""AggreVaTe (Ross & Bagnell 2014): the teacher completes the student's trajectory, and the student learns the end of it.

The student denoises to t_j, j uniform; from there the teacher denoises to the end with its own sampler:

    y = Φ(x_{t_j}, t_j → 0)                                      k teacher steps for each of the N − j steps that are left
    L = w_t ‖x̂_θ(x_{t_j}, t_j, c) − y‖²                          action_matching.py with x_tgt = y, an action that reaches to s = 0

DAgger's label is the expert's next step; AggreVaTe's is the sample that results, so that an error weighs as much as it changes the
sample. A label costs k (N + 1)/2 forwards on average, where DAgger's costs k. At j = 0 it is the distillation of Luhman & Luhman 2021.

The label belongs to the state that the student's last step reached, not to the state before that step. A label for the latter would be
the student's own output in the last step, where no step is left to complete; and in earlier steps it would teach the student to agree
with the completion of its own step, which is not the teacher's: for N(0, 1) data, N = 4 and Stable Diffusion's schedule the standard
deviation of such a student's states grows to 1.9 times the right one.

The student's x̂_0 is then the end of the ODE's trajectory, as in a consistency model, and so the student is sampled with `renoise`: if
x_t ~ p_t, then x̂_0 is distributed as the data, and x̂_0 diffused to s as p_s. A DDIM step would move along the straight line to that
end, which the ODE's trajectory does not follow.

    python -m ddil_agents.aggrevate --env digits
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.beta import Beta
from ddil_agents.states.collect import Collector
from ddil_env import StudentPolicy
from ddil_env.mdp import Kernel


@dataclass(frozen=True)
class AggrevateConfig(ActionMatchingConfig):
    """Settings of AggreVaTe: those of DAgger."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, student=1.0))
    """Probabilities of the sources; (0, 0, 1), only the student's states, is the paper's and needs no data."""

    teachers: ClassVar[tuple[str, ...]] = ("original", "same")  # its student predicts the end of the ODE, and so cannot teach single steps

    def __post_init__(self) -> None:
        if self.p_expert:
            raise ValueError(f"p_expert={self.p_expert}: the expert's steps add no fresh noise, so AggreVaTe has no mixed rollouts; use 0")
        super().__post_init__()


class CompletionCollector(Collector):
    """Labels every state with the end of the teacher's trajectory from it: s = 0, and x_s is that end."""

    reuse_rollout = False  # whether the labels are taken from the end of the teacher's own rollout

    def forward(self, n: int) -> TensorDict:
        self.reuse_rollout = False
        return self.set_final_time(super().forward(n))

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        self.reuse_rollout = p_expert >= 1 and self.states_per_rollout == "all"
        states = super().rollout(n, p_expert)
        if self.reuse_rollout:
            x_s = states["x_s"].unflatten(0, (n, -1))  # (n, N, *sample_shape)
            states["x_s"] = x_s[:, -1:].expand_as(x_s).flatten(0, 1)
        return self.set_final_time(states)

    def set_final_time(self, states: TensorDict) -> TensorDict:
        """Sets s to 0, the time of the labels, and `nfe` to the expert forwards of each state and its label; returns the states."""
        states["s"] = torch.zeros_like(states["t"])
        if not self.reuse_rollout:
            steps_left = (self.grid.times[:-1] <= states["t"][:, None]).sum(1)  # N − j, (m,)
            states["nfe"] = (steps_left + states["actors"].sum(1)) * self.forwards_per_action(self.expert_policy)
        return states

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        if self.reuse_rollout:
            return super().label(x_t, t, s, c, w)
        x, started = x_t.clone(), t >= self.grid.times[:-1, None]  # (N, n): the states whose trajectory has started by each time
        counts = started.sum(1).tolist()  # waits for the device, once for each source
        for k, now, (t_i, t_next) in zip(counts, started, pairwise(self.grid.times), strict=True):
            if k:
                rows = now.argsort(descending=True, stable=True)[:k]
                c_i, w_i = (None if a is None else a[rows] for a in (c, w))
                x[rows] = super().label(x[rows], t[rows].clamp(max=t_i), t_next.expand(k), c_i, w_i)
        return x


class Aggrevate(ActionMatching):
    """Regression to the end of the student's trajectories as the teacher completes them."""

    name = "aggrevate"
    Config: ClassVar[type[LearnerConfig]] = AggrevateConfig
    config: AggrevateConfig
    kernel: ClassVar[Kernel] = "renoise"

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **settings: Any) -> Collector:
        return super().make_collector(student_policy, CompletionCollector)


def main(argv: list[str] | None = None) -> None:
    run(Aggrevate, argv)


if __name__ == "__main__":
    main()
