"""Reflected diffusion: where a clean sample may lie, and how an estimate is brought back there.

A projection acts on x̂_0 alone; `Prediction.projected` recomputes ε̂ so that α x̂_0 + σ ε̂ = x_t still holds.
It leaves the exact posterior mean of data inside alone, for a mean lies in the convex hull of the data; what it moves
is error, of a network or of guidance: at t = 999 of Stable Diffusion σ/α = 14.6, so that guidance 8 puts an error in ε̂
into x̂_0 a hundredfold. Lou & Ermon 2023; DDIL §4.1, "Reflected Diffusion Distillation".

No projection waits for the device: it is enqueued like the network that it follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.errors import NoDataError

if TYPE_CHECKING:
    from ddil_env.expert import Expert

SupportKind = Literal["expert", "none", "static", "dynamic", "quantile", "reflection"]
Role = Literal["teacher", "target", "student", "critic"]


class Support(Protocol):
    """The set on which clean samples lie."""

    def project(self, x_0: Tensor) -> Tensor:
        """Brings x_0 (b, *sample_shape) onto the support; a sample inside is returned bit for bit."""


def _check_bound(bound: float, name: str = "bound") -> None:
    if not 0 < bound < math.inf:
        raise ValueError(f"{name}={bound}: need a positive, finite half-width")


def _quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of x (b, n), linear between order statistics as numpy's default: (b,).

    By the few largest, not by `torch.quantile`, which sorts each row, and in earlier releases refuses more than 16 million elements.
    """
    rank = q * (x.shape[1] - 1)
    top = x.topk(x.shape[1] - int(rank), dim=1).values  # falling; its last is the order statistic below the rank
    return torch.lerp(top[:, -1], top[:, -2:][:, 0], rank - int(rank))


@dataclass(frozen=True)
class Unbounded:
    """All of space: nothing is projected."""

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
            raise ValueError(f"bound={self.bound}: a box needs a positive half-width")

    def project(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class DynamicPercentile:
    """Dynamic thresholding: a sample that saturates is scaled down as a whole (Imagen, Saharia et al. 2022, §2.3).

        s = max(quantile of |x_0| over the sample's entries, bound) ,   x_0' = (bound/s) clamp(x_0, −s, s)

    For pixels. Latents lie beyond ±1 by nature and would be scaled down for no fault; `ChannelQuantiles` is for them.

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
        # A tensor over a tensor: bound/s with a number is bound · (1/s), which is not 1 at s = bound for every bound.
        shrink = broadcast(torch.full_like(s, self.bound) / s, x_0)  # (b, 1, …, 1)
        return (x_0 * shrink).clamp(-self.bound, self.bound)  # scaled first: s · (bound/s) may round to more than bound


@dataclass(frozen=True)
class ChannelQuantiles:
    """Channel c of a sample (C, *rest) in [low_c, high_c], without rescaling; coordinates of a sample (d,) are channels.

    Args:
        low, high: C numbers each. Kept as numbers, so that supports compare equal and a run can store them.

    Raises:
        ValueError: lengths that differ, numbers that are not finite, low above high; when projecting, another number of channels.
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
        """Between the (1 − quantile)- and the quantile-quantile of each channel of the samples x_0 (n, C, *rest).

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
                f"x_0 of shape {tuple(x_0.shape)}: this support was made for {len(self.low)} channels, the axis after the batch"
            )
        bounds: dict[tuple[torch.device, torch.dtype], Tensor] = self.__dict__["_bounds"]
        key = x_0.device, x_0.dtype
        if key not in bounds:  # uploaded once
            bounds[key] = bounds[torch.device("cpu"), torch.float64].to(*key)
        low, high = bounds[key].reshape(2, -1, *(1,) * (x_0.ndim - 2))  # (C, 1, …, 1) each
        return x_0.clamp(low, high)


@dataclass(frozen=True)
class Folded:
    """Reflection at the walls of [−bound, bound]: x_0 is folded back, by a triangle wave of period 4 bound (Lou & Ermon 2023).

        x_0' = |((x_0 − bound) mod 4 bound) − 2 bound| − bound            at bound 1: 1.2 → 0.8, 3 → −1, 5 → 1

    Raises:
        ValueError: bound is not positive and finite.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        _check_bound(self.bound)

    def project(self, x_0: Tensor) -> Tensor:
        folded = ((x_0 - self.bound).remainder(4 * self.bound) - 2 * self.bound).abs() - self.bound
        return torch.where(x_0.abs() <= self.bound, x_0, folded)  # the wave itself rounds, inside too


class Metered:
    """A support that projects as the one it wraps, and counts on the device what it moves.

    Args:
        support: The one that projects.
    """

    def __init__(self, support: Support) -> None:
        self.support = support
        self._moved: Tensor | int = 0
        self._seen = 0

    def project(self, x_0: Tensor) -> Tensor:
        projected = self.support.project(x_0)
        self._seen += x_0.numel()
        if projected is not x_0:
            self._moved = self._moved + (projected != x_0).sum()
        return projected

    def take(self) -> Tensor:
        """Share of the entries that were moved since the last take, a scalar; NaN where none were projected."""
        moved, seen = self.take_counts()
        return moved / seen

    def take_counts(self) -> Tensor:
        """Entries that were moved since the last take, and entries in all, (2,) int64, on the device."""
        moved = torch.as_tensor(self._moved)
        counts = torch.stack([moved, torch.full_like(moved, self._seen)])
        self._moved, self._seen = 0, 0
        return counts


@dataclass(frozen=True)
class Thresholding:
    """Whose estimates of x_0 are brought back onto the data's support, and how (reflected diffusion)."""

    kind: SupportKind = "expert"
    """expert (the support that the expert states), none, static (clamp to the bound), dynamic (Imagen's percentile, for pixels),
    quantile (clamp each channel to its quantiles, for latents), or reflection (fold back at the bound)."""
    roles: tuple[Role, ...] = ("teacher",)
    """Whose estimates: teacher, target (what the student is pulled to: PD's x_tgt, LCM's averaged student), student, critic. Not the
    student's alone: a target beyond the support would draw it outward for ever."""
    bound: float = 1.0
    """Half-width of static, dynamic and reflection."""
    quantile: float = 0.995
    """Of |x_0| in a sample, for dynamic; for quantile, each channel is clamped between its quantiles 1 - quantile and quantile."""
    calibrate_on: Literal["data", "teacher"] = "data"
    """Samples that give the channels' quantiles: the expert's data, or, where there are none, samples of the teacher."""
    samples: int = 512
    """How many of them."""

    def __post_init__(self) -> None:
        named = [("kind", self.kind, SupportKind), *(("roles", role, Role) for role in self.roles)]
        for name, value, allowed in (*named, ("calibrate_on", self.calibrate_on, Literal["data", "teacher"])):
            if value not in get_args(allowed):
                raise ValueError(f"unknown thresholding.{name} {value!r}; choose one of: {', '.join(get_args(allowed))}")
        if len(set(self.roles)) < len(self.roles):
            raise ValueError(f"thresholding.roles={list(self.roles)}: name each role once")
        _check_bound(self.bound, "thresholding.bound")
        if not 0.5 < self.quantile <= 1:
            raise ValueError(f"thresholding.quantile={self.quantile}: need 0.5 < quantile ≤ 1, the upper of a pair around the median")
        if not 2 <= self.samples <= 1_000_000:
            raise ValueError(f"thresholding.samples={self.samples}: need 2 … 1,000,000 to take quantiles of")


def build_support(config: Thresholding, expert: Expert, sample: Callable[[int], Tensor] | None = None, seed: int = 0) -> Support:
    """The support of the configured kind, calibrated where the kind asks for it.

    Args:
        config: The kind and its numbers; `roles` are for the caller to apply.
        expert: Gives its own support, or the data to calibrate on.
        sample: Draws n samples of the teacher, (n, *sample_shape); needed to calibrate on the teacher.
        seed: Of the data that are drawn to calibrate on.

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


_CLASSES: dict[str, type[Any]] = {
    "none": Unbounded,
    "static": Box,
    "dynamic": DynamicPercentile,
    "quantile": ChannelQuantiles,
    "reflection": Folded,
}


def support_to_dict(support: Support) -> dict[str, Any]:
    """The support in words and numbers, {"kind": …, its fields}, ready for JSON; what a meter wraps, without the meter.

    Raises:
        ValueError: a support of another class than this module's.
    """
    inner: Any = support
    while isinstance(inner, Metered):
        inner = inner.support
    for kind, cls in _CLASSES.items():
        if type(inner) is cls:
            return {"kind": kind, **asdict(inner)}
    raise ValueError(f"{type(inner).__name__} cannot be stored; supports that can: {', '.join(c.__name__ for c in _CLASSES.values())}")


def support_from_dict(stored: dict[str, Any]) -> Support:
    """The support that `support_to_dict` described, number for number.

    Raises:
        ValueError: an unknown kind, or fields that do not make a support of it.
    """
    kind = stored.get("kind") if isinstance(stored, dict) else None
    if kind not in list(_CLASSES):
        raise ValueError(f"unknown kind of support {kind!r} in {stored!r}; choose one of: {', '.join(_CLASSES)}")
    try:
        support: Support = _CLASSES[kind](**{name: value for name, value in stored.items() if name != "kind"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"damaged support {stored!r}: {error}") from error
    return support
