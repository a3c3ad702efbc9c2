"""Settings of agents: those of every agent, and those of every agent that a Trainer trains (a learner)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from ddil_agents.states.beta import SOURCES, Beta, split_collection
from ddil_agents.states.collect import StatesPerRollout
from ddil_env.adapters import LoRA
from ddil_env.support import Thresholding
from ddil_env.time_grid import GridKind

Precision = Literal["no", "fp16", "bf16"]
Optimizer = Literal["adamw", "adamw8bit"]
RateSchedule = Literal["linear", "constant"]
ForwardsFormula = Literal["labels", "consistency", "distribution_matching"]


@dataclass(frozen=True)
class AgentConfig:
    """Settings of every agent."""

    num_updates: int = 1000
    """Number of updates: gradient steps of the student (dmd2: of its critic)."""
    num_steps: int = 4
    """Number of steps of the student's sampler, N."""
    grid: GridKind = "linspace"
    """Times of the student's N steps: linspace (the paper's), dmd2, trailing or lcm."""
    teacher_steps: int = 32
    """Number of steps of the teacher's sampler, a multiple of num_steps; each label takes teacher_steps / num_steps of them."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale w of the teacher; 1 or less is no guidance, null the expert's own scale."""
    seed: int = 0
    """Seed of the run; weights, data, noise, times, rollouts and draws each have a random stream that is seeded from it."""
    student: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the expert's make_student, which builds the student's network."""
    lora: LoRA | None = None
    """Train LoRA adapters on the teacher's weights in the place of copies of them; null: full fine-tuning."""
    init: str | None = None
    """Directory of a finished run whose student to start from; null: start as make_student says, which mostly is the expert's weights."""

    def __post_init__(self) -> None:
        for name in ("num_updates", "num_steps", "teacher_steps"):
            if not isinstance(value := getattr(self, name), int):
                raise ValueError(f"{name}={value!r}: need a whole number")
            if value < 1:
                raise ValueError(f"{name}={value}: need at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: need 0 or more")
        if self.teacher_steps % self.num_steps:
            raise ValueError(
                f"teacher_steps={self.teacher_steps} is not a multiple of num_steps={self.num_steps}; each student step takes as many"
            )

    @property
    def substeps(self) -> int:
        """Number of teacher steps in one student step."""
        return self.teacher_steps // self.num_steps

    def for_evaluation(self) -> Self:
        """Returns these settings without those that only training needs, for evaluating a student that was loaded."""
        return dataclasses.replace(self, init=None)


@dataclass(frozen=True)
class LearnerConfig(AgentConfig):
    """Settings of every agent that a Trainer trains."""

    guidance_range: tuple[float, float] | None = None
    """Range to draw a guidance scale w from for each state; the student takes w as an input, through an embedding that starts at zero.
    null: guidance_scale for all states."""
    thresholding: Thresholding = field(default_factory=Thresholding)
    """Reflected diffusion: which estimates are projected onto the data's support, and how."""
    beta: Beta = field(default_factory=Beta)
    """Probabilities β of drawing a training state from each source: forward, teacher, student."""
    p_expert: float = 0.0
    """Probability that the expert takes a step of a student rollout in the place of the student (mixed rollouts)."""
    states_per_rollout: StatesPerRollout = 1
    """Number of states that each teacher or student rollout gives: 1, at a time drawn uniformly, as in DDIL's Algorithm 1; or all of its N
    states, which takes fewer student forwards but gives N times fewer independent draws of noise and condition."""
    num_worlds: int = 16
    """Number of worlds that run at a time, for an expert that has a world: there a rollout is a whole episode."""
    batch_size: int = 64
    """Number of states in a gradient step, per process."""
    collect_size: int = 256
    """Number of states that each collection labels, per process."""
    updates_per_collect: int = 16
    """Number of updates between two collections. Each label is used in about updates_per_collect · batch_size / collect_size of them."""
    capacity: int | None = 4096
    """Buffer size: number of states held per source and process; new states replace the oldest. null keeps all states of the run (DAgger's
    aggregated data set)."""
    student_collections: int | None = 8
    """Number of collections whose student states are held: older ones come from an outdated student. null: only capacity limits them. No
    effect if capacity is null."""
    prioritised: bool = False
    """Draw the states of a source in proportion to their last loss (prioritised replay)."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW after the warm-up."""
    lr_scheduler: RateSchedule = "linear"
    """Learning rate after the warm-up: linear falls to 0 at the end of training, constant stays."""
    warmup_updates: int = 50
    """Number of updates in which the learning rate rises linearly. A network that takes a gradient step only in every R-th update warms up
    in warmup_updates / R steps."""
    optimizer: Optimizer = "adamw"
    """Optimiser: adamw, or adamw8bit, whose moments take 2 bytes per weight instead of 8."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """β1 and β2 of AdamW, the decay rates of its moments."""
    max_grad_norm: float = 1.0
    """Gradient clipping: gradients with a larger norm are scaled down to it."""
    ema: float = 0.99
    """Decay of the exponential moving average of the student's weights, which is evaluated and saved; lower in the first steps
    (training/ema.py)."""
    gradient_accumulation: int = 1
    """Number of equal parts that a batch is processed in, one after the other, to save memory."""
    halve_batch_on_oom: bool = False
    """When a gradient step runs out of memory, double gradient_accumulation and repeat the step; false: stop with an error."""
    mixed_precision: Precision = "no"
    """Automatic mixed precision of the networks in training: no, fp16 or bf16."""
    compile: bool = False
    """Compile the networks with torch.compile: takes minutes at the start and makes every step faster; for long runs on a GPU."""
    stages: tuple[dict[str, Any], ...] = ()
    """Successive stages of training, each student initialised from the previous one. A list with, for each stage, the settings that differ
    and `expert`, its teacher: last (the previous stage's student), same (the previous stage's teacher) or original."""

    teachers: ClassVar[tuple[str, ...]] = ("last", "same", "original")  # that a stage may have, the default first
    forwards_formula: ClassVar[ForwardsFormula | None] = None  # of commands/plan.py, for the forwards of an update; None: no prediction

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_worlds", "batch_size", "collect_size", "updates_per_collect", "gradient_accumulation"):
            if not isinstance(value := getattr(self, name), int):
                raise ValueError(f"{name}={value!r}: need a whole number")
            if value < 1:
                raise ValueError(f"{name}={value}: need at least 1")
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
            raise ValueError(
                f"p_expert={self.p_expert}: the expert acts in student rollouts, and β has none (beta.student=0); raise it, or use 0"
            )
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: need at least 1, or null to keep every state")
        if self.student_collections is not None and self.student_collections < 1:
            raise ValueError(f"student_collections={self.student_collections}: need at least 1, or null to hold as many as capacity")
        if self.states_per_rollout not in get_args(StatesPerRollout):
            raise ValueError(f"states_per_rollout={self.states_per_rollout}: need 1 or all")
        if not any(split_collection(self.collect_size, self.beta(0), self.states_per_draw, [0.0] * len(SOURCES))):
            unit, cure = "state", ""
            if self.states_per_rollout == "all":
                unit, cure = f"rollout of {self.states_per_draw[1]} states", ", or set states_per_rollout to 1"
            raise ValueError(
                f"collect_size={self.collect_size} is too small: with the shares {self.beta(0)} no source gets a full {unit}; "
                f"raise collect_size{cure}"
            )
        if self.guidance_range is not None:
            lowest, highest = self.guidance_range
            if not 1 <= lowest < highest < math.inf:
                raise ValueError(f"guidance_range={self.guidance_range}: need two different, finite numbers from 1 on, the lower first")
            if self.guidance_scale is not None and not lowest <= self.guidance_scale <= highest:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale} lies outside guidance_range={self.guidance_range}; choose one inside, or null"
                )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size={self.batch_size} does not divide into gradient_accumulation={self.gradient_accumulation} parts")
        for name, known in (("mixed_precision", Precision), ("optimizer", Optimizer), ("lr_scheduler", RateSchedule)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of: {', '.join(get_args(known))}")

    def capacities(self, collect_size: int, collect_every: int) -> list[int]:
        """Number of states of each source that the buffer holds; 1, the minimum, for a source that is never collected.

        Args:
            collect_size: Number of states in a collection.
            collect_every: Number of updates from one collection to the next.
        """
        capacity = self.capacity or -(-self.num_updates // collect_every) * (collect_size + max(self.states_per_draw))
        shares = self.beta.largest_shares()
        held = [capacity if share > 0 else 1 for share in shares]
        if self.capacity is not None and self.student_collections is not None and shares[2] > 0:
            held[2] = min(held[2], self.student_collections * max(math.ceil(collect_size * shares[2]), self.states_per_draw[2]))
        return held

    @property
    def collect_schedule(self) -> tuple[int, int]:
        """Number of states in a collection, and of updates from one collection to the next."""
        return self.collect_size, self.updates_per_collect

    @property
    def states_per_draw(self) -> tuple[int, int, int]:
        """Number of states that one forward draw, one teacher rollout and one student rollout give."""
        teacher, student = self.rollout_lengths if self.states_per_rollout == "all" else (1, 1)
        return 1, teacher, student

    @property
    def rollout_lengths(self) -> tuple[int, int]:
        """Number of states in a teacher rollout and in a student rollout."""
        return self.num_steps, self.num_steps
