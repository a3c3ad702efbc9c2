"""Latent consistency distillation (Luo et al. 2023), on DDIL's mixture of states ("LCM + DDIL", DDIL §4.2).

The student is a consistency function: from every point of an ODE's trajectory it predicts the end of that trajectory.

    f(x, t) = c_skip(t) x + c_out(t) x̂_0(x, t) ,   f(x, 0) = x
    c_skip  = σ_d²/((10 t)² + σ_d²) ,  c_out = 10 t/√((10 t)² + σ_d²) ,  σ_d = 0.5
    L       = d(f_θ(x_t, t, c, w), f_θ⁻(x̂_s, s, c, w)) ,   d = √(e² + h²) − h         Alg. 1; θ⁻: the EMA

x̂_s is one guided DDIM step of the teacher on a grid of 50 solver times, s = max(t − 20, 0). It does not depend on the student, and so
the buffer keeps it. Forward states are at the solver's times; the student is unrolled in 3, 4 or 5 inference steps, each with fresh
noise; teacher trajectories, which need no data, are the solver's.

    python -m ddil_agents.lcm --env digits --beta.forward .5 --beta.student .5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ddil_agents.algorithm import Algorithm
from ddil_agents.commands.run import run
from ddil_agents.config import LearnerConfig
from ddil_agents.states.batch import Batch
from ddil_agents.states.collect import Collector
from ddil_env import ExpertPolicy, NetworkDenoiser, Prediction, StudentPolicy, TimeGrid
from ddil_env.broadcast import broadcast
from ddil_env.mdp import Kernel
from ddil_env.support import Thresholding
from ddil_env.time_grid import LCM_SOLVER_STEPS, GridKind, lcm_times

Distance = Literal["huber", "l2"]
SIGMA_DATA = 0.5
TIME_SCALE = 10.0


@dataclass(frozen=True)
class LCMConfig(LearnerConfig):
    """Settings of latent consistency distillation."""

    grid: GridKind = "lcm"
    """Times of the student's N steps: lcm, a subset of the solver's times that it is trained at; or linspace, dmd2, trailing."""
    thresholding: Thresholding = field(default_factory=lambda: Thresholding(roles=("teacher", "target")))
    """Reflected diffusion: which estimates are projected onto the data's support, and how. The paper's are teacher and target."""
    ema: float = 0.95
    """Decay of the exponential moving average of the student's weights, which gives the target, and which is evaluated and saved."""
    solver_steps: int = LCM_SOLVER_STEPS
    """Number of times of the teacher's solver; the loss compares the student at successive ones."""
    inference_steps: tuple[int, ...] = (3, 4, 5)
    """Numbers of steps of a student rollout, of which each collection draws one."""
    distance: Distance = "huber"
    """Distance of the loss for an error e: huber, √(e² + h²) − h; or l2, e²."""
    huber_h: float = 1e-3
    """h of the Huber distance, the error at which it turns from quadratic to linear."""

    teachers: ClassVar[tuple[str, ...]] = ("original", "same")  # its student predicts the end of the ODE, and so cannot teach single steps
    forwards_formula = "consistency"

    def __post_init__(self) -> None:
        if not self.inference_steps or not all(isinstance(n, int) and 1 <= n <= self.solver_steps for n in self.inference_steps):
            raise ValueError(f"inference_steps={self.inference_steps}: need whole numbers from 1 to solver_steps={self.solver_steps}")
        if self.p_expert:
            raise ValueError(f"p_expert={self.p_expert}: the expert takes no consistency steps, so LCM has no mixed rollouts; use 0")
        super().__post_init__()
        if self.grid == "lcm" and self.solver_steps != LCM_SOLVER_STEPS:
            raise ValueError(
                f"solver_steps={self.solver_steps}: the grid lcm picks from {LCM_SOLVER_STEPS} times; use as many, or set grid to another"
            )
        if self.distance not in get_args(Distance):
            raise ValueError(f"unknown distance {self.distance!r}; choose one of: {', '.join(get_args(Distance))}")
        if not self.huber_h > 0:
            raise ValueError(f"huber_h={self.huber_h}: need a positive number")

    @property
    def rollout_lengths(self) -> tuple[int, int]:
        return self.solver_steps, max(self.inference_steps)


class ConsistencyDenoiser(NetworkDenoiser):
    """A denoiser as a consistency function: the x̂_0 of its prediction is f(x_t, t), and the ε̂ is the one that x_t and f imply."""

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        pred = super().forward(x_t, t, c, w)
        scaled = TIME_SCALE * t.double()
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        f = broadcast(c_skip.to(pred.x_0.dtype), x_t) * x_t + broadcast(c_out.to(pred.x_0.dtype), x_t) * pred.x_0
        alpha, sigma = self.schedule(t, f)
        return Prediction(f, pred.eps + alpha / sigma * (pred.x_0 - f), t, self.schedule)


class LCMCollector(Collector):
    """Collects teacher rollouts on all of the solver's times and student rollouts on a few of them.

    Args:
        inference_steps: Numbers of steps of a student rollout, of which each collection draws one.
    """

    def __init__(self, *args: Any, inference_steps: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inference_steps = inference_steps
        self.num_steps = inference_steps[0]

    def counts(self, n: int, beta: tuple[float, float, float]) -> list[int]:
        if beta[2] > 0:
            drawn = torch.randint(len(self.inference_steps), (1,), generator=self.streams["rollout"], device=self.expert.device)
            self.num_steps = self.inference_steps[int(drawn)]  # waits for the device, once per collection
        return super().counts(n, beta)

    def rollout_times(self, p_expert: float) -> Tensor:
        return self.grid.times if p_expert >= 1 else lcm_times(self.grid, self.num_steps)


class LCM(Algorithm):
    """Consistency distillation on the β-mixture of states; β = (1, 0, 0) is LCM."""

    name = "lcm"
    Config: ClassVar[type[LearnerConfig]] = LCMConfig
    config: LCMConfig
    kernel: ClassVar[Kernel] = "renoise"
    ema_warm_up: ClassVar[bool] = False  # the decay is part of the method, because the average gives the target

    def loss(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.trainer.accelerator.autocast():  # the trainer sets autocast around the student only
            target = self.ema_student(batch.expert_action, batch.s, batch.c, batch.w)  # f_θ⁻(x̂_s, s, c, w)
            target_x_0 = self.thresholds["target"].project(target.x_0)
        self.networks["student"].nfe += len(batch)  # forwards of the average count as the student's
        pred = self.student(batch.x_t, batch.t, batch.c, batch.w)  # f_θ(x_t, t, c, w)
        x_0 = pred.projected(self.thresholds["student"], straight_through=True).x_0
        return self.distance(x_0 - target_x_0).flatten(1).mean(1)  # d(f_θ, f_θ⁻), (b,)

    def distance(self, error: Tensor) -> Tensor:
        """d of each entry of the error."""
        h = self.config.huber_h
        squared = error.square()  # √(e² + h²) − h = e²/(√(e² + h²) + h), which does not cancel as e → 0
        return squared / ((squared + h**2).sqrt() + h) if self.config.distance == "huber" else squared

    def make_student(self, **options: Any) -> NetworkDenoiser:
        student = super().make_student(**options)
        return ConsistencyDenoiser(student.network, student.schedule, student.prediction_type, student.guidance_embedding)

    def make_expert_policy(self) -> ExpertPolicy:
        """Makes the solver: one DDIM step per action. Its last step ends at noise level ᾱ_0, as in LCM's code; f is the identity there."""
        return ExpertPolicy(
            self.expert,
            1,
            self.config.guidance_scale,
            support=self.thresholds["teacher"],
            schedule=self.expert.schedule.ending_at_alpha_0(),
        )

    def make_collector(self, student_policy: StudentPolicy, *args: Any, **settings: Any) -> Collector:
        solver = TimeGrid(self.expert.schedule, self.config.solver_steps, "trailing").to(self.expert.device)
        return super().make_collector(student_policy, LCMCollector, solver, inference_steps=self.config.inference_steps)


def main(argv: list[str] | None = None) -> None:
    run(LCM, argv)


if __name__ == "__main__":
    main()
