"""The processes of a data-parallel run, as torchrun or `accelerate launch` starts them; a single process is rank 0 of 1.

    torchrun --nproc_per_node 8 -m ddil_agents.dagger --env sd15
    accelerate launch --config_file configs/accelerate/8gpu.yaml -m ddil_agents.dagger --env sd15

Each rank unrolls its own student, holds its own states and draws its own batches, all with one β; gradients are averaged. What
differs between one process and many is here: who writes, what is summed up, and that an error on one rank stops all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import Tensor

T = TypeVar("T")

# The longest that ranks wait for one another: for the main one's evaluation, between the stages of a run.
PATIENCE = timedelta(hours=12)


def rank() -> int:
    """This process's number, from 0; that of the launcher's environment, so that it holds before and after the group does."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that writes, prints and evaluates."""
    return rank() == 0


def choose_device() -> None:
    """Makes `cuda` mean this rank's own GPU: the LOCAL_RANK-th of its machine."""
    if world() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def join(mixed_precision: str, device: torch.device) -> Accelerator:
    """An accelerator for networks on that device; the first one brings the ranks together.

    Raises:
        ValueError: a launcher's plug-in other than these, processes that no launcher has started, or a device that is another rank's.
    """
    for plugin in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise ValueError(f"accelerate's {plugin} is not supported; choose a config of configs/accelerate, or torchrun")
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision a process: that of the last learner built
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding.py does that
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=device.type == "cpu",
            device_placement=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    if dist.is_initialized() and dist.get_world_size() != world():
        raise ValueError(
            f"{dist.get_world_size()} processes share a group that no launcher has made known (LOCAL_RANK, RANK, WORLD_SIZE); "
            "start them by torchrun or accelerate launch"
        )
    if accelerator.distributed_type == DistributedType.MULTI_GPU and accelerator.device != device:
        raise ValueError(f"rank {rank()}'s expert is on {device}; build it with device='{accelerator.device}', the rank's own")
    return accelerator


def leave() -> None:
    """Takes this rank out of the group, so that no other waits for it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, entry by entry, on every rank."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """The value of each rank, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Waits at its end for all ranks, while there is a group; what one of them raises inside, all raise.

    Raises:
        ValueError: the error of another rank, with its number.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    told = gathered(None if error is None else str(error)) if dist.is_initialized() else []
    if error is not None:
        raise error
    for number, message in enumerate(told):
        if message is not None:
            raise ValueError(f"{message} (on rank {number})")


def from_main(make: Callable[[], T]) -> T:
    """What the main rank makes, on every rank.

    Raises:
        ValueError: what it raises.
    """
    made: list[Any] = [None]
    with together():
        if is_main():
            made = [make()]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return cast(T, made[0])
