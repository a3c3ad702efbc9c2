"""From a command line to an expert and a config."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from ddil_agents.agent import Agent
from ddil_agents.config import LearnerConfig
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.settings import build, read_arguments
from ddil_agents.training.tracking import Tracker
from ddil_env import Expert
from ddil_env.presets import config_dir, find_expert, find_preset, make_expert, preset_names, read_env, read_yaml


def agent_names() -> list[str]:
    """The agents of this package, a file each, and those of packages that are installed."""
    here = Path(__file__).parent.parent
    ours = [path.stem for path in sorted(here.glob("*.py")) if f'\n    name = "{path.stem}"\n' in path.read_text()]
    return ours + sorted(point.name for point in entry_points(group="ddil.agents"))


def find_agent(name: str) -> type[Agent]:
    """An agent by the name of its file here, by its class path, or by the entry point of a package that is installed.

    Raises:
        ValueError: nothing there, or no agent, or it needs a package that is not installed.
    """
    registered = {point.name: point for point in entry_points(group="ddil.agents")}
    module, _, attribute = name.rpartition(".")
    found: Any = None
    try:
        if name in registered:
            found = registered[name].load()
        else:
            here = vars(importlib.import_module(module or f"ddil_agents.{name}"))
            of_that_name = [x for x in here.values() if isinstance(x, type) and vars(x).get("name") == name]
            found = here.get(attribute) if module else next(iter(of_that_name), None)
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
    """What `find_agent` finds an agent by: the name of one of ours, the class path of another, also where its file is the command."""
    module = agent.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        module = main.__spec__.name if main.__spec__ is not None else Path(str(main.__file__)).stem
    return agent.name if module == f"ddil_agents.{agent.name}" else f"{module}.{agent.__qualname__}"


def command_of(agent: str) -> list[str]:
    """The words of the command that trains an agent of that name, after the interpreter's."""
    return ["-m", "ddil_agents", agent] if "." in agent or find_spec(f"ddil_agents.{agent}") is None else ["-m", f"ddil_agents.{agent}"]


def with_preset(group: str, argv: list[str]) -> list[str]:
    """The command line with the name of a preset after --config replaced by its file in configs/<group>."""
    found = list(argv)
    for i, word in enumerate(argv):
        flag, _, name = word.partition("=")
        if flag == "--config" and name:
            found[i] = f"--config={find_preset(group, name)}"
        elif word == "--config" and i + 1 < len(argv):
            found[i + 1] = str(find_preset(group, argv[i + 1]))
    return found


def take_flag(argv: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from argv and returns the value."""
    value, i = None, 0
    while i < len(argv):
        if argv[i] == flag:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise ValueError(f"{flag} needs a value")
            value = argv[i + 1]
            del argv[i : i + 2]
        elif argv[i].startswith(f"{flag}="):
            value = argv.pop(i).split("=", 1)[1]
        else:
            i += 1
    return value


def parse(agent: type[Agent], argv: list[str]) -> tuple[ArgumentParser, Namespace]:
    """The parser for this agent and the env that argv names, and what it reads."""
    argv = list(argv)
    for flag in ("--env", "--config", "--device", "--data", "--env.expert"):
        if sum(word == flag or word.startswith(f"{flag}=") for word in argv) > 1:
            raise ValueError(f"{flag} is given more than once")
    env_name, config, device, data = (take_flag(argv, flag) for flag in ("--env", "--config", "--device", "--data"))
    expert_name = take_flag(argv, "--env.expert")
    config_path = None if config is None else find_preset(agent.name, config)
    given = {} if config_path is None else read_yaml(config_path)
    in_config, from_config = given.get("env") or {}, [] if config_path is None else ["--config", str(config_path)]
    if isinstance(in_config, str):  # `env: digits` in a config names the preset
        env_name, in_config = env_name or in_config, {}
        from_config = ["--config", json.dumps({key: value for key, value in given.items() if key != "env"})]
    preset: dict[str, Any] = {}
    own_settings: list[Path] = []
    if env_name is not None:
        preset = read_env(env_name)
        if find_preset("env", env_name).parent == config_dir() / "env":  # a file of the user's own has no settings of ours
            own_settings.append(config_dir() / agent.name / f"{env_name}.yaml")
            if data is not None or in_config.get("data") is not None or "--env.data" in {word.partition("=")[0] for word in argv}:
                own_settings.append(config_dir() / agent.name / "data" / f"{env_name}.yaml")
    elif expert_name is None and "expert" not in in_config and not {"--help", "-h"} & set(argv):
        raise ValueError(
            f"which expert? pass --env NAME; presets: {', '.join(preset_names('env'))}. Or a YAML path, or --env.expert my_pkg.MyExpert"
        )
    expert = expert_name or in_config.get("expert") or preset.get("expert") or "ddil_env.experts.digits.Digits"

    parser = ArgumentParser(
        prog=shlex.join(["python", *command_of(identify(agent))]),
        description=sys.modules[agent.__module__].__doc__,
        default_config_files=[str(path) for path in own_settings if path.is_file()],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help=f"settings that differ from the defaults, a YAML file or a preset of configs/{agent.name}"
    )
    parser.add_argument(
        "--agent", choices=[identify(agent)], default=identify(agent), help="recorded, so that no other agent resumes the run"
    )
    parser.add_argument("--out", type=str | None, default=None, help="new run directory (default: runs/AGENT-ENV-SEED-TIME)")
    parser.add_argument("--checkpoint_every", type=PositiveInt, default=500, help="gradient steps between checkpoints")
    parser.add_argument("--log_every", type=PositiveInt, default=10, help="gradient steps that a line of metrics.jsonl sums up")
    parser.add_argument("--track", type=Tracker, default="none", help="also send the metrics to a live page: trackio or wandb")
    parser.add_argument("--push_to_hub", type=str | None, default=None, help="OWNER/NAME on the Hugging Face hub, to upload student/ to")
    parser.add_argument("--hub_private", type=bool, default=False, help="whether that repository is private, if it is made by this run")
    parser.add_class_arguments(agent.Config, None)
    parser.add_class_arguments(Evaluation, "evaluate")
    parser.add_argument(
        "--env.expert", type=str, default=expert, help="class path or entry point; --env NAME takes it from a preset of configs/env"
    )
    parser.add_class_arguments(find_expert(expert), "env", instantiate=False)
    known = {action.dest for action in parser._actions}
    if "env.device" in known:
        preset = {"device": "cuda" if torch.cuda.is_available() else "cpu", **preset}
    elif device is not None:
        raise ValueError(f"--device {device}: {expert} takes no device")
    if data is not None and "env.data" not in known:
        raise ValueError(f"--data {data}: {expert} takes no data; leave it out, or choose an expert of pictures, such as --env sd15")
    if unknown := sorted(key for key in preset if f"env.{key}" not in known):
        raise ValueError(f"{env_name}: {expert} takes no argument {', '.join(unknown)}")
    from_preset = [
        f"--env.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in preset.items() if key != "expert"
    ]
    argv = from_preset + from_config + argv
    if device is not None:
        argv += ["--env.device", device]
    if data is not None:
        argv += ["--env.data", data]
    return parser, read_arguments(parser, argv)


def expert_and_config(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> tuple[Expert, LearnerConfig]:
    """What a parsed command line describes."""
    config = build_config(agent, parser, cfg)
    env = dict(vars(cfg.env))
    return make_expert(env.pop("expert"), **env), config


def build_config(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> LearnerConfig:
    return build(agent.Config, {f.name: cfg[f.name] for f in fields(agent.Config)})


def name_of_env(cfg: Namespace) -> str:
    """The preset that the env is, or else its class's name."""
    env = {k: v for k, v in vars(cfg.env).items() if k != "device"}
    for name in preset_names("env"):
        preset = read_env(name)
        if all(env.get(key) == value for key, value in preset.items()):
            return name
    return str(env["expert"]).rpartition(".")[2]
