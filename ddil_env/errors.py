"""Errors that callers tell apart, and the check of a setting that takes one of several names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args


class NoDataError(ValueError):
    """An expert that has no data was asked for some."""


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
