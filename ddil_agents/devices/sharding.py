"""Fully sharded data parallelism (FSDP2): each rank holds a shard of every trained network and of the averaged student.

A shard is a part of the weights, of their gradients and of the optimiser's moments:

    accelerate launch --config_file configs/accelerate/fsdp.yaml -m ddil_agents.dmd2 --env ssd1b --config paper_ssd1b

accelerate itself shards only on GPUs, and only one model with its optimiser. This file reads accelerate's settings and calls torch's
fully_shard, on a CPU as on a GPU. In its own gradient step a network is gathered layer by layer. In rollouts, and in the step of another
network, it is gathered as a whole beforehand, because there the ranks may call it a different number of times, and gathering a layer
waits for all of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddil_agents.devices import ranks
from ddil_env import NetworkDenoiser

# The values that accelerate's settings need to have here.
REQUIRED = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "size_based_wrap",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def is_requested() -> bool:
    """Whether the launcher requests sharding and there are several ranks.

    Raises:
        ValueError: a setting of the launcher is not supported.
    """
    if ranks.world_size() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, value in REQUIRED.items():
        if (found := os.environ.get(name, value)).lower() != value:
            raise ValueError(f"{name.lower()}={found}: need {value}; start from configs/accelerate/fsdp.yaml")
    return True


def shard(network: nn.Module, device: torch.device) -> None:
    """Shards a network in place if the launcher requests it; each part with at least fsdp_min_num_params weights is a unit of its own.

    Args:
        network: The network, before its first call and before its optimiser is made.
        device: The device that it is on, on every rank.
    """
    if not is_requested():
        return
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # it warns of outputs that are views; nothing here writes into an output
    for p in network.parameters():
        p.data = p.data.contiguous()  # FSDP2 needs it, and convolutions may be channels-last
    mesh, min_num_params = init_device_mesh(device.type, (ranks.world_size(),)), int(float(os.environ.get("FSDP_MIN_NUM_PARAMS", 1e7)))
    sharded: set[nn.Parameter] = set()
    for root in _roots(network):
        for module in reversed(list(root.modules())):  # children before their parents
            remaining = set(module.parameters()) - sharded
            large = sum(p.numel() for p in remaining) >= min_num_params and not isinstance(module, nn.ModuleList | nn.ModuleDict)
            if module is root or large:
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
                sharded |= set(module.parameters())


def _roots(network: nn.Module) -> list[nn.Module]:
    """The outermost modules whose outputs are tensors; fully_shard needs these, to find the gradients in them."""
    if isinstance(network, NetworkDenoiser) or isinstance(getattr(network, "denoiser", None), NetworkDenoiser):  # the latter is a critic
        return [root for child in network.children() for root in _roots(child)]
    return [network]


def is_sharded(network: nn.Module) -> bool:
    """Whether this rank holds only a shard of the network."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


@contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """Gathers a sharded network on every rank, which may then call it any number of times. All ranks need to enter and leave the block."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)] if is_requested() else []
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


def gather_state(state: Any, keep: bool = True) -> Any:
    """Gathers the sharded tensors of a state on the CPU; all ranks need to call it.

    Args:
        state: A tensor, or nested mappings of them.
        keep: Whether this rank needs the gathered tensors; without it they are None.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return {key: gather_state(value, keep) for key, value in state.items()} if isinstance(state, Mapping) and is_requested() else state


def shard_state(state: Mapping[Any, Any], pattern: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Shards the whole tensors of a state as those of `pattern` under the same keys are."""
    return {key: shard_tensor(value, pattern.get(key)) for key, value in state.items()} if is_requested() else state


def shard_tensor(value: Any, pattern: Any) -> Any:
    """Shards a whole tensor as `pattern`, a sharded tensor of the same shape, is; returns anything else as it is."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not is_whole or not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)
