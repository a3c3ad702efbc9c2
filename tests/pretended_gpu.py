"""A GPU that the CPU plays: its tensors say that they are on cuda:0, and hold real numbers in the CPU's memory.

What a GPU would refuse is refused here: an operation on tensors of both devices, a generator of the other one. Where it would make the host
wait, `torch.cuda.set_sync_debug_mode` has its effect. So code that says `device="cuda"` runs through without a GPU, with the CPU's numbers.

What is not played: kernels, streams, graphs, memory, autocast, whatever goes past torch's dispatcher, and the few waits inside of kernels.

A tensor is a wrapper, which C++ takes for one on the meta device, so that autograd asks for no stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU, HOST, INSIDE = torch.device("cuda:0"), torch.device("cpu"), torch.device("meta")
aten: Any = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
JOINING = {aten.cat.default, aten.stack.default}
WAITING = {  # shapes or numbers that the host needs
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
MAKING = {torch.tensor, torch.as_tensor}
ASKING = {torch.device, torch.get_device_module, torch.set_default_device, torch._C._nn._parse_to}


class Waits:
    """What `torch.cuda.set_sync_debug_mode` has set."""

    mode = "default"

    @classmethod
    def set(cls, mode: str | int) -> None:
        cls.mode = ("default", "warn", "error")[mode] if isinstance(mode, int) else mode

    @classmethod
    def note(cls, what: object) -> None:
        if cls.mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        if cls.mode == "warn":
            warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)


class Stream:
    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        Waits.note("a stream")


class Event:
    """`set_sync_debug_mode` is blind to a wait for an event; this one is not."""

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        Waits.note("an event")


class Generator(torch.Generator):
    """Draws what the CPU's of the same seed draws."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.of = GPU if torch.device(device).type == "cuda" else HOST

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.of


class GpuTensor(Tensor):
    """A tensor there; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls: Any, held: Tensor) -> GpuTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": INSIDE}
        tensor: GpuTensor = Tensor._make_wrapper_subclass(cls, held.shape, **layout)
        tensor.held = held
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, args, kwargs or {})


def compute(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of the dispatcher, on the numbers."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, GpuTensor)]
    device = kwargs.get("device")
    on_gpu = bool(there) if device is None else device.type in ("meta", "cuda")
    if not there and not on_gpu:
        return op(*args, **kwargs)
    refuse_mixtures(op, args, kwargs, given, there, on_gpu)
    note_waits(op, args, kwargs, there, on_gpu)
    own = {id(x.held): x for x in there}
    args, kwargs = tree_map_only(GpuTensor, lambda x: x.held, (args, kwargs))
    if device is not None:
        kwargs["device"] = HOST
        if op is aten._to_copy.default and on_gpu != bool(there):  # a move, which always copies
            return GpuTensor(op(*args, **kwargs)) if on_gpu else op(*args, **kwargs)
    output = op(*args, **kwargs)
    return tree_map_only(Tensor, lambda x: own.get(id(x)) if id(x) in own else GpuTensor(x), output) if on_gpu else output


def refuse_mixtures(op: Any, args: Any, kwargs: Any, given: list[Tensor], there: list[GpuTensor], on_gpu: bool) -> None:
    if not there or op in COPIES:
        return
    first: Any = args[0] if op in INDEXING else None
    if op in INDEXING and isinstance(first, GpuTensor):
        given = [first, *args[2:3]]  # indices of the host are moved
    if any(not isinstance(x, GpuTensor) and (x.ndim or op in JOINING) for x in given if isinstance(x, Tensor)):
        places = ", ".join(f"{x.device} {tuple(x.shape)}" for x in given if isinstance(x, Tensor))
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found {places}")


def note_waits(op: Any, args: Any, kwargs: Any, there: list[GpuTensor], on_gpu: bool) -> None:
    if op in WAITING and there:
        Waits.note(op)
    if op is aten._to_copy.default and on_gpu != bool(there) and not kwargs.get("non_blocking"):
        Waits.note("a copy to the GPU" if on_gpu else "a copy to the host")
    if op is aten.copy_.default and type(args[0]) is not type(args[1]) and len(there) == 1 and not (args[2:3] and args[2]):
        Waits.note("a copy between the devices")
    if op in INDEXING and there:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            Waits.note("an index of booleans, whose true ones are counted")
        if any(not isinstance(x, GpuTensor) for x in indices):
            Waits.note("an index on the host")


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, args, kwargs or {})


def inside(value: Any) -> Any:
    """A device as C++ shall see it."""
    named = isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] == "cuda")
    return INSIDE if named and torch.device(value).type == "cuda" else value


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in READING and isinstance(args[0], GpuTensor):
            Waits.note(function.__name__)
            return function(args[0].held, *args[1:], **kwargs)
        if function is torch.nn.functional.one_hot and isinstance(args[0], GpuTensor):  # it looks at no number of a GPU's
            return GpuTensor(function(args[0].held, *args[1:], **kwargs))
        if function in ASKING:
            return function(*args, **kwargs)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], GpuTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i).to(INSIDE) if isinstance(i, list) else i for i in index)
            return function(args[0], index, *args[2:])
        if function is Tensor.cuda:
            return args[0].to(INSIDE)
        if function in MAKING and inside(kwargs.get("device")) is INSIDE:
            made = function(*args, **{**kwargs, "device": None})
            return made if isinstance(made, GpuTensor) else made.to(INSIDE)
        args, kwargs = tuple(map(inside, args)), {name: inside(value) for name, value in kwargs.items()}
        if (generator := kwargs.get("generator")) is not None:
            device = kwargs["device"] if kwargs.get("device") is not None else next((x.device for x in args if isinstance(x, Tensor)), HOST)
            wanted = "cpu" if torch.device(device) == HOST else "cuda"
            if generator.device.type != wanted:
                raise RuntimeError(f"expected a '{wanted}' device type for generator but found '{generator.device.type}'")
        return function(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, there is one GPU."""
    here: dict[str, Callable[..., Any] | Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "current_stream": lambda device=None: Stream(),
        "Event": Event,
        "synchronize": lambda device=None: Waits.note("torch.cuda.synchronize"),
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "a GPU that the CPU plays",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "set_sync_debug_mode": Waits.set,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "default_generators": (),
    }
    with ExitStack() as stack:
        for name, value in here.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", return_value=Stream()))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.callback(Waits.set, "default")
        stack.enter_context(Functions())
        stack.enter_context(Operations())
        yield
