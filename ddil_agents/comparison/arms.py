"""Settings of a comparison: arms, seeds and budgets, and the config file of every run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ddil_agents.evaluation.results import METRICS
from ddil_env.presets import find_preset, read_yaml

Budget = Literal["updates", "teacher_nfe", "nfe", "seconds"]

BETAS: dict[str, tuple[float, float, float]] = {  # values of β by name: forward, teacher, student
    "forward": (1.0, 0.0, 0.0),
    "teacher": (0.0, 1.0, 0.0),
    "student": (0.0, 0.0, 1.0),
    "half": (0.5, 0.0, 0.5),
    "ddil": (0.5, 0.1, 0.4),
}


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison. An arm is an agent with settings; each arm is trained once for each seed."""

    env: str = "digits"
    """Preset or YAML file of the expert that all arms imitate."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arms by name: each has an `agent`, optionally a `config` (a preset of configs/<agent> or a file), and its own settings."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Settings of all arms; they override an arm's `config`, and the arm's own settings override them."""
    seeds: int = 3
    """Runs of each arm, one a seed; the arms are paired by seed."""
    first_seed: int = 0
    """The lowest seed; the runs use first_seed, first_seed + 1, …"""
    equal: tuple[Budget, ...] = ("updates",)
    """Budgets at which arms are compared, one after the other: equal updates, teacher_nfe, nfe (of teacher and student) or seconds."""
    baseline: str | None = None
    """The arm that the others are compared with, and whose costs are the budgets; null: the first."""
    primary: str = "frechet"
    """The primary metric: the one that conclusions are drawn from."""
    level: float = 0.95
    """Confidence level of intervals; 1 − level is the family-wise error rate of the tests of one metric at one budget."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms={}: nothing to compare; name --agents, or arms in a config file")
        for name, arm in self.arms.items():
            if not isinstance(name, str):
                raise ValueError(f"arm {name!r}: YAML reads this name as {type(name).__name__}; put it in quotes")
            if not isinstance(arm, dict) or "agent" not in arm:
                raise ValueError(f"arms.{name}={arm}: an arm is a mapping with an `agent`, such as {{agent: dagger, num_updates: 300}}")
            if not name or set(name) & set("/\\") or name.startswith((".", "teacher@")) or name == "teacher":
                raise ValueError(
                    f"arm {name!r}: the name is used for a folder and must differ from the teacher's; leave out slashes and leading dots"
                )
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(f"seeds={self.seeds}, first_seed={self.first_seed}: need at least 1, from 0 or more")
        if self.baseline_arm not in self.arms:
            raise ValueError(f"baseline={self.baseline!r}: unknown arm; choose one of {', '.join(self.arms)}")
        if self.primary not in METRICS:
            raise ValueError(f"primary={self.primary!r}; choose one of: {', '.join(METRICS)}")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level}: need a number from 0.5 to below 1, such as 0.95")
        if not self.equal or self.equal[0] != "updates":
            raise ValueError(f"equal={self.equal}: `updates` comes first, because the other budgets are computed from what those runs cost")

    @property
    def baseline_arm(self) -> str:
        """Name of the baseline."""
        return self.baseline or next(iter(self.arms), "")

    @property
    def all_seeds(self) -> range:
        """The seeds of every arm."""
        return range(self.first_seed, self.first_seed + self.seeds)


class Run(NamedTuple):
    """One training run of a comparison."""

    budget: Budget
    arm: str
    seed: int
    directory: Path

    @property
    def config_file(self) -> Path:
        """The config file that the run is started with."""
        # Not with_suffix: the name of an arm may contain a dot.
        return self.directory.with_name(f"{self.directory.name}.yaml")

    @property
    def log(self) -> Path:
        """The output of its process."""
        return self.directory.with_name(f"{self.directory.name}.log")


def merge_settings(*settings: dict[str, Any]) -> dict[str, Any]:
    """Merges nested mappings of settings; later ones override earlier ones."""
    result: dict[str, Any] = {}
    for layer in settings:
        for key, value in layer.items():
            are_mappings = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merge_settings(result[key], value) if are_mappings else value
    return result


def arm_settings(comparison: Comparison, arm: str) -> tuple[str, dict[str, Any]]:
    """The agent of an arm, and all settings of the arm as in a config file.

    Raises:
        ValueError: the arm sets what only the comparison may set.
    """
    own = dict(comparison.arms[arm])
    agent, preset = str(own.pop("agent")), own.pop("config", None)
    base = {} if preset is None else read_yaml(find_preset(agent, str(preset)))
    settings = merge_settings(base, comparison.shared, own)
    if settings.get("env", comparison.env) != comparison.env:
        raise ValueError(f"env={settings['env']}: all arms use the comparison's env; to change the expert, name a YAML file there")
    given = comparison.shared | own
    for key in given if "stages" not in given else ():
        if any(key in stage for stage in settings.get("stages") or () if isinstance(stage, dict)):
            raise ValueError(
                f"{key}={given[key]!r} would not hold: the stages of config {preset} set it themselves; add stages: null, or your own"
            )
    if "seed" in own | dict(comparison.shared):
        raise ValueError(f"arm {arm!r} sets seed: each arm runs with the comparison's seeds; set seeds and first_seed instead")
    if not isinstance(settings.get("evaluate", {}), dict):
        raise ValueError(f"evaluate={settings['evaluate']!r}: need a mapping of an evaluation's settings, such as {{n: 1000}}")
    if "seed" in settings.get("evaluate", {}):
        raise ValueError(
            f"evaluate.seed={settings['evaluate']['seed']}: the noise of an evaluation comes from the seed of its run; leave it out"
        )
    return agent, settings


def run_settings(comparison: Comparison, arm: str, seed: int) -> dict[str, Any]:
    """The contents of a run's config file; its evaluation uses the seed of the run."""
    return merge_settings({"evaluate": {"seed": seed}}, arm_settings(comparison, arm)[1], {"env": comparison.env})


def make_arms(agents: list[str], betas: list[str]) -> dict[str, dict[str, Any]]:
    """An arm for each agent and each β; `own` is the default β of the agent."""
    arms: dict[str, dict[str, Any]] = {}
    for flag, names in (("agents", agents), ("betas", betas)):
        if len(set(names)) < len(names):
            raise ValueError(f"--{flag} {' '.join(names)}: each may stand once; for two arms of one agent write them into a config file")
    for agent in agents:
        for name in betas:
            if name != "own" and name not in BETAS:
                raise ValueError(
                    f"unknown β {name!r}; choose from own, {', '.join(BETAS)}; for another β write the arms into a config file"
                )
            beta = {} if name == "own" else {"beta": dict(zip(("forward", "teacher", "student"), BETAS[name], strict=True))}
            arms[agent if len(betas) == 1 else f"{agent} {name}"] = {"agent": agent, **beta}
    return arms
