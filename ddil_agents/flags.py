"""Reads the words of a command line: flags, their values, and the files of --config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ddil_env.presets import read_yaml

NO_VALUE = object()  # stands for the value of a flag without one


class Words(list[Any]):
    """The values of a flag that several words follow."""


def iter_flags(argv: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields the name and value of each flag: `NO_VALUE` if no word follows it, `Words` if several do.

    Raises:
        ValueError: a word belongs to no flag.
    """
    i = 0
    while i < len(argv):
        if not argv[i].startswith("--"):
            raise ValueError(f"{argv[i]!r} belongs to no flag; settings are given as --name VALUE")
        name, equals, value = argv[i][2:].partition("=")
        i += 1
        words = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            words.append(argv[i])
            i += 1
        values = [_read_yaml_word(word) for word in words]
        yield name, NO_VALUE if not values else values[0] if len(values) == 1 else Words(values)


def nested_flags(argv: list[str]) -> dict[str, Any]:
    """Converts flags to the nested mapping of a config file: --beta.student 1 becomes {beta: {student: 1}}."""
    nested: dict[str, Any] = {}
    for name, value in iter_flags(argv):
        value = True if value is NO_VALUE else value
        *outer, last = name.split(".")
        group = nested
        for key in outer:
            group = group.setdefault(key, {})
            if not isinstance(group, dict):
                break
        else:
            group[last] = group[last] | value if isinstance(value, dict) and isinstance(group.get(last), dict) else value
    return nested


def _read_yaml_word(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def inline_configs(argv: list[str]) -> Iterator[str]:
    """Puts what the files of --config hold in the place of their paths: jsonargparse reads files in the encoding of the terminal."""
    before = ""
    for word in argv:
        flag, _, value = word.partition("=") if before != "--config" else ("--config", "", word)
        if flag == "--config" and isinstance(_read_yaml_word(value), str):
            content = yaml.safe_dump(read_yaml(Path(value)), default_flow_style=True, width=math.inf, sort_keys=False)
            yield content if before == "--config" else f"--config={content}"
        else:
            yield word
        before = word
