"""Encodes stretches of a source into the rows of shards, and takes what was encoded before from the shards that were set aside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ddil_env.data.files import Pair, Skipped
from ddil_env.data.hashes import hash_picture
from ddil_env.data.pictures import Picture, PictureReader
from ddil_env.data.shards import DTYPES, Shard, stale_path

Encode = Callable[[Tensor], Tensor]  # uint8 (b, height, width, 3) → latents (b, *sample_shape)
Embed = Callable[[Sequence[str]], Mapping[str, Tensor]]  # b captions → named tables, (b, *any) each
Row = dict[str, Tensor]  # name → tensor of one pair


class ReusableRows:
    """Rows of an earlier cache that need not be encoded again: of pictures, by the hash of their file; of captions, by their text.

    Args:
        folder: The cache.
    """

    def __init__(self, folder: Path) -> None:
        self._pictures: dict[str, tuple[Shard, int]] = {}
        self._captions: dict[str, tuple[Shard, int]] = {}
        for path in sorted(folder.glob(stale_path(folder, "*").name)):
            shard = Shard(path)
            self._pictures |= {sha256: (shard, row) for row, sha256 in enumerate(shard.files())}
            self._captions |= {caption: (shard, row) for row, caption in enumerate(map(shard.caption, range(len(shard))))}

    def picture(self, sha256: str) -> Row | None:
        """Returns the row of a picture; None if it has to be encoded."""
        return self._row(self._pictures.get(sha256), lambda name: name in ("latents", "pictures", "files"))

    def caption(self, caption: str) -> Row | None:
        """Returns the embeddings of a caption; None if it has to be encoded."""
        return self._row(self._captions.get(caption), lambda name: name.startswith("embeddings."))

    @staticmethod
    def _row(place: tuple[Shard, int] | None, wanted: Callable[[str], bool]) -> Row | None:
        if place is None:
            return None
        shard, row = place
        return {name: tensor[row] for name, tensor in shard.tensors.items() if wanted(name)}


class Encoder:
    """Makes rows of shards.

    Args:
        encode, embed, height, width, batch_size, workers: As in `cache_pairs`.
        reusable: Rows that need not be encoded again.

    Attributes:
        pictures, captions: Number of those that were encoded.
    """

    def __init__(
        self, encode: Encode, embed: Embed, height: int, width: int, batch_size: int, workers: int, reusable: ReusableRows
    ) -> None:
        self.encode, self.embed, self.reusable = encode, embed, reusable
        self.reader, self.batch_size, self.workers = PictureReader(height, width), batch_size, workers
        self.pictures = self.captions = 0

    def encode_stretches(
        self, stretches: list[list[tuple[Pair, str]]], total: int, title: str
    ) -> Iterator[tuple[list[Row], list[str], list[Skipped]]]:
        """Encodes stretches of pairs and the hashes of their pictures' files, one after the other.

        Args:
            stretches: The stretches.
            total: Number of all pairs of the source.
            title: What the progress bar says.

        Yields:
            Of each stretch the batches of its rows, (b, *any) each; their captions; and what is left out.

        Raises:
            ValueError: as `cache_pairs`.
        """
        batches = [[stretch[i : i + self.batch_size] for i in range(0, len(stretch), self.batch_size)] for stretch in stretches]
        unread = [[pair for pair, sha256 in batch if self.reusable.picture(sha256) is None] for each in batches for batch in each]
        # torchrl sets the start method to spawn, by which every worker would import the user's script; these workers only read pictures.
        context = "fork" if self.workers and sys.platform == "linux" else None
        loader = DataLoader(
            self.reader,
            batch_sampler=[batch for batch in unread if batch],
            num_workers=self.workers,
            collate_fn=list,
            multiprocessing_context=context,
        )
        read = (picture for batch in loader for picture in batch)
        done = total - sum(map(len, stretches))
        with tqdm(total=total, initial=done, desc=title, unit=" pairs") as bar:
            for each in batches:
                rows: list[Row] = []
                captions: list[str] = []
                skipped: list[Skipped] = []
                for batch in each:
                    whole: list[tuple[Pair, Picture | Row]] = []
                    for pair, sha256 in batch:
                        picture = self.reusable.picture(sha256) or _unchanged(next(read), pair, sha256)
                        if isinstance(picture, str):
                            skipped.append(Skipped(pair.name, picture))
                        else:
                            whole.append((pair, picture))
                    if whole:
                        rows.append(self._encode_batch(whole))
                        captions += [pair.caption for pair, _ in whole]
                    bar.update(len(batch))
                yield rows, captions, skipped

    def encode_null(self) -> Row:
        """The embeddings of "", as a batch of one; there are none where there are no texts."""
        return self._check({f"embeddings.{name}": table for name, table in self.embed([""]).items()}, ["the empty caption"])

    def _encode_batch(self, batch: list[tuple[Pair, Picture | Row]]) -> Row:
        pictures = {i: each for i, (_, each) in enumerate(batch) if isinstance(each, Picture)}
        rows = [dict(each) if isinstance(each, dict) else {} for _, each in batch]
        if pictures:
            encoded = {
                "latents": self.encode(torch.stack([picture.pixels for picture in pictures.values()])),  # (b, *sample_shape)
                "pictures": _as_tensor([picture.sha256 for picture in pictures.values()]),
                "files": _as_tensor([bytes.fromhex(picture.file_sha256) for picture in pictures.values()]),
            }
            self._add(rows, list(pictures), self._check(encoded, [batch[i][0].name for i in pictures]))
            self.pictures += len(pictures)
        kept = [self.reusable.caption(pair.caption) for pair, _ in batch]
        for row, embeddings in zip(rows, kept, strict=True):
            row.update(embeddings or {})
        if texts := [i for i, embeddings in enumerate(kept) if embeddings is None]:
            tables = {f"embeddings.{name}": table for name, table in self.embed([batch[i][0].caption for i in texts]).items()}
            self._add(rows, texts, self._check(tables, [batch[i][0].name for i in texts]))
            self.captions += len(texts)
        return {name: torch.stack([row[name] for row in rows]) for name in sorted(rows[0])}

    @staticmethod
    def _add(rows: list[Row], places: list[int], tensors: Row) -> None:
        for name, tensor in tensors.items():
            for i, values in zip(places, tensor, strict=True):
                rows[i][name] = values

    @staticmethod
    def _check(rows: Row, names: list[str]) -> Row:
        """Moves rows to the CPU.

        Raises:
            ValueError: not one row for each name, a dtype that a cache cannot hold, or NaN or infinite values.
        """
        for name, values in rows.items():
            if len(values) != len(names):
                raise ValueError(f"{len(values)} rows of {name} for {len(names)} pairs; encode and embed must return one for each pair")
            if values.dtype not in DTYPES.values():
                raise ValueError(f"{name} is {values.dtype}; a cache keeps {', '.join(DTYPES)}: convert it in encode or embed")
            bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
            if bad.any():
                first = names[int(bad.nonzero()[0])]
                raise ValueError(f"NaN or infinite {name} of {int(bad.sum())} pairs, the first {first!r}; compute in float32 or bfloat16")
        return {name: values.cpu() for name, values in rows.items()}


def _unchanged(picture: Picture | str, pair: Pair, sha256: str) -> Picture | str:
    """Returns what was read of a pair.

    Raises:
        ValueError: its file is not the one of that hash.
    """
    if sha256 != (hash_picture(pair) if isinstance(picture, str) else picture.file_sha256):
        raise ValueError(f"{pair.path} changed while it was being cached; leave the data alone and run it again")
    return picture


def _as_tensor(hashes: list[bytes]) -> Tensor:
    """Hashes as uint8 (n, 32)."""
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(len(hashes), -1)
