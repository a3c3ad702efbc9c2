"""The benchmark of speed: both sides do the same work, or it stops; and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import ConsistencyScript, DMD2Script
from throughput import Case, columns, dmd2, lcm, main, measure, rollout, row


@pytest.fixture
def case() -> Case:
    return Case("tiny", "cpu", "float32", batch_size=4, compiled=False)


@pytest.mark.parametrize("part", [rollout, lcm, dmd2])
def test_both_sides_do_the_same(case: Case, part: Any) -> None:
    ways, difference, drift = part(case)
    assert difference < 1e-4
    assert drift < 1e-2
    assert "theirs" in ways or "theirs, student's turn" in ways


@pytest.mark.parametrize(
    ("part", "script", "name", "changed"),
    [
        ("lcm", ConsistencyScript, "boundary", staticmethod(lambda t: (torch.zeros(1), torch.full((1,), 0.9)))),
        ("dmd2", DMD2Script, "randn", lambda self, like: torch.zeros_like(like)),
    ],
)
def test_it_stops_where_they_do_not(case: Case, monkeypatch: pytest.MonkeyPatch, part: str, script: type, name: str, changed: Any) -> None:
    monkeypatch.setattr(script, name, changed)
    with pytest.raises(AssertionError, match=f"{part}: ours and theirs differ by"):
        measure(part, case, rounds=1)


def test_a_label_is_paid_once_for_the_steps_that_it_serves() -> None:
    times = {"theirs": [7.0], "fresh": [6.0], "reused": [20.0], "labels": [2.0], "limit": [4.0]}
    assert columns("lcm", times) == {"fresh": ([6.0], [7.0], [6.0]), "reused": ([5.0], [7.0], [4.5])}


def test_a_cycle_of_dmd2_has_one_step_of_the_student() -> None:
    times = {f"{side}{turn}": [t] for t, turn in ((11.0, "student's turn"), (1.0, "critic's turn")) for side in ("", "theirs, ", "limit, ")}
    assert columns("dmd2", times)["mean of 10"] == ([2.0], [2.0], [2.0])


def test_a_ratio_above_1_means_that_we_are_faster() -> None:
    line = row("lcm, fresh", [2.0] * 20, [3.0] * 20, [1.0] * 20, "cuda")
    assert (line["ratio"], line["of_limit"], line["target"]) == ((1.5,) * 3, (0.5,) * 3, 1.5)


def test_the_table_says_what_was_run_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--device", "cpu", "--batch_size", "4", "--parts", "rollout", "--out", str(tmp_path / "throughput")])
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert [line["name"] for line in result["rows"]] == ["rollout, unroll", "rollout, env"]
    assert all(line["ratio"][1] <= line["ratio"][0] <= line["ratio"][2] for line in result["rows"])
    written = (tmp_path / "throughput.md").read_text()
    assert all(str(result[key]) in written for key in ("command", "model", "dtype", "hardware", "torch", "diffusers", "date", "rounds"))
    assert written in capsys.readouterr().out


def test_bfloat16_runs_with_the_proof_in_float32() -> None:
    (fresh, reused) = measure("lcm", Case("tiny", "cpu", "bfloat16", batch_size=4, compiled=False), rounds=1)
    assert fresh["difference"] == reused["difference"] < 1e-4
