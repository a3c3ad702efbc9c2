"""A network that learns: its optimiser, warm-up, clipping and accumulation. A learner has one for each of its networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddil_agents.devices import ranks, sharding
from ddil_agents.states.batch import Batch
from ddil_env import NetworkDenoiser

if TYPE_CHECKING:
    from ddil_agents.config import LearnerConfig

Loss = Callable[[Batch], Tensor]


def make_optimizer(network: nn.Module, config: LearnerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, whose momenta take 8 bytes a weight; or bitsandbytes' with 2, in blocks of 256 (Dettmers et al. 2022).

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: it does not compute on the network's device.
    """
    options: dict[str, Any] = {"lr": learning_rate, "betas": config.adam_betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **options, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f"optimizer={config.optimizer} needs bitsandbytes: pip install 'ddil[8bit]', or set it to adamw") from error
    device = next(network.parameters()).device.type
    if device not in bitsandbytes.supported_torch_devices:
        raise ValueError(f"optimizer={config.optimizer}: bitsandbytes does not compute on {device}; set it to adamw")
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(network.parameters(), **options)
    return made


class Trainable:
    """AdamW on one network, its rate rising over the warm-up and then falling linearly to 0 at the end, or constant.

    Args:
        network: What learns.
        config: Momenta, weight decay, the rate's schedule and clipping.
        accelerator: Places, casts and scales.
        learning_rate: After warm-up.
        total_steps: Gradient steps of this network over the run.
        warmup: And in its warm-up.
    """

    def __init__(
        self, network: nn.Module, config: LearnerConfig, accelerator: Accelerator, learning_rate: float, total_steps: int, warmup: int
    ) -> None:
        sharding.shard(network, accelerator.device)
        for part in network.modules() if config.compile else ():
            if isinstance(part, NetworkDenoiser):
                part.network.compile()  # what is around it counts its calls, for which it would be compiled anew at each
        optimizer = make_optimizer(network, config, learning_rate)
        self.config, self.accelerator, self.total_steps, self.warmup = config, accelerator, total_steps, warmup
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        self.bare: Any = network
        """The network itself: to be called without gradient, and looked into."""
        self.weights = list(network.parameters())  # walking a network for them takes as long as a kernel over all of them
        self._wrapped = accelerator.prepare_model(network, evaluation_mode=sharding.asked())  # what is sharded, DDP has no part in
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._frozen = False
        self.last_learning_rate = 0.0

    @property
    def network(self) -> Any:
        """The network as a loss calls it: where it learns, what averages its gradients over the ranks is around it."""
        return self.bare if self._frozen else self._wrapped

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Gradient goes through the network and none into it: for the turn of another one, whose loss it is in."""
        with sharding.gathered(self.bare):
            learning = [p for p in self.bare.parameters() if p.requires_grad]
            for p in learning:
                p.requires_grad_(False)
            self._frozen = True
            try:
                yield
            finally:
                for p in learning:
                    p.requires_grad_(True)
                self._frozen = False

    def accumulate(self, loss: Loss, parts: Sequence[TensorDict]) -> Tensor:
        """Adds up the gradient of a batch's mean loss, part by part; the weights stay.

        Args:
            loss: The loss of each state of a part, (b,).
            parts: The batch, cut up.

        Returns:
            The loss of each state (b,), on the device.
        """
        losses, size = [], sum(map(len, parts)) / len(parts)
        for p in self.weights:
            p.grad = None  # what there is is of a batch that memory did not suffice for
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = len(parts)  # accelerate keeps one number a process
        for part in parts:
            with self.accelerator.accumulate(self._wrapped):
                each = loss(Batch(part))
                self.accelerator.backward(each.sum() / size)
                losses.append(each.detach())
        return torch.cat(losses)

    def step(self) -> Tensor:
        """The gradient step; returns the gradient's norm before clipping, on the device."""
        norm = self.accelerator.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step()
        return torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def extend_to(self, total_steps: int) -> None:
        """Changes the number of gradient steps; the rate of the next step is that of the new course."""
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self._share_of_rate(self.scheduler.last_epoch)

    def _share_of_rate(self, step: int) -> float:
        """Rises over the warm-up, then falls linearly, to reach 0 one step after the last, or stays at 1."""
        left = 1.0 if self.config.lr_scheduler == "constant" else max(self.total_steps - step, 0) / self.total_steps
        return min((step + 1) / (self.warmup + 1), left)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": sharding.whole(self.bare.state_dict(), ranks.is_main()),
            "optimizer": sharding.whole(self.optimizer.state_dict(), ranks.is_main()),
            "last_epoch": self.scheduler.last_epoch,
            "horizon": self.total_steps,
            "last_learning_rate": self.last_learning_rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(sharding.like(state["network"], self.bare.state_dict()))
        momenta = {i: sharding.like(each, dict.fromkeys(each, self.weights[i])) for i, each in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict({**state["optimizer"], "state": momenta})
        self.scheduler.last_epoch, self.total_steps = state["last_epoch"], state["horizon"]
        self.last_learning_rate = state["last_learning_rate"]
