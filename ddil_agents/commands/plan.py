"""Before a run: what it will do, where its files go, and about how many forwards of the networks it will take.

No network is asked. The forwards are formulas of the settings (docs/scaling.md has them as a table), which the tests hold against the
counters of runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddil_agents.agent import Agent
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.stages import Stage, evaluation_config
from ddil_env import Expert

COUNTED = ("bc", "dagger", "dart", "lcm", "dmd2")  # agents whose forwards the formulas give


@dataclass(frozen=True)
class Forwards:
    """Forwards of one process in one update, on average over the updates of a run.

    Attributes:
        teacher: Of the teacher, a guided pair as two.
        student, critic: Of those without gradient into their weights.
        trained_student, trained_critic: Of those with.
    """

    teacher: float
    student: float
    critic: float
    trained_student: float
    trained_critic: float

    @property
    def student_nfe(self) -> float:
        """What `student_nfe` counts."""
        return self.student + self.critic + self.trained_student + self.trained_critic

    def work(self, checkpointing: bool = False) -> float:
        """In forwards, a backward counted as two; with gradient checkpointing a trained forward is done twice."""
        trained = self.trained_student + self.trained_critic
        return self.teacher + self.student + self.critic + (4 if checkpointing else 3) * trained


def forwards(
    config: LearnerConfig, guided: bool = False, j: float | None = None, beta: tuple[float, float, float] | None = None
) -> Forwards:
    """Forwards an update, of bc, dagger, lcm and dmd2.

    Args:
        config: The learner's.
        guided: Whether the teacher is guided.
        j: Steps of dmd2's backward simulation; default: their mean over the grid.
        beta: The shares of the sources; default: those of the end of its schedule.
    """
    own: Any = config  # of some learners, with settings of their own
    b, n, g, k, p = config.batch_size, config.num_steps, 2 if guided else 1, config.substeps, config.p_expert
    _, teacher, student = beta or config.beta(1.0)
    collected = config.collect_size / config.updates_per_collect  # states an update
    if hasattr(config, "critic_updates"):  # dmd2
        m = b if own.on_policy else collected
        j = (n - 1) / 2 if j is None else j
        turn = 1 / own.critic_updates  # the share of the updates in which the student takes a step
        gan = own.gan_weight > 0
        return Forwards(
            teacher=m * (teacher + student * p) * j * k * g + turn * b * g,
            student=m * student * (1 - p) * j + (1 - turn) * b,
            critic=turn * b * (1 + gan),
            trained_student=turn * b,
            trained_critic=b * (1 + 2 * gan),
        )
    every = config.states_per_rollout == "all"
    consistency = hasattr(config, "solver_steps")  # lcm
    lengths = own.inference_steps if consistency else (n,)
    steps = sum((m - 1) / (m if every else 2) for m in lengths) / len(lengths)  # of a rollout for each of its states
    solver, k, average = (own.solver_steps, 1, b) if consistency else (n, k, 0)
    led = 0 if every else teacher * (solver - 1) / 2 + student * p * steps  # the teacher's that are no label
    return Forwards(collected * (1 + led) * k * g, collected * student * (1 - p) * steps + average, 0, b, 0)


def mean_beta(config: LearnerConfig) -> tuple[float, float, float]:
    """The shares of forward, teacher and student states, averaged over the run."""
    forward, teacher, student = (sum(shares) / 101 for shares in zip(*(config.beta(i / 100) for i in range(101)), strict=True))
    return forward, teacher, student


def is_guided(stages: list[Stage], expert: Expert) -> list[bool]:
    """Of each stage, whether a question to its teacher is a pair of forwards: a distilled teacher has its guidance built in, or is told."""
    found: list[bool] = []
    for stage in stages:
        config = stage.config
        scale = expert.guidance_scale if config.guidance_scale is None else config.guidance_scale
        pair = expert.guided_nfe == 2 and (config.guidance_range is not None or scale != 1)
        found.append({"original": pair, "last": False, "same": found[-1] if found else pair}[stage.teacher])
    return found


def print_plan(
    agent: type[Agent],
    config: LearnerConfig,
    stages: list[Stage],
    expert: Expert,
    evaluation: Evaluation,
    out: Path,
    checkpoint_every: int,
) -> None:
    """Prints on stderr what a run is about to do, a line for each of its stages.

    Args:
        agent: Its learner.
        config: The run's.
        stages: From `plan_stages`.
        expert: The original teacher.
        evaluation: What its student is judged by.
        out: The run directory.
        checkpoint_every: Gradient steps between checkpoints.
    """
    head = [
        "stage",
        "teacher",
        "steps",
        "updates",
        "batch",
        "states: forward",
        "teacher",
        "student",
        "teacher forwards",
        "student forwards",
    ]
    rows = [head]
    names = {"original": "the expert", "last": "the last student", "same": "the same"}
    for number, (stage, guided) in enumerate(zip(stages, is_guided(stages, expert), strict=True), 1):
        own: Any = stage.config
        batch = f"{own.batch_size:,}" + (f" × {ranks.world_size()} processes" if ranks.world_size() > 1 else "")
        row = [str(number), names[stage.teacher] + (", guided" if guided else ""), f"{own.teacher_steps} → {own.num_steps}"]
        row += [f"{own.num_updates:,}", batch]
        row += [round_count(states) for states in states_collected(own)] if isinstance(own, LearnerConfig) else [""] * 3
        if agent.name in COUNTED:
            spent, fresh = forwards(own, guided, beta=mean_beta(own)), getattr(own, "on_policy", False)
            collections = own.num_updates if fresh else -(-own.num_updates // own.updates_per_collect) * own.updates_per_collect
            row += [
                round_count(spent.teacher * collections * ranks.world_size()),
                round_count(spent.student_nfe * own.num_updates * ranks.world_size()),
            ]
        rows.append(row + [""] * (len(head) - len(row)))
    used = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in zip(*used, strict=True)]
    print(f"{agent.name}, planned (states and forwards are about what they will be):", *lines, sep="\n  ", file=sys.stderr)
    print(f"  then {describe_evaluation(agent, config, stages, evaluation)}", file=sys.stderr)
    print(f"  {out}: a checkpoint every {checkpoint_every:,} updates", file=sys.stderr)


def states_collected(config: LearnerConfig) -> tuple[float, ...]:
    """About how many states of each source a run collects, of all processes."""
    fresh = getattr(config, "on_policy", False)  # dmd2
    total = config.num_updates * config.batch_size if fresh else -(-config.num_updates // config.updates_per_collect) * config.collect_size
    return tuple(share * total * ranks.world_size() for share in mean_beta(config))


def describe_evaluation(agent: type[Agent], config: LearnerConfig, stages: list[Stage], evaluation: Evaluation) -> str:
    """What is drawn after the last stage, in words."""
    last = evaluation_config(config, stages[-1].config)
    steps = [last.num_steps, *evaluation.also_steps]
    teacher = sorted({last.teacher_steps, *steps}, reverse=True)
    told = f"{join_numbers(teacher)} steps, and of {agent.name}'s student in {join_numbers(steps)}"
    each = "after each stage " if len(stages) > 1 else ""
    return f"{each}an evaluation: {evaluation.n:,} samples of the teacher in {told}"


def join_numbers(numbers: list[int]) -> str:
    """32, 8 and 4."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def round_count(number: float) -> str:
    """A count to three figures, 12,300."""
    rounded = round(number, 3 - len(str(int(number)))) if number >= 1000 else round(number)
    return f"{int(rounded):,}"
