"""DAgger that labels only the states where teacher and student differ most, within a budget (after SafeDAgger, Zhang & Cho 2017).

A label takes k teacher steps. A cheap check first takes one, and estimates the error of the student's step:

    d(x_t) = ‖a_θ(x_t) − a¹(x_t)‖²           a¹: the action by a single teacher step over the whole of t → s

Of the forward and student states of a collection, the fraction `gate` with the largest d, relative to the mean d at the same time, is
labelled with k steps; the others are dropped. The teacher's states are not gated, because their labels are its next steps.
Once `query_budget` forwards of the teacher are spent, checks included, the student trains on the states in the buffer.

SafeDAgger trains a network to predict whether ‖a − a*‖² > τ and lets the expert act where it is. Here the expert itself is queried, a
fraction replaces τ, which makes the cost known in advance, and the student keeps acting, because its own states are wanted.
The check has the error of a single teacher step: as the student learns to do k steps in one, d tends to that error and not to 0.

    python -m ddil_agents.safe_dagger --env digits --gate .25 --query_budget 20000
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.beta import SOURCES, Beta, split_collection
from ddil_agents.states.collect import Collector
from ddil_env import Expert, ExpertPolicy, StudentPolicy, Support


@dataclass(frozen=True)
class SafeDaggerConfig(ActionMatchingConfig):
    """Settings of SafeDAgger: those of DAgger, the gate and the budget."""

    beta: Beta = field(default_factory=lambda: Beta(forward=0.5, teacher=0.1, student=0.4))
    """Probabilities of the sources: forward states for diversity, the teacher's states, and the student's own."""
    gate: float = 0.5
    """Fraction of the forward and student states that is labelled; 1 labels every state and skips the check, which is DAgger."""
    check_substeps: int = 1
    """Number of teacher steps of the cheap check; more are more accurate and cost more."""
    query_budget: int | None = None
    """Largest number of teacher forwards per process and stage, checks included; a collection that would exceed it is left out. null: no
    limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gate <= 1:
            raise ValueError(f"gate={self.gate}: need a fraction in (0, 1]; 1 labels every state")
        if self.gate < 1 and self.p_expert:
            raise ValueError(
                f"p_expert={self.p_expert} with gate={self.gate}: mixed rollouts already query the teacher; gating would save nothing; "
                "set p_expert to 0 or gate to 1"
            )
        if self.gate < 1 and not 1 <= self.check_substeps < self.substeps:
            raise ValueError(
                f"check_substeps={self.check_substeps}: need at least 1 and fewer than the {self.substeps} of a label "
                "(teacher_steps / num_steps), or else set gate to 1"
            )
        if self.gate < 1 and not self.beta.forward + self.beta.student:
            raise ValueError(f"gate={self.gate}: the teacher's own states are not gated, and β has no others; set gate to 1")

    def for_evaluation(self) -> Self:
        return replace(super().for_evaluation(), gate=1.0, query_budget=None)  # an evaluation collects nothing


class GatedCollector(Collector):
    """Collects as `Collector` does, but labels only the states where the cheap check finds the largest differences of student and teacher.

    Args:
        gate: Fraction of the states that is labelled.
        check_substeps: Number of teacher steps of the cheap check.
    """

    def __init__(self, *args: Any, gate: float, check_substeps: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        full = self.expert_policy
        self.check_policy = ExpertPolicy(self.expert, check_substeps, full.guidance_scale, full.project, full.support)
        self.gate = gate
        self.is_gated = False  # whether the states of the current source are gated
        self.budget_left = math.inf  # teacher forwards

    def counts(self, n: int, beta: tuple[float, float, float]) -> list[int]:
        counts = super().counts(n, beta)
        return counts if self.count_teacher_forwards(counts) <= self.budget_left else [0, 0, 0]

    def count_teacher_forwards(self, counts: list[int]) -> int:
        """Counts the teacher forwards that the next draws and rollouts will take, if there are as many of each source as `counts` says."""
        forward, teacher, student = (count * unit for count, unit in zip(counts, self.states_per_draw(), strict=True))
        full, check, acting = (
            self.forwards_per_action(self.expert_policy),
            self.forwards_per_action(self.check_policy),
            self.count_rollout_teacher_steps(counts),
        )
        if self.gate == 1:
            return full * (forward + teacher + student + acting)
        return full * (self.num_labelled(forward) + teacher + self.num_labelled(student) + acting) + check * (forward + student)

    def count_rollout_teacher_steps(self, counts: list[int]) -> int:
        """Counts the teacher steps of the next rollouts before their states; draws the actors and stop steps ahead of time."""
        if self.states_per_rollout == "all":
            return 0  # each step is the label of the state before it
        stream, steps, m = self.streams["path"], 0, self.grid.num_steps
        before = stream.get_state()
        for n, p_expert in zip(counts[1:], (1.0, self.p_expert), strict=True):
            if n:
                acting = self.draw_actors(n, m, p_expert)
                steps += int((acting & (torch.arange(m) < self.draw_stop_steps(n, m)[:, None])).sum())
        stream.set_state(before)
        return steps

    def num_labelled(self, m: int) -> int:
        """Number of m gated states that are labelled."""
        return math.ceil(self.gate * m)

    def forward(self, n: int) -> TensorDict:
        self.is_gated = self.gate < 1
        return self.label_most_different(super().forward(n))

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        self.is_gated = self.gate < 1 and p_expert < 1
        return self.label_most_different(super().rollout(n, p_expert))

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        return self.check_policy.act(x_t, t, s, c, w) if self.is_gated else super().label(x_t, t, s, c, w)

    def label_most_different(self, states: TensorDict) -> TensorDict:
        """Keeps and labels the states with the largest d; states of a source that is not gated are returned as they are."""
        if not self.is_gated:
            return states
        x_t, t, s, c, w, check = (states.get(key, None) for key in ("x_t", "t", "s", "c", "w", "x_s"))
        d = (self.student_policy.act(x_t, t, s, c, w) - check).square().flatten(1).mean(1)  # (m,)
        time = (self.grid.times >= t[:, None]).sum(1)  # (m,), 1 for the first of the grid
        mean = d.new_zeros(len(self.grid.times) + 1).scatter_reduce(0, time, d, "mean", include_self=False)  # of d at each time
        largest = (d / mean[time].clamp(min=1e-30)).topk(self.num_labelled(len(states))).indices.sort().values
        states = states[largest]
        x_t, t, s, c, w = (states.get(key, None) for key in ("x_t", "t", "s", "c", "w"))
        states["x_s"] = self.expert_policy.act(x_t, t, s, c, w)
        states["nfe"] += self.forwards_per_action(self.expert_policy)
        return states


class SafeDagger(ActionMatching):
    """DAgger with a gate and a budget.

    Raises:
        ValueError: query_budget is too small for one collection, or cannot be kept in a world.
    """

    name = "safe_dagger"
    adapts_beta = False
    Config: ClassVar[type[LearnerConfig]] = SafeDaggerConfig
    config: SafeDaggerConfig
    collector: GatedCollector

    def __init__(self, expert: Expert | str, config: SafeDaggerConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config, support)
        teacher_acts = any(self.config.beta(i / 100)[1] > 0 for i in range(101)) or self.config.p_expert > 0
        if self.config.query_budget is not None and self.collector.world is not None and teacher_acts:
            raise ValueError(
                f"query_budget={self.config.query_budget}: in a world the teacher acts for as long as episodes last, which is not known "
                "beforehand; set beta.teacher and p_expert to 0, or query_budget to null"
            )
        first = split_collection(self.collect_size, self.config.beta(0), self.collector.states_per_draw(), [0.0] * len(SOURCES))
        needed = self.collector.count_teacher_forwards(first) + self.teacher_nfe
        if self.config.query_budget is not None and self.config.query_budget < needed:
            raise ValueError(
                f"query_budget={self.config.query_budget}: the first collection, of {self.collect_size} states, takes {needed} forwards "
                "of the teacher; raise it, or lower collect_size"
            )

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **settings: Any) -> Collector:
        c = self.config
        return super().make_collector(student_policy, GatedCollector, gate=c.gate, check_substeps=c.check_substeps)

    def collect(self) -> TensorDict:
        if self.config.query_budget is not None:
            self.collector.budget_left = self.config.query_budget - self.teacher_nfe
        return super().collect()


def main(argv: list[str] | None = None) -> None:
    run(SafeDagger, argv)


if __name__ == "__main__":
    main()
