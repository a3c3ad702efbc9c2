"""`compile`: the networks that a learner calls are compiled, once, and it learns what it learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_agents import DMD2, Algorithm, DMD2Config
from ddil_env import GaussianMixtureExpert, load_expert

SMALL: dict[str, Any] = {"num_updates": 6, "batch_size": 4, "critic_updates": 2, "student": {"width": 8, "depth": 1}}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What was compiled: traced as torch.compile does and then run as it is, which is quick."""
    found: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        found.append(graph)
        return graph

    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def weights(learner: Algorithm) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.ema_student.parameters()])


def step(learner: Algorithm) -> None:
    if learner.step % learner.collect_every == 0:
        learner.trainer.collect()
    learner.trainer.update(learner.draw())


def test_a_compiled_learner_learns_the_same_and_compiles_nothing_anew(graphs: list[object]) -> None:
    expert = GaussianMixtureExpert([[-0.8, 0.2], [0.8, -0.4]], 0.2)
    plain, compiled = (DMD2(expert, DMD2Config(**SMALL, compile=compile)) for compile in (False, True))
    plain.learn(progress=False)
    assert not graphs
    for _ in range(4):
        step(compiled)
    settled = len(graphs)
    for _ in range(2):
        step(compiled)
    assert len(graphs) == settled > 0
    torch.testing.assert_close(weights(compiled), weights(plain), atol=1e-5, rtol=0)
    networks = [compiled.ema_student.network, compiled.student.network, compiled.networks["critic"].denoiser.network]
    assert all(network._compiled_call_impl is not None for network in networks)


def test_an_expert_compiles_the_network_that_it_holds(graphs: list[object]) -> None:
    expert: Any = load_expert("digits8")
    assert expert.network._compiled_call_impl is None
    expert.compile()
    assert expert.network._compiled_call_impl is not None
