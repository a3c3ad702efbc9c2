"""DAgger that asks where it seems worth it (after SafeDAgger, Zhang & Cho 2017), within a budget of questions.

A label takes k teacher steps. A glance takes one, and tells how far the student's step is from the teacher's:

    d(x_t) = ‖a_θ(x_t) − a¹(x_t)‖²           a¹: the action by a single teacher step over the whole of t → s

Of the forward and the student states of a collection, the fraction `gate` with the largest d, relative to the mean d at their
time, is labelled in full; the others are forgotten. The teacher's own states are not gated: their labels are its next steps.
Once `query_budget` forwards of the teacher are spent, glances included, the student trains on what it holds.

SafeDAgger trains a network to foresee ‖a − a*‖² > τ and lets the expert drive where it does; here the expert is at hand to be
asked, a fraction stands for τ, which keeps the cost known, and the student goes on driving, for its own states are the ones wanted.
A glance errs where one teacher step does: as the student comes to do k steps in one, d tends to that error and not to 0.

    python -m ddil_agents.safe_dagger --env digits --gate .25 --query_budget 20000
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.dagger import Dagger, DaggerConfig
from ddil_agents.states.collect import Collector
from ddil_env import Expert, ExpertPolicy, StudentPolicy, Support


@dataclass(frozen=True)
class SafeDaggerConfig(DaggerConfig):
    """Settings of gated DAgger."""

    gate: float = 0.5
    """Fraction of the forward and student states that is labelled; 1 asks everywhere, without a glance: DAgger."""
    glance_substeps: int = 1
    """Teacher steps of a glance: more see better, and cost more."""
    query_budget: int | None = None
    """Forwards of the teacher that each process may spend in each stage, glances included; a collection that would exceed it is left out.
    null: no end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gate <= 1:
            raise ValueError(f"gate={self.gate}: need a fraction in (0, 1]; 1 asks everywhere")
        if self.gate < 1 and self.p_expert:
            raise ValueError(
                f"p_expert={self.p_expert} with gate={self.gate}: an expert that acts has been asked; set p_expert to 0 or gate to 1"
            )
        if self.gate < 1 and not 1 <= self.glance_substeps < self.substeps:
            raise ValueError(
                f"glance_substeps={self.glance_substeps}: need at least 1 and fewer than the {self.substeps} of a label "
                "(teacher_steps / num_steps), or else set gate to 1"
            )
        if self.gate < 1 and not self.beta.forward + self.beta.student:
            raise ValueError(f"gate={self.gate}: the teacher's own states are not gated, and β has no others; set gate to 1")

    def for_evaluation(self) -> Self:
        return replace(super().for_evaluation(), gate=1.0, query_budget=None)  # nothing is asked


class GatedCollector(Collector):
    """Labels the states where student and teacher differ most at a glance.

    Args:
        gate: Fraction of them.
        glance_substeps: Teacher steps of a glance.
    """

    def __init__(self, *args: Any, gate: float, glance_substeps: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        full = self.expert_policy
        self.glance = ExpertPolicy(self.expert, glance_substeps, full.guidance_scale, full.project, full.support)
        self.gate = gate
        self.gated = False  # whether the states now drawn are glanced at
        self.left = math.inf  # forwards of the teacher that may still be spent

    def counts(self, n: int, beta: tuple[float, float, float]) -> list[int]:
        counts = super().counts(n, beta)
        return counts if self.price(counts) <= self.left else [0, 0, 0]

    def price(self, counts: list[int]) -> int:
        """Forwards of the teacher that so many draws and rollouts take, where they are drawn next."""
        forward, teacher, student = (count * unit for count, unit in zip(counts, self.states_per_draw(), strict=True))
        full, glance, led = self.cost(self.expert_policy), self.cost(self.glance), self.led(counts)
        if self.gate == 1:
            return full * (forward + teacher + student + led)
        return full * (self.asked(forward) + teacher + self.asked(student) + led) + glance * (forward + student)

    def led(self, counts: list[int]) -> int:
        """Steps of the teacher's that lead to the states of so many rollouts, and are no label: a look ahead at actors and stops."""
        if self.states_per_rollout == "all":
            return 0  # there each step is the label of the state before it
        stream, steps, m = self.streams["path"], 0, self.grid.num_steps
        ahead = stream.get_state()
        for n, p_expert in zip(counts[1:], (1.0, self.p_expert), strict=True):
            if n:
                acting = self.actors(n, m, p_expert)
                steps += int((acting & (torch.arange(m) < self.stops(n, m)[:, None])).sum())
        stream.set_state(ahead)
        return steps

    def asked(self, m: int) -> int:
        """How many of m states are labelled."""
        return math.ceil(self.gate * m)

    def forward(self, n: int) -> TensorDict:
        self.gated = self.gate < 1
        return self.answered(super().forward(n))

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        self.gated = self.gate < 1 and p_expert < 1
        return self.answered(super().rollout(n, p_expert))

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        return self.glance.act(x_t, t, s, c, w) if self.gated else super().label(x_t, t, s, c, w)

    def answered(self, states: TensorDict) -> TensorDict:
        """Of states that were glanced at, those in most need of a label, with it."""
        if not self.gated:
            return states
        x_t, t, s, c, w, glance = (states.get(key, None) for key in ("x_t", "t", "s", "c", "w", "x_s"))
        d = (self.student_policy.act(x_t, t, s, c, w) - glance).square().flatten(1).mean(1)  # (m,)
        _, time = t.unique(return_inverse=True)
        mean = torch.zeros_like(d).scatter_reduce(0, time, d, "mean", include_self=False)  # of each time, (m,): its first rows
        most = (d / mean[time].clamp(min=1e-30)).topk(self.asked(len(states))).indices.sort().values
        states = states[most]
        x_t, t, s, c, w = (states.get(key, None) for key in ("x_t", "t", "s", "c", "w"))
        states["x_s"] = self.expert_policy.act(x_t, t, s, c, w)
        states["nfe"] += self.cost(self.expert_policy)
        return states


class SafeDagger(Dagger):
    """DAgger with a gate and a budget.

    Raises:
        ValueError: a budget that does not hold one collection.
    """

    name = "safe_dagger"
    Config: ClassVar[type[LearnerConfig]] = SafeDaggerConfig
    config: SafeDaggerConfig
    collector: GatedCollector

    def __init__(self, expert: Expert | str, config: SafeDaggerConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config, support)
        shares = zip(self.config.beta(0), self.collector.states_per_draw(), strict=True)
        first = self.collector.price([int(self.collect_size * share / unit + 1e-9) for share, unit in shares]) + self.teacher_nfe
        if self.config.query_budget is not None and self.config.query_budget < first:
            raise ValueError(
                f"query_budget={self.config.query_budget}: the first collection, of {self.collect_size} states, takes {first} forwards "
                "of the teacher; raise it, or lower collect_size"
            )

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **own: Any) -> Collector:
        c = self.config
        return super().make_collector(student_policy, GatedCollector, gate=c.gate, glance_substeps=c.glance_substeps)

    def collect(self) -> TensorDict:
        if self.config.query_budget is not None:
            self.collector.left = self.config.query_budget - self.teacher_nfe
        return super().collect()


def main(argv: list[str] | None = None) -> None:
    run(SafeDagger, argv)


if __name__ == "__main__":
    main()
