"""With what, where and when a result was measured."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path
        return "not installed"


PACKAGES = ("ddil", "torch", "diffusers", "tensordict", "torchrl", "gymnasium", "accelerate")
PROVENANCE = ("date", "hardware", "python", *PACKAGES)


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, date, and the hardware of the device."""
    on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        **{p: _version(p) for p in PACKAGES},
    }
