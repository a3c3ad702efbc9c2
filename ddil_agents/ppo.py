"""PPO (Schulman et al. 2017) by stable-baselines3 on the reward `expert_l2`: reinforcement learning, the outside reference.

The learners are told the expert's action a* at every state. PPO is told how far from it its own action was,

    r(x_t, a) = −‖a − a*(x_t)‖² / d ,      a ~ N(μ_θ(x_t, t, s, c), diag σ²) ,      max E Σ r

and has to find out by trying in which direction a* lies: what it takes more than imitation is the price of not asking.
A step costs the same k teacher forwards as a label. μ_θ is the DDIM step of the student that the learners have too,

    μ_θ = α_s x̂_θ + σ_s ε̂_θ

A line of metrics sums up a rollout, whatever --log_every. There are no checkpoints: --resume begins again.

    python -m ddil_agents.ppo --env gaussian_mixture --num_updates 8000 --out runs/ppo

Needs `pip install 'ddil[sb3]'`; PPO with a network of stable-baselines3's own is three lines, in ddil_env/sb3.py.
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
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from torch import Tensor, nn
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
from ddil_agents.training.tracking import Tracker
from ddil_env import DenoisingVectorEnv, Expert, NetworkDenoiser, StudentPolicy, Support
from ddil_env.sb3 import SB3VecEnv
from ddil_env.support import Thresholding

MEASURED = ("approx_kl", "clip_fraction", "explained_variance", "value_loss")  # of stable-baselines3's own, in a line of metrics


@dataclass(frozen=True)
class PPOConfig(AgentConfig):
    """Settings of PPO."""

    num_updates: int = 8000
    """Gradient steps, to the nearest whole rollout: one gives epochs · num_envs · episodes · num_steps / batch_size of them."""
    hidden: tuple[int, ...] = (128, 128, 128)
    """Units of the critic's hidden layers."""
    log_std_init: float = -2.0
    """log σ at the start, in units of the latent; stable-baselines3's own default is 0."""
    action_bound: float = 4.0
    """Actions are clipped to ± this."""
    num_envs: int = 125
    """Episodes at a time, in one batch."""
    episodes: int = 1
    """Of each environment, in one rollout: PPO learns from num_envs · episodes · num_steps steps at a time."""
    batch_size: int = 125
    """Steps of the rollout in one gradient step."""
    epochs: int = 10
    """Passes over a rollout."""
    learning_rate: float = 1e-3
    """Adam's; falls linearly, rollout by rollout, to reach 0 after the last."""
    gamma: float = 1.0
    """Discount: 1 counts what an action does to later rewards, 0 the next reward alone."""
    gae_lambda: float = 0.95
    """Of the advantage's average over n-step estimates."""
    clip_range: float = 0.2
    """How far from 1 a ratio of probabilities still earns."""
    ent_coef: float = 0.0
    """Bonus on the entropy."""

    # What a learner chooses, PPO has one of.
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
            raise ValueError(f"log_std_init={self.log_std_init}: need a finite number; −2 is a spread of 0.14")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden={self.hidden}: need at least one unit in every layer")
        if self.batch_size < 2 or self.rollout % self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: need a divisor, at least 2, of num_envs · episodes · num_steps = {self.rollout}, a rollout"
            )

    @property
    def rollout(self) -> int:
        """Environment steps that PPO learns from at a time."""
        return self.num_envs * self.episodes * self.num_steps

    @property
    def updates(self) -> int:
        """Gradient steps on a rollout."""
        return self.rollout // self.batch_size * self.epochs


# The policy, in stable-baselines3's terms


class StudentFeatures(BaseFeaturesExtractor):
    """A student's next latent (b, d), and behind it the state as the students' network has it, for the critic.

    That is x_t, u = t/t_max, sin and cos of 2^i π u for i < 6, and c one-hot.
    """

    def __init__(self, observation_space: spaces.Dict, student: NetworkDenoiser, t_max: float) -> None:
        self.size = math.prod(cast(tuple[int, ...], observation_space["x_t"].shape))
        self.num_ids = int(cast(spaces.Discrete, observation_space["c"]).n) if "c" in observation_space.spaces else 0
        super().__init__(observation_space, 2 * self.size + 13 + self.num_ids)
        self.student, self.t_max = student, t_max
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        x_t, t, s = observations["x_t"], observations["t"], observations["s"]  # times (b, 1)
        one_hot = [observations["c"].flatten(1)] if self.num_ids else []
        action = self.student.predict(x_t, t[:, 0], one_hot[0].argmax(1) if one_hot else None).latent(s[:, 0])
        u = t / self.t_max
        waves = [(u * self.frequencies).sin(), (u * self.frequencies).cos()]
        return torch.cat([action.flatten(1), x_t.flatten(1), u, *waves, *one_hot], dim=1)


class ActionAndCritic(MlpExtractor):
    """Behind StudentFeatures: to the actor the first d entries, to the critic a network of the others."""

    def __init__(self, features: StudentFeatures, hidden: list[int], activation: type[nn.Module]) -> None:
        super().__init__(features.features_dim - features.size, {"pi": [], "vf": hidden}, activation)
        self.latent_dim_pi = features.size

    def forward_actor(self, features: Tensor) -> Tensor:
        return features[:, : self.latent_dim_pi]

    def forward_critic(self, features: Tensor) -> Tensor:
        return cast(Tensor, super().forward_critic(features[:, self.latent_dim_pi :]))


class StudentActorCritic(MultiInputActorCriticPolicy):
    """A Gaussian around the student's DDIM step."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActionAndCritic(self.features_extractor, self.net_arch, self.activation_fn)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the features are the mean already
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


# The agent


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's and numpy's global generators, which stable-baselines3 draws from, begin at a 32-bit seed, and then are as they were."""
    outside = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(outside)


class PPOAgent(Agent):
    """PPO on one expert; nothing is thresholded, `support` is for a learner's sake.

    Raises:
        ValueError: what the expert, the environment or make_student refuse.
    """

    name = "ppo"
    Config = PPOConfig
    config: PPOConfig

    def __init__(self, expert: Expert | str, config: PPOConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config)
        if ranks.world() > 1:
            raise ValueError(f"ppo trains in one process, and here are {ranks.world()}; start it by python -m ddil_agents.ppo")
        config, expert = self.config, self.expert
        self.extend(config.num_updates)
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
        batch = SB3VecEnv(env)
        batch.seed(stream_seed(config.seed, "rollout"))
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
                batch,
                learning_rate=lambda left: (
                    config.learning_rate * (left + config.updates / self.total_updates)
                ),  # left: 1 − k/K after rollout k
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
        """The student, whose step is the mean action; unclipped."""
        return cast(NetworkDenoiser, self.model.policy.features_extractor.student)

    @property
    def ema_student(self) -> NetworkDenoiser:
        """The student: PPO takes no average."""
        return self.student

    @property
    def student_nfe(self) -> int:
        """The student's forwards so far: to act, in every epoch, and for the value of the state that a rollout ends at."""
        c = self.config
        return self.step // c.updates * (c.rollout * (1 + c.epochs) + c.num_envs)

    def extend(self, num_updates: int) -> None:
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
            raise ValueError("callbacks: PPO is trained by stable-baselines3, which has its own; leave them out")
        rollouts = (self.total_updates - self.step) // self.config.updates
        if out is not None:
            shutil.rmtree(out / "evaluation", ignore_errors=True)  # of a run that is begun again
        bar = tqdm(total=self.total_updates, initial=self.step, desc=self.name, unit="update", disable=not progress)
        clock = Stopwatch()
        files = RunFiles(clock, track)
        files.on_start(self, out)
        with closing(files), bar, seeded(stream_seed(self.config.seed, f"ppo{self.step}")):
            log = RolloutLog(self, files, clock, bar)
            try:
                self.model.learn(rollouts * self.config.rollout, log, log_interval=None, reset_num_timesteps=not self.step)
            except ValueError:  # torch's distributions, where they check, refuse what is not finite
                self.check_finite()
                raise
        self.model.policy.set_training_mode(False)

    def check_finite(self) -> None:
        """Refuses to go on with weights that are not finite.

        Raises:
            FloatingPointError: names the rollout.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.policy.parameters()):
            raise FloatingPointError(f"the policy is not finite after rollout {self.step // self.config.updates + 1}; lower learning_rate")

    def save(self, directory: str | Path) -> Path:
        """Writes the student into `directory`/student, as a run has it, and returns that."""
        with folder_atomically(Path(directory) / "student") as student:
            self.expert.save_student(self.student, student, self.config.num_steps, self.config.grid)
        return Path(directory) / "student"

    def load(self, directory: str | Path) -> Self:
        """Reads what `save` wrote, into an agent of the same expert and student: it acts as the saved one.

        Raises:
            ValueError: the student is absent, damaged, or another.
        """
        other = self.expert.load_student(Path(directory) / "student", **self.student_options)
        self.student.load_state_dict(other.state_dict())
        return self


class RolloutLog(BaseCallback):
    """Writes a line for each rollout and the gradient steps on it.

    `loss` is −r, the squared distance of the sampled actions from the expert's; `action_std` the σ that they were drawn with, at the end.
    """

    def __init__(self, agent: PPOAgent, files: RunFiles, clock: Stopwatch, bar: tqdm[Any]) -> None:
        super().__init__()
        self.agent, self.files, self.clock, self.bar = agent, files, clock, bar
        self.loss: float | None = None  # of the rollout that is being learned from

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.loss = -float(self.model.rollout_buffer.rewards.mean())

    def _on_rollout_start(self) -> None:  # stable-baselines3 calls nothing between an update and the next rollout
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
            **{name: x if math.isfinite(x := float(measured[f"train/{name}"])) else None for name in MEASURED},
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
