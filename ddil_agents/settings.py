"""Settings held against type hints, and what is said of one that does not fit: the setting, its value, and what it takes."""

from __future__ import annotations

import difflib
import re
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a setting's help is the text below it

WORDS = {
    "<class 'bool'>": "true or false",
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
    "<class 'tuple'>": "a list",
    "<class 'NoneType'>": "null",
    "<class 'jsonargparse.typing.PositiveInt'>": "a whole number from 1",
    "PositiveInt": "a whole number from 1",
    "tuple[float, float]": "two numbers, such as [1, 5]",
}


def in_words(message: str) -> str:
    """jsonargparse's account of a setting that does not fit, in one line; of an error of our own in it, that; else the message as it is."""
    named = re.match(r'Parser key "([^"]+)":\s*', message)
    account = message[named.end() :] if named else message
    if one := re.fullmatch(r"Expected an? (.+)\. Got value: (.*)", account, re.DOTALL):
        kinds, value = [one[1]], one[2]
    elif one := re.fullmatch(r"Not of type (\w+): (?:invalid literal .*: '(.*)'|(.*) does not conform .*)", account, re.DOTALL):
        kinds, value = [one[1]], one[2] or one[3]
    elif union := re.search(r"Subtypes: \[(.*?)\]\n\s*Errors:\n(.*)\n\s*Given value type:.*?\n\s*Given value: (.*)", account, re.DOTALL):
        errors = [line.strip(" -") for line in union[2].splitlines()]
        if own := [error for error in errors if not error.startswith(("Expected a", "Not of type"))]:
            return own[0]
        kinds, value = re.split(r", (?![^\[]*\])", union[1]), union[3]
    else:
        return message
    return f"{f'{named[1]}=' if named else ''}{value}: need {' or '.join(map(_word, kinds))}"


def _word(kind: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {choices[1].replace(chr(39), '')}"
    return WORDS.get(kind, kind)


def read_arguments(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """What a command line says; a flag that takes true or false means true if it stands alone.

    Raises:
        ValueError: a setting that does not fit, or an unknown flag, with those that look like it.
    """
    parser.exit_on_error = False
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        unknown = re.findall(r"unrecognized arguments: (--[\w.]+)", str(error))
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0], flags, n=3) if unknown else []
        meant = f"; did you mean {' or '.join(close)}? --help lists them all" if close else ""
        raise ValueError(f"{in_words(str(error))}{meant}") from error


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
