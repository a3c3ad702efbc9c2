"""Errors that callers tell apart, and the check of a setting that takes one of several names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor

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
