"""Settings that agents and learners have."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from ddil_agents.states.beta import Beta
from ddil_agents.states.collect import StatesPerRollout
from ddil_env.adapters import LoRA
from ddil_env.support import Thresholding
from ddil_env.time_grid import GridKind

Precision = Literal["no", "fp16", "bf16"]
Optimizer = Literal["adamw", "adamw8bit"]
RateSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class AgentConfig:
    """Settings that every agent has."""

    num_updates: int = 1000
    """Gradient steps."""
    num_steps: int = 4
    """N, steps of the student's sampler."""
    grid: GridKind = "linspace"
    """The N times: linspace (the paper's), dmd2, trailing or lcm."""
    teacher_steps: int = 32
    """Steps of the teacher's sampler: a label takes teacher_steps / num_steps expert forwards."""
    guidance_scale: float | None = None
    """The teacher's classifier-free guidance w (1 or less is none); null: the expert's own."""
    seed: int = 0
    """Of weights, data, noise, times, rollouts and draws, each its own stream."""
    student: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the expert's make_student."""
    lora: LoRA | None = None
    """Adapters over the teacher's own weights for every network that would start from a copy of them; null: full fine-tuning."""
    init: str | None = None
    """A run directory whose student to start from, such as an LCM's for DMD2; null: what make_student gives, the expert's weights."""

    def __post_init__(self) -> None:
        for name in ("num_updates", "num_steps", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: need 0 or more")
        if self.teacher_steps % self.num_steps:
            raise ValueError(
                f"teacher_steps={self.teacher_steps} is no multiple of num_steps={self.num_steps}; each student step takes as many"
            )

    @property
    def substeps(self) -> int:
        """Expert steps in one student step."""
        return self.teacher_steps // self.num_steps

    def for_evaluation(self) -> Self:
        """These settings without what only training needs, for a student that is loaded."""
        return dataclasses.replace(self, init=None)


@dataclass(frozen=True)
class LearnerConfig(AgentConfig):
    """Settings that every learner has."""

    guidance_range: tuple[float, float] | None = None
    """Draw w anew for each state from here, and tell the student (a zero-initialised guidance embedding); null: one w for all."""
    thresholding: Thresholding = field(default_factory=Thresholding)
    """Reflected diffusion: which estimates are projected onto the data's support, and how."""
    beta: Beta = field(default_factory=Beta)
    """Source priors."""
    p_expert: float = 0.0
    """Probability that the expert acts in a step of a student rollout (mixed rollouts)."""
    states_per_rollout: StatesPerRollout = 1
    """States that each teacher or student rollout gives: 1, at a time drawn uniformly, as DDIL's Algorithm 1 draws a state; or all N of
    it, which cost fewer student forwards and are N times fewer independent draws of noise and condition."""
    num_worlds: int = 16
    """Worlds in which rollouts run at a time, of experts that have one; each rollout there is a whole episode."""
    batch_size: int = 64
    """States of a gradient step, of each process."""
    collect_size: int = 256
    """States that one collection labels, of each process."""
    updates_per_collect: int = 16
    """Gradient steps between collections. Each label serves about updates_per_collect · batch_size / collect_size of them."""
    capacity: int | None = 4096
    """States held per source, by each process; the oldest give way. null keeps all of the run (DAgger's aggregate)."""
    student_collections: int | None = 8
    """Of the student's own states the newest this many collections are held, since they age as it learns; null: as many as capacity says.
    Where capacity is null all are kept."""
    prioritised: bool = False
    """Draw states within a source in proportion to their last loss."""
    learning_rate: float = 1e-3
    """AdamW's, after warm-up."""
    lr_scheduler: RateSchedule = "linear"
    """What the rate does after warm-up: linear, falls to 0 at the end; constant, stays."""
    warmup_updates: int = 50
    """Updates of linear warm-up; a network that takes a step in each R-th of them warms up in 1/R as many steps."""
    optimizer: Optimizer = "adamw"
    """adamw, or adamw8bit, whose momenta take 2 bytes a weight in the place of 8."""
    weight_decay: float = 0.0
    """AdamW's."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's momenta."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float = 0.99
    """Decay of the averaged student, which is the one that is evaluated and saved; the first steps' is lower (average.py)."""
    gradient_accumulation: int = 1
    """Parts that a batch is cut into, to save memory."""
    halve_batch_on_oom: bool = False
    """Where a gradient step runs out of memory, do it again with twice as many parts, and the later ones too; false: an error."""
    mixed_precision: Precision = "no"
    """no, fp16 or bf16."""
    compile: bool = False
    """Compile the networks (torch.compile): minutes at the start, faster steps ever after; for long runs on a GPU."""
    stages: tuple[dict[str, Any], ...] = ()
    """A chain of runs in one: for each, the settings that differ, and `expert`, its teacher: last (the last stage's student),
    same (as the last stage's) or original. Each student starts from the last one's weights."""

    teachers: ClassVar[tuple[str, ...]] = ("last", "same", "original")  # that a stage can have; the first is the default

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_worlds", "batch_size", "collect_size", "updates_per_collect", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need a positive, finite number")
        if not all(0 <= b < 1 for b in self.adam_betas):
            raise ValueError(f"adam_betas={self.adam_betas}: need two numbers in [0, 1)")
        for name, low, high in (("p_expert", 0, 1), ("ema", 0, 0.999999)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: need a number in [{low}, {high}]")
        for name in ("warmup_updates", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need 0 or more")
        if self.p_expert and not self.beta.student:
            raise ValueError(f"p_expert={self.p_expert}: the expert acts in student rollouts, and β has none; give them a share, or use 0")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: need at least 1, or null to keep every state")
        if self.student_collections is not None and self.student_collections < 1:
            raise ValueError(f"student_collections={self.student_collections}: need at least 1, or null to hold as many as capacity")
        if self.states_per_rollout not in get_args(StatesPerRollout):
            raise ValueError(f"states_per_rollout={self.states_per_rollout}: need 1 or all")
        if not any(self.collect_size * share + 1e-9 >= unit for share, unit in zip(self.beta(0), self.states_per_draw, strict=True)):
            lacking, cure = "state", ""
            if self.states_per_rollout == "all":
                lacking, cure = f"rollout of {self.states_per_draw[1]} states", ", or set states_per_rollout to 1"
            raise ValueError(
                f"collect_size={self.collect_size}: its shares {self.beta(0)} hold not one {lacking}; raise collect_size{cure}"
            )
        if self.guidance_range is not None:
            least, most = self.guidance_range
            if not 1 <= least < most < math.inf:
                rule = "need two different, finite numbers from 1 on, the lower first; 1 or less is no guidance"
                raise ValueError(f"guidance_range={self.guidance_range}: {rule}")
            if self.guidance_scale is not None and not least <= self.guidance_scale <= most:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale} lies outside guidance_range={self.guidance_range}, which is trained on"
                )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size={self.batch_size} does not divide into gradient_accumulation={self.gradient_accumulation} parts")
        for name, known in (("mixed_precision", Precision), ("optimizer", Optimizer), ("lr_scheduler", RateSchedule)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of: {', '.join(get_args(known))}")

    def capacities(self, collect_size: int, collect_every: int) -> list[int]:
        """States of each source that the buffer holds; 1, the least that there can be, of a source that is never collected.

        Args:
            collect_size: States of a collection.
            collect_every: Updates from one collection to the next.
        """
        capacity = self.capacity or -(-self.num_updates // collect_every) * (collect_size + max(self.states_per_draw))
        shares = [max(share) for share in zip(*(self.beta(i / 100) for i in range(101)), strict=True)]  # over the run
        held = [capacity if share > 0 else 1 for share in shares]
        if self.capacity is not None and self.student_collections is not None and shares[2] > 0:
            held[2] = min(held[2], self.student_collections * max(math.ceil(collect_size * shares[2]), self.states_per_draw[2]))
        return held

    @property
    def states_per_draw(self) -> tuple[int, int, int]:
        """States that one forward draw, one teacher and one student rollout give."""
        teacher, student = self.rollout_lengths if self.states_per_rollout == "all" else (1, 1)
        return 1, teacher, student

    @property
    def rollout_lengths(self) -> tuple[int, int]:
        """States that a teacher and a student rollout pass through."""
        return self.num_steps, self.num_steps
