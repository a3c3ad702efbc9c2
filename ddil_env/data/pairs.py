"""A cache of pairs, read: what training draws its data from.

    x_0, c = Pairs("coco.pairs").draw(64, generator)

The cache is memory-mapped: a batch costs the reading of its own rows. A condition c is a pair's number, and the number after the last
stands for "", guidance's null condition. For Stable Diffusion 1.x in half precision a pair takes 151 kB, of which 118 are the
embedding of its caption.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ddil_env.data.shards import MANIFEST, NULL, Shard, read_manifest, shard_path
from ddil_env.errors import NoDataError


class Pairs:
    """A memory-mapped cache of pairs. Ids are 0 … len − 1; the id len is the null condition, which has no picture.

    Args:
        folder: The cache, as `cache_pairs` makes it.
        model: The fingerprint of the model that the cache must be of; None accepts any.
        held_out: Share of the pairs that `draw` never returns, chosen by a permutation.
        seed: Fixes that permutation.

    Attributes:
        sample_shape: Shape of one latent.
        tables: Names of the tables of embeddings.

    Raises:
        ValueError: the folder is no cache, an unfinished one, or another model's; a shard is damaged; or no pair is left to train on.
    """

    def __init__(self, folder: str | Path, model: str | None = None, held_out: float = 0.05, seed: int = 0) -> None:
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
        self._shard_ends = list(accumulate(counts))  # the id after each shard's last
        self._n: int = self._shard_ends[-2]
        tensors = next(shard for shard in self._shards if len(shard)).tensors
        self.sample_shape = tuple(tensors["latents"].shape[1:])
        self.tables = sorted(name.removeprefix("embeddings.") for name in tensors if name.startswith("embeddings."))
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out}: need a share of the pairs, from 0 to below 1")
        m = round(held_out * self._n)
        if m == self._n:
            raise ValueError(f"held_out={held_out} of {self._n} pairs leaves none to train on; pass a smaller share")
        order = torch.randperm(self._n, generator=torch.Generator().manual_seed(seed))
        self._training, self._held_out = order[: self._n - m], order[self._n - m :]

    def __len__(self) -> int:
        return self._n

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
        texts = []
        for shard, row in self._locate(ids, self._n + 1):
            ends = shard.tensors["captions.ends"]
            start, end = int(ends[row - 1]) if row else 0, int(ends[row])
            texts.append(shard.tensors["captions"][start:end].numpy().tobytes().decode())
        return texts

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
        """The first n training or held-out pairs of the fixed permutation, in the form of `draw`; fewer where there are fewer.

        Raises:
            NoDataError: no pair is held out.
        """
        ids = (self._held_out if held_out else self._training)[:n]
        if not len(ids):
            raise NoDataError(f"no pair of {self.folder} is held out; open it with held_out above 0, and n ≥ 1")
        return self.latents(ids).float(), ids
