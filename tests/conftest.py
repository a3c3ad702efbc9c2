"""Tests run on the CPU, whose numbers they assert; `CUDA_VISIBLE_DEVICES=0 pytest -k gpu` runs those that need a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch


@pytest.fixture
def own_generator() -> Iterator[None]:
    """Torch's own generator, which loading a run sets, starts at 0 and is put back: no test sees another's draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_generator: None) -> None:
    """The working directory is empty and far from the checkout; stable-baselines3 logs there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path / "sb3"))
