"""`--help`: a short usage, the flags that most people need first, the others by topic, each with the default that it has here."""

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

OF_THE_LIBRARY = ("help", "config", "print_config")
INDENT = 34  # columns of flags, before what they do
METAVARS = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT", dict: "MAPPING", tuple: "LIST", list: "LIST"}

FIRST = (
    *("env", "out", "resume", "config", "device", "data", "num_updates", "num_steps", "beta.forward", "beta.teacher", "beta.student"),
    *("batch_size", "learning_rate", "guidance_scale", "seed", "evaluate.n"),
)
TOPICS: dict[str, tuple[str, ...]] = {  # names, and beginnings of names that end in a dot; None of them twice
    "most used": FIRST,
    "teacher and student": ("teacher_steps", "grid", "guidance_range", "student", "init", "stages"),
    "states that are trained on": (
        *("beta.", "p_expert", "states_per_rollout", "collect_size", "updates_per_collect", "capacity", "student_collections"),
        "prioritised",
    ),
    "this method": (),  # what no other topic has
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
    """A flag as its help shows it; without a default `default` is empty."""

    name: str
    takes: str
    does: str
    default: str = ""

    def lines(self, width: int) -> str:
        """Its lines of help, at most so many columns wide."""
        left = f"  --{self.name} {self.takes}".rstrip()
        does = f"{self.does} ({self.default})".strip() if self.default else self.does
        right = textwrap.wrap(does, max(width - INDENT, 30), break_long_words=False, break_on_hyphens=False)
        head = f"{left:<{INDENT}}" if len(left) < INDENT - 1 else f"{left}\n{'':{INDENT}}"
        return head + f"\n{'':{INDENT}}".join(right)


def metavar(hint: Any) -> str:
    """What a flag of that type hint takes, in a word: INT; {a, b} for choices."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return next(metavar(option) for option in inner if option is not NoneType)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return METAVARS[dict]
    return next((word for kind, word in METAVARS.items() if isinstance(origin or hint, type) and issubclass(origin or hint, kind)), "TEXT")


def shown(value: Any) -> str:
    """A default as a command line would give it."""
    value = value.as_dict() if isinstance(value, Namespace) else list(value) if isinstance(value, tuple) else value
    return str(value) if isinstance(value, float) else as_text(value)


def flags_of(parser: ArgumentParser, values: Namespace) -> list[Flag]:
    """The flags of a parser with the values that they have here, those of optional dataclasses behind the flag of the whole.

    Args:
        parser: Whose.
        values: What it reads where none of them is given.
    """
    found = []
    actions = [action for action in parser._actions if action.help != SUPPRESS and action.dest.rpartition(".")[2] not in OF_THE_LIBRARY]
    for action in actions:
        name, hint, does = action.dest, type_hint(action), " ".join((action.help or "").split())
        if any(other.dest.startswith(f"{name}.") for other in actions):
            continue  # a group's own flag, for a file of its settings
        hint = Literal[tuple(action.choices)] if action.choices is not None else hint
        takes = f"{metavar(hint)} …" if action.nargs == "+" else metavar(hint)
        value = values.get(name)
        found.append(Flag(name, takes, does, "required" if action.required else f"default: {shown(value)}"))
        if (nested := dataclass_of(hint)) is not None:
            inner = ArgumentParser()
            inner.add_class_arguments(nested, name)
            found += flags_of(inner, Namespace(**{name: value}) if isinstance(value, Namespace) else inner.get_defaults())
    return found


def help_text(usage: str, about: str | None, flags: list[Flag], topics: dict[str, tuple[str, ...]]) -> str:
    """The whole of a command's help.

    Args:
        usage: A line or two.
        about: The module's docstring.
        flags: In any order.
        topics: Names, and beginnings of names that end in a dot, by title, in order; what none of them has goes where there are none.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    left = {flag.name: flag for flag in flags}
    parts: dict[str, list[Flag]] = {}
    for title, wanted in topics.items():
        parts[title] = []
        for one in wanted:
            taken = [name for name in left if name == one or (one.endswith(".") and name.startswith(one) and name not in FIRST)]
            parts[title] += [left.pop(name) for name in taken]
    for title, wanted in topics.items():
        if not wanted:
            parts[title] += left.values()
    groups = [f"{title}:\n" + "\n".join(flag.lines(width) for flag in own) for title, own in parts.items() if own]
    paragraphs = [
        part if any(line.startswith(" ") for line in part.splitlines()) else textwrap.fill(part, width)
        for part in (about or "").strip().split("\n\n")
    ]
    return "\n\n".join([f"usage: {usage}", *paragraphs, *groups])


def help_of(parser: ArgumentParser, usage: str, first: tuple[str, ...]) -> str:
    """The help of a command whose flags are in one list, with a few of them first; its --config and --print_config are jsonargparse's."""
    config = next(action.help or "" for action in parser._actions if action.dest == "config")
    own = [
        Flag("config", "NAME|FILE", config),
        Flag("help", "", "this text"),
        Flag("print_config", "", "print all settings as YAML, and end"),
    ]
    topics = {"most used": first, "others": (), "about the command": ("help", "print_config")}
    return help_text(f"{parser.prog} {usage}", parser.description, [*own, *flags_of(parser, parser.get_defaults())], topics)


def show_help(parser: ArgumentParser, agent: type[Agent], env: str | None, files: list[Path], values: Namespace) -> NoReturn:
    """Prints the help of an agent's command and ends the process.

    Args:
        parser: The command's.
        agent: Whose it is.
        env: Name of the env, None where none is given.
        files: Settings that are over the agent's own defaults.
        values: The defaults as they all make them.
    """
    presets = ", ".join(preset_names(agent.name))
    own = [
        Flag("env", "NAME|FILE", f"the expert: {', '.join(preset_names('env'))}; or a YAML file of your own"),
        Flag("resume", "DIR", "go on with the run in this directory, instead of a new one"),
        Flag("config", "NAME|FILE", f"settings over the defaults: {presets + '; or ' if presets else ''}a YAML file"),
        Flag("help", "", "this text; with --env and --config its defaults are theirs"),
        Flag("print_config", "", "print all settings as a YAML file for --config, and end"),
    ]
    flags = [flag for flag in flags_of(parser, values) if env is not None or not flag.name.startswith("env.")]
    names = {flag.name for flag in flags}
    if "env.device" in names:
        own.append(Flag("device", "TEXT", "the same as --env.device", f"default: {shown(values.env.device)}"))
    if "env.data" in names or env is None:
        own.append(Flag("data", "FOLDER", "pictures with captions to train on; the same as --env.data", "default: null"))
    places = [str(path.relative_to(config_dir())) if path.is_relative_to(config_dir()) else str(path) for path in files]
    over = f", with the settings of {', '.join(places)}" if places else ""
    told = f"Defaults are those of {f'--env {env}' if env else 'any env; pass --env NAME to see its own, and its flags'}{over}."
    usage = f"{parser.prog} --env NAME [--config NAME|FILE] [--out DIR] [--SETTING VALUE …]\n       {parser.prog} --resume DIR"
    print(help_text(usage, f"{(parser.description or '').strip()}\n\n{told}", [*own, *flags], TOPICS))
    raise SystemExit(0)
