"""What every agent shares, its student and what that is judged against; and what every learner does, in a gradient step.

A new learner is one file: a config, a class with `loss`, and a `main`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from tqdm import tqdm

from ddil_agents import out_of_memory, ranks, sharding
from ddil_agents.average import Average
from ddil_agents.beta import Beta
from ddil_agents.buffer import SourceBuffer
from ddil_agents.checkpoint import load_checkpoint, save_checkpoint
from ddil_agents.collect import Collector, StatesPerRollout, own_seed, stream_seed
from ddil_agents.settings import check_types
from ddil_agents.trainable import Loss, Trainable
from ddil_env import Expert, ExpertPolicy, NetworkDenoiser, StudentPolicy, Support, TimeGrid, Unbounded, load_expert, unroll
from ddil_env.adapters import LoRA
from ddil_env.mdp import Kernel
from ddil_env.schedule import GridKind
from ddil_env.support import Metered, Role, Thresholding, build_support, support_to_dict

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
    """The teacher's classifier-free guidance w (1 is none); null: the expert's own."""
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

    def to_judge(self) -> Self:
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
        for name in ("batch_size", "collect_size", "updates_per_collect", "gradient_accumulation"):
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
        if not any(self.collect_size * share + 1e-9 >= unit for share, unit in zip(self.beta(0), self.units, strict=True)):
            lacking, cure = "state", ""
            if self.states_per_rollout == "all":
                lacking, cure = f"rollout of {self.units[1]} states", ", or set states_per_rollout to 1"
            raise ValueError(
                f"collect_size={self.collect_size}: its shares {self.beta(0)} hold not one {lacking}; raise collect_size{cure}"
            )
        if self.guidance_range is not None:
            least, most = self.guidance_range
            if not -math.inf < least < most < math.inf:
                raise ValueError(f"guidance_range={self.guidance_range}: need two different, finite numbers, the lower first")
            if self.guidance_scale is not None and not least <= self.guidance_scale <= most:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale} lies outside guidance_range={self.guidance_range}, which is trained on"
                )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size={self.batch_size} does not divide into gradient_accumulation={self.gradient_accumulation} parts")
        for name, known in (("mixed_precision", Precision), ("optimizer", Optimizer), ("lr_scheduler", RateSchedule)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of: {', '.join(get_args(known))}")

    @property
    def units(self) -> tuple[int, int, int]:
        """States that one forward draw, one teacher and one student rollout give."""
        teacher, student = self.rollout_lengths if self.states_per_rollout == "all" else (1, 1)
        return 1, teacher, student

    @property
    def rollout_lengths(self) -> tuple[int, int]:
        """States that a teacher and a student rollout pass through."""
        return self.num_steps, self.num_steps


class Agent(ABC):
    """What imitates an expert in few steps: the commands train it, judge it and write it down.

    Args:
        expert: An Expert, or the name of a preset.
        config: This agent's config; default: its defaults.

    Raises:
        ValueError: what the expert or the grid refuse.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]  # an AgentConfig
    kernel: ClassVar[Kernel] = "ddim"  # how the student samples, and is unrolled
    config: Any
    student_policy: StudentPolicy
    support: Support | None = None  # where its estimates are projected
    step: int = 0  # gradient steps so far
    horizon: int  # and at the end of training
    teacher_nfe: int = 0  # teacher forwards so far, of this process

    def __init__(self, expert: Expert | str, config: Any = None, support: Support | None = None) -> None:
        self.config = self.Config() if config is None else config
        self.expert = load_expert(expert)
        self.grid = TimeGrid(self.expert.schedule, self.config.num_steps, self.config.grid).to(self.expert.device)
        if self.config.teacher_steps > self.expert.schedule.t_max:
            raise ValueError(
                f"teacher_steps={self.config.teacher_steps}: need at most {self.expert.schedule.t_max}, the length of the teacher's chain"
            )
        # What a student is judged against: the expert on its own support, whatever is thresholded in training.
        self.reference = ExpertPolicy(self.expert, self.config.substeps, self.config.guidance_scale)

    @property
    @abstractmethod
    def student(self) -> NetworkDenoiser:
        """The student in training."""

    @property
    @abstractmethod
    def average(self) -> NetworkDenoiser:
        """The student that is evaluated and saved."""

    @property
    @abstractmethod
    def student_nfe(self) -> int:
        """Student forwards so far, training and rollouts together, of this process."""

    def spent(self) -> tuple[int, int]:
        """Teacher and student forwards so far, of all processes; each of them has to call it."""
        nfe = torch.tensor([self.teacher_nfe, self.student_nfe], device=self.expert.device)
        teacher, student = ranks.total(nfe).tolist()
        return teacher, student

    @abstractmethod
    def extend(self, num_updates: int) -> None:
        """Moves the horizon to so many gradient steps from here."""

    @abstractmethod
    def train(self, out: Path | None = None, *, progress: bool = True, **options: Any) -> None:
        """Trains to the horizon."""

    def learn(self, num_updates: int | None = None, out: str | Path | None = None, progress: bool = True) -> Self:
        """Trains for num_updates more gradient steps; learning rate and β run their course over what is then the whole.

        Args:
            num_updates: Gradient steps; default: the config's.
            out: An empty or new directory for metrics.jsonl, checkpoints/ and tensorboard/.
            progress: Whether to show a bar.

        Raises:
            ValueError: `out` exists and is not empty, num_updates is less than 1, or with `capacity` null more than the config's.
            FloatingPointError: the loss is not finite; names the step and the source.
        """
        more = self.config.num_updates if num_updates is None else num_updates
        if more < 1:
            raise ValueError(f"num_updates={more}: need at least 1")
        directory = None if out is None else Path(out)
        with ranks.together():  # before any of them writes there
            if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise ValueError(f"{directory} exists and is not empty; choose another `out`")
        self.extend(more)
        self.train(directory, progress=progress)
        return self

    def make_student(self, **options: Any) -> NetworkDenoiser:
        """The network that learns, before its first step."""
        return self.expert.make_student(**options)

    def initial_student(self) -> NetworkDenoiser:
        """The student before its first step: with seeded weights, or with those of the run that `init` names."""
        student = self._seeded_student()
        if self.config.init is not None:
            saved = Path(self.config.init) / "student"
            if not saved.is_dir():
                raise ValueError(f"init={self.config.init}: there is no {saved}; name the directory of a finished run")
            try:
                other = self.expert.load_student(saved, **self.student_options)
            except ValueError as error:
                raise ValueError(
                    f"init={self.config.init}: no student of {type(self.expert).__name__} and these settings: {error}"
                ) from error
            student.load_state_dict(other.state_dict())
        return student

    def _seeded_student(self) -> NetworkDenoiser:
        """A student whose random weights, if it has any, are seeded; the caller's generator is left alone."""
        options = self.student_options
        takes = inspect.signature(self.expert.make_student)
        try:
            takes.bind(**options)
        except TypeError as error:
            known = ", ".join(takes.parameters)
            raise ValueError(f"student={options}: {error}; this expert's students take {known}; leave out the rest") from error
        try:
            check_types(type(self.expert), "make_student", self.config.student)
        except ValueError as error:
            raise ValueError(f"student.{error}") from error
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(self.config.seed, "weights"))
            try:
                return self.make_student(**options)
            except (TypeError, RuntimeError) as error:
                raise ValueError(f"make_student refuses student={options}: {error}") from error

    @property
    def student_options(self) -> dict[str, Any]:
        """Keyword arguments of the expert's make_student and load_student."""
        told = {} if self.config.guidance_range is None else {"guidance_embedding": True}
        return self.config.student | told | ({} if self.config.lora is None else {"lora": self.config.lora})

    def config_dict(self) -> dict[str, Any]:
        """The config as plain values."""
        return dataclasses.asdict(self.config)


class Learner(Agent):
    """A student, and how it learns from an expert.

    Args:
        expert: An Expert, or the name of a preset.
        config: This learner's config; default: its defaults.
        support: Where estimates are projected, as an earlier run calibrated it; default: as the config says.

    Raises:
        ValueError: what the expert, the grid or the student refuse.
    """

    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    config: LearnerConfig
    support: Support
    roles: ClassVar[tuple[Role, ...]] = ("teacher", "target", "student")  # whose estimates there are to threshold
    ema_warm_up: ClassVar[bool] = True

    def __init__(self, expert: Expert | str, config: LearnerConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config)
        config = self.config
        if config.stages:
            raise ValueError(
                "a learner trains one stage; iterate over ddil_agents.stages.learners(agent, expert, plan(config)), or use the command"
            )
        if config.mixed_precision == "fp16" and self.expert.device.type == "cpu":
            raise ValueError("mixed_precision=fp16 scales its losses on a GPU alone; on a CPU use bf16 or no")
        if config.mixed_precision == "fp16" and sharding.asked():
            raise ValueError("mixed_precision=fp16 scales losses by what one rank sees; where networks are sharded use bf16 or no")
        if config.halve_batch_on_oom and ranks.world() > 1:
            raise ValueError(
                f"halve_batch_on_oom=true: {ranks.world()} processes cut their batches alike, and memory ends on one of them alone; "
                "leave it out and raise gradient_accumulation"
            )
        if (config.lora is not None or config.optimizer == "adamw8bit") and sharding.asked():
            raise ValueError(
                f"lora={config.lora}, optimizer={config.optimizer}: what is sharded are whole networks, with torch's AdamW; set lora "
                "to null and optimizer to adamw, or replicate, as configs/accelerate/8gpu.yaml does: with LoRA little is left to shard"
            )
        if strange := [role for role in config.thresholding.roles if role not in self.roles]:
            raise ValueError(
                f"thresholding.roles={config.thresholding.roles}: {self.name} has no {strange[0]}; it has {', '.join(self.roles)}"
            )
        if config.guidance_range is not None:
            low, high = map(self.expert.check_guidance, config.guidance_range)
            if not low <= self.reference.guidance_scale <= high:
                raise ValueError(
                    f"the expert's guidance_scale={self.reference.guidance_scale:g} lies outside guidance_range={config.guidance_range}; "
                    "set guidance_scale to one inside, at which the student is judged"
                )
        student = self.initial_student()
        before = self.expert.nfe
        self.support = build_support(config.thresholding, self.expert, self._sample_teacher) if support is None else support
        roles = config.thresholding.roles
        if "student" in roles and not {"teacher", "target"} & {*roles} and not isinstance(self.support, Unbounded):
            warnings.warn(
                f"thresholding.roles={roles}: the student is brought onto the support, and what it learns from is not; where that lies "
                "outside, the student's estimates are driven outward for ever; add teacher",
                stacklevel=2,
            )
        self.thresholds = {role: Metered(self.support) if role in roles else Unbounded() for role in self.roles}
        self.ema = Average(student, config.ema, self.ema_warm_up)
        self.ema.module.eval()
        if config.compile:
            self.expert.compile()
            self.average.network.compile()
        self.horizon, self.gradient_accumulation = config.num_updates, config.gradient_accumulation
        self.accelerator = ranks.join(config.mixed_precision, self.expert.device)
        sharding.shard(self.average, self.expert.device)
        if not ranks.is_main():
            torch.manual_seed(own_seed(config.seed, "dropout"))  # the main rank's is the caller's, as in a single process
        self.trainables = {"student": self.trainable("student", student, config.learning_rate)}
        self.expert_policy = self.labeller()
        self.student_policy = self._judged_policy()
        self.collector = self.make_collector(self.policy(self.trainables["student"].bare, self.thresholds["student"]))
        self.collect_size, self.collect_every = self.collection()
        self.buffer = SourceBuffer(self.capacities(), self.expert.device, config.prioritised, seed=own_seed(config.seed, "source"))
        self.teacher_nfe = self.expert.nfe - before  # of a calibration on the teacher's samples

    # What a new method may change.

    @abstractmethod
    def loss(self, batch: TensorDict) -> Tensor:
        """The loss of each state of the batch, (b,)."""

    def labeller(self) -> ExpertPolicy:
        """The expert as it labels states and unrolls the teacher."""
        return ExpertPolicy(self.expert, self.config.substeps, self.config.guidance_scale, support=self.thresholds["teacher"])

    def make_collector(
        self, student_policy: StudentPolicy, kind: type[Collector] = Collector, grid: TimeGrid | None = None, **own: Any
    ) -> Collector:
        """Where the states come from: `kind`, over the times of `grid` (default: the student's), with settings of its own."""
        c = self.config
        own |= {"kernel": self.kernel, "p_expert": c.p_expert, "guidance_range": c.guidance_range}
        own |= {"states_per_rollout": c.states_per_rollout}
        return kind(self.expert_policy, student_policy, self.grid if grid is None else grid, c.seed, **own)

    def collect(self) -> TensorDict:
        """Adds freshly labelled states to the buffer, and returns them."""
        if len(states := self.fresh_states()):
            self.buffer.extend(states)
        return states

    def collection(self) -> tuple[int, int]:
        """States of a collection, and the updates from one to the next."""
        return self.config.collect_size, self.config.updates_per_collect

    def capacities(self) -> list[int]:
        """States of each source that the buffer holds; of one that is never collected 1, the least that there can be."""
        c = self.config
        capacity = c.capacity or -(-c.num_updates // self.collect_every) * (self.collect_size + max(c.units))
        shares = [max(share) for share in zip(*(c.beta(i / 100) for i in range(101)), strict=True)]  # over the run
        held = [capacity if share > 0 else 1 for share in shares]
        if c.capacity is not None and c.student_collections is not None and shares[2] > 0:
            held[2] = min(held[2], c.student_collections * max(math.ceil(self.collect_size * shares[2]), c.units[2]))
        return held

    def draw(self) -> TensorDict:
        """The batch of the next update: s ~ Σᵢ βᵢ ρᵢ (DDIL Alg. 1)."""
        return self.buffer.sample(self.config.batch_size, self.beta())

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """One gradient step; what it measured, on the device: `loss` of each state (b,), `grad_norm` and any other scalars."""
        losses, norm = self.minimise("student", self.loss, self.parts(batch))
        self.ema.update_parameters(self.trainables["student"].bare)
        self.step += 1
        return {"loss": losses, "grad_norm": norm}

    def turns(self, network: str, updates: int) -> int:
        """Gradient steps that a network takes in so many updates."""
        return updates

    # What every method shares.

    def trainable(self, name: str, network: nn.Module, learning_rate: float) -> Trainable:
        """An optimiser for the network of that name, which warms up and ends in its own turns."""
        horizon, warmup = (self.turns(name, updates) for updates in (self.horizon, self.config.warmup_updates))
        return Trainable(network, self.config, self.accelerator, learning_rate, horizon, warmup)

    def policy(self, student: NetworkDenoiser, support: Support | None) -> StudentPolicy:
        """A student of this learner as a policy; one with a guidance embedding is told the guidance that it is judged at."""
        w = None if self.config.guidance_range is None else self.reference.guidance_scale
        return StudentPolicy(student, self.expert, support, w)

    def fresh_states(self) -> TensorDict:
        """Labelled states of the present β; counts the expert forwards that they take."""
        before = self.expert.nfe
        cure = "lower collect_size, or batch_size where each update collects its own; of a pipeline's expert also max_batch"
        with sharding.gathered(self.trainables["student"].bare), out_of_memory.named(f"while collecting {self.collect_size} states", cure):
            states = self.collector.collect(self.collect_size, self.beta(), self.step)
        self.teacher_nfe += self.expert.nfe - before
        return states

    def parts(self, batch: TensorDict) -> list[TensorDict]:
        """The batch as gradient accumulation takes it."""
        return list(batch.chunk(self.gradient_accumulation))

    def minimise(self, network: str, loss: Loss, parts: list[TensorDict]) -> tuple[Tensor, Tensor]:
        """One gradient step of a network.

        Where memory runs out and `halve_batch_on_oom` is set, it is begun again from the same draws with each part cut in two.

        Args:
            network: Of `trainables`.
            loss: The loss of each state of a part, (b,).
            parts: The batch, cut up; in place if it is cut anew.

        Returns:
            The loss of each state (b,) and the gradient's norm before clipping, both on the device.

        Raises:
            MemoryError: out of memory, and the parts may not be cut, or are of one state each.
        """
        size, config = max(map(len, parts)), self.config
        halves = config.halve_batch_on_oom and size > 1
        generators = [torch.default_generator, *torch.cuda.default_generators, *self.collector.streams.values()] if halves else []
        draws = [(generator, generator.get_state()) for generator in generators]
        doing = f"at step {self.step + 1}, in the gradient of {size} of batch_size={config.batch_size} states at a time"
        cure = f"lower batch_size, raise gradient_accumulation={self.gradient_accumulation}, or set halve_batch_on_oom"
        try:
            with out_of_memory.named(doing, cure if size > 1 else "no fewer go; free memory, or make the student smaller"):
                losses = self.trainables[network].accumulate(loss, parts)
        except MemoryError:
            if not halves:
                raise
        else:
            return losses, self.trainables[network].step()
        # From here on the error is gone, and with it the activations that its frames held.
        torch.cuda.empty_cache()
        for generator, state in draws:
            generator.set_state(state)
        parts[:] = [half for part in parts for half in part.chunk(2)]
        self.gradient_accumulation *= 2
        tqdm.write(f"out of memory {doing}; from here on gradient_accumulation is {self.gradient_accumulation}", file=sys.stderr)
        return self.minimise(network, loss, parts)

    def _sample_teacher(self, n: int) -> Tensor:
        """n samples of the teacher, for calibration where there are no data."""
        generator = torch.Generator(self.expert.device).manual_seed(stream_seed(self.config.seed, "calibration"))
        x_T = torch.randn(n, *self.expert.sample_shape, generator=generator, device=self.expert.device)
        return unroll(self.reference, self.grid, x_T, self.expert.sample_condition(n, generator))[:, -1]

    def start_from(self, student: NetworkDenoiser) -> None:
        """Takes another student's weights; a guidance embedding that the other lacks stays at zero.

        Raises:
            ValueError: the other is of another architecture.
        """
        own = self.trainables["student"].bare
        try:
            missing, strange = own.load_state_dict(sharding.like(student.state_dict(), own.state_dict()), strict=False)
        except RuntimeError as error:
            raise ValueError(f"the student cannot start from the last one's weights: {error}") from error
        embedding = len(missing) == 1 and self.config.guidance_range is not None and not student.guidance_embedding
        if strange or (missing and not embedding):
            raise ValueError(f"the student cannot start from the last one's weights: {[*missing, *strange][0]!r} is in one of them alone")
        self.average.load_state_dict(own.state_dict())

    @property
    def student(self) -> NetworkDenoiser:
        """The student in training, as a loss calls it."""
        return cast(NetworkDenoiser, self.trainables["student"].network)

    @property
    def average(self) -> NetworkDenoiser:
        """The averaged student: the one that is evaluated and saved."""
        return cast(NetworkDenoiser, self.ema.module)

    def beta(self) -> tuple[float, float, float]:
        """β at the present step."""
        return self.config.beta(self.step / self.horizon)

    def clipped(self) -> dict[str, Tensor]:
        """The fraction of entries that thresholding has moved since the last call, by role; NaN where it met none."""
        meters = {role: support for role, support in self.thresholds.items() if isinstance(support, Metered)}
        counts = [meter.take_counts().to(self.expert.device) for meter in meters.values()]  # (2,) each; one that met nothing is on the CPU
        shares = [moved / seen for moved, seen in ranks.total(torch.stack(counts))] if counts else []
        return dict(zip(meters, shares, strict=True))

    def extend(self, num_updates: int) -> None:
        if self.config.capacity is None and self.step + num_updates > self.config.num_updates:
            raise ValueError(
                f"{self.step} + {num_updates} gradient steps: capacity=null keeps every state of num_updates={self.config.num_updates}; "
                "build the learner with as many as it shall take in all"
            )
        self.horizon = self.step + num_updates
        for name, trainable in self.trainables.items():
            trainable.extend_to(self.turns(name, self.horizon))

    def train(self, out: Path | None = None, **options: Any) -> None:
        from ddil_agents.train import train

        if sharding.asked() and not sharding.is_sharded(self.average):
            raise ValueError("a sharded learner trains once: its average has been brought together; load its checkpoint into a new one")
        self.expert.release()
        train(self, out, **options)
        self.unshard()

    def unshard(self) -> None:
        """Brings a sharded average together on every rank, which can then use it without the others."""
        if sharding.is_sharded(self.average):
            average = self._seeded_student()
            average.load_state_dict(sharding.whole(self.average.state_dict()))
            self.ema.module = average.eval()
            self.student_policy = self._judged_policy()

    def _judged_policy(self) -> StudentPolicy:
        return self.policy(self.average, self.support if "student" in self.config.thresholding.roles else None)

    def save(self, directory: str | Path) -> Path:
        """Writes config, student and everything that a resumed run needs into the directory, atomically."""
        return save_checkpoint(self, Path(directory))

    def load(self, directory: str | Path) -> Self:
        """Reads what `save` wrote, into a learner of the same config; the next gradient steps are those of the saved one.

        Sets torch's global generator too, which a student with dropout draws from.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of another config.
        """
        load_checkpoint(self, Path(directory))
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that the next gradient steps depend on, in tensors and plain values; `checkpoint.OWN` of it differs by process."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "horizon": self.horizon,
            "gradient_accumulation": self.gradient_accumulation,
            "trainables": {name: trainable.state_dict() for name, trainable in self.trainables.items()},
            "ema": sharding.whole(self.ema.state_dict(), ranks.is_main()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "buffer": self.buffer.state_dict(),
            "collector": self.collector.state_dict(),
            "support": self._calibration(),
            "nfe": {"teacher": self.teacher_nfe, "student": self.student_nfe},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.expert.device) if self.expert.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: the support was calibrated otherwise.
        """
        if state["support"] != self._calibration():
            raise ValueError("the saved learner's support was calibrated on other samples; pass it as support= (support.json of its run)")
        self.step, self.horizon = state["step"], state["horizon"]
        self.gradient_accumulation = state["gradient_accumulation"]
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state["trainables"][name])
        self.ema.load_state_dict(sharding.like(state["ema"], self.ema.state_dict()))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.buffer.load_state_dict(state["buffer"])
        self.collector.load_state_dict(state["collector"])
        self.teacher_nfe = state["nfe"]["teacher"]
        self.trainables["student"].bare.nfe += state["nfe"]["student"] - self.student_nfe  # which counts other networks too
        torch.set_rng_state(state["random"].cpu())
        if (random := state.get("random_cuda")) is not None and self.expert.device.type == "cuda":
            torch.cuda.set_rng_state(random.cpu(), self.expert.device)

    def _calibration(self) -> dict[str, Any] | None:
        return support_to_dict(self.support) if self.config.thresholding.kind == "quantile" else None

    @property
    def student_nfe(self) -> int:
        """Student forwards so far, training and rollouts together, with those of networks beside it (LCM's target, DMD2's critic)."""
        return int(self.trainables["student"].bare.nfe)
