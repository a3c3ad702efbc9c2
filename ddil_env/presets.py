"""Loads an expert by preset name, YAML file, class path or entry point.

A preset is a YAML file that holds `expert: CLASS` and that class's keyword arguments. CLASS is a dotted path
(`my_pkg.MyExpert`) or a name that an installed package registers in the entry-point group `ddil.experts`.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from ddil_env.errors import check_whole
from ddil_env.expert import Expert


def config_dir() -> Path:
    """The folder of presets: inside the package in a wheel, beside it in a source checkout."""
    package = Path(__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def preset_names(group: str) -> list[str]:
    """Names of the presets of one group (`env`, `dagger`, …), sorted."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def find_preset(group: str, name: str) -> Path:
    """The YAML file of a preset name, or of a path to one.

    Raises:
        ValueError: neither a preset nor a file.
    """
    path = config_dir() / group / f"{name}.yaml"
    if "/" not in name and path.is_file():
        return path
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ValueError(f"no file {name!r} in {Path.cwd()}; pass the path of a YAML file, or one of: {', '.join(preset_names(group))}")
    others = [folder.name for folder in sorted(config_dir().iterdir()) if folder.name != "learner" and (folder / f"{name}.yaml").is_file()]
    whose = f" {name!r} is a preset of {', '.join(others)}." if others and "/" not in name else ""
    raise ValueError(f"unknown {group} {name!r}; presets: {', '.join(preset_names(group)) or 'none'}. Or pass a YAML path.{whose}")


LARGEST = 100_000  # values in a YAML file


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML's parsers keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice; remove one of them", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _size(value: Any, known: dict[int, int]) -> int:
    """The number of values in nested lists and mappings, of which YAML's aliases repeat some; each is looked at once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = LARGEST + 1  # of one that holds itself
        known[id(value)] = 1 + sum(_size(item, known) for item in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _with_null(value: Any) -> str | None:
    """A text with a null character, in nested lists and mappings; None if there is none."""
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return next((found for item in inner if (found := _with_null(item)) is not None), None)
    return value if isinstance(value, str) and "\0" in value else None


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        ValueError: the file is not YAML, holds something else than a mapping, or a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if _size(content, {}) > LARGEST:
        raise ValueError(f"{path} unfolds to more than {LARGEST:,} values by its aliases; write out what you need")
    if (null := _with_null(content)) is not None:
        raise ValueError(f"{path}: {null!r} holds a null character, which no path or setting may; remove it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, but a config is a mapping of `name: value` lines")
    return content


def read_env(name: str) -> dict[str, Any]:
    """Reads an env preset: `expert` and its keyword arguments.

    Raises:
        ValueError: there is no such preset, it is malformed, or it has no `expert`.
    """
    path = find_preset("env", name)
    preset = read_yaml(path)
    if not isinstance(preset.get("expert"), str):
        raise ValueError(f"{path} names no expert: it needs a line `expert: package.module.ClassName`")
    return preset


def find_expert(name: str) -> type[Expert]:
    """Finds the expert class of a dotted path or an entry point.

    Raises:
        ValueError: there is none, or it is no complete subclass of Expert.
    """
    registered = {point.name: point for point in entry_points(group="ddil.experts")}
    if name in registered:
        found = registered[name].load()
    else:
        module_name, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            known = ", ".join(sorted(registered)) or "none"
            cause = f" ({error})" if module_name else ""
            raise ValueError(
                f"cannot find expert {name!r}{cause}; pass a dotted path such as my_pkg.MyExpert, or the entry point of a package that is "
                f"installed: {known}"
            ) from error
    if not (inspect.isclass(found) and issubclass(found, Expert)):
        raise ValueError(f"{name!r} is not a subclass of ddil_env.Expert; derive the class from it, or pass another path")
    if inspect.isabstract(found):
        raise ValueError(f"{name!r} lacks {', '.join(sorted(found.__abstractmethods__))}; implement it")
    return found


def load_expert(env: str | Expert, **overrides: Any) -> Expert:
    """Loads an expert.

    Args:
        env: A preset of configs/env, a path to a YAML file, or an Expert, which is returned as it is.
        overrides: Keyword arguments of the expert's class, which override the preset's.

    Raises:
        ValueError: an unknown preset or class, arguments that the class does not take, or what its constructor refuses.
    """
    if isinstance(env, Expert):
        if overrides:
            raise ValueError(f"overrides {sorted(overrides)} cannot change an expert that exists already; pass them to its constructor")
        return env
    if not isinstance(env, str | Path):
        raise ValueError(f"env={env!r:.60}: need an Expert, or the name of a preset: {', '.join(preset_names('env'))}")
    preset = read_env(str(env)) | overrides
    return make_expert(preset.pop("expert"), **preset)


def make_expert(name: str, **kwargs: Any) -> Expert:
    """Builds the expert class `name` (a dotted path or an entry point) with its keyword arguments.

    Raises:
        ValueError: as in `find_expert`, or an argument that the class does not take.
    """
    cls = find_expert(name)
    try:
        inspect.signature(cls).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; it takes {', '.join(inspect.signature(cls).parameters)}") from error
    expert = cls(**kwargs)
    if not hasattr(expert, "schedule"):
        raise ValueError(f"{name}.__init__ does not call super().__init__(schedule, sample_shape, …): add it as its first line")
    if not callable(getattr(expert.support, "project", None)):
        raise ValueError(f"support of {name} is a {type(expert.support).__name__}; need one of ddil_env.support, or leave it out")
    if expert.max_batch is not None:
        check_whole(f"max_batch of {name}", expert.max_batch, 1)
    return expert
