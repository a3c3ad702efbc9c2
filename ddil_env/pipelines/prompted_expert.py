"""Experts whose conditions are texts."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddil_env.data.cache import Embed
from ddil_env.pipelines.data import OwnData
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.latent_expert import LatentExpert
from ddil_env.pipelines.prompts import Embeddings, Lookup, look_up


class PromptedExpert(LatentExpert):
    """A text-to-image pipeline: a condition id c is the number of a prompt, and the last id, `null_condition`, is guidance's "".

    The text encoders embed every prompt once, before the first step, and are then freed. What remains is one table of embeddings on
    the device, which the expert and all of its students share. With data, the captions are the prompts and a cache holds the table;
    once the cache exists, no encoder is loaded.

    Args:
        files, sample_shape, rest: As in `PipelineExpert`.
        prompts: The texts; empty if there are data.
        own: What the user says of the data.

    Attributes:
        embeddings_on_device: Limit in bytes: embeddings of a cache up to this size are put on the device, larger ones stay on the disk.

    Raises:
        ValueError: as `PipelineExpert`, or data that cannot be read.
    """

    example = '"a prompt"'
    task = "text-to-image"
    embeddings_on_device: ClassVar[int] = 2**31

    def __init__(self, files: PipelineFolder, sample_shape: tuple[int, ...], prompts: tuple[str, ...], own: OwnData, **rest: Any) -> None:
        super().__init__(files, sample_shape, num_conditions=len(prompts), null_condition=len(prompts), **rest)
        self.prompts = prompts
        if own.data is None:
            self.embeddings: Lookup = Embeddings(self.embedder()((*prompts, "")))
        else:
            embedder = cache(self.embedder)  # loads the encoders at the first caption that has to be embedded
            self.pairs = self.open_pairs(own, lambda texts: embedder()(texts))
            self.num_conditions = self.null_condition = len(self.pairs)
            self.embeddings = look_up(self.pairs, self.device, self.embeddings_on_device)
        self.network = self.load_network()

    def identity(self) -> dict[str, Any]:
        texts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]  # with data the captions are in `data`
        return super().identity() | {"prompts": None if self.pairs is not None else texts}

    @abstractmethod
    def embedder(self) -> Embed:
        """Loads the text encoders into a function: n texts → rows of the tables, (n, *any) each, in the expert's dtype.

        The rows of "" are those of the null condition.
        """

    @contextmanager
    def prompted(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        embed = self.embedder()
        tables = {name: table.to(self.device) for name, table in embed(prompts).items()}
        del embed  # and with it the text encoders
        with self.embeddings.adding(tables) as ids:
            yield ids

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Draws n condition ids (n,) uniformly, of all prompts or of the captions that are not held out."""
        return super().sample_condition(n, generator) if self.pairs is None else self.pairs.draw_ids(n, generator).to(self.device)

    def captions(self, c: Tensor) -> list[str]:
        return [self.prompts[i] for i in c.tolist()] if self.pairs is None else self.pairs.captions(c)
