"""The rule of thumb: what it is fitted to, and how it is tested."""

import pytest
from rule import RULES, Cell, fit, leave_one_out, right, summarise, write_table


def cell(ratio: float, shortfall: float, gain: float) -> Cell:
    return Cell(f"{ratio}", 10, ratio, shortfall, gain)


CELLS = [cell(r, 0.5, 0.3) for r in (4.0, 5.0, 9.0)] + [cell(r, 0.0, 0.0) for r in (1.0, 1.1)]


def test_the_threshold_is_the_middle_of_the_gap_that_parts_the_cells() -> None:
    assert fit(CELLS, RULES["ratio"]) == pytest.approx((1.1 * 4.0) ** 0.5)
    assert right(CELLS, RULES["ratio"], fit(CELLS, RULES["ratio"])) == 5


def test_a_rule_is_tested_on_cells_that_it_was_not_fitted_to() -> None:
    assert leave_one_out(CELLS, RULES["ratio"]) == 5
    odd = [*CELLS, cell(2.9, 0.5, 0.0)._replace(noise=0.1)]  # falls short and gains nothing, at a ratio that the others would call worth it
    assert leave_one_out(odd, RULES["ratio"]) == 5
    assert leave_one_out(odd, RULES["shortfall"]) == 5
    found = summarise(odd, 10)
    assert (found["gained"], found["fell_short"]) == (3, 4)
    assert "ddil gained as much in 3 of 4 cells. In the other 2 there was no room" in write_table(odd, found)
    assert "without rollouts, had more success than ddil in 1 of the 4" in write_table(odd, found)
    assert found["closed"] == [0.6, 0.6, 0.6]
    assert found["interim"] is False
    assert summarise(odd, 11)["interim"] is True
