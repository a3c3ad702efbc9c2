"""What a GPU adds: runs that resume bit for bit, and updates that never wait for the device. benchmarks/gpu.py has the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from gpu_checks import LEARNERS, WAITING, settings
from torch import Tensor

from ddil_agents import DMD2, LCM, Algorithm, Batch, Callback, Dagger
from ddil_env import DenoisingEnv, DenoisingVectorEnv, ExpertPolicy, load_expert

pytestmark = pytest.mark.gpu


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels wherever there are any; set CUBLAS_WORKSPACE_CONFIG=:4096:8 for cuBLAS's.

    By torch 2.11's own word its `cumsum`, of which the buffer draws, has none. A uniform draw needs none: it adds up ones.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class SaveAt(Callback):
    """Saves the learner after its third update."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> None:
        if agent.step == 3:
            agent.save(self.directory)


@pytest.mark.parametrize("agent", [Dagger, LCM, DMD2])
def test_a_resumed_run_is_bit_equal(agent: type[Algorithm], tmp_path: Path) -> None:
    def learner() -> Algorithm:
        return agent(load_expert("digits8", device="cuda"), settings(agent, num_updates=6))

    with deterministic():
        whole = learner().learn(6, progress=False, callbacks=[SaveAt(tmp_path)])
        resumed = learner().load(tmp_path)
        assert resumed.step == 3
        resumed.train(progress=False)
    for name in whole.networks:
        for p, q in zip(whole.networks[name].parameters(), resumed.networks[name].parameters(), strict=True):
            assert torch.equal(p, q)


@contextmanager
def no_wait() -> Iterator[None]:
    """Raises where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("agent", LEARNERS, ids=lambda agent: agent.name)
def test_an_update_never_waits_for_the_device(agent: type[Algorithm]) -> None:
    learner = agent(load_expert("digits8", device="cuda"), settings(agent))
    for _ in range(2):  # fills caches
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
    with nullcontext() if agent in WAITING else no_wait():
        learner.trainer.collect()
    with no_wait():
        learner.trainer.update(learner.draw())


def test_both_environments_step_there() -> None:
    expert = load_expert("digits8", device="cuda")
    path = DenoisingEnv(expert, 4, [8], reward="expert_l2").rollout(4, ExpertPolicy(expert))
    assert path["next", "x_t"].is_cuda
    assert (path["next", "reward"] <= 0).all()
    envs = DenoisingVectorEnv(expert, 8, output="torch")
    observation, _ = envs.reset(seed=0)
    assert all(value.is_cuda for value in observation.values())
