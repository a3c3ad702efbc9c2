"""The user's own pictures for a pipeline's expert: what its flags name becomes a cache of latents and embeddings, made once.

--data ./coco                           cached in ./coco.pairs, by the pipeline's own VAE and text encoders
--data ./coco.pairs                     a cache that is there already: no picture is read
--data 'x/{000..099}.tar' --env.data_cache ./x.pairs
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddil_env.data.cache import Embed, Encode, cache_pairs
from ddil_env.data.pairs import Pairs
from ddil_env.data.shards import is_cache
from ddil_env.data.sources import Source
from ddil_env.pipelines.prompts import read_prompts

MAGIC = frozenset("*?[{")  # of a glob, or of a range


@dataclass(frozen=True)
class OwnData:
    """What the user says of their data; nothing of it is read yet.

    Attributes:
        data: A source of `read_pairs`, or a cache of it; None: there are no data.
        images: COCO's folder of pictures, where it is not beside the captions.
        data_cache: The cache's folder; default: the data's name with .pairs at its end, beside them.
        held_out: Share of the pairs that is never trained on, to judge by.
        workers: Processes that read pictures.

    Raises:
        ValueError: images or data_cache without what they belong to, or data of several files without data_cache.
    """

    data: str | None = None
    images: str | None = None
    data_cache: str | None = None
    held_out: float = 0.05
    workers: int = 4

    def __post_init__(self) -> None:
        strange = [f"{name}={value!r}" for name, value in (("images", self.images), ("data_cache", self.data_cache)) if value is not None]
        if strange and (self.data is None or is_cache(self.path)):
            raise ValueError(
                f"{' and '.join(strange)}: these belong to data of pictures, and data={self.data!r} is "
                f"{'not given' if self.data is None else 'a cache of them'}; leave them out{', or pass data' if self.data is None else ''}"
            )
        if self.data is not None and self.data_cache is None and MAGIC & set(self.data):
            raise ValueError(f"data={self.data!r} is of several files, beside which no cache is put; name its folder, --env.data_cache")

    @property
    def path(self) -> Path:
        """Where the data are; the working directory, if there are none."""
        return Path(os.path.abspath(Path(self.data or "").expanduser()))

    @property
    def folder(self) -> Path:
        """The cache's."""
        if is_cache(self.path):
            return self.path
        return self.path.with_name(f"{self.path.name}.pairs") if self.data_cache is None else Path(self.data_cache).expanduser()

    def texts(self, prompts: str | list[str] | None) -> tuple[str, ...]:
        """The prompts of an expert without data; none where the captions of data are its prompts.

        Raises:
            ValueError: data and prompts, or what `read_prompts` refuses.
        """
        if self.data is None:
            return read_prompts(prompts)
        if prompts is not None:
            given = repr(prompts) if isinstance(prompts, str) else f"a list of {len(prompts)}"
            raise ValueError(f"data={self.data!r} and prompts={given}: the captions of the data are the prompts; leave one of them out")
        return ()

    def open(self, read: Callable[[str, str | None], Source], encode: Encode, embed: Embed, model: str, height: int, width: int) -> Pairs:
        """The pairs, cached if they are not yet.

        Args:
            read: (data, images) → their listing.
            encode, embed, model, height, width: As in `cache_pairs`.

        Raises:
            ValueError: what `read`, `cache_pairs` and `Pairs` refuse.
        """
        if not is_cache(self.path):
            if any(self.path.glob("pairs-*.safetensors")):
                raise ValueError(f"{self.path} has the shards of a cache and no pairs.json; fetch that too, or cache the pictures again")
            source, workers = read(str(self.data), self.images), min(self.workers, os.cpu_count() or 1)
            cache_pairs(source, self.folder, encode, embed, model=model, height=height, width=width, workers=workers)
        return Pairs(self.folder, model, self.held_out)
