"""Resuming a run: `--resume DIR` reads the settings of its config.yaml, and takes new values only for those of the machine."""

from __future__ import annotations

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.commands.agents import command_of, identify
from ddil_agents.commands.parse import parse, take_flag
from ddil_agents.training.checkpoint import MAY_DIFFER_ON_RESUME
from ddil_env.presets import read_yaml

PLACES = {"env.model", "env.prompts", "env.data", "env.images", "env.data_cache"}  # where what the run is made of lies, which may move

# Settings that a resumed run may be given anew: they depend on the machine, and the training does not depend on them.
MAY_CHANGE_ON_RESUME = MAY_DIFFER_ON_RESUME | PLACES | {"env.device", "evaluate.batch_size", "push_to_hub", "hub_private"}


def parse_resumed(agent: type[Agent], directory: Path, argv: list[str]) -> tuple[ArgumentParser, Namespace]:
    """Parses the command line of a run to resume.

    Args:
        agent: The agent whose command it is.
        directory: The run directory.
        argv: The flags beside --resume.

    Raises:
        ValueError: there is no run, it is of another agent, or a flag changes a setting that needs to stay.
    """
    if any(word == "--config" or word.startswith("--config=") for word in argv):
        raise ValueError("--resume goes on with the run's own config.yaml; leave --config out")
    if (other_env := take_flag(list(argv), "--env")) is not None:
        raise ValueError(f"--resume goes on with the run's own env; leave --env {other_env} out")
    path = directory / "config.yaml"
    if not path.is_file():
        raise ValueError(f"nothing to resume in {directory}: no config.yaml there")
    if (name := read_yaml(path).get("agent")) is None:
        raise ValueError(f"{path} is no run's config: it names no agent; restore it, or start a new run")
    if name != identify(agent):
        raise ValueError(f"{directory} is of {name}; resume it with {shlex.join(['python', *command_of(str(name))])}")
    _, saved = parse(agent, ["--config", str(path)])
    parser, cfg = parse(agent, ["--config", str(path), *argv])
    before = vars(saved.as_flat())
    changed = sorted({key for key, value in vars(cfg.as_flat()).items() if before.get(key) != value} - MAY_CHANGE_ON_RESUME)
    if changed:
        raise ValueError(f"--resume continues {directory} as it was configured, but {', '.join(changed)} differs; start a new run for that")
    return parser, cfg
