"""Settings of an evaluation, and the networks that they name: the feature extractor and the scorers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.clip_score import ClipScore
from ddil_agents.evaluation.metrics.extractor import Extractor
from ddil_agents.evaluation.metrics.extractors import default_extractor, load_extractor
from ddil_agents.evaluation.metrics.hps import HPS
from ddil_agents.evaluation.results import DIRECTIONS
from ddil_env import Expert

Score = Literal["clip_score", "hpsv2"]


class Scorer(Protocol):
    """Scores pictures by their captions."""

    name: str
    """Its name in results: the network and its weights."""
    weights: str
    """A digest of its weights."""

    def score(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """Scores (n,) of uint8 pictures (n, height, width, 3) and their n captions."""


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation."""

    n: int = 500
    """Samples of each model, under the conditions of the training data; compared with as many held-out data, or all if there are fewer."""
    seed: int = 0
    """Seed of the noise that every model starts from."""
    extractor: str | None = None
    """Name of the feature extractor; null: the one that the expert names."""
    n_paths: int = 500
    """Trajectories that are compared step by step."""
    n_action: int = 200
    """Trajectories, of those, on whose states the expert's actions are computed, for the action errors."""
    n_episodes: int = 50
    """Episodes of each model, of an expert that has a world."""
    also_steps: tuple[int, ...] = ()
    """More numbers of steps at which samples of the student and of the teacher are evaluated."""
    batch_size: int = 500
    """Samples drawn at once."""
    scores: tuple[Score, ...] = ()
    """Scores of pictures and their captions: clip_score, hpsv2."""
    lpips: bool = False
    """Whether to measure diversity: mean LPIPS among 10 pictures of each of 50 conditions."""
    weights_dir: str | None = None
    """Folder with the weights of the picture metrics; null: each library downloads its own."""
    store: str | None = None
    """Folder that caches the expert's samples for other evaluations of the same expert; null: none."""
    images: str | None = None
    """Folder of real pictures to compare with, for an extractor of pictures; null: the expert's own data."""
    protocol: str | None = None
    """Name of a published protocol, which results record. It needs `images`, and one caption for each sample."""

    @property
    def weights(self) -> Path | None:
        """weights_dir as a path."""
        return None if self.weights_dir is None else Path(self.weights_dir)

    def __post_init__(self) -> None:
        if self.n < 10:
            raise ValueError(f"n={self.n}: the metrics need at least 10 samples")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: need a whole number from 0 to 2^63 − 1")
        for name in ("n_action", "n_episodes", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        if self.n_paths < 2:
            raise ValueError(f"n_paths={self.n_paths}: need at least 2")
        if not all(steps >= 1 for steps in self.also_steps):
            raise ValueError(f"also_steps={self.also_steps}: need whole numbers ≥ 1")
        if strange := set(self.scores) - set(get_args(Score)):
            raise ValueError(f"unknown score {strange.pop()!r}; choose of: {', '.join(get_args(Score))}")
        for name in ("weights_dir", "images"):
            if (folder := getattr(self, name)) is not None and not Path(folder).is_dir():
                raise ValueError(f"{name}={folder}: no such folder")
        if self.store is not None and Path(self.store).exists() and not Path(self.store).is_dir():
            raise ValueError(f"store={self.store}: it is a file; name a folder, which need not exist yet")
        if self.protocol is not None and self.images is None:
            raise ValueError(f"protocol={self.protocol}: needs images, the folder of its pictures; or protocol=null, for other numbers")


@dataclass(frozen=True)
class Validation:
    """Settings of the evaluation during training."""

    n: int = 256
    """Samples of the averaged student at each evaluation; they are compared with as many of the teacher, which are drawn once."""
    metrics: tuple[str, ...] = ("frechet_to_expert", "action_mse_own")
    """Metrics of result.json that eval.jsonl records; the first decides which student is the best."""
    patience: int | None = None
    """Evaluations without a better student after which training ends; null: it never ends early."""
    batch_size: int = 256
    """Samples drawn at once."""

    def __post_init__(self) -> None:
        if not self.metrics or (strange := [name for name in self.metrics if name not in DIRECTIONS]):
            unknown = f"unknown metric {strange[0]!r}; " if self.metrics else ""
            raise ValueError(f"validation.metrics={list(self.metrics)}: {unknown}choose from {', '.join(DIRECTIONS)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"validation.patience={self.patience}: need at least 1, or null to train to the end")
        try:
            Evaluation(n=self.n, batch_size=self.batch_size)
        except ValueError as error:
            raise ValueError(f"validation.{error}") from error


def extractor_for(expert: Expert, settings: Evaluation) -> Extractor:
    """The extractor of an evaluation, checked on one sample.

    Raises:
        ValueError: an unknown extractor, one that does not fit the samples, or pictures or captions that the expert does not have.
    """
    extractor = load_extractor(settings.extractor or default_extractor(expert), settings.weights, expert.device)
    if settings.images is not None and not extractor.of_pictures:
        raise ValueError(f"images={settings.images}: {extractor.name} does not read pictures; choose extractor=inception_v3_2015")
    sample = torch.zeros(1, *expert.sample_shape, device=expert.device)
    if (extractor.of_pictures or settings.scores or settings.lpips) and expert.decode(sample) is None:
        raise ValueError(f"{type(expert).__name__} decodes no pictures, which {extractor.name}, scores and lpips read")
    if settings.protocol is not None and (expert.num_conditions or 0) < settings.n:
        raise ValueError(
            f"protocol={settings.protocol}: {settings.n} samples have captions of their own, and {expert.num_conditions or 0} are given; "
            "pass --captions the protocol's, or protocol=null for other numbers"
        )
    if not extractor.of_pictures:
        extractor.features(sample)
    if settings.scores:
        expert.captions(torch.zeros(1, dtype=torch.int64))
    return extractor


def load_scorers(settings: Evaluation, device: torch.device) -> dict[str, Scorer]:
    """The networks of an evaluation's scores, by the name of the score.

    Raises:
        ImportError: without the `eval` extra.
        ValueError: absent or unsafe weights.
    """
    kinds = {"clip_score": ClipScore, "hpsv2": HPS}
    return {name: kinds[name](settings.weights, device=device) for name in settings.scores}
