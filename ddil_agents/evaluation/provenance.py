"""Provenance of a result: versions, hardware and date."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "not installed"


PACKAGES = ("ddil", "torch", "diffusers", "tensordict", "torchrl", "gymnasium", "accelerate")
PROVENANCE = ("date", "hardware", "python", *PACKAGES)


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, the hardware of the device, and versions of Python and of the packages."""
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        **{p: _version(p) for p in PACKAGES},
    }
