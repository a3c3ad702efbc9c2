"""What a GPU would refuse or wait for, found on a CPU that plays one; tests/ddil_agents/test_on_a_gpu.py asks a real one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checks import (
    LEARNERS,
    WAITING,
    Recorder,
    allowed,
    check_env,
    check_labels_and_buffer,
    check_learner,
    count_waits,
    settings,
    waits,
)
from gpu_report import Part, Report
from helpers import guided
from pretended_gpu import GpuTensor, pretended_gpu

from ddil_agents import DMD2, Algorithm, Dagger
from ddil_env import DenoisingEnv, Expert, ExpertPolicy, load_expert
from ddil_env.worlds import kuramoto

SMALL = {"student": {"depth": 1}}


def trained(agent: type[Algorithm], expert: Expert, **own: Any) -> tuple[Algorithm, torch.Tensor]:
    recorder = Recorder()
    learner = agent(expert, settings(agent, num_updates=3, updates_per_collect=1, **{**SMALL, **own}))
    learner.learn(3, progress=False, callbacks=[recorder])
    return learner, torch.stack(recorder.losses)


def waits_of(learner: Algorithm) -> dict[str, list[str]]:
    """The lines that wait in the next update."""
    _, collecting = waits(learner.trainer.collect)
    batch, drawing = waits(learner.draw)
    _, updating = waits(lambda: learner.trainer.update(batch))
    return {"collect": [*collecting], "draw": [*drawing], "update": [*updating]}


@pytest.mark.parametrize("agent", LEARNERS, ids=lambda agent: agent.name)
def test_a_learner_trains_there_as_here_and_waits_only_where_it_says(agent: type[Algorithm]) -> None:
    here = trained(agent, guided())[1]
    with pretended_gpu():
        learner, there = trained(agent, guided(device="cuda"))
        assert isinstance(there, GpuTensor)
        found = waits_of(learner)
    torch.testing.assert_close(there.held, here)
    assert not found["draw"]
    assert not found["update"]
    assert bool(found["collect"]) == (agent in WAITING), found
    assert all(allowed(line, agent, "collect") for line in found["collect"]), found


@pytest.mark.parametrize(("name", "agent"), [("fork", Dagger), ("fork", DMD2), ("kuramoto", Dagger)])
def test_a_world_waits_in_its_frames_alone(name: str, agent: type[Algorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuramoto, "TRANSIENT", 1.0)
    own, losses = {"guidance_scale": None, "num_worlds": 2, "collect_size": 4, "batch_size": 4}, []
    for device in ("cpu", "cuda"):
        with pretended_gpu():
            expert = load_expert(name, device=device)
            expert.make_world = partial(expert.make_world, num_frames=2)  # type: ignore[method-assign]
            learner, measured = trained(agent, expert, **own)
            losses.append(measured.held if isinstance(measured, GpuTensor) else measured)
            if device == "cuda":
                found = waits_of(learner)
                assert not found["draw"]
                assert not found["update"]
                assert all(allowed(line, agent, "collect") for line in found["collect"]), found
    torch.testing.assert_close(*losses)


def test_an_environment_steps_there() -> None:
    with pretended_gpu():
        expert = guided(device="cuda")
        path = DenoisingEnv(expert, 4, [8], reward="expert_l2").rollout(4, ExpertPolicy(expert))
        assert path["next", "x_t"].is_cuda


def test_the_checks_of_a_gpu_run_there(tmp_path: Path) -> None:
    """Part a of benchmarks/gpu.py, whose lines for a GPU run nowhere else."""
    report = Report(tmp_path, {})
    part = report.parts["a"] = Part(report, "A part", "cuda", False, seconds=60)
    with pretended_gpu():
        both = guided(device="cuda"), guided()
        check_env(part, "mixture", *both)
        check_labels_and_buffer(part, "mixture", *both)
        count_waits(part, Dagger, "mixture", both[0], **SMALL)
        check_learner(part, Dagger, "mixture", *both, 2, [False, True], **SMALL)
    assert [row["within"] for row in part.rows] == ["yes"] * 7


def test_it_refuses_what_a_gpu_refuses_and_sees_what_it_waits_for() -> None:
    with pretended_gpu():
        x, mask = torch.arange(4.0, device="cuda"), torch.tensor([True, False, True, False]).to("cuda")
        with pytest.raises(RuntimeError, match="on the same device"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="expected a 'cuda' device type for generator but found 'cpu'"):
            torch.randn(4, generator=torch.Generator(), device="cuda")
        for work in (lambda: x[mask], lambda: float(x.sum()), lambda: x[[0, 1]], x.cpu, lambda: x + torch.ones(4).to("cuda"), x.tolist):
            torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                work()
            torch.cuda.set_sync_debug_mode("default")
        assert (x[torch.arange(2, device="cuda")] + 1).tolist() == [1, 2]
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").is_cuda
