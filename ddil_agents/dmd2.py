"""Distribution matching distillation (Yin et al. 2024, "DMD2"), on DDIL's mixture of states ("DMD2 + DDIL", DDIL §4.2).

The student's sample x = x̂_0(x_{t_j}, t_j, c) is diffused to τ, and the teacher's and a critic's estimates of it are compared:

    x_τ  = α_τ x + σ_τ ε ,   τ ~ U{20, …, 980}
    g    = (x̂_fake(x_τ) − x̂_real(x_τ)) / mean |x − x̂_real|       Yin et al. 2023; x̂_real is guided
    L    = ½ ‖x − sg(x − g)‖²                                     whose gradient in x is g
    L_φ  = ‖ε̂_φ(x_τ, τ, c) − ε‖² ,   τ ~ U{1, …, 999}             the critic, on the student's samples (or in the expert's own v, u)

and with the GAN loss, where each D(·) has a time of its own, from {0, …, 999}, and noise of its own,

    L   += gan_weight · softplus(−D(x))
    L_φ += discriminator_weight · (softplus(D(x)) + softplus(−D(y))) ,   y the data

Times and rates are the published code's (tianweiy/DMD2), but that its critic's τ starts from 0, where its schedule has noise and ours none.
The critic takes a step in every update, the student in each `critic_updates`-th (two time scales), both on the same samples.
The inputs x_{t_j} come from the student's own steps, the teacher's or data (simulation.py); gradient flows through the last step alone.

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
    """The N times: dmd2, 999, 749, 499, 249; or linspace, trailing, lcm."""
    beta: Beta = field(default_factory=lambda: Beta(forward=0.0, student=1.0))
    """Source priors; (0, 0, 1) is DMD2's backward simulation, (1, 0, 0) its training on diffused data."""
    thresholding: Thresholding = field(default_factory=lambda: Thresholding(roles=("teacher", "student", "critic")))
    """Reflected diffusion: which estimates are projected onto the data's support, and how. All three or none: a teacher that is
    projected and a critic that is not differ at the support's edge even where they match."""
    noise_level: float | None = None
    """Unroll to the grid's time nearest to this one, in every collection; null: to a random one."""
    on_policy: bool = True
    """Each update trains on its own rollouts; collect_size and updates_per_collect then say nothing. false: states are replayed."""
    critic_updates: int = 5
    """R: the student takes a step in each R-th update, the critic in all."""
    critic_learning_rate: float = 3e-4
    """AdamW's, of the critic."""
    gan_weight: float = 0.0
    """Of the adversarial loss in the student's step; 0 builds no discriminator. Needs data, and more of the critic: in the
    student's step a second forward, the one that gradient flows through, and in its own step three times the batch."""
    discriminator_weight: float = 1e-2
    """Of the discriminator's loss in the critic's step."""
    learning_rate: float = 1e-4
    """AdamW's, of the student."""
    lr_scheduler: RateSchedule = "constant"
    """What the rates do after warm-up: constant, as in the published code; linear, fall to 0 at the end."""

    teachers: ClassVar[tuple[str, ...]] = ("original", "same")  # a few-step student is no score to match

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("critic_updates", 1), ("gan_weight", 0), ("discriminator_weight", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: need at least {low}")
        if not 0 < self.critic_learning_rate < math.inf:
            raise ValueError(f"critic_learning_rate={self.critic_learning_rate}: need a positive, finite number")
        if self.noise_level is not None and not 0 <= self.noise_level < math.inf:
            raise ValueError(f"noise_level={self.noise_level}: need a time of the teacher's chain, such as 500")
        if self.guidance_range is not None:
            raise ValueError(f"guidance_range={self.guidance_range}: DMD2 matches one distribution; set guidance_scale, the real score's")
        if self.states_per_rollout != 1:
            raise ValueError(f"states_per_rollout={self.states_per_rollout}: DMD2's backward simulation ends in one state; leave it at 1")
        if self.prioritised:
            raise ValueError("prioritised=true: DMD2's loss says how large a step is, not how wrong a state; leave it false")

    def for_evaluation(self) -> Self:
        return replace(super().for_evaluation(), gan_weight=0.0)  # a discriminator needs data


class DMD2(Algorithm):
    """DMD2 on the β-mixture of states.

    Raises:
        ValueError: the GAN loss is asked for and the expert has no data, or names no layer for it.
    """

    name = "dmd2"
    Config: ClassVar[type[LearnerConfig]] = DMD2Config
    config: DMD2Config
    kernel: ClassVar[Kernel] = "renoise"
    roles: ClassVar[tuple[Role, ...]] = ("teacher", "student", "critic")

    def make_networks(self) -> dict[str, nn.Module]:
        twin = self.seeded_student()  # of the expert's weights, whatever the student starts from
        critic = Critic(twin)
        if self.config.gan_weight:
            try:
                self.expert.sample_data(1, torch.Generator(self.expert.device))
            except NoDataError as error:
                raise NoDataError(
                    f"gan_weight={self.config.gan_weight}: a discriminator needs data ({error}); set gan_weight to 0"
                ) from error
            with torch.random.fork_rng():  # seeded, and the caller's generator left alone
                torch.manual_seed(stream_seed(self.config.seed, "head"))
                critic.add_head(self.expert, self.grid.times[:1])
        twin.nfe = 0
        return {"critic": critic}

    def gradient_steps(self) -> tuple[GradientStep, ...]:
        c = self.config
        return (
            GradientStep("student", self.loss, c.learning_rate, every=c.critic_updates, frozen=("critic",)),
            GradientStep("critic", self.critic_loss, c.critic_learning_rate),
        )

    def generate(self, batch: Batch) -> Tensor:
        """x, the student's sample from each state, (b, *sample_shape)."""
        pred = self.student(batch.x_t, batch.t, batch.c)
        return pred.projected(self.thresholds["student"], straight_through=True).x_0

    def loss(self, batch: Batch) -> Tensor:
        c, schedule, critic = batch.c, self.expert.schedule, self.wrapped("critic")
        x = batch.generated = self.generate(batch)
        with torch.no_grad():
            tau, eps = self.diffusion(x, max(1, int(0.02 * schedule.num_train_steps)), int(0.98 * schedule.num_train_steps))
            x_tau = schedule.add_noise(x, eps, tau)
            x_fake = critic(x_tau, tau, c)[0].projected(self.thresholds["critic"]).x_0
            x_real = self.expert.guided(x_tau, tau, c, self.teacher_policy.guidance_scale).projected(self.thresholds["teacher"]).x_0
            scale = (x - x_real).abs().flatten(1).mean(1) + 1e-6  # mean |x − x̂_real|, (b,)
            g = (x_fake - x_real) / broadcast(scale, x)
        matching = 0.5 * (x - (x - g).detach()).square().flatten(1).mean(1)  # ½ ‖x − sg(x − g)‖², (b,)
        if not self.config.gan_weight:
            return matching
        tau, eps = self.diffusion(x, 0, schedule.t_max)
        _, realness = critic(schedule.add_noise(x, eps, tau), tau, c)
        return matching + self.config.gan_weight * softplus(-realness)

    def critic_loss(self, batch: Batch) -> Tensor:
        """‖ε̂_φ − ε‖² of each sample, in the critic's own prediction type, and the discriminator's loss, (b,)."""
        if (x := batch.generated) is None:  # an update without a step of the student's
            with torch.no_grad():
                x = batch.generated = self.generate(batch)
        c, schedule, critic = batch.c, self.expert.schedule, self.wrapped("critic")
        tau, eps = self.diffusion(x, 1, schedule.t_max)
        x_tau = schedule.add_noise(x, eps, tau)
        if not self.config.gan_weight:
            fake, _ = critic(x_tau, tau, c)
            return self._denoising_error(fake, x, eps)
        y, c_y = self.data(x)
        (tau_x, eps_x), (tau_y, eps_y) = (self.diffusion(each, 0, schedule.t_max) for each in (x, y))
        inputs = torch.cat([x_tau, schedule.add_noise(x, eps_x, tau_x), schedule.add_noise(y, eps_y, tau_y)])  # (3b, *sample_shape)
        conditions = None if c is None or c_y is None else torch.cat([c, c, c_y])
        pred, realness = critic(inputs, torch.cat([tau, tau_x, tau_y]), conditions)  # one forward for all
        _, of_fake, of_real = realness.chunk(3)
        fake = Prediction(pred.x_0[: len(x)], pred.eps[: len(x)], tau, schedule)
        return self._denoising_error(fake, x, eps) + self.config.discriminator_weight * (softplus(of_fake) + softplus(-of_real))

    def _denoising_error(self, pred: Prediction, x: Tensor, eps: Tensor) -> Tensor:
        kind = self.networks["critic"].denoiser.prediction_type
        truth = Prediction(x, eps, pred.t, self.expert.schedule)
        return (pred.output(kind) - truth.output(kind)).square().flatten(1).mean(1)

    def data(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the expert's data as many as x has, and their conditions."""
        return self.expert.sample_data(len(x), self.collector.streams["real"])

    def diffusion(self, x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """τ ~ U{low, …, high} (b,), of a continuous schedule U[low, high), and ε of x's shape."""
        stream = self.collector.streams["loss"]
        if self.expert.schedule.discrete:
            tau = torch.randint(low, high + 1, (len(x),), generator=stream, device=x.device).float()
        else:
            tau = low + (high - low) * torch.rand(len(x), generator=stream, device=x.device)
        return tau, torch.randn(x.shape, generator=stream, device=x.device)

    def start_from(self, student: NetworkDenoiser) -> None:
        super().start_from(student)
        denoiser = self.networks["critic"].denoiser
        denoiser.load_state_dict(sharding.like(student.state_dict(), denoiser.state_dict()))

    def collect_schedule(self) -> tuple[int, int]:
        return (self.config.batch_size, 1) if self.config.on_policy else super().collect_schedule()

    def collect(self) -> TensorDict:
        on_policy = self.config.on_policy
        self.fresh = self.collector.collect(self.collect_size, self.beta(), self.step) if on_policy else super().collect()
        return self.fresh

    def draw(self) -> TensorDict:
        return self.fresh if self.config.on_policy else super().draw()

    @property
    def student_nfe(self) -> int:
        return super().student_nfe + int(self.networks["critic"].denoiser.nfe)

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **own: Any) -> Collector:
        return super().make_collector(student_policy, BackwardSimulation, noise_level=self.config.noise_level)


def main(argv: list[str] | None = None) -> None:
    run(DMD2, argv)


if __name__ == "__main__":
    main()
