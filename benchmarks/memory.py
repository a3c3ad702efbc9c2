"""Where the memory of a DMD2 update goes, tensor by tensor and without a GPU: Stable Diffusion 1.5 from its configuration alone.

    python benchmarks/memory.py [--batch_size 8] [--rank 64]

The networks are diffusers' own, on the meta device: tensors that have a shape, a dtype and a lifetime, and no numbers. The student's turn
(its forward, the critic's and the guided teacher's without gradient, backward, step) and the critic's are run, every storage is counted
from its birth to its end, and the largest sum is the peak. Attention is the fused kernel of a GPU, autocast casts what it casts on
CUDA. Not counted: CUDA's context, workspaces inside of kernels, gaps in the allocator.
"""

from __future__ import annotations

import argparse
import copy
import json
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.checkpoint import checkpoint

from ddil_env.adapters import LoRA, add_adapters

RESULTS = Path(__file__).parent / "results"
BITS_8 = 2 + 2 * 4 / 256  # bytes a weight of 8-bit momenta: two, and the scales of their blocks
LEAST_8 = 4096  # entries below which bitsandbytes keeps momenta in float32
REDUCED = {F.linear, F.conv2d, torch.matmul, torch.bmm, F.scaled_dot_product_attention}  # autocast's lists on CUDA, as far as UNets go
WIDENED = {F.group_norm, F.layer_norm, F.softmax, torch.group_norm, torch.layer_norm, torch.softmax}

Inputs = Callable[[int, torch.dtype], dict[str, Any]]  # batch size, dtype → a UNet's arguments


class Meter(TorchDispatchMode):
    """Bytes of all storages made since it began that are still there, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = op(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                storage = tensor.untyped_storage()
                self._known[key] = weakref.ref(storage, self._forget(key, storage.nbytes()))
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return output

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self.live -= size
            del self._known[key]

        return forget


class Autocast(TorchFunctionMode):
    """torch.autocast("cuda", torch.bfloat16) on the meta device, which has none; a weight that learns is cast once in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function in REDUCED or function in WIDENED:
            to = self._reduced if function in REDUCED else self._widened
            args, kwargs = tree_map_only(Tensor, to, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _reduced(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.bfloat16()
        return self._cast.setdefault(id(tensor), tensor.bfloat16())

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """What CUDA chooses: flash attention in half precision, the memory-efficient one in float32."""
    if query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@dataclass(frozen=True)
class Setting:
    """How the networks of an update are held.

    Attributes:
        lora: None is full fine-tuning: a network for every role.
        teacher: Dtype of the teacher, and with it of a shared backbone.
        autocast: Whether networks that learn compute in bfloat16.
        checkpointing: Whether activations are computed again in backward.
    """

    lora: LoRA | None = None
    teacher: torch.dtype = torch.float32
    autocast: bool = False
    checkpointing: bool = False


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def momenta(parameters: list[nn.Parameter], optimizer: str) -> int:
    """Bytes of an optimiser's state, but for counters."""
    if optimizer == "adamw":
        return 2 * size(parameters)
    return round(sum(p.numel() * (BITS_8 if p.numel() >= LEAST_8 else 8) for p in parameters))


def dtype_of(unet: Any) -> torch.dtype:
    """In which a UNet, or a transformer of Stable Diffusion 3, takes its inputs."""
    first = unet.conv_in if hasattr(unet, "conv_in") else unet.pos_embed.proj
    dtype: torch.dtype = first.weight.dtype
    return dtype


def cast(setting: Setting) -> Any:
    """What a network that learns computes under."""
    return Autocast() if setting.autocast else nullcontext()


def _prepared(network: Any, setting: Setting) -> torch.optim.Optimizer:
    """Makes a network learn; its optimiser, whose momenta are there already."""
    network.requires_grad_(True).train()
    if setting.checkpointing:

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), cast(setting)  # no mode of Python's reaches into a backward by itself

        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
        network.enable_gradient_checkpointing(lambda *args: checkpoint(*args, **options))
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)  # as a fused one, without copies of the weights
    for p in network.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def account(
    make: Callable[[], nn.Module], inputs: Inputs, batch_size: int, setting: Setting, attention: Callable[..., Tensor] = fused_attention
) -> dict[str, int]:
    """Bytes of a DMD2 update.

    Args:
        make: Builds the teacher's network.
        inputs: Its arguments.
        batch_size: Of student and critic; the guided teacher takes twice as many.
        setting: How the networks are held.
        attention: In the place of torch's scaled_dot_product_attention.

    Returns:
        What is there all the time (teacher, student, critic, average, momenta), what comes and goes (gradients, of one network, and
        saved, the most that autograd keeps for a backward), and the peak, also with momenta of 8 bits. Gradients come as what was
        saved goes: they do not add up.
    """
    meter = Meter()
    with meter, mock.patch.object(F, "scaled_dot_product_attention", attention):
        teacher = make().to(setting.teacher).requires_grad_(False).eval()
        student, critic = (make() if setting.lora is None else add_adapters(teacher, setting.lora) for _ in range(2))
        average = copy.deepcopy(student)
        saved, peaks = [], []
        steps = {network: _prepared(network, setting) for network in (student, critic)}
        for network, optimizer in steps.items():  # whose turn it is
            before = meter.peak = meter.live
            with cast(setting):
                loss = network(**inputs(batch_size, dtype_of(network))).sample.float().square().mean()
            saved.append(meter.live - before)
            if network is student:
                with torch.no_grad():
                    with cast(setting):
                        critic(**inputs(batch_size, dtype_of(critic)))
                    teacher(**inputs(2 * batch_size, setting.teacher))
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            gradients = size(p.grad for p in network.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            del loss
            peaks.append(meter.peak)
    learned = [*student.parameters(), *critic.parameters()]
    return {
        "teacher": size(teacher.parameters()),
        "student": size(student.parameters()),
        "critic": size(critic.parameters()),
        "average": size(average.parameters()),
        "momenta": momenta(learned, "adamw"),
        "gradients": gradients,
        "saved": max(saved),
        "peak": max(peaks),
        "8-bit": max(peaks) - momenta(learned, "adamw") + momenta(learned, "adamw8bit"),
    }


def stable_diffusion() -> nn.Module:
    """Stable Diffusion 1.5's UNet, without numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # type: ignore[no-any-return]


def its_inputs(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Its arguments, for n pictures of 512 × 512."""
    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    return {
        "sample": torch.empty(n, 4, 64, 64, **options),
        "timestep": torch.empty(n, device="meta"),
        "encoder_hidden_states": torch.empty(n, 77, 768, **options),
    }


def settings(rank: int) -> dict[str, Setting]:
    """What is compared, by name: in each precision three full networks and adapters, with checkpointing and without."""
    found = {}
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        for checkpointing in (False, True):
            for name, lora in (("full", None), (f"LoRA {rank}", LoRA(rank))):
                how = f"{name}, {precision}{', checkpointing' if checkpointing else ''}"
                found[how] = Setting(lora, dtype, dtype == torch.bfloat16, checkpointing)
    return found


def table(accounts: dict[str, dict[str, int]]) -> str:
    """In Markdown, GB; the last column is the peak over that of the full networks above it."""
    columns = ["teacher", "student", "critic", "average", "momenta", "gradients", "saved", "8-bit", "peak"]
    heads = ["peak, 8-bit momenta" if column == "8-bit" else column for column in columns]
    lines = [f"| | {' | '.join(heads)} | of full |", "|---" * (len(columns) + 2) + "|"]
    full = 0
    for name, parts in accounts.items():
        full = parts["peak"] if name.startswith("full") else full
        share = "" if name.startswith("full") else f"{parts['peak'] / full:.2f}"
        lines.append(f"| {name} | {' | '.join(f'{parts[column] / 1e9:.2f}' for column in columns)} | {share} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    accounts = {}
    for name, setting in settings(given.rank).items():
        accounts[name] = account(stable_diffusion, its_inputs, given.batch_size, setting)
        print(name, f"{accounts[name]['peak'] / 1e9:.2f} GB", flush=True)
    (given.out / "memory.json").write_text(json.dumps({"batch_size": given.batch_size, "rank": given.rank, "bytes": accounts}, indent=1))
    (given.out / "memory.md").write_text(table(accounts) + "\n")
    print(table(accounts))


if __name__ == "__main__":
    main()
