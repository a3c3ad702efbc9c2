"""Noise schedules: how much data and how much noise a latent holds at time t.

    x_t = α_t x_0 + σ_t ε ,   ε ~ N(0, I)

Convention of t, for the whole library: t falls from `schedule.t_max` (pure noise) to 0 (clean data,
(α, σ) = (1, 0) exactly). For the variance-preserving kinds t is the whole number that the network
was trained on, 1 … 999; for flow matching it is any real in (0, 1000]. Times are float32 tensors of
shape (b,): float32 holds every whole number up to 2²⁴.

Coefficients are computed in float64 and returned in float32 or wider, already broadcast to the latent. As σ → 0, and in the
differences of `steps.invert_ddim`, digits cancel that float32 does not have.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.errors import check_choice
from ddil_env.prediction import Prediction, PredictionType

Kind = Literal["scaled_linear", "linear", "cosine", "flow"]


class NoiseSchedule:
    """α_t and σ_t of one family of diffusion models.

    Args:
        kind: `scaled_linear` (Stable Diffusion), `linear` (DDPM) and `cosine` (Nichol & Dhariwal 2021, β capped at .999)
            are variance preserving, α² + σ² = 1; `flow` is rectified flow, α = 1 − σ, σ = t / 1000 unless shifted.
        beta_start, beta_end: Ends of the β ramp of `scaled_linear` and `linear`; the defaults are Stable Diffusion's.
        num_train_steps: Length T of the chain that the network was trained on.
        set_alpha_to_one: The level at t = 0. True: the data, (α, σ) = (1, 0). False: the chain's first level √ᾱ_0, at which
            the solver of latent consistency models ends (as in diffusers' DDIMScheduler).
        zero_terminal_snr: Whether the levels of the discrete kinds are stretched to pure noise, (α, σ) = (0, 1), at t_max (Lin et al. 2024,
            Algorithm 1; diffusers' `rescale_betas_zero_snr`). ε does not say what the data are there: networks predict v or x_0.
        shift: s of `flow`: σ = s u/(1 + (s − 1) u) at u = t / 1000. Above 1, evenly spaced times lie closer together in σ near
            noise (Esser et al. 2024).

    Attributes:
        settings: The arguments, by name.
        t_max: The time of pure noise.
        discrete: Whether times are whole numbers.

    Raises:
        ValueError: an unknown kind, a β outside (0, 1), fewer than 2 steps, a shift that is not positive or not of `flow`, or
            zero_terminal_snr of `flow`, which ends in pure noise as it is.
    """

    def __init__(
        self,
        kind: Kind = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_steps: int = 1000,
        set_alpha_to_one: bool = True,
        shift: float = 1.0,
        zero_terminal_snr: bool = False,
    ) -> None:
        check_choice("schedule kind", kind, Kind)
        if not 0 < shift < math.inf or (shift != 1 and kind != "flow"):
            raise ValueError(f"shift={shift} with the {kind!r} schedule: need a positive, finite number, and 1 unless it is 'flow'")
        if zero_terminal_snr and kind == "flow":
            raise ValueError("zero_terminal_snr=True with the 'flow' schedule, which ends in pure noise as it is; leave it out")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: need 0 < beta_start ≤ beta_end < 1")
        if num_train_steps < 2:
            raise ValueError(f"num_train_steps={num_train_steps}: a chain needs at least 2 steps")
        self.kind = kind
        self.settings = {"kind": kind, "beta_start": beta_start, "beta_end": beta_end, "num_train_steps": num_train_steps, "shift": shift}
        self.settings |= {"set_alpha_to_one": set_alpha_to_one, "zero_terminal_snr": zero_terminal_snr}
        self.zero_terminal_snr = zero_terminal_snr
        self.num_train_steps = num_train_steps
        self.t_max = num_train_steps if kind == "flow" else num_train_steps - 1
        self.discrete = kind != "flow"
        self.shift = shift
        if self.discrete:
            alpha, sigma = self._coefficient_table(beta_start, beta_end, set_alpha_to_one)
            self._tables = {(torch.device("cpu"), torch.float64): (alpha, sigma)}

    def ending_at_alpha_0(self) -> NoiseSchedule:
        """The same schedule with `set_alpha_to_one=False`; a flow schedule, which has no such level, is returned as it is."""
        return NoiseSchedule(**self.settings | {"set_alpha_to_one": False}) if self.discrete else self  # type: ignore[arg-type]

    def _coefficient_table(self, beta_start: float, beta_end: float, set_alpha_to_one: bool) -> Tensor:
        """α and σ at t = 0 … T−1, float64, (2, T)."""
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
        if self.zero_terminal_snr:
            alpha = (log_alpha_bar / 2).exp()
            alpha = alpha[0] / (alpha[0] - alpha[-1]) * (alpha - alpha[-1])
            table = torch.stack([alpha, (1 - alpha**2).sqrt()])
        else:
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
        """Diffuses x_0 to time t, x_t = α_t x_0 + σ_t ε (Ho et al. 2020, Eq. 4); x_0 and eps (b, *sample_shape), t (b,)."""
        alpha_t, sigma_t = self(t, x_0)
        return alpha_t * x_0 + sigma_t * eps

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Prediction:
        """Converts a network's output (b, *sample_shape) at x_t (b, *sample_shape), t (b,) to x̂_0 and ε̂.

        eps:  x_0 = (x_t − σ ε)/α                        needs α > 0
        v:    x_0 = α x_t − σ v,    ε = α v + σ x_t      Salimans & Ho 2021, App. D; needs α² + σ² = 1
        x_0:  ε = (x_t − α x_0)/σ
        flow: x_0 = x_t − σ u,      ε = x_t + α u         u = ε − x_0; needs α + σ = 1

        Raises:
            ValueError: an output of another shape than x_t's, or an unknown prediction type.
        """
        if output.shape != x_t.shape:
            raise ValueError(f"the network's output has shape {tuple(output.shape)}; need x_t's, {tuple(x_t.shape)}")
        check_choice("prediction type", kind, PredictionType)
        alpha, sigma = self(t, x_t)
        if kind == "eps":
            return Prediction((x_t - sigma * output) / alpha, output.to(alpha.dtype), t, self)
        if kind == "v":
            return Prediction(alpha * x_t - sigma * output, alpha * output + sigma * x_t, t, self)
        if kind == "x_0":
            return Prediction(output.to(alpha.dtype), (x_t - alpha * output) / sigma, t, self)
        return Prediction(x_t - sigma * output, x_t + alpha * output, t, self)

    def check_prediction_type(self, kind: PredictionType) -> None:
        """Checks that this schedule supports a prediction type.

        Raises:
            ValueError: an unknown type; `v` or `eps` with a flow schedule; `flow` with a variance-preserving one; `eps` with
                zero_terminal_snr.
        """
        check_choice("prediction type", kind, PredictionType)
        if (kind in ("v", "eps") and not self.discrete) or (kind == "flow" and self.discrete) or (kind == "eps" and self.zero_terminal_snr):
            name = f"{self.kind!r} schedule{' of zero terminal SNR' if self.zero_terminal_snr else ''}"
            raise ValueError(
                f"prediction type {kind!r} does not go with the {name}: `v` needs α² + σ² = 1, "
                "`eps` needs α > 0 at t_max, `flow` needs α + σ = 1"
            )
