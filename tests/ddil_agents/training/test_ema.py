"""The average of a student's weights, against the recursion that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddil_agents.training.ema import EMAModel


@pytest.mark.parametrize("warm_up", [True, False])
def test_weights_are_averaged_and_statistics_are_the_latest(warm_up: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, expected = EMAModel(network, 0.3, warm_up), None
    for n in range(6):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        network(torch.randn(8, 3))
        average.update_parameters(network)
        now = [p.detach().clone() for p in network.parameters()]
        d = [0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3][n] if warm_up else 0.3  # 4/13 and what follows are above .3
        expected = now if expected is None else [d * a + (1 - d) * p for a, p in zip(expected, now, strict=True)]
    for a, p in zip(average.module.parameters(), expected or [], strict=True):
        torch.testing.assert_close(a, p)
    for a, latest in zip(average.module.buffers(), network.buffers(), strict=True):
        assert torch.equal(a, latest)
    assert int(average.module[1].num_batches_tracked) == 6


@pytest.mark.parametrize(("warm_up", "least", "most"), [(True, 0, 0.01), (False, 0.47, 0.48)])
def test_after_75_steps_the_warmed_up_average_has_forgotten_its_first_weights(warm_up: bool, least: float, most: float) -> None:
    network = nn.Linear(1, 1, bias=False)
    average = EMAModel(network, 0.99, warm_up)
    for n in range(75):
        nn.init.constant_(network.weight, float(n == 0))  # so that the average is the share of the first weights
        average.update_parameters(network)
    assert least <= average.module.weight.item() < most
