"""Texts as conditions: read from a file, embedded once by a pipeline's own encoders, and looked up by id ever after."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ddil_env.data.pairs import Pairs
from ddil_env.pipelines.folder import PipelineFolder

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bicycle leaning against a white brick wall",
    "a bowl of fresh fruit on a wooden table",
    "two dogs playing on a sandy beach at sunset",
    "a steam train crossing a stone bridge in the mountains",
    "a bedroom with a blue blanket and a large window",
    "an old man reading a newspaper in a cafe",
    "a tabby cat asleep on a laptop keyboard",
    "a plate of pasta with tomatoes and basil",
    "a surfer riding a tall green wave",
    "a watercolour painting of a harbour full of boats",
    "a street market in the rain, people with umbrellas",
    "a giraffe standing beside an acacia tree",
    "a vase of yellow tulips, oil on canvas",
    "a snowy village at night under the northern lights",
    "a close-up portrait of a woman wearing a straw hat",
)


def read_prompts(prompts: str | list[str] | None) -> tuple[str, ...]:
    """The prompts: a list, the lines of a text file (empty ones left out), COCO's captions, or the built-in ones.

    Of a COCO captions file (.json), one caption an image, the one of lowest id, in the order of image ids.

    Raises:
        ValueError: an unreadable file, or no prompt.
    """
    if prompts is None:
        return PROMPTS
    source = "the list of prompts"
    if isinstance(prompts, str):
        source = f"the prompts file {Path(prompts).expanduser().absolute()}"
        try:
            text = Path(prompts).expanduser().read_text(encoding="utf-8")
            prompts = coco_captions(text) if prompts.endswith(".json") else text.splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {source} ({error}); it must be a UTF-8 text file with one prompt a line") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{source} is no COCO captions file ({error!r}); it holds annotations with image_id, id and caption"
            ) from error
    kept = tuple(line.strip() for line in prompts if line.strip())
    if not kept:
        raise ValueError(f"{source} holds no prompt; give one a line, or leave prompts out to use the {len(PROMPTS)} built-in ones")
    return kept


def coco_captions(text: str) -> list[str]:
    """The first caption of each image of a COCO captions file."""
    first: dict[int, str] = {}
    for annotation in sorted(json.loads(text)["annotations"], key=lambda a: (a["image_id"], a["id"])):
        first.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
    return list(first.values())


class TextReader:
    """A tokenizer and its encoder: texts → tensors, 64 texts at a time.

    The encoder runs in float32, which costs nothing where it runs once. It goes when the reader does.

    Args:
        files: The pipeline's.
        number: Ending of the two components' names, "" or "_2".
        device: Where the encoder computes.
        max_length: Tokens that a text is padded or cut to; default: what tokenizer and encoder allow.

    Raises:
        ValueError: either does not load.
    """

    def __init__(self, files: PipelineFolder, number: str, device: torch.device, max_length: int | None = None) -> None:
        self.tokenizer = files.tokenizer(f"tokenizer{number}")
        self.encoder = files.load(f"text_encoder{number}").to(device)
        self.max_length = max_length or min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        self._warned = False

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], read: Callable[[Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `read` takes from the encoder's output, each (n, *any) float32."""
        self._warn_of_cuts(texts)
        batches = []
        for start in range(0, len(texts), 64):
            tokens = self.tokenizer(
                list(texts[start : start + 64]), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
            )
            batches.append(read(self.encoder(tokens.input_ids.to(self.encoder.device), output_hidden_states=True)))
        return tuple(torch.cat(column) for column in zip(*batches, strict=True))

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        """Once a reader, where texts are too long."""
        ids = self.tokenizer(list(texts), verbose=False).input_ids
        cut = [text for text, found in zip(texts, ids, strict=True) if len(found) > self.max_length]
        if cut and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(cut)} of {len(texts)} prompts are cut to the {self.max_length} tokens that {type(self.encoder).__name__} reads; "
                f"the first: {cut[0]!r}",
                stacklevel=2,
            )


class Lookup(ABC):
    """What a network reads for each condition id: tables of one row an id, the last row that of the null condition.

    One object serves an expert, its students and all their copies, and is in no state_dict: 118 kB a prompt for Stable Diffusion 1.x
    in half precision.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @abstractmethod
    def rows(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        """The rows of ids c (n,), or n times that of the null condition: name → (n, *any), on the device."""


class Embeddings(Lookup):
    """Tables on the device.

    Args:
        tables: name → (ids, *any).
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.tables = dict(tables)

    def rows(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        if c is None:
            return {name: table[-1:].expand(n, *table.shape[1:]) for name, table in self.tables.items()}
        return {name: table[c] for name, table in self.tables.items()}


class MappedEmbeddings(Lookup):
    """Tables that stay on the disk, as a cache of pairs has them: of a batch, each row that it names goes to the device once.

    Args:
        pairs: The cache.
        device: Where the rows go.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self.pairs = pairs
        self.device = device
        self.null = self._read(torch.tensor([len(pairs)]))
        self._last: tuple[Tensor, int, dict[str, Tensor]] | None = None

    def _read(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: table.to(self.device) for name, table in self.pairs.embeddings(ids).items()}

    def rows(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        if c is None:
            return {name: row.expand(n, *row.shape[1:]) for name, row in self.null.items()}
        if self._last is not None and self._last[0] is c and self._last[1] == c._version:  # teacher, student and critic ask for one batch
            return self._last[2]
        ids, place = c.cpu().unique(return_inverse=True)  # of a guided pair, the null condition is read once
        place = place.to(self.device)
        rows = {name: table[place] for name, table in self._read(ids).items()}
        if not c.is_inference():  # such a tensor does not tell whether it was changed since
            self._last = c, c._version, rows
        return rows


def look_up(pairs: Pairs, device: torch.device, limit: int) -> Lookup:
    """The embeddings of a cache: on the device if all of them take no more than `limit` bytes, else from the disk."""
    ids = torch.arange(len(pairs) + 1)
    size = len(ids) * sum(row.nbytes for row in pairs.embeddings(ids[-1:]).values())
    if size > limit:
        return MappedEmbeddings(pairs, device)
    return Embeddings({name: table.to(device) for name, table in pairs.embeddings(ids).items()})
