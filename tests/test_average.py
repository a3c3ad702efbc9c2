"""The average of a student's weights, against the recursion that defines it."""

from __future__ import annotations

import torch
from torch import nn

from ddil_agents.average import Average


def test_weights_are_averaged_and_statistics_are_the_latest() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, expected = Average(network, 0.9), None
    for _ in range(5):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        network(torch.randn(8, 3))
        average.update_parameters(network)
        now = [p.detach().clone() for p in network.parameters()]
        expected = now if expected is None else [0.9 * a + 0.1 * p for a, p in zip(expected, now, strict=True)]
    for a, p in zip(average.module.parameters(), expected or [], strict=True):
        torch.testing.assert_close(a, p)
    for a, latest in zip(average.module.buffers(), network.buffers(), strict=True):
        assert torch.equal(a, latest)
    assert int(average.module[1].num_batches_tracked) == 5
