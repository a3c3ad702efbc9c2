"""β schedules: what share of the training states comes from where, at each moment of a run."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from ddil_agents.states.beta import Beta

FLOOR, TEACHER, STUDENT = 0.4, 0.2, 0.4
SCHEDULES = ["constant", "linear", "cosine", "exponential", "dagger", "per_round"]


def beta(schedule: Any, **settings: Any) -> Beta:
    return Beta(FLOOR, TEACHER, STUDENT, schedule=schedule, **settings)


@pytest.mark.parametrize(
    ("prior", "start", "middle", "end"),
    [
        (beta("constant"), 0.4, 0.4, 0.4),
        (beta("linear"), 1, 0.7, 0.4),
        (beta("cosine"), 1, 0.7, 0.4),
        (beta("exponential", decay=0.5), 1, 0.4 + 0.6 * math.exp(-2.5), 0.4 + 0.6 * math.exp(-5)),
        (beta("dagger", decay=0.5, rounds=10), 1, 0.4 + 0.6 * 0.5**5, 0.4 + 0.6 * 0.5**9),
        (beta("dagger", decay=1.0, rounds=3), 1, 1, 1),
        (beta("per_round", rounds=3, per_round=(1.0, 0.8, 0.2)), 1, 0.8, 0.4),
        (beta("per_round", rounds=10, per_round=(1.0, 0.8)), 1, 0.8, 0.8),
    ],
)
def test_forward_share_at_start_middle_and_end(prior: Beta, start: float, middle: float, end: float) -> None:
    assert [prior(u)[0] for u in (0.0, 0.5, 1.0)] == pytest.approx([start, middle, end], abs=1e-12)


def test_cosine_falls_slowly_first() -> None:
    assert beta("cosine")(0.25)[0] == pytest.approx(0.4 + 0.6 * (1 + math.sqrt(0.5)) / 2)
    assert beta("cosine")(0.25)[0] > beta("linear")(0.25)[0]


def test_dagger_holds_its_share_within_a_round() -> None:
    prior = beta("dagger", rounds=4)
    assert prior(0.25) == prior(0.49) != prior(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_the_forward_share_leaves_is_divided_in_proportion(schedule: str) -> None:
    for u in (0.1, 0.6, 1.0):
        forward, teacher, student = beta(schedule, per_round=(0.7, 0.5))(u)
        assert teacher * STUDENT == pytest.approx(student * TEACHER)
        assert teacher + student == pytest.approx(1 - forward)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_beyond_the_run_stays_at_its_ends(schedule: str) -> None:
    prior = beta(schedule, per_round=(0.9, 0.5))
    assert prior(-0.5) == prior(0.0)
    assert prior(1.5) == prior(1.0)


def test_random_priors_sum_to_1_and_never_fall_below_their_floor() -> None:
    rng = random.Random(0)
    for _ in range(300):
        shares = [rng.random() * rng.choice([0, 1, 10]) for _ in range(3)]
        if shares[1] + shares[2] == 0:
            continue
        rounds = rng.randint(1, 12)
        prior = Beta(
            *shares,
            schedule=rng.choice(SCHEDULES),  # type: ignore[arg-type]
            decay=rng.uniform(0.01, 1),
            rounds=rounds,
            per_round=tuple(rng.random() for _ in range(rounds)),
        )
        for u in (0.0, rng.random(), rng.random(), 1.0):
            at = prior(u)
            assert sum(at) == pytest.approx(1, abs=1e-12)
            assert min(at) >= 0
            assert at[0] >= shares[0] / sum(shares) - 1e-12


def test_shares_are_normalised() -> None:
    assert Beta(2, 1, 1)(0.3) == (0.5, 0.25, 0.25)


def test_shares_are_held_as_they_are_used_and_those_that_sum_to_1_to_the_last_bit() -> None:
    assert Beta(2, 1, 1).shares == (0.5, 0.25, 0.25)
    assert Beta(0.1, 0.2, 0.7).shares == (0.1, 0.2, 0.7)
    thirds = Beta(1, 1, 1)
    assert Beta(*thirds.shares) == thirds


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({}, (1, 0, 0)),
        ({"student": 1}, (0, 0, 1)),
        ({"student": 0.4}, (0.6, 0, 0.4)),
        ({"teacher": 0.1, "student": 0.4}, (0.5, 0.1, 0.4)),
        ({"forward": 1, "student": 1}, (0.5, 0, 0.5)),
    ],
)
def test_without_a_forward_share_forward_is_what_the_others_leave(given: dict[str, float], shares: tuple[float, ...]) -> None:
    assert Beta(**given).shares == pytest.approx(shares)  # type: ignore[arg-type]
    assert "forward" in given or Beta().with_shares(**given).shares == Beta(**given).shares  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({"student": 1}, (0, 0, 1)),
        ({"student": 0.5}, (5 / 12, 1 / 12, 0.5)),
        ({"forward": 0.5, "student": 0.5}, (0.5, 0, 0.5)),
        ({"forward": 0}, (0, 0.2, 0.8)),
        ({"forward": 2, "teacher": 1, "student": 1}, (0.5, 0.25, 0.25)),
        ({}, (0.5, 0.1, 0.4)),
    ],
)
def test_a_share_that_is_given_holds_and_the_others_divide_the_rest(given: dict[str, float], shares: tuple[float, ...]) -> None:
    assert Beta(0.5, 0.1, 0.4).with_shares(**given).shares == pytest.approx(shares)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"student": 2}, "beta.student=2: more than 1 in all; give shares of 1, or all three"),
        ({"forward": 0.5}, "beta.forward=0.5: leaves 0.5 to teacher and student, which have no share; give beta.student too"),
        ({"student": -1}, r"beta=\(1.0, 0.0, -1\).*need finite shares ≥ 0"),
    ],
)
def test_shares_that_leave_too_little_or_too_much_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Beta().with_shares(**given)


def test_forward_alone_is_exactly_1() -> None:
    assert Beta(0.3)(0.7) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forward": -0.1, "student": 1.0}, r"beta=\(-0.1, 0.0, 1.0\).*≥ 0"),
        ({"forward": 0.0}, r"beta=\(0.0, 0.0, 0.0\).*not sum to 0"),
        ({"student": math.nan}, "finite shares"),
        ({"teacher": math.inf}, "finite shares"),
        ({"forward": math.nan}, "finite shares"),
        ({"teacher": 0.5, "student": 1}, r"Beta\(teacher=0.5, student=1\): more than 1 in all; give shares of 1, or all three"),
        ({"schedule": "linaer", "student": 1.0}, "unknown beta.schedule 'linaer'; choose one of: constant, linear, cosine"),
        ({"schedule": "linear"}, "nowhere to move the forward share: give teacher or student"),
        ({"decay": 0.0}, "beta.decay=0.0: need 0 < decay ≤ 1"),
        ({"decay": 1.5}, "beta.decay=1.5"),
        ({"decay": math.nan}, "beta.decay=nan"),
        ({"rounds": 0}, "beta.rounds=0: need at least 1"),
        ({"schedule": "per_round", "student": 1.0}, r"beta.per_round=\(\): schedule `per_round` needs"),
        ({"schedule": "per_round", "student": 1.0, "per_round": (0.5, 1.5)}, r"\(0.5, 1.5\).*in \[0, 1\]"),
    ],
)
def test_a_bad_prior_is_refused_with_its_value_and_the_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Beta(**settings)
