"""Every snippet of the README and of the site runs as it stands, in few updates; every command is one that the program takes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import shlex
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from helpers import ROOT
from jsonargparse import ArgumentParser

from ddil_agents import compare, evaluate
from ddil_agents.agent import Agent
from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.checks import check_command_line
from ddil_agents.commands.parse import build_config, parse, resolve_presets
from ddil_agents.comparison.arms import Comparison, arm_settings, make_arms
from ddil_agents.config import LearnerConfig
from ddil_agents.settings import read_arguments
from ddil_agents.training.stages import plan_stages
from ddil_env import Expert, load_expert

FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.M | re.S)
NOT_RUN, NEEDS = "# Not run by the tests", "# needs"  # the marks of blocks that need what is not there
LAUNCHERS = ("torchrun", "accelerate")
OTHER_PROGRAMS = ("pip", "jupytext", "rm", "source", "cd", "git", "hf", "pytest", "tensorboard")
EMBEDDED = ("gaussian_mixture", "digits", "digits8", "coloured_digits", "fork", "lunar_lander", "kuramoto")


class Block(NamedTuple):
    page: str
    language: str
    code: str
    line: int  # of its first line in the page

    @property
    def marked(self) -> bool:
        return self.code.startswith((NOT_RUN, NEEDS))


def pages() -> list[Path]:
    found = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
    return [ROOT / "README.md", *(path for path in found if "kernelspec:" not in path.read_text())]  # notebooks run when the site is built


def blocks(path: Path, language: str) -> list[Block]:
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    return [Block(name, m[1], m[2], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text) if m[1] == language]


IN_FULL = ("concepts", "start")  # folders whose code test_tutorials.py runs without any cut
WITH_PYTHON = [path for path in pages() if blocks(path, "python") and path.parent.name not in IN_FULL]
WITH_COMMANDS = [path for path in pages() if blocks(path, "bash")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.fixture
def few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is cut to two updates on eight states; all else is as the snippet says."""
    learn = Agent.learn

    def short(self: Any, num_updates: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__") != "snippet":  # check_agent needs all of its updates
            return learn(self, num_updates, *args, **kwargs)
        if isinstance(self.config, LearnerConfig):
            self.config = dataclasses.replace(self.config, batch_size=8)
            self.collect_size = 8
        return learn(self, min(num_updates or self.config.num_updates, 2), *args, **{**kwargs, "progress": False})

    monkeypatch.setattr(Agent, "learn", short)


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name_of)
def test_python_runs_as_it_stands(path: Path, few_updates: None, elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # where dataclasses look their types up
    for block in blocks(path, "python"):
        code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")  # so that an error names the page's line
        if not block.marked:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, vars(module))


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_are_taken_by_the_program(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for example in ("my_expert", "my_agent"):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / example))
    monkeypatch.chdir(ROOT)
    for block in blocks(path, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                try:
                    check(words, block.marked)
                except (ValueError, AssertionError, SystemExit) as error:
                    pytest.fail(f"{block.page}, in the block of line {block.line}: {line}\n{error}")


def check(words: list[str], marked: bool) -> None:
    """Checks a command without running it."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[0] in LAUNCHERS:
        at = words.index("-m")
        if "--config_file" in words[:at]:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        check_module(words[at + 1], words[at + 2 :], marked=True)
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:], marked)
    elif words[0] == "python":
        script = ROOT / words[1]
        assert script.is_file(), f"no file {words[1]}"
        assert_flags("".join(path.read_text() for path in {script, script.parent / "records.py"} if path.is_file()), words[2:])
    else:
        assert words[0] in OTHER_PROGRAMS, f"what is {words[0]}?"


def check_module(module: str, argv: list[str], marked: bool) -> None:
    package, _, name = module.partition(".")
    if package in ("pytest", "build", "venv"):
        assert all((ROOT / word).exists() for word in argv if word.startswith("tests/"))
    elif module == "ddil_agents":
        check_agent_command(argv[0], argv[1:], marked=True)
    elif package == "ddil_agents" and name in ("evaluate", "compare"):
        check_other_command(name, argv)
    elif package == "ddil_agents" and "." not in name and name not in ("advise", "report", "check"):
        check_agent_command(name, argv, marked)
    else:
        assert_flags(Path(str(importlib.import_module(module).__file__)).read_text(), argv)


def assert_flags(source: str, argv: list[str]) -> None:
    for word in argv:
        assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in source, f"no flag {word}"


@cache
def embedded(env: str) -> Expert:
    return load_expert(env)


def check_agent_command(name: str, argv: list[str], marked: bool) -> None:
    """Parses an agent's command; what could start here is checked as the program does before it trains."""
    agent = find_agent(name)
    if argv[0] == "--resume":
        assert not {"--env", "--config"} & set(argv), "--resume goes on with the run's own"
        return
    if {"--help", "--print_config"} & set(argv):
        with contextlib.suppress(SystemExit):
            parse(agent, argv)
        return
    env = argv[argv.index("--env") + 1] if "--env" in argv else ""
    if env in EMBEDDED and not marked:
        own = any(word.startswith("--env.") for word in argv)
        check_command_line(agent, argv, None if own or name == "ppo" else embedded(env))
        return
    parser, cfg = parse(agent, argv)
    config = build_config(agent, parser, cfg)
    if isinstance(config, LearnerConfig):
        plan_stages(config)


def check_other_command(name: str, argv: list[str]) -> None:
    command: Any = {"evaluate": evaluate, "compare": compare}[name]
    parser: ArgumentParser = command.make_parser()
    args = read_arguments(parser, resolve_presets("ablations" if name == "compare" else "evaluate", argv))
    if name == "compare":
        settings = {field.name: args[field.name] for field in dataclasses.fields(Comparison)}
        settings["arms"] = {**make_arms(args.agents, args.betas), **settings["arms"]}
        comparison = Comparison(**settings)
        for arm in comparison.arms:
            agent, _ = arm_settings(comparison, arm)
            find_agent(agent)


def test_marks_are_used_where_something_is_missing_and_say_what() -> None:
    marked = [block for path in pages() for language in ("python", "bash") for block in blocks(path, language) if block.marked]
    assert len(marked) >= 10
    assert all(len(block.code.splitlines()[0].split()) >= 3 for block in marked)
