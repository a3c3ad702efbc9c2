"""The table of cards is that of the committed counts, and the architectures that were counted are the published ones' by size."""

from __future__ import annotations

import json

import pytest
import torch
from hardware import FREE, MODELS, table
from helpers import ROOT
from memory import dtype_of

RESULTS = ROOT / "benchmarks" / "results"
BILLIONS = {  # weights
    "Stable Diffusion 1.5, 512 × 512": 0.8595,
    "SDXL, 1024 × 1024": 2.5675,
    "Stable Diffusion 3.5 medium, 1024 × 1024": 2.2432,
}


def test_the_committed_table_is_that_of_the_committed_counts() -> None:
    found = json.loads((RESULTS / "hardware.json").read_text())
    assert found["free_gb"] == FREE
    assert (RESULTS / "hardware.md").read_text() == table(found["rows"]) + "\n"
    assert {row["model"] for row in found["rows"]} == set(MODELS)


def test_a_card_is_named_if_it_leaves_room() -> None:
    row = {"model": "m", "networks": "full", "batch": 1, "peak": 22.1e9, "peak_8bit": 22.0e9}
    assert table([row]).splitlines()[-1] == "| m | full | 1 | 22.1 | 80 GB | 22.0 | 24 GB |"
    assert "none of these" in table([{**row, "peak": 79e9}])


@pytest.mark.parametrize("model", MODELS)
def test_the_architectures_have_the_published_number_of_weights(model: str) -> None:
    make, inputs = MODELS[model]
    network = make()
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(BILLIONS[model], abs=1e-4)
    assert dtype_of(network) == torch.float32
    assert all(x.device.type == "meta" for x in inputs(1, torch.float32).values() if isinstance(x, torch.Tensor))
