"""One step of a sampler, from the latent at t to the latent at an earlier time s, and the inverse of the DDIM step."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.prediction import Prediction
from ddil_env.schedule import NoiseSchedule


def _check_earlier(t: Tensor, s: Tensor) -> None:
    # On a GPU the comparison would stall the stream at every step; there the time grid, which was checked, is trusted.
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
        x_s, s: The action, which is the next latent (any number of teacher steps away), and its time.

    Raises:
        ValueError: s is not earlier than t (checked on the CPU).
    """
    _check_earlier(t, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(t), schedule.coefficients(s)
    ratio = sigma_s / sigma_t  # float64, (b,)
    gain = 1 / (alpha_s - ratio * alpha_t)
    dtype = torch.promote_types(x_t.dtype, torch.float32)

    def scale(coefficient: Tensor, x: Tensor) -> Tensor:
        return broadcast(coefficient.to(dtype), x) * x

    x_0 = scale(gain, x_s) - scale(gain * ratio, x_t)
    eps = scale(1 / sigma_t, x_t) - scale(alpha_t / sigma_t, x_0)
    return Prediction(x_0, eps, t, schedule)
