"""COCO's captions files: the first caption of each picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddil_env.data.captions import read_caption, read_json
from ddil_env.data.files import FileTree, Pair, Skipped, make_pair, shown


def find_annotations(tree: FileTree) -> list[str]:
    """Names of the captions files in COCO's folder: captions_*.json, there or in annotations/."""
    names = [name for name in tree.files if name.removeprefix("annotations/").startswith("captions_") and name.endswith(".json")]
    return [name for name in names if "/" not in name.removeprefix("annotations/")]


def choose_annotations(tree: FileTree, names: list[str]) -> Path:
    """The captions file that is read: the one for training if there are several.

    Raises:
        ValueError: there are several for training.
    """
    training = [name for name in names if "train" in name] or names
    if len(training) > 1:
        files = ", ".join(sorted(name.removeprefix("annotations/") for name in training))
        raise ValueError(f"{tree.root} holds several captions files ({files}); pass the path of one")
    return tree.files[training[0]]


def list_coco(path: Path, images: str | Path | None, tree: FileTree | None = None) -> Iterator[Pair | Skipped]:
    """Lists the pairs of a captions file, in order of image ids.

    Args:
        path: The captions file.
        images: The folder of pictures, if it is not beside the captions.
        tree: The folder from which the files are taken.

    Raises:
        ValueError: the file is no COCO captions file, or its pictures are not found.
    """
    try:
        content = read_json(path.read_text(encoding="utf-8-sig"))
        files: dict[Any, str] = {}
        for image in content["images"]:
            if not isinstance(image["file_name"], str) or files.setdefault(image["id"], image["file_name"]) != image["file_name"]:
                raise ValueError(f"file_name={image['file_name']!r} of id={image['id']!r} is no text, or its id is that of another picture")
        captions: dict[Any, list[object]] = {i: [] for i in sorted(files)}
        for annotation in sorted_annotations(content):
            captions[annotation["image_id"]].append(annotation["caption"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no COCO captions file ({error!r}); pass one, which holds images with id and file_name, "
            "and annotations with image_id, id and caption"
        ) from error
    folder = _find_images(path, images, list(files.values()))
    if tree is not None:
        tree.take(tree.named(path))
    for i, texts in captions.items():
        picture = folder / files[i]
        if tree is not None:
            tree.take(tree.named(picture))
        try:
            yield make_pair(files[i], _first(texts), picture)
        except ValueError as error:
            yield Skipped(shown(files[i]), f"no caption: {error}")


def sorted_annotations(content: Any) -> list[dict[str, Any]]:
    """The annotations of a captions file, in order of image ids, then of their own."""
    return sorted(content["annotations"], key=lambda a: (a["image_id"], a["id"]))


def _first(texts: list[object]) -> str:
    """The first text that is a caption; otherwise the error of the first."""
    errors = [ValueError("no annotation is of it")]
    for text in texts:
        try:
            return read_caption(text)
        except ValueError as error:
            errors.append(error)
    raise errors[min(1, len(texts))]


def _find_images(path: Path, images: str | Path | None, names: list[str]) -> Path:
    split = path.stem.removeprefix("captions_")
    parents = (path.absolute().parent, path.absolute().parent.parent)
    usual = [parent / name for parent in parents for name in (split, f"images/{split}", "images", ".")]
    folders = usual if images is None else [Path(images).expanduser()]
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in names[:100])), None)
    if names and folder is None:
        raise ValueError(
            f"{path} names pictures such as {names[0]}, and none of the first 100 is in "
            f"{', '.join(map(str, folders))}; pass their folder as images"
        )
    return folder or path.parent
