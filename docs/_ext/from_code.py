"""What the reference takes from the code, in Markdown: the flags of the commands, and the messages of errors."""

from __future__ import annotations

import ast

from ddil_agents import advise, compare, evaluate
from ddil_agents.commands import help as help_of
from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.help import Flag
from ddil_agents.commands.parse import make_parser, parse
from ddil_agents.settings import read_arguments
from ddil_env.presets import read_env

ANY_EXPERT = "ddil_env.experts.digits.Digits"
OTHERS = {"advise": advise, "evaluate": evaluate, "compare": compare}  # commands that are not an agent's, by name


def agent_flags(agent: str, env: str | None = None) -> dict[str, list[Flag]]:
    """The flags of an agent's command by topic: those of every env, or those that one env adds.

    Args:
        agent: Name of the agent.
        env: Name of a preset of configs/env.
    """
    preset = {} if env is None else read_env(env)
    parser = make_parser(find_agent(agent), str(preset.pop("expert", ANY_EXPERT)))
    given = [f"--env.{key}={'null' if value is None else value}" for key, value in preset.items()]
    flags = help_of.flags_of(parser, read_arguments(parser, given))
    chosen = [flag for flag in flags if flag.name.startswith("env.") == (env is not None) and flag.name != "env.expert"]
    return help_of.group_flags(chosen, help_of.TOPICS)


def other_flags(command: str) -> dict[str, list[Flag]]:
    """The flags of a command that is not an agent's, by topic."""
    parser = OTHERS[command].make_parser()
    parser.set_defaults({"jobs": None} if command == "compare" else {})  # its default depends on the machine
    flags = help_of.flags_of(parser, parser.get_defaults())
    return help_of.group_flags(flags, {"most used": OTHERS[command].FIRST, "others": ()})


def flag_list(topics: dict[str, list[Flag]]) -> str:
    """Flags as definition lists in Markdown, a bold title above each topic."""
    parts = []
    for title, flags in topics.items():
        parts.append(f"**{title.capitalize()}**\n")
        for flag in flags:
            default = flag.default.removeprefix("default: ")
            shown = "" if not default or default == "required" else f" = `{default}`"
            required = " (required)" if default == "required" else ""
            parts.append(f"`--{flag.name}` *{flag.values.replace('|', ' or ')}*{shown}{required}\n: {escape(flag.description)}\n")
    return "\n".join(parts)


def escape(text: str) -> str:
    """Escapes what Markdown would read as markup, outside of backticks."""
    parts = text.split("`")
    special = str.maketrans({c: f"\\{c}" for c in "\\*_[]<>$|{}"})
    return "`".join(part if i % 2 else part.translate(special) for i, part in enumerate(parts))


def differing_settings(agent: str, env: str, config: str) -> list[list[str]]:
    """The settings that a preset changes beside the defaults of an env: name, default and the preset's value, with a head."""
    default, preset = (vars(parse(find_agent(agent), ["--env", env, *more])[1].as_flat()) for more in ([], ["--config", config]))
    names = [
        name for name in dict.fromkeys([*preset, *default]) if default.get(name) != preset.get(name) and name not in ("config", "stages")
    ]
    cells = [[f"`{name}`", *(f"`{help_of.format_default(values.get(name))}`" for values in (default, preset))] for name in names]
    return [["setting", f"`--env {env}`", f"`--config {config}`"], *cells]


def message(node: ast.expr) -> str | None:
    """The text of an error message, with … in the place of values; None if it is not written where it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values if not isinstance(part, ast.Tuple))
    return None


def error_messages(source: str) -> list[tuple[str, str]]:
    """Class and message of the errors that a file raises, in order, each message once."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name) and node.exc.args:
            text = message(node.exc.args[0])
            if text is not None and len(text.replace("…", "").split()) > 2:
                found.setdefault(text, node.exc.func.id)
    return [(kind, text) for text, kind in found.items()]
