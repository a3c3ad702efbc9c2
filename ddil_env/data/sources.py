"""Lists pairs of a picture and a caption where people keep them. Pictures are not read: a pair says where the bytes of its picture lie.

    pictures/cat.jpg + pictures/cat.txt              a folder, and the folders in it
    metadata.jsonl of {"file_name", "text"}          beside its pictures, as the datasets library's imagefolder has it
    coco/annotations/captions_train2017.json         COCO, the first caption of each picture
    shards/{00000..00099}.tar, shards/*.tar          webdataset: key.jpg with key.txt, or key.json of {"caption"}

Pairs are ordered by name, by image id, or as they lie in the shards, so that the order is the same on every machine.
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
    """A caption and its picture, which is the bytes [offset, offset + size) of a file; size −1 if the file does not exist."""

    name: str
    caption: str
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Reads the picture's bytes.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Skipped(NamedTuple):
    """A pair that was left out, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """The listing of a source; a pair takes some 500 bytes of memory.

    Attributes:
        kind: folder, metadata.jsonl, COCO, webdataset or pictures.
        path: The path that the user gave.
        pairs: The pairs that have a picture and a caption, in order.
        skipped: The others.
    """

    kind: str
    path: str
    pairs: list[Pair]
    skipped: list[Skipped]

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of names, captions and the pictures' sizes in bytes; moving the folder does not change it."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps([pair.name, pair.caption, pair.size]).encode())
        return digest.hexdigest()


def read_pairs(path: str | Path, images: str | Path | None = None) -> Source:
    """Lists the pairs of a source; its path shows of which kind it is.

    Args:
        path: A folder, a COCO captions file (.json), a metadata.jsonl, or shards (.tar; a glob or a range in braces).
        images: COCO's folder of pictures, if it is not beside the captions.

    Raises:
        ValueError: the path is none of these, a file of the source is damaged, or the source has no pair.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        listings = sorted(root.glob("metadata.jsonl")) or sorted(root.glob("*/metadata.jsonl"))
        if listings:
            kind, found = "metadata.jsonl", _list_metadata(root, listings)
        elif annotations := _find_coco_annotations(root):
            kind, found = "COCO", _list_coco(annotations, images)
        elif shards := sorted(root.glob("*.tar")):
            kind, found = "webdataset", _list_webdataset(shards)
        else:
            kind, found = "folder", _list_folder(root)
    elif ".tar" in root.name:
        kind, found = "webdataset", _list_webdataset(_expand(str(root)))
    elif root.suffix == ".json":
        kind, found = "COCO", _list_coco(root, images)
    elif root.suffix == ".jsonl":
        kind, found = "metadata.jsonl", _list_metadata(root.parent, [root])
    else:
        raise ValueError(
            f"{str(path)!r} is no source of pictures and captions (looked for {root.absolute()}): pass a folder of pictures with "
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
    """Lists the pictures of a folder and its subfolders; the caption of one is the name of its first subfolder, its class, or "".

    Raises:
        ValueError: the folder does not exist, or has no picture.
    """
    root = Path(path).expanduser()
    pictures = _find_pictures(root)
    if not pictures:
        raise ValueError(f"no picture ({', '.join(SUFFIXES)}) in {str(path)!r} (looked in {root.absolute()}); pass a folder of pictures")
    pairs = [_make_pair(name, name.rpartition("/")[0].partition("/")[0], file) for name, file in pictures.items()]
    return Source("pictures", str(path), pairs, [])


def _find_pictures(root: Path) -> dict[str, Path]:
    """The pictures of a folder and its subfolders by their names relative to it, sorted."""
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES))


def _make_pair(name: str, caption: str, path: Path) -> Pair:
    try:
        return Pair(name, caption, str(path), 0, path.stat().st_size)
    except OSError:  # an absent picture is skipped and named when it is read
        return Pair(name, caption, str(path), 0, -1)


def _list_folder(root: Path) -> Iterator[Pair | Skipped]:
    for name, path in _find_pictures(root).items():
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            caption = ""
        yield _make_pair(name, caption, path)


def _list_metadata(root: Path, listings: list[Path]) -> Iterator[Pair | Skipped]:
    for listing in listings:
        number = 0
        try:
            for number, line in enumerate(listing.read_text(encoding="utf-8-sig").split("\n"), 1):  # noqa: B007  # used in the error
                if line.strip():
                    row = json.loads(line)
                    path = listing.parent / row["file_name"]
                    yield _make_pair(Path(os.path.relpath(path, root)).as_posix(), str(row.get("text") or ""), path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{listing}, line {number}: {error!r}; a line is {{"file_name": "a.jpg", "text": "a caption"}}') from error


def _find_coco_annotations(root: Path) -> Path | None:
    """The captions file of COCO's folder: the one for training if there are several; None if there is none."""
    found = [*root.glob("captions_*.json"), *root.glob("annotations/captions_*.json")]
    training = [path for path in found if "train" in path.name] or found
    if len(training) > 1:
        raise ValueError(f"{root} holds several captions files ({', '.join(sorted(p.name for p in training))}); pass the path of one")
    return training[0] if training else None


def _list_coco(annotations: Path, images: str | Path | None) -> Iterator[Pair | Skipped]:
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions = dict.fromkeys(sorted(files), "")
        for annotation in sorted(content["annotations"], key=lambda a: (a["image_id"], a["id"])):
            captions[annotation["image_id"]] = captions[annotation["image_id"]] or annotation["caption"].strip()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} is no COCO captions file ({error!r}); pass one, which holds images with id and file_name, "
            "and annotations with image_id, id and caption"
        ) from error
    split = annotations.stem.removeprefix("captions_")
    parents = (annotations.absolute().parent, annotations.absolute().parent.parent)
    usual = [parent / name for parent in parents for name in (split, f"images/{split}", "images", ".")]
    folders = usual if images is None else [Path(images).expanduser()]
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in list(files.values())[:100])), None)
    if files and folder is None:
        raise ValueError(
            f"{annotations} names pictures such as {next(iter(files.values()))}, and none of the first 100 is in "
            f"{', '.join(map(str, folders))}; pass their folder as images"
        )
    for i, caption in captions.items():
        yield _make_pair(files[i], caption, (folder or annotations.parent) / files[i])


def _expand(pattern: str) -> list[Path]:
    """The files of a path, of a glob (those that exist, sorted), or of ranges in braces (all of the range, in order)."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = match.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        return [path for number in numbers for path in _expand(pattern[: match.start()] + number + pattern[match.end() :])]
    return [Path(path) for path in (sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern])]


def _list_webdataset(shards: list[Path]) -> Iterator[Pair | Skipped]:
    for shard in shards:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:  # uncompressed only: a picture's bytes are read from their offset in the file
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    key, _, suffix = base.partition(".")
                    if member.isreg() and key:
                        samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[f".{suffix.lower()}"] = member
                with shard.open("rb") as file:  # tarfile takes a damaged header for the end, which is zeros or the end of the file
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
                for key, files in samples.items():
                    picture = next((files[suffix] for suffix in SUFFIXES if suffix in files), None)
                    if picture is None:
                        yield Skipped(f"{shard.name}/{key}", "no picture")
                    else:
                        yield Pair(f"{shard.name}/{key}", _read_caption(tar, files), str(shard), picture.offset_data, picture.size)
        except (OSError, tarfile.TarError) as error:
            raise ValueError(
                f"cannot read the shard {shard} ({error}); shards are uncompressed .tar files: unpack or fetch it again, or leave it out"
            ) from error


def _read_caption(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> str:
    for suffix in (".txt", ".json"):
        content = tar.extractfile(files[suffix]) if suffix in files else None
        if content is not None:
            try:
                text = content.read().decode("utf-8-sig")
                return text if suffix == ".txt" else str(json.loads(text).get("caption") or "")
            except (ValueError, AttributeError):
                return ""
    return ""
