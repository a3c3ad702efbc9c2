"""Prints the plan of a run before it starts: its stages, its files, and about how many forwards it will take.

The numbers of forwards are computed from the settings, without calling a network; docs/reference/scaling.md has the formulas as a table,
and the tests compare them with the counters of runs.
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


@dataclass(frozen=True)
class Forwards:
    """Number of forwards of one process per update, on average over a run.

    Attributes:
        teacher: Of the teacher; a guided pair counts as two.
        student, critic: Of student and critic without a gradient for their weights.
        trained_student, trained_critic: Of student and critic with a gradient for their weights.
    """

    teacher: float
    student: float
    critic: float
    trained_student: float
    trained_critic: float

    @property
    def student_nfe(self) -> float:
        """All that `student_nfe` of an agent counts."""
        return self.student + self.critic + self.trained_student + self.trained_critic

    def work(self, checkpointing: bool = False) -> float:
        """Compute in units of a forward; a backward counts as two, and gradient checkpointing repeats the forwards with a gradient."""
        trained = self.trained_student + self.trained_critic
        return self.teacher + self.student + self.critic + (4 if checkpointing else 3) * trained


def forwards(
    config: LearnerConfig, guided: bool = False, j: float | None = None, beta: tuple[float, float, float] | None = None
) -> Forwards:
    """Computes the forwards per update by the formula that the config names, `forwards_formula`.

    Args:
        config: The agent's config.
        guided: Whether the teacher is guided.
        j: Number of steps of dmd2's backward simulation; default: the mean over the grid.
        beta: The shares of the sources; default: those at the end of the schedule.
    """
    c: Any = config  # with settings that only some agents have
    b, n, g, k, p = config.batch_size, config.num_steps, 2 if guided else 1, config.substeps, config.p_expert
    _, teacher, student = beta or config.beta(1.0)
    collect_size, collect_every = config.collect_schedule
    m = collect_size / collect_every  # states per update
    if config.forwards_formula == "distribution_matching":
        j = (n - 1) / 2 if j is None else j
        student_turn = 1 / c.critic_updates  # fraction of the updates in which the student takes a step
        gan = c.gan_weight > 0
        return Forwards(
            teacher=m * (teacher + student * p) * j * k * g + student_turn * b * g,
            student=m * student * (1 - p) * j + (1 - student_turn) * b,
            critic=student_turn * b * (1 + gan),
            trained_student=student_turn * b,
            trained_critic=b * (1 + 2 * gan),
        )
    all_states = config.states_per_rollout == "all"
    consistency = config.forwards_formula == "consistency"
    lengths = c.inference_steps if consistency else (n,)
    steps = sum((length - 1) / (length if all_states else 2) for length in lengths) / len(lengths)  # of a rollout, per state
    solver, k, target = (c.solver_steps, 1, b) if consistency else (n, k, 0)
    acting = 0 if all_states else teacher * (solver - 1) / 2 + student * p * steps  # steps of the teacher that are not labels
    unrolled = b * getattr(c, "unroll", 0)  # denoisings, each computed twice by the student
    return Forwards(
        teacher=m * (1 + acting) * k * g + unrolled * config.teacher_steps * g,
        student=m * student * (1 - p) * steps + target + unrolled * n,
        critic=0,
        trained_student=b + unrolled * n,
        trained_critic=0,
    )


def mean_beta(config: LearnerConfig) -> tuple[float, float, float]:
    """The shares of forward, teacher and student states, averaged over the run."""
    forward, teacher, student = (sum(shares) / 101 for shares in zip(*(config.beta(i / 100) for i in range(101)), strict=True))
    return forward, teacher, student


def is_guided(stages: list[Stage], expert: Expert) -> list[bool]:
    """For each stage, whether its teacher takes a guided pair of forwards; a distilled teacher takes one forward.

    Args:
        stages: From `plan_stages`.
        expert: The original teacher.
    """
    guided: list[bool] = []
    for stage in stages:
        config = stage.config
        scale = expert.guidance_scale if config.guidance_scale is None else config.guidance_scale
        pair = expert.guided_nfe == 2 and (config.guidance_range is not None or scale != 1)
        guided.append({"original": pair, "last": False, "same": guided[-1] if guided else pair}[stage.teacher])
    return guided


def print_plan(
    agent: type[Agent],
    config: LearnerConfig,
    stages: list[Stage],
    expert: Expert,
    evaluation: Evaluation,
    out: Path,
    checkpoint_every: int,
) -> None:
    """Prints the plan of a run on stderr, with a line for each of its stages.

    Args:
        agent: The agent's class.
        config: The run's settings.
        stages: From `plan_stages`.
        expert: The original teacher.
        evaluation: Settings of the evaluation.
        out: The run directory.
        checkpoint_every: Number of updates between two checkpoints.
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
        c: Any = stage.config
        batch = f"{c.batch_size:,}" + (f" × {ranks.world_size()} processes" if ranks.world_size() > 1 else "")
        row = [str(number), names[stage.teacher] + (", guided" if guided else ""), f"{c.teacher_steps} → {c.num_steps}"]
        row += [f"{c.num_updates:,}", batch]
        row += [round_count(states) for states in states_collected(c)] if isinstance(c, LearnerConfig) else [""] * 3
        if isinstance(c, LearnerConfig) and c.forwards_formula is not None:
            per_update, (_, collect_every) = forwards(c, guided, beta=mean_beta(c)), c.collect_schedule
            num_updates = -(-c.num_updates // collect_every) * collect_every  # that the collections serve
            row += [
                round_count(per_update.teacher * num_updates * ranks.world_size()),
                round_count(per_update.student_nfe * c.num_updates * ranks.world_size()),
            ]
        rows.append(row + [""] * (len(head) - len(row)))
    used = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in zip(*used, strict=True)]
    print(f"{agent.name}, the plan (numbers of states and forwards are estimates):", *lines, sep="\n  ", file=sys.stderr)
    rolls_out = any(sum(mean_beta(stage.config)[1:]) > 0 for stage in stages) if isinstance(config, LearnerConfig) else False
    if rolls_out and (world := expert.make_world(1)) is not None:
        rollouts = (
            f"each collection also runs {config.num_worlds} episodes of up to {world.num_frames:,} samples for each source of rollouts"
        )
        print(f"  in a world: {rollouts}; their forwards come on top", file=sys.stderr)
    print(f"  then {describe_evaluation(agent, config, stages, evaluation)}", file=sys.stderr)
    print(f"  {out}: a checkpoint every {checkpoint_every:,} updates", file=sys.stderr)


def states_collected(config: LearnerConfig) -> tuple[float, ...]:
    """About how many states of each source a run collects, in all processes."""
    collect_size, collect_every = config.collect_schedule
    total = -(-config.num_updates // collect_every) * collect_size
    return tuple(share * total * ranks.world_size() for share in mean_beta(config))


def describe_evaluation(agent: type[Agent], config: LearnerConfig, stages: list[Stage], evaluation: Evaluation) -> str:
    """Describes the evaluation at the end, in words."""
    last = evaluation_config(config, stages[-1].config)
    steps = [last.num_steps, *evaluation.also_steps]
    teacher = sorted({last.teacher_steps, *steps}, reverse=True)
    models = f"of the teacher in {join_numbers(teacher)} steps, and of {agent.name}'s student in {join_numbers(steps)}"
    each = "after each stage " if len(stages) > 1 else ""
    return f"{each}an evaluation: {evaluation.n:,} samples {models}"


def join_numbers(numbers: list[int]) -> str:
    """Joins numbers as in `32, 8 and 4`."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def round_count(number: float) -> str:
    """Formats a count to three figures, as in `12,300`."""
    rounded = round(number, 3 - len(str(int(number)))) if number >= 1000 else round(number)
    return f"{int(rounded):,}"
