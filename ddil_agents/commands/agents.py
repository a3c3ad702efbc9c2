"""Finding an agent's class by its name, and the command that trains it."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddil_agents.agent import Agent


def agent_names() -> list[str]:
    """Names of the agents of this package, which has a file for each, and of the entry points of installed packages."""
    package = Path(__file__).parent.parent
    ours = [path.stem for path in sorted(package.glob("*.py")) if f'\n    name = "{path.stem}"\n' in path.read_text(encoding="utf-8")]
    return ours + sorted(point.name for point in entry_points(group="ddil.agents"))


def find_agent(name: str) -> type[Agent]:
    """Finds an agent's class by its name in this package, by its class path, or by an entry point of an installed package.

    Raises:
        ValueError: there is no such agent, or it needs a package that is not installed.
    """
    registered = {point.name: point for point in entry_points(group="ddil.agents")}
    module, _, attribute = name.rpartition(".")
    found: Any = None
    try:
        if name in registered:
            found = registered[name].load()
        else:
            source = importlib.import_module(module or f"ddil_agents.{name}")
            agents = [x for x in vars(source).values() if isinstance(x, type) and vars(x).get("name") == name]
            found = getattr(source, attribute, None) if module else next(iter(agents), None)
    except TypeError:  # a name that begins with a dot
        pass
    except ImportError as error:
        if error.name is not None and error.name not in (module, module.partition(".")[0], f"ddil_agents.{name}"):
            raise ValueError(f"agent {name!r}: {error}; install it, or leave the agent out") from error
    if isinstance(found, type) and issubclass(found, Agent) and hasattr(found, "name") and hasattr(found, "Config"):
        return found
    raise ValueError(
        f"unknown agent {name!r}: choose one of {', '.join(agent_names())}, or the class path of your own, such as my_pkg.MyAgent, which "
        "has a `name` and a `Config`"
    )


def identify(agent: type[Agent]) -> str:
    """The name by which `find_agent` finds an agent: its `name` if it is of this package, else its class path, also if run as a script."""
    module = agent.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        module = main.__spec__.name if main.__spec__ is not None else Path(str(main.__file__)).stem
    return agent.name if module == f"ddil_agents.{agent.name}" else f"{module}.{agent.__qualname__}"


def command_of(agent: str) -> list[str]:
    """The arguments of `python` that run the command of an agent."""
    return ["-m", "ddil_agents", agent] if "." in agent or find_spec(f"ddil_agents.{agent}") is None else ["-m", f"ddil_agents.{agent}"]
