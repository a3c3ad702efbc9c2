"""Out-of-memory errors: recognises them on any device, and raises one that says which setting to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parts of the messages of allocators that raise a plain RuntimeError: torch's on a CPU, Apple's, and cuBLAS for its workspace.
ALLOCATOR_MESSAGES = ("DefaultCPUAllocator", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, in torch on any device or in Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATOR_MESSAGES)


@contextmanager
def explain(doing: str, cure: str) -> Iterator[None]:
    """Turns an out-of-memory error of the block into one that says what the program was doing and what to change.

    Args:
        doing: What the block does, such as "while collecting 256 states".
        cure: Which setting to change.

    Raises:
        MemoryError: memory ran out inside the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or str(error).startswith("out of memory "):  # explained by an inner block
            raise
        raise MemoryError(f"out of memory {doing} ({str(error).partition(chr(10))[0]}); {cure}") from error
