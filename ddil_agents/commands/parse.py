"""Parses the command line of an agent into an expert and a config."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from ddil_agents.agent import Agent
from ddil_agents.commands.agents import command_of, identify
from ddil_agents.commands.conflicts import check_agent_name, check_groups, check_typed, name_owners
from ddil_agents.commands.help import show_help
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks
from ddil_agents.evaluation.settings import Evaluation, Validation
from ddil_agents.flags import nested_flags
from ddil_agents.settings import build_dataclass, read_arguments
from ddil_agents.states.beta import SOURCES, Beta
from ddil_agents.training.callbacks import Callback
from ddil_agents.training.tracking import Tracker
from ddil_env import Expert
from ddil_env.presets import config_dir, find_expert, find_preset, make_expert, preset_names, read_env, read_yaml


def resolve_presets(group: str, argv: list[str]) -> list[str]:
    """Replaces the name of a preset after --config by the path of its file in configs/<group>."""
    resolved = list(argv)
    for i, word in enumerate(argv):
        flag, _, name = word.partition("=")
        if flag == "--config" and name:
            resolved[i] = f"--config={find_preset(group, name)}"
        elif word == "--config" and i + 1 < len(argv):
            resolved[i + 1] = str(find_preset(group, argv[i + 1]))
    return resolved


def take_flag(argv: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from argv and returns the value, None without the flag.

    Raises:
        ValueError: the flag has no value.
    """
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


def preset_files(agent: type[Agent], env: str, config: Path | None, data: bool) -> tuple[list[Path], list[Path]]:
    """Lists the files with settings for an agent on an env; later files override earlier ones.

    A file of the same name in `data/` has the settings that differ when the user gives data. An env with a file in configs/learner, which
    makes its model fit on one GPU, also takes the agent's `text_to_image.yaml`.

    Args:
        agent: The agent's class.
        env: Name or file of the env.
        config: The file of --config, if it is given.
        data: Whether the user gives data.

    Returns:
        The files with the defaults, and those of --config.
    """
    folder, fits = config_dir() / agent.name, config_dir() / "learner" / f"{env}.yaml"
    defaults = [folder / f"{env}.yaml"]
    if fits.is_file() and issubclass(agent.Config, LearnerConfig):
        defaults = [fits, folder / "text_to_image.yaml", *defaults]
    if data:
        defaults += [folder / "data" / path.name for path in defaults if path.parent == folder]
    if find_preset("env", env).parent != config_dir() / "env":  # the user's own file has no defaults of this package
        defaults = []
    defaults, chosen = [path for path in defaults if path.is_file()], [] if config is None else [config]
    if config is not None and data and config.parent == folder and (more := folder / "data" / config.name).is_file():
        chosen.append(more)
    return defaults, chosen


def parse(agent: type[Agent], argv: list[str]) -> tuple[ArgumentParser, Namespace]:
    """Parses the command line of an agent.

    Args:
        agent: The agent's class.
        argv: The command line, without the program.

    Returns:
        The parser, which depends on agent and env, and the parsed settings.

    Raises:
        ValueError: the command line is wrong.
        SystemExit: after --help and --print_config.
    """
    argv = list(argv)
    wants_help = bool({"--help", "-h"} & set(argv))
    for flag in ("--env", "--config", "--device", "--data", "--env.expert"):
        if sum(word == flag or word.startswith(f"{flag}=") for word in argv) > 1:
            raise ValueError(f"{flag} is given more than once")
    env_name, config, device, data = (take_flag(argv, flag) for flag in ("--env", "--config", "--device", "--data"))
    expert_name = take_flag(argv, "--env.expert")
    try:
        config_path = None if config is None else find_preset(agent.name, config)
    except ValueError as error:
        raise ValueError(f"--config {config}: {error}") from error
    given = {} if config_path is None else read_yaml(config_path)
    in_config: Any = given.get("env") or {}
    if not isinstance(in_config, str | dict):
        raise ValueError(f"env={in_config!r} in {config_path}: need a preset's name, or a mapping with an expert and its arguments")
    if isinstance(in_config, str):  # `env: digits` in a config names the preset
        env_name, in_config = env_name or in_config, {}
    preset: dict[str, Any] = {}
    defaults: list[Path] = []
    chosen = [] if config_path is None else [config_path]
    if env_name is not None:
        has_data = data is not None or in_config.get("data") is not None or "--env.data" in {word.partition("=")[0] for word in argv}
        defaults, chosen = preset_files(agent, env_name, config_path, has_data)
        preset = read_env(env_name)
        for path in defaults:
            preset |= read_yaml(path).get("env") or {}
    elif expert_name is None and "expert" not in in_config and not wants_help:
        raise ValueError(
            f"which expert? pass --env NAME; presets: {', '.join(preset_names('env'))}. Or a YAML path, or --env.expert my_pkg.MyExpert"
        )
    default = preset.get("expert") or "ddil_env.experts.digits.Digits"
    expert = in_config.get("expert", default) if expert_name is None else expert_name
    if not isinstance(expert, str):
        raise ValueError(f"env.expert={expert!r} in {config_path}: need the class path of an expert, such as my_pkg.MyExpert")

    parser = make_parser(agent, expert)
    known = {action.dest for action in parser._actions}
    if "env.device" in known:
        preset = {"device": "cuda" if torch.cuda.is_available() else "cpu", **preset}
    elif device is not None:
        raise ValueError(f"--device {device}: {expert} takes no device")
    if data is not None and "env.data" not in known:
        raise ValueError(f"--data {data}: {expert} takes no data; leave it out, or choose an expert of pictures, such as --env sd15")
    if unknown := sorted(key for key in preset if f"env.{key}" not in known):
        raise ValueError(f"{env_name}: {expert} takes no argument {', '.join(unknown)}")
    before = [f"--config={path}" for path in defaults]
    before += [f"--env.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in preset.items() if key != "expert"]
    contents = [read_yaml(path) for path in chosen]
    for path, content in zip(chosen, contents, strict=True):
        names_preset = isinstance(content.get("env"), str)  # which --config itself cannot read
        before.append(f"--config={json.dumps({k: v for k, v in content.items() if k != 'env'}) if names_preset else path}")
    if wants_help:
        show_help(parser, agent, env_name, [*defaults, *chosen], read_arguments(parser, before))
    after = [*(["--env.device", device] if device is not None else []), *(["--env.data", data] if data is not None else [])]
    print_config = [word for word in argv if word.partition("=")[0] == "--print_config"]
    argv = [*before, *(word for word in argv if word not in print_config), *after]
    typed = nested_flags(argv[len(before) :])
    check_agent_name(agent, [*contents, typed])
    with name_owners(agent):
        cfg = read_arguments(parser, argv)
    if cfg.out == "":
        raise ValueError("out='': need the name of a directory; leave --out out for one in runs/ that is named after the run")
    check_typed(typed, cfg)
    if "beta.forward" in known:
        resolve_beta(agent, cfg, [*map(read_yaml, defaults), *contents, typed])
        argv += [f"--beta.{name}={getattr(cfg.beta, name)!r}" for name in SOURCES]
        argv += [f"--stages={json.dumps(cfg.stages)}"] if "stages" in known else []
    for content in contents:
        check_groups({name: value for name, value in content.items() if name != "env"}, parser)  # env may be a preset's name
    if print_config:
        read_arguments(parser, [*argv, *print_config])  # exits
    return parser, cfg


def make_parser(agent: type[Agent], expert: str) -> ArgumentParser:
    """Makes the parser of an agent's command.

    Args:
        agent: The agent's class.
        expert: Class path of the expert, whose arguments become flags.
    """
    parser = ArgumentParser(
        prog=shlex.join(["python", *command_of(identify(agent))]),
        description=sys.modules[agent.__module__].__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help=f"settings that replace defaults: a YAML file, or a preset of configs/{agent.name}"
    )
    parser.add_argument(
        "--agent",
        choices=[identify(agent)],
        default=identify(agent),
        help="name of the agent; kept in config.yaml, so that no other agent resumes the run",
    )
    parser.add_argument("--out", type=str | None, default=None, help="directory to create for the run; null: runs/AGENT-ENV-SEED-TIME")
    parser.add_argument("--checkpoint_every", type=PositiveInt, default=500, help="number of updates between two checkpoints")
    parser.add_argument("--log_every", type=PositiveInt, default=10, help="number of updates in a line of metrics.jsonl")
    parser.add_argument(
        "--evaluate_every",
        type=PositiveInt | None,
        default=None,
        help="number of updates between two evaluations while training; null: evaluate only at the end",
    )
    parser.add_argument("--callbacks", type=list[Callback], default=[], help="your own callbacks, as class paths (training/callbacks.py)")
    parser.add_argument("--track", type=Tracker, default="none", help="experiment tracker to send the metrics to: trackio or wandb")
    parser.add_argument(
        "--push_to_hub", type=str | None, default=None, help="OWNER/NAME of a Hugging Face repository to upload student/ to"
    )
    parser.add_argument("--hub_private", type=bool, default=False, help="whether a repository that --push_to_hub creates is private")
    parser.add_class_arguments(agent.Config, None)
    parser.add_class_arguments(Evaluation, "evaluate")
    parser.add_class_arguments(Validation, "validation")
    parser.add_argument(
        "--env.expert",
        type=str,
        default=expert,
        help="class path or entry point of the expert; --env NAME takes it from a preset of configs/env",
    )
    parser.add_class_arguments(find_expert(expert), "env", instantiate=False)
    return parser


def resolve_beta(agent: type[Agent], cfg: Namespace, layers: list[dict[str, Any]]) -> None:
    """Sets the shares of β in cfg and its stages so that they sum to 1, and prints them where they differ from what was given.

    If one or two shares are given, they hold, and the others divide the rest in their proportion; three shares are divided by their sum.

    Args:
        agent: The agent's class, which has the defaults.
        cfg: The parsed settings; changed in place.
        layers: Nested settings, each of which overrides those before it, with any of the shares.

    Raises:
        ValueError: the given shares sum to more than 1, or to less while the others have no share to divide the rest by.
    """
    beta: Beta = agent.Config().beta
    for layer in layers:
        if "beta" in layer and not isinstance(layer["beta"], dict | str):
            raise ValueError(f"beta={layer['beta']!r}: need a mapping of shares, such as {{forward: 0.5, teacher: 0.1, student: 0.4}}")
        beta = beta.with_shares(**_shares(layer.get("beta")))
    parsed = [getattr(cfg.beta, name) for name in SOURCES]
    vars(cfg.beta).update(zip(SOURCES, beta.shares, strict=True))
    if not _are_close(parsed, beta.shares):
        given = _shares(layers[-1].get("beta")) or _shares(layers[-2].get("beta"))
        _print_on_main_rank(
            f"{', '.join(f'beta.{name}={share:g}' for name, share in given.items())}: shares sum to 1, so that β is {_describe_beta(beta)}"
        )
    for number, stage in enumerate(getattr(cfg, "stages", ()), 1):
        if given := _shares(stage.get("beta")):
            stage["beta"] = stage["beta"] | dict(zip(SOURCES, beta.with_shares(**given).shares, strict=True))
            if not _are_close([stage["beta"][name] for name in given], list(given.values())):
                _print_on_main_rank(f"stage {number}: shares sum to 1, so that β is {_describe_beta(beta.with_shares(**given))}")


def _shares(given: Any) -> dict[str, float]:
    """The shares in a mapping of β's settings or in a YAML file of them; empty for anything else."""
    given = read_yaml(Path(given)) if isinstance(given, str) and Path(given).is_file() else given
    return {name: float(given[name]) for name in SOURCES if name in given} if isinstance(given, dict) else {}


def _are_close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) < 1e-9 for x, y in zip(a, b, strict=True))


def _describe_beta(beta: Beta) -> str:
    return ", ".join(f"{name} {share:.3g}" for name, share in zip(SOURCES, beta.shares, strict=True))


def _print_on_main_rank(message: str) -> None:
    if ranks.is_main():
        print(message, file=sys.stderr)


def expert_and_config(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> tuple[Expert, LearnerConfig]:
    """Builds the expert and the config of a parsed command line."""
    config = build_config(agent, parser, cfg)
    env = dict(vars(cfg.env))
    return make_expert(env.pop("expert"), **env), config


def build_config(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> LearnerConfig:
    """Builds the config of a parsed command line."""
    return build_dataclass(agent.Config, {f.name: cfg[f.name] for f in fields(agent.Config)})


def name_of_env(cfg: Namespace) -> str:
    """Name of the preset that the env equals, or else of the expert's class."""
    env = {k: v for k, v in vars(cfg.env).items() if k not in ("device", "dtype")}
    for name in preset_names("env"):
        preset = {k: v for k, v in read_env(name).items() if k != "dtype"}
        if all(env.get(key) == value for key, value in preset.items()):
            return name
    return str(env["expert"]).rpartition(".")[2]
