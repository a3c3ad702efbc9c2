"""`python -m ddil_agents.advise`: what it measures, and what the rule of thumb makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, refused

from ddil_agents.advise import RULE, Estimate, advise, estimate, main
from ddil_agents.bc import main as bc


def found(shortfall: Any, ratio: Any) -> dict[str, Any]:
    return {"shortfall": shortfall and Estimate(*shortfall), "ratio": ratio and Estimate(*ratio)}


FAR, NEAR, AROUND = (0.5, 0.4, 0.6), (0.01, -0.02, 0.04), (0.05, 0.0, 0.1)
HARD, EASY, EITHER = (5.0, 4.0, 6.0), (1.2, 1.0, 1.4), (2.8, 2.0, 4.0)


@pytest.mark.parametrize(
    ("shortfall", "ratio", "sentences"),
    [
        (FAR, HARD, ("errors feed back", "DDIL is worth its rollouts")),
        (FAR, EASY, ("not much harder than data", "DDIL is worth its rollouts", "a larger student or more updates")),
        (NEAR, HARD, ("errors feed back", "own states have nothing to mend; keep it")),
        (AROUND, EITHER, ("more episodes or seeds would tell", "raise --seeds")),
        (None, EASY, ("The world knows no success, so that the rule does not apply",)),
        (FAR, None, ("DDIL is worth its rollouts",)),
    ],
)
def test_each_regime_is_named(shortfall: Any, ratio: Any, sentences: tuple[str, ...]) -> None:
    said = " ".join(advise(found(shortfall, ratio)))
    assert all(sentence in said for sentence in sentences)
    assert ("worth its rollouts" in said) == (shortfall == FAR)
    assert (f"in {RULE.gained} of {RULE.fell_short} such cells" in said) == (shortfall in (FAR, AROUND))


def test_the_rule_is_that_of_the_benchmark() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "rule.json").read_text())
    assert {**RULE._asdict(), "closed": list(RULE.closed)} == {key: kept[key] for key in RULE._fields}


def test_estimates_are_t_intervals() -> None:
    assert estimate([1.0, 3.0]) == pytest.approx((2.0, 2 - 12.706, 2 + 12.706), abs=1e-2)  # t(.975, 1) = 12.706, s/√2 = 1
    assert estimate([1.0, 4.0], geometric=True).mean == pytest.approx(2.0)


def test_a_student_of_demonstrations_is_measured_and_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "advice.json"
    small = ["--student.width", "8", "--student.depth", "1", "--num_updates", "40", "--evaluate.n", "20", "--evaluate.n_episodes", "2"]
    bc(["--env", "fork", "--num_steps", "2", "--teacher_steps", "4", *small, "--out", str(run)])
    capsys.readouterr()
    main(["--run", str(run), "--seeds", "2", "--n_episodes", "8", "--out", str(out)])
    shown, kept = capsys.readouterr().out, json.loads(out.read_text())
    assert kept["student"] < 0.2 < 0.8 < kept["teacher"]
    assert kept["shortfall"][0] == pytest.approx(kept["teacher"] - kept["student"])
    assert kept["growth"][0] == pytest.approx(kept["own"][0] / kept["data"])
    assert "own / held-out data" in shown
    assert kept["advice"] == advise(found(kept["shortfall"], kept["ratio"]))
    assert kept["advice"][-1] in shown


def test_what_it_cannot_advise_on_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which student? pass --run DIR" in refused(main, [], capsys)
    assert "holds no run" in refused(main, ["--run", str(tmp_path)], capsys)
    assert "--seeds 1: need at least 2" in refused(main, ["--run", str(tmp_path), "--seeds", "1"], capsys)
    (tmp_path / "else.txt").write_text("mine")
    for out, why in (
        (tmp_path / "no" / "x.json", "need a file in a folder that exists"),
        (tmp_path / "else.txt", "holds something else than advice"),
    ):
        assert why in refused(main, ["--run", str(tmp_path), "--out", str(out)], capsys)
    run = tmp_path / "run"
    bc(["--env", "gaussian_mixture", "--num_updates", "4", "--evaluate.n", "20", "--out", str(run)])
    assert "has no world, and the rule was measured in worlds" in refused(main, ["--run", str(run)], capsys)
