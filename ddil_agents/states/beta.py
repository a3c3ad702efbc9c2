"""β: the prior with which a training state is drawn from each source, and how it moves over a run.

    s ~ Σᵢ βᵢ ρᵢ ,   i ∈ {forward, teacher, student}            DDIL §4.1, Alg. 1

The paper is forward-heavy early and shifts toward the student as it gets better, without ever leaving the data
("Student Selection Prior"). A schedule therefore moves the forward share from 1 down to its floor, `forward`, and
divides the rest between teacher and student in their given proportion.

The defaults differ by method, as the methods do: `Beta()`, forward alone, is plain distillation; DAgger's is a mixture of all three; that
of DMD2 is the student's own states. A preset for a teacher without data (configs/dagger/text_to_image.yaml) has no forward share to give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

Schedule = Literal["constant", "linear", "cosine", "exponential", "dagger", "per_round"]
SHARES = ("forward", "teacher", "student")


@dataclass(frozen=True)
class Beta:
    """Source priors. Shares that do not sum to 1 are divided by their sum, and held so."""

    forward: float = 1.0
    """Share of forward-diffused data; under a schedule, the floor that it falls to."""
    teacher: float = 0.0
    """Share of states on the teacher's own trajectories."""
    student: float = 0.0
    """Share of states on the student's own trajectories."""
    schedule: Schedule = "constant"
    """How the forward share falls from 1 to its floor over the run: linear, cosine, exponential (e^(-decay * 10 * progress)),
    dagger (decay^round, Ross et al. 2011), per_round (the list), or constant (the floor from the start)."""
    decay: float = 0.5
    """p of `dagger`; rate of `exponential`."""
    rounds: int = 10
    """Rounds that `dagger` and `per_round` divide the run into."""
    per_round: tuple[float, ...] = ()
    """Forward share of each round, for `per_round`; the last one holds on."""

    def __post_init__(self) -> None:
        shares = self.shares
        if not all(math.isfinite(b) and b >= 0 for b in shares) or sum(shares) <= 0:
            raise ValueError(f"beta={shares} (forward, teacher, student): need finite shares ≥ 0 that do not sum to 0")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"unknown beta.schedule {self.schedule!r}; choose one of: {', '.join(get_args(Schedule))}")
        if self.schedule != "constant" and self.teacher + self.student == 0:
            raise ValueError(f"beta.schedule={self.schedule!r} has nowhere to move the forward share: give teacher or student a share")
        if not 0 < self.decay <= 1:
            raise ValueError(f"beta.decay={self.decay}: need 0 < decay ≤ 1")
        if self.rounds < 1:
            raise ValueError(f"beta.rounds={self.rounds}: need at least 1")
        if self.schedule == "per_round" and not (self.per_round and all(0 <= f <= 1 for f in self.per_round)):
            raise ValueError(f"beta.per_round={self.per_round}: schedule `per_round` needs the forward share of each round, in [0, 1]")
        if abs((total := sum(shares)) - 1) > 1e-9:  # shares that sum to 1 stay as they are, to the last bit
            for name, share in zip(SHARES, shares, strict=True):
                object.__setattr__(self, name, share / total)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of forward, teacher and student."""
        return self.forward, self.teacher, self.student

    def with_shares(self, **given: float) -> Self:
        """These priors with one, two or three shares given; where not all are, the others divide the rest in their present proportion.

        Raises:
            ValueError: shares that leave less than nothing, or something to others that have none.
        """
        others = {name: share for name, share in zip(SHARES, self.shares, strict=True) if name not in given}
        rest, present = 1 - sum(given.values()), sum(others.values())
        if not others or not all(share >= 0 for share in given.values()):
            return self._changed(given)  # of all three the proportion counts
        told = ", ".join(f"beta.{name}={share:g}" for name, share in given.items())
        if rest < -1e-9:
            raise ValueError(f"{told}: more than 1 in all; give shares of 1, or all three, of which the proportion counts")
        if rest > 1e-9 and not present:
            raise ValueError(f"{told}: leaves {rest:g} to {' and '.join(others)}, which have no share; give beta.{[*others][-1]} too")
        return self._changed(given | {name: max(rest, 0) * share / (present or 1) for name, share in others.items()})

    def _changed(self, shares: dict[str, Any]) -> Self:
        return replace(self, **shares)

    def __call__(self, progress: float) -> tuple[float, float, float]:
        """β at progress 0 … 1 of the run, summing to 1."""
        total = self.forward + self.teacher + self.student
        floor, rest = self.forward / total, self.teacher + self.student
        if rest == 0:
            return 1.0, 0.0, 0.0
        u = min(max(progress, 0.0), 1.0)
        current_round = min(int(u * self.rounds), self.rounds - 1)
        falling = {
            "constant": 0.0,
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
