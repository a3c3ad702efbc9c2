"""Captions and prompts: what counts as a text."""

from __future__ import annotations

MISSING = {"None", "nan", "NaN", "null"}  # how programs write that there is no text


def read_caption(value: object) -> str:
    """Reads a caption, with its white space collapsed; of a list of captions the first that is not empty.

    Args:
        value: The text, or what JSON holds in its place.

    Raises:
        ValueError: the value is no text, is empty, stands for a missing text, or holds half a character.
    """
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = next((each for each in value if each.strip()), "")
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    caption = " ".join(value.split())
    if not caption:
        raise ValueError("the text is empty")
    if caption in MISSING:
        raise ValueError(f"the text is {caption!r}, which stands for a missing one")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {caption!r:.60} holds half a character, {caption[error.start]!r}") from error
    return caption
