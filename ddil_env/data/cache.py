"""Turns pairs of pictures and captions into a cache of latents and embeddings, so that training needs no VAE and no text encoder.

    cache_pairs(read_pairs("coco"), "coco.pairs", encode, embed, model="sd15-…", height=512, width=512)

Caching that was killed continues with the first missing shard, and ends with the same bytes; a shard that is lost is made again alone.
Where pictures or captions changed since, what changed is encoded and the rest is kept. Of several processes that want one cache the
first makes it and the others wait: they lock `.coco.pairs.lock` beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ddil_env.data.encoding import Embed, Encode, Encoder, ReusableRows
from ddil_env.data.files import Skipped
from ddil_env.data.hashes import Hashes
from ddil_env.data.shards import MANIFEST, NULL, VERSION, Shard, is_cache, read_manifest, shard_path, stale_path, write_file, write_shard
from ddil_env.data.sources import Source

__all__ = ["Embed", "Encode", "cache_pairs"]


def cache_pairs(
    source: Source,
    out: str | Path,
    encode: Encode,
    embed: Embed,
    *,
    model: str,
    height: int,
    width: int,
    batch_size: int = 16,
    shard_size: int = 1024,
    workers: int = 4,
    max_broken: float = 0.1,
) -> Path:
    """Turns a source into a cache, or continues or updates one; returns the cache's folder.

    Worker processes read the pictures and this process encodes them; other processes that want the same cache wait. The result is the
    same for any number of workers, and to rounding for any batch size. Pictures that cannot be read are left out, counted in a warning,
    and named in `skipped.txt`. Another warning counts what was encoded again since pictures or captions changed.

    Args:
        source: What `read_pairs` or `read_pictures` returned.
        out: The cache's folder: a new or empty one, or a cache of the same model and sizes and at least half of the same pictures.
        encode: Pictures uint8 (b, height, width, 3) → latents (b, *sample_shape), in the dtype that the cache keeps.
        embed: b captions → named tables (b, *any), in the dtype that the cache keeps; [""] → the rows of the null condition.
        model: A fingerprint of the model that encodes and embeds.
        height, width: Size of the pictures, in pixels.
        batch_size: Number of pictures that are encoded at once.
        shard_size: Number of the source's pairs in one shard; a shard is held in memory until it is written.
        workers: Number of processes that read pictures; 0 reads them in this process.
        max_broken: The share of pictures that may be broken, from 0 to 1.

    Raises:
        ValueError: a size or share out of range, a folder that holds something else, a damaged shard, too many broken pictures, a
            picture that changes meanwhile, or `encode` or `embed` returns too few rows or NaN.
        OSError: the folder cannot be written, or the disk is full.
    """
    if min(height, width, batch_size, shard_size) < 1 or workers < 0 or not 0 <= max_broken <= 1:
        raise ValueError(
            f"height={height}, width={width}, batch_size={batch_size}, shard_size={shard_size}, workers={workers}, "
            f"max_broken={max_broken}: sizes are 1 or more, workers 0 or more, max_broken is a share from 0 to 1"
        )
    folder = Path(out)
    identity = {"version": VERSION, "model": model, "height": height, "width": width, "shard_size": shard_size}
    hashes = Hashes(source.pairs, folder, workers)
    manifest = {
        "identity": identity,
        "source": f"{source.kind} {source.path}, {len(source.pairs)} pairs",
        "stretches": _hash_stretches(source, hashes.values, shard_size),
        "left_out": _digest(source.skipped),
    }
    if is_cache(folder) and _is_finished(folder, found := _read_or_start_manifest(folder, manifest), manifest):
        hashes.remember(folder)
        if found.get("left_out") != manifest["left_out"]:
            try:
                _finish(source, folder, found | {"left_out": manifest["left_out"]}, _skipped_by_shard(folder, manifest))
            except OSError:  # the cache is whole, and may be read-only
                warnings.warn(f"{source.path}: {len(source.skipped)} left out, {_first(source.skipped)}", stacklevel=2)
        return folder
    with _lock(folder):
        for partial in folder.glob(".*.partial"):  # left by a process that was killed
            partial.unlink(missing_ok=True)
        found = _read_or_start_manifest(folder, manifest)
        hashes.remember(folder)
        if not _is_finished(folder, found, manifest):
            if found["stretches"] != manifest["stretches"]:
                _set_stale_shards_aside(source, folder, found, manifest, hashes.values)
            encoder = Encoder(encode, embed, height, width, batch_size, workers, ReusableRows(folder))
            _make_shards(source, folder, manifest, encoder, hashes.values, max_broken)
    return folder


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _hash_stretches(source: Source, hashes: list[str], size: int) -> list[str]:
    """A hash of the names, captions and pictures of each shard's stretch of the source; moving the folder does not change it."""
    listed = [(pair.name, pair.caption, sha256) for pair, sha256 in zip(source.pairs, hashes, strict=True)]
    return [_digest(listed[start : start + size]) for start in range(0, len(listed), size)]


def _make_shards(source: Source, folder: Path, manifest: dict[str, Any], encoder: Encoder, hashes: list[str], max_broken: float) -> None:
    """Writes the missing shards, then the finished manifest; arguments and errors as in `cache_pairs`."""
    n, size = len(source.pairs), manifest["identity"]["shard_size"]
    skipped = _skipped_by_shard(folder, manifest)
    missing = [k for k in range(len(manifest["stretches"])) if k not in skipped]
    stretches = [list(zip(source.pairs[k * size : (k + 1) * size], hashes[k * size : (k + 1) * size], strict=True)) for k in missing]
    with torch.no_grad():
        for k, (rows, captions, left_out) in zip(missing, encoder.encode_stretches(stretches, n, f"cache {folder.name}"), strict=True):
            skipped[k] = left_out
            write_shard(shard_path(folder, k), rows, captions, left_out)
            _check_broken(source, folder, skipped, max_broken)
        _check_broken(source, folder, skipped, max_broken)
        if not (folder / NULL).is_file():
            write_shard(folder / NULL, [encoder.encode_null()], [""], [])
    counts = [len(Shard(shard_path(folder, k))) for k in sorted(skipped)]
    _finish(source, folder, {**manifest, "counts": counts}, skipped)
    if stale := list(folder.glob(stale_path(folder, "*").name)):
        warnings.warn(
            f"{folder}: the data changed since they were cached; {encoder.pictures} pictures and {encoder.captions} captions were encoded "
            f"anew, and of {sum(counts)} pairs the rest was kept. A run that began before goes on with the data as they are now",
            stacklevel=3,
        )
    for path in stale:
        path.unlink()


def _finish(source: Source, folder: Path, manifest: dict[str, Any], skipped: dict[int, list[Skipped]]) -> None:
    """Names what was left out, and writes the manifest of a cache that is whole."""
    left_out = [*source.skipped, *(each for k in sorted(skipped) for each in skipped[k])]
    summary = _write_skipped(folder, left_out)
    write_file(folder / MANIFEST, json.dumps({**manifest, "skipped": len(left_out)}, indent=1).encode())
    if left_out:
        broken = len(left_out) - len(source.skipped)
        warnings.warn(
            f"{source.path}: {sum(manifest['counts'])} pairs kept, {len(left_out)} left out, {broken} for broken pictures; {summary}",
            stacklevel=4,
        )


def _set_stale_shards_aside(source: Source, folder: Path, found: dict[str, Any], manifest: dict[str, Any], hashes: list[str]) -> None:
    """Renames the shards whose pairs changed, from which `ReusableRows` takes the pairs that did not.

    Raises:
        ValueError: fewer than half of the cache's pictures are in the source.
    """
    n = range(max(len(found["stretches"]), len(manifest["stretches"])))
    old, new = (dict(enumerate(each["stretches"])) for each in (found, manifest))
    stale = [k for k in n if old.get(k) != new.get(k) and shard_path(folder, k).is_file()]
    here, pictures = set(hashes), [sha256 for k in n if shard_path(folder, k).is_file() for sha256 in Shard(shard_path(folder, k)).files()]
    if 2 * (remaining := sum(sha256 in here for sha256 in pictures)) < len(pictures):
        raise ValueError(
            f"{folder} is the cache of other pictures: of its {len(pictures)} ({found['source']}) {remaining} are here "
            f"({manifest['source']}); pass another folder (--env.data_cache), or delete it to cache again"
        )
    unfinished = {key: value for key, value in found.items() if key != "counts"}
    write_file(folder / MANIFEST, json.dumps(unfinished, indent=1).encode())  # before any shard is missing
    for k in stale:
        shard_path(folder, k).replace(stale_path(folder, f"{k:05d}"))
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _read_or_start_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Reads the manifest of the cache to continue; starts a new cache where the folder is absent or empty.

    Raises:
        ValueError: the folder holds the cache of something else, or other files.
        OSError: the folder cannot be written.
    """
    if not is_cache(folder):
        if others := sorted(path.name for path in folder.iterdir()):
            raise ValueError(f"{folder} holds {others[0]!r} and no {MANIFEST}: it is no cache of pairs; pass a new or an empty folder")
        write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        return manifest
    found = read_manifest(folder)
    if "stretches" not in found:
        raise ValueError(
            f"{folder} was made by an earlier version of ddil or elsewhere ({found['source']}), and does not say of which pictures it is; "
            "pass another folder (--env.data_cache), or delete it to cache again"
        )
    for key, value in manifest["identity"].items():
        if found["identity"].get(key) != value:
            raise ValueError(
                f"{folder} is the cache of another {key}: {found['identity'].get(key)!r}, here {value!r}; "
                "pass another folder (--env.data_cache), or delete it to cache again"
            )
    return found


def _skipped_by_shard(folder: Path, manifest: dict[str, Any]) -> dict[int, list[Skipped]]:
    """Shard number → the pairs of its stretch that it leaves out, for each shard that exists.

    Raises:
        ValueError: a shard is damaged.
    """
    paths = {k: shard_path(folder, k) for k in range(len(manifest["stretches"]))}
    return {k: Shard(path).skipped for k, path in paths.items() if path.exists()}


def _is_finished(folder: Path, found: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether the cache whose manifest was found is whole, and of these pairs."""
    if "counts" not in found or found["stretches"] != manifest["stretches"] or not (folder / NULL).is_file():
        return False
    return len(_skipped_by_shard(folder, manifest)) == len(manifest["stretches"])


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Makes the folder, waits until no other process makes this cache, then keeps others waiting.

    The lock of a process that dies is released.

    Raises:
        OSError: the folder, or the lock beside it, cannot be written.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which is making {folder}", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        raise OSError(
            error.errno or errno.EACCES,
            f"cannot write the cache {folder} and the lock beside it: {error.strerror or error}; "
            "name a folder that can be written, --env.data_cache DIR",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_broken(source: Source, folder: Path, skipped: dict[int, list[Skipped]], max_broken: float) -> None:
    broken, n = [each for k in sorted(skipped) for each in skipped[k]], len(source.pairs)
    if len(broken) > max_broken * n or len(broken) == n:
        raise ValueError(
            f"{source.path}: of {n} pictures {len(broken)} so far cannot be read, more than max_broken={max_broken} of cache_pairs allows; "
            f"{_write_skipped(folder, broken)}. Mend or remove them, delete {folder}, and run it again"
        )


def _write_skipped(folder: Path, skipped: list[Skipped]) -> str:
    """Writes skipped.txt; returns the part of a message that names the first pairs in it and the file."""
    lines = "".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in skipped)
    write_file(folder / "skipped.txt", lines.encode(errors="backslashreplace"))
    return f"{_first(skipped)}; all are named in {folder / 'skipped.txt'}"


def _first(skipped: list[Skipped]) -> str:
    return f"the first: {', '.join(f'{name} ({reason})' for name, reason in skipped[:3])}"
