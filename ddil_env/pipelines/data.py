"""The user's own pictures for a pipeline's expert: the flags that name them, and the cache of latents and embeddings made of them.

--data ./coco                           cached in ./coco.pairs, by the pipeline's own VAE and text encoders
--data ./coco.pairs                     a cache that exists already: no picture is read
--data 'x/{000..099}.tar' --env.data_cache ./x.pairs
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddil_env.data.cache import Embed, Encode, cache_pairs
from ddil_env.data.pairs import Pairs
from ddil_env.data.shards import MANIFEST, is_cache
from ddil_env.data.sources import Source
from ddil_env.pipelines.prompts import read_prompts

MAGIC = frozenset("*?[{")  # characters of a glob, or of a range


@dataclass(frozen=True)
class OwnData:
    """The settings of the user's data. Nothing is read until `open`.

    Attributes:
        data: What `read_pairs` can read, or a cache; None if there are no data.
        images: COCO's folder of pictures, if it is not beside the captions.
        data_cache: Folder of the cache; default: the name of the data with .pairs at its end, beside them.
        held_out: Share of the pictures that is held out of training, for evaluation; default as in `Pairs`.
        workers: Number of processes that read pictures.

    Raises:
        ValueError: images or data_cache without data of pictures, or a pattern of several files without data_cache.
    """

    data: str | None = None
    images: str | None = None
    data_cache: str | None = None
    held_out: float | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        settings = (("images", self.images), ("data_cache", self.data_cache))
        unused = " and ".join(f"{name}={value!r}" for name, value in settings if value is not None)
        if unused and self.data is None:
            raise ValueError(f"{unused}: these belong to data of pictures, and data=None is not given; leave them out, or pass data")
        if unused and is_cache(self.path):
            raise ValueError(f"{unused}: these belong to data of pictures, and data={self.data!r} is a cache of them; leave them out")
        if self.data is not None and self.data_cache is None and MAGIC & set(self.data) and not self.path.exists():
            raise ValueError(f"data={self.data!r} matches several files; set --env.data_cache, the folder of the cache")

    @property
    def path(self) -> Path:
        """The absolute path of the data; the working directory if there are none."""
        return Path(os.path.abspath(Path(self.data or "").expanduser()))

    @property
    def folder(self) -> Path:
        """The folder of the cache."""
        if is_cache(self.path):
            return self.path
        return self.path.with_name(f"{self.path.name}.pairs") if self.data_cache is None else Path(self.data_cache).expanduser()

    def texts(self, prompts: str | list[str] | None) -> tuple[str, ...]:
        """Reads the prompts of an expert without data; empty with data, whose captions are the prompts.

        Raises:
            ValueError: both data and prompts are given, or what `read_prompts` refuses.
        """
        if self.data is None:
            return read_prompts(prompts)
        if prompts is not None:
            given = repr(prompts) if isinstance(prompts, str) else f"a list of {len(prompts)}"
            raise ValueError(f"data={self.data!r} and prompts={given}: the captions of the data are the prompts; leave one of them out")
        return ()

    def open(self, read: Callable[[str, str | None], Source], encode: Encode, embed: Embed, model: str, height: int, width: int) -> Pairs:
        """Opens the pairs, after caching them if there is no cache yet.

        Args:
            read: (data, images) → their listing.
            encode, embed, model, height, width: As in `cache_pairs`.

        Raises:
            ValueError: what `read`, `cache_pairs` and `Pairs` refuse.
        """
        if not is_cache(self.path):
            if any(self.path.glob("pairs-*.safetensors")):
                raise ValueError(f"{self.path} has the shards of a cache and no {MANIFEST}; fetch that too, or cache the pictures again")
            try:
                source = read(str(self.data), self.images)
            except ValueError as error:
                raise ValueError(f"{error}{self._where_moved()}") from error
            workers = min(self.workers, os.cpu_count() or 1)
            cache_pairs(source, self.folder, encode, embed, model=model, height=height, width=width, workers=workers)
        return Pairs(self.folder, model, self.held_out)

    def _where_moved(self) -> str:
        """What an error adds where a path does not exist: that it may have been moved, and where the new one belongs."""
        settings = (("data", self.data), ("images", self.images))
        gone = [name for name, value in settings if value is not None and not Path(value).expanduser().exists()]
        if not gone:
            return ""
        cached = f". Its cache is there: --data {self.folder}" if gone[0] == "data" and is_cache(self.folder) else ""
        names = " and ".join(f"env.{name}" for name in gone)
        return f"{cached}. If a run began before it was moved, write the new path as {names} into the run's config.yaml, and resume it"
