"""One network in training: its optimiser, learning rate, gradient clipping and accumulation. An agent has one for each of its networks."""

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
    """Makes torch's AdamW, whose moments take 8 bytes per weight, or bitsandbytes' with 2 bytes (Dettmers et al. 2022).

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: bitsandbytes does not support the network's device.
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
        raise ValueError(f"optimizer={config.optimizer}: bitsandbytes does not support {device}; set it to adamw")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(network.parameters(), **options)
    return optimizer


class Trainable:
    """One network and its AdamW, whose learning rate rises in the warm-up and then falls linearly to 0 at the end or stays constant.

    Args:
        network: The network.
        config: Its settings of the optimiser, the learning rate's schedule and gradient clipping are used.
        accelerator: Handles mixed precision and several processes.
        learning_rate: Learning rate after the warm-up.
        total_steps: Number of gradient steps of this network over the run.
        warmup: Number of gradient steps of the warm-up.

    Attributes:
        unwrapped: The network without DistributedDataParallel, for calls without gradient and for access to its modules.
        last_learning_rate: Learning rate of the last gradient step.
    """

    def __init__(
        self, network: nn.Module, config: LearnerConfig, accelerator: Accelerator, learning_rate: float, total_steps: int, warmup: int
    ) -> None:
        sharding.shard(network, accelerator.device)
        for part in network.modules() if config.compile else ():
            if isinstance(part, NetworkDenoiser):
                part.network.compile()  # NetworkDenoiser counts its calls; compiling the count would recompile at each call
        optimizer = make_optimizer(network, config, learning_rate)
        self.config, self.accelerator, self.total_steps, self.warmup = config, accelerator, total_steps, warmup
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        self.unwrapped: Any = network
        self.weights = list(network.parameters())  # kept, because collecting them takes as long as a kernel over all of them
        self._wrapped = accelerator.prepare_model(network, evaluation_mode=sharding.is_requested())  # without DDP if it is sharded
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._frozen = False
        self.last_learning_rate = 0.0

    @property
    def network(self) -> Any:
        """The network as a loss calls it: in DistributedDataParallel if there are several processes, unless it is frozen."""
        return self.unwrapped if self._frozen else self._wrapped

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freezes the weights inside the block, so that gradients flow through the network to its inputs only."""
        with sharding.unsharded(self.unwrapped):
            trained = [p for p in self.unwrapped.parameters() if p.requires_grad]
            for p in trained:
                p.requires_grad_(False)
            self._frozen = True
            try:
                yield
            finally:
                for p in trained:
                    p.requires_grad_(True)
                self._frozen = False

    def accumulate(self, loss: Loss, parts: Sequence[TensorDict]) -> Tensor:
        """Accumulates the gradient of a batch's mean loss over its parts, without a gradient step.

        Args:
            loss: Returns the loss of each state of a part, (b,).
            parts: The parts of the batch.

        Returns:
            The loss of each state of the batch (b,), on the device.
        """
        losses, size = [], sum(map(len, parts)) / len(parts)
        for p in self.weights:
            p.grad = None  # an attempt that ran out of memory may have left a gradient
        self.accelerator.step = 0
        self.accelerator.gradient_accumulation_steps = len(parts)  # accelerate keeps one number per process
        for part in parts:
            with self.accelerator.accumulate(self._wrapped):
                each = loss(Batch(part))
                self.accelerator.backward(each.sum() / size)
                losses.append(each.detach())
        return torch.cat(losses)

    def gradient(self, loss: Loss, states: TensorDict, size: int) -> Tensor:
        """The gradient of the mean loss of states, (number of weights,), in this process alone; weights' `grad` is left as it is.

        Args:
            loss: Returns the loss of each state of a part, (b,).
            states: The states.
            size: Number of states in a part.
        """
        weights = [p for p in self.weights if p.requires_grad]
        gradient = torch.zeros(sum(p.numel() for p in weights), device=weights[0].device)
        self._frozen = True  # without DistributedDataParallel
        try:
            for part in states.split(size):
                total = loss(Batch(part)).sum() / len(states)
                grads = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
                gradient += torch.cat([g.flatten() for g in grads])
        finally:
            self._frozen = False
        return gradient

    def step(self) -> Tensor:
        """Takes the gradient step; returns the gradient's norm before clipping, on the device."""
        norm = self.accelerator.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step()
        return torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def set_total_steps(self, total_steps: int) -> None:
        """Changes the total number of gradient steps, and the learning rate of the next step to that of the new schedule."""
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self._lr_factor(self.scheduler.last_epoch)

    def _lr_factor(self, step: int) -> float:
        """Factor of the learning rate: rises in the warm-up, then falls linearly, to 0 one step after the last, or stays at 1."""
        decay = 1.0 if self.config.lr_scheduler == "constant" else max(self.total_steps - step, 0) / self.total_steps
        return min((step + 1) / (self.warmup + 1), decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": sharding.gather_state(self.unwrapped.state_dict(), ranks.is_main()),
            "optimizer": sharding.gather_state(self.optimizer.state_dict(), ranks.is_main()),
            "last_epoch": self.scheduler.last_epoch,
            "horizon": self.total_steps,
            "last_learning_rate": self.last_learning_rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unwrapped.load_state_dict(sharding.shard_state(state["network"], self.unwrapped.state_dict()))
        moments = {i: sharding.shard_state(each, dict.fromkeys(each, self.weights[i])) for i, each in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scheduler.last_epoch, self.total_steps = state["last_epoch"], state["horizon"]
        self.last_learning_rate = state["last_learning_rate"]
