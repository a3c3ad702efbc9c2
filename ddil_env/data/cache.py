"""Turns pairs of pictures and captions into a cache of latents and embeddings, so that training needs no VAE and no text encoder.

    cache_pairs(read_pairs("coco"), "coco.pairs", encode, embed, model="sd15-…", height=512, width=512)

Caching that was killed continues with the first missing shard, and ends with the same bytes; a shard that is lost is made again alone.
Of several processes that want one cache the first makes it and the others wait: they lock `.coco.pairs.lock` beside it.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ddil_env.data.pictures import PictureReader
from ddil_env.data.shards import DTYPES, MANIFEST, NULL, Shard, is_cache, read_manifest, shard_path, write_file, write_shard
from ddil_env.data.sources import Pair, Skipped, Source

Encode = Callable[[Tensor], Tensor]  # uint8 (b, height, width, 3) → latents (b, *sample_shape)
Embed = Callable[[Sequence[str]], Mapping[str, Tensor]]  # b captions → named tables, (b, *any) each


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
    """Turns a source into a cache, or continues one that is not finished; returns the cache's folder.

    Worker processes read the pictures and this process encodes them; other processes that want the same cache wait. The result is the
    same for any number of workers, and to rounding for any batch size. Pictures that cannot be read are left out, counted in a warning,
    and named in `skipped.txt`.

    Args:
        source: What `read_pairs` or `read_pictures` returned.
        out: The cache's folder: a new or empty one, or a cache of the same source, model and sizes.
        encode: Pictures uint8 (b, height, width, 3) → latents (b, *sample_shape), in the dtype that the cache keeps.
        embed: b captions → named tables (b, *any), in the dtype that the cache keeps; [""] → the rows of the null condition.
        model: A fingerprint of the model that encodes and embeds.
        height, width: Size of the pictures, in pixels.
        batch_size: Number of pictures that are encoded at once.
        shard_size: Number of the source's pairs in one shard; a shard is held in memory until it is written.
        workers: Number of processes that read pictures; 0 reads them in this process.
        max_broken: The share of pictures that may be broken, from 0 to 1.

    Raises:
        ValueError: a size or share out of range, a folder that holds something else, a damaged shard, too many broken pictures, or
            `encode` or `embed` returns too few rows or NaN.
        OSError: the disk is full.
    """
    if min(height, width, batch_size, shard_size) < 1 or workers < 0 or not 0 <= max_broken <= 1:
        raise ValueError(
            f"height={height}, width={width}, batch_size={batch_size}, shard_size={shard_size}, workers={workers}, "
            f"max_broken={max_broken}: sizes are 1 or more, workers 0 or more, max_broken is a share from 0 to 1"
        )
    folder, n = Path(out), len(source.pairs)
    identity = {"pairs_sha256": source.sha256, "model": model, "height": height, "width": width, "shard_size": shard_size}
    manifest = {"identity": identity, "source": f"{source.kind} {source.path}, {n} pairs"}
    shards = range(math.ceil(n / shard_size))
    if is_cache(folder) and _is_finished(folder, _read_or_start_manifest(folder, manifest), shards):  # no lock: it may be read-only
        return folder
    with _lock(folder):
        for partial in folder.glob(".*.partial"):  # left by a process that was killed
            partial.unlink(missing_ok=True)
        manifest = _read_or_start_manifest(folder, manifest)
        if not _is_finished(folder, manifest, shards):
            _make_shards(source, folder, manifest, encode, embed, batch_size, workers, max_broken)
    return folder


def _make_shards(
    source: Source,
    folder: Path,
    manifest: dict[str, Any],
    encode: Encode,
    embed: Embed,
    batch_size: int,
    workers: int,
    max_broken: float,
) -> None:
    """Writes the missing shards, then the finished manifest; arguments and errors as in `cache_pairs`."""
    n, shard_size = len(source.pairs), manifest["identity"]["shard_size"]
    shards = range(math.ceil(n / shard_size))
    skipped = _skipped_by_shard(folder, shards)
    missing = {k: source.pairs[k * shard_size : (k + 1) * shard_size] for k in shards if k not in skipped}
    batches = {k: [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)] for k, pairs in missing.items()}
    all_batches = [batch for shard_batches in batches.values() for batch in shard_batches]
    # torchrl sets the start method to spawn, by which every worker would import the user's script; these workers only read pictures.
    context = "fork" if workers and sys.platform == "linux" else None
    reader = PictureReader(manifest["identity"]["height"], manifest["identity"]["width"])
    loader = iter(DataLoader(reader, batch_sampler=all_batches, num_workers=workers, collate_fn=list, multiprocessing_context=context))
    done = n - sum(map(len, missing.values()))
    with torch.no_grad(), tqdm(total=n, initial=done, desc=f"cache {folder.name}", unit=" pairs") as bar:
        for k, shard_batches in batches.items():
            rows, captions, skipped[k] = [], [], []
            for batch in shard_batches:
                pairs, pictures = [], []
                for pair, picture in zip(batch, next(loader), strict=True):
                    if isinstance(picture, str):
                        skipped[k].append(Skipped(pair.name, picture))
                    else:
                        pairs.append(pair)
                        pictures.append(picture)
                if pairs:
                    rows.append(_encode_pairs(encode, embed, pictures, pairs))
                    captions += [pair.caption for pair in pairs]
                bar.update(len(batch))
            write_shard(shard_path(folder, k), rows, captions, skipped[k])
            _check_broken(source, folder, skipped, max_broken)
        _check_broken(source, folder, skipped, max_broken)
        write_shard(folder / NULL, [_encode_pairs(encode, embed, [], [Pair("the empty caption", "", "", 0, -1)])], [""], [])
    left_out = [*source.skipped, *(each for k in shards for each in skipped[k])]
    summary = _write_skipped(folder, left_out)
    counts = [len(Shard(shard_path(folder, k))) for k in shards]
    write_file(folder / MANIFEST, json.dumps({**manifest, "counts": counts, "skipped": len(left_out)}, indent=1).encode())
    if left_out:
        broken = len(left_out) - len(source.skipped)
        warnings.warn(
            f"{source.path}: {sum(counts)} pairs kept, {len(left_out)} left out, {broken} for broken pictures; {summary}", stacklevel=3
        )


def _encode_pairs(encode: Encode, embed: Embed, pictures: list[Tensor], pairs: list[Pair]) -> dict[str, Tensor]:
    """Encodes pairs: their embeddings and, where there are pictures, their latents, (b, *any) each, on the CPU.

    Raises:
        ValueError: not one row for each pair, a dtype that a cache cannot hold, or NaN or infinite values.
    """
    rows = {f"embeddings.{name}": table for name, table in embed([pair.caption for pair in pairs]).items()}
    if pictures:
        rows["latents"] = encode(torch.stack(pictures))  # uint8 (b, height, width, 3) → (b, *sample_shape)
    for name, values in rows.items():
        if len(values) != len(pairs):
            raise ValueError(f"{len(values)} rows of {name} for {len(pairs)} pairs; encode and embed must return one for each pair")
        if values.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {values.dtype}; a cache keeps {', '.join(DTYPES)}: convert it in encode or embed")
        bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
        if bad.any():
            first = pairs[int(bad.nonzero()[0])].name
            raise ValueError(f"NaN or infinite {name} of {int(bad.sum())} pairs, the first {first!r}; compute in float32 or bfloat16")
    return {name: values.cpu() for name, values in rows.items()}


def _read_or_start_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Reads the manifest of the cache to continue; starts a new cache where the folder is absent or empty.

    Raises:
        ValueError: the folder holds the cache of something else, or other files.
    """
    if not is_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted(path.name for path in folder.iterdir()):
            raise ValueError(f"{folder} holds {others[0]!r} and no {MANIFEST}: it is no cache of pairs; pass a new or an empty folder")
        write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        return manifest
    found = read_manifest(folder)
    for key, value in manifest["identity"].items():
        if found["identity"].get(key) != value:
            sources = f" ({found['source']}; here {manifest['source']})" if key == "pairs_sha256" else ""
            raise ValueError(
                f"{folder} is the cache of another {key}: {found['identity'].get(key)!r}, here {value!r}{sources}; "
                "pass another folder, or delete it to cache again"
            )
    return found


def _skipped_by_shard(folder: Path, shards: range) -> dict[int, list[Skipped]]:
    """Shard number → the pairs of its stretch that it leaves out, for each shard that exists.

    Raises:
        ValueError: a shard is damaged.
    """
    return {k: Shard(shard_path(folder, k)).skipped for k in shards if shard_path(folder, k).exists()}


def _is_finished(folder: Path, manifest: dict[str, Any], shards: range) -> bool:
    return "counts" in manifest and len(_skipped_by_shard(folder, shards)) == len(shards) and (folder / NULL).is_file()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Waits until no other process makes this cache, then keeps others waiting; the lock of a process that dies is released."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which is making {folder}", file=sys.stderr)
        lock.acquire()
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
    write_file(folder / "skipped.txt", "".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in skipped).encode())
    first = ", ".join(f"{name} ({reason})" for name, reason in skipped[:3])
    return f"the first: {first}; all are named in {folder / 'skipped.txt'}"
