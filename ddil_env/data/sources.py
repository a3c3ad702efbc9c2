"""Where pairs of a picture and a caption come from. A source is listed, not read: of a pair, where its picture's bytes lie.

    pictures/cat.jpg + pictures/cat.txt              a folder, and the folders in it
    metadata.jsonl of {"file_name", "text"}          beside its pictures, as the datasets library's imagefolder has it
    coco/annotations/captions_train2017.json         COCO, the first caption of each picture
    shards/{00000..00099}.tar, shards/*.tar          webdataset: key.jpg with key.txt, or key.json of {"caption"}

The order is that of names, image ids, or of the shards and what is in them: the same on every machine.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

__all__ = ["Pair", "Source", "read_pairs", "read_pictures"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_CAPTION = "no caption (none there, an empty one, or not UTF-8)"


class Pair(NamedTuple):
    """A caption, and the bytes [offset, offset + size) of a file, which are its picture; size −1 if there is no such file."""

    name: str
    caption: str
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Skipped(NamedTuple):
    """What was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A listed source, some 500 bytes of memory a pair.

    Attributes:
        kind: folder, metadata.jsonl, COCO or webdataset.
        path: What the user named.
        pairs: Those with a picture and a caption, in order.
        skipped: The others.
    """

    kind: str
    path: str
    pairs: list[Pair]
    skipped: list[Skipped]

    @cached_property
    def sha256(self) -> str:
        """Of names, captions and the pictures' sizes in bytes; a folder that is moved keeps it."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps([pair.name, pair.caption, pair.size]).encode())
        return digest.hexdigest()


def read_pairs(path: str | Path, images: str | Path | None = None) -> Source:
    """Lists the pairs of a source, of the kind that its path shows.

    Args:
        path: A folder, a COCO captions file (.json), a metadata.jsonl, or shards (.tar; a glob or a range in braces).
        images: COCO's folder of pictures, where it is not beside the captions.

    Raises:
        ValueError: the path is none of these, what it names is damaged, or no pair is in it.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        listings = sorted(given.glob("metadata.jsonl")) or sorted(given.glob("*/metadata.jsonl"))
        if listings:
            kind, found = "metadata.jsonl", _listed(given, listings)
        elif annotations := _coco_annotations(given):
            kind, found = "COCO", _coco(annotations, images)
        elif shards := sorted(given.glob("*.tar")):
            kind, found = "webdataset", _webdataset(shards)
        else:
            kind, found = "folder", _folder(given)
    elif ".tar" in given.name:
        kind, found = "webdataset", _webdataset(_expand(str(given)))
    elif given.suffix == ".json":
        kind, found = "COCO", _coco(given, images)
    elif given.suffix == ".jsonl":
        kind, found = "metadata.jsonl", _listed(given.parent, [given])
    else:
        raise ValueError(
            f"{str(path)!r} is no source of pictures and captions (looked for {given.absolute()}): pass a folder of pictures with "
            "captions beside them (a.jpg, a.txt) or in metadata.jsonl, COCO's folder or its .json, or shards such as 'x/{000..099}.tar'"
        )
    pairs: list[Pair] = []
    skipped: list[Skipped] = []
    for each in found:
        if isinstance(each, Skipped):
            skipped.append(each)
        elif caption := " ".join(each.caption.split()):
            pairs.append(each._replace(caption=caption))
        else:
            skipped.append(Skipped(each.name, NO_CAPTION))
    if not pairs:
        left_out = f"; left out: {len(skipped)}, the first {skipped[0].name} ({skipped[0].reason})" if skipped else ""
        raise ValueError(
            f"no pair of a picture ({', '.join(SUFFIXES)}) and a caption in {str(path)!r}, read as {kind}{left_out}; "
            "put each caption beside its picture (a.jpg, a.txt), or pass another path"
        )
    return Source(kind, str(path), pairs, skipped)


def read_pictures(path: str | Path) -> Source:
    """Lists the pictures of a folder and the folders in it; a caption is the name of the folder that is one's class, or "".

    Raises:
        ValueError: no folder, or no picture in it.
    """
    root = Path(path).expanduser()
    found = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES}
    if not found:
        raise ValueError(f"no picture ({', '.join(SUFFIXES)}) in {str(path)!r} (looked in {root.absolute()}); pass a folder of pictures")
    pairs = [_pair(name, name.rpartition("/")[0].partition("/")[0], file) for name, file in sorted(found.items())]
    return Source("pictures", str(path), pairs, [])


def _pair(name: str, caption: str, path: Path) -> Pair:
    try:
        return Pair(name, caption, str(path), 0, path.stat().st_size)
    except OSError:  # an absent picture is skipped and named when it is read
        return Pair(name, caption, str(path), 0, -1)


def _folder(root: Path) -> Iterator[Pair | Skipped]:
    pictures = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES}
    for name, path in sorted(pictures.items()):
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            caption = ""
        yield _pair(name, caption, path)


def _listed(root: Path, listings: list[Path]) -> Iterator[Pair | Skipped]:
    for listing in listings:
        number = 0
        try:
            for number, line in enumerate(listing.read_text(encoding="utf-8-sig").split("\n"), 1):  # noqa: B007  # the error's
                if line.strip():
                    row = json.loads(line)
                    path = listing.parent / row["file_name"]
                    yield _pair(Path(os.path.relpath(path, root)).as_posix(), str(row.get("text") or ""), path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{listing}, line {number}: {error!r}; a line is {{"file_name": "a.jpg", "text": "a caption"}}') from error


def _coco_annotations(root: Path) -> Path | None:
    """COCO's captions in its folder: those of training where there are several."""
    found = [*root.glob("captions_*.json"), *root.glob("annotations/captions_*.json")]
    training = [path for path in found if "train" in path.name] or found
    if len(training) > 1:
        raise ValueError(f"{root} holds several captions files ({', '.join(sorted(p.name for p in training))}); pass the path of one")
    return training[0] if training else None


def _coco(annotations: Path, images: str | Path | None) -> Iterator[Pair | Skipped]:
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions = dict.fromkeys(sorted(files), "")
        for annotation in sorted(content["annotations"], key=lambda a: (a["image_id"], a["id"])):
            captions[annotation["image_id"]] = captions[annotation["image_id"]] or annotation["caption"].strip()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} is no COCO captions file ({error!r}); it holds images with id and file_name, "
            "and annotations with image_id, id and caption"
        ) from error
    split = annotations.stem.removeprefix("captions_")
    parents = (annotations.absolute().parent, annotations.absolute().parent.parent)
    beside = [parent / name for parent in parents for name in (split, f"images/{split}", "images", ".")]
    folders = beside if images is None else [Path(images).expanduser()]
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in list(files.values())[:100])), None)
    if files and folder is None:
        raise ValueError(
            f"{annotations} names pictures such as {next(iter(files.values()))}, and none of the first 100 is in "
            f"{', '.join(map(str, folders))}; pass their folder as images"
        )
    for i, caption in captions.items():
        yield _pair(files[i], caption, (folder or annotations.parent) / files[i])


def _expand(pattern: str) -> list[Path]:
    """The files of a path, of a glob (those that are there, sorted), or of ranges in braces (all, in order)."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = match.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        return [path for number in numbers for path in _expand(pattern[: match.start()] + number + pattern[match.end() :])]
    found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    return list(map(Path, found))


def _webdataset(shards: list[Path]) -> Iterator[Pair | Skipped]:
    for shard in shards:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:  # not compressed: a picture's bytes are read from their place in the file
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    key, _, suffix = base.partition(".")
                    if member.isreg() and key:
                        samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[f".{suffix.lower()}"] = member
                with shard.open("rb") as file:  # tarfile takes a damaged header for the end, which is zeros or nothing
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
                for key, files in samples.items():
                    picture = next((files[suffix] for suffix in SUFFIXES if suffix in files), None)
                    if picture is None:
                        yield Skipped(f"{shard.name}/{key}", "no picture")
                    else:
                        yield Pair(f"{shard.name}/{key}", _caption(tar, files), str(shard), picture.offset_data, picture.size)
        except (OSError, tarfile.TarError) as error:
            raise ValueError(
                f"cannot read the shard {shard} ({error}); shards are uncompressed .tar files: unpack or fetch it again, or leave it out"
            ) from error


def _caption(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> str:
    for suffix in (".txt", ".json"):
        content = tar.extractfile(files[suffix]) if suffix in files else None
        if content is not None:
            try:
                text = content.read().decode("utf-8-sig")
                return text if suffix == ".txt" else str(json.loads(text).get("caption") or "")
            except (ValueError, AttributeError):
                return ""
    return ""
