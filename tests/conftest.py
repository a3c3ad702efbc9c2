"""Tests run on the CPU, whose numbers they assert; `pytest -m gpu` runs those that need a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs, unless their tests are asked for; torch looks for them when it first needs one."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu on a machine that has one"))


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
