"""Running out of memory: how it is told from other errors, and the error that says what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What allocators say that raise no more than a RuntimeError: torch's on a CPU, Apple's, cuBLAS for its workspace.
SAID = ("DefaultCPUAllocator", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error is an allocator's: torch's on any device, or Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAID)


@contextmanager
def named(doing: str, cure: str) -> Iterator[None]:
    """Says what memory ran out in, and what to do about it.

    Raises:
        MemoryError: so.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error) or str(error).startswith("out of memory "):  # said already
            raise
        raise MemoryError(f"out of memory {doing} ({str(error).partition(chr(10))[0]}); {cure}") from error
