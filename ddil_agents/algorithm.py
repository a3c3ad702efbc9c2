"""The base class of an algorithm: the states that a student learns from, their labels, and the loss of every network that is trained.

training/trainer.py does the rest: optimisers, averaged weights, precision, memory, processes, checkpoints and logs. Your own
algorithm is one file with a loss:

    from dataclasses import dataclass

    from torch import Tensor

    from ddil_agents import Algorithm, Batch, LearnerConfig
    from ddil_env import invert_ddim

    @dataclass(frozen=True)
    class HuberConfig(LearnerConfig):
        huber_h: float = 0.1  # distance at which the loss turns from square to linear

    class Huber(Algorithm):
        name = "huber"
        Config = HuberConfig

        def loss(self, batch: Batch) -> Tensor:
            x_hat = self.student(batch.x_t, batch.t, batch.c).x_0
            x_tgt = invert_ddim(self.expert.schedule, batch.x_t, batch.t, batch.expert_action, batch.s).x_0
            squared = (x_hat - x_tgt).square().flatten(1).mean(1)
            return (squared + self.config.huber_h**2).sqrt() - self.config.huber_h  # (b,)

`check_agent(Huber)` checks it on a toy, `Huber("digits").learn()` trains it, and
`python -m ddil_agents my_module.Huber --env digits` is its command.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from ddil_agents.config import LearnerConfig
from ddil_agents.devices.check_settings import check_settings
from ddil_agents.states.adaptive import AdaptiveShares
from ddil_agents.states.batch import Batch
from ddil_agents.states.buffer import SourceBuffer
from ddil_agents.states.collect import Collector, rank_stream_seed, stream_seed
from ddil_agents.training.trained_agent import TrainedAgent
from ddil_agents.training.trainer import GradientStep, Trainer
from ddil_env import Expert, ExpertPolicy, StudentPolicy, Support, TimeGrid, Unbounded, unroll
from ddil_env.support import CountingSupport, Role, build_support


class Algorithm(TrainedAgent):
    """A student and the way it learns from an expert; a subclass needs a `name` and a `loss`.

    Args:
        expert: An Expert, or the name of a preset.
        config: An instance of `Config`; default: its defaults.
        support: Calibrated support of an earlier run, onto which estimates are projected; default: calibrated as the config says.

    Raises:
        ValueError: the settings do not fit the expert, the grid or the student.
    """

    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    config: LearnerConfig
    support: Support
    adapts_beta: ClassVar[bool] = True  # whether `loss` measures an error, whose gradients on states of two sources can be compared
    roles: ClassVar[tuple[Role, ...]] = ("teacher", "target", "student")  # whose estimates can be thresholded

    def __init__(self, expert: Expert | str, config: LearnerConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config)
        config = self.config
        check_settings(config, self.expert.device)
        self._check_config()
        student = self.initial_student()
        before = self.expert.nfe
        self.support = build_support(config.thresholding, self.expert, self._sample_teacher) if support is None else support
        self.thresholds = self._make_thresholds()
        self.total_updates = config.num_updates
        self.adaptive_shares = AdaptiveShares(config.beta) if config.beta.schedule == "adaptive" else None
        self.networks = {"student": student, **self.make_networks()}
        self.trainer = Trainer(self)
        self.expert_policy = self.make_expert_policy()
        self.update_student_policy()
        self.collector = self.make_collector(self.policy(student, self.thresholds["student"]))
        self.collect_size, self.collect_every = self.collect_schedule()
        capacities = config.capacities(self.collect_size, self.collect_every)
        self.buffer = SourceBuffer(capacities, self.expert.device, config.prioritised, seed=rank_stream_seed(config.seed, "source"))
        self.teacher_nfe = self.expert.nfe - before  # the calibration may have sampled the teacher

    # The networks, and the gradient steps of an update.

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The student's loss at each state of the batch, (b,)."""

    def gradient_steps(self) -> tuple[GradientStep, ...]:
        """The gradient steps of an update, in order; one of them is the student's."""
        return (GradientStep("student", self.loss, self.config.learning_rate),)

    def make_networks(self) -> dict[str, nn.Module]:
        """Makes the networks that are trained beside the student, by name."""
        return {}

    # The states that they learn from.

    def make_expert_policy(self) -> ExpertPolicy:
        """Makes the policy that labels states and acts in teacher rollouts."""
        return ExpertPolicy(self.expert, self.config.substeps, self.config.guidance_scale, support=self.thresholds["teacher"])

    def make_collector(
        self, student_policy: StudentPolicy, kind: type[Collector] = Collector, grid: TimeGrid | None = None, **settings: Any
    ) -> Collector:
        """Makes the collector that draws and labels states.

        Args:
            student_policy: Acts in student rollouts.
            kind: Class of the collector.
            grid: Times of the states; default: the student's.
            settings: Arguments that this class of collector takes beside those of `Collector`.
        """
        c = self.config
        settings |= {"kernel": self.kernel, "p_expert": c.p_expert, "guidance_range": c.guidance_range}
        settings |= {"states_per_rollout": c.states_per_rollout, "world": self.expert.make_world(c.num_worlds)}
        return kind(self.expert_policy, student_policy, self.grid if grid is None else grid, c.seed, **settings)

    def collect_schedule(self) -> tuple[int, int]:
        """Number of states in a collection, and of updates from one collection to the next."""
        return self.config.collect_schedule

    def collect(self) -> TensorDict:
        """Collects and labels states with the current β, adds them to the buffer and returns them."""
        states = self.collector.collect(self.collect_size, self.beta(), self.step)
        if len(states):
            self.buffer.extend(states, self.collector.collected)
        return states

    def draw(self) -> TensorDict:
        """Draws the states of the next update: s ~ Σᵢ βᵢ ρᵢ (DDIL Alg. 1)."""
        return self.buffer.sample(self.config.batch_size, self.beta())

    def beta(self) -> tuple[float, float, float]:
        """β at the current update."""
        return self.config.beta(self.step / self.total_updates) if self.adaptive_shares is None else self.adaptive_shares()

    # Checks and calibration in the constructor.

    def _check_config(self) -> None:
        config = self.config
        if config.stages:
            raise ValueError(
                "an agent trains one stage; iterate over ddil_agents.training.stages.iter_learners(agent, expert, plan_stages(config)), "
                "or use the command"
            )
        if config.beta.schedule == "adaptive" and not self.adapts_beta:
            raise ValueError(f"beta.schedule=adaptive: the loss of {self.name} is no error that sources can be compared by; use another")
        roles = config.thresholding.roles
        if unknown := [role for role in roles if role not in self.roles]:
            raise ValueError(f"thresholding.roles={roles}: {self.name} has no {unknown[0]}; it has {', '.join(self.roles)}")
        if config.guidance_range is not None:
            low, high = map(self.expert.check_guidance, config.guidance_range)
            if not low <= self.teacher_policy.guidance_scale <= high:
                raise ValueError(
                    f"the expert's guidance_scale={self.teacher_policy.guidance_scale:g} lies outside "
                    f"guidance_range={config.guidance_range}; set guidance_scale to one inside; the student is evaluated at it"
                )

    def _make_thresholds(self) -> dict[str, Support]:
        """The support for the estimates of each role; `Unbounded` for roles that the config does not name."""
        roles = self.config.thresholding.roles
        if "student" in roles and not {"teacher", "target"} & {*roles} and not isinstance(self.support, Unbounded):
            warnings.warn(
                f"thresholding.roles={roles}: the student's estimates are projected onto the support and its targets are not; where a "
                "target lies outside, the student's estimates are driven outward without end; add teacher",
                stacklevel=3,
            )
        if "student" in roles and self.expert.sampling_support(self.support) is None:
            warnings.warn(
                f"thresholding.roles={roles}: training projects the student's estimates onto the support, and the pipeline that it is "
                "saved as does not: its samples and scores are without the projection, as the pipeline's",
                stacklevel=3,
            )
        return {role: CountingSupport(self.support) if role in roles else Unbounded() for role in self.roles}

    def _sample_teacher(self, n: int) -> Tensor:
        """Samples n times from the teacher, to calibrate a support without data."""
        generator = torch.Generator(self.expert.device).manual_seed(stream_seed(self.config.seed, "calibration"))
        x_T = torch.randn(n, *self.expert.sample_shape, generator=generator, device=self.expert.device)
        return unroll(self.teacher_policy, self.grid, x_T, self.expert.sample_condition(n, generator))[:, -1]
