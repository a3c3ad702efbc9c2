"""LoRA: several networks as adapters over one frozen backbone (Hu et al. 2022). Needs `pip install 'ddil[lora]'`.

    W x + (α/r) B A x ,   A ∈ ℝ^{r×in} random, B ∈ ℝ^{out×r} = 0 at the start

Student, critic and averaged student each have their own A and B in every layer, and share the teacher's W. Shared weights are in no
state_dict, optimiser, gradient or average; `copy.deepcopy` does not copy them, and nothing writes to them. Whatever else a network
learns, such as a guidance embedding, is an ordinary parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddil_env.weights import read_tensors

M = TypeVar("M", bound=nn.Module)

LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers' load_lora_weights looks
ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NAME = "default"  # peft's name of the one adapter that a network has


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of the adapters."""

    rank: int = 64
    """Rank r of the adapters' matrices."""
    alpha: float | None = None
    """α: the adapters' output is scaled by α/rank; null: α is the rank."""
    target_modules: tuple[str, ...] | None = None
    """Layers that get an adapter, by the ends of their names, such as to_q; null: every linear and convolution layer."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: need at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha}: need a positive, finite number, or null for the rank")


class SharedWeight(Tensor):
    """A teacher's weight in another network: not a parameter, and shared by `copy.deepcopy`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch.nn.Parameter does

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedWeight:
        return self


def add_adapters(network: M, lora: LoRA) -> M:
    """Makes a network that shares another's weights and has adapters of its own; until it is trained it computes what the other does.

    Args:
        network: The teacher's, frozen. Its layers must not write into buffers in training mode (as batch norm does).
        lora: Settings of the adapters.

    Raises:
        ImportError: peft is not installed.
        ValueError: target_modules that match no layer, or layers that cannot be adapted.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{lora} needs peft: pip install 'ddil[lora]', or set lora to null") from error
    weights = [*network.parameters(), *network.buffers()]
    adapted = copy.deepcopy(network, {id(weight): weight.detach().as_subclass(SharedWeight) for weight in weights})
    targets = lora.target_modules or [name for name, module in adapted.named_modules() if type(module) in ADAPTED]
    try:
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(targets)), adapted)
    except ValueError as error:
        raise ValueError(f"lora.target_modules={lora.target_modules}: {error}; null adapts every linear and convolution layer") from error
    for module in adapted.modules():
        for registered in (module._parameters, module._buffers):
            for name in [name for name, value in registered.items() if isinstance(value, SharedWeight)]:
                vars(module)[name] = registered.pop(name)
    return adapted.float()  # converts the adapters alone: the shared weights are no longer registered


def adapter_layers(network: nn.Module) -> dict[str, Any]:
    """The layers of a network that have adapters, by name; empty for a network without."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def merge_adapters(network: nn.Module, plain: nn.Module) -> None:
    """Writes what an adapted network computes into a network without adapters, in place.

    Args:
        network: The network with adapters.
        plain: A float32 copy of its teacher; its weights become W + (α/r) B A, and other learned parameters are copied.
    """
    with torch.no_grad():
        for name, layer in adapter_layers(network).items():
            plain.get_submodule(name).weight += layer.get_delta_weight(NAME)
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if ".lora_" not in name}, strict=False)


def save_adapters(network: nn.Module, path: Path, prefix: str) -> None:
    """Writes all that an adapted network has learned as a safetensors file, in the format of diffusers' `load_lora_weights`.

    diffusers reads a file of adapters alone; it refuses one that holds other parameters too.

    Args:
        network: The network with adapters.
        path: The file.
        prefix: Name of the network in its pipeline.
    """
    tensors = {f"{prefix}.{_file_key(name)}": value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, {"lora_adapter_metadata": _metadata(network, prefix)})  # a second entry would be written in random order


def load_adapters(network: nn.Module, path: Path, prefix: str) -> None:
    """Reads what `save_adapters` wrote into a network with adapters of the same settings.

    Raises:
        ValueError: the file is absent or damaged, or its adapters are of other layers or another rank or α.
    """
    saved, own = read_tensors(path), {f"{prefix}.{_file_key(name)}": (name, value) for name, value in network.state_dict().items()}
    different = sorted(saved.keys() ^ own.keys()) or [name for name, value in saved.items() if value.shape != own[name][1].shape]
    if different:
        in_file = tuple(saved[different[0]].shape) if different[0] in saved else "absent"
        here = tuple(own[different[0]][1].shape) if different[0] in own else "absent"
        raise ValueError(
            f"{path} has other adapters: {different[0]!r} is {in_file} there, {here} here; pass the lora that it was made with"
        )
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    key = f"{prefix}.lora_alpha"
    if (alpha := json.loads(_metadata(network, prefix))[key]) != metadata.get(key):
        raise ValueError(f"{path} has lora.alpha={metadata.get(key)}, not {alpha}; pass the lora that it was made with")
    network.load_state_dict({own[name][0]: value for name, value in saved.items()})


def _metadata(network: nn.Module, prefix: str) -> str:
    """The adapters' settings as diffusers writes them into a file's metadata."""
    layers = adapter_layers(network)
    layer = next(iter(layers.values()))
    # Some releases of diffusers refuse a file without rank_pattern, even an empty one.
    config = {"r": layer.r[NAME], "lora_alpha": layer.lora_alpha[NAME], "target_modules": list(layers), "rank_pattern": {}}
    return json.dumps({f"{prefix}.{key}": value for key, value in config.items()})


def _file_key(name: str) -> str:
    """A parameter's name without the name of the adapter, as the files have it."""
    return name.replace(f".{NAME}.", ".")
