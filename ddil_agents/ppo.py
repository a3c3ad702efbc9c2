"""PPO (Schulman et al. 2017) by stable-baselines3 on the reward `expert_l2`: the reinforcement learning baseline.

Imitation learning observes the expert's action a* at every state. PPO observes only how far its own action was from it,

    r(x_t, a) = −‖a − a*(x_t)‖² / d ,      a ~ N(μ_θ(x_t, t, s, c), diag σ²) ,      max E Σ r

and has to find the direction of a* by trial; how much more it needs than imitation learning says what observing a* is worth.
A step costs k teacher forwards, as a label does. μ_θ is the DDIM step of a student as the other agents have it,

    μ_θ = α_s x̂_θ + σ_s ε̂_θ

Each line of metrics is about one rollout; --log_every has no effect. There are no checkpoints: --resume starts from the beginning.

    python -m ddil_agents.ppo --env gaussian_mixture --num_updates 8000 --out runs/ppo

Needs `pip install 'ddil[sb3]'`. The docstring of ddil_env/sb3.py shows PPO with one of stable-baselines3's networks, in three lines.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn
from tqdm import tqdm

from ddil_agents.agent import Agent
from ddil_agents.commands.run import run
from ddil_agents.config import AgentConfig
from ddil_agents.devices import ranks
from ddil_agents.states.beta import Beta
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.callbacks import Callback, Stopwatch
from ddil_agents.training.checkpoint import folder_atomically
from ddil_agents.training.metrics import RunFiles
from ddil_agents.training.sb3_policy import StudentActorCritic, StudentFeatures
from ddil_agents.training.tracking import Tracker
from ddil_env import DenoisingVectorEnv, Expert, NetworkDenoiser, StudentPolicy, Support
from ddil_env.sb3 import SB3VecEnv
from ddil_env.support import Thresholding

SB3_METRICS = ("approx_kl", "clip_fraction", "explained_variance", "value_loss")  # stable-baselines3's, in a line of metrics


@dataclass(frozen=True)
class PPOConfig(AgentConfig):
    """Settings of PPO."""

    num_updates: int = 8000
    """Number of gradient steps, rounded to whole rollouts of epochs · num_envs · episodes · num_steps / batch_size gradient steps."""
    hidden: tuple[int, ...] = (128, 128, 128)
    """Number of units in each hidden layer of the critic."""
    log_std_init: float = -2.0
    """Initial log standard deviation of the actions; stable-baselines3's own default is 0."""
    action_bound: float = 4.0
    """Largest absolute value of an action's entries; larger ones are clipped."""
    num_envs: int = 125
    """Number of environments that step in one batch."""
    episodes: int = 1
    """Number of episodes of each environment in a rollout, which has num_envs · episodes · num_steps steps."""
    batch_size: int = 125
    """Number of steps of the rollout in a gradient step (minibatch size)."""
    epochs: int = 10
    """Number of passes over a rollout."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam; falls linearly, rollout by rollout, and reaches 0 after the last."""
    gamma: float = 1.0
    """Discount factor γ: 1 counts all later rewards in full, 0 only the next."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    clip_range: float = 0.2
    """Clipping range ε of the probability ratio."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""

    # Settings of other agents that are fixed for PPO.
    beta: ClassVar[Beta] = Beta(forward=0.0, student=1.0)
    thresholding: ClassVar[Thresholding] = Thresholding()
    guidance_range: ClassVar[None] = None
    stages: ClassVar[tuple[()]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_envs", "episodes", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        for name in ("learning_rate", "clip_range", "action_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need a positive, finite number")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: need a number in [0, 1]")
        if not 0 <= self.ent_coef < math.inf:
            raise ValueError(f"ent_coef={self.ent_coef}: need 0 or more, and finite")
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"log_std_init={self.log_std_init}: need a finite number; −2 is a standard deviation of 0.14")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden={self.hidden}: need at least one unit in every layer")
        if self.batch_size < 2 or self.rollout % self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: need a divisor, at least 2, of num_envs · episodes · num_steps = {self.rollout}, a rollout"
            )

    @property
    def rollout(self) -> int:
        """Number of environment steps in a rollout."""
        return self.num_envs * self.episodes * self.num_steps

    @property
    def updates(self) -> int:
        """Number of gradient steps on a rollout."""
        return self.rollout // self.batch_size * self.epochs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's and numpy's global generators, which stable-baselines3 draws from, and restores both at the end of the block."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


class PPOAgent(Agent):
    """PPO on the reward `expert_l2`; it thresholds nothing and ignores `support`.

    Raises:
        ValueError: the settings do not fit the expert, the environment or make_student, or there are several processes.
    """

    name = "ppo"
    Config = PPOConfig
    config: PPOConfig

    def __init__(self, expert: Expert | str, config: PPOConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config)
        if ranks.world_size() > 1:
            raise ValueError(f"ppo trains in one process, and here are {ranks.world_size()}; start it with python -m ddil_agents.ppo")
        config, expert = self.config, self.expert
        if expert.condition_shape is not None:
            raise ValueError(
                f"ppo learns from episodes of num_steps={config.num_steps} steps and condition ids, and {type(expert).__name__} has "
                "condition tensors or a world; choose another agent, such as dagger"
            )
        self.plan_updates(config.num_updates)
        env = DenoisingVectorEnv(
            expert,
            config.num_envs,
            config.num_steps,
            action_bound=config.action_bound,
            reward="expert_l2",
            substeps=config.substeps,
            guidance_scale=config.guidance_scale,
            grid=config.grid,
            autoreset_mode="SameStep",
        )
        sb3_env = SB3VecEnv(env)
        sb3_env.seed(stream_seed(config.seed, "rollout"))
        policy = {
            "features_extractor_class": StudentFeatures,
            "features_extractor_kwargs": {"student": self.initial_student(), "t_max": float(expert.schedule.t_max)},
            "net_arch": list(config.hidden),
            "activation_fn": nn.SiLU,
            "ortho_init": False,  # the student's weights stay as they are
            "log_std_init": config.log_std_init,
        }
        with seeded(stream_seed(config.seed, "weights")):
            self.model = PPO(
                StudentActorCritic,
                sb3_env,
                # stable-baselines3 passes 1 − k/K after rollout k of K
                learning_rate=lambda remaining: config.learning_rate * (remaining + config.updates / self.total_updates),
                n_steps=config.num_steps * config.episodes,
                batch_size=config.batch_size,
                n_epochs=config.epochs,
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
                clip_range=config.clip_range,
                ent_coef=config.ent_coef,
                policy_kwargs=policy,
                device=expert.device,
            )
        self.model.policy.set_training_mode(False)
        self.student_policy = StudentPolicy(self.student, expert, grid=self.grid, kernel=self.kernel)

    @property
    def student(self) -> NetworkDenoiser:
        """The student, whose DDIM step is the mean action, before clipping."""
        return cast(NetworkDenoiser, self.model.policy.features_extractor.student)

    @property
    def ema_student(self) -> NetworkDenoiser:
        """The student itself: PPO keeps no average."""
        return self.student

    @property
    def student_nfe(self) -> int:
        """Student forwards so far: for each action, in each epoch, and for the value of the last state of a rollout."""
        c = self.config
        return self.step // c.updates * (c.rollout * (1 + c.epochs) + c.num_envs)

    def plan_updates(self, num_updates: int) -> None:
        self.total_updates = self.step + max(1, round(num_updates / self.config.updates)) * self.config.updates

    def train(
        self,
        out: Path | None = None,
        *,
        progress: bool = True,
        track: Tracker = "none",
        callbacks: Iterable[Callback] = (),
        **options: Any,
    ) -> None:
        if list(callbacks):
            raise ValueError("callbacks: PPO is trained by stable-baselines3, which has callbacks of its own; leave them out")
        rollouts = (self.total_updates - self.step) // self.config.updates
        if out is not None:
            shutil.rmtree(out / "evaluation", ignore_errors=True)  # left by a run that starts again
        bar = tqdm(total=self.total_updates, initial=self.step, desc=self.name, unit="update", disable=not progress)
        clock = Stopwatch()
        files = RunFiles(clock, track)
        files.on_start(self, out)
        with closing(files), bar, seeded(stream_seed(self.config.seed, f"ppo{self.step}")):
            log = RolloutLog(self, files, clock, bar)
            try:
                self.model.learn(rollouts * self.config.rollout, log, log_interval=None, reset_num_timesteps=not self.step)
            except ValueError:  # torch's distributions refuse parameters that are not finite
                self.check_finite()
                raise
        self.model.policy.set_training_mode(False)

    def check_finite(self) -> None:
        """Checks that all weights are finite.

        Raises:
            FloatingPointError: some are not; the message names the rollout.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.policy.parameters()):
            raise FloatingPointError(f"the policy is not finite after rollout {self.step // self.config.updates + 1}; lower learning_rate")

    def save(self, directory: str | Path) -> Path:
        """Writes the student to `directory`/student, as a run does, and returns that path."""
        with folder_atomically(Path(directory) / "student") as student:
            self.save_student(student)
        return Path(directory) / "student"

    def load(self, directory: str | Path) -> Self:
        """Loads the student that `save` wrote into an agent of the same expert and settings.

        Raises:
            ValueError: the student is absent, damaged, or of another architecture.
        """
        saved = self.expert.load_student(Path(directory) / "student", **self.student_options)
        self.student.load_state_dict(saved.state_dict())
        return self


class RolloutLog(BaseCallback):
    """Writes a line of metrics for each rollout and the gradient steps on it.

    `loss` is −r, the mean squared distance of the sampled actions to the expert's; `action_std` is σ after the gradient steps.
    """

    def __init__(self, agent: PPOAgent, files: RunFiles, clock: Stopwatch, bar: tqdm[Any]) -> None:
        super().__init__()
        self.agent, self.files, self.clock, self.bar = agent, files, clock, bar
        self.loss: float | None = None  # of the rollout that the gradient steps are on

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.loss = -float(self.model.rollout_buffer.rewards.mean())

    def _on_rollout_start(self) -> None:  # stable-baselines3 has no hook after the gradient steps
        if self.loss is None:
            return
        agent, measured = self.agent, self.model.logger.name_to_value
        agent.check_finite()
        agent.step += agent.config.updates
        agent.teacher_nfe += agent.config.rollout * agent.teacher_policy.nfe_per_action
        std = float(self.model.policy.log_std.detach().exp().mean())
        self.clock.lap()
        row = {
            "step": agent.step,
            "timesteps": int(self.model.num_timesteps),
            "loss": self.loss,
            "action_std": std,
            **{name: x if math.isfinite(x := float(measured[f"train/{name}"])) else None for name in SB3_METRICS},
            "teacher_nfe": agent.teacher_nfe,
            "student_nfe": agent.student_nfe,
            "seconds": self.clock.seconds,
        }
        self.files.on_log(agent, row)
        self.bar.update(agent.config.updates)
        self.bar.set_postfix_str(f"−r={self.loss:.4f} σ={std:.3f}")

    _on_training_end = _on_rollout_start


def main(argv: list[str] | None = None) -> None:
    run(PPOAgent, argv)


if __name__ == "__main__":
    main()
