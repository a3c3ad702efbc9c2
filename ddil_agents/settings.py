"""Checks settings against their type hints; an error names the setting, its value, and the values that it accepts.

jsonargparse reads and converts settings. Its error messages are written for programmers and differ between versions. When it refuses a
command line, each given setting is therefore checked against its own type hint, and the message is made from the hint and the value.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import re
from argparse import Action
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

from ddil_agents.flags import NO_VALUE, Words, inline_configs, iter_flags

T = TypeVar("T")


class UnknownSettingError(ValueError):
    """There is no such setting.

    Args:
        message: The message.
        setting: The setting's name.
    """

    def __init__(self, message: str, setting: str) -> None:
        super().__init__(message)
        self.setting = setting


set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a setting's help is the docstring below it

DESCRIPTIONS = {  # of a type, in the singular and in the plural
    bool: ("true or false", "true or false each"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    dict: ("a mapping", "mappings"),
    torch.device: ("a device", "devices"),
    NoneType: ("null", "null each"),
    PositiveInt: ("a whole number from 1", "whole numbers from 1"),
}


def describe(hint: Any, several: bool = False) -> str:
    """Describes the values that a type hint accepts, such as `a whole number`; with `several`, in the plural."""
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
    if is_class(hint):
        name, path = hint.__name__, f"my_pkg.My{hint.__name__}"
        return f"class paths of subclasses of {name}, such as [{path}]" if several else f"the class path of a {name}, such as {path}"
    return DESCRIPTIONS.get(origin or hint, (getattr(hint, "__name__", str(hint)),) * 2)[several]


def is_class(hint: Any) -> bool:
    """Whether a type hint stands for a class whose subclasses are given by their class paths."""
    plain = hint is Any or hint in DESCRIPTIONS or dataclasses.is_dataclass(hint)
    return isinstance(hint, type) and get_origin(hint) is None and not plain


def why_not_class(value: Any, hint: Any) -> str:
    """Why a value is no class path of the class in a type hint, in parentheses; empty where the hint has none, or it is not known."""
    base: Any = next((option for option in (hint, *get_args(hint)) if is_class(option)), None)
    for item in (value if isinstance(value, list) else [value]) if base is not None else ():
        path, arguments = (item.get("class_path"), item.get("init_args") or {}) if isinstance(item, dict) else (item, {})
        module, _, name = str(path).rpartition(".")
        if not module:
            return f" ({path} is no class path)"
        try:
            found = getattr(importlib.import_module(module), name)
            if not (isinstance(found, type) and issubclass(found, base)):
                return f" ({path} is none)"
            inspect.signature(found).bind(**arguments)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            return f" ({path}: {error})"
    return ""


def as_text(value: Any) -> str:
    """Formats a value as a command line would give it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def is_accepted(value: Any, hint: Any) -> bool:
    """Whether jsonargparse accepts the value for a setting of this type hint."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_args([f"--value={as_text(value)}"])
    except ArgumentError:
        return False
    return True


def check_setting(name: str, value: Any, hint: Any) -> None:
    """Checks a value against its type hint; of a mapping for a dataclass, each entry.

    Raises:
        ValueError: the value does not fit, or the mapping has an unknown setting; the message suggests known settings with similar names.
    """
    nested = dataclass_of(hint)
    if nested is not None and isinstance(value, dict):
        hints = get_type_hints(nested)
        for key, inner in value.items():
            if key not in hints:
                refuse_unknown(f"{name}.{key}", [f"{name}.{known}" for known in hints])
            check_setting(f"{name}.{key}", inner, hints[key])
    elif not is_accepted(value, hint):
        raise ValueError(f"{name}={as_text(value)}: need {describe(hint)}{why_not_class(value, hint)}")


def dataclass_of(hint: Any) -> type | None:
    """The dataclass in a type hint such as `Beta` or `LoRA | None`; None if there is none."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def refuse_unknown(name: str, known: list[str], flag: str = "") -> NoReturn:
    """Raises an error about an unknown setting, with the known settings of similar names.

    Args:
        name: The unknown setting.
        known: The names of all settings.
        flag: `--`, if the setting was given as a flag.

    Raises:
        UnknownSettingError: always.
    """
    similar = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(flag + each for each in similar)}? --help lists them all" if similar else "--help lists them all"
    raise UnknownSettingError(f"unknown {'flag' if flag else 'setting'} {flag}{name}; {hint}", name)


def type_hint(action: Action | None) -> Any:
    """The type hint of a parser's argument, or None."""
    return getattr(action, "_typehint", None)


def read_arguments(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parses a command line; a flag for true or false means true without a value.

    Raises:
        ValueError: a value does not fit its setting, a file of settings cannot be read, or a flag is unknown; the message suggests flags
            with similar names.
    """
    parser.exit_on_error = False
    for action in parser._actions:
        if type_hint(action) is bool:
            action.nargs, action.const = "?", True
    if null := next((word for word in argv if "\0" in word), None):
        raise ValueError(f"{null!r} holds a null character, which no path or setting may; remove it")
    argv = list(inline_configs(argv))
    flags = list(iter_flags(argv))
    actions = {action.dest: action for action in parser._actions}
    try:
        cfg = parser.parse_args(argv)
    except ArgumentError as error:
        for name, value in flags:
            if name == "config" and isinstance(value, dict):
                for key, inner in _leaves(value, actions):
                    _check_flag(key, inner, actions)
            else:
                _check_flag(name, value, actions, "--")
        raise ValueError(explain(error, actions)) from error  # the error is not about a single setting
    for name, action in actions.items():  # of a config file; jsonargparse takes null for anything
        *outer, last = name.split(".")
        group, hint = cfg.get(".".join(outer)) if outer else cfg, type_hint(action)
        is_null = isinstance(group, Namespace) and group.get(last, 0) is None and action.default is not None and hint is not None
        if is_null and not is_accepted(None, hint):
            raise ValueError(f"{name}=None: need {describe(hint)}")
    return cfg


def explain(error: ArgumentError, actions: dict[str, Action]) -> str:
    """What an error of jsonargparse says, in one line that names the setting, its value and what it accepts."""
    text = str(error)
    if required := re.search(r"arguments are required: (.+)", text):
        names = required[1].split(", ")
        return "; ".join(f"--{name} is missing: {getattr(actions.get(name), 'help', None) or 'it needs a value'}" for name in names)
    key, value = re.search(r'(?:key|option) "([^"]+)"', text), re.search(r"(?:Given|Got) value: (.*)", text)
    hint = type_hint(actions[key[1]]) if key and key[1] in actions else None
    if key is None or value is None or hint is None:
        return " ".join(text.split())
    quotes = " (in quotes, where YAML would read a number)" if str in (hint, *get_args(hint)) else ""
    return f"{key[1]}={value[1]}: need {describe(hint)}{quotes}"


def _leaves(content: dict[str, Any], actions: dict[str, Action], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings of a nested mapping by dotted name, down to the level at which the parser has arguments."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in actions):
            yield from _leaves(value, actions, f"{name}.")
        else:
            yield name, value


def _check_flag(name: str, value: Any, actions: dict[str, Action], flag: str = "") -> None:
    """Checks one setting against the parser's argument of this name, or against the dataclass that it is a part of."""
    if not flag and name in ("config", "help", "print_config"):
        raise ValueError(f"{name}={as_text(value)}: it is a flag of the command line, not a setting; remove it from the file")
    if name in actions:
        action = actions[name]
        hint = Literal[tuple(action.choices)] if action.choices is not None else type_hint(action)
        takes_several = isinstance(action.nargs, str) and action.nargs in "+*"
        group = [known for known in actions if known.startswith(f"{name}.")]
        if isinstance(value, Words) and not takes_several:
            words = " ".join(map(as_text, value))
            raise ValueError(f"{flag}{name} takes one value, and {len(value)} follow it: {words}; put a value with spaces in quotes")
        if value is NO_VALUE and hint is not bool and action.nargs != 0:
            raise ValueError(f"{flag}{name} needs a value" + (f": {describe(hint)}" if hint is not None else ""))
        if hint is None and group:
            value = yaml.safe_load(Path(value).read_text(encoding="utf-8")) if isinstance(value, str) and Path(value).is_file() else value
            if not isinstance(value, dict):
                refuse_group(name, value, group)
            for key, inner_value in value.items():
                _check_flag(f"{name}.{key}", inner_value, actions)
        elif hint is not None and value is not NO_VALUE:
            for each in value if takes_several and isinstance(value, list) else [value]:
                check_setting(name, each, hint)
        return
    outer, _, inner = name.partition(".")
    hint = type_hint(actions[outer]) if outer in actions else None
    if get_origin(hint) is dict:
        return  # the code that reads a free mapping checks its keys
    if inner and dataclass_of(hint) is not None:
        check_setting(outer, {inner: value}, hint)
        return
    refuse_unknown(name, [known for known in actions if known not in ("help", "print_config")], flag)


def refuse_group(name: str, value: Any, group: list[str]) -> NoReturn:
    """Raises an error about a value that is no mapping, of a setting that has others inside it.

    Args:
        name: The setting.
        value: Its value.
        group: The dotted names of the settings inside it.

    Raises:
        ValueError: always.
    """
    inner = ", ".join(known.removeprefix(f"{name}.") for known in group if not known.endswith(".help"))
    raise ValueError(f"{name}={as_text(value)}: need a mapping of {inner}, or a YAML file of them; or give --{group[0]}")


def build_dataclass(of: type[T], settings: Namespace | dict[str, Any]) -> T:
    """Builds a dataclass, and the dataclasses inside it, from parsed settings.

    Raises:
        ValueError: one of the dataclasses refuses its settings.
    """
    values, hints = dict(vars(settings) if isinstance(settings, Namespace) else settings), get_type_hints(of)
    for name in values:
        nested = dataclass_of(hints[name])
        if nested is not None and isinstance(values[name], Namespace | dict):
            values[name] = build_dataclass(nested, values[name])
    return of(**values)


def check_arguments(of: type, method: str, options: dict[str, Any]) -> None:
    """Checks keyword arguments against the type hints of a method.

    Args:
        of: A class.
        method: Name of its method.
        options: Keyword arguments; those without a type hint are not checked.

    Raises:
        ValueError: a value does not fit its type hint.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_method_arguments(of, method, fail_untyped=False)
    for action in parser._actions:
        if action.dest in options and type_hint(action) is not None:
            check_setting(action.dest, options[action.dest], type_hint(action))
