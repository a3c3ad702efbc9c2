"""The glossary has every key that a run logs, and every column of its tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, learn, make, settings

from ddil_agents import DMD2, Gail, PPOAgent, PPOConfig, bc, dagger
from ddil_agents.evaluation.results import COLUMNS, DIRECTIONS
from ddil_agents.training.metrics import read_metrics

TEXT = (ROOT / "docs" / "evaluate" / "glossary.md").read_text()
KNOWN = set(re.findall(r"`(\w+)`", TEXT))
BY_SOURCE_OR_ROLE = ("beta", "loss_by_source", "source_counts", "held", "clipped")
SMALL = ["--num_updates", "2", "--num_steps", "2", "--teacher_steps", "4", "--batch_size", "8", "--collect_size", "16", "--log_every", "1"]
EVALUATION = ["--evaluate.n", "12", "--evaluate.n_paths", "4", "--evaluate.n_action", "2", "--evaluate.n_episodes", "2"]


def keys(logged: dict[str, Any], inside: str = "") -> Iterator[str]:
    """All keys but the names of models, sources and roles, and the arguments of the expert."""
    for key, value in logged.items():
        if inside not in ("models", *BY_SOURCE_OR_ROLE):
            yield key
        if isinstance(value, dict) and key != "env_config":
            yield from keys(value, "" if inside == "models" else key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    validation = ["--evaluate_every", "1", "--validation.n", "10"]
    dagger.main(["--env", "digits8", *SMALL, *EVALUATION, *validation, "--out", str(folder / "digits8")])
    bc.main(["--env", "fork", *SMALL, *EVALUATION, "--out", str(folder / "fork")])
    return [folder / "digits8", folder / "fork"]


def test_it_has_every_key_that_a_run_logs(runs: list[Path], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [json.loads((run / "result.json").read_text()) for run in runs]
    rows += [row for run in runs for row in read_metrics(run / "metrics.jsonl")] + read_metrics(runs[0] / "eval.jsonl")
    for agent in (DMD2, Gail):
        extra = {"critic_updates": 1} if agent is DMD2 else {}
        learn(make(agent, **{"num_updates": 2, **extra}), out=tmp_path / agent.name)
        rows += read_metrics(tmp_path / agent.name / "metrics.jsonl")
    small = {key: value for key, value in settings().items() if key in ("teacher_steps", "student")}
    learn(PPOAgent("gaussian_mixture", PPOConfig(num_envs=5, batch_size=5, num_steps=2, epochs=1, **small)), 2, out=tmp_path / "ppo")
    rows += read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    logged = {key for row in rows for key in keys(row)}
    assert len(logged) > 80
    assert sorted(logged - KNOWN) == []


def test_it_has_every_metric_and_every_column() -> None:
    assert sorted({*COLUMNS, *DIRECTIONS} - KNOWN) == []
    assert [heading for heading, _ in COLUMNS.values() if heading not in TEXT] == []


def test_the_progress_bar_is_shown_as_it_is() -> None:
    bar = TEXT.split("    dagger:")[1].splitlines()[0]
    for field in ("loss=", "β=", "drawn=", "NFE/s="):
        assert field in bar
        assert f"`{field.rstrip('=')}`" in TEXT
