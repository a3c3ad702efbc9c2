"""Settings held against type hints, and what is said of one that does not fit: the setting, its value, and what it takes.

jsonargparse reads and converts them. Its error messages are for programmers, and change: where it refuses a command line, each
setting that was given is tried against its own type hint, and the message is made of the hint and the value.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from argparse import Action
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

T = TypeVar("T")

ALONE = object()  # the value of a flag that is given none

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a setting's help is the text below it

WORDS = {
    bool: ("true or false", "true or false each"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    dict: ("a mapping", "mappings"),
    NoneType: ("null", "null each"),
    PositiveInt: ("a whole number from 1", "whole numbers from 1"),
}


def describe(hint: Any, several: bool = False) -> str:
    """What a setting of that type hint takes, in words: `a whole number`; with `several`, in the plural."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(option, several) for option in inner)
    if origin is Literal:
        return f"{'' if several else 'one of '}{', '.join(map(str, inner))}"
    if origin in (tuple, list):
        if origin is tuple and inner[-1] is not Ellipsis:
            number = {2: "two"}.get(len(inner), str(len(inner)))
            return f"{number} {describe(inner[0], True)}, such as {json.dumps([1, 5, 9][: len(inner)])}"
        return f"a list of {describe(inner[0], True)}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(field.name for field in dataclasses.fields(hint))}"
    return WORDS.get(origin or hint, (getattr(hint, "__name__", str(hint)),) * 2)[several]


def as_text(value: Any) -> str:
    """A value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def fits(value: Any, hint: Any) -> bool:
    """Whether jsonargparse takes the value for a setting of that type hint."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_args([f"--value={as_text(value)}"])
    except ArgumentError:
        return False
    return True


def check(name: str, value: Any, hint: Any) -> None:
    """Holds a value against its type hint, a mapping of settings one by one.

    Raises:
        ValueError: names the setting, its value, and what it takes; or an unknown setting, with those that look like it.
    """
    nested = dataclass_of(hint)
    if nested is not None and isinstance(value, dict):
        hints = get_type_hints(nested)
        for key, inner in value.items():
            if key not in hints:
                refuse_unknown(f"{name}.{key}", [f"{name}.{known}" for known in hints])
            check(f"{name}.{key}", inner, hints[key])
    elif not fits(value, hint):
        raise ValueError(f"{name}={as_text(value)}: need {describe(hint)}")


def dataclass_of(hint: Any) -> type | None:
    """The dataclass that a type hint names, alone or beside null."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def refuse_unknown(name: str, known: list[str], flag: str = "") -> NoReturn:
    """Raises a ValueError that names an unknown setting, and the known ones that look like it."""
    close = difflib.get_close_matches(name, known, n=3)
    meant = f"did you mean {' or '.join(flag + one for one in close)}? --help lists them all" if close else "--help lists them all"
    raise ValueError(f"unknown {'flag' if flag else 'setting'} {flag}{name}; {meant}")


def type_hint(action: Action) -> Any:
    """The type hint of a parser's argument, None where it has none."""
    return getattr(action, "_typehint", None)


def given_flags(argv: list[str]) -> Iterator[tuple[str, Any]]:
    """Name and value of each flag: `ALONE` where it has none, a list where several words follow.

    Raises:
        ValueError: a word that belongs to no flag.
    """
    i = 0
    while i < len(argv):
        if not argv[i].startswith("--"):
            raise ValueError(f"{argv[i]!r} belongs to no flag; settings are given as --name VALUE")
        name, joined, value = argv[i][2:].partition("=")
        i += 1
        words = [value] if joined else []
        while not joined and i < len(argv) and not argv[i].startswith("--"):
            words.append(argv[i])
            i += 1
        read = [_loaded(word) for word in words]
        yield name, ALONE if not read else read[0] if len(read) == 1 else read


def nested_flags(argv: list[str]) -> dict[str, Any]:
    """The flags of a command line as a config file holds them: --beta.student 1 is {beta: {student: 1}}."""
    nested: dict[str, Any] = {}
    for name, value in given_flags(argv):
        value = True if value is ALONE else value
        *outer, last = name.split(".")
        place = nested
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                break
        else:
            place[last] = place[last] | value if isinstance(value, dict) and isinstance(place.get(last), dict) else value
    return nested


def _loaded(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def read_arguments(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """What a command line says; a flag that takes true or false means true if it stands alone.

    Raises:
        ValueError: a setting that does not fit, or an unknown flag, with those that look like it.
    """
    parser.exit_on_error = False
    for action in parser._actions:
        if type_hint(action) is bool:
            action.nargs, action.const = "?", True
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        actions = {action.dest: action for action in parser._actions}
        for name, value in given_flags(argv):
            if name == "config":
                content = value if isinstance(value, dict) else yaml.safe_load(Path(value).read_text())
                for key, inner in _leaves(content, actions):
                    _check_setting(key, inner, actions)
            else:
                _check_setting(name, value, actions, "--")
        raise ValueError(str(error)) from error  # one that no single setting is to blame for


def _leaves(content: dict[str, Any], actions: dict[str, Action], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a nested mapping by dotted name, as deep as the parser has names of its own."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in actions):
            yield from _leaves(value, actions, f"{name}.")
        else:
            yield name, value


def _check_setting(name: str, value: Any, actions: dict[str, Action], flag: str = "") -> None:
    """Holds one setting against the parser's argument of that name, or against the mapping that it is a part of."""
    if name in actions:
        action = actions[name]
        hint = Literal[tuple(action.choices)] if action.choices is not None else type_hint(action)
        several = isinstance(action.nargs, str) and action.nargs in "+*"
        group = [known for known in actions if known.startswith(f"{name}.")]
        if value is ALONE and hint is not bool and action.nargs != 0:
            raise ValueError(f"{flag}{name} needs a value" + (f": {describe(hint)}" if hint is not None else ""))
        if hint is None and group:
            value = yaml.safe_load(Path(value).read_text()) if isinstance(value, str) and Path(value).is_file() else value
            if not isinstance(value, dict):
                inner = ", ".join(known.removeprefix(f"{name}.") for known in group)
                raise ValueError(f"{name}={as_text(value)}: need a mapping of {inner}, or a YAML file of them; or give --{group[0]}")
            for key, one in value.items():
                _check_setting(f"{name}.{key}", one, actions)
        elif hint is not None and value is not ALONE:
            for one in value if several and isinstance(value, list) else [value]:
                check(name, one, hint)
        return
    outer, _, inner = name.partition(".")
    hint = type_hint(actions[outer]) if outer in actions else None
    if get_origin(hint) is dict:
        return  # what such a mapping may hold, its reader says
    if inner and dataclass_of(hint) is not None:
        check(outer, {inner: value}, hint)
        return
    refuse_unknown(name, [known for known in actions if known not in ("help", "print_config")], flag)


def build(of: type[T], settings: Namespace | dict[str, Any]) -> T:
    """A dataclass of settings that have been read, with the dataclasses inside.

    Raises:
        ValueError: what one of them refuses.
    """
    given, hints = dict(vars(settings) if isinstance(settings, Namespace) else settings), get_type_hints(of)
    for name in given:
        nested = dataclass_of(hints[name])
        if nested is not None and isinstance(given[name], Namespace | dict):
            given[name] = build(nested, given[name])
    return of(**given)


def check_types(of: type, method: str, options: dict[str, Any]) -> None:
    """Holds keyword arguments against the type hints of a method, those that it has.

    Raises:
        ValueError: names the argument, its value, and what it takes.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_method_arguments(of, method, fail_untyped=False)
    for action in parser._actions:
        if action.dest in options and type_hint(action) is not None:
            check(action.dest, options[action.dest], type_hint(action))
