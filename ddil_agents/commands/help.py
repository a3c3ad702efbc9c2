"""`--help`: a short usage, then the flags by topic, the most used ones first, each with the default that it has for this env."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from argparse import SUPPRESS
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.settings import as_text, dataclass_of, type_hint
from ddil_env.presets import config_dir, preset_names

LIBRARY_FLAGS = ("help", "config", "print_config")  # jsonargparse's, which have texts of their own here
INDENT = 34  # columns of a line before the description of a flag
METAVARS = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT", dict: "MAPPING", tuple: "LIST", list: "LIST"}

FIRST = (
    *("env", "out", "resume", "config", "device", "data", "num_updates", "num_steps", "beta.forward", "beta.teacher", "beta.student"),
    *("batch_size", "learning_rate", "guidance_scale", "seed", "evaluate.n"),
)
TOPICS: dict[str, tuple[str, ...]] = {  # names of flags, or prefixes that end in a dot; each flag is shown once
    "most used": FIRST,
    "teacher and student": ("teacher_steps", "grid", "guidance_range", "student", "init", "stages"),
    "states that are trained on": (
        *("beta.", "p_expert", "states_per_rollout", "collect_size", "updates_per_collect", "capacity", "student_collections"),
        "prioritised",
    ),
    "this method": (),  # all flags that are in no other topic
    "optimisation": ("lr_scheduler", "warmup_updates", "optimizer", "weight_decay", "adam_betas", "max_grad_norm", "ema"),
    "memory and speed": ("lora", "lora.", "mixed_precision", "gradient_accumulation", "halve_batch_on_oom", "compile"),
    "reflected diffusion": ("thresholding.",),
    "evaluation": ("evaluate_every", "validation.", "evaluate."),
    "expert": ("env.",),
    "logging and sharing": ("checkpoint_every", "log_every", "callbacks", "track", "push_to_hub", "hub_private"),
    "about the command": ("help", "print_config", "agent"),
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as the help shows it.

    Attributes:
        name: Its name without dashes.
        values: The values that it accepts, such as INT.
        description: What it sets.
        default: Its default as a text, empty without one.
    """

    name: str
    values: str
    description: str
    default: str = ""

    def lines(self, width: int) -> str:
        """Formats the flag in lines of at most `width` columns."""
        left = f"  --{self.name} {self.values}".rstrip()
        text = f"{self.description} ({self.default})".strip() if self.default else self.description
        right = textwrap.wrap(text, max(width - INDENT, 30), break_long_words=False, break_on_hyphens=False)
        head = f"{left:<{INDENT}}" if len(left) < INDENT - 1 else f"{left}\n{'':{INDENT}}"
        return head + f"\n{'':{INDENT}}".join(right)


def metavar(hint: Any) -> str:
    """A word for the values that a type hint accepts, such as INT; {a,b} for choices."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return next(metavar(option) for option in inner if option is not NoneType)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return METAVARS[dict]
    return next((word for kind, word in METAVARS.items() if isinstance(origin or hint, type) and issubclass(origin or hint, kind)), "TEXT")


def format_default(value: Any) -> str:
    """Formats a default as a command line would give it."""
    value = value.as_dict() if isinstance(value, Namespace) else list(value) if isinstance(value, tuple) else value
    return str(value) if isinstance(value, float) else as_text(value)


def flags_of(parser: ArgumentParser, values: Namespace) -> list[Flag]:
    """Lists the flags of a parser; those of an optional dataclass follow the flag of the dataclass.

    Args:
        parser: The parser.
        values: The defaults, nested.
    """
    flags = []
    actions = [action for action in parser._actions if action.help != SUPPRESS and action.dest.rpartition(".")[2] not in LIBRARY_FLAGS]
    for action in actions:
        name, hint, description = action.dest, type_hint(action), " ".join((action.help or "").split())
        if any(other.dest.startswith(f"{name}.") for other in actions):
            continue  # the flag of a group, which takes a file with its settings
        hint = Literal[tuple(action.choices)] if action.choices is not None else hint
        accepted = f"{metavar(hint)} …" if action.nargs == "+" else metavar(hint)
        value = values.get(name)
        flags.append(Flag(name, accepted, description, "required" if action.required else f"default: {format_default(value)}"))
        if (nested := dataclass_of(hint)) is not None:
            inner = ArgumentParser()
            inner.add_class_arguments(nested, name)
            flags += flags_of(inner, Namespace(**{name: value}) if isinstance(value, Namespace) else inner.get_defaults())
    return flags


def group_flags(flags: list[Flag], topics: dict[str, tuple[str, ...]]) -> dict[str, list[Flag]]:
    """Sorts flags into topics.

    Args:
        flags: The flags, in any order.
        topics: By title, the names of flags, or prefixes of names that end in a dot, in order. A topic without names has all other flags.
    """
    remaining = {flag.name: flag for flag in flags}
    by_topic: dict[str, list[Flag]] = {}
    for title, patterns in topics.items():
        by_topic[title] = []
        for pattern in patterns:
            matching = [
                name for name in remaining if name == pattern or (pattern.endswith(".") and name.startswith(pattern) and name not in FIRST)
            ]
            by_topic[title] += [remaining.pop(name) for name in matching]
    for title, patterns in topics.items():
        if not patterns:
            by_topic[title] += remaining.values()
    return {title: group for title, group in by_topic.items() if group}


def help_text(usage: str, about: str | None, flags: list[Flag], topics: dict[str, tuple[str, ...]]) -> str:
    """Formats the help of a command.

    Args:
        usage: One or two lines.
        about: The description of the command, a module's docstring.
        flags, topics: As in `group_flags`.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    groups = [f"{title}:\n" + "\n".join(flag.lines(width) for flag in group) for title, group in group_flags(flags, topics).items()]
    paragraphs = [
        paragraph if any(line.startswith(" ") for line in paragraph.splitlines()) else textwrap.fill(paragraph, width)
        for paragraph in (about or "").strip().split("\n\n")
    ]
    return "\n\n".join([f"usage: {usage}", *paragraphs, *groups])


def help_of(parser: ArgumentParser, usage: str, first: tuple[str, ...]) -> str:
    """Formats the help of a command that is not an agent's.

    Args:
        parser: Its parser, which has --config and --print_config.
        usage: The usage after the program.
        first: The most used flags.
    """
    config = next(action.help or "" for action in parser._actions if action.dest == "config")
    library_flags = [
        Flag("config", "NAME|FILE", config),
        Flag("help", "", "print this text"),
        Flag("print_config", "", "print all settings as YAML and exit"),
    ]
    topics = {"most used": first, "others": (), "about the command": ("help", "print_config")}
    return help_text(f"{parser.prog} {usage}", parser.description, [*library_flags, *flags_of(parser, parser.get_defaults())], topics)


def show_help(parser: ArgumentParser, agent: type[Agent], env: str | None, files: list[Path], values: Namespace) -> NoReturn:
    """Prints the help of an agent's command and exits.

    Args:
        parser: The parser of the command.
        agent: The agent's class.
        env: Name of the env, None if none is given.
        files: The YAML files whose settings replace the agent's defaults.
        values: The resulting defaults.
    """
    presets = ", ".join(preset_names(agent.name))
    command_flags = [
        Flag("env", "NAME|FILE", f"the expert: {', '.join(preset_names('env'))}; or a YAML file of your own"),
        Flag("resume", "DIR", "continue the run in this directory, instead of starting a new one"),
        Flag("config", "NAME|FILE", f"settings that replace defaults: {presets + '; or ' if presets else ''}a YAML file"),
        Flag("help", "", "print this text, with the defaults of --env and --config if they are given"),
        Flag("print_config", "", "print all settings as a YAML file for --config and exit"),
    ]
    flags = [flag for flag in flags_of(parser, values) if env is not None or not flag.name.startswith("env.")]
    names = {flag.name for flag in flags}
    if "env.device" in names:
        command_flags.append(Flag("device", "TEXT", "the same as --env.device", f"default: {format_default(values.env.device)}"))
    if "env.data" in names or env is None:
        command_flags.append(Flag("data", "FOLDER", "pictures with captions to train on; the same as --env.data", "default: null"))
    file_names = [str(path.relative_to(config_dir())) if path.is_relative_to(config_dir()) else str(path) for path in files]
    settings = f", with the settings of {', '.join(file_names)}" if file_names else ""
    which = f"--env {env}" if env else "any env; pass --env NAME to see its own, and its flags"
    about = f"{(parser.description or '').strip()}\n\nDefaults are those of {which}{settings}."
    usage = f"{parser.prog} --env NAME [--config NAME|FILE] [--out DIR] [--SETTING VALUE …]\n       {parser.prog} --resume DIR"
    print(help_text(usage, about, [*command_flags, *flags], TOPICS))
    raise SystemExit(0)
