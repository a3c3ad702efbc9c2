"""The map of where DDIL helps: its cells, the pairing by seed, and what it says of shift and benefit."""

import json
import math

import numpy as np
import pytest
import when
from scipy import stats

from ddil_agents import compare
from ddil_agents.compare import Comparison, merged

SEEDS = range(12)


def planted(out, cell, effect, shift, missing=()):
    """Results of a comparison whose first arm scores 2 + .1 · seed and whose second differs by `effect` of it, seed by seed."""
    runs = []
    for arm, factor in zip(cell.arms, (1, 1 + effect), strict=True):
        for seed in SEEDS:
            directory = out / cell.name / f"{arm}-s{seed}"
            directory.mkdir(parents=True)
            score = factor * (2 + 0.1 * seed)
            row = {
                "endpoint_rmse": score,
                "frechet_to_expert": score,
                "recall": 1 / score,
                "action_ratio": [None, shift, shift + 1, None],
                "gaussian_shift": [0.3, 0.1 * shift, 0.2 * shift],
            }
            floors = {"held_out_real": {"gaussian_shift": [9.0, 0.1, 0.1]}}
            result = {"student": "a@2", "settings": {}, "env_config": {}, "models": {"a@2": row}, "floors": floors}
            (directory / "result.json").write_text(json.dumps(result))
            runs.append({"arm": arm, "seed": seed, "directory": str(directory), "done": (arm, seed) not in missing})
    return {"budgets": {"updates": {"runs": runs}}}


@pytest.fixture
def found(tmp_path):
    """Five cells in which an effect of −10 % follows each unit of shift, and one without any."""
    cells = [when.Cell(f"w 1, {n} steps", when.DAGGER, {}) for n in when.STEPS] + [when.Cell("another", when.LCM, {})]
    effects = (0.1, 0.0, -0.1, -0.2, -0.3)
    return {
        cell.name: when.effect_of(cell, planted(tmp_path, cell, effect, 1 - 10 * effect), tmp_path)
        for cell, effect in zip(cells, effects, strict=True)
    }


def test_a_cells_effect_is_in_per_cent_of_its_baseline(found):
    effect = found["w 1, 16 steps"]["effects"]["ddil"]
    base = np.array([2 + 0.1 * seed for seed in SEEDS])
    assert effect["endpoint_rmse"]["n"] == len(SEEDS)
    assert effect["endpoint_rmse"]["mean"] == pytest.approx(-20)
    half = stats.t.ppf(0.975, len(SEEDS) - 1) * stats.sem(-0.2 * base) / base.mean()
    assert effect["endpoint_rmse"]["high"] == pytest.approx(-20 + 100 * half)
    assert effect["recall"]["mean"] == pytest.approx(25)
    assert found["another"]["effects"].keys() == {"half"}


def test_shift_is_that_of_the_baseline_after_the_first_step(found):
    assert found["w 1, 16 steps"]["shift"]["action_ratio"] == pytest.approx(3.5)  # mean of 3 and 4
    assert found["w 1, 16 steps"]["shift"]["gaussian_shift"] == pytest.approx(4.5)  # mean of 3 and 6 floors


def test_only_seeds_that_both_arms_finished_are_paired(tmp_path):
    cell = when.Cell("cell", when.DAGGER, {})
    result = planted(tmp_path, cell, 0.5, 1.0, missing={("forward", 2), ("ddil", 5)})
    effect = when.effect_of(cell, result, tmp_path)["effects"]["ddil"]["endpoint_rmse"]
    assert effect["n"] == len(SEEDS) - 2
    assert effect["mean"] == pytest.approx(50)


def test_holm_is_over_the_cells_mixtures(found):
    when.adjust(found)
    p = {name: cell["effects"][cell["mixture"]]["endpoint_rmse"]["p_holm"] for name, cell in found.items()}
    assert p["w 1, 4 steps"] == 1  # no difference at all
    assert p["w 1, 16 steps"] == pytest.approx(5 * 2 / 2 ** len(SEEDS))


def test_shift_that_predicts_benefit_correlates_with_it(found):
    for correlation in when.predicts(found).values():
        assert correlation == {"rho": pytest.approx(-1), "p": pytest.approx(0, abs=1e-6), "cells": 5}
    found["another"]["shift"]["action_ratio"] = math.nan
    assert when.predicts(found)["action_ratio"]["cells"] == 4


def test_the_map_is_written_and_drawn(found, tmp_path):
    when.adjust(found)
    lines = when.markdown(found).splitlines()
    assert sum(line.startswith("| w 1, 16 steps | ddil | 12 | -20.0 [") for line in lines) == 1
    when.draw(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.parametrize("cell", when.cells(), ids=lambda cell: cell.name)
def test_the_cells_are_accepted_by_their_agents(cell, tmp_path):
    settings = Comparison("digits8", cell.arms, merged(when.BASE, cell.settings), 10, primary="endpoint_rmse")
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
