"""LoRA: one frozen backbone, many roles (Hu et al. 2022). Needs `pip install 'ddil[lora]'`.

    W x + (α/r) B A x ,   A ∈ ℝ^{r×in} random, B ∈ ℝ^{out×r} = 0 at the start

Student, critic and average each have their own A and B in every layer, and read W where the teacher has it: an adapted network holds
none of the teacher's weights as its own. They are in no state_dict, no optimiser, no gradient and no average, the same in every
copy (`copy.deepcopy`), and nothing writes to them. What else a network learns beside its adapters, such as a guidance embedding,
is a parameter like any other.
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
NAME = "default"  # peft's, of the one adapter that a network has


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of the adapters."""

    rank: int = 64
    """r."""
    alpha: float | None = None
    """α, of which α/r scales what the adapters add; null: r."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the layers that have one, such as to_q; null: every linear and convolution layer."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: need at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha}: need a positive, finite number, or null for the rank")


class SharedWeight(Tensor):
    """A teacher's weight as other networks see it: not a parameter, and in a copy the same."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch.nn.Parameter does

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedWeight:
        return self


def add_adapters(network: M, lora: LoRA) -> M:
    """A network over the weights of another, with adapters of its own; it computes what the other does until it learns.

    Args:
        network: The teacher's, frozen. Its layers write into no buffer when they are trained (as batch norm does).
        lora: Of the adapters.

    Raises:
        ImportError: peft is not installed.
        ValueError: target_modules that are in no name, or of layers that take no adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{lora} needs peft: pip install 'ddil[lora]', or set lora to null") from error
    weights = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(weight): weight.detach().as_subclass(SharedWeight) for weight in weights})
    targets = lora.target_modules or [name for name, module in twin.named_modules() if type(module) in ADAPTED]
    try:
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(targets)), twin)
    except ValueError as error:
        raise ValueError(f"lora.target_modules={lora.target_modules}: {error}; null adapts every linear and convolution layer") from error
    for module in twin.modules():
        for registered in (module._parameters, module._buffers):
            for name in [name for name, value in registered.items() if isinstance(value, SharedWeight)]:
                vars(module)[name] = registered.pop(name)
    return twin.float()  # which of it are the adapters alone


def adapter_layers(network: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name; none of a network that is not adapted."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def merge_adapters(network: nn.Module, plain: nn.Module) -> None:
    """Makes a plain network of an adapted one.

    Args:
        network: Adapted.
        plain: A twin of its teacher in float32; receives W + (α/r) B A, and what was learned beside.
    """
    with torch.no_grad():
        for name, layer in adapter_layers(network).items():
            plain.get_submodule(name).weight += layer.get_delta_weight(NAME)
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if ".lora_" not in name}, strict=False)


def save_adapters(network: nn.Module, path: Path, prefix: str) -> None:
    """Writes all that an adapted network has learned as a safetensors file, in the format of `load_lora_weights`.

    diffusers takes a file of adapters alone, and refuses one that holds something else that was learned.

    Args:
        network: Adapted.
        path: The file.
        prefix: Name of the network in its pipeline.
    """
    tensors = {f"{prefix}.{_plain(name)}": value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, {"lora_adapter_metadata": _settings(network, prefix)})  # a second entry would be written in random order


def load_adapters(network: nn.Module, path: Path, prefix: str) -> None:
    """Reads what `save_adapters` wrote into a network adapted alike.

    Raises:
        ValueError: the file is absent or damaged, or its adapters are of other layers or another rank or α.
    """
    theirs, own = read_tensors(path), {f"{prefix}.{_plain(name)}": (name, value) for name, value in network.state_dict().items()}
    different = sorted(theirs.keys() ^ own.keys()) or [name for name, value in theirs.items() if value.shape != own[name][1].shape]
    if different:
        found = tuple(theirs[different[0]].shape) if different[0] in theirs else "absent"
        asked = tuple(own[different[0]][1].shape) if different[0] in own else "absent"
        raise ValueError(f"{path} has other adapters: {different[0]!r} is {found} there, {asked} here; pass the lora that it was made with")
    with safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    key = f"{prefix}.lora_alpha"
    if (alpha := json.loads(_settings(network, prefix))[key]) != said.get(key):
        raise ValueError(f"{path} has lora.alpha={said.get(key)}, not {alpha}; pass the lora that it was made with")
    network.load_state_dict({own[name][0]: value for name, value in theirs.items()})


def _settings(network: nn.Module, prefix: str) -> str:
    """The adapters' settings as diffusers has them in a file's metadata."""
    layers = adapter_layers(network)
    layer = next(iter(layers.values()))
    config = {"r": layer.r[NAME], "lora_alpha": layer.lora_alpha[NAME], "target_modules": list(layers)}
    return json.dumps({f"{prefix}.{key}": value for key, value in config.items()})


def _plain(name: str) -> str:
    return name.replace(f".{NAME}.", ".")
