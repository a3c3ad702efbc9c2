"""From a command line to an expert and a config."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from ddil_agents.agent import Agent
from ddil_agents.commands.help import show_help
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks
from ddil_agents.evaluation.settings import Evaluation, Validation
from ddil_agents.settings import build_dataclass, nested_flags, read_arguments
from ddil_agents.states.beta import SHARES, Beta
from ddil_agents.training.callbacks import Callback
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


def resolve_presets(group: str, argv: list[str]) -> list[str]:
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


def preset_files(agent: type[Agent], env: str, config: Path | None, data: bool) -> tuple[list[Path], list[Path]]:
    """The shipped files whose settings are defaults of this agent on an env preset, and those of --config; the later go over the earlier.

    Of both, what differs where the user gives data is in the file of that name in `data/`. An env that has a file in configs/learner, of
    what fits its model on one GPU, takes its agent's `text_to_image.yaml` too.
    """
    folder, fits = config_dir() / agent.name, config_dir() / "learner" / f"{env}.yaml"
    defaults = [folder / f"{env}.yaml"]
    if fits.is_file() and issubclass(agent.Config, LearnerConfig):
        defaults = [fits, folder / "text_to_image.yaml", *defaults]
    if data:
        defaults += [folder / "data" / path.name for path in defaults if path.parent == folder]
    if find_preset("env", env).parent != config_dir() / "env":  # a file of the user's own has no settings of ours
        defaults = []
    defaults, chosen = [path for path in defaults if path.is_file()], [] if config is None else [config]
    if config is not None and data and config.parent == folder and (more := folder / "data" / config.name).is_file():
        chosen.append(more)
    return defaults, chosen


def parse(agent: type[Agent], argv: list[str]) -> tuple[ArgumentParser, Namespace]:
    """The parser for this agent and the env that argv names, and what it reads.

    Raises:
        ValueError: what is wrong with the command line.
        SystemExit: after --help and --print_config.
    """
    argv = list(argv)
    asks_help = bool({"--help", "-h"} & set(argv))
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
    elif expert_name is None and "expert" not in in_config and not asks_help:
        raise ValueError(
            f"which expert? pass --env NAME; presets: {', '.join(preset_names('env'))}. Or a YAML path, or --env.expert my_pkg.MyExpert"
        )
    expert = expert_name or in_config.get("expert") or preset.get("expert") or "ddil_env.experts.digits.Digits"

    parser = make_parser(agent, expert, defaults)
    known = {action.dest for action in parser._actions}
    if "env.device" in known:
        preset = {"device": "cuda" if torch.cuda.is_available() else "cpu", **preset}
    elif device is not None:
        raise ValueError(f"--device {device}: {expert} takes no device")
    if data is not None and "env.data" not in known:
        raise ValueError(f"--data {data}: {expert} takes no data; leave it out, or choose an expert of pictures, such as --env sd15")
    if unknown := sorted(key for key in preset if f"env.{key}" not in known):
        raise ValueError(f"{env_name}: {expert} takes no argument {', '.join(unknown)}")
    before = [f"--env.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in preset.items() if key != "expert"]
    contents = [read_yaml(path) for path in chosen]
    for path, content in zip(chosen, contents, strict=True):
        named = isinstance(content.get("env"), str)
        before.append(f"--config={json.dumps({k: v for k, v in content.items() if k != 'env'}) if named else path}")
    if asks_help:
        show_help(parser, agent, env_name, [*defaults, *chosen], read_arguments(parser, before))
    after = [*(["--env.device", device] if device is not None else []), *(["--env.data", data] if data is not None else [])]
    printing = [word for word in argv if word.partition("=")[0] == "--print_config"]
    argv = [*before, *(word for word in argv if word not in printing), *after]
    cfg = read_arguments(parser, argv)
    if "beta.forward" in known:
        resolve_beta(agent, cfg, [*map(read_yaml, defaults), *contents, nested_flags(argv[len(before) :])])
        argv += [f"--beta.{name}={getattr(cfg.beta, name)!r}" for name in SHARES]
        argv += [f"--stages={json.dumps(cfg.stages)}"] if "stages" in known else []
    if printing:
        read_arguments(parser, [*argv, *printing])  # which ends the process
    return parser, cfg


def make_parser(agent: type[Agent], expert: str, defaults: list[Path]) -> ArgumentParser:
    """The parser of an agent's command on an expert of that class."""
    parser = ArgumentParser(
        prog=shlex.join(["python", *command_of(identify(agent))]),
        description=sys.modules[agent.__module__].__doc__,
        default_config_files=[str(path) for path in defaults],
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=f"settings over the defaults: a YAML file, or a preset of configs/{agent.name}")
    parser.add_argument(
        "--agent", choices=[identify(agent)], default=identify(agent), help="recorded, so that no other agent resumes the run"
    )
    parser.add_argument("--out", type=str | None, default=None, help="new run directory; null: runs/AGENT-ENV-SEED-TIME")
    parser.add_argument("--checkpoint_every", type=PositiveInt, default=500, help="gradient steps between checkpoints")
    parser.add_argument("--log_every", type=PositiveInt, default=10, help="gradient steps that a line of metrics.jsonl sums up")
    parser.add_argument(
        "--evaluate_every", type=PositiveInt | None, default=None, help="gradient steps between evaluations; null: at the end alone"
    )
    parser.add_argument("--callbacks", type=list[Callback], default=[], help="class paths of your own, called beside the gradient steps")
    parser.add_argument("--track", type=Tracker, default="none", help="also send the metrics to a live page: trackio or wandb")
    parser.add_argument("--push_to_hub", type=str | None, default=None, help="OWNER/NAME on the Hugging Face hub, to upload student/ to")
    parser.add_argument("--hub_private", type=bool, default=False, help="whether that repository is private, if it is made by this run")
    parser.add_class_arguments(agent.Config, None)
    parser.add_class_arguments(Evaluation, "evaluate")
    parser.add_class_arguments(Validation, "validation")
    parser.add_argument(
        "--env.expert", type=str, default=expert, help="class path or entry point; --env NAME takes it from a preset of configs/env"
    )
    parser.add_class_arguments(find_expert(expert), "env", instantiate=False)
    return parser


def resolve_beta(agent: type[Agent], cfg: Namespace, layers: list[dict[str, Any]]) -> None:
    """Sets the shares of β in cfg, and in its stages, as they will be used, and says where they differ from those that were given.

    A share that is given alone holds, and the others divide the rest in their proportion; of three, the proportion counts.

    Args:
        agent: Whose defaults the first layer goes over.
        cfg: What was read.
        layers: Nested settings, as they go over one another; each names some shares, or none.

    Raises:
        ValueError: shares that leave less than nothing, or something to sources that have none.
    """
    beta: Beta = agent.Config().beta
    for layer in layers:
        beta = beta.with_shares(**_shares(layer.get("beta")))
    read = [getattr(cfg.beta, name) for name in SHARES]
    vars(cfg.beta).update(zip(SHARES, beta.shares, strict=True))
    if not _are_close(read, beta.shares):
        given = _shares(layers[-1].get("beta")) or _shares(layers[-2].get("beta"))
        _print_on_main_rank(
            f"{', '.join(f'beta.{name}={share:g}' for name, share in given.items())}: shares sum to 1, so that β is {_describe_beta(beta)}"
        )
    for number, stage in enumerate(getattr(cfg, "stages", ()), 1):
        if given := _shares(stage.get("beta")):
            stage["beta"] = stage["beta"] | dict(zip(SHARES, beta.with_shares(**given).shares, strict=True))
            if not _are_close([stage["beta"][name] for name in given], list(given.values())):
                _print_on_main_rank(f"stage {number}: shares sum to 1, so that β is {_describe_beta(beta.with_shares(**given))}")


def _shares(given: Any) -> dict[str, float]:
    """The shares in a mapping of β's settings, or in a file of it; of what is no mapping none."""
    given = read_yaml(Path(given)) if isinstance(given, str) and Path(given).is_file() else given
    return {name: float(given[name]) for name in SHARES if name in given} if isinstance(given, dict) else {}


def _are_close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) < 1e-9 for x, y in zip(a, b, strict=True))


def _describe_beta(beta: Beta) -> str:
    return ", ".join(f"{name} {share:.3g}" for name, share in zip(SHARES, beta.shares, strict=True))


def _print_on_main_rank(message: str) -> None:
    if ranks.is_main():
        print(message, file=sys.stderr)


def expert_and_config(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> tuple[Expert, LearnerConfig]:
    """What a parsed command line describes."""
    config = build_config(agent, parser, cfg)
    env = dict(vars(cfg.env))
    return make_expert(env.pop("expert"), **env), config


def build_config(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> LearnerConfig:
    return build_dataclass(agent.Config, {f.name: cfg[f.name] for f in fields(agent.Config)})


def name_of_env(cfg: Namespace) -> str:
    """The preset that the env is, or else its class's name."""
    env = {k: v for k, v in vars(cfg.env).items() if k not in ("device", "dtype")}
    for name in preset_names("env"):
        preset = {k: v for k, v in read_env(name).items() if k != "dtype"}
        if all(env.get(key) == value for key, value in preset.items()):
            return name
    return str(env["expert"]).rpartition(".")[2]
