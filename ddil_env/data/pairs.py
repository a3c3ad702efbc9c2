"""Pairs of pictures and captions, turned once into latents and embeddings on the disk; training needs no VAE and no text encoder.

    cache_pairs(read_pairs("coco"), "coco.pairs", encode, embed, model="sd15-…", height=512, width=512)
    x_0, c = Pairs("coco.pairs").draw(64, generator)

A cache is a folder of `pairs-00000.safetensors`, … (latents, embeddings, captions of a fixed stretch of the source each),
`null.safetensors` (the embedding of "") and `pairs.json`. It is memory-mapped: a batch costs its own rows. A condition c is
a pair's number, and the number after the last stands for "", guidance's null condition. For Stable Diffusion 1.x in half
precision a pair takes 151 kB, of which 118 are the caption's embedding.

A cache made elsewhere has the same files: shards of `latents`, `embeddings.NAME`, `captions` (their UTF-8 bytes in a row) and
`captions.ends` (where each ends, int64), with the metadata `skipped` = "[]"; in pairs.json `identity` = {"model": …}, `source`
(a text) and `counts` (the shards' lengths).

Every file is written in whole or not at all, and a stretch depends on nothing but itself: caching that was killed goes on
where it was, to the same bytes, and a shard that is lost is made again alone. Of several processes that want one cache the first
makes it and the others wait, for which they lock `.coco.pairs.lock` beside it.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ddil_env.data.sources import Pair, Skipped, Source
from ddil_env.errors import NoDataError

__all__ = ["Pairs", "cache_pairs", "is_cache", "load_picture"]

Encode = Callable[[Tensor], Tensor]  # uint8 (b, height, width, 3) → latents (b, *sample_shape)
Embed = Callable[[list[str]], Mapping[str, Tensor]]  # b captions → named tables, (b, *any) each

MANIFEST, NULL = "pairs.json", "null.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
ADVISE = hasattr(mmap, "MADV_RANDOM")  # not on Windows
FORMATS = ("JPEG", "PNG", "WEBP")  # no other plug-in of Pillow sees the bytes: one of them runs a program


def load_picture(content: bytes, height: int, width: int) -> Tensor:
    """A picture, uint8 (height, width, 3): turned as its EXIF says, the middle cut to that shape, resized with Pillow's Lanczos.

    For a square that is the protocol `centre_crop_lanczos` of ddil_agents.evaluation.metrics.pictures, by which samples are judged.

    Raises:
        Exception: whatever Pillow makes of bytes that are no picture, are cut short, or unpack to 90 million pixels and more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if opened.mode.startswith("I") or opened.mode == "F":  # convert() would clip these to white
                raise ValueError(f"mode {opened.mode} has more than 8 bits a channel")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    scale = min(image.width / width, image.height / height)
    w, h = round(width * scale), round(height * scale)
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    image = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))  # (height, width, 3)


class _Pictures(Dataset[Tensor | str]):
    """Pair → picture, or why there is none. Its index is the pair itself, so that no worker holds the source."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __getitem__(self, pair: Pair) -> Tensor | str:
        try:
            return load_picture(pair.read(), self.height, self.width)
        except UnidentifiedImageError:  # its text holds an address in memory
            return f"no picture, of {', '.join(FORMATS)}"
        except Exception as error:  # Pillow's plug-ins raise whatever a damaged file makes them
            return f"{type(error).__name__}: {error}"


def _write(path: Path, content: bytes) -> None:
    """Writes a file in whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path}: {error.strerror}. Make room and run it again: it goes on after the last whole shard"
        ) from error


def _shard(folder: Path, k: int) -> Path:
    return folder / f"pairs-{k:05d}.safetensors"


class _Shard:
    """A safetensors file, mapped and not read.

    Not by safetensors' own mapping, for which the system reads megabytes ahead of every row that is not in memory: here it is asked
    for the rows of a batch first, all at once, and for nothing else.

    Attributes:
        tensors: By name.
        skipped: What was left out of its stretch of the source.

    Raises:
        ValueError: it is absent or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if ADVISE:
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
            whole = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if whole != len(self._bytes):
                raise ValueError(f"{len(self._bytes)} bytes where its header says {whole}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{path} is absent, damaged or no shard of a cache ({error!r}); delete it and cache again: only what is missing is made"
            ) from error

    def __len__(self) -> int:
        return len(self.tensors.get("captions.ends", ()))

    def prefetch(self, name: str, row: int) -> None:
        """Has the system read a row, while others are being read."""
        size = self.tensors[name][0].nbytes
        start = self._starts[name] + row * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        if ADVISE:
            self._bytes.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def _write_shard(path: Path, rows: list[dict[str, Tensor]], captions: list[str], skipped: list[Skipped]) -> None:
    texts = [caption.encode() for caption in captions]
    tensors = {name: torch.cat([row[name] for row in rows]).contiguous() for name in (rows[0] if rows else ())}
    if rows:
        tensors["captions"] = torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8)
        tensors["captions.ends"] = torch.tensor([len(text) for text in texts]).cumsum(0)
    _write(path, save(tensors, {"skipped": json.dumps(skipped)}))


def _rows(encode: Encode, embed: Embed, pictures: list[Tensor], pairs: list[Pair]) -> dict[str, Tensor]:
    """Latents, unless there are no pictures, and embeddings of pairs, on the CPU.

    Raises:
        ValueError: not one row a pair, a dtype that is not kept, or NaN or infinite values.
    """
    rows = {f"embeddings.{name}": table for name, table in embed([pair.caption for pair in pairs]).items()}
    if pictures:
        rows["latents"] = encode(torch.stack(pictures))  # uint8 (b, height, width, 3) → (b, *sample_shape)
    for name, values in rows.items():
        if len(values) != len(pairs):
            raise ValueError(f"{len(values)} rows of {name} for {len(pairs)} pairs; encode and embed give one for each")
        if values.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {values.dtype}; a cache keeps {', '.join(DTYPES)}: convert it in encode or embed")
        bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
        if bad.any():
            first = pairs[int(bad.nonzero()[0])].name
            raise ValueError(f"NaN or infinite {name} of {int(bad.sum())} pairs, the first {first!r}; compute in float32 or bfloat16")
    return {name: values.cpu() for name, values in rows.items()}


def _name_skipped(folder: Path, skipped: list[Skipped]) -> str:
    """Writes skipped.txt; returns what to say of it."""
    _write(folder / "skipped.txt", "".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in skipped).encode())
    first = ", ".join(f"{name} ({reason})" for name, reason in skipped[:3])
    return f"the first: {first}; all are named in {folder / 'skipped.txt'}"


def is_cache(folder: str | Path) -> bool:
    """Whether the folder is a cache of pairs, finished or not."""
    return (Path(folder) / MANIFEST).is_file()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {**manifest, "identity": dict(manifest["identity"]), "source": str(manifest["source"])}
    except FileNotFoundError as error:
        raise ValueError(f"{folder.absolute()} is no cache of pairs: it holds no {MANIFEST}; make one with cache_pairs") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); delete {folder} and cache again") from error


def _claim(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a cache that may be gone on with; a new one where the folder is absent or empty.

    Raises:
        ValueError: the folder holds another cache, or no cache but something.
    """
    if not is_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted(path.name for path in folder.iterdir()):
            raise ValueError(f"{folder} holds {others[0]!r} and no {MANIFEST}: it is no cache of pairs; pass a new or an empty folder")
        _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        return manifest
    theirs = _read_manifest(folder)
    for key, ours in manifest["identity"].items():
        if theirs["identity"].get(key) != ours:
            of = f" ({theirs['source']}; here {manifest['source']})" if key == "pairs_sha256" else ""
            raise ValueError(
                f"{folder} is the cache of another {key}: {theirs['identity'].get(key)!r}, here {ours!r}{of}; "
                "pass another folder, or delete it to cache anew"
            )
    return theirs


def _left_out(folder: Path, shards: range) -> dict[int, list[Skipped]]:
    """Of each shard that is there, what of its stretch is not in it.

    Raises:
        ValueError: one is damaged.
    """
    return {k: _Shard(_shard(folder, k)).skipped for k in shards if _shard(folder, k).exists()}


def _is_finished(folder: Path, manifest: dict[str, Any], shards: range) -> bool:
    return "counts" in manifest and len(_left_out(folder, shards)) == len(shards) and (folder / NULL).is_file()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes this cache, and keeps others waiting; a process that dies lets go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which makes {folder}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
    """Turns a source into a cache, or goes on with one that was begun; returns its folder.

    Pictures are read by workers and encoded here; other processes that ask for the same cache wait. The result is the same for any
    number of workers, and to rounding for any batch size. Pictures that cannot be read are left out, counted in a warning, and named
    in `skipped.txt`.

    Args:
        source: Of `read_pairs`.
        out: The cache's folder: new, empty, or of the same source, model and sizes.
        encode: Pictures uint8 (b, height, width, 3) → latents (b, *sample_shape), in the dtype to be kept.
        embed: b captions → named tables (b, *any), in the dtype to be kept; of [""] → the null condition's.
        model: A fingerprint of what encodes and embeds.
        height, width: Of the pictures, in pixels.
        batch_size: Pictures encoded at once.
        shard_size: Pairs of the source a shard; a shard is held in memory until it is written.
        workers: Processes that read pictures; 0 reads them here.
        max_broken: The share of pictures that may be broken.

    Raises:
        ValueError: the folder holds something else, a shard is damaged, too many pictures are broken, no row or a NaN for a pair.
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
    if is_cache(folder) and _is_finished(folder, _claim(folder, manifest), shards):  # it may lie where nobody writes
        return folder
    with _alone(folder):
        for partial in folder.glob(".*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        manifest = _claim(folder, manifest)
        if not _is_finished(folder, manifest, shards):
            _fill(source, folder, manifest, encode, embed, batch_size, workers, max_broken)
    return folder


def _fill(
    source: Source,
    folder: Path,
    manifest: dict[str, Any],
    encode: Encode,
    embed: Embed,
    batch_size: int,
    workers: int,
    max_broken: float,
) -> None:
    """Makes the shards that are missing, and the manifest whole; as `cache_pairs`."""
    n, shard_size = len(source.pairs), manifest["identity"]["shard_size"]
    shards = range(math.ceil(n / shard_size))
    skipped = _left_out(folder, shards)
    todo = {k: source.pairs[k * shard_size : (k + 1) * shard_size] for k in shards if k not in skipped}
    batches = {k: [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)] for k, stretch in todo.items()}
    in_order = [batch for of_shard in batches.values() for batch in of_shard]
    # torchrl sets the start method to spawn, by which every worker imports the user's script anew; all that these do is read pictures.
    context = "fork" if workers and sys.platform == "linux" else None
    pictures_of = _Pictures(manifest["identity"]["height"], manifest["identity"]["width"])
    read = iter(DataLoader(pictures_of, batch_sampler=in_order, num_workers=workers, collate_fn=list, multiprocessing_context=context))
    done = n - sum(map(len, todo.values()))
    with torch.no_grad(), tqdm(total=n, initial=done, desc=f"cache {folder.name}", unit=" pairs") as bar:
        for k, of_shard in batches.items():
            rows, captions, skipped[k] = [], [], []
            for batch in of_shard:
                pairs, pictures = [], []
                for pair, picture in zip(batch, next(read), strict=True):
                    if isinstance(picture, str):
                        skipped[k].append(Skipped(pair.name, picture))
                    else:
                        pairs.append(pair)
                        pictures.append(picture)
                if pairs:
                    rows.append(_rows(encode, embed, pictures, pairs))
                    captions += [pair.caption for pair in pairs]
                bar.update(len(batch))
            _write_shard(_shard(folder, k), rows, captions, skipped[k])
            _check_broken(source, folder, skipped, max_broken)
        _check_broken(source, folder, skipped, max_broken)
        _write_shard(folder / NULL, [_rows(encode, embed, [], [Pair("the empty caption", "", "", 0, -1)])], [""], [])
    missed = [*source.skipped, *(each for k in shards for each in skipped[k])]
    named = _name_skipped(folder, missed)
    counts = [len(_Shard(_shard(folder, k))) for k in shards]
    _write(folder / MANIFEST, json.dumps({**manifest, "counts": counts, "skipped": len(missed)}, indent=1).encode())
    if missed:
        broken = len(missed) - len(source.skipped)
        warnings.warn(
            f"{source.path}: {sum(counts)} pairs kept, {len(missed)} left out, {broken} for broken pictures; {named}", stacklevel=3
        )


def _check_broken(source: Source, folder: Path, skipped: dict[int, list[Skipped]], max_broken: float) -> None:
    broken, n = [each for k in sorted(skipped) for each in skipped[k]], len(source.pairs)
    if len(broken) > max_broken * n or len(broken) == n:
        raise ValueError(
            f"{source.path}: of {n} pictures {len(broken)} so far cannot be read, more than max_broken={max_broken} of cache_pairs allows; "
            f"{_name_skipped(folder, broken)}. Mend or remove them, delete {folder}, and run it again"
        )


class Pairs:
    """A cache of pairs, memory-mapped. Ids are 0 … len − 1; the id len is the null condition, which has no picture.

    Args:
        folder: Of `cache_pairs`.
        model: The fingerprint that it must have; None takes any.
        held_out: Share of the pairs that `draw` never gives, by a permutation fixed by `seed`.
        seed: Of that permutation.

    Raises:
        ValueError: no cache, an unfinished one, another model's, a damaged shard, or no pair left to train on.
    """

    def __init__(self, folder: str | Path, model: str | None = None, held_out: float = 0.05, seed: int = 0) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        if model not in (None, manifest["identity"].get("model")):
            raise ValueError(
                f"{folder} holds the latents and embeddings of the model {manifest['identity'].get('model')!r}, here {model!r}; "
                "cache the pairs anew into another folder"
            )
        if "counts" not in manifest:
            raise ValueError(f"the cache {folder} is not finished ({manifest['source']}); run its caching again, which goes on")
        paths = [_shard(self.folder, k) for k in range(len(manifest["counts"]))]
        self._shards = [_Shard(path) for path in (*paths, self.folder / NULL)]
        for path, shard, count in zip((*paths, self.folder / NULL), self._shards, (*manifest["counts"], 1), strict=True):
            if any(len(tensor) != count for name, tensor in shard.tensors.items() if name != "captions") or len(shard) != count:
                raise ValueError(f"{path} does not hold the {count} rows that {MANIFEST} says; delete it and cache again")
        self._ends = np.cumsum([*manifest["counts"], 1]).tolist()
        self._n: int = self._ends[-2]
        some = next(shard for shard in self._shards if len(shard)).tensors
        self.sample_shape = tuple(some["latents"].shape[1:])
        self.tables = sorted(name.removeprefix("embeddings.") for name in some if name.startswith("embeddings."))
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out}: need a share of the pairs, from 0 to below 1")
        m = round(held_out * self._n)
        if m == self._n:
            raise ValueError(f"held_out={held_out} of {self._n} pairs leaves none to train on; pass a smaller share")
        order = torch.randperm(self._n, generator=torch.Generator().manual_seed(seed))
        self._training, self._held_out = order[: self._n - m], order[self._n - m :]

    def __len__(self) -> int:
        return self._n

    def _find(self, ids: Tensor, end: int) -> list[tuple[_Shard, int]]:
        numbers: list[int] = ids.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < end:
            raise ValueError(f"ids from {min(numbers)} to {max(numbers)}: {self.folder} has 0 to {end - 1} here")
        found = [(bisect_right(self._ends, i), i) for i in numbers]
        return [(self._shards[k], i - (self._ends[k - 1] if k else 0)) for k, i in found]

    @staticmethod
    def _rows(name: str, found: list[tuple[_Shard, int]]) -> Tensor:
        for shard, row in found:
            shard.prefetch(name, row)
        return torch.stack([shard.tensors[name][row] for shard, row in found])

    def latents(self, ids: Tensor) -> Tensor:
        """(n, *sample_shape) of ids (n,), on the CPU, as they are kept.

        Raises:
            ValueError: an id outside 0 … len − 1.
        """
        return self._rows("latents", self._find(ids, self._n))

    def embeddings(self, ids: Tensor) -> dict[str, Tensor]:
        """The tables' rows (n, *any) of ids (n,), on the CPU, as they are kept.

        Raises:
            ValueError: an id outside 0 … len; len is the null condition.
        """
        found = self._find(ids, self._n + 1)
        return {name: self._rows(f"embeddings.{name}", found) for name in self.tables}

    def captions(self, ids: Tensor) -> list[str]:
        """The texts of ids (n,); "" of the null condition.

        Raises:
            ValueError: an id outside 0 … len.
        """
        texts = []
        for shard, row in self._find(ids, self._n + 1):
            ends = shard.tensors["captions.ends"]
            start, end = int(ends[row - 1]) if row else 0, int(ends[row])
            texts.append(shard.tensors["captions"][start:end].numpy().tobytes().decode())
        return texts

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n training pairs with replacement: x_0 (n, *sample_shape) float32 and ids (n,) int64, on the CPU.

        The generator, of any device, is the position: its state restored, the same pairs follow.
        """
        ids = self.draw_ids(n, generator)
        return self.latents(ids).float(), ids

    def draw_ids(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The ids (n,) of `draw` alone."""
        device = "cpu" if generator is None else generator.device
        return self._training[torch.randint(len(self._training), (n,), generator=generator, device=device).cpu()]

    def reference(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """The first n training pairs, or held-out ones, of the fixed permutation; fewer where there are not so many. As `draw`.

        Raises:
            NoDataError: none was held out.
        """
        ids = (self._held_out if held_out else self._training)[:n]
        if not len(ids):
            raise NoDataError(f"no pair of {self.folder} is held out; open it with held_out above 0, and n ≥ 1")
        return self.latents(ids).float(), ids
