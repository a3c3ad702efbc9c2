"""The part of an algorithm that every algorithm shares: its networks as losses and users reach them, and what its trainer does for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self, cast

from ddil_agents.agent import Agent
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import sharding
from ddil_agents.states.buffer import SourceBuffer
from ddil_agents.states.collect import Collector
from ddil_agents.training.checkpoint import load_checkpoint, save_checkpoint
from ddil_agents.training.trainer import Trainer
from ddil_env import ExpertPolicy, NetworkDenoiser, StudentPolicy, Support
from ddil_env.support import support_to_dict


class TrainedAgent(Agent):
    """An agent that a Trainer trains.

    Attributes:
        networks: What learns, by name; the student is one of them. A loss calls them by `wrapped(name)`.
        trainer: Takes the gradient steps.
        thresholds: Where estimates are projected, by role.
        expert_policy: Labels states.
        collector: Draws them.
        buffer: Holds them.
        collect_size, collect_every: States of a collection, and the updates from one to the next.
    """

    config: LearnerConfig
    support: Support
    networks: dict[str, Any]
    trainer: Trainer
    thresholds: dict[str, Support]
    expert_policy: ExpertPolicy
    collector: Collector
    buffer: SourceBuffer
    collect_size: int
    collect_every: int
    ema_warm_up: ClassVar[bool] = True

    @property
    def student(self) -> NetworkDenoiser:
        """The student in training, as a loss calls it."""
        return cast(NetworkDenoiser, self.wrapped("student"))

    @property
    def ema_student(self) -> NetworkDenoiser:
        """The averaged student: the one that is evaluated and saved."""
        return cast(NetworkDenoiser, self.trainer.ema.module)

    def wrapped(self, name: str) -> Any:
        """A network as a loss calls it: with what averages its gradients over the processes around it, unless it is frozen."""
        return self.trainer.trainables[name].network

    @property
    def student_nfe(self) -> int:
        """Student forwards so far, training and rollouts together, with those of networks beside it (LCM's target, DMD2's critic)."""
        return int(cast(NetworkDenoiser, self.networks["student"]).nfe)

    def policy(self, student: NetworkDenoiser, support: Support | None) -> StudentPolicy:
        """A student of this agent as a policy; one with a guidance embedding gets the guidance that it is evaluated at."""
        w = None if self.config.guidance_range is None else self.teacher_policy.guidance_scale
        return StudentPolicy(student, self.expert, support, w, grid=self.grid, kernel=self.kernel)

    def update_student_policy(self) -> None:
        """Makes `student_policy` of the averaged network that there is now."""
        self.student_policy = self.policy(self.ema_student, self.support if "student" in self.config.thresholding.roles else None)

    def start_from(self, student: NetworkDenoiser) -> None:
        """Takes another student's weights; a guidance embedding that the other lacks stays at zero.

        Raises:
            ValueError: the other is of another architecture.
        """
        own = self.networks["student"]
        try:
            missing, strange = own.load_state_dict(sharding.like(student.state_dict(), own.state_dict()), strict=False)
        except RuntimeError as error:
            raise ValueError(f"the student cannot start from the last one's weights: {error}") from error
        embedding = len(missing) == 1 and self.config.guidance_range is not None and not student.guidance_embedding
        if strange or (missing and not embedding):
            raise ValueError(f"the student cannot start from the last one's weights: {[*missing, *strange][0]!r} is in one of them alone")
        self.ema_student.load_state_dict(own.state_dict())

    def extend(self, num_updates: int) -> None:
        self.trainer.extend_to(self.step + num_updates)

    def train(self, out: Path | None = None, **options: Any) -> None:
        self.trainer.train(out, **options)

    def save(self, directory: str | Path) -> Path:
        """Writes config, student and everything that a resumed run needs into the directory, atomically."""
        return save_checkpoint(self, Path(directory))

    def load(self, directory: str | Path) -> Self:
        """Reads what `save` wrote, into an agent of the same config; the next gradient steps are those of the saved one.

        Sets torch's global generator too, which a student with dropout draws from.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of another config.
        """
        load_checkpoint(self, Path(directory))
        return self

    def state_dict(self) -> dict[str, Any]:
        """What the next updates depend on beside the networks and the trainer, in tensors and plain values."""
        return {"buffer": self.buffer.state_dict(), "collector": self.collector.state_dict(), "support": self._calibration()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned.

        Raises:
            ValueError: the support was calibrated otherwise.
        """
        if state["support"] != self._calibration():
            raise ValueError("the saved learner's support was calibrated on other samples; pass it as support= (support.json of its run)")
        self.buffer.load_state_dict(state["buffer"])
        self.collector.load_state_dict(state["collector"])

    def _calibration(self) -> dict[str, Any] | None:
        return support_to_dict(self.support) if self.config.thresholding.kind == "quantile" else None
