"""The benchmark of worlds: its runs, and what its report makes of records with a planted effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds
import worlds_report
from records import collect_records, restore_records
from worlds_adaptive import adaptive_claims, adaptive_table
from worlds_report import summarise, verdicts, write_report
from worlds_runs import SEEDS, TUNING, Runs

PROVENANCE = {"hardware": "a CPU", "torch": "2", "date": "2026-11-28"}


def planted(gain: float, beside_teacher: float | None = None) -> dict[Any, dict[str, Any]]:
    """Runs in which ddil has `gain` more success than bc in fork's first cell, and as much elsewhere; noise of ± .02."""
    generator, first = np.random.default_rng(0), next(iter(worlds.CELLS))
    records = {}
    for name in worlds.CELLS:
        for arm in worlds.ARMS:
            for seed in (*SEEDS, *(TUNING if arm.split()[0] in worlds.TUNED else ())):
                more = {"ddil": gain, "teacher": 0.0 if beside_teacher is None else gain - beside_teacher}.get(arm, 0.0) * (name == first)
                success = 0.5 + more + (0.2 if (arm, seed) == ("dart 0.3", TUNING[0]) else 0) + 0.02 * generator.uniform(-1, 1)
                row = {"success": success, "return": 1.0, "error_own": [0.2, None], "error_expert": [0.1, 0.1], "error_data": 0.1}
                row |= {"error_ratio": 2.0 + len(name) / 50 + gain * (name == first), "teacher": {"success": 1.0, "return": 5.0}}
                row |= {
                    "teacher_nfe": 1,
                    "student_nfe": 1,
                    "visits": 0,
                    "seconds": 1.0,
                    "settings": "",
                    "few_steps": {"success": 0.9, "return": 5.0},
                }
                records[name, arm, seed] = {"cell": name, "arm": arm, "seed": seed, **row, **PROVENANCE}
    return records


def test_the_cells_and_arms_are_those_that_were_registered() -> None:
    envs = [cell.env for cell in worlds.CELLS.values()]
    assert (envs.count("fork"), envs.count("lunar_lander")) == (9, 7)
    text = Path(worlds.__file__).with_name("README.md").read_text()
    assert "(9 of `fork`, 7 of `lunar_lander`)" in text
    tested = worlds.Task(next(iter(worlds.CELLS)), 709, Path()).arms
    assert tested == ["bc", "ddil", "dagger", "teacher", "teacher too", "adaptive"]
    assert set(worlds.Task(next(iter(worlds.CELLS)), TUNING[0], Path()).arms) == set(worlds.ARMS) - {*tested}


@pytest.mark.parametrize(("short", "not_worse", "better"), [(0.0, True, 16), (0.2, False, 15)])
def test_the_claims_about_adaptive_shares(short: float, not_worse: bool, better: int) -> None:
    records, first = planted(0.0), next(iter(worlds.CELLS))
    for (name, arm, _), record in records.items():
        record["success"] += {"adaptive": 0.1 - short * (name == first), "dagger": 0.1, "bc": -0.1}.get(arm, 0.0)
    claims = adaptive_claims(Runs(records), worlds.CELLS)
    assert claims["cells"][first]["best"] == "dagger"
    assert claims["cells"][first]["not_worse"] is claims["not_worse"] is not_worse
    assert claims["better_than_paper"] == better
    text = "\n".join(adaptive_table(claims))
    assert f"more than 0.05 in every cell: **{'holds' if not_worse else 'does not hold'}**" in text
    del records[first, "adaptive", SEEDS[0]]
    assert set(adaptive_claims(Runs(records), worlds.CELLS)) == {"cells"}  # no claim before all runs are there


@pytest.mark.parametrize(
    ("gain", "beside_teacher", "expected"),
    [
        (0.1, None, "helps"),
        (-0.1, None, "hurts"),
        (0.1, 0.0, "more success than bc, not than teacher"),
        (0.0, None, "none"),
    ],
)
def test_a_planted_effect_is_found_with_its_sign(gain: float, beside_teacher: float | None, expected: str) -> None:
    found = verdicts(Runs(planted(gain, beside_teacher)), worlds.CELLS)
    first, *others = worlds.CELLS
    assert found[first]["verdict"] == expected
    assert {found[name]["verdict"] for name in others} == {"none"}


def test_nothing_is_tested_before_all_runs_are_there_and_tuning_seeds_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worlds_report, "DRAWS", 20)
    records, first = planted(0.1), next(iter(worlds.CELLS))
    summary = summarise(records, worlds.CELLS)
    assert summary["cells"][first]["best"]["dart"] == "dart 0.3"
    assert summary["cells"][first]["arms"]["dart 0.3"]["success"] == pytest.approx(0.5, abs=0.02)
    assert summary["cells"][first]["success"]["bc"]["mean"] == pytest.approx(0.1, abs=0.02)
    write_report(records, worlds.CELLS, tmp_path / "worlds.json")
    assert (tmp_path / "worlds.png").is_file()
    del records[first, "teacher", SEEDS[-1]]
    write_report(records, worlds.CELLS, tmp_path / "less.json")
    assert "no test and no verdict yet" in (tmp_path / "less.md").read_text()
    assert not (tmp_path / "less.png").exists()
    assert all(cell["test"] is None for cell in json.loads((tmp_path / "less.json").read_text())["cells"].values())


def test_a_run_is_recorded_once_and_records_of_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "BASE", worlds.BASE | {"num_updates": 4, "collect_size": 32, "updates_per_collect": 2})
    monkeypatch.setattr(worlds, "EPISODES", {"fork": 4, "lunar_lander": 4})
    monkeypatch.setattr(worlds, "ARMS", {name: worlds.ARMS[name] for name in ("ddil", "dart 0.3", "noise 0.1")})
    worlds.make_evaluator.cache_clear()
    worlds.few_steps.cache_clear()
    name = "fork, width 32, 2 steps, 8 demos"
    worlds.run(worlds.Task(name, SEEDS[0], tmp_path / "runs"))
    kept = tmp_path / "worlds_runs.jsonl"
    records = collect_records(tmp_path / "runs", kept, worlds.check)
    assert set(records) == {(name, arm, SEEDS[0]) for arm in worlds.ARMS}
    assert records[name, "ddil", SEEDS[0]]["visits"] > 0
    assert records[name, "noise 0.1", SEEDS[0]]["visits"] == 0 < records[name, "dart 0.3", SEEDS[0]]["visits"]
    task = worlds.Task(name, SEEDS[0], tmp_path / "again")
    assert restore_records(records, [task]) == 3
    written = task.place("ddil").stat().st_mtime_ns
    worlds.run(task)
    assert task.place("ddil").stat().st_mtime_ns == written
    monkeypatch.setattr(worlds, "VERSION", worlds.VERSION + 1)
    with pytest.raises(ValueError, match=r"had other settings than it has now; remove it from --out and --runs"):
        collect_records(tmp_path / "runs", kept, worlds.check)
    worlds.make_evaluator.cache_clear()
    worlds.few_steps.cache_clear()
