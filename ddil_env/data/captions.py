"""Reads captions and prompts."""

from __future__ import annotations

import json
from typing import Any

MISSING = {"None", "nan", "NaN", "null"}  # how programs write that there is no text


def read_json(text: str) -> Any:
    """Reads JSON in which no key stands twice: one of two texts would be dropped.

    Raises:
        ValueError: it is no JSON, or a key stands twice.
    """

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"a key of {', '.join(key for key, _ in pairs)} stands twice")
        return values

    return json.loads(text, object_pairs_hook=as_dict)


def read_caption(value: object) -> str:
    """Reads a caption, with its white space collapsed; of a list of captions the first that is not empty.

    Args:
        value: The text, or what JSON holds in its place.

    Raises:
        ValueError: the value is not a string, is empty, is a missing-value placeholder, or contains an unpaired surrogate.
    """
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = next((each for each in value if each.strip()), "")
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is not a string")
    caption = " ".join(value.split())
    if not caption:
        raise ValueError("the text is empty")
    if caption in MISSING:
        raise ValueError(f"the text {caption!r} is a missing-value placeholder")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {caption!r:.60} contains an unpaired surrogate, {caption[error.start]!r}") from error
    return caption
