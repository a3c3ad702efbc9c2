"""What is compared: arms, seeds and budgets, and the settings of every run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ddil_agents.evaluation.results import METRICS
from ddil_env.presets import find_preset, read_yaml

Budget = Literal["updates", "teacher_nfe", "nfe", "seconds"]

BETAS: dict[str, tuple[float, float, float]] = {  # source priors by name: forward, teacher, student
    "forward": (1.0, 0.0, 0.0),
    "teacher": (0.0, 1.0, 0.0),
    "student": (0.0, 0.0, 1.0),
    "half": (0.5, 0.0, 0.5),
    "ddil": (0.5, 0.1, 0.4),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    env: str = "digits"
    """Preset or YAML file of the expert that all arms imitate."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: `agent`, optionally `config` (a preset of configs/<agent> or a file), and settings that differ."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Settings of all arms, over those of an arm's `config`; the arm's own go over these."""
    seeds: int = 3
    """Runs of each arm, paired by seed."""
    first_seed: int = 0
    """The others follow."""
    equal: tuple[Budget, ...] = ("updates",)
    """Budgets that the arms are compared at: updates, teacher_nfe, nfe (teacher and student), seconds."""
    baseline: str | None = None
    """The arm that others are held against, whose costs are the budgets; null: the first."""
    primary: str = "frechet"
    """The metric that the comparison was set up for."""
    level: float = 0.95
    """Of intervals, and 1 − the error rate of all tests of one metric at one budget together."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms={}: nothing to compare; name --agents, or arms in a config file")
        for name, arm in self.arms.items():
            if not isinstance(arm, dict) or "agent" not in arm:
                raise ValueError(f"arms.{name}={arm}: an arm is a mapping with an `agent`, such as {{agent: dagger, num_updates: 300}}")
            if not name or set(name) & set("/\\") or name.startswith((".", "teacher@")) or name == "teacher":
                raise ValueError(f"arm {name!r}: its name is a folder's, and not the teacher's; leave out slashes and leading dots")
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(f"seeds={self.seeds}, first_seed={self.first_seed}: need at least 1, from 0 or more")
        if self.reference not in self.arms:
            raise ValueError(f"baseline={self.baseline!r} is no arm; the arms are {', '.join(self.arms)}")
        if self.primary not in METRICS:
            raise ValueError(f"primary={self.primary!r}; choose one of: {', '.join(METRICS)}")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level}: need a number from 0.5 to below 1, such as 0.95")
        if not self.equal or self.equal[0] != "updates":
            raise ValueError(f"equal={self.equal}: `updates` comes first; the other budgets are set by what those runs cost")

    @property
    def reference(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.arms), "")

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


class Run(NamedTuple):
    """One training run of a comparison."""

    budget: Budget
    arm: str
    seed: int
    directory: Path

    @property
    def given(self) -> Path:
        """The config file that it is started with. An arm's name may hold a dot: what follows it is no suffix to replace."""
        return self.directory.with_name(f"{self.directory.name}.yaml")

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")


def merged(*settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings laid over one another, the last on top."""
    result: dict[str, Any] = {}
    for layer in settings:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def settings_of(comparison: Comparison, arm: str) -> tuple[str, dict[str, Any]]:
    """An arm's agent, and all of its settings as a config file holds them.

    Raises:
        ValueError: a setting that is the comparison's own.
    """
    own = dict(comparison.arms[arm])
    agent, preset = str(own.pop("agent")), own.pop("config", None)
    base = {} if preset is None else read_yaml(find_preset(agent, str(preset)))
    settings = merged(base, comparison.shared, own)
    if settings.get("env", comparison.env) != comparison.env:
        raise ValueError(f"env={settings['env']}: all arms have the comparison's; write an expert's settings into a YAML file for that")
    if "seed" in settings.get("evaluate", {}):
        raise ValueError(f"evaluate.seed={settings['evaluate']['seed']}: samples start from noise of their run's own seed; leave it out")
    return agent, settings


def given_settings(comparison: Comparison, arm: str, seed: int) -> dict[str, Any]:
    """What a run is given as its config file: the noise of its evaluation goes with its seed."""
    return merged({"evaluate": {"seed": seed}}, settings_of(comparison, arm)[1], {"env": comparison.env})


def arms_of(agents: list[str], betas: list[str]) -> dict[str, dict[str, Any]]:
    """Agents × source priors; `own` is the agent's own."""
    arms: dict[str, dict[str, Any]] = {}
    for agent in agents:
        for name in betas:
            if name != "own" and name not in BETAS:
                raise ValueError(f"unknown priors {name!r}; choose of: own, {', '.join(BETAS)}. Others go into a config's arms")
            beta = {} if name == "own" else {"beta": dict(zip(("forward", "teacher", "student"), BETAS[name], strict=True))}
            arms[agent if len(betas) == 1 else f"{agent} {name}"] = {"agent": agent, **beta}
    return arms
