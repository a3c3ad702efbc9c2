"""Distribution matching distillation (Yin et al. 2024, "DMD2"), on DDIL's mixture of states ("DMD2 + DDIL", DDIL §4.2).

The student's sample x = x̂_0(x_{t_j}, t_j, c) is diffused to τ, where the teacher's estimate of it is compared with a critic's:

    x_τ  = α_τ x + σ_τ ε ,   τ ~ U{20, …, 980}
    g    = (x̂_fake(x_τ) − x̂_real(x_τ)) / mean |x − x̂_real|       Yin et al. 2023; x̂_real is guided
    L    = ½ ‖x − sg(x − g)‖²                                     whose gradient in x is g
    L_φ  = ‖ε̂_φ(x_τ, τ, c) − ε‖² ,   τ ~ U{1, …, 999}             the critic, on the student's samples (or in the expert's own v, u)

and with the GAN loss, where every D(·) draws its own time from {0, …, 999} and its own noise,

    L   += gan_weight · softplus(−D(x))
    L_φ += discriminator_weight · (softplus(D(x)) + softplus(−D(y))) ,   y the data

Times and rates are those of the published code (tianweiy/DMD2), except that its critic's τ starts from 0, where its schedule has noise
and this one has none. The critic takes a step in every update, the student in every `critic_updates`-th (two time scales), both on the
same samples. The inputs x_{t_j} are reached by the student's steps, by the teacher's, or by diffusing data (states/simulation.py); the
gradient flows through the last step only.

    python -m ddil_agents.dmd2 --env digits --beta.teacher .5 --beta.student .5
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_agents.algorithm import Algorithm
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig, RateSchedule
from ddil_agents.devices import sharding
from ddil_agents.states.batch import Batch
from ddil_agents.states.beta import Beta
from ddil_agents.states.collect import Collector, stream_seed
from ddil_agents.states.simulation import BackwardSimulation
from ddil_agents.training.critic import Critic
from ddil_agents.training.trainer import GradientStep
from ddil_env import NetworkDenoiser, NoDataError, Prediction, StudentPolicy
from ddil_env.broadcast import broadcast
from ddil_env.mdp import Kernel
from ddil_env.support import Role, Thresholding
from ddil_env.time_grid import GridKind


@dataclass(frozen=True)
class DMD2Config(LearnerConfig):
    """Settings of distribution matching distillation."""

    grid: GridKind = "dmd2"
    """Times of the student's N steps: dmd2 (for N = 4: 999, 749, 499, 249), linspace, trailing or lcm."""
    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, student=1.0))
    """Probabilities of the sources; (0, 0, 1) is DMD2's backward simulation, (1, 0, 0) its training on diffused data."""
    thresholding: Thresholding = field(default_factory=lambda: Thresholding(roles=("teacher", "student", "critic")))
    """Reflected diffusion: which estimates are projected onto the data's support, and how. Choose all three roles or
    none: if only the teacher is projected, its estimates differ from the critic's at the edge of the support even where the two match."""
    noise_level: float | None = None
    """Time t_j (not a σ) that every collection unrolls to, such as 500; the nearest of the grid is used. null: a random one of the grid."""
    on_policy: bool = True
    """Collect fresh states for every update; false: replay states from the buffer, as collect_size and updates_per_collect say."""
    episodes_every: int = 16
    """Updates between two runs of whole episodes in a world, whose conditions the states of the updates in between have."""
    critic_updates: int = 5
    """R: the critic takes a gradient step in every update, the student in every R-th."""
    critic_learning_rate: float = 3e-4
    """Learning rate of AdamW for the critic."""
    gan_weight: float = 0.0
    """Weight of the adversarial loss in the student's step; 0 builds no discriminator. A discriminator needs data, a second forward of the
    critic in the student's step, and three times the batch in the critic's step."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss in the critic's step."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW for the student, after the warm-up."""
    lr_scheduler: RateSchedule = "constant"
    """Learning rates after the warm-up: constant, as in the published code, or linear, which falls to 0 at the end of training."""

    teachers: ClassVar[tuple[str, ...]] = ("original", "same")  # a few-step student gives no score to match
    forwards_formula = "distribution_matching"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("critic_updates", 1), ("episodes_every", 1), ("gan_weight", 0), ("discriminator_weight", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need at least {low}")
        if not 0 < self.critic_learning_rate < math.inf:
            raise ValueError(f"critic_learning_rate={self.critic_learning_rate}: need a positive, finite number")
        if self.noise_level is not None and not 0 <= self.noise_level < math.inf:
            raise ValueError(f"noise_level={self.noise_level}: need a time of the teacher's chain, such as 500")
        if self.guidance_range is not None:
            raise ValueError(f"guidance_range={self.guidance_range}: DMD2 matches one distribution; leave it null, and set guidance_scale")
        if self.states_per_rollout != 1:
            raise ValueError(f"states_per_rollout={self.states_per_rollout}: DMD2's backward simulation ends in one state; leave it at 1")
        if self.prioritised:
            raise ValueError("prioritised=true: DMD2's loss measures the size of a step and not the error at a state; leave it false")

    @property
    def collect_schedule(self) -> tuple[int, int]:
        return (self.batch_size, 1) if self.on_policy else super().collect_schedule

    def for_evaluation(self) -> Self:
        return replace(super().for_evaluation(), gan_weight=0.0)  # a discriminator needs data


class DMD2(Algorithm):
    """DMD2 on the β-mixture of states.

    Raises:
        ValueError: gan_weight is not 0, and the expert has no data or names no layer for the discriminator.
    """

    name = "dmd2"
    adapts_beta = False
    Config: ClassVar[type[LearnerConfig]] = DMD2Config
    config: DMD2Config
    kernel: ClassVar[Kernel] = "renoise"
    roles: ClassVar[tuple[Role, ...]] = ("teacher", "student", "critic")

    def make_networks(self) -> dict[str, nn.Module]:
        denoiser = self.seeded_student()  # starts from the expert's weights even if `init` gives the student others
        critic = Critic(denoiser)
        if self.config.gan_weight:
            try:
                self.expert.sample_data(1, torch.Generator(self.expert.device))
            except NoDataError as error:
                raise NoDataError(
                    f"gan_weight={self.config.gan_weight}: a discriminator needs data ({error}); set gan_weight to 0"
                ) from error
            with torch.random.fork_rng():  # leaves torch's global generator as it is
                torch.manual_seed(stream_seed(self.config.seed, "head"))
                critic.add_head(self.expert, self.grid.times[:1])
        denoiser.nfe = 0  # add_head may have called it
        return {"critic": critic}

    def gradient_steps(self) -> tuple[GradientStep, ...]:
        c = self.config
        return (
            GradientStep("student", self.loss, c.learning_rate, every=c.critic_updates, frozen=("critic",)),
            GradientStep("critic", self.critic_loss, c.critic_learning_rate),
        )

    def generate(self, batch: Batch) -> Tensor:
        """x: the student's sample from each state, (b, *sample_shape)."""
        pred = self.student(batch.x_t, batch.t, batch.c)
        return pred.projected(self.thresholds["student"], straight_through=True).x_0

    def loss(self, batch: Batch) -> Tensor:
        c, schedule, critic = batch.c, self.expert.schedule, self.wrapped_network("critic")
        x = batch.generated = self.generate(batch)
        with torch.no_grad():
            tau, eps = self.draw_noise(x, max(1, int(0.02 * schedule.num_train_steps)), int(0.98 * schedule.num_train_steps))
            x_tau = schedule.add_noise(x, eps, tau)
            x_fake = critic(x_tau, tau, c)[0].projected(self.thresholds["critic"]).x_0
            x_real = self.expert.guided(x_tau, tau, c, self.teacher_policy.guidance_scale).projected(self.thresholds["teacher"]).x_0
            scale = (x - x_real).abs().flatten(1).mean(1) + 1e-6  # mean |x − x̂_real|, (b,)
            g = (x_fake - x_real) / broadcast(scale, x)
        matching = 0.5 * (x - (x - g).detach()).square().flatten(1).mean(1)  # ½ ‖x − sg(x − g)‖², (b,)
        if not self.config.gan_weight:
            return matching
        tau, eps = self.draw_noise(x, 0, schedule.t_max)
        _, realness = critic(schedule.add_noise(x, eps, tau), tau, c)
        return matching + self.config.gan_weight * softplus(-realness)

    def critic_loss(self, batch: Batch) -> Tensor:
        """L_φ: ‖ε̂_φ − ε‖² of each sample, in the critic's prediction type, and the discriminator's loss, (b,)."""
        if (x := batch.generated) is None:  # the student takes no step in this update
            with torch.no_grad():
                x = batch.generated = self.generate(batch)
        c, schedule, critic = batch.c, self.expert.schedule, self.wrapped_network("critic")
        tau, eps = self.draw_noise(x, 1, schedule.t_max)
        x_tau = schedule.add_noise(x, eps, tau)
        if not self.config.gan_weight:
            fake, _ = critic(x_tau, tau, c)
            return self._denoising_error(fake, x, eps)
        y, c_y = self.draw_data(x)
        (tau_x, eps_x), (tau_y, eps_y) = (self.draw_noise(clean, 0, schedule.t_max) for clean in (x, y))
        inputs = torch.cat([x_tau, schedule.add_noise(x, eps_x, tau_x), schedule.add_noise(y, eps_y, tau_y)])  # (3b, *sample_shape)
        conditions = None if c is None or c_y is None else torch.cat([c, c, c_y])
        pred, realness = critic(inputs, torch.cat([tau, tau_x, tau_y]), conditions)  # one forward for all
        _, realness_x, realness_y = realness.chunk(3)
        fake = Prediction(pred.x_0[: len(x)], pred.eps[: len(x)], tau, schedule)
        return self._denoising_error(fake, x, eps) + self.config.discriminator_weight * (softplus(realness_x) + softplus(-realness_y))

    def _denoising_error(self, pred: Prediction, x: Tensor, eps: Tensor) -> Tensor:
        """Squared error of the critic's output per entry, (b,), where x and eps are the truth."""
        kind = self.networks["critic"].denoiser.prediction_type
        truth = Prediction(x, eps, pred.t, self.expert.schedule)
        return (pred.output(kind) - truth.output(kind)).square().flatten(1).mean(1)

    def draw_data(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draws y: as many of the expert's data as x has samples, and their conditions."""
        return self.expert.sample_data(len(x), self.collector.streams["real"])

    def draw_noise(self, x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Draws τ ~ U{low, …, high}, or U[low, high) for a continuous schedule, (b,), and ε in the shape of x."""
        stream = self.collector.streams["loss"]
        if self.expert.schedule.discrete:
            tau = torch.randint(low, high + 1, (len(x),), generator=stream, device=x.device).float()
        else:
            tau = low + (high - low) * torch.rand(len(x), generator=stream, device=x.device)
        return tau, torch.randn(x.shape, generator=stream, device=x.device)

    def start_from(self, student: NetworkDenoiser) -> None:
        super().start_from(student)
        denoiser = self.networks["critic"].denoiser
        denoiser.load_state_dict(sharding.shard_state(student.state_dict(), denoiser.state_dict()))

    def collect(self) -> TensorDict:
        on_policy = self.config.on_policy
        self.fresh_states = self.collector.collect(self.collect_size, self.beta(), self.step) if on_policy else super().collect()
        return self.fresh_states

    def draw(self) -> TensorDict:
        return self.fresh_states if self.config.on_policy else super().draw()

    @property
    def student_nfe(self) -> int:
        return super().student_nfe + int(self.networks["critic"].denoiser.nfe)

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **settings: Any) -> Collector:
        return super().make_collector(
            student_policy, BackwardSimulation, noise_level=self.config.noise_level, episodes_every=self.config.episodes_every
        )


def main(argv: list[str] | None = None) -> None:
    run(DMD2, argv)


if __name__ == "__main__":
    main()
