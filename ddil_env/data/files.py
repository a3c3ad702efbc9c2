"""The files of a source: pairs of a picture and a caption, and the walk of a folder in which nothing is passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

# Pillow reads these by running a program, by a handler that somebody else brings, or not at all.
NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


@cache
def formats() -> tuple[str, ...]:
    """The formats in which pictures are read: all of Pillow's that it tells by their first bytes, but those of `NOT_READ`."""
    Image.init()
    return tuple(name for name, (_, accept) in Image.OPEN.items() if accept is not None and name not in NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of files of these formats, in lower case."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


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
    """What was left out, and the reason."""

    name: str
    reason: str


def shown(name: str) -> str:
    """A name that can be printed and written: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_picture(name: str) -> bool:
    """Whether a file's suffix is that of a picture that is read."""
    return os.path.splitext(name)[1].lower() in suffixes()


def make_pair(name: str, caption: str, path: Path) -> Pair | Skipped:
    """Makes a pair of a whole file; leaves out what is there and no regular file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # an absent picture is left out and named when it is read
        return Pair(shown(name), caption, str(path), 0, -1)
    if not stat.S_ISREG(status.st_mode):
        return Skipped(shown(name), "no regular file")
    return Pair(shown(name), caption, str(path), 0, status.st_size)


class FileTree:
    """The files of a folder and its subfolders, and which of them have been read: `take` marks one as read, `left` lists the others.

    Symlinks are followed, but not into a folder that holds the link. Hidden files (with a name that begins with a dot) are skipped.

    Args:
        root: The folder.

    Attributes:
        files: Name relative to the folder, with "/" → path, of each file that has not been taken, in order of name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._skipped: list[Skipped] = []
        self._read: set[str] = set()  # the folders from which a file was taken
        found: dict[str, Path] = {}
        folders: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", ())]
        while folders:
            folder, prefix, above = folders.pop()
            real = os.path.realpath(folder)
            if real in above:
                self._skipped.append(Skipped(shown(prefix), "a link to a folder that it lies in"))
                continue
            try:
                names = os.listdir(folder)
            except OSError as error:
                self._skipped.append(Skipped(shown(prefix or "."), f"a folder that cannot be listed ({error.strerror})"))
                continue
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith("."):
                    self._skipped.append(Skipped(shown(prefix + name), "hidden"))
                elif os.path.isdir(path):
                    folders.append((path, f"{prefix}{name}/", (*above, real)))
                else:
                    found[prefix + name] = Path(path)
        self.files = dict(sorted(found.items()))

    def named(self, path: Path) -> str:
        """The name of a path, relative to the folder."""
        return Path(os.path.relpath(path, self.root)).as_posix()

    def take(self, name: str) -> Path | None:
        """Takes a file, and returns its path; None if there is none or it was taken already."""
        path = self.files.pop(name, None)
        if path is not None:
            self._read.update(map(str, PurePosixPath(name).parents))
        return path

    def left(self, reason_of_pictures: str) -> Iterator[Skipped]:
        """Yields what has not been taken: file by file, or as one folder where nothing in it was taken."""
        yield from sorted(self._skipped)
        whole: Counter[str] = Counter()
        for name in self.files:
            parents = [str(parent) for parent in PurePosixPath(name).parents][-2::-1]  # from the outermost on, without "."
            unread = next((parent for parent in parents if parent not in self._read), None)
            if unread is None:
                yield Skipped(shown(name), _reason(name, reason_of_pictures))
            else:
                whole[unread] += 1
        for name, n in whole.items():
            yield Skipped(f"{shown(name)}/", f"a folder of {n} files, of which none is read")


def _reason(name: str, reason_of_pictures: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".txt":
        return "a text without a picture of its name, or with one that has a caption elsewhere"
    return reason_of_pictures if suffix in suffixes() else "neither a picture of a format that Pillow reads here nor a caption"
