"""Settings held against type hints, and what is said of one that does not fit: the setting, its value, and what it takes."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

WORDS = {
    "<class 'bool'>": "true or false",
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
    "<class 'tuple'>": "a list",
    "<class 'NoneType'>": "null",
    "tuple[float, float]": "two numbers, such as [1, 5]",
}


def in_words(message: str) -> str:
    """jsonargparse's account of a setting in one line; what it holds of our own, or is no such account, as it is."""
    name, _, account = message.rpartition('Parser key "')[2].partition('":') if message.startswith('Parser key "') else ("", "", message)
    account = account.strip()
    if one := re.fullmatch(r"Expected an? (.+)\. Got value: (.*)", account, re.DOTALL):
        kinds, value = [one[1]], one[2]
    elif several := re.search(r"Subtypes: \[(.*?)\]\n\s*Errors:\n(.*)\n\s*Given value type:.*?\n\s*Given value: (.*)", account, re.DOTALL):
        errors = [line.strip(" -") for line in several[2].splitlines()]
        if own := [error for error in errors if not error.startswith("Expected a")]:
            return own[0]
        kinds, value = re.split(r", (?![^\[]*\])", several[1]), several[3]
    else:
        return message
    return f"{name}={value}: need {' or '.join(map(_word, kinds))}"


def _word(kind: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {choices[1].replace(chr(39), '')}"
    return WORDS.get(kind, kind)


def check_types(of: type, method: str, options: dict[str, Any]) -> None:
    """Holds keyword arguments against the type hints of a method, those that it has.

    Raises:
        ValueError: names the argument, its value, and what it takes.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_method_arguments(of, method, fail_untyped=False)
    known = {action.dest for action in parser._actions}
    try:
        parser.parse_object({name: value for name, value in options.items() if name in known})
    except ArgumentError as error:
        raise ValueError(in_words(str(error))) from error
