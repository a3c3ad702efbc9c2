"""Reflected diffusion: the set in which clean samples lie, and the projection of estimates onto it (thresholding).

A projection acts on x̂_0 alone; `Prediction.projected` recomputes ε̂ so that α x̂_0 + σ ε̂ = x_t still holds. The exact posterior mean
lies in the convex hull of the data, so that a projection onto a convex support leaves it unchanged and moves only the errors of a
network or of guidance. These can be large: at t = 999 of Stable Diffusion σ/α = 14.6, so that at guidance scale 8 an error in ε̂ is
a hundred times as large in x̂_0. Lou & Ermon 2023; DDIL §4.1, "Reflected Diffusion Distillation".

No projection synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.errors import NoDataError, check_choice

if TYPE_CHECKING:
    from ddil_env.expert import Expert

SupportKind = Literal["expert", "none", "static", "dynamic", "quantile", "reflection"]
Role = Literal["teacher", "target", "student", "critic"]


class Support(Protocol):
    """The set in which clean samples lie."""

    def project(self, x_0: Tensor) -> Tensor:
        """Moves x_0 (b, *sample_shape) into the support; a sample that lies inside is returned bit for bit."""


def _check_bound(bound: float, name: str = "bound") -> None:
    if not 0 < bound < math.inf:
        raise ValueError(f"{name}={bound}: need a positive, finite half-width")


def _quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile (b,) of each row of x (b, n), linear between order statistics as numpy's default.

    It takes the few largest entries, where `torch.quantile` sorts each row and, in earlier releases, refuses more than 16 million.
    """
    rank = q * (x.shape[1] - 1)
    top = x.topk(x.shape[1] - int(rank), dim=1).values  # descending; the last is the order statistic below the rank
    return torch.lerp(top[:, -1], top[:, -2:][:, 0], rank - int(rank))


@dataclass(frozen=True)
class Unbounded:
    """No bound: nothing is projected."""

    def project(self, x_0: Tensor) -> Tensor:
        return x_0


@dataclass(frozen=True)
class Box:
    """Every coordinate in [−bound, bound]; pixels scaled to ±1 have bound 1.

    Raises:
        ValueError: bound is not positive.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound}: a box needs a positive half-width, such as 1 for pixels scaled to ±1")

    def project(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class DynamicPercentile:
    """Dynamic thresholding: a saturated sample is scaled down as a whole (Imagen, Saharia et al. 2022, §2.3).

        s = max(quantile of |x_0| over the sample's entries, bound) ,   x_0' = (bound/s) clamp(x_0, −s, s)

    This is for pixels. Correct latents lie beyond ±1 and would be scaled down too; use `ChannelQuantiles` for latents.

    Raises:
        ValueError: quantile outside (0, 1], or a bound that is not positive and finite.
    """

    quantile: float = 0.995
    bound: float = 1.0

    def __post_init__(self) -> None:
        _check_bound(self.bound)
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile}: need 0 < quantile ≤ 1")

    def project(self, x_0: Tensor) -> Tensor:
        s = _quantile(x_0.abs().flatten(1), self.quantile).clamp(min=self.bound)  # (b,)
        # A tensor over a tensor: torch computes number/s as number · (1/s), which is not exactly 1 at s = bound.
        shrink = broadcast(torch.full_like(s, self.bound) / s, x_0)  # (b, 1, …, 1)
        return (x_0 * shrink).clamp(-self.bound, self.bound)  # scaled first: s · (bound/s) may round to more than bound


@dataclass(frozen=True)
class ChannelQuantiles:
    """Each channel c of a sample (C, *rest) clamped to [low_c, high_c]; the coordinates of a sample (d,) count as channels.

    Args:
        low, high: C numbers each. They are stored as Python floats, so that supports compare equal and a run can save them.

    Raises:
        ValueError: lengths that differ, numbers that are not finite, or low above high; when projecting, another number of channels.
    """

    low: Tensor | Sequence[float]
    high: Tensor | Sequence[float]

    def __post_init__(self) -> None:
        low, high = (torch.as_tensor(side, dtype=torch.float64, device="cpu").detach() for side in (self.low, self.high))
        if low.ndim != 1 or low.shape != high.shape or not len(low):
            raise ValueError(f"low of shape {tuple(low.shape)}, high of shape {tuple(high.shape)}: need one number a channel in each")
        for channel, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            if not -math.inf < a <= b < math.inf:
                raise ValueError(f"channel {channel}: low={a}, high={b}; need finite numbers with low ≤ high")
        object.__setattr__(self, "low", tuple(low.tolist()))
        object.__setattr__(self, "high", tuple(high.tolist()))
        object.__setattr__(self, "_bounds", {(torch.device("cpu"), torch.float64): torch.stack([low, high])})

    @classmethod
    def calibrated(cls, x_0: Tensor, quantile: float) -> ChannelQuantiles:
        """Takes low and high from samples: the (1 − quantile)-quantile and the quantile-quantile of each channel.

        Args:
            x_0: Samples, (n, C, *rest).
            quantile: The upper quantile, above 0.5.

        Raises:
            ValueError: non-finite samples.
        """
        if not torch.isfinite(x_0).all():
            raise ValueError(
                "the samples to calibrate the support on are not all finite; look at the data, or at the teacher that drew them"
            )
        channels = x_0.transpose(0, 1).flatten(1)  # (C, n · rest)
        return cls(-_quantile(-channels, quantile), _quantile(channels, quantile))

    def project(self, x_0: Tensor) -> Tensor:
        if x_0.shape[1] != len(self.low):
            raise ValueError(
                f"x_0 of shape {tuple(x_0.shape)}: this support was made for {len(self.low)} channels, the axis after the batch; "
                "calibrate it on samples of this shape"
            )
        bounds: dict[tuple[torch.device, torch.dtype], Tensor] = self.__dict__["_bounds"]
        key = x_0.device, x_0.dtype
        if key not in bounds:  # copied to each device once
            bounds[key] = bounds[torch.device("cpu"), torch.float64].to(*key)
        low, high = bounds[key].reshape(2, -1, *(1,) * (x_0.ndim - 2))  # (C, 1, …, 1) each
        return x_0.clamp(low, high)


@dataclass(frozen=True)
class Folded:
    """Reflection at ±bound: x_0 is folded back into the box by a triangle wave of period 4 bound (Lou & Ermon 2023).

        x_0' = |((x_0 − bound) mod 4 bound) − 2 bound| − bound            at bound 1: 1.2 → 0.8, 3 → −1, 5 → 1

    Raises:
        ValueError: bound is not positive and finite.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        _check_bound(self.bound)

    def project(self, x_0: Tensor) -> Tensor:
        folded = ((x_0 - self.bound).remainder(4 * self.bound) - 2 * self.bound).abs() - self.bound
        return torch.where(x_0.abs() <= self.bound, x_0, folded)  # the wave would round values inside the box too


class CountingSupport:
    """Wraps a support and counts, on the device, how many entries its projection changes.

    Args:
        support: The support that projects.
    """

    def __init__(self, support: Support) -> None:
        self.support = support
        self._num_moved: Tensor | int = 0
        self._num_projected = 0

    def project(self, x_0: Tensor) -> Tensor:
        projected = self.support.project(x_0)
        self._num_projected += x_0.numel()
        if projected is not x_0:
            self._num_moved = self._num_moved + (projected != x_0).sum()
        return projected

    def pop_fraction(self) -> Tensor:
        """Returns the fraction of entries that were changed since the last call, a scalar, and starts again; NaN if none were projected."""
        moved, total = self.pop_counts()
        return moved / total

    def pop_counts(self) -> Tensor:
        """Returns the number of entries changed since the last call, and of all entries, (2,) int64 on the device; starts again."""
        moved = torch.as_tensor(self._num_moved)
        counts = torch.stack([moved, torch.full_like(moved, self._num_projected)])
        self._num_moved, self._num_projected = 0, 0
        return counts


@dataclass(frozen=True)
class Thresholding:
    """Which networks' estimates of x_0 are projected onto the data's support, and how (reflected diffusion)."""

    kind: SupportKind = "expert"
    """The projection: expert (onto the expert's own support), none, static (clamp to the bound), dynamic (Imagen's percentile, for
    pixels), quantile (clamp each channel to its quantiles, for latents), or reflection (fold back at the bound)."""
    roles: tuple[Role, ...] = ("teacher",)
    """Whose estimates are projected: teacher, target (the regression target: PD's x_tgt, LCM's averaged student), student, critic.
    Do not project the student's alone: an unprojected target beyond the support would pull it outward for ever."""
    bound: float = 1.0
    """Half-width of static, dynamic and reflection."""
    quantile: float = 0.995
    """For dynamic, the quantile of |x_0| in a sample; for quantile, each channel is clamped to its quantiles 1 - quantile and quantile."""
    calibrate_on: Literal["data", "teacher"] = "data"
    """Samples that give the channels' quantiles: the expert's data, or samples of the teacher for an expert that has no data."""
    samples: int = 512
    """Number of samples to calibrate on."""

    def __post_init__(self) -> None:
        check_choice("thresholding.kind", self.kind, SupportKind)
        for role in self.roles:
            check_choice("thresholding.roles", role, Role)
        check_choice("thresholding.calibrate_on", self.calibrate_on, Literal["data", "teacher"])
        if len(set(self.roles)) < len(self.roles):
            raise ValueError(f"thresholding.roles={list(self.roles)}: name each role once")
        _check_bound(self.bound, "thresholding.bound")
        if not 0.5 < self.quantile <= 1:
            raise ValueError(f"thresholding.quantile={self.quantile}: need 0.5 < quantile ≤ 1, the upper of a pair around the median")
        if not 2 <= self.samples <= 1_000_000:
            raise ValueError(f"thresholding.samples={self.samples}: need 2 … 1,000,000 to take quantiles of")


def build_support(config: Thresholding, expert: Expert, sample: Callable[[int], Tensor] | None = None, seed: int = 0) -> Support:
    """Builds the support of the configured kind, calibrated if the kind needs it.

    Args:
        config: The kind and its numbers; the caller applies `roles`.
        expert: Gives its own support, or the data to calibrate on.
        sample: Draws n samples of the teacher, (n, *sample_shape); needed to calibrate on the teacher.
        seed: Seed of the draw of the data to calibrate on.

    Raises:
        NoDataError: calibration on data that the expert does not have.
        ValueError: calibration on the teacher without `sample`, or on samples that are not finite.
    """
    match config.kind:
        case "expert":
            return expert.support
        case "none":
            return Unbounded()
        case "static":
            return Box(config.bound)
        case "dynamic":
            return DynamicPercentile(config.quantile, config.bound)
        case "reflection":
            return Folded(config.bound)
        case "quantile":
            return ChannelQuantiles.calibrated(_calibration_samples(config, expert, sample, seed), config.quantile)


def _calibration_samples(config: Thresholding, expert: Expert, sample: Callable[[int], Tensor] | None, seed: int) -> Tensor:
    if config.calibrate_on == "teacher":
        if sample is None:
            raise ValueError("thresholding.calibrate_on='teacher' needs the teacher's samples; pass sample=, which draws n of them")
        return sample(config.samples)
    try:
        return expert.sample_data(config.samples, torch.Generator(expert.device).manual_seed(seed))[0]
    except NoDataError as error:
        raise NoDataError(
            f"thresholding.kind='quantile' is calibrated on data, and {type(expert).__name__} brings none; "
            "calibrate on the teacher's samples: --thresholding.calibrate_on teacher"
        ) from error


_CLASS_OF_KIND: dict[str, type[Any]] = {
    "none": Unbounded,
    "static": Box,
    "dynamic": DynamicPercentile,
    "quantile": ChannelQuantiles,
    "reflection": Folded,
}


def support_to_dict(support: Support) -> dict[str, Any]:
    """Describes a support as {"kind": …, its fields}, ready for JSON; for a `CountingSupport` support, the one that it wraps.

    Raises:
        ValueError: a support of another class than this module's.
    """
    inner: Any = support
    while isinstance(inner, CountingSupport):
        inner = inner.support
    for kind, cls in _CLASS_OF_KIND.items():
        if type(inner) is cls:
            return {"kind": kind, **asdict(inner)}
    classes = ", ".join(cls.__name__ for cls in _CLASS_OF_KIND.values())
    raise ValueError(f"{type(inner).__name__} cannot be stored; supports that can: {classes}")


def support_from_dict(stored: dict[str, Any]) -> Support:
    """Builds the support that `support_to_dict` described, number for number.

    Raises:
        ValueError: an unknown kind, or fields that do not make a support of it.
    """
    kind = stored.get("kind") if isinstance(stored, dict) else None
    if kind not in list(_CLASS_OF_KIND):  # a list: what is stored may not be hashable
        raise ValueError(f"unknown kind of support {kind!r} in {stored!r}; choose one of: {', '.join(_CLASS_OF_KIND)}")
    try:
        support: Support = _CLASS_OF_KIND[kind](**{name: value for name, value in stored.items() if name != "kind"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"damaged support {stored!r}: {error}") from error
    return support
