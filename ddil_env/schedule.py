"""The noise schedule: how much data and how much noise a latent holds at time t.

    x_t = α_t x_0 + σ_t ε ,   ε ~ N(0, I)

Convention of t, for the whole library: t falls from `schedule.t_max` (pure noise) to 0 (clean data,
(α, σ) = (1, 0) exactly). For the variance-preserving kinds t is the whole number that the network
was trained on, 1 … 999; for flow matching it is any real in (0, 1000]. Times are float32 tensors of
shape (b,): float32 holds every whole number up to 2²⁴.

Coefficients are computed in float64 and leave already broadcast to the latent, in float32 or wider:
σ → 0 and the differences of the inversion below cancel digits that float32 does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddil_env.support import Support

Kind = Literal["scaled_linear", "linear", "cosine", "flow"]
PredictionType = Literal["eps", "v", "x_0", "flow"]
GridKind = Literal["linspace", "dmd2", "trailing", "lcm"]

LCM_SOLVER_STEPS = 50  # latent consistency models step over 50 teacher times, 999, 979, …, 19, and sample on some of them


def _one_of(name: str, value: str, literal: object) -> None:
    if value not in get_args(literal):
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(get_args(literal))}")


def broadcast(per_sample: Tensor, like: Tensor) -> Tensor:
    """(b,) → (b, 1, …, 1), ready to multiply `like` (b, *sample_shape)."""
    return per_sample.reshape(-1, *(1,) * (like.ndim - 1))


class NoiseSchedule:
    """α_t and σ_t of one family of diffusion models.

    Args:
        kind: `scaled_linear` (Stable Diffusion), `linear` (DDPM) and `cosine` (Nichol & Dhariwal 2021, β capped at .999)
            are variance preserving, α² + σ² = 1; `flow` is rectified flow, α = 1 − σ, σ = t / 1000 unless shifted.
        beta_start, beta_end: Ends of the β ramp of `scaled_linear` and `linear`; the defaults are Stable Diffusion's.
        num_train_steps: Length T of the chain that the network was trained on.
        set_alpha_to_one: At t = 0: True, (α, σ) = (1, 0), the data; False, the table's first level √ᾱ_0, which
            is where the latent-consistency solver ends (the same switch as in diffusers' DDIMScheduler).
        shift: s of `flow`: σ = s u/(1 + (s − 1) u) at u = t / 1000, so that even times crowd toward noise (Esser et al. 2024).

    Raises:
        ValueError: an unknown kind, a β outside (0, 1), or a shift that is not positive or not of `flow`.
    """

    def __init__(
        self,
        kind: Kind = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_steps: int = 1000,
        set_alpha_to_one: bool = True,
        shift: float = 1.0,
    ) -> None:
        _one_of("schedule kind", kind, Kind)
        if not 0 < shift < math.inf or (shift != 1 and kind != "flow"):
            raise ValueError(f"shift={shift} with the {kind!r} schedule: need a positive, finite number, and 1 unless it is 'flow'")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: need 0 < beta_start ≤ beta_end < 1")
        if num_train_steps < 2:
            raise ValueError(f"num_train_steps={num_train_steps}: a chain needs at least 2 steps")
        self.kind = kind
        self._built = {"kind": kind, "beta_start": beta_start, "beta_end": beta_end, "num_train_steps": num_train_steps}
        self.num_train_steps = num_train_steps
        self.t_max = num_train_steps if kind == "flow" else num_train_steps - 1
        self.discrete = kind != "flow"
        self.shift = shift
        if self.discrete:
            alpha, sigma = self._table(beta_start, beta_end, set_alpha_to_one)
            self._tables = {(torch.device("cpu"), torch.float64): (alpha, sigma)}

    def ending_at_alpha_0(self) -> NoiseSchedule:
        """The same schedule with `set_alpha_to_one=False`; a flow schedule has no such level and stays."""
        return NoiseSchedule(**self._built, set_alpha_to_one=False) if self.discrete else self  # type: ignore[arg-type]

    def _table(self, beta_start: float, beta_end: float, set_alpha_to_one: bool) -> Tensor:
        """Rows α, σ over t = 0 … T−1, float64, shape (2, T)."""
        n = self.num_train_steps
        if self.kind == "scaled_linear":
            beta = torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2
        elif self.kind == "linear":
            beta = torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
        else:  # ᾱ(u) = cos²((u + .008)/1.008 · π/2), Nichol & Dhariwal 2021, Eq. 17
            u = torch.arange(n + 1, dtype=torch.float64) / n
            alpha_bar = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
            beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        log_alpha_bar = torch.log1p(-beta).cumsum(0)
        table = torch.stack([(log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()])
        if set_alpha_to_one:
            table[:, 0] = torch.tensor([1.0, 0.0])
        return table

    def coefficients(self, t: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """α_t and σ_t, computed in float64 and rounded to dtype, each of the shape of t."""
        if not self.discrete:
            u = t.double() / self.num_train_steps
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            return (1 - sigma).to(dtype), sigma.to(dtype)
        key = t.device, dtype
        if key not in self._tables:
            alpha, sigma = self._tables[torch.device("cpu"), torch.float64]
            self._tables[key] = alpha.to(*key), sigma.to(*key)
        alpha, sigma = self._tables[key]
        index = t.long()
        return alpha[index], sigma[index]

    def __call__(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t as (b, 1, …, 1), in the precision of `like` or float32, whichever is wider."""
        alpha, sigma = self.coefficients(t, torch.promote_types(like.dtype, torch.float32))
        return broadcast(alpha, like), broadcast(sigma, like)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Forward diffusion, x_t = α_t x_0 + σ_t ε (Ho et al. 2020, Eq. 4); x_0 and eps (b, *sample_shape), t (b,)."""
        alpha_t, sigma_t = self(t, x_0)
        return alpha_t * x_0 + sigma_t * eps

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Prediction:
        """Reads a network's output (b, *sample_shape) as x̂_0 and ε̂.

        eps:  x_0 = (x_t − σ ε)/α
        v:    x_0 = α x_t − σ v,    ε = α v + σ x_t      Salimans & Ho 2021, App. D; needs α² + σ² = 1
        x_0:  ε = (x_t − α x_0)/σ
        flow: x_0 = x_t − σ u,      ε = x_t + α u         u = ε − x_0; needs α + σ = 1
        """
        if output.shape != x_t.shape:
            raise ValueError(f"the network's output has shape {tuple(output.shape)}; need x_t's, {tuple(x_t.shape)}")
        alpha, sigma = self(t, x_t)
        if kind == "eps":
            return Prediction((x_t - sigma * output) / alpha, output.to(alpha.dtype), t, self)
        if kind == "v":
            return Prediction(alpha * x_t - sigma * output, alpha * output + sigma * x_t, t, self)
        if kind == "x_0":
            return Prediction(output.to(alpha.dtype), (x_t - alpha * output) / sigma, t, self)
        if kind == "flow":
            return Prediction(x_t - sigma * output, x_t + alpha * output, t, self)
        raise ValueError(f"unknown prediction type {kind!r}; choose one of: {', '.join(get_args(PredictionType))}")

    def check_prediction_type(self, kind: PredictionType) -> None:
        """Refuses, before any work, a prediction type that this schedule's identity does not hold for.

        Raises:
            ValueError: an unknown type; `v` or `eps` with a flow schedule; `flow` with a variance-preserving one.
        """
        _one_of("prediction type", kind, PredictionType)
        if (kind in ("v", "eps") and not self.discrete) or (kind == "flow" and self.discrete):
            raise ValueError(
                f"prediction type {kind!r} does not go with the {self.kind!r} schedule: `v` needs α² + σ² = 1, "
                "`eps` needs α > 0 at t_max, `flow` needs α + σ = 1"
            )


@dataclass(frozen=True)
class Prediction:
    """What a denoiser believes at (x_t, t): the clean sample and the noise, with α_t x̂_0 + σ_t ε̂ = x_t.

    Attributes:
        x_0: Estimate of the clean sample, (b, *sample_shape), float32 or wider.
        eps: Estimate of the noise, same shape.
        t: The time at which it was made, (b,).
        schedule: The schedule that t refers to.
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor
    schedule: NoiseSchedule

    @property
    def v(self) -> Tensor:
        """v = α_t ε − σ_t x_0 (Salimans & Ho 2021, App. D)."""
        alpha, sigma = self.schedule(self.t, self.x_0)
        return alpha * self.eps - sigma * self.x_0

    def output(self, kind: PredictionType) -> Tensor:
        """The same belief as a network of that prediction type would state it: the inverse of `schedule.prediction`."""
        readings: dict[str, Callable[[], Tensor]] = {
            "eps": lambda: self.eps,
            "v": lambda: self.v,
            "x_0": lambda: self.x_0,
            "flow": lambda: self.eps - self.x_0,
        }
        return readings[kind]()

    def guided_by(self, uncond: Prediction, guidance_scale: Tensor | float) -> Prediction:
        """Classifier-free guidance, uncond + w (cond − uncond) on x̂_0 and ε̂ alike (Ho & Salimans 2022, with w = 1 + their w).

        Args:
            uncond: The prediction without the condition, at the same state.
            guidance_scale: w, a number or (b,); 1 leaves `self`.
        """
        w = broadcast(guidance_scale.to(self.x_0.dtype), self.x_0) if isinstance(guidance_scale, Tensor) else guidance_scale
        return Prediction(torch.lerp(uncond.x_0, self.x_0, w), torch.lerp(uncond.eps, self.eps, w), self.t, self.schedule)

    def latent(self, s: Tensor, schedule: NoiseSchedule | None = None) -> Tensor:
        """The latent that this belief puts at time s (b,): α_s x̂_0 + σ_s ε̂, (b, *sample_shape); s read by `schedule`, default its own."""
        alpha_s, sigma_s = (schedule or self.schedule)(s, self.x_0)
        return alpha_s * self.x_0 + sigma_s * self.eps

    def projected(self, support: Support, straight_through: bool = False) -> Prediction:
        """Moves x̂_0 onto the data's support and keeps α x̂_0 + σ ε̂ = x_t (reflected diffusion, Lou & Ermon 2023).

        ε̂' = ε̂ + (α/σ)(x̂_0 − x̂_0')        bit for bit unchanged where x̂_0 already lies inside

        Args:
            support: Where x̂_0 is moved.
            straight_through: The values are those of the projection, the gradients those of x̂_0 and ε̂ as they
                were: a clamp has none outside, so that a student beyond the support would never learn to come back.
        """
        x_0 = support.project(self.x_0)
        if x_0 is self.x_0:  # all of space
            return self
        if straight_through:
            x_0 = x_0.detach() + (self.x_0 - self.x_0.detach())  # the bracket is 0, exactly
        alpha, sigma = self.schedule(self.t, x_0)
        return Prediction(x_0, self.eps + (alpha / sigma) * (self.x_0 - x_0), self.t, self.schedule)


def _check_earlier(t: Tensor, s: Tensor) -> None:
    # On a GPU the comparison would stall the stream at every step; there the grid, which was checked, is trusted.
    if t.device.type == "cpu" and not bool((s < t).all()):
        raise ValueError(f"a step must lead toward the data, to a time earlier than t; got t={t.tolist()[:4]}, s={s.tolist()[:4]}")


def ddim_step(pred: Prediction, s: Tensor) -> Tensor:
    """Moves along the probability-flow ODE to time s (DDIM, η = 0).

        x_s = α_s x̂_0 + σ_s ε̂            Song et al. 2021, Eq. 12

    Args:
        pred: x̂_0 and ε̂ at the current time, each (b, *sample_shape).
        s: Target times, shape (b,).

    Raises:
        ValueError: s is not earlier than the current time (checked on the CPU).
    """
    _check_earlier(pred.t, s)
    return pred.latent(s)


def renoise_step(pred: Prediction, s: Tensor, noise: Tensor) -> Tensor:
    """Jumps to x̂_0 and diffuses it back to time s with fresh noise (multistep consistency sampling, Song et al. 2023, Alg. 1).

        x_s = α_s x̂_0 + σ_s ε ,   ε ~ N(0, I)

    Args:
        pred: x̂_0 at the current time, (b, *sample_shape).
        s: Target times, shape (b,).
        noise: Fresh ε, (b, *sample_shape).

    Raises:
        ValueError: s is not earlier than the current time (checked on the CPU).
    """
    _check_earlier(pred.t, s)
    return pred.schedule.add_noise(pred.x_0, noise, s)


def invert_ddim(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Prediction:
    """The one prediction at (x_t, t) whose DDIM step to s lands on x_s: progressive distillation's target.

        x̂_0 = (x_s − r x_t)/(α_s − r α_t) ,   r = σ_s/σ_t       Salimans & Ho 2021, App. G

    Args:
        schedule: The schedule of both times.
        x_t, t: The state, (b, *sample_shape) and (b,).
        x_s, s: The action, the next latent (any number of teacher steps away), and its time.

    Raises:
        ValueError: s is not earlier than t (checked on the CPU).
    """
    _check_earlier(t, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(t), schedule.coefficients(s)
    ratio = sigma_s / sigma_t  # float64, (b,)
    gain = 1 / (alpha_s - ratio * alpha_t)
    dtype = torch.promote_types(x_t.dtype, torch.float32)

    def scaled(coefficient: Tensor, x: Tensor) -> Tensor:
        return broadcast(coefficient.to(dtype), x) * x

    x_0 = scaled(gain, x_s) - scaled(gain * ratio, x_t)
    eps = scaled(1 / sigma_t, x_t) - scaled(alpha_t / sigma_t, x_0)
    return Prediction(x_0, eps, t, schedule)


class TimeGrid:
    """The N + 1 times of a few-step sampler, from `t_max` down to 0.

    Args:
        schedule: The schedule whose times these are.
        num_steps: N, the number of steps of an episode.
        kind: `linspace`, the paper's (DPM++ default): 999, 749, 500, 250 → 0 for N = 4. `dmd2`: 999, 749, 499, 249 → 0,
            a constant stride of T // N. `trailing`: strides of T / N rounded, as in Lin et al. 2024 and diffusers.
            `lcm`: N of the 50 trailing times, 999, 759, 499, 259 → 0, as diffusers' LCMScheduler picks them.

    Raises:
        ValueError: num_steps is not between 1 and the schedule's `t_max`, so large that `trailing` reaches 0 early, or an unknown kind.
    """

    def __init__(self, schedule: NoiseSchedule, num_steps: int, kind: GridKind = "linspace") -> None:
        _one_of("time grid", kind, GridKind)
        if not 1 <= num_steps <= schedule.t_max:
            raise ValueError(f"num_steps={num_steps}: need 1 ≤ num_steps ≤ {schedule.t_max}, the length of the teacher's chain")
        n, t_max = num_steps, schedule.t_max
        if kind == "linspace":
            times = t_max * torch.arange(n, -1, -1, dtype=torch.float64) / n  # products first: equal halves, rounded alike, whatever n
        elif kind == "lcm":
            solver = TimeGrid(schedule, min(LCM_SOLVER_STEPS, 2 * schedule.num_train_steps // 3), "trailing")
            times = lcm_times(solver, n).double()
        else:
            stride = schedule.num_train_steps // n if kind == "dmd2" else schedule.num_train_steps / n
            times = schedule.num_train_steps - stride * torch.arange(n + 1, dtype=torch.float64)
            if schedule.discrete:
                times = times.round() - 1  # in this order, for diffusers rounds the count of steps, not the time
            times[-1] = 0
        if schedule.discrete:
            times = times.round()
        if bool((times.diff() >= 0).any()):
            raise ValueError(
                f"num_steps={n}: a {kind} grid of so many steps reaches 0 early; need at most {2 * schedule.num_train_steps // 3}"
            )
        self.schedule = schedule
        self.num_steps = n
        self.kind = kind
        self.times = times.float()
        self._ascending = self.times.flip(0).contiguous()

    def to(self, device: torch.device | str) -> TimeGrid:
        """Moves the grid to a device, in place."""
        self.times, self._ascending = self.times.to(device), self._ascending.to(device)
        return self

    def previous(self, t: Tensor) -> Tensor:
        """The step's target: the latest time of the grid before t, (b,) → (b,); 0 stays 0. t need not lie on the grid."""
        index = torch.searchsorted(self._ascending, t.contiguous(), side="left") - 1
        return self._ascending[index.clamp(min=0)]


def lcm_times(solver: TimeGrid, num_steps: int) -> Tensor:
    """The times that a latent consistency model samples at: num_steps of the solver's, evenly by index, and 0, (num_steps + 1,).

    Raises:
        ValueError: more steps than the solver has.
    """
    if num_steps > solver.num_steps:
        raise ValueError(f"num_steps={num_steps}: a latent consistency model samples in at most its solver's {solver.num_steps} steps")
    index = torch.arange(num_steps + 1, device=solver.times.device) * solver.num_steps // num_steps
    return solver.times[index]


def substep_times(schedule: NoiseSchedule, t: Tensor, s: Tensor, k: int) -> Tensor:
    """k + 1 times from t to s in equal strides, (k + 1, b), whole numbers for a discrete schedule.

    Rounded up, so that 0 is reached by the last alone. Where t − s < k some times repeat; a step between equal times stays.
    """
    if k == 1:  # nothing between; the arithmetic below would be a tenth of what a rollout adds to its network
        times = torch.stack([t, s])
    else:
        i = torch.arange(k + 1, dtype=torch.float64, device=t.device)[:, None]
        times = ((k - i) * t.double() + i * s.double()) / k  # whole strides come out exact, so that `ceil` leaves them alone
    return (times.ceil() if schedule.discrete else times).float()
