"""The runs of `worlds.py`: their values by seed, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddil_agents.comparison.statistics import paired_comparison

SEEDS, TUNING = range(700, 710), (690, 691, 692)  # those that are compared; those on which sizes of noise are chosen
TUNED = ("dart", "noise")  # kinds of arms of which each cell's best size is chosen

Records = dict[tuple[str, str, int], dict[str, Any]]
Values = dict[int, float]  # by seed
ENOUGH = 0.2  # success, of 500 episodes, for an entropy of routes; a board of 15 rows has too many for any number


def value(record: Mapping[str, Any], metric: str) -> float | None:
    """A metric of one run; errors as means over the samples of its episodes, and over eighths for the teacher's; None if not measured."""
    if metric == "error_own":
        ratio, data = record.get("error_ratio"), record.get("error_data")
        return None if ratio is None or data is None else ratio * data
    if metric == "error_first":
        return record["error_own"][0] if "error_own" in record else None
    if metric == "error_last":
        return record["error_own"][-1] if "error_own" in record else None
    if metric == "error_expert":
        spans = [x for x in record.get("error_expert", ()) if x is not None]
        return float(np.mean(spans)) if spans else None
    if metric == "route_entropy" and (record.get("success", 0) < ENOUGH or "num_rows" in record.get("cell", "")):
        return None
    return record.get(metric)


class Runs:
    """The runs of all cells.

    Args:
        records: By cell, arm and seed.
        seeds: Those that are compared.
    """

    def __init__(self, records: Records, seeds: Iterable[int] = SEEDS) -> None:
        self.records, self.seeds = records, tuple(seeds)

    def of(self, cell: str, arm: str, seeds: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
        chosen = self.seeds if seeds is None else seeds
        return {seed: self.records[cell, arm, seed] for seed in chosen if (cell, arm, seed) in self.records}

    def values(self, cell: str, arm: str, metric: str, seeds: Iterable[int] | None = None) -> Values:
        found = {seed: value(record, metric) for seed, record in self.of(cell, arm, seeds).items()}
        return {seed: x for seed, x in found.items() if x is not None and math.isfinite(x)}

    def gains(self, cell: str, arm: str, base: str, metric: str = "success", log: bool = False) -> Values:
        """arm − base, or ln(arm / base), by seed, where both have run."""
        own, other = self.values(cell, arm, metric), self.values(cell, base, metric)
        return {seed: math.log(own[seed] / other[seed]) if log else own[seed] - other[seed] for seed in own if seed in other}

    def best(self, cell: str, kind: str) -> str | None:
        """The size of noise with the highest mean success on the tuning seeds, of equal ones that of least error on own conditions."""
        sizes = dict.fromkeys(arm for c, arm, seed in self.records if c == cell and arm.split()[0] == kind and seed in TUNING)
        success = {arm: self.values(cell, arm, "success", TUNING) for arm in sizes}
        if len(sizes) < 3 or any(len(values) < len(TUNING) for values in success.values()):
            return None
        error = {arm: np.mean(list(self.values(cell, arm, "error_own", TUNING).values()) or [math.inf]) for arm in sizes}
        return max(sizes, key=lambda arm: (np.mean(list(success[arm].values())), -error[arm]))

    def complete(self, cells: Iterable[str]) -> bool:
        """Whether all runs of the arms that are tested are there."""
        return all((cell, arm, seed) in self.records for cell in cells for arm in ("bc", "ddil", "teacher") for seed in SEEDS)


def interval(values: Values, level: float = 0.95) -> dict[str, Any] | None:
    """Mean, t-interval and number of seeds; None of fewer than two."""
    if len(values) < 2:
        return None
    pair = paired_comparison(list(values.values()), [0.0] * len(values), level=level)
    return {"mean": pair.mean, "low": pair.low, "high": pair.high, "seeds": len(values)}


def signed(effect: dict[str, Any] | None) -> str:
    return "–" if effect is None else f"{effect['mean']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]"
