"""The exponential moving average (EMA) of the student's weights, which is evaluated and saved, and which gives LCM's target.

    θ⁻ ← dₙ θ⁻ + (1 − dₙ) θ ,   dₙ = min(d, (1 + n)/(10 + n))         after n steps; the first step copies θ

The warm-up of dₙ is that of diffusers' EMAModel. Without it the initial weights still have a share of .47 in the average after 75 steps
with d = .99, and of .93 with d = .999. LCM has no warm-up, because its published code has a constant d. Buffers, such as the
statistics of batch norm, are not averaged: they are copied from the student.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class EMAModel(AveragedModel):
    """torch's AveragedModel with a warm-up; it updates all weights in one kernel, and no update waits for the device.

    Args:
        network: The network to average; it is copied.
        decay: d.
        warm_up: Whether dₙ rises to d; without it dₙ = d.
    """

    def __init__(self, network: nn.Module, decay: float, warm_up: bool = True) -> None:
        super().__init__(network)
        self.decay, self.warm_up = decay, warm_up
        self.buffer_names = [name for name, _ in network.named_buffers() if name in network.state_dict()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)  # on the CPU, wherever the network is
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay
        weight = 1 - decay if n else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for name in self.buffer_names:
            self.module.get_buffer(name).copy_(model.get_buffer(name))
        self.n_averaged += 1
