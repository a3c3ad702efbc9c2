"""Texts as conditions: read from a file, embedded once by a pipeline's own encoders, and then looked up by id."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ddil_env.data.captions import read_caption, read_json
from ddil_env.data.coco import sorted_annotations
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
    """Reads prompts; empty ones are left out.

    Args:
        prompts: A list, the path of a text file (.txt) with one prompt a line, or the path of a COCO captions file (.json), of which each
            image gives the first caption that is not empty, in the order of image ids. Default: the built-in prompts.

    Raises:
        ValueError: a file that is unreadable or of another format, a prompt that is no text, or no prompt.
    """
    if prompts is None:
        return PROMPTS
    source = "the list of prompts"
    if isinstance(prompts, str):
        source = f"the prompts file {Path(prompts).expanduser().absolute()}"
        prompts = _read_file(Path(prompts).expanduser(), source)
    kept = []
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise ValueError(f"{source} holds {prompt!r:.60} as number {number}, which is not a string; remove it")
        if prompt := prompt.strip():
            _check_prompt(prompt, number, source)
            kept.append(prompt)
    if not kept:
        raise ValueError(f"{source} holds no prompt; give one a line, or leave prompts out to use the {len(PROMPTS)} built-in ones")
    return tuple(kept)


def _read_file(path: Path, source: str) -> list[str]:
    suffix = path.suffix.lower()
    if suffix not in ("", ".txt", ".json"):
        raise ValueError(
            f"{source} is a {suffix} file; prompts are read from a text file (.txt) with one prompt a line, or from a COCO captions file "
            "(.json): write its prompts into a .txt, one a line"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {source} ({error}); it must be a UTF-8 text file with one prompt a line. If it was moved since a run began, "
            "resume that with --env.prompts PATH"
        ) from error
    if suffix != ".json":
        return [line.removesuffix("\r") for line in text.split("\n")]  # a form feed or U+2028 is part of a prompt
    try:
        return coco_captions(text)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is no COCO captions file ({error!r}); pass one, which holds annotations with image_id, id and caption, "
            "or a .txt with one prompt a line"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source}, {error}; mend or remove it") from error


def _check_prompt(prompt: str, number: int, source: str) -> None:
    try:
        read_caption(prompt)
    except ValueError as error:
        raise ValueError(f"{source}, prompt {number}: {error}; mend or remove it") from error
    if "\r" in prompt:
        raise ValueError(f"{source}, prompt {number}: {prompt!r:.60} holds a carriage return; end lines with \\n or \\r\\n")
    if _is_json(prompt):
        raise ValueError(f"{source}, prompt {number}: {prompt!r:.60} is a JSON object; write its prompt alone on the line")


def _is_json(prompt: str) -> bool:
    try:
        return isinstance(json.loads(prompt), dict | list)
    except (ValueError, RecursionError):
        return False


def coco_captions(text: str) -> list[str]:
    """The first caption of each image that is not empty, from the text of a COCO captions file.

    Raises:
        ValueError: a caption that is no text, or an image with empty captions alone.
        KeyError, TypeError: the text is of another form.
    """
    first: dict[Any, str] = {}
    empty: dict[Any, str] = {}
    for annotation in sorted_annotations(read_json(text)):
        place = f"annotation id={annotation['id']!r} of image_id={annotation['image_id']!r}"
        if isinstance(annotation["caption"], str) and not annotation["caption"].strip():
            empty.setdefault(annotation["image_id"], place)
        elif annotation["image_id"] not in first:
            try:
                first[annotation["image_id"]] = read_caption(annotation["caption"])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
    if without := [place for i, place in empty.items() if i not in first]:
        raise ValueError(f"{without[0]}: the text is empty, and the image has no other")
    return list(first.values())


class TextReader:
    """A tokenizer and its text encoder: texts → tensors, 64 texts at a time.

    The encoder runs in float32, since it runs only once. It is freed with the reader.

    Args:
        files: The files of the pipeline.
        number: Ending of the two components' names, such as "" or "_2".
        device: Where the encoder computes.
        max_length: Number of tokens that a text is padded or truncated to; default: what tokenizer and encoder allow.

    Raises:
        ValueError: the tokenizer or the encoder does not load.
    """

    def __init__(self, files: PipelineFolder, number: str, device: torch.device, max_length: int | None = None) -> None:
        self.tokenizer = files.tokenizer(f"tokenizer{number}")
        self._inverts = issubclass(files.pipeline, TextualInversionLoaderMixin)
        self.encoder = files.load(f"text_encoder{number}").to(device)
        self.max_length = max_length or min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        self._warned = False

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], read: Callable[[Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Encodes n texts.

        Args:
            texts: The texts.
            read: Takes tensors, (b, *any) each, from the encoder's output.

        Returns:
            What `read` took, (n, *any) float32 each.
        """
        if self._inverts:  # a textual inversion of several vectors is a token of each
            texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), self.tokenizer)
        self._warn_of_truncation(texts)
        batches = []
        for start in range(0, len(texts), 64):
            tokens = self.tokenizer(
                list(texts[start : start + 64]), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
            )
            batches.append(read(self.encoder(tokens.input_ids.to(self.encoder.device), output_hidden_states=True)))
        return tuple(torch.cat(column) for column in zip(*batches, strict=True))

    def _warn_of_truncation(self, texts: Sequence[str]) -> None:
        """Warns, at most once, of texts that are too long."""
        ids = self.tokenizer(list(texts), verbose=False).input_ids
        too_long = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) > self.max_length]
        if too_long and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(too_long)} of {len(texts)} prompts are cut to the {self.max_length} tokens that "
                f"{type(self.encoder).__name__} reads; the first: {too_long[0]!r}",
                stacklevel=2,
            )


class Lookup(ABC):
    """Tables with a row of embeddings for each condition id; the last row is the null condition's.

    An expert, its students and all their copies share one object, and it is in no state_dict: a prompt takes 118 kB for Stable
    Diffusion 1.x in half precision.
    """

    size: int
    added: Mapping[str, Tensor] | None = None  # rows of the ids from `size` on

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def rows(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        """Looks up the rows of ids c (n,), or n times the null condition's if c is None: name → (n, *any), on the device."""
        if c is None or self.added is None:
            return self.look_up(c, n)
        rows, beyond = self.look_up(c.clamp(max=self.size - 1), n), c >= self.size
        return {name: row.index_put((beyond,), self.added[name][c[beyond] - self.size]) for name, row in rows.items()}

    @contextmanager
    def adding(self, tables: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Inside, there are more rows, name → (n, *any); gives their ids, (n,)."""
        self.added = tables
        try:
            n, device = next((len(table), table.device) for table in tables.values())
            yield torch.arange(self.size, self.size + n, device=device)
        finally:
            self.added = None

    @abstractmethod
    def look_up(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        """The rows of ids below `size`, or of the null condition."""


class Embeddings(Lookup):
    """Tables in the device's memory.

    Args:
        tables: name → (number of ids, *any).
    """

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.tables = dict(tables)
        self.size = len(next(iter(tables.values())))

    def look_up(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        if c is None:
            return {name: table[-1:].expand(n, *table.shape[1:]) for name, table in self.tables.items()}
        return {name: table[c] for name, table in self.tables.items()}


class MappedEmbeddings(Lookup):
    """Tables that stay on the disk, in a cache of pairs; each row that a batch needs is copied to the device once.

    Args:
        pairs: The cache.
        device: Where the rows go.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self.pairs = pairs
        self.device = device
        self.size = len(pairs) + 1
        self.null = self._read(torch.tensor([len(pairs)]))
        self._last: tuple[Tensor, int, dict[str, Tensor]] | None = None

    def _read(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: table.to(self.device) for name, table in self.pairs.embeddings(ids).items()}

    def look_up(self, c: Tensor | None, n: int) -> dict[str, Tensor]:
        if c is None:
            return {name: row.expand(n, *row.shape[1:]) for name, row in self.null.items()}
        if self._last is not None and self._last[0] is c and self._last[1] == c._version:  # teacher, student and critic share a batch
            return self._last[2]
        ids, index = c.cpu().unique(return_inverse=True)  # in a guided batch the null condition is read once
        index = index.to(self.device)
        rows = {name: table[index] for name, table in self._read(ids).items()}
        if not c.is_inference():  # an inference tensor has no version that shows whether it was changed
            self._last = c, c._version, rows
        return rows


def look_up(pairs: Pairs, device: torch.device, limit: int) -> Lookup:
    """The embeddings of a cache: in the device's memory if they take at most `limit` bytes, otherwise on the disk."""
    ids = torch.arange(len(pairs) + 1)
    size = len(ids) * sum(row.nbytes for row in pairs.embeddings(ids[-1:]).values())
    if size > limit:
        return MappedEmbeddings(pairs, device)
    return Embeddings({name: table.to(device) for name, table in pairs.embeddings(ids).items()})
