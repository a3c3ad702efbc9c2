"""The check of a device that the user names."""

from __future__ import annotations

import torch


def check_device(device: torch.device | str) -> torch.device:
    """Returns the device, with its index, after putting a tensor on it.

    Raises:
        ValueError: the device does not exist on this machine, or holds no numbers.
    """
    try:
        value = torch.zeros(1, device=device)
        value.item()  # a meta device holds no numbers
        return value.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        cause = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
        raise ValueError(f"device {str(device)!r} is not to be had: {cause}. Available here: {', '.join(available)}") from error
