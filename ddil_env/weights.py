"""Reads weights from safetensors files: a pickle could run any code."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_tensors(path: Path, cure: str = "fetch or train it again") -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Args:
        path: The file.
        cure: What the error advises for a damaged file.

    Raises:
        ValueError: the file is absent, is not safetensors, or is damaged.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"refusing to read weights from {path}: only .safetensors is read, since a pickle can run any code; convert it if you trust it"
        )
    if not path.is_file():
        raise ValueError(f"no weights at {path}: the file does not exist; {cure}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); {cure}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads a safetensors file into a module, strictly.

    Raises:
        ValueError: as in `read_tensors`; or the names or shapes do not fit the module, or a value is not finite.
    """
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path} holds non-finite values in {name!r}; fetch or train it again")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {error}; pass the weights of this network") from error
