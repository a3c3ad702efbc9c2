"""The base class of every agent: a student that imitates an expert in few steps."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ddil_agents.devices import ranks
from ddil_agents.settings import check_arguments
from ddil_agents.states.collect import stream_seed
from ddil_env import DenoisingEnv, Expert, ExpertPolicy, NetworkDenoiser, StudentPolicy, Support, TimeGrid, load_expert, unroll
from ddil_env.errors import BROKEN_LATENTS, check_finite, check_whole
from ddil_env.guidance import GuidanceConditioning
from ddil_env.mdp import Kernel

if TYPE_CHECKING:
    from ddil_agents.training.callbacks import Callback


def check_new(directory: Path) -> None:
    """Refuses a directory that holds something.

    Raises:
        ValueError: so; names it.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; choose another directory")


class Agent(ABC):
    """A student and a way of training it, as all commands use them; `Algorithm` is the subclass to derive from.

    Args:
        expert: An Expert, or the name of a preset.
        config: An instance of `Config`; default: its defaults.
        support: Calibrated support of an earlier run; used by agents that threshold estimates.

    Raises:
        ValueError: the settings do not fit the expert or the grid.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]  # an AgentConfig
    kernel: ClassVar[Kernel] = "ddim"  # the student's transition, in sampling and in rollouts
    config: Any
    student_policy: StudentPolicy
    support: Support | None = None  # the set that its estimates are projected onto
    step: int = 0  # updates so far
    total_updates: int  # updates at the end of training
    teacher_nfe: int = 0  # teacher forwards in training so far, in this process

    def __init__(self, expert: Expert | str, config: Any = None, support: Support | None = None) -> None:
        self.config = self.Config() if config is None else config
        if not isinstance(self.config, self.Config):
            raise ValueError(f"config={self.config!r:.60}: {self.name} needs a {self.Config.__name__}")
        self.expert = load_expert(expert)
        self.grid = TimeGrid(self.expert.schedule, self.config.num_steps, self.config.grid).to(self.expert.device)
        if self.config.teacher_steps > self.expert.schedule.t_max:
            raise ValueError(
                f"teacher_steps={self.config.teacher_steps}: need at most {self.expert.schedule.t_max}, the length of the teacher's chain"
            )
        # The reference of every evaluation: the expert as it is, without the thresholding of training.
        self.teacher_policy = ExpertPolicy(self.expert, self.config.substeps, self.config.guidance_scale)

    @property
    @abstractmethod
    def student(self) -> NetworkDenoiser:
        """The network in training; `ema_student` is the one to use."""

    @property
    @abstractmethod
    def ema_student(self) -> NetworkDenoiser:
        """The network that is evaluated, sampled and saved: the average over the training, where the agent has one."""

    @property
    @abstractmethod
    def student_nfe(self) -> int:
        """Student forwards so far in this process, in training and rollouts."""

    def total_nfe(self) -> tuple[int, int]:
        """Teacher and student forwards so far, summed over the processes; every process needs to call it."""
        nfe = torch.tensor([self.teacher_nfe, self.student_nfe], device=self.expert.device)
        teacher, student = ranks.sum_over_ranks(nfe).tolist()
        return teacher, student

    def guidance_conditioning(self) -> list[GuidanceConditioning]:
        """The scales that a guidance-conditioned student was trained for, as `save_student` takes them; empty for another student."""
        scales = self.config.guidance_range
        return [] if scales is None else [GuidanceConditioning(scales[0], scales[1], self.teacher_policy.guidance_scale)]

    @abstractmethod
    def plan_updates(self, num_updates: int) -> None:
        """Sets `total_updates`, the end of training, to num_updates from now."""

    @abstractmethod
    def train(self, out: Path | None = None, *, progress: bool = True, **options: Any) -> None:
        """Trains until `total_updates` updates are done."""

    def learn(
        self, num_updates: int | None = None, out: str | Path | None = None, progress: bool = True, callbacks: Iterable[Callback] = ()
    ) -> Self:
        """Trains for num_updates more updates; the schedules of learning rate and β are stretched to the new total.

        Args:
            num_updates: Number of updates; default: the config's.
            out: An empty or new directory for metrics.jsonl, checkpoints/ and tensorboard/.
            progress: Whether to show a bar.
            callbacks: Called at every update, collection and evaluation (training/callbacks.py).

        Raises:
            ValueError: `out` exists and is not empty; num_updates is less than 1, or more than the config's where `capacity` is None.
            FloatingPointError: the loss is not finite; names the step and the source.
        """
        num_updates = self.config.num_updates if num_updates is None else num_updates
        check_whole("num_updates", num_updates, 1)
        directory = None if out is None else Path(out)
        with ranks.sync_errors():  # all ranks look before the first one writes there
            if directory is not None:
                check_new(directory)
        self.plan_updates(num_updates)
        self.train(directory, progress=progress, callbacks=callbacks)
        return self

    def sample(
        self,
        n: int | None = None,
        c: Tensor | Sequence[int] | int | None = None,
        prompts: Sequence[str] | str | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Samples from the averaged student with its own times and kernel; `expert.decode` turns them into pictures.

        Args:
            n: Number of samples; default: one for each prompt, or 1.
            c: Condition ids, (n,), or one id for all samples; default: drawn at random.
            prompts: n texts, or one for all samples, in the place of c; for an expert whose conditions are texts.
            seed: Seed of the noise and of the conditions.

        Returns:
            Samples (n, *sample_shape).

        Raises:
            ValueError: the number of conditions is not n, an id does not exist, the expert is unconditional, or it takes no prompts.
        """
        check_whole("seed", seed, 0)
        generator = torch.Generator(self.expert.device).manual_seed(stream_seed(seed, "sample"))
        texts = [prompts] if isinstance(prompts, str) else [] if prompts is None else list(prompts)
        n = len(texts) or 1 if n is None else n
        check_whole("n", n, 1)
        x_T = torch.randn(n, *self.expert.sample_shape, generator=generator, device=self.expert.device)
        if prompts is not None:
            if c is not None or len(texts) not in (1, n):
                raise ValueError(f"prompts={texts[:3]}: need one text for all of n={n} samples, or as many, and no c beside them")
            with self.expert.prompted(texts) as ids:
                return self._denoise(x_T, ids.expand(n), generator)
        drawn = self.expert.sample_condition(n, generator)
        return self._denoise(x_T, drawn if c is None else self._check_condition(c, n), generator)

    def save_student(self, directory: str | Path) -> None:
        """Saves the averaged student with its times, kernel and guidance, in the expert's format: of a pipeline's expert, a pipeline.

        Args:
            directory: An empty or new directory.

        Raises:
            ValueError: the directory is not empty, or the format holds no such sampler.
        """
        check_new(folder := Path(directory))
        folder.mkdir(parents=True, exist_ok=True)
        how = self.config.num_steps, self.config.grid, self.kernel
        self.expert.save_student(self.ema_student, folder, *how, *self.guidance_conditioning())

    def _denoise(self, x_T: Tensor, c: Tensor | None, generator: torch.Generator) -> Tensor:
        samples = unroll(self.student_policy, self.grid, x_T, c, kernel=self.kernel, generator=generator)[:, -1]
        check_finite(samples, BROKEN_LATENTS)
        return samples

    def _check_condition(self, c: Tensor | Sequence[int] | int, n: int) -> Tensor:
        """Returns n conditions on the device, after checking them: ids (n,), or tensors (n, *condition_shape)."""
        if (shape := self.expert.condition_shape) is not None:
            values = torch.as_tensor(c, dtype=torch.float32, device=self.expert.device)
            if tuple(values.shape) not in (shape, (n, *shape)) or not bool(values.isfinite().all()):
                raise ValueError(f"c of shape {tuple(values.shape)}: need finite conditions, {(n, *shape)}, or {shape} for all")
            return values.expand(n, *shape)
        ids, num_conditions = torch.as_tensor(c, device=self.expert.device), self.expert.num_conditions
        if not num_conditions:
            raise ValueError(f"c={ids.tolist()}: this expert is unconditional; leave c out")
        if ids.shape not in ((), (n,)) or ids.dtype != torch.int64 or not bool(((ids >= 0) & (ids < num_conditions)).all()):
            raise ValueError(f"c={ids.tolist()}: need {n} condition ids, or one for all, whole numbers from 0 to {num_conditions - 1}")
        return ids.expand(n)

    def make_env(self, batch_size: Sequence[int] = (64,), **settings: Any) -> DenoisingEnv:
        """Makes the TorchRL environment that the student acts in, with its times and kernel and the teacher's guidance and steps.

        Args:
            batch_size: Batch size of the environment.
            settings: Further arguments of `DenoisingEnv`, such as `reward`.
        """
        defaults = {"kernel": self.kernel, "grid": self.config.grid, "substeps": self.config.substeps}
        defaults |= {"guidance_scale": self.teacher_policy.guidance_scale}
        return DenoisingEnv(self.expert, self.config.num_steps, batch_size, **defaults | settings)

    def make_student(self, **options: Any) -> NetworkDenoiser:
        """Makes the student's network."""
        student = self.expert.make_student(**options)
        if not isinstance(student, NetworkDenoiser):
            raise ValueError(
                f"{type(self.expert).__name__}.make_student() returned {type(student).__name__}; return a ddil_env.NetworkDenoiser of the "
                "network, the schedule and what the network predicts"
            )
        return student

    def initial_student(self) -> NetworkDenoiser:
        """Makes the student that training starts from, with the weights of the run that `init` names if it names one."""
        student = self.seeded_student()
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

    def seeded_student(self) -> NetworkDenoiser:
        """Makes a student whose random weights come from the config's seed; torch's global generator stays as it is.

        Raises:
            ValueError: the expert's make_student does not take the config's `student` settings.
        """
        options = self.student_options
        signature = inspect.signature(self.expert.make_student)
        try:
            signature.bind(**options)
        except TypeError as error:
            known = ", ".join(signature.parameters)
            raise ValueError(f"student={options}: {error}; this expert's students take {known}; leave out the rest") from error
        try:
            check_arguments(type(self.expert), "make_student", self.config.student)
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
        guidance = {} if self.config.guidance_range is None else {"guidance_embedding": True}
        return self.config.student | guidance | ({} if self.config.lora is None else {"lora": self.config.lora})

    def config_dict(self) -> dict[str, Any]:
        """The config as plain values."""
        return dataclasses.asdict(self.config)
