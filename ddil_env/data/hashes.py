"""Hashes of the pictures' files, by which a cache is known to be of them.

A file is read only if its size, times or inode are not those under which a hash of it is remembered, in `stamps.json` of the cache. A file
that was changed less than two seconds before is not remembered: it might change again without another time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from tqdm import tqdm

from ddil_env.data.files import Pair

STAMPS = "stamps.json"
SETTLED = 2.0  # seconds
ABSENT = (0, 0, 0, 0)


class Hashes:
    """SHA-256 of each pair's picture, in hexadecimal; "" for a file that cannot be read.

    Args:
        pairs: The pairs.
        folder: The cache; None remembers nothing.
        workers: Number of threads that read files.

    Attributes:
        values: The hashes, in order of the pairs.
    """

    def __init__(self, pairs: list[Pair], folder: Path | None, workers: int) -> None:
        known: dict[str, list[object]] = {}
        with suppress(OSError, ValueError):  # there are none yet, or they are damaged: all is read
            known = json.loads((folder / STAMPS).read_text(encoding="utf-8")) if folder is not None else {}
        stamp_of, begin = cache(_stamp), time.time()
        self._stamps: dict[str, list[object]] = {}
        self._new = False
        unread: dict[tuple[str, int], Pair] = {}
        found: dict[tuple[str, int], str] = {}
        for pair in pairs:
            key, stamp = (pair.path, pair.offset), [pair.offset, pair.size, *stamp_of(pair.path)]
            remembered = known.get(pair.name)
            if isinstance(remembered, list) and remembered[:-1] == stamp:
                self._stamps[pair.name] = remembered
                found[key] = str(remembered[-1])
            else:
                unread[key] = pair
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            hashes = pool.map(hash_picture, unread.values())
            found |= zip(unread, tqdm(hashes, total=len(unread), desc="hash pictures", unit=" files", delay=5), strict=True)
        for pair in unread.values():
            status = stamp_of(pair.path)
            if status != ABSENT and max(status[1], status[2]) < (begin - SETTLED) * 1e9:
                self._stamps[pair.name] = [pair.offset, pair.size, *status, found[pair.path, pair.offset]]
                self._new = True
        self.values = [found[pair.path, pair.offset] for pair in pairs]

    def remember(self, folder: Path) -> None:
        """Writes the stamps into a cache, unless they are there or it cannot be written."""
        if self._new:
            partial = folder / f".{STAMPS}.{os.getpid()}.partial"
            with suppress(OSError):
                partial.write_text(json.dumps(self._stamps))
                os.replace(partial, folder / STAMPS)
            self._new = False


def _stamp(path: str) -> tuple[int, int, int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ABSENT
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def hash_picture(pair: Pair) -> str:
    """The SHA-256 of a pair's picture as it lies on the disk, in hexadecimal; "" if it cannot be read."""
    try:
        return hashlib.sha256(pair.read()).hexdigest()
    except (OSError, ValueError):
        return ""
