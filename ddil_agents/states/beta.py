"""β: the probability of drawing a training state from each source, how it changes over a run, and where it is applied.

    s ~ Σᵢ βᵢ ρᵢ ,   i ∈ {forward, teacher, student}            DDIL §4.1, Alg. 1

The paper draws mostly forward states early and more of the student's as it improves, and never stops drawing data ("Student
Selection Prior"). A schedule therefore lowers the forward share from 1 to its floor, `forward`, and divides the rest between teacher
and student in the proportion of their shares.

Each method has defaults of its own: `Beta()`, only forward states, is plain distillation; DAgger mixes all three sources; DMD2 trains on
the student's own states. Presets for a teacher without data (configs/dagger/text_to_image.yaml) have a forward share of 0.

β is applied twice: `split_collection` says how many states of each source a collection draws (collect.py), and `draw_sources` the source
of each state of a batch (buffer.py; in DMD2, which draws fresh states, simulation.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

Schedule = Literal["constant", "linear", "cosine", "exponential", "dagger", "per_round", "adaptive"]
SOURCES = ("forward", "teacher", "student")
ADAPTIVE_FLOOR = 0.05  # share that the schedule `adaptive` leaves to every source, so that its gradient can be measured

_THE_REST = float("nan")  # the default of `forward`, known by its identity: what teacher and student leave


@dataclass(frozen=True)
class Beta:
    """Probabilities of the three sources.

    Without `forward`, the forward share is what the other two leave: `Beta(student=0.4)` is (0.6, 0, 0.4), `Beta(student=1)` is (0, 0, 1).
    With it, shares that do not sum to 1 are divided by their sum.

    Raises:
        ValueError: a share is negative or not finite, teacher and student sum to more than 1 without `forward`, or the schedule's settings
            do not fit.
    """

    forward: float = _THE_REST
    """Share of forward-diffused data; with a schedule, the floor that it falls to."""
    teacher: float = 0.0
    """Share of states on the teacher's own trajectories."""
    student: float = 0.0
    """Share of states on the student's own trajectories."""
    schedule: Schedule = "constant"
    """How the forward share falls from 1 to its floor over the run: linear, cosine, exponential (e^(-decay * 10 * progress)),
    dagger (decay^round, Ross et al. 2011), per_round (as the list `per_round` says), or constant (at the floor from the start).
    adaptive: the shares start as they are given and follow what states of each source teach (states/adaptive.py)."""
    decay: float = 0.5
    """Base of the schedule `dagger`, rate of the schedules `exponential` and `adaptive`."""
    rounds: int = 10
    """Number of rounds that the schedules `dagger` and `per_round` divide the run into."""
    per_round: tuple[float, ...] = ()
    """Forward share of each round, for the schedule `per_round`; rounds beyond the list have its last share."""

    def __post_init__(self) -> None:
        if self.forward is _THE_REST:
            rest = 1.0 - self.teacher - self.student
            if -math.inf < rest < -1e-9:
                raise ValueError(
                    f"Beta(teacher={self.teacher:g}, student={self.student:g}): more than 1 in all; give shares of 1, or all three, "
                    "which are divided by their sum"
                )
            object.__setattr__(self, "forward", 0.0 if abs(rest) < 1e-9 else rest)
        shares = self.shares
        are_shares = all(not isinstance(b, bool) and math.isfinite(b) and b >= 0 for b in shares)
        if not are_shares or not 0 < sum(shares) < math.inf:
            raise ValueError(f"beta={shares} (forward, teacher, student): need finite shares ≥ 0 that do not sum to 0 or to infinity")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"unknown beta.schedule {self.schedule!r}; choose one of: {', '.join(get_args(Schedule))}")
        if self.schedule != "constant" and self.teacher + self.student == 0:
            raise ValueError(f"beta.schedule={self.schedule!r} has nowhere to move the forward share: give teacher or student a share")
        if self.schedule == "adaptive" and (self.student == 0 or self.student == sum(shares)):
            raise ValueError(
                f"beta={shares} (forward, teacher, student): the schedule adaptive weighs the student's states against others; give the "
                "student and one of the others a share"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"beta.decay={self.decay}: need 0 < decay ≤ 1")
        if self.rounds < 1:
            raise ValueError(f"beta.rounds={self.rounds}: need at least 1")
        if self.schedule == "per_round" and not (self.per_round and all(0 <= f <= 1 for f in self.per_round)):
            raise ValueError(f"beta.per_round={self.per_round}: schedule `per_round` needs the forward share of each round, in [0, 1]")
        if abs((total := sum(shares)) - 1) > 1e-9:  # shares that sum to 1 stay as they are, to the last bit
            for name, share in zip(SOURCES, shares, strict=True):
                object.__setattr__(self, name, share / total)

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of forward, teacher and student."""
        return self.forward, self.teacher, self.student

    def with_shares(self, **given: float) -> Self:
        """Replaces one, two or three shares; those that are not given divide the rest in their present proportion.

        Raises:
            ValueError: the given shares sum to more than 1, or to less while the others have no share to divide the rest by.
        """
        others = {name: share for name, share in zip(SOURCES, self.shares, strict=True) if name not in given}
        shares: dict[str, Any] = {**given}
        rest, present = 1 - sum(given.values()), sum(others.values())
        if not others or not all(share >= 0 for share in given.values()):
            return replace(self, **shares)  # three shares are divided by their sum; a negative one is refused there
        names = ", ".join(f"beta.{name}={share:g}" for name, share in given.items())
        if rest < -1e-9:
            raise ValueError(f"{names}: more than 1 in all; give shares of 1, or all three, which are divided by their sum")
        if rest > 1e-9 and not present:
            raise ValueError(f"{names}: leaves {rest:g} to {' and '.join(others)}, which have no share; give beta.{[*others][-1]} too")
        shares |= {name: max(rest, 0) * share / (present or 1) for name, share in others.items()}
        return replace(self, **shares)

    def largest_shares(self) -> list[float]:
        """The largest share that each source may have in a run."""
        if self.schedule == "adaptive":
            present = [share > 0 for share in self.shares]
            return [(1 - ADAPTIVE_FLOOR * (sum(present) - 1)) * there for there in present]
        return [max(share) for share in zip(*(self(i / 100) for i in range(101)), strict=True)]

    def __call__(self, progress: float) -> tuple[float, float, float]:
        """β at a progress of 0 … 1 through the run: three shares that sum to 1. With the schedule `adaptive`, those of its start."""
        total = self.forward + self.teacher + self.student
        floor, rest = self.forward / total, self.teacher + self.student
        if rest == 0:
            return 1.0, 0.0, 0.0
        u = min(max(progress, 0.0), 1.0)
        current_round = min(int(u * self.rounds), self.rounds - 1)
        falling = {
            "constant": 0.0,
            "adaptive": 0.0,
            "linear": 1 - u,
            "cosine": (1 + math.cos(math.pi * u)) / 2,
            "exponential": math.exp(-10 * self.decay * u),
            "dagger": self.decay**current_round,
        }
        if self.schedule == "per_round":
            forward = max(floor, self.per_round[min(current_round, len(self.per_round) - 1)])
        else:
            forward = floor + (1 - floor) * falling[self.schedule]
        return forward, (1 - forward) * self.teacher / rest, (1 - forward) * self.student / rest


def draw_sources(shares: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draws the source of each of n states.

    Args:
        shares: Weights of the sources, (k,); they need not sum to 1.
        n: Number of states.
        generator: On the device of the shares.

    Returns:
        Indices into `shares`, (n,) int64.
    """
    return torch.multinomial(shares, n, replacement=True, generator=generator)


def split_collection(n: int, shares: Sequence[float], units: Sequence[int], remainder: list[float]) -> list[int]:
    """Divides a collection of n states among the sources.

    Args:
        n: Number of states.
        shares: β.
        units: Number of states that one draw of each source gives.
        remainder: Number of states of each source that earlier collections left out because they made no whole draw; updated in place, so
            that small collections add up to β exactly.

    Returns:
        The number of draws of each source.
    """
    counts = []
    for i, (share, unit) in enumerate(zip(shares, units, strict=True)):
        remainder[i] += n * share
        counts.append(int(remainder[i] / unit + 1e-9))
        remainder[i] -= counts[i] * unit
    return counts
