"""The map of where DDIL helps: its cells, the pairing by seed, and what it says of shift and benefit."""

import json

import numpy as np
import pytest
import when
import yaml
from scipy import stats

from ddil_agents import compare
from ddil_agents.compare import Comparison, given_settings, merged
from ddil_agents.evaluate import PROVENANCE

SEEDS = range(12)
MEASURED = {
    "settings": {"n": 300, "seed": 7},
    "env_config": {"expert": "digits8"},
    **dict.fromkeys(PROVENANCE, "1.0"),
    "date": "2026-11-22",
    "hardware": "a CPU",
}


def planted_results(cell, effect, shift):
    """Results of a cell whose first arm scores 2 + .1 · seed and whose second differs by `effect` of it, seed by seed."""
    results = {}
    for arm, factor in zip(cell.arms, (1, 1 + effect), strict=True):
        for seed in SEEDS:
            score = factor * (2 + 0.1 * seed)
            row = {
                "endpoint_rmse": score if cell.follows else None,
                "frechet_to_expert": 2 * score,
                "recall": 1 / score,
                "teacher_nfe": 100,
                "student_nfe": 200,
                "action_mse_own": [9.0, score, 3 * score],
                "action_mse_forward": [9.0, score**2, score**2],
                "action_ratio": [None, shift, shift + 1, None],
                "gaussian_shift": [0.3, 0.1 * shift, 0.2 * shift],
            }
            floors = {"training_data": {"gaussian_shift": [9.0, 0.1, 0.1]}}
            results[arm, seed] = {"student": "a@2", "models": {"a@2": row}, "floors": floors, **MEASURED}
    return results


def planted(cell, effect, shift):
    """The records of such results."""
    return {key: when.record_of(result) for key, result in planted_results(cell, effect, shift).items()}


@pytest.fixture
def found():
    """Four cells in which an effect of −10 % follows each unit of shift, and one of LCM without any."""
    cells = [when.Cell(f"w 1, {n} steps", when.DAGGER, {}) for n in when.STEPS] + [when.Cell("another", when.LCM, {})]
    effects = (0.1, -0.1, -0.2, -0.3, 0.0)
    return {cell.name: when.effect_of(cell, planted(cell, effect, 1 - 10 * effect)) for cell, effect in zip(cells, effects, strict=True)}


def test_a_cells_effect_is_in_per_cent_of_its_baseline(found):
    effect = found["w 1, 8 steps"]["effects"]["ddil"]
    base = np.array([2 + 0.1 * seed for seed in SEEDS])
    assert effect["endpoint_rmse"]["n"] == len(SEEDS)
    assert effect["endpoint_rmse"]["mean"] == pytest.approx(-20)
    half = stats.t.ppf(0.975, len(SEEDS) - 1) * stats.sem(-0.2 * base) / base.mean()
    assert effect["endpoint_rmse"]["high"] == pytest.approx(-20 + 100 * half)
    assert effect["recall"]["mean"] == pytest.approx(25)
    assert effect["action_mse_own"]["baseline"] == pytest.approx(2 * base.mean())  # of the steps after the first
    assert effect["action_mse_own"]["mean"] == pytest.approx(-20)
    assert effect["action_mse_forward"]["mean"] == pytest.approx(100 * (0.8**2 - 1))
    assert found["another"]["effects"].keys() == {"half"}
    assert found["another"]["effects"]["half"].keys() == {"frechet_to_expert", "recall"}


def test_shift_is_that_of_the_baseline_after_the_first_step(found):
    assert found["w 1, 8 steps"]["shift"]["action_ratio"] == pytest.approx(3.5)  # mean of 3 and 4
    assert found["w 1, 8 steps"]["shift"]["gaussian_shift"] == pytest.approx(4.5)  # mean of 3 and 6 floors


def test_only_seeds_that_both_arms_finished_are_paired():
    cell = when.Cell("cell", when.DAGGER, {})
    results = planted(cell, 0.5, 1.0)
    del results["forward", 2], results["ddil", 5]
    found = when.effect_of(cell, results)
    effect = found["effects"]["ddil"]["endpoint_rmse"]
    assert effect["n"] == found["pairs"]["ddil"] == len(SEEDS) - 2
    assert found["shift_by_seed"].keys() == set(SEEDS) - {2, 5}
    assert effect["mean"] == pytest.approx(50)


def test_a_cell_that_lost_its_runs_keeps_its_line():
    cell = when.Cell("cell", when.DAGGER, {})
    results = {key: result for key, result in planted(cell, 0.5, 1.0).items() if key[0] == "forward" or key[1] == 3}
    found = {"cell": when.effect_of(cell, results)}
    when.adjust(found, 20)
    assert when.markdown(found).splitlines()[-1].startswith("| cell | ddil | 1 | – |")
    assert when.predicts(found) == {}


def test_samples_that_noise_does_not_determine_are_not_held_against_the_teachers_one_by_one(found):
    assert found["another"]["primary"] == "frechet_to_expert"
    assert {cell.name for cell in when.cells() if not cell.follows} == {
        "LCM, w 3, 4 steps", "LCM, w 3, 8 steps", "DMD2, w 3, 4 steps", "DMD2, w 3, 4 steps, batch 7",
    }  # fmt: skip


def test_holm_counts_cells_that_have_not_run(found):
    when.adjust(found, 20)
    p = {name: cell["effects"][cell["mixture"]][cell["primary"]]["p_holm"] for name, cell in found.items()}
    assert p["another"] == 1  # no difference at all
    assert p["w 1, 16 steps"] == pytest.approx(20 * 2 / 2 ** len(SEEDS))


def test_shift_that_predicts_benefit_correlates_with_it(found):
    for correlation in when.predicts(found).values():
        assert correlation == {"rho": pytest.approx(-1), "uncorrected": pytest.approx(-1), "cells": 4, "seeds": len(SEEDS)}


def test_chance_errors_that_shift_and_effect_share_do_not_correlate_them():
    rng = np.random.default_rng(0)
    found = {}
    for i in range(12):  # no cell has a shift or an effect of its own; a bad baseline has both
        luck = dict(zip(SEEDS, rng.normal(size=len(SEEDS)), strict=True))
        effect = {"by_seed": {seed: -value for seed, value in luck.items()}}
        shift = {seed: dict.fromkeys(when.SHIFTS, value) for seed, value in luck.items()}
        found[str(i)] = {
            "mixture": "ddil",
            "primary": "endpoint_rmse",
            "effects": {"ddil": {"endpoint_rmse": effect}},
            "shift_by_seed": shift,
        }
    for correlation in when.predicts(found).values():
        assert correlation["uncorrected"] == pytest.approx(-1)
        assert abs(correlation["rho"]) < 0.35


def test_the_map_is_written_and_drawn(found, tmp_path):
    when.adjust(found, 20)
    lines = when.markdown(found).splitlines()
    assert sum(line.startswith("| w 1, 8 steps | ddil | 12 | **-20.0 [") for line in lines) == 1
    assert sum(line.startswith("| another | half | 12 | – | **+0.0 [") for line in lines) == 1
    when.draw(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.parametrize("cell", when.cells(), ids=lambda cell: cell.name)
def test_the_cells_are_accepted_by_their_agents(cell, tmp_path):
    settings = Comparison("digits8", cell.arms, merged(when.BASE, cell.settings), 10, when.FIRST_SEED, primary=cell.primary)
    compare.check(settings, tmp_path)


def test_cells_hold_what_theory_speaks_of():
    cells = {cell.name: cell for cell in when.cells()}
    assert len(cells) == len(when.cells()) == 20
    for w in when.GUIDANCE:
        for n in when.STEPS:
            cell = cells[f"w {w:g}, {n} steps"]
            assert (cell.settings["guidance_scale"], cell.settings["num_steps"]) == (w, n)
    assert all(len(cell.arms) in (2, 3) for cell in cells.values())


def test_a_report_of_no_runs_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["when.py", "--report_only", "--runs", str(tmp_path / "none"), "--out", str(tmp_path / "when.json")])
    with pytest.raises(SystemExit):
        when.main()
    assert "none of these cells has run there" in capsys.readouterr().err


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Runs the script with training replaced by planted results; returns a function from --runs to what it would have trained."""

    def run(folder, *arguments, lose=(), hardware="a CPU"):
        trained = []

        def train(runs, settings, out, updates, jobs):
            results = planted_results(next(cell for cell in when.cells() if cell.arms == settings.arms), -0.1, 2.0)
            for each in runs:
                trained.append((each.arm, each.seed))
                each.directory.mkdir(parents=True)
                each.directory.with_suffix(".yaml").write_text(yaml.safe_dump(given_settings(settings, each.arm, each.seed)))
                each.directory.with_suffix(".log").write_text("started\nthe loss is not finite\n")
                if trained[-1] not in lose:
                    result = results[each.arm, each.seed - when.FIRST_SEED] | {"hardware": hardware}
                    (each.directory / "result.json").write_text(json.dumps(result))

        monkeypatch.setattr(when, "train", train)
        argv = ["when.py", "--seeds", "3", "--cells", "LCM, w 3, 4 steps", "--runs", str(tmp_path / folder), *arguments]
        monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path / "when.json")])
        when.main()
        return trained

    return run


def test_a_run_in_the_records_is_not_run_again(mapped, tmp_path):
    lines = tmp_path / "when_runs.jsonl"
    assert len(mapped("one machine")) == 6
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:5]))
    assert mapped("another") == [("half", 102)]
    first = json.loads((tmp_path / "when.json").read_text())
    cell = first["cells"]["LCM, w 3, 4 steps"]
    assert cell["effects"]["half"]["frechet_to_expert"]["mean"] == pytest.approx(-10)
    assert cell["pairs"] == {"half": 3}
    assert (first["date"], first["hardware"]) == ("2026-11-22", "a CPU")
    assert mapped("a third") == []
    mapped("a fourth", "--report_only")
    assert json.loads((tmp_path / "when.json").read_text()) == first


def test_a_run_that_failed_has_its_line(mapped, tmp_path):
    assert len(mapped("one", lose=[("half", 101)])) == 6
    assert mapped("another") == []
    found = json.loads((tmp_path / "when.json").read_text())
    assert found["lost"] == ["LCM, w 3, 4 steps, half, seed 101: the loss is not finite"]
    assert found["cells"]["LCM, w 3, 4 steps"]["pairs"] == {"half": 2}
    assert "- ! LCM, w 3, 4 steps, half, seed 101" in (tmp_path / "when.md").read_text()


def test_a_report_does_not_call_runs_that_go_on_lost(mapped, tmp_path):
    mapped("one", lose=[("half", 101)])
    (tmp_path / "when_runs.jsonl").unlink()
    mapped("one", "--report_only")
    assert json.loads((tmp_path / "when.json").read_text())["lost"] == []


def test_lines_that_were_added_meanwhile_stay(mapped, tmp_path, monkeypatch):
    lines, key = tmp_path / "when_runs.jsonl", ("another cell", "half", 100)
    harvest = when.harvest

    def slow(*arguments):
        if not lines.is_file():
            when.write_records(lines, {key: {"lost": "", "given": ""}})
        return harvest(*arguments)

    monkeypatch.setattr(when, "harvest", slow)
    mapped("one")
    assert when.read_records(lines).keys() > {key}


def test_a_cell_is_made_on_one_kind_of_device(mapped, tmp_path, capsys):
    mapped("one")
    lines = tmp_path / "when_runs.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(SystemExit):
        mapped("two", hardware="a GPU")
    assert "LCM, w 3, 4 steps was run on a CPU and a GPU, which draw other noise" in capsys.readouterr().err


def test_runs_that_were_begun_with_other_settings_are_refused(mapped, tmp_path, monkeypatch, capsys):
    mapped("one")
    (tmp_path / "when_runs.jsonl").unlink()
    monkeypatch.setitem(when.BASE, "batch_size", 31)
    with pytest.raises(SystemExit):
        mapped("one", "--report_only")  # of runs that were begun with other settings
    assert "had other settings than they have now" in capsys.readouterr().err


def test_records_of_other_settings_are_refused(mapped, monkeypatch, capsys):
    mapped("one")
    monkeypatch.setitem(when.BASE, "batch_size", 31)
    with pytest.raises(SystemExit):
        mapped("two")
    assert "('LCM, w 3, 4 steps', 'forward', 100)" in (told := capsys.readouterr().err)
    assert "had other settings than they have now; remove them" in told
