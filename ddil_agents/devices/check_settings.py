"""Checks of settings against the device and the number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ddil_agents.devices import ranks, sharding

if TYPE_CHECKING:
    from ddil_agents.config import LearnerConfig


def check_settings(config: LearnerConfig, device: torch.device) -> None:
    """Checks that settings fit the device and the number of processes.

    Raises:
        ValueError: they do not.
    """
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU to scale its losses; on a CPU use bf16 or no")
    if config.mixed_precision == "fp16" and sharding.is_requested():
        raise ValueError("mixed_precision=fp16 scales losses by what one rank sees; with sharded networks use bf16 or no")
    if config.beta.schedule == "adaptive" and (config.mixed_precision == "fp16" or sharding.is_requested()):
        raise ValueError("beta.schedule=adaptive needs whole, unscaled gradients; use bf16 and no sharding, or another schedule")
    if config.halve_batch_on_oom and ranks.world_size() > 1:
        raise ValueError(
            f"halve_batch_on_oom=true: {ranks.world_size()} processes need to cut their batches alike, and memory may run out on one only; "
            "leave it out and raise gradient_accumulation"
        )
    if (config.lora is not None or config.optimizer == "adamw8bit") and sharding.is_requested():
        raise ValueError(
            f"lora={config.lora}, optimizer={config.optimizer}: sharding supports full networks with torch's AdamW only; set lora to "
            "null and optimizer to adamw, or do not shard (configs/accelerate/8gpu.yaml): with LoRA little is left to shard"
        )
