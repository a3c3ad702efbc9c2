"""Webdataset shards: key.jpg with key.txt, or with key.json of {"caption"}. Other files of a sample are not read."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ddil_env.data.captions import read_caption, read_json
from ddil_env.data.files import Pair, Skipped, shown, suffixes


def expand(pattern: str) -> list[Path]:
    """The files of a path, of a glob (those that exist, sorted), or of ranges in braces (all of the range, in order)."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = match.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        each = [pattern[: match.start()] + number + pattern[match.end() :] for number in numbers]
        return [path for one in each for path in expand(one) or [Path(one)]]  # one that matches nothing is an error when it is read
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder or "."):  # whose own name may have the marks of a pattern
        folder = glob.escape(folder)
    return [Path(path) for path in (sorted(glob.glob(os.path.join(folder, name))) if glob.has_magic(pattern) else [pattern])]


def list_webdataset(shards: list[Path]) -> Iterator[Pair | Skipped]:
    """Lists the pairs of shards, as they lie in them. Names are relative to the innermost folder that holds all shards.

    Raises:
        ValueError: a shard is absent, damaged or compressed.
    """
    root = os.path.commonpath([shard.parent.absolute() for shard in shards]) if shards else ""
    for shard in shards:
        prefix = shown(Path(os.path.relpath(shard, root)).as_posix())
        try:
            with tarfile.open(shard, "r:") as tar:  # uncompressed only: a picture's bytes are read from their offset in the file
                samples, skipped = _read_samples(tar, prefix)
                with shard.open("rb") as file:  # tarfile takes a damaged header for the end, which is zeros or the end of the file
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
                yield from skipped
                for key, files in samples.items():
                    yield from _list_sample(tar, f"{prefix}/{key}", files, str(shard))
        except (OSError, tarfile.TarError) as error:
            raise ValueError(
                f"cannot read the shard {shard} ({error}); shards are uncompressed .tar files: unpack or fetch it again, or leave it out"
            ) from error


Sample = dict[str, tarfile.TarInfo]  # suffix → file


def _read_samples(tar: tarfile.TarFile, prefix: str) -> tuple[dict[str, Sample], list[Skipped]]:
    """Key → files of each sample, and the members of the shard that are of none."""
    samples: dict[str, Sample] = {}
    skipped = []
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        key, _, suffix = shown(base).partition(".")
        name = f"{prefix}/{shown(member.name)}"
        if member.isdir():
            continue
        if not member.isreg() or not key:
            skipped.append(Skipped(name, "no regular file" if key else "hidden"))
            continue
        sample = samples.setdefault(f"{shown(folder)}/{key}".lstrip("/"), {})
        if f".{suffix.lower()}" in sample:
            skipped.append(Skipped(name, "in the shard more than once; the last is read"))
        sample[f".{suffix.lower()}"] = member
    return samples, skipped


def _list_sample(tar: tarfile.TarFile, name: str, files: Sample, shard: str) -> Iterator[Pair | Skipped]:
    pictures = [suffix for suffix in files if suffix in suffixes()]
    if not pictures:
        yield Skipped(name, f"no picture of a format that Pillow reads here, but {', '.join(files)}")
        return
    yield from (Skipped(name + suffix, f"a second picture of its sample; {pictures[0]} is read") for suffix in pictures[1:])
    try:
        caption = _read_caption(tar, files)
    except ValueError as error:
        yield Skipped(name, f"no caption: {error}")
    else:
        picture = files[pictures[0]]
        yield Pair(name, caption, shard, picture.offset_data, picture.size)


def _read_caption(tar: tarfile.TarFile, files: Sample) -> str:
    suffix = next((suffix for suffix in (".txt", ".json") if suffix in files), None)
    content = None if suffix is None else tar.extractfile(files[suffix])
    if content is None:
        raise ValueError("neither .txt nor .json is with it")
    text = content.read().decode("utf-8-sig")  # a UnicodeDecodeError is a ValueError
    if suffix == ".txt":
        return read_caption(text)
    values = read_json(text)
    if not isinstance(values, dict) or "caption" not in values:
        raise ValueError('its .json is not {"caption": "a text"}')
    return read_caption(values["caption"])
