"""Reinforcement learning on the diffusion MDP: PPO (Schulman et al. 2017) by stable-baselines3, the outside reference.

The learners are told the expert's action a* at every state. PPO is told how far from it its own action was,

    r(x_t, a) = −‖a − a*(x_t)‖² / d ,      a ~ N(μ_θ(x_t, t, s, c), diag σ²) ,      max E Σ r

and has to find out by trying in which direction a* lies: what it takes more than imitation is the price of not asking.
A step costs the same k teacher forwards as a label. Whose μ_θ:

    plain      stable-baselines3's MultiInputPolicy on the observation as it is
    scaled     the same on (x_t, t/t_max with its sines, c), as the students' network has it
    student    the DDIM step of the expert's own make_student: from the same weights as the learners' students

    python -m ddil_agents.rl --env gaussian_mixture --timesteps 100000 --out runs/ppo

Needs `pip install 'ddil[sb3]'`. What is saved is safetensors, never stable-baselines3's pickle.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from gymnasium import spaces
from jsonargparse import Namespace
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from tqdm import tqdm

from ddil_agents.checkpoint import write_atomically
from ddil_agents.cli import check_evaluable, clear_errors, expert_and_config, finish, name_of_env, new_directory, parse
from ddil_agents.collect import stream_seed
from ddil_agents.evaluate import Evaluation
from ddil_agents.learner import Learner, LearnerConfig
from ddil_agents.report import read_result, table
from ddil_agents.train import flatten
from ddil_env import (
    DdimPolicy,
    DenoisingVectorEnv,
    Expert,
    ExpertPolicy,
    NetworkDenoiser,
    StudentPolicy,
    TimeGrid,
    invert_ddim,
    load_expert,
)
from ddil_env.check import check_expert
from ddil_env.presets import read_yaml
from ddil_env.sb3 import SB3VecEnv
from ddil_env.schedule import GridKind
from ddil_env.weights import load_weights

Actor = Literal["plain", "scaled", "student"]
MEASURED = ("approx_kl", "clip_fraction", "explained_variance", "value_loss")  # of stable-baselines3's own, in a line of metrics


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO on the diffusion MDP."""

    timesteps: int = 100_000
    """Environment steps, each of teacher_steps / num_steps teacher forwards (twice that under guidance)."""
    num_steps: int = 4
    """N, steps of an episode and of the sampler."""
    grid: GridKind = "linspace"
    """The N times: linspace (the paper's), dmd2, trailing or lcm."""
    teacher_steps: int = 32
    """Steps of the teacher's sampler whose actions are a*."""
    guidance_scale: float | None = None
    """The teacher's classifier-free guidance w (1 is none); null: the expert's own."""
    actor: Actor = "student"
    """plain, scaled or student."""
    hidden: tuple[int, ...] = (128, 128, 128)
    """Units of the critic's hidden layers, and of the actor's where that is not the student."""
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
    """Adam's; falls linearly to 0."""
    gamma: float = 1.0
    """Discount: 1 counts what an action does to later rewards, 0 the next reward alone."""
    gae_lambda: float = 0.95
    """Of the advantage's average over n-step estimates."""
    clip_range: float = 0.2
    """How far from 1 a ratio of probabilities still earns."""
    ent_coef: float = 0.0
    """Bonus on the entropy."""
    seed: int = 0
    """Of weights, episodes and exploration; the student's weights are those of a learner of this seed."""
    student: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the expert's make_student."""

    def __post_init__(self) -> None:
        for name in ("timesteps", "num_steps", "teacher_steps", "num_envs", "episodes", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        for name in ("learning_rate", "clip_range", "action_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need a positive, finite number")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: need a number in [0, 1]")
        for name in ("ent_coef", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need 0 or more")
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"log_std_init={self.log_std_init}: need a finite number; −2 is a spread of 0.14")
        if self.actor not in get_args(Actor):
            raise ValueError(f"unknown actor {self.actor!r}; choose one of: {', '.join(get_args(Actor))}")
        if self.student and self.actor != "student":
            raise ValueError(f"student={self.student}: actor={self.actor} has no student; leave it out, or choose actor=student")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden={self.hidden}: need at least one unit in every layer")
        if self.teacher_steps % self.num_steps:
            raise ValueError(
                f"teacher_steps={self.teacher_steps} is no multiple of num_steps={self.num_steps}; each student step takes as many"
            )
        if self.batch_size < 2 or self.rollout % self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: need a divisor, at least 2, of num_envs · episodes · num_steps = {self.rollout}, a rollout"
            )
        self.check_timesteps(self.timesteps)

    def check_timesteps(self, timesteps: int) -> None:
        """Refuses what is not so many whole rollouts.

        Raises:
            ValueError: it is not.
        """
        rollouts, rest = divmod(timesteps, self.rollout)
        if rest or not rollouts:
            near = " or ".join(str(n * self.rollout) for n in (rollouts, rollouts + 1) if n)
            raise ValueError(
                f"timesteps={timesteps}: PPO learns from whole rollouts of num_envs · episodes · num_steps = {self.rollout}; choose {near}"
            )

    @property
    def rollout(self) -> int:
        """Environment steps that PPO learns from at a time."""
        return self.num_envs * self.episodes * self.num_steps

    @property
    def substeps(self) -> int:
        """Expert steps in one step of the environment."""
        return self.teacher_steps // self.num_steps


# The policies, in stable-baselines3's terms


class StateFeatures(BaseFeaturesExtractor):
    """The state as the students' network has it: x_t, u = t/t_max, sin and cos of 2^i π u for i < 6, and c one-hot."""

    def __init__(self, observation_space: spaces.Dict, t_max: float, more: int = 0) -> None:
        self.size = math.prod(cast(tuple[int, ...], observation_space["x_t"].shape))
        self.num_ids = int(cast(spaces.Discrete, observation_space["c"]).n) if "c" in observation_space.spaces else 0
        super().__init__(observation_space, self.size + 13 + self.num_ids + more)
        self.t_max = t_max
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        u = observations["t"] / self.t_max  # (b, 1)
        parts = [observations["x_t"].flatten(1), u, (u * self.frequencies).sin(), (u * self.frequencies).cos()]
        return torch.cat(parts + ([observations["c"].flatten(1)] if self.num_ids else []), dim=1)  # c arrives one-hot


class StudentFeatures(StateFeatures):
    """A student's next latent (b, d), and behind it the state, for the critic."""

    def __init__(self, observation_space: spaces.Dict, student: NetworkDenoiser, t_max: float) -> None:
        super().__init__(observation_space, t_max, math.prod(cast(tuple[int, ...], observation_space["x_t"].shape)))
        self.student = student

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        x_t, t, s = observations["x_t"], observations["t"][:, 0], observations["s"][:, 0]
        c = observations["c"].flatten(1).argmax(1) if self.num_ids else None
        action = self.student.predict(x_t, t, c).latent(s)
        return torch.cat([action.flatten(1), super().forward(observations)], dim=1)


class ActionAndCritic(nn.Module):
    """Behind StudentFeatures: to the actor the first d entries, to the critic a network of the others."""

    def __init__(self, features: StudentFeatures, hidden: list[int], activation: type[nn.Module]) -> None:
        super().__init__()
        widths = [features.features_dim - features.size, *hidden]
        self.critic = nn.Sequential(*(m for n, k in zip(widths, hidden, strict=False) for m in (nn.Linear(n, k), activation())))
        self.latent_dim_pi, self.latent_dim_vf = features.size, widths[-1]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return features[:, : self.latent_dim_pi]

    def forward_critic(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.critic(features[:, self.latent_dim_pi :]))


class StudentActorCritic(MultiInputActorCriticPolicy):
    """A Gaussian around the student's DDIM step: μ_θ(x_t, t, s, c) = α_s x̂_θ + σ_s ε̂_θ."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActionAndCritic(self.features_extractor, self.net_arch, self.activation_fn)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the features are the mean already
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class ActorPolicy(DdimPolicy):
    """stable-baselines3's own networks as a policy of ours: the mean action, clipped to its box.

    As a denoiser it predicts what its action at the next time of the grid implies.
    """

    def __init__(self, actor: MultiInputActorCriticPolicy, expert: Expert, grid: TimeGrid) -> None:
        def predict(x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Any:
            s = grid.previous(t)
            return invert_ddim(expert.schedule, x_t, t, self.act(x_t, t, s, c, w), s)

        super().__init__(predict, expert.schedule, conditional=expert.num_conditions > 0, max_batch=expert.max_batch)
        self.actor = actor
        self.bound = float(actor.action_space.high.max())

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        observation = {"x_t": x_t, "t": t[:, None], "s": s[:, None]} | ({} if c is None else {"c": c})
        mean = self.actor.get_distribution(observation).mode()  # (b, d)
        return cast(Tensor, mean.clamp(-self.bound, self.bound).reshape(x_t.shape))


# The agent


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's and numpy's global generators, which stable-baselines3 draws from, begin at seed, and afterwards are what they were."""
    outside = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(outside)


class PPOAgent:
    """PPO on one expert, with what a learner has, so that it is judged and written down as one.

    Args:
        expert: The teacher, or the name of a preset.
        config: Settings.

    Raises:
        ValueError: what the expert, the environment or make_student refuse; an actor that the expert cannot save.
    """

    name = "ppo"
    kernel: Literal["ddim"] = "ddim"

    def __init__(self, expert: Expert | str, config: PPOConfig | None = None) -> None:
        self.expert = expert = load_expert(expert)
        self.config = config = config or PPOConfig()
        if config.actor != "student" and type(expert).save_student is not Expert.save_student:
            raise ValueError(f"actor={config.actor}: {type(expert).__name__} saves students in a format of its own; choose actor=student")
        self.grid = TimeGrid(expert.schedule, config.num_steps, config.grid).to(expert.device)
        self.reference = ExpertPolicy(expert, config.substeps, config.guidance_scale)
        self.env = SB3VecEnv(
            DenoisingVectorEnv(
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
        )
        self.env.seed(stream_seed(config.seed, "rollout") % 2**62)
        with seeded(stream_seed(config.seed, "weights")):
            policy, kwargs = self._policy()
            self.model = PPO(
                policy,
                self.env,
                learning_rate=lambda remaining: config.learning_rate * remaining,  # of the progress, 1 → 0
                n_steps=config.num_steps * config.episodes,
                batch_size=config.batch_size,
                n_epochs=config.epochs,
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
                clip_range=config.clip_range,
                ent_coef=config.ent_coef,
                policy_kwargs=kwargs | {"log_std_init": config.log_std_init},
                device=expert.device,
            )
        self.model.policy.set_training_mode(False)

    def _policy(self) -> tuple[type[MultiInputActorCriticPolicy], dict[str, Any]]:
        """The policy's class, and its keyword arguments."""
        hidden, t_max = list(self.config.hidden), float(self.expert.schedule.t_max)
        if self.config.actor == "student":
            try:
                student = self.expert.make_student(**self.config.student)
            except TypeError as error:
                raise ValueError(f"make_student refuses student={self.config.student}: {error}") from error
            features: dict[str, Any] = {"student": student, "t_max": t_max}
            kwargs = {"features_extractor_class": StudentFeatures, "features_extractor_kwargs": features, "activation_fn": nn.SiLU}
            return StudentActorCritic, kwargs | {"net_arch": hidden, "ortho_init": False}  # the student's weights stay as they are
        kwargs = {"net_arch": {"pi": hidden, "vf": hidden}}
        if self.config.actor == "scaled":  # SiLU of a time of 999 explodes, where the default, tanh, saturates
            kwargs |= {"features_extractor_class": StateFeatures, "features_extractor_kwargs": {"t_max": t_max}, "activation_fn": nn.SiLU}
        return MultiInputActorCriticPolicy, kwargs

    @property
    def average(self) -> nn.Module:
        """What acts, and is saved: the student, or stable-baselines3's actor and critic."""
        policy = self.model.policy
        return cast(nn.Module, policy.features_extractor.student if self.config.actor == "student" else policy)

    @property
    def student_policy(self) -> DdimPolicy:
        """The mean action; of a student unclipped."""
        if self.config.actor == "student":
            return StudentPolicy(cast(NetworkDenoiser, self.average), self.expert)
        return ActorPolicy(self.model.policy, self.expert, self.grid)

    @property
    def timesteps(self) -> int:
        """Environment steps so far."""
        return int(self.model.num_timesteps)

    @property
    def step(self) -> int:
        """Gradient steps so far."""
        return self.timesteps // self.config.batch_size * self.config.epochs

    @property
    def teacher_nfe(self) -> int:
        """Teacher forwards so far: a reward takes those of one action."""
        return self.timesteps * self.reference.nfe_per_action

    @property
    def student_nfe(self) -> int:
        """The actor's forwards so far: to act, in every epoch, and for the value of the state that a rollout ends at."""
        c = self.config
        return self.timesteps * (1 + c.epochs) + self.timesteps // c.rollout * c.num_envs

    def learn(self, timesteps: int | None = None, out: str | Path | None = None, progress: bool = True) -> Self:
        """Trains for so many more environment steps.

        Args:
            timesteps: Whole rollouts; default: the config's.
            out: A directory without metrics.jsonl, for that and tensorboard/.
            progress: Whether to show a bar.

        Raises:
            ValueError: not whole rollouts, or metrics of another run in `out`.
            FloatingPointError: the policy is not finite any more.
        """
        more = self.config.timesteps if timesteps is None else timesteps
        self.config.check_timesteps(more)
        stream = stream_seed(self.config.seed, f"ppo{self.timesteps}")
        with RunLog(self, None if out is None else Path(out), more, progress) as log, seeded(stream):
            try:
                self.model.learn(more, callback=log, log_interval=None, reset_num_timesteps=not self.timesteps)
            except ValueError:  # torch's distributions, where they check, refuse what is not finite
                self.check_finite()
                raise
        self.model.policy.set_training_mode(False)
        return self

    def check_finite(self) -> None:
        """Refuses to go on with weights that are not finite.

        Raises:
            FloatingPointError: names the environment step.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.policy.parameters()):
            raise FloatingPointError(f"the policy is not finite at environment step {self.timesteps}; lower learning_rate")

    def save(self, directory: str | Path) -> Path:
        """Writes what acts into `directory`/student, as a learner's run has it: the student, or actor and critic in student.safetensors."""
        student = Path(directory) / "student"
        student.mkdir(parents=True, exist_ok=True)
        self.expert.save_student(cast(NetworkDenoiser, self.average), student, self.config.num_steps, self.config.grid)
        return student

    def load(self, directory: str | Path) -> Self:
        """Reads what `save` wrote, into an agent of the same expert and config: it acts as the saved one.

        Raises:
            ValueError: the file is absent, damaged, or of another actor.
        """
        student = Path(directory) / "student"
        if self.config.actor == "student":
            self.average.load_state_dict(self.expert.load_student(student, **self.config.student).state_dict())
        else:
            load_weights(self.average, student / "student.safetensors")
        return self


class RunLog(BaseCallback):
    """A line of metrics.jsonl and of tensorboard/ for each rollout, and the bar.

    `loss` is −r, the squared distance of the sampled actions from the expert's; `action_std` the σ that they were drawn with, at the end.
    """

    def __init__(self, agent: PPOAgent, out: Path | None, timesteps: int, progress: bool) -> None:
        super().__init__()
        self.agent = agent
        self._start = time.monotonic()
        self._reward: float | None = None  # a step's, in the last rollout
        self._file: Any = None
        self._board: Any = None
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter

            if (path := out / "metrics.jsonl").exists():
                raise ValueError(f"{path} exists; choose another `out`")
            out.mkdir(parents=True, exist_ok=True)
            self._file, self._board = path.open("a"), SummaryWriter(str(out / "tensorboard"))
        self._bar = tqdm(total=timesteps, desc=agent.name, unit="step", disable=not progress)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _on_step(self) -> bool:
        self._bar.update(self.agent.config.num_envs)
        return True

    def _on_rollout_end(self) -> None:
        self._reward = float(self.model.rollout_buffer.rewards.mean())

    def _on_rollout_start(self) -> None:  # stable-baselines3 calls nothing between an update and the next rollout
        if self._reward is not None:
            self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        agent, measured = self.agent, self.model.logger.name_to_value
        agent.check_finite()
        assert self._reward is not None
        std = float(self.model.policy.log_std.detach().exp().mean())
        row = {
            "step": agent.step,
            "timesteps": agent.timesteps,
            "loss": -self._reward,
            "action_std": std,
            **{name: x if math.isfinite(x := float(measured[f"train/{name}"])) else None for name in MEASURED},
            "teacher_nfe": agent.teacher_nfe,
            "student_nfe": agent.student_nfe,
            "seconds": time.monotonic() - self._start,
        }
        self._bar.set_postfix_str(f"−r={-self._reward:.4f} σ={std:.3f}")
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for key, value in flatten(row).items():
                self._board.add_scalar(key, value, agent.step)


# The command

# What the commands' parser asks of an agent.
_COMMAND = cast(type[Learner], SimpleNamespace(name="rl", Config=PPOConfig, __module__=__name__))


def load_agent(directory: Path) -> PPOAgent:
    """The agent of a finished run, on whatever device is here.

    Raises:
        ValueError: no finished run of this command there, or a damaged one.
    """
    finished = all((directory / name).is_file() for name in ("config.yaml", "result.json"))
    if not finished or read_yaml(directory / "config.yaml").get("agent") != _COMMAND.name:
        raise ValueError(f"{directory} holds no finished run of ddil_agents.rl; learners' runs are read by ddil_agents.cli.load_run")
    parser, cfg = parse(_COMMAND, ["--config", str(directory / "config.yaml")])
    if "device" in vars(cfg.env):
        cfg.env.device = "cuda" if torch.cuda.is_available() else "cpu"
    expert, config = expert_and_config(_COMMAND, parser, cfg)
    return PPOAgent(expert, cast(PPOConfig, config)).load(directory)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    with clear_errors(argparse.ArgumentParser(prog="python -m ddil_agents.rl")):
        if any(word == "--resume" or word.startswith("--resume=") for word in argv):
            raise ValueError("--resume: PPO keeps no checkpoints; start a new run")
        parser, cfg = parse(_COMMAND, argv)
        for name in ("checkpoint_every", "log_every", "track"):  # of the learners' loop, which is not run
            if cfg[name] != parser.get_default(name):
                raise ValueError(
                    f"{name}={cfg[name]}: PPO keeps no checkpoints, and writes a line a rollout to metrics.jsonl; leave it out"
                )
        expert, config = cast(tuple[Expert, PPOConfig], expert_and_config(_COMMAND, parser, cfg))
        agent = PPOAgent(expert, config)
        check_expert(expert)
        evaluation = Evaluation(**vars(cfg.evaluate))
        check_evaluable(expert, [], evaluation)
        for more in evaluation.also_steps:
            TimeGrid(expert.schedule, more, config.grid)
        out = new_directory(cfg, _COMMAND)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.yaml", parser.dump(Namespace({**vars(cfg.clone()), "out": None, "config": None})))
        env = {"env": name_of_env(cfg), "env_config": {k: v for k, v in vars(cfg.env).items() if k != "device"}}
        agent.learn(out=out)
        finish(cast(Learner, agent), out, evaluation, env, cast(LearnerConfig, config), expert)
        result = read_result(out / "result.json") | {"timesteps": agent.timesteps}
        write_atomically(out / "result.json", json.dumps(result, indent=1))
        print(table(result))
        print(f"\n{out}: config.yaml, metrics.jsonl, result.json, student/{', samples.png' if (out / 'samples.png').is_file() else ''}")


if __name__ == "__main__":
    main()
