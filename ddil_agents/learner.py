"""What every learner shares: the student, its average, its optimiser, the buffer, and one gradient step.

A new learner is one file: a config, a class with `loss`, and a `main`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensordict import TensorDict
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_agents.beta import Beta
from ddil_agents.buffer import SourceBuffer
from ddil_agents.checkpoint import load_checkpoint, save_checkpoint
from ddil_agents.collect import Collector, stream_seed
from ddil_env import Expert, ExpertPolicy, NetworkDenoiser, StudentPolicy, TimeGrid, load_expert
from ddil_env.schedule import GridKind

Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class LearnerConfig:
    """Settings that every learner has."""

    num_updates: int = 1000
    """Gradient steps."""
    num_steps: int = 4
    """N, steps of the student's sampler."""
    grid: GridKind = "linspace"
    """The N times: linspace (the paper's), dmd2 or trailing."""
    teacher_steps: int = 32
    """Steps of the teacher's sampler: a label takes teacher_steps / num_steps expert forwards."""
    guidance_scale: float | None = None
    """The teacher's classifier-free guidance w (1 is none); null: the expert's own."""
    threshold_teacher: bool = True
    """Project the teacher's estimates onto the data's support (reflected diffusion)."""
    threshold_student: bool = False
    """Project the student's estimates, when it is unrolled and when it is sampled."""
    beta: Beta = field(default_factory=Beta)
    """Source priors."""
    p_expert: float = 0.0
    """Probability that the expert acts in a step of a student rollout (mixed rollouts)."""
    batch_size: int = 64
    """States of a gradient step."""
    collect_size: int = 256
    """States that one collection labels."""
    updates_per_collect: int = 16
    """Gradient steps between collections. Each label serves about updates_per_collect · batch_size / collect_size of them."""
    capacity: int | None = 4096
    """States held per source; the oldest give way. null keeps all of the run (DAgger's aggregate)."""
    prioritised: bool = False
    """Draw states within a source in proportion to their last loss."""
    learning_rate: float = 1e-3
    """AdamW's, after warm-up; falls linearly to 0."""
    warmup_updates: int = 50
    """Gradient steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's momenta."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float = 0.99
    """Decay of the averaged student, which is the one that is evaluated and saved."""
    gradient_accumulation: int = 1
    """Parts that a batch is cut into, to save memory."""
    mixed_precision: Precision = "no"
    """no, fp16 or bf16."""
    seed: int = 0
    """Of weights, data, noise, times, rollouts and draws, each its own stream."""
    student: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the expert's make_student."""

    def __post_init__(self) -> None:
        positive = (
            "num_updates",
            "num_steps",
            "teacher_steps",
            "batch_size",
            "collect_size",
            "updates_per_collect",
            "gradient_accumulation",
        )
        for name in positive:
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
        for name in ("warmup_updates", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need 0 or more")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: need at least 1, or null to keep every state")
        units = (1, self.num_steps, self.num_steps)  # states that one forward draw, one rollout give
        if not any(self.collect_size * share + 1e-9 >= unit for share, unit in zip(self.beta(0), units, strict=True)):
            raise ValueError(
                f"collect_size={self.collect_size}: its shares {self.beta(0)} hold not one rollout of num_steps={self.num_steps} states; "
                "raise collect_size"
            )
        if self.teacher_steps % self.num_steps:
            raise ValueError(
                f"teacher_steps={self.teacher_steps} is no multiple of num_steps={self.num_steps}; each student step takes as many"
            )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size={self.batch_size} does not divide into gradient_accumulation={self.gradient_accumulation} parts")
        if self.mixed_precision not in get_args(Precision):
            raise ValueError(f"unknown mixed_precision {self.mixed_precision!r}; choose one of: {', '.join(get_args(Precision))}")

    @property
    def substeps(self) -> int:
        """Expert steps in one student step."""
        return self.teacher_steps // self.num_steps


class Learner(ABC):
    """A student, and how it learns from an expert.

    Args:
        expert: An Expert, or the name of a preset.
        config: This learner's config; default: its defaults.

    Raises:
        ValueError: what the expert, the grid or the student refuse.
    """

    name: ClassVar[str]
    Config: ClassVar[type[LearnerConfig]] = LearnerConfig

    def __init__(self, expert: Expert | str, config: LearnerConfig | None = None) -> None:
        self.config = self.Config() if config is None else config
        self.expert = load_expert(expert)
        config = self.config
        if config.mixed_precision == "fp16" and self.expert.device.type == "cpu":
            raise ValueError("mixed_precision=fp16 scales its losses on a GPU alone; on a CPU use bf16 or no")
        self.grid = TimeGrid(self.expert.schedule, config.num_steps, config.grid).to(self.expert.device)
        takes = inspect.signature(self.expert.make_student)
        try:
            takes.bind(**config.student)
        except TypeError as error:
            raise ValueError(f"student={config.student}: {error}; this expert's students take {', '.join(takes.parameters)}") from error
        with torch.random.fork_rng():  # a student from random weights is seeded, and the caller's generator left alone
            torch.manual_seed(stream_seed(config.seed, "weights"))
            try:
                student = self.expert.make_student(**config.student)
            except (TypeError, RuntimeError) as error:
                raise ValueError(f"make_student refuses student={config.student}: {error}") from error
        self.ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.ema.module.eval()
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay
        )
        self.horizon = config.num_updates
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._warm_up_then_linear)
        AcceleratorState._reset_state(reset_partial_state=True)  # several learners may live in one process, each with its own precision
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            cpu=self.expert.device.type == "cpu",
            device_placement=False,
        )
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        support = self.expert.support if config.threshold_student else None
        self.expert_policy = ExpertPolicy(self.expert, config.substeps, config.guidance_scale, project=config.threshold_teacher)
        self.student_policy = StudentPolicy(self.average, self.expert, support)
        self.collector = Collector(
            self.expert_policy, StudentPolicy(self.student, self.expert, support), self.grid, config.p_expert, config.seed
        )
        collections = -(-config.num_updates // config.updates_per_collect)
        capacity = config.capacity or collections * (config.collect_size + config.num_steps)
        used = (config.beta.forward > 0 or config.beta.schedule != "constant", config.beta.teacher > 0, config.beta.student > 0)
        self.buffer = SourceBuffer(
            [capacity if u else 1 for u in used], self.expert.device, config.prioritised, seed=stream_seed(config.seed, "source")
        )
        self.step = 0
        self.last_learning_rate = 0.0
        self.teacher_nfe = 0

    def collect(self) -> None:
        """Adds freshly labelled states to the buffer and counts the expert forwards that they took."""
        before = self.expert.nfe
        states = self.collector.collect(self.config.collect_size, self.beta(), self.step)
        self.teacher_nfe += self.expert.nfe - before
        if len(states):
            self.buffer.extend(states)

    @abstractmethod
    def loss(self, batch: TensorDict) -> Tensor:
        """The loss of each state of the batch, (b,)."""

    @property
    def average(self) -> NetworkDenoiser:
        """The averaged student: the one that is evaluated and saved."""
        return cast(NetworkDenoiser, self.ema.module)

    def beta(self) -> tuple[float, float, float]:
        """β at the present step."""
        return self.config.beta(self.step / self.horizon)

    def update(self, batch: TensorDict) -> tuple[Tensor, Tensor]:
        """One gradient step: the loss of each state (b,) and the gradient's norm before clipping, both on the device."""
        losses = []
        self.accelerator.gradient_accumulation_steps = self.config.gradient_accumulation  # accelerate keeps one number a process
        for part in batch.chunk(self.config.gradient_accumulation):
            with self.accelerator.accumulate(self.student):
                loss = self.loss(part)
                self.accelerator.backward(loss.mean())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
        self.last_learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step()
        self.ema.update_parameters(self.accelerator.unwrap_model(self.student))
        self.step += 1
        return torch.cat(losses), torch.as_tensor(norm)

    def _warm_up_then_linear(self, step: int) -> float:
        """Rises over the warm-up, then falls linearly, to reach 0 one step after the last."""
        return min((step + 1) / (self.config.warmup_updates + 1), max(self.horizon - step, 0) / self.horizon)

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
        from ddil_agents.train import train

        more = self.config.num_updates if num_updates is None else num_updates
        if more < 1:
            raise ValueError(f"num_updates={more}: need at least 1")
        if self.config.capacity is None and self.step + more > self.config.num_updates:
            raise ValueError(
                f"{self.step} + {more} gradient steps: capacity=null keeps every state of num_updates={self.config.num_updates}; "
                "build the learner with as many as it shall take in all"
            )
        directory = None if out is None else Path(out)
        if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ValueError(f"{directory} exists and is not empty; choose another `out`")
        self.horizon = self.step + more
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self._warm_up_then_linear(self.step)
        train(self, out=directory, progress=progress)
        return self

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
        """All that the next gradient steps depend on, in tensors and plain values."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "horizon": self.horizon,
            "student": self.accelerator.unwrap_model(self.student).state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": None if scaler is None else scaler.state_dict(),
            "buffer": self.buffer.state_dict(),
            "collector": self.collector.state_dict(),
            "nfe": {"teacher": self.teacher_nfe, "student": self.student_nfe},
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off."""
        self.step, self.horizon = state["step"], state["horizon"]
        self.accelerator.unwrap_model(self.student).load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.buffer.load_state_dict(state["buffer"])
        self.collector.load_state_dict(state["collector"])
        self.teacher_nfe, self.accelerator.unwrap_model(self.student).nfe = state["nfe"]["teacher"], state["nfe"]["student"]
        torch.set_rng_state(state["random"].cpu())

    @property
    def student_nfe(self) -> int:
        """Student forwards so far, training and rollouts together."""
        return int(self.accelerator.unwrap_model(self.student).nfe)

    def config_dict(self) -> dict[str, Any]:
        """The config as plain values."""
        return dataclasses.asdict(self.config)
