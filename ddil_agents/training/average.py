"""The average of a student's weights over its gradient steps, which is the one that is evaluated and saved; LCM's target, too.

    θ⁻ ← dₙ θ⁻ + (1 − dₙ) θ ,   dₙ = min(d, (1 + n)/(10 + n))         n steps taken; at the first the weights whole

The warm-up is that of diffusers' EMAModel. Without it an average of d = .99 still holds .47 of the first weights after 75 steps, and of
.999 .9. LCM's target has none: there the average is part of the method, whose own code has a constant d. What a network keeps beside
its weights (batch norm's statistics) is the student's latest.
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
        warm_up: Whether dₙ rises to d; False has d throughout.
    """

    def __init__(self, network: nn.Module, decay: float, warm_up: bool = True) -> None:
        super().__init__(network)
        self.decay, self.warm_up = decay, warm_up
        self.kept = [name for name, _ in network.named_buffers() if name in network.state_dict()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)  # on the CPU, wherever the network is
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warm_up else self.decay
        weight = 1 - decay if n else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for name in self.kept:
            self.module.get_buffer(name).copy_(model.get_buffer(name))
        self.n_averaged += 1
