"""Fully sharded data parallelism (FSDP2): a rank holds its share of every network that learns, and of the average.

Of each its share of the weights, gradients and momenta:

    accelerate launch --config_file configs/accelerate/fsdp.yaml -m ddil_agents.dmd2 --env ssd1b --config paper_ssd1b

accelerate shards on GPUs alone, one model at a time with its optimiser; here its settings are read and torch's fully_shard is called,
on a CPU as on a GPU. In a step of its own a network is gathered layer by layer. In rollouts, and in another network's step, it is gathered
as a whole beforehand: there ranks may differ in how often they call it, and each gathering waits for all of them.
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

# Of accelerate's settings, those that would mean something else, and what they have to be.
NEEDED = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "size_based_wrap",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def asked() -> bool:
    """Whether the launcher asks for sharding, and there are ranks to share.

    Raises:
        ValueError: it asks with a setting that is not supported.
    """
    if ranks.world() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, value in NEEDED.items():
        if (found := os.environ.get(name, value)).lower() != value:
            raise ValueError(f"{name.lower()}={found}: need {value}; start from configs/accelerate/fsdp.yaml")
    return True


def shard(network: nn.Module, device: torch.device) -> None:
    """Shards a network in its place, if the launcher asks for it: as a whole, and each part of fsdp_min_num_params by itself.

    Args:
        network: Not called yet, and in no optimiser.
        device: Where it is, on every rank.
    """
    if not asked():
        return
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # on outputs that are views: nothing here writes into an output
    for p in network.parameters():
        p.data = p.data.contiguous()  # FSDP2 takes no other, and convolutions may be laid out channels-last
    mesh, least = init_device_mesh(device.type, (ranks.world(),)), int(float(os.environ.get("FSDP_MIN_NUM_PARAMS", 1e7)))
    done: set[nn.Parameter] = set()
    for root in _roots(network):
        for module in reversed(list(root.modules())):  # parts before the whole
            own = set(module.parameters()) - done
            large = sum(p.numel() for p in own) >= least and not isinstance(module, nn.ModuleList | nn.ModuleDict)
            if module is root or large:
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
                done |= set(module.parameters())


def _roots(network: nn.Module) -> list[nn.Module]:
    """The outermost modules that give tensors, in which fully_shard looks for gradients."""
    if isinstance(network, NetworkDenoiser) or isinstance(getattr(network, "denoiser", None), NetworkDenoiser):  # or a critic
        return [root for child in network.children() for root in _roots(child)]
    return [network]


def is_sharded(network: nn.Module) -> bool:
    """Whether this rank holds only a share of it."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Inside, each rank holds the whole of a sharded network and calls it, or not, without the others. All have to come and go."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)] if asked() else []
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


def whole(state: Any, keep: bool = True) -> Any:
    """A state with its shards brought together, on the CPU; all ranks have to call it.

    Args:
        state: Nested mappings.
        keep: False, on a rank that does not want them, leaves None in their places.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return {key: whole(value, keep) for key, value in state.items()} if isinstance(state, Mapping) and asked() else state


def like(state: Mapping[Any, Any], own: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A state of whole tensors, sharded as `own` is."""
    return {key: split(value, own.get(key)) for key, value in state.items()} if asked() else state


def split(value: Any, pattern: Any) -> Any:
    """A whole tensor sharded as another of its shape; anything else as it is."""
    whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not whole or not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)
