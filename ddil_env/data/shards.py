"""The files of a cache of pairs.

A cache is a folder of

    pairs-00000.safetensors, …   latents, embeddings and captions, each file of a fixed stretch of the source
    null.safetensors             the embeddings of "", which is guidance's null condition
    pairs.json                   what the cache was made of
    skipped.txt, stamps.json     what was left out; under which size and times the pictures' files were read

A shard holds the tensors `latents`, `pictures` (uint8 (n, 32), a hash of each picture's pixels: pairs of one picture go together),
`embeddings.NAME`, `captions` (their UTF-8 bytes in a row) and `captions.ends` (the byte where each caption ends, int64), and the metadata
`skipped`, a JSON list of [name, reason], "[]" if nothing was left out. pairs.json holds `identity` = {"model": …}, `source` (a text) and,
once the cache is whole, `counts` (the lengths of the shards). A cache that is made elsewhere has these files, null.safetensors without
`latents` and `pictures`. One that is made here has also `files` (uint8 (n, 32), the SHA-256 of each picture's file) and, in pairs.json,
`stretches`, a hash of what each shard is made of; shards whose stretch changed are named stale-*.safetensors until it is made anew.

Every file is written in whole or not at all, and a shard depends on nothing but its own stretch of the source.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddil_env.data.files import Skipped

VERSION = 2  # of how pictures and captions are read
MANIFEST, NULL = "pairs.json", "null.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
HAS_MADVISE = hasattr(mmap, "MADV_RANDOM")  # not on Windows


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        with suppress(OSError):  # a folder that cannot be written holds no part of it
            partial.unlink(missing_ok=True)
        cure = (
            "Make room and run it again: it continues after the last whole shard" if full else "Name another folder, --env.data_cache DIR"
        )
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}. {cure}") from error


def shard_path(folder: Path, k: int) -> Path:
    """Where shard k of a cache lies."""
    return folder / f"pairs-{k:05d}.safetensors"


def stale_path(folder: Path, number: str) -> Path:
    """Where the shard of that number, or those of a glob, lie once their stretch of the source changed."""
    return folder / f"stale-{number}.safetensors"


class Shard:
    """A memory-mapped safetensors file.

    safetensors' own mapping has the system read megabytes ahead of every row that is not in memory. This one disables that, and
    `prefetch` asks for the rows of a batch before the first is read.

    Args:
        path: The file.

    Attributes:
        tensors: The file's tensors by name.
        skipped: What was left out of the shard's stretch of the source.

    Raises:
        ValueError: the file is absent, damaged or not a shard.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if HAS_MADVISE:
                self._bytes.madvise(mmap.MADV_RANDOM)
            begin = 8 + int.from_bytes(self._bytes[:8], "little")
            header = json.loads(self._bytes[8:begin])
            self.skipped = [Skipped(*each) for each in json.loads(header.pop("__metadata__")["skipped"])]
            self.tensors: dict[str, Tensor] = {}
            for name, entry in header.items():
                dtype, (start, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
                flat = torch.frombuffer(self._bytes, dtype=dtype, count=(end - start) // dtype.itemsize, offset=begin + start)
                self.tensors[name] = flat.view(entry["shape"])
            self._starts = {name: begin + entry["data_offsets"][0] for name, entry in header.items()}
            size = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if size != len(self._bytes):
                raise ValueError(f"{len(self._bytes)} bytes where its header says {size}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{path} is absent, damaged or not a shard of a cache ({error!r}); delete it and cache again: only missing shards are made"
            ) from error

    def __len__(self) -> int:
        return len(self.tensors.get("captions.ends", ()))

    def caption(self, row: int) -> str:
        """The text of a row."""
        ends = self.tensors["captions.ends"]
        start, end = int(ends[row - 1]) if row else 0, int(ends[row])
        return self.tensors["captions"][start:end].numpy().tobytes().decode()

    def files(self) -> list[str]:
        """The SHA-256 of each row's picture file, in hexadecimal."""
        return [bytes(row).hex() for row in self.tensors["files"].numpy()] if len(self) else []

    def prefetch(self, name: str, row: int) -> None:
        """Asks the system to read a row into memory in the background."""
        size = self.tensors[name][0].nbytes
        start = self._starts[name] + row * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        if HAS_MADVISE:
            self._bytes.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def write_shard(path: Path, rows: list[dict[str, Tensor]], captions: list[str], skipped: list[Skipped]) -> None:
    """Writes a shard of encoded batches.

    Args:
        path: The file.
        rows: A batch's tensors by name, (b, *any) each; one mapping for each batch.
        captions: The texts of all rows.
        skipped: What was left out of the shard's stretch of the source.

    Raises:
        OSError: the file cannot be written.
    """
    texts = [caption.encode() for caption in captions]
    tensors = {name: torch.cat([row[name] for row in rows]).contiguous() for name in (rows[0] if rows else ())}
    if rows:
        tensors["captions"] = torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8)
        tensors["captions.ends"] = torch.tensor([len(text) for text in texts]).cumsum(0)
    write_file(path, save(tensors, {"skipped": json.dumps(skipped)}))


def is_cache(folder: str | Path) -> bool:
    """Whether the folder is a cache of pairs, finished or not."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A cache's pairs.json.

    Raises:
        ValueError: the folder is not a cache, or the file is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {**manifest, "identity": dict(manifest["identity"]), "source": str(manifest["source"])}
    except FileNotFoundError as error:
        raise ValueError(f"{folder.absolute()} is no cache of pairs: it holds no {MANIFEST}; make one with cache_pairs") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); delete {folder} and cache again") from error
