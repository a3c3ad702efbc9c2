"""Lists pairs of a picture and a caption where people keep them. Pictures are not read: a pair says where the bytes of its picture lie.

    pictures/cat.jpg + pictures/cat.txt              a folder, and the folders in it
    metadata.jsonl of {"file_name", "text"}          beside its pictures, as the datasets library's imagefolder has it
    coco/annotations/captions_train2017.json         COCO, the first caption of each picture
    shards/{00000..00099}.tar, shards/*.tar          webdataset: key.jpg with key.txt, or key.json of {"caption"}

Pairs are ordered by name, by image id, or as they lie in the shards, so that the order is the same on every machine. Whatever is in a
folder is listed as a pair, or named among what is left out, or the folder is refused since it is not clear which of its files are the data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ddil_env.data.captions import read_caption, read_json
from ddil_env.data.coco import choose_annotations, find_annotations, list_coco
from ddil_env.data.files import FileTree, Pair, Skipped, is_picture, make_pair, shown
from ddil_env.data.webdataset import expand, list_webdataset

__all__ = ["Pair", "Skipped", "Source", "read_pairs", "read_pictures"]

METADATA = "metadata.jsonl"
BESIDE_SHARDS = re.compile(r"(.*/)?\d+(\.parquet|_stats\.json)")  # as img2dataset writes them: nothing that the shards have not
NO_CAPTION = "no caption: neither a .txt of its name nor a metadata.jsonl has one"


@dataclass(frozen=True)
class Source:
    """The listing of a source; a pair takes some 500 bytes of memory.

    Attributes:
        kind: folder, metadata.jsonl, COCO, webdataset or pictures.
        path: The path that the user gave.
        pairs: The pairs that have a picture and a caption, in order.
        skipped: What else there is.
    """

    kind: str
    path: str
    pairs: list[Pair]
    skipped: list[Skipped]


def read_pairs(path: str | Path, images: str | Path | None = None) -> Source:
    """Lists the pairs of a source; its path shows of which kind it is.

    Args:
        path: A folder, a COCO captions file (.json), a metadata.jsonl, or shards (.tar; a glob or a range in braces).
        images: COCO's folder of pictures, if it is not beside the captions.

    Raises:
        ValueError: the path is none of these, a folder is of several kinds, a file of the source is damaged, or the source has no pair.
    """
    root = Path(path).expanduser()
    found: Iterable[Pair | Skipped]
    if root.is_dir():
        kind, found = _list_folder(FileTree(root), images)
    elif ".tar" in root.name:
        kind, found = "webdataset", list_webdataset(expand(str(root)))
    elif root.suffix.lower() == ".json":
        kind, found = "COCO", list_coco(root, images)
    elif root.suffix.lower() == ".jsonl":
        kind, found = METADATA, _list_metadata(root)
    else:
        raise ValueError(
            f"{str(path)!r} is no source of pictures and captions (looked for {root.absolute()}): pass a folder of pictures with "
            "captions beside them (a.jpg, a.txt) or in metadata.jsonl, COCO's folder or its .json, or shards such as 'x/{000..099}.tar'"
        )
    pairs, skipped = _divide(found)
    if not pairs:
        left_out = f"; left out: {len(skipped)}, the first {skipped[0].name} ({skipped[0].reason})" if skipped else ""
        raise ValueError(
            f"no pair of a picture and a caption in {str(path)!r}, read as {kind}{left_out}; "
            "put each caption beside its picture (a.jpg, a.txt), or pass another path"
        )
    return Source(kind, str(path), pairs, skipped)


def read_pictures(path: str | Path, known: tuple[str, ...] = ()) -> Source:
    """Lists the pictures of a folder and its subfolders; the caption of one is the name of its first subfolder, its class, or "".

    Args:
        path: The folder. Captions in it are not read.
        known: Names of files in it that the caller reads.

    Raises:
        ValueError: the folder does not exist, or has no picture.
    """
    root = Path(path).expanduser()
    tree = FileTree(root)
    names = [name for name in tree.files if is_picture(name)]
    captions = {os.path.splitext(name)[0] + ".txt" for name in names}
    for name in [name for name in tree.files if name in known or name in captions or name.rpartition("/")[2] == METADATA]:
        tree.take(name)
    listed = [make_pair(name, shown(name.rpartition("/")[0].partition("/")[0]), file) for name in names if (file := tree.take(name))]
    pairs, skipped = _divide(chain(listed, tree.left("")))
    if not pairs:
        raise ValueError(f"no picture that Pillow reads in {str(path)!r} (looked in {root.absolute()}); pass a folder of pictures")
    return Source("pictures", str(path), pairs, skipped)


def _divide(found: Iterable[Pair | Skipped]) -> tuple[list[Pair], list[Skipped]]:
    pairs: list[Pair] = []
    skipped: list[Skipped] = []
    for each in found:
        if isinstance(each, Skipped):
            skipped.append(each)
        else:
            pairs.append(each)
    return pairs, skipped


def _list_folder(tree: FileTree, images: str | Path | None) -> tuple[str, Iterator[Pair | Skipped]]:
    """The kind of a folder, and its pairs and all else that is in it.

    Raises:
        ValueError: the folder is of several kinds.
    """
    annotations = find_annotations(tree)
    shards = [name for name in tree.files if name.lower().endswith(".tar")]
    listings = [name for name in tree.files if name.rpartition("/")[2] == METADATA]
    texts = {os.path.splitext(name)[0]: name for name in tree.files if name.lower().endswith(".txt")}
    captioned = [name for name in tree.files if is_picture(name) and os.path.splitext(name)[0] in texts]
    kinds = {"COCO's captions": annotations, "shards": shards, METADATA: listings, "pictures with a .txt beside them": captioned}
    present = [f"{kind} ({shown(names[0])})" for kind, names in kinds.items() if names]
    if len(present) > 1 and (annotations or shards):
        raise ValueError(
            f"{tree.root} holds {' and '.join(present)}, and it is not clear which are the data: pass the path of the one "
            "(a subfolder, a .json, or 'x/*.tar'), or move the other out of the folder"
        )
    if annotations:
        path = choose_annotations(tree, annotations)
        return "COCO", chain(list_coco(path, images, tree), _left(tree, f"{path.name} does not name it"))
    if shards:
        files = [file for name in shards if (file := tree.take(name))]
        for name in [name for name in tree.files if BESIDE_SHARDS.fullmatch(name)]:
            tree.take(name)
        return "webdataset", chain(list_webdataset(files), _left(tree, "a picture beside shards"))
    listed = chain.from_iterable(_list_metadata(file, tree) for name in listings if (file := tree.take(name)))
    kind = " and ".join(kind for kind, names in ((METADATA, listings), ("folder", captioned)) if names) or "folder"
    return kind, chain(listed, _list_captioned(tree, texts), _left(tree, NO_CAPTION))


def _left(tree: FileTree, reason_of_pictures: str) -> Iterator[Skipped]:
    yield from tree.left(reason_of_pictures)  # looked at when all that came before was taken


def _list_captioned(tree: FileTree, texts: dict[str, str]) -> Iterator[Pair | Skipped]:
    """Pictures with their captions; `texts` has the name of the .txt of each stem."""
    taken = set()
    for name in [name for name in tree.files if is_picture(name)]:
        path, text = tree.take(name), texts.get(os.path.splitext(name)[0])
        assert path is not None
        if text is None:
            yield Skipped(shown(name), NO_CAPTION)
            continue
        taken.add(text)
        try:
            yield make_pair(name, read_caption((tree.root / text).read_text(encoding="utf-8-sig")), path)
        except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            yield Skipped(shown(name), f"no caption: {shown(text)}: {reason}")
    for text in taken:
        tree.take(text)


def _list_metadata(listing: Path, tree: FileTree | None = None) -> Iterator[Pair | Skipped]:
    root, number = listing.parent if tree is None else tree.root, 0
    try:
        for number, line in enumerate(listing.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            row = read_json(line)
            path = listing.parent / row["file_name"]
            name = Path(os.path.relpath(path, root)).as_posix()
            if tree is not None:
                tree.take(name)
            try:
                if "text" not in row:
                    raise ValueError(f"there is no text, but {', '.join(row)}")
                yield make_pair(name, read_caption(row["text"]), path)
            except ValueError as error:
                yield Skipped(shown(name), f"no caption: {listing.name}, line {number}: {error}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{listing}, line {number}: {error!r}; a line is {{"file_name": "a.jpg", "text": "a caption"}}') from error
