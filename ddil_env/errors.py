"""Errors that callers tell apart, and the check of a setting that takes one of several names."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor

BROKEN_ACTIONS = "actions with NaN or infinite values in {} running environments; look at the policy, its weights or its dtype"
BROKEN_LATENTS = "the network produced non-finite values (NaN or infinite) in {} samples; check its weights or dtype"


class NoDataError(ValueError):
    """An expert that has no data was asked for some."""


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuses a tensor with NaN or infinite values.

    Args:
        tensor: Any tensor.
        what: The message, from the tensor's name to the cure, with {} for the number of its samples that hold such values.

    Raises:
        ValueError: it holds some.
    """
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise ValueError(what.format(f"{int((~finite).flatten(1).any(1).sum())} of {len(tensor)}"))


def check_whole(name: str, value: object, low: int, high: int | None = None, why: str = "") -> None:
    """Refuses what is not a whole number of a range. NumPy's integers are whole numbers, True and 2.0 are not.

    Args:
        name: What the message calls the setting.
        value: The value given.
        low, high: The range, its ends included; None: without an upper end.
        why: Ends the message.

    Raises:
        ValueError: another value.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ValueError(
            f"{name}={value!r}: need a whole number " + (f"of at least {low}" if high is None else f"from {low} to {high}") + why
        )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuses a value that is not among the choices.

    Args:
        name: What the message calls the setting.
        value: The value given.
        choices: A Literal type, or the names themselves.

    Raises:
        ValueError: another value.
    """
    allowed: Iterable[Any] = get_args(choices) or tuple(choices)
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(map(str, allowed))}")
