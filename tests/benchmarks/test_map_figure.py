"""The figure of all cells: what it reads from records of pictures and of worlds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from map_figure import Cell, correlation, main, read_cells


def picture(arm: str, seed: int, own: float) -> dict:
    return {"cell": "w 3, 2 steps", "arm": arm, "seed": seed, "average": {"error_own": [9.0, own], "error_forward": [9.0, 2.0]}}


def world(cell: str, arm: str, seed: int, own: float) -> dict:
    return {"cell": cell, "arm": arm, "seed": seed, "error_own": [1.0], "error_ratio": own / 0.1, "error_data": 0.1}


def test_ratio_and_effect_are_read_from_both_maps() -> None:
    records = [picture("forward", 0, 4.0), picture("student", 0, 1.0), picture("forward", 1, 1.0), picture("student", 1, 1.0)]
    (cell,) = read_cells({(r["cell"], r["arm"], r["seed"]): r for r in records}, "pictures")
    assert cell.ratio == pytest.approx([math.log(2), math.log(0.5)])  # of the second step: the first starts from noise
    assert cell.effect == pytest.approx([math.log(10 / 13), 0])
    records = [world("fork, x", arm, seed, own) for arm, own in (("bc", 0.4), ("ddil", 0.1)) for seed in (0, 1)]
    (cell,) = read_cells({(r["cell"], r["arm"], r["seed"]): r for r in records}, "worlds")
    assert cell.kind == "fork"
    assert cell.point == pytest.approx((4.0, -75.0))


def test_a_planted_order_is_found() -> None:
    generator = np.random.default_rng(0)
    cells = [Cell(str(i), "fork", [i + generator.normal() / 10] * 6, [-i + generator.normal() / 10] * 6) for i in range(8)]
    found, low, high = correlation(cells, np.random.default_rng(0))
    assert found == pytest.approx(-1)
    assert -1 <= low < high < -0.5


def test_the_command_writes_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [world(f"fork, {i}", arm, seed, own) for i in range(4) for arm, own in (("bc", 0.4 + i), ("ddil", 0.1)) for seed in (0, 1)]
    (tmp_path / "worlds_runs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("map_figure.DRAWS", 20)
    monkeypatch.setattr("sys.argv", ["map_figure.py", "--results", str(tmp_path)])
    main()
    assert "Spearman's rank correlation, all cells (4): -1.00" in (tmp_path / "map.md").read_text()
    assert (tmp_path / "map.png").is_file()
