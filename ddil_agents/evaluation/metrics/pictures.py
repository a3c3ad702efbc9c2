"""Shared by all picture metrics: reading, checking and resizing pictures, and loading published weights.

Pictures are uint8 (n, height, width, 3), as `Expert.decode` returns them. Results record `RESIZE`, because the filter alone changes FID.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn

from ddil_env.data.files import Pair, formats, is_picture
from ddil_env.data.hashes import Hashes
from ddil_env.data.pictures import on_white
from ddil_env.weights import read_tensors

HASH_THREADS = 4
ROTATED = (
    "pictures to compare with are read as they are stored, as published FIDs are, and at least one has a rotation in its EXIF data, which "
    "training data follow; if they are your own, rotate the files first"
)
RESIZE = "centre_crop_lanczos_256"


def check_pictures(pictures: Tensor) -> None:
    """Checks that a tensor is a set of pictures.

    Raises:
        ValueError: it is not uint8 (n, height, width, 3), or n is 0.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.numel() == 0:
        got = f"{str(pictures.dtype).removeprefix('torch.')} {tuple(pictures.shape)}"
        raise ValueError(f"pictures must be uint8 (n, height, width, 3), n ≥ 1, as Expert.decode gives them; got {got}")


def _resize_one(image: Image.Image, size: int) -> Tensor:
    width, height = image.size
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)  # torchvision's center_crop rounds so too
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square))  # (size, size, 3)


def resize(pictures: Tensor, size: int = 256) -> Tensor:
    """Crops pictures (n, height, width, 3) to the middle square and resizes them with Pillow's Lanczos, to (n, size, size, 3).

    At 256 this is the protocol `RESIZE`, which DMD2's COCO evaluation uses. Squares of that size do not change.

    Raises:
        ValueError: not pictures, or size < 1.
    """
    check_pictures(pictures)
    if size < 1:
        raise ValueError(f"size={size}: need at least 1 pixel")
    return torch.stack([_resize_one(Image.fromarray(picture.numpy()), size) for picture in pictures.cpu()])


def _read_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=formats()) as image:
            if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these to white
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 1:
                warnings.warn(ROTATED, stacklevel=2)
            return on_white(image)
    except Exception as error:  # Pillow's plug-ins raise all kinds of errors on a damaged file
        raise ValueError(f"cannot read image {path} ({error}); repair it, or leave it out of the paths") from error


def picture_files(folder: Path) -> list[Path]:
    """The files of a folder with a suffix of Pillow's formats, in order of name."""
    return sorted(path for path in folder.iterdir() if is_picture(path.name))


def folder_digest(folder: Path, store: Path | None = None) -> str:
    """Identifies the pictures of a folder, wherever it is: their number, and a digest of their names and contents.

    Args:
        folder: The folder.
        store: Where hashes of the files are remembered, so that a file is read again only if its size, times or inode have changed; None
            reads all files.
    """
    pairs = [Pair(path.name, "", str(path), 0, path.stat().st_size) for path in picture_files(folder)]
    hashes = Hashes(pairs, store, HASH_THREADS)
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        hashes.remember(store)
    listed = repr([(pair.name, value) for pair, value in zip(pairs, hashes.values, strict=True)])
    return f"{len(pairs)} pictures, {hashlib.sha256(listed.encode()).hexdigest()[:12]}"


def load_pictures(paths: Path | Iterable[Path], size: int = 256, batch_size: int = 64) -> Iterator[Tensor]:
    """Reads pictures, resized as by `resize`, a batch (b, size, size, 3) at a time.

    Args:
        paths: Files in order; or a folder, whose pictures are read in order of name.
        size: Side of what comes back.
        batch_size: Pictures a batch; the last may have fewer.

    Raises:
        ValueError: no pictures, or one that cannot be read. None is skipped: without it, the pictures would be another data set.
    """
    files = picture_files(paths) if isinstance(paths, Path) and paths.is_dir() else paths
    files = [files] if isinstance(files, Path) else list(files)
    if not files or size < 1 or batch_size < 1:
        raise ValueError(f"{len(files)} pictures in {paths} with size={size}, batch_size={batch_size}: need at least 1 of each")
    for start in range(0, len(files), batch_size):
        yield torch.stack([_resize_one(_read_picture(path), size) for path in files[start : start + batch_size]])


def import_optional(module: str) -> Any:
    """Imports a module of the `eval` extra.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing ({error}): pip install "ddil[eval]"') from error


def find_weights(weights_dir: Path, *names: str, cure: str) -> Path:
    """Finds a file of weights.

    Args:
        weights_dir: A folder; or the file, which is then returned.
        names: Names of the file, in order of preference; each may also end in .safetensors.
        cure: What to do if there is no such file, for the error message.

    Raises:
        ValueError: there is no such file.
    """
    if weights_dir.is_file():
        return weights_dir
    candidates = [weights_dir / name for given in names for name in (given, f"{given.rpartition('.')[0]}.safetensors")]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f"no {' or '.join(dict.fromkeys(path.name for path in candidates))} in {weights_dir}: {cure}")


def check_digest(path: Path) -> None:
    """Warns of a pickle whose SHA-256 does not begin as its name says; torch's hub names files so: NAME-6726825d.pth."""
    stated = re.search(r"-([0-9a-f]{8,64})\.pth?$", path.name)
    if stated is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[: len(stated[1])]
    if found != stated[1]:
        warnings.warn(
            f"{path} should have a SHA-256 of {stated[1]}… and has {found}…: scores named after it are those of other weights", stacklevel=2
        )


def read_pretrained(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file or of a pickle, from which torch loads tensors alone.

    Raises:
        ValueError: the file is damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged or holds more than tensors ({error}); fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is no state dict, names to tensors; fetch it again")
    return tensors


def pretrained_tensors(weights_dir: Path | None, url: str, *other_names: str) -> tuple[dict[str, Tensor], str]:
    """Reads published weights from a folder, or downloads them with torch's downloader.

    Args:
        weights_dir: A folder, a file, or None to download.
        url: Where the file is published; the name of the file is the last part.
        other_names: Other names of the same file.

    Returns:
        The tensors, and the path or name of the file, for error messages.

    Raises:
        ValueError: the file is absent, cannot be downloaded, is damaged, or holds more than tensors.
    """
    name = url.rpartition("/")[2]
    if weights_dir is not None:
        path = find_weights(weights_dir, name, *other_names, cure=f"download {url} into it")
        check_digest(path)
        return read_pretrained(path), str(path)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the downloader prints
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True, progress=False), name
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot download {name} ({error}); fetch {url} elsewhere and pass its folder as weights_dir") from error


def digest_weights(network: nn.Module) -> str:
    """Twelve hex digits of a network's weights, in whatever file they were."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def load_pretrained(module: nn.Module, weights_dir: Path | None, url: str, source: Callable[[str], str] = str) -> None:
    """Loads a published state dict into a module.

    Args:
        module: Receives the weights.
        weights_dir, url: As in `pretrained_tensors`.
        source: Maps the name of a tensor in the module to its name in the file; other tensors of the file are ignored.

    Raises:
        ValueError: as in `pretrained_tensors`, or names or shapes do not fit the module.
    """
    tensors, where = pretrained_tensors(weights_dir, url)
    try:
        module.load_state_dict({name: tensors[source(name)] for name in module.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{where} does not fit {type(module).__name__}: {error}") from error
