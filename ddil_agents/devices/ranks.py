"""The processes of a data-parallel run, as torchrun or `accelerate launch` starts them; a single process is rank 0 of 1.

    torchrun --nproc_per_node 8 -m ddil_agents.dagger --env sd15
    accelerate launch --config_file configs/accelerate/8gpu.yaml -m ddil_agents.dagger --env sd15

Each rank unrolls its own student, holds its own states and draws its own batches, all with the same β; gradients are averaged over
the ranks. This file holds all that differs between one process and several: which process writes, which numbers are summed over the
ranks, and how an error on one rank stops all of them.
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

# How long ranks wait for one another at most. The longest wait is for the main rank's evaluation between the stages of a run.
TIMEOUT = timedelta(hours=12)


def rank() -> int:
    """This process's rank, from 0. It is read from the launcher's environment, and so is known without a process group."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that writes, prints and evaluates."""
    return rank() == 0


def choose_device() -> None:
    """Makes `cuda` mean this rank's own GPU: the LOCAL_RANK-th of its machine."""
    if world_size() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def make_accelerator(mixed_precision: str, device: torch.device) -> Accelerator:
    """Makes an accelerator for networks on this device; the first one starts the process group.

    Raises:
        ValueError: the launcher asks for DeepSpeed or Megatron-LM, the processes were not started by a launcher, or the device is
            another rank's.
    """
    for plugin in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise ValueError(f"accelerate's {plugin} is not supported; choose a config of configs/accelerate, or torchrun")
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process; reset it to this learner's
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding.py shards the networks instead
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=device.type == "cpu",
            device_placement=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    if dist.is_initialized() and dist.get_world_size() != world_size():
        raise ValueError(
            f"torch.distributed has a group of {dist.get_world_size()} processes, and LOCAL_RANK, RANK and WORLD_SIZE are not set; "
            "start them with torchrun or accelerate launch"
        )
    if accelerator.distributed_type == DistributedType.MULTI_GPU and accelerator.device != device:
        raise ValueError(f"rank {rank()}'s expert is on {device}; build it with device='{accelerator.device}', the rank's own")
    return accelerator


def leave_group() -> None:
    """Leaves the process group, so that no other rank waits for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place, and returns it on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: T) -> list[T]:
    """Gathers the values of all ranks, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def sync_errors() -> Iterator[None]:
    """Runs a block on every rank and waits for all of them at its end; an error on one rank is raised on all.

    Raises:
        ValueError: another rank raised an error; the message gives it and the rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = all_gather(None if error is None else str(error)) if dist.is_initialized() else []
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"{message} (on rank {other})")


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Calls `make` on the main rank and returns its result on every rank.

    Raises:
        ValueError: `make` raised an error on the main rank.
    """
    result: list[Any] = [None]
    with sync_errors():
        if is_main():
            result = [make()]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return cast(T, result[0])
