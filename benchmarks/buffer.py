"""What a β-weighted draw costs over a raw fancy index of the same tensors.

    python benchmarks/buffer.py [--device cuda] [--repeats 200] [--out buffer.json]

The three ways are timed in one process and in turn, so that a busy machine slows them alike. The raw index comes ready made; the
prioritised buffer's priorities change before every draw, outside the clock, so that its draw rebuilds the cumulative sum as in training.
Target: ratio ≤ 1.5. Take TorchRL's greeting away with RL_LOGGING_LEVEL=WARNING.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.states.buffer import SOURCES, SourceBuffer

SHAPE = (4, 64, 64)  # Stable Diffusion's latent
BETA = (0.5, 0.1, 0.4)


def states(n: int, source: int, device: str) -> TensorDict:
    """n states of one source with a learner's keys, 128 KiB each."""
    return TensorDict(
        {
            "source": torch.full((n,), source, dtype=torch.uint8, device=device),
            "x_t": torch.randn(n, *SHAPE, device=device),
            "x_tgt": torch.randn(n, *SHAPE, device=device),
            "t": torch.rand(n, device=device) * 999,
            "s": torch.rand(n, device=device) * 999,
            "c": torch.randint(1000, (n,), device=device),
            "guidance_scale": torch.rand(n, device=device),
            "policy_version": torch.zeros(n, dtype=torch.int64, device=device),
        },
        batch_size=[n],
    )


def hardware(device: str) -> str:
    """The processor that did the work, by name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def keep_freed_memory() -> None:
    """Stops glibc from handing freed memory back to the system.

    Else it does so after some draws and not others, and the page faults of the next, 10 ms, outweigh the draw, 4 ms.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: a batch's tensors come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks


def seconds(call: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = clock()
    result = call()
    wait()
    elapsed = clock() - start
    del result  # freed outside the clock
    return elapsed


def timed(
    device: str, capacity: int, batch_size: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    keep_freed_memory()
    buffers = {name: SourceBuffer(capacity // 3, device=device, prioritised=name == "prioritised") for name in ("uniform", "prioritised")}
    for source in range(len(SOURCES)):
        for buffer in buffers.values():
            buffer.extend(states(capacity // 3, source, device))
    storage: dict[str, Tensor] = dict(buffers["uniform"].replay.storage[:].items())  # views, not copies
    times: dict[str, list[float]] = {name: [] for name in ("raw", *buffers)}
    for repeat in range(repeats + 10):
        index = torch.randint(len(buffers["uniform"]), (batch_size,), device=device)
        buffers["prioritised"].update_priority(index, torch.rand(batch_size, device=device))

        def raw(index: Tensor = index) -> dict[str, Tensor]:
            return {k: v[index] for k, v in storage.items()}

        calls: list[tuple[str, Callable[[], object]]] = [("raw", raw)]
        calls += [(name, lambda buffer=buffer: buffer.sample(batch_size, BETA)) for name, buffer in buffers.items()]  # type: ignore[misc]
        for name, call in calls[repeat % 3 :] + calls[: repeat % 3]:  # each goes first as often as the others
            times[name].append(seconds(call, device, clock))
    return {name: values[10:] for name, values in times.items()}  # the first 10 warm up


def measure(device: str, capacity: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, and of the ratios to the raw index of the same round."""
    times = timed(device, capacity, batch_size, repeats)
    return {
        "device": device,
        "hardware": hardware(device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "capacity": capacity // 3 * 3,
        "batch_size": batch_size,
        "repeats": repeats,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "ratio": {
            name: statistics.median(b / a for a, b in zip(times["raw"], values, strict=True))
            for name, values in times.items()
            if name != "raw"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--capacity", type=int, default=4096, help="states held, a third of each source")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=200, help="timed draws of each way")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args()

    result = measure(args.device, args.capacity, args.batch_size, args.repeats)
    print(f"{result['hardware']}; torch {result['torch']}; {result['date']}")
    print(f"{result['batch_size']} of {result['capacity']} states, x_t and x_tgt {SHAPE} float32; median of {result['repeats']}")
    print(f"{'':<14}{'ms':>10}{'ratio':>8}")
    for name, median in result["median_ms"].items():
        print(f"{name:<14}{median:>10.3f}{result['ratio'].get(name, 1.0):>8.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
