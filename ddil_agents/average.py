"""The average of a student's weights over its gradient steps, which is the one that is evaluated and saved; LCM's target, too.

    θ⁻ ← d θ⁻ + (1 − d) θ

and at the first step the weights whole. What a network keeps beside its weights (batch norm's statistics) is the student's latest.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """torch's averaged model, in one kernel over all weights, and without its wait for the device at every step.

    Args:
        network: Copied.
        decay: d.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay
        self.kept = [name for name, _ in network.named_buffers() if name in network.state_dict()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        weight = 1 - self.decay if self.n_averaged else 1.0  # the count is on the CPU, wherever the network is
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for name in self.kept:
            self.module.get_buffer(name).copy_(model.get_buffer(name))
        self.n_averaged += 1
