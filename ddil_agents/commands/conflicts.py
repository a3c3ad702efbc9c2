"""Refuses settings that would not hold, and says whose a setting is that an agent does not have."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.commands.agents import agent_names, command_of, find_agent, identify
from ddil_agents.settings import UnknownSettingError, refuse_group, type_hint
from ddil_env.presets import preset_names, read_env


@contextmanager
def name_owners(agent: type[Agent]) -> Iterator[None]:
    """Adds to an error about a setting that an agent does not have which agents have it, or which presets' experts.

    Args:
        agent: The agent's class.

    Raises:
        ValueError: the error, with that in it.
    """
    try:
        yield
    except UnknownSettingError as error:
        outer, _, inner = error.setting.partition(".")
        owners = experts_with(inner) if outer == "env" else agents_with(outer)
        owners = [] if agent.name in owners else owners  # what is unknown is inside the setting
        what = "an argument of the experts of" if outer == "env" else "a setting of"
        raise ValueError(f"{error}; it is {what} {', '.join(owners)}" if owners else str(error)) from error


def agents_with(setting: str) -> list[str]:
    """Names of the agents whose config has a setting."""
    found = []
    for name in agent_names():
        with suppress(ValueError):  # of a package that is not installed
            found += [name] if setting in {field.name for field in fields(find_agent(name).Config)} else []
    return found


def experts_with(argument: str) -> list[str]:
    """Names of the presets that have a value for an argument of their experts."""
    return [name for name in preset_names("env") if argument in read_env(name)]


def check_agent_name(agent: type[Agent], layers: list[dict[str, Any]]) -> None:
    """Refuses settings that name another agent than the one whose command it is.

    Args:
        agent: The agent's class.
        layers: Nested settings.

    Raises:
        ValueError: one of them names another agent.
    """
    for layer in layers:
        if (name := layer.get("agent", identify(agent))) != identify(agent):
            other = f"; for {name} run {shlex.join(['python', *command_of(name)])}" if name in agent_names() else ""
            raise ValueError(f"agent={name}: need one of {identify(agent)}, whose command this is{other}")


def check_groups(content: dict[str, Any], parser: ArgumentParser) -> None:
    """Refuses a value of a config file that is no mapping where settings have others inside them; jsonargparse would ignore it.

    Args:
        content: What the file holds.
        parser: The parser of the settings.

    Raises:
        ValueError: there is such a value.
    """
    actions = {action.dest: action for action in parser._actions}
    for name, value in content.items():
        group = [known for known in actions if known.startswith(f"{name}.")]
        is_file = isinstance(value, str) and Path(value).is_file()
        if group and type_hint(actions.get(name)) is None and not isinstance(value, dict) and not is_file:
            refuse_group(name, value, group)


def check_typed(typed: dict[str, Any], cfg: Namespace) -> None:
    """Refuses flags that something else in the settings would override.

    Args:
        typed: The flags of the command line, nested.
        cfg: All settings.

    Raises:
        ValueError: every stage has a value of its own for a flag, or the agent has a guidance scale of its own.
    """
    stages = [] if "stages" in typed else getattr(cfg, "stages", None) or []
    for key in typed:
        if any(key in stage for stage in stages):
            raise ValueError(
                f"--{key} would not hold: the {len(stages)} stages of this config set it themselves; pass --stages null for one stage, or "
                "a --config of your own stages (--print_config writes these)"
            )
    own, of_env = getattr(cfg, "guidance_scale", None), typed.get("env", {}).get("guidance_scale")
    if own is not None and of_env is not None and "guidance_scale" not in typed and own != of_env:
        raise ValueError(
            f"--env.guidance_scale {of_env} would not hold: training uses guidance_scale={own:g}; pass --guidance_scale {of_env}"
        )
