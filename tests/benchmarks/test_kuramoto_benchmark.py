"""The benchmark of the Kuramoto–Sivashinsky equation: its runs, and what its report makes of records with a planted effect."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import kuramoto_arms
import numpy as np
import pytest
import torch
from kuramoto_arms import ARMS, BASE, CELLS, CORE, SMALL, Cell, LowPass, Task, config_of, low_pass, seeds_of, weights_of
from kuramoto_report import MAIN, SEEDS, TUNING, best_noise, claims, summarise, verdicts, write_report
from records import collect_records, restore_records
from worlds_runs import Runs

from ddil_agents import Dagger
from ddil_agents.commands.parse import expert_and_config, parse
from ddil_env import StudentPolicy, TimeGrid, unroll
from ddil_env.experts.kuramoto import KuramotoSolver
from ddil_env.experts.train_kuramoto import make_draw
from ddil_env.worlds import kuramoto

PROVENANCE = {"hardware": "a CPU", "torch": "2", "date": "2026-11-28"}
COSTS = {"teacher_nfe": 1, "student_nfe": 1, "visits": 0, "cpu_seconds": 1.0}


def planted(gain: float) -> dict[Any, dict[str, Any]]:
    """Runs in which the students of own histories have `gain` more success than bc in the cells that are tested; noise of ± .02."""
    generator, records = np.random.default_rng(0), {}
    for cell in CELLS:
        for arm in ARMS:
            for seed in seeds_of(cell, arm):
                own = gain * (cell in MAIN and arm in ("ddil", "dagger"))
                row: dict[str, Any] = {"success": 0.5 + own + 0.02 * generator.uniform(-1, 1), "valid_time": 60.0, "late_shift": 0.1}
                if arm.startswith("dart"):
                    noise = float(arm.split()[1])
                    row |= {"success": 0.3 + 0.6 * (noise >= 0.06), "valid_time": 60 - 100 * noise}
                row |= {"high_modes": 1.0, "error_data": 0.1, "error_own": [0.1, None], "error_expert": [0.1], "error_ratio": 2.0}
                row |= {"teacher": {"success": 1.0, "valid_time": 61.0}, "settings": "", **COSTS, **PROVENANCE}
                records[cell, arm, seed] = {"cell": cell, "arm": arm, "seed": seed, **row}
    return records


def test_the_cells_arms_and_seeds_are_those_that_were_registered() -> None:
    text = Path(kuramoto_arms.__file__).with_name("README.md").read_text()
    section = text.split("## The equation: what we expect")[1].split("\n## ")[0]
    assert all(f"| {cell} |" in section for cell in CELLS)
    listed = {arm for row in section.splitlines() if row.startswith("| ") for arm in row.split("|")[1].strip(" *").split(", ")}
    assert set(ARMS) - listed == {"bc, four times", *(arm for arm in ARMS if arm.startswith("dart") or "rate" in arm)}
    assert "| bc, four times |" in section
    assert "| dart .01, .03, .06, .1, .3 |" in section
    assert [seeds_of(MAIN[0], arm) for arm in ("bc", "ddil", "teacher")] == [(*TUNING, *SEEDS), tuple(SEEDS), tuple(SEEDS[:5])]
    assert seeds_of(MAIN[1], "unroll 2") == seeds_of("dt 3", "teacher") == ()
    assert all(seeds_of(cell, arm) == tuple(SEEDS[:5]) for cell in CELLS if cell not in MAIN for arm in CORE)
    runs = sum(len(seeds_of(cell, arm)) for cell in CELLS for arm in ARMS)
    assert f"{runs} runs" in section
    assert Task(MAIN[0], TUNING[0], Path()).arms == [arm for arm in ARMS if ARMS[arm].tuned]


def test_the_arm_dagger_is_the_preset_at_another_rate() -> None:
    parser, cfg = parse(Dagger, ["--env", "kuramoto", "--config", "kuramoto"])
    preset = expert_and_config(Dagger, parser, cfg)[1]
    assert config_of(CELLS[MAIN[0]], "dagger", 0) == dataclasses.replace(preset, learning_rate=0.01)


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "more"), (-0.3, "less"), (0.0, "none")])
def test_a_planted_effect_is_found_with_its_sign(gain: float, verdict: str) -> None:
    found = verdicts(Runs(planted(gain), SEEDS))
    assert {test["verdict"] for cell in MAIN for test in found[cell].values()} == {verdict}
    if gain:
        assert all(test["p"] == pytest.approx(4 * 2**-7) for cell in MAIN for test in found[cell].values())  # Holm over four, 8 seeds


def test_the_report_tests_nothing_before_all_runs_are_there_and_compares_no_tuning_seed(tmp_path: Path) -> None:
    records = planted(0.3)
    for seed in TUNING:
        records[MAIN[0], "bc", seed]["success"] = 99.0
    summary = summarise(records, CELLS)
    main, other = summary["cells"][MAIN[0]], summary["cells"]["dt 3"]
    assert (
        main["best_dart"] == best_noise(Runs(records, SEEDS), MAIN[0]) == "dart 0.06"
    )  # of equal stability that of the longest valid time
    assert main["arms"]["bc"]["success"] == pytest.approx(0.5, abs=0.02)
    assert main["dagger_beside"]["dart 0.06"]["valid_time"]["mean"] == pytest.approx(6)
    assert main["beside_bc"]["dagger"]["success"]["mean"] == pytest.approx(0.3, abs=0.03)
    assert main["none"]["dagger"] is False
    assert other["none"]["dagger"] is main["no_shorter"]["dagger"] is True
    write_report(records, CELLS, tmp_path / "all.json")
    assert "no test yet" not in (text := (tmp_path / "all.md").read_text())
    assert "more (p = 0.031), more (p = 0.031)" in text
    assert claims(summary["cells"]) == {"no_shorter": True, "better_than_dart": False}  # its bounded share is lower than dart's .9
    assert "dagger is better than the best dart: **does not hold**" in text
    records[MAIN[1], "ddil", SEEDS[-1]] |= {"lost": "the loss is not finite", "success": 0.0}
    write_report(records, CELLS, tmp_path / "lost.json")
    assert f"ddil, not finite: [{SEEDS[-1]}]" in (tmp_path / "lost.md").read_text()
    del records[MAIN[1], "ddil", SEEDS[-1]]
    write_report(records, CELLS, tmp_path / "less.json")
    assert "no test yet" in (tmp_path / "less.md").read_text()
    assert (less := json.loads((tmp_path / "less.json").read_text())["cells"])[MAIN[0]]["test"] is None
    assert claims(less) == {}


def test_a_run_is_recorded_once_and_a_teacher_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world, trained = KuramotoSolver.make_world, []
    monkeypatch.setattr(KuramotoSolver, "make_world", lambda self, n, **options: make_world(self, n, num_frames=16))
    monkeypatch.setattr(kuramoto, "TRANSIENT", 1.0)
    monkeypatch.setattr(kuramoto_arms, "BASE", BASE | {"num_updates": 4, "collect_size": 32, "updates_per_collect": 2})
    monkeypatch.setattr(kuramoto_arms, "ROLLOUTS", 4)
    monkeypatch.setitem(CELLS, MAIN[0], Cell(solver=True))  # which is cheaper to ask than the teacher
    monkeypatch.setattr(kuramoto_arms, "ARMS", {arm: ARMS[arm] for arm in ("dagger", "within frame", "low-pass")})
    task = Task(MAIN[0], SEEDS[0], tmp_path / "runs")
    kuramoto_arms.run(task)
    kept = tmp_path / "kuramoto_runs.jsonl"
    records = collect_records(tmp_path / "runs", kept, kuramoto_arms.check)
    found = {arm: records[MAIN[0], arm, SEEDS[0]] for arm in kuramoto_arms.ARMS}
    assert found["dagger"]["visits"] > 0 == found["within frame"]["visits"] == found["low-pass"]["visits"]
    assert found["within frame"]["student_nfe"] > found["low-pass"]["student_nfe"]  # its x_t are its own
    again = Task(MAIN[0], SEEDS[0], tmp_path / "again")
    assert restore_records(records, [again]) == 3
    written = again.place("dagger").stat().st_mtime_ns
    kuramoto_arms.run(again)
    assert again.place("dagger").stat().st_mtime_ns == written
    records[MAIN[0], "dagger", SEEDS[0]]["teacher_weights"] = "another"
    with pytest.raises(ValueError, match="runs of a cell need the same file of weights"):
        kuramoto_arms.check(records)
    monkeypatch.setattr(kuramoto_arms, "VERSION", kuramoto_arms.VERSION + 1)
    with pytest.raises(ValueError, match=r"had other settings than it has now; remove it from --out and --runs"):
        collect_records(tmp_path / "runs", kept, kuramoto_arms.check)

    def train(out: Path, **options: Any) -> None:
        trained.append(options)
        out.write_bytes(b"")

    monkeypatch.setattr(kuramoto_arms, "train", train)
    assert weights_of("shipped", tmp_path) is None
    assert weights_of("dt 3, absolute", tmp_path) == weights_of("dt 3, absolute", tmp_path) is not None
    assert trained == [{"dt": 3.0, "absolute": True}]


def test_a_low_pass_keeps_long_waves_and_removes_the_mean_and_short_ones() -> None:
    points = torch.arange(48) / 48
    for mode, kept in [(0, 0.0), (1, 1.0), (9, 1.0), (10, 0.0), (24, 0.0)]:
        wave = torch.cos(2 * math.pi * mode * points)
        torch.testing.assert_close(low_pass(wave), kept * wave, atol=1e-5, rtol=0)
    solver, c = KuramotoSolver(), torch.randn(3, 1, 1, 48)
    grid = TimeGrid(solver.schedule, 2)
    policies = [StudentPolicy(solver.make_student(**SMALL), solver)]
    policies.append(LowPass(policies[0], solver))
    x_T = torch.randn(3, 1, 48)
    samples = [unroll(policy, grid, x_T, c) for policy in policies]
    torch.testing.assert_close(*(x[:, 1] for x in samples), rtol=0, atol=0)  # within a frame it changes nothing
    plain, short = (solver.make_world(1).transition(c, x[:, -1])[0] for x in samples)
    torch.testing.assert_close(short, low_pass(plain), atol=1e-5, rtol=0)


def test_histories_of_a_teacher_are_noised_or_clean_and_its_samples_increments_or_frames() -> None:
    solutions = torch.randn(8, 10, 1, dtype=torch.float64).expand(-1, -1, 48)  # the same at every point: shifts change nothing
    std, increment = solutions.std(), solutions.diff(dim=1).std()
    frames = {round(float(x), 4) for x in (solutions / std).flatten()}
    for noise in (0.0, 0.15):
        for absolute in (False, True):
            x_0, history = make_draw(solutions, noise, absolute)(64)
            assert (x_0.shape, history.shape) == ((64, 1, 48), (64, 1, 1, 48))
            spread = history.std(-1)
            assert bool((spread == 0).all()) if noise == 0 else 0 < float(spread.mean()) < 0.1
            following = x_0 if absolute else history[:, 0] + x_0 * (increment / std).float()
            assert {round(float(x), 4) for x in following[..., 0].flatten()} <= frames  # the true next frame, whatever the noise
