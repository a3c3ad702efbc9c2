"""A cache of pairs, read: what training draws its data from.

    x_0, c = Pairs("coco.pairs").draw(64, generator)

The cache is memory-mapped: a batch costs the reading of its own rows. A condition c is a pair's number, and the number after the last
stands for "", guidance's null condition. For Stable Diffusion 1.x in half precision a pair takes 151 kB, of which 118 are the
embedding of its caption.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_env.data.shards import MANIFEST, NULL, Shard, read_manifest, shard_path
from ddil_env.errors import NoDataError

FEWEST, SMALL = 10, 40  # pictures: as many are held out by default as the metrics need, and of fewer than `SMALL` none


class Pairs:
    """A memory-mapped cache of pairs. Ids are 0 … len − 1; the id len is the null condition, which has no picture.

    Args:
        folder: The cache, as `cache_pairs` makes it.
        model: The fingerprint of the model that the cache must be of; None accepts any.
        held_out: Share of the pictures whose pairs `draw` never returns, at least one if it is above 0. Default: a twentieth, but at
            least 10; none of fewer than 40, with a warning. A picture is known by its pixels, whatever its name, file and captions.
        seed: Fixes which ones. Pictures that are added move few others from one part to the other.

    Attributes:
        sample_shape: Shape of one latent.
        tables: Names of the tables of embeddings.

    Raises:
        ValueError: the folder is no cache, an unfinished one, another model's, or one of an earlier version; a shard is damaged; or no
            pair is left to train on.
    """

    def __init__(self, folder: str | Path, model: str | None = None, held_out: float | None = None, seed: int = 0) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if model not in (None, manifest["identity"].get("model")):
            raise ValueError(
                f"{folder} holds the latents and embeddings of the model {manifest['identity'].get('model')!r}, here {model!r}; "
                "cache the pairs again, into another folder"
            )
        if "counts" not in manifest:
            raise ValueError(f"the cache {folder} is not finished ({manifest['source']}); run its caching again, which continues it")
        counts = [*manifest["counts"], 1]  # the last is the null condition's
        paths = [*(shard_path(self.folder, k) for k in range(len(counts) - 1)), self.folder / NULL]
        self._shards = [Shard(path) for path in paths]
        for path, shard, count in zip(paths, self._shards, counts, strict=True):
            if any(len(tensor) != count for name, tensor in shard.tensors.items() if name != "captions") or len(shard) != count:
                raise ValueError(f"{path} does not hold the {count} rows that {MANIFEST} says; delete it and cache again")
            if "pictures" not in shard.tensors and path.name != NULL and len(shard):
                raise ValueError(
                    f"{path} holds no `pictures`, by which pictures are held out: the cache was made by an earlier version of ddil or "
                    "elsewhere; cache the pictures again, into another folder, or add that tensor (ddil_env/data/shards.py says how)"
                )
        self._shard_ends = list(accumulate(counts))  # the id after each shard's last
        self._n: int = self._shard_ends[-2]
        tensors = next(shard for shard in self._shards if len(shard)).tensors
        self.sample_shape = tuple(tensors["latents"].shape[1:])
        self.tables = sorted(name.removeprefix("embeddings.") for name in tensors if name.startswith("embeddings."))
        self._training, self._held_out = self._divide(held_out, seed)

    def _divide(self, held_out: float | None, seed: int) -> tuple[Tensor, Tensor]:
        """The ids of the training pairs and of those held out, (n,) each, in orders in which every picture comes before one comes twice."""
        ids: dict[bytes, list[int]] = {}
        for i, picture in enumerate(row for shard in self._shards[:-1] if len(shard) for row in shard.tensors["pictures"].numpy()):
            ids.setdefault(bytes(picture), []).append(i)
        pictures = sorted(ids, key=lambda picture: hashlib.sha256(f"{seed} ".encode() + picture).digest())
        m = self._count(held_out, len(pictures))
        parts = ([ids[picture] for picture in part] for part in (pictures[m:], pictures[:m]))
        orders = (sorted((turn, place, i) for place, each in enumerate(part) for turn, i in enumerate(each)) for part in parts)
        training, held = (torch.tensor([i for _, _, i in order], dtype=torch.int64) for order in orders)
        return training, held

    def _count(self, held_out: float | None, n: int) -> int:
        """The number of n pictures that are held out."""
        if held_out is None:
            if n < SMALL:
                warnings.warn(
                    f"{self.folder}: none of its {n} pictures is held out, since they are fewer than {SMALL}: samples are compared with "
                    "the training data; held_out, a share of the pictures, holds some out all the same",
                    stacklevel=4,
                )
                return 0
            return max(FEWEST, round(0.05 * n))
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out}: need a share of the pairs, from 0 to below 1")
        m = max(round(held_out * n), int(held_out > 0))
        if m >= n:
            raise ValueError(f"held_out={held_out} of {self._n} pairs leaves none to train on (of {n} pictures); pass a smaller share")
        return m

    def __len__(self) -> int:
        return self._n

    def identity(self) -> dict[str, Any]:
        """What training on these pairs depends on: a digest of the data, and how many of them are held out."""
        manifest = read_manifest(self.folder)
        listing = json.dumps(manifest.get("stretches", manifest))  # a cache that was made elsewhere has no stretches
        return {"data": hashlib.sha256(listing.encode()).hexdigest()[:16], "held_out": len(self._held_out)}

    def _locate(self, ids: Tensor, end: int) -> list[tuple[Shard, int]]:
        """The shard and the row in it of each id (n,), all of which must lie below `end`."""
        numbers: list[int] = ids.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < end:
            raise ValueError(f"ids from {min(numbers)} to {max(numbers)}: {self.folder} has 0 to {end - 1} here")
        shard_of = [(bisect_right(self._shard_ends, i), i) for i in numbers]
        return [(self._shards[k], i - (self._shard_ends[k - 1] if k else 0)) for k, i in shard_of]

    @staticmethod
    def _read_rows(name: str, places: list[tuple[Shard, int]]) -> Tensor:
        for shard, row in places:
            shard.prefetch(name, row)
        return torch.stack([shard.tensors[name][row] for shard, row in places])

    def latents(self, ids: Tensor) -> Tensor:
        """The latents (n, *sample_shape) of ids (n,), on the CPU, in the dtype of the cache.

        Raises:
            ValueError: an id outside 0 … len − 1.
        """
        return self._read_rows("latents", self._locate(ids, self._n))

    def embeddings(self, ids: Tensor) -> dict[str, Tensor]:
        """The rows (n, *any) of each table for ids (n,), on the CPU, in the dtype of the cache.

        Raises:
            ValueError: an id outside 0 … len; len is the null condition.
        """
        places = self._locate(ids, self._n + 1)
        return {name: self._read_rows(f"embeddings.{name}", places) for name in self.tables}

    def captions(self, ids: Tensor) -> list[str]:
        """The texts of ids (n,); "" for the null condition.

        Raises:
            ValueError: an id outside 0 … len.
        """
        return [shard.caption(row) for shard, row in self._locate(ids, self._n + 1)]

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws n training pairs with replacement: x_0 (n, *sample_shape) float32 and ids (n,) int64, on the CPU.

        The generator may be on any device. It is the only state: once it is restored, the same pairs follow.
        """
        ids = self.draw_ids(n, generator)
        return self.latents(ids).float(), ids

    def draw_ids(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws as `draw` does, and returns the ids (n,) alone."""
        device = "cpu" if generator is None else generator.device
        return self._training[torch.randint(len(self._training), (n,), generator=generator, device=device).cpu()]

    def reference(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """The first n training or held-out pairs of the fixed order, in the form of `draw`; fewer where there are fewer.

        Raises:
            NoDataError: no pair is held out.
        """
        ids = (self._held_out if held_out else self._training)[:n]
        if not len(ids):
            raise NoDataError(f"no pair of {self.folder} is held out; open it with held_out above 0, and n ≥ 1")
        return self.latents(ids).float(), ids
