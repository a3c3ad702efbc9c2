"""The analytic expert: a mixture of isotropic Gaussians, whose posterior mean and score are closed-form at every t.

    x_t | k ~ N(α μ_k, v_k I) ,  v_k = α² s_k² + σ²
    r_k     ∝ w_k N(x_t; α μ_k, v_k I)
    x̂_0     = Σ_k r_k [μ_k + (α s_k²/v_k)(x_t − α μ_k)]
    ε̂       = Σ_k r_k (σ/v_k)(x_t − α μ_k)              = −σ ∇ log p_t(x_t)

The sums are over x_t − α μ_k and in float64, so that no digits cancel as σ → 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddil_env.denoiser import NetworkDenoiser
from ddil_env.expert import Expert
from ddil_env.mlp import TimeConditionedMLP, last_activation
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import Kind, NoiseSchedule


class GaussianMixtureExpert(Expert):
    """A mixture of isotropic Gaussians: predictions and data are exact.

    Args:
        means: μ, (k, d) or (k, *sample_shape).
        stds: s > 0, (k,), or one number for all components.
        weights: w > 0, (k,); they are normalised. Default: equal.
        schedule: A NoiseSchedule, or the name of a kind.
        labels: Class of each component, (k,) whole numbers from 0 on; the expert is then class-conditional.
        guidance_scale: Scale of classifier-free guidance from the whole mixture to a class; 1 or less is none.
        device: Where it computes.

    Raises:
        ValueError: lengths that differ, stds or weights that are not positive, non-finite means, labels that skip a class.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float] | float,
        weights: Tensor | Sequence[float] | None = None,
        schedule: NoiseSchedule | Kind = "scaled_linear",
        labels: Tensor | Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        mu = torch.as_tensor(means, dtype=torch.float64)
        if mu.ndim < 2 or not torch.isfinite(mu).all():
            raise ValueError(f"means of shape {tuple(mu.shape)}: need finite numbers of shape (k, d) or (k, *sample_shape)")
        k = len(mu)
        std = torch.as_tensor(stds, dtype=torch.float64).expand(k) if np.ndim(stds) == 0 else torch.as_tensor(stds, dtype=torch.float64)
        weight = torch.ones(k, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        for name, values in (("stds", std), ("weights", weight)):
            if values.shape != (k,) or not (torch.isfinite(values) & (values > 0)).all():
                raise ValueError(f"{name}={values.tolist()}: need {k} positive numbers, one a component")
        label = None if labels is None else torch.as_tensor(labels)
        num_classes = 0
        if label is not None:
            if label.is_floating_point():
                raise ValueError(f"labels={label.tolist()}: need {k} whole numbers, one a component")
            num_classes = int(label.max()) + 1
            if label.shape != (k,) or sorted(set(label.tolist())) != list(range(num_classes)):
                raise ValueError(f"labels={label.tolist()}: need {k} whole numbers, one a component, that use every class from 0 on")
        super().__init__(
            schedule if isinstance(schedule, NoiseSchedule) else NoiseSchedule(schedule),
            tuple(mu.shape[1:]),
            num_conditions=num_classes,
            null_condition=num_classes if num_classes else None,
            guidance_scale=guidance_scale,
            device=device,
        )
        self.means = mu.flatten(1).to(self.device)  # (k, d)
        self.stds = std.to(self.device)  # (k,)
        self.log_weights = (weight / weight.sum()).log().to(self.device)  # (k,)
        # Row c holds log w of the components of class c, −∞ elsewhere; the last row is the null condition: all of them.
        rows = self.log_weights.expand(num_classes + 1, k).clone()
        if label is not None:
            rows[:-1][label[None] != torch.arange(num_classes)[:, None]] = -torch.inf
        self._class_log_weights = rows.log_softmax(1)
        parameters = [mu.tolist(), std.tolist(), (weight / weight.sum()).tolist(), None if label is None else label.tolist()]
        self._digest = hashlib.sha256(repr(parameters).encode()).hexdigest()[:16]  # of what was given: the same on every device

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"mixture": self._digest}

    def _components(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        """log r_k unnormalised (b, k), x_t − α μ_k (b, k, d), v_k (b, k), α and σ (b, 1), all float64."""
        alpha, sigma = (a[:, None] for a in self.schedule.coefficients(t))
        difference = x_t.double().flatten(1)[:, None] - alpha[..., None] * self.means  # (b, k, d)
        variance = (alpha * self.stds) ** 2 + sigma**2  # (b, k)
        prior = self._class_log_weights[-1:] if c is None else self._class_log_weights[c]
        d = self.means.shape[1]
        log_joint = prior - 0.5 * difference.square().sum(-1) / variance - 0.5 * d * (2 * math.pi * variance).log()
        return log_joint, difference, variance, alpha, sigma

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        log_joint, difference, variance, alpha, sigma = self._components(x_t, t, c)
        r = log_joint.softmax(1)  # (b, k)
        x_0 = r @ self.means + torch.einsum("bk,bkd->bd", r * alpha * self.stds**2 / variance, difference)
        eps = torch.einsum("bk,bkd->bd", r * sigma / variance, difference)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        return Prediction(x_0.reshape(x_t.shape).to(dtype), eps.reshape(x_t.shape).to(dtype), t, self.schedule)

    def log_prob(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """log p_t(x_t | c), (b,) float64."""
        return self._components(x_t, t, c)[0].logsumexp(1)

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        c = self.sample_condition(n, generator)
        rows = self._class_log_weights[-1:].expand(n, -1) if c is None else self._class_log_weights[c]
        component = torch.multinomial(rows.exp(), 1, generator=generator)[:, 0]  # (n,)
        noise = torch.randn(n, self.means.shape[1], generator=generator, device=self.device, dtype=torch.float64)
        return (self.means[component] + self.stds[component, None] * noise).reshape(n, *self.sample_shape).float(), c

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Draws n classes (n,) in the proportions of the mixture, so that (x_0, c) has its joint distribution."""
        if not self.num_conditions:
            return None
        class_weights = (self._class_log_weights[:-1] > -torch.inf).double() @ self.log_weights.exp()
        return torch.multinomial(class_weights, n, replacement=True, generator=generator)

    def make_student(
        self, *, width: int = 128, depth: int = 3, prediction_type: PredictionType | None = None, guidance_embedding: bool = False
    ) -> NetworkDenoiser:
        """Makes an MLP with random weights: the closed form has no weights to start from.

        Args:
            width, depth: Units of a hidden layer, and number of hidden layers; each at least 1.
            prediction_type: What its output means; default: v, or the flow velocity on a flow schedule.
            guidance_embedding: Whether the network takes the guidance scale as an input.

        Raises:
            ValueError: width or depth below 1, or a prediction type that the schedule does not support.
        """
        if min(width, depth) < 1:
            raise ValueError(f"width={width}, depth={depth}: a student has at least one hidden layer of at least one unit")
        kind = prediction_type or ("v" if self.schedule.discrete else "flow")
        self.schedule.check_prediction_type(kind)
        network = TimeConditionedMLP(self.sample_shape, self.num_conditions, self.schedule.t_max, width, depth, guidance_embedding)
        return NetworkDenoiser(network.to(self.device), self.schedule, kind, guidance_embedding)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The last activation, whose output is (b, width)."""
        return last_activation(student)

    def decode(self, x_0: Tensor) -> Tensor | None:
        """Draws each sample as a dot on a 64 × 64 map of the plane; None unless the mixture has two dimensions."""
        if self.sample_shape != (2,):
            return None
        reach = float(self.means.abs().max() + 4 * self.stds.max())
        pixel = ((x_0.double().cpu() / reach).clamp(-1, 1) * 31.5 + 31.5).round().long()  # (b, 2)
        pictures = torch.full((len(x_0), 64, 64, 3), 255, dtype=torch.uint8)
        means = ((self.means.cpu() / reach) * 31.5 + 31.5).round().long()
        pictures[:, 63 - means[:, 1], means[:, 0]] = 200
        for picture, (x, y) in zip(pictures, pixel.tolist(), strict=True):
            picture[max(62 - y, 0) : 65 - y, max(x - 1, 0) : x + 2] = torch.tensor([31, 119, 180], dtype=torch.uint8)
        return pictures


class Grid25(GaussianMixtureExpert):
    """A 5×5 grid of narrow modes in ±0.8, on which mode loss and mode drift both show: each column is a class with uneven weights.

    Args:
        guidance_scale: Scale of classifier-free guidance; 1 or less is none.
        device: Where it computes.
    """

    def __init__(self, guidance_scale: float = 1.0, device: torch.device | str = "cpu") -> None:
        axis = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64)
        index = torch.arange(25)
        means, weights = torch.cartesian_prod(axis, axis), 1 + (index % 5)
        super().__init__(means, 0.04, weights, labels=index // 5, guidance_scale=guidance_scale, device=device)
