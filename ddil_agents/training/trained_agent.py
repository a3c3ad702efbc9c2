"""The base class of agents that a Trainer trains: access to their networks, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self, cast

from ddil_agents.agent import Agent
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import sharding
from ddil_agents.states.adaptive import AdaptiveShares
from ddil_agents.states.buffer import SourceBuffer
from ddil_agents.states.collect import Collector
from ddil_agents.training.checkpoint import load_checkpoint, save_checkpoint
from ddil_agents.training.trainer import Trainer
from ddil_env import ExpertPolicy, NetworkDenoiser, StudentPolicy, Support
from ddil_env.support import support_to_dict


class TrainedAgent(Agent):
    """An agent that a Trainer trains.

    Attributes:
        networks: The networks in training by name, among them "student". A loss calls them through `wrapped_network(name)`.
        trainer: Takes the gradient steps.
        thresholds: The support that the estimates of each role are projected onto.
        expert_policy: Labels states and acts in teacher rollouts.
        collector: Draws and labels states.
        buffer: Holds labelled states.
        adaptive_shares: The shares of the schedule `adaptive`; None with another.
        collect_size, collect_every: Number of states in a collection, and of updates from one collection to the next.
        ema_warm_up: Whether the decay of the averaged student rises to `config.ema` in the first steps.
    """

    config: LearnerConfig
    support: Support
    networks: dict[str, Any]
    trainer: Trainer
    thresholds: dict[str, Support]
    expert_policy: ExpertPolicy
    collector: Collector
    buffer: SourceBuffer
    adaptive_shares: AdaptiveShares | None
    collect_size: int
    collect_every: int
    ema_warm_up: ClassVar[bool] = True

    @property
    def student(self) -> NetworkDenoiser:
        """The student in training, as a loss calls it; `ema_student` is the one to use."""
        return cast(NetworkDenoiser, self.wrapped_network("student"))

    @property
    def ema_student(self) -> NetworkDenoiser:
        """The averaged student, which is evaluated, sampled and saved."""
        return cast(NetworkDenoiser, self.trainer.ema.module)

    def wrapped_network(self, name: str) -> Any:
        """A network as a loss calls it: in DistributedDataParallel if there are several processes, unless it is frozen."""
        return self.trainer.trainables[name].network

    @property
    def student_nfe(self) -> int:
        """Student forwards so far, in training and rollouts, and those of networks of its kind (LCM's target, DMD2's critic)."""
        return int(cast(NetworkDenoiser, self.networks["student"]).nfe)

    def policy(self, student: NetworkDenoiser, support: Support | None) -> StudentPolicy:
        """Makes a policy of a student of this agent; a guidance embedding gets the scale that the student is evaluated at."""
        w = None if self.config.guidance_range is None else self.teacher_policy.guidance_scale
        return StudentPolicy(student, self.expert, support, w, grid=self.grid, kernel=self.kernel)

    def update_student_policy(self) -> None:
        """Sets `student_policy` to a policy of the current averaged network, which samples as the saved student does."""
        support = self.expert.sampling_support(self.support) if "student" in self.config.thresholding.roles else None
        self.student_policy = self.policy(self.ema_student, support)

    def start_from(self, student: NetworkDenoiser) -> None:
        """Copies the weights of another student; a guidance embedding that it lacks stays at zero.

        Raises:
            ValueError: the other student has another architecture.
        """
        network = self.networks["student"]
        try:
            missing, unexpected = network.load_state_dict(sharding.shard_state(student.state_dict(), network.state_dict()), strict=False)
        except RuntimeError as error:
            raise ValueError(f"the student cannot start from the last one's weights: {error}") from error
        only_embedding = len(missing) == 1 and self.config.guidance_range is not None and not student.guidance_embedding
        if unexpected or (missing and not only_embedding):
            raise ValueError(f"the student cannot start from the last one's weights: {[*missing, *unexpected][0]!r} is in only one of them")
        self.ema_student.load_state_dict(network.state_dict())

    def plan_updates(self, num_updates: int) -> None:
        self.trainer.set_total_updates(self.step + num_updates)

    def train(self, out: Path | None = None, **options: Any) -> None:
        self.trainer.train(out, **options)

    def save(self, directory: str | Path) -> Path:
        """Writes a checkpoint into the directory, atomically, and returns its path."""
        return save_checkpoint(self, Path(directory))

    def load(self, directory: str | Path) -> Self:
        """Loads a checkpoint that `save` wrote into an agent of the same config, which then trains on exactly as the saved one would.

        Sets torch's global generator too, which a student with dropout draws from.

        Raises:
            ValueError: there is no checkpoint, or it is damaged or of another config.
        """
        load_checkpoint(self, Path(directory))
        return self

    def state_dict(self) -> dict[str, Any]:
        """The state of buffer, collector and calibration, in tensors and plain values.

        `Trainer.state_dict` adds its own and the networks'; training/checkpoint.py lists all keys.
        """
        adaptive = {} if self.adaptive_shares is None else {"adaptive_shares": self.adaptive_shares.state_dict()}
        return adaptive | {"buffer": self.buffer.state_dict(), "collector": self.collector.state_dict(), "support": self._calibration()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the support was calibrated on other samples.
        """
        if state["support"] != self._calibration():
            raise ValueError("the saved agent's support was calibrated on other samples; pass it as support= (support.json of its run)")
        self.buffer.load_state_dict(state["buffer"])
        self.collector.load_state_dict(state["collector"])
        if self.adaptive_shares is not None:
            self.adaptive_shares.load_state_dict(state["adaptive_shares"])

    def _calibration(self) -> dict[str, Any] | None:
        return support_to_dict(self.support) if self.config.thresholding.kind == "quantile" else None
