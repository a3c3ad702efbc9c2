"""Judging a policy: its samples against data, and its trajectories against the expert's from the same noise.

    python -m ddil_agents.evaluate --env digits --steps 32 8 4 2 1        # the expert itself, by number of steps
    python -m ddil_agents.evaluate --run runs/mine --n 5000               # a student, beside its teacher
    python -m ddil_agents.evaluate --run runs/sd --config coco2017_5k --captions captions.json --images val2017 --weights_dir DIR

Every result names its extractor, the number of samples and the seed. Real data are judged beside the models: no number
means anything without its floor. Samples are drawn a batch at a time and only their features kept; with --out, a killed
evaluation goes on at its last batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ddil_agents import out_of_memory
from ddil_agents.checkpoint import write_atomically
from ddil_agents.collect import stream_seed
from ddil_agents.metrics.coverage import precision_recall_density_coverage
from ddil_agents.metrics.distances import mmd2, sliced_wasserstein, split_half
from ddil_agents.metrics.diversity import LPIPS, group_diversity, lpips_distance, pairwise_distance
from ddil_agents.metrics.extractors import Extractor, default_extractor, load_extractor
from ddil_agents.metrics.features import Features
from ddil_agents.metrics.frechet import frechet_distance, frechet_name, gaussian_w2
from ddil_agents.metrics.kid import kernel_distance
from ddil_agents.metrics.pictures import RESIZE, folder_digest, load_pictures, picture_files, resize
from ddil_agents.metrics.vendi import vendi_score
from ddil_agents.settings import read_arguments
from ddil_env import DdimPolicy, Expert, ExpertPolicy, NoDataError, TimeGrid, load_expert, unroll
from ddil_env.mdp import Kernel
from ddil_env.presets import find_expert, preset_names, read_env, read_yaml
from ddil_env.schedule import GridKind
from ddil_env.weights import read_tensors

if TYPE_CHECKING:
    from ddil_agents.learner import Agent

Score = Literal["clip_score", "hpsv2"]
KEPT = 1024  # real pictures whose features are written at a time
GROUPS, IN_GROUP = 50, 10  # prompts and samples of each, in the diversity of DDIL, Section 5


class Scorer(Protocol):
    """Scores pictures by their captions."""

    name: str
    """What results call it: the network and its weights."""

    def score(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """Uint8 pictures (n, height, width, 3) and n captions → (n,)."""


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation."""

    n: int = 500
    """Samples of each model, with the conditions of the training data in turn; held against as many held-out data, or what there are."""
    seed: int = 0
    """Of the noise that every model starts from."""
    extractor: str | None = None
    """Whose features are compared; null: the expert's own."""
    n_paths: int = 500
    """How many of the trajectories are kept and compared step by step."""
    n_action: int = 200
    """How many of those are labelled by the expert, for the action errors."""
    also_steps: tuple[int, ...] = ()
    """More numbers of steps at which the student's and the teacher's samples are judged."""
    batch_size: int = 500
    """Samples drawn at once."""
    scores: tuple[Score, ...] = ()
    """Of pictures and their captions: clip_score, hpsv2."""
    lpips: bool = False
    """Diversity among 10 pictures of each of 50 conditions, by LPIPS."""
    weights_dir: str | None = None
    """Folder of the weights that picture metrics need; null: each library's own download."""
    store: str | None = None
    """Folder in which the expert's samples are kept, for other evaluations of the same expert; null keeps none."""
    images: str | None = None
    """Folder of real pictures to compare with, for an extractor of pictures; null: the expert's own data."""
    protocol: str | None = None
    """Name of a published protocol, which results bear: it needs `images`, and a caption of its own for each sample."""

    @property
    def weights(self) -> Path | None:
        """weights_dir as a path."""
        return None if self.weights_dir is None else Path(self.weights_dir)

    def __post_init__(self) -> None:
        if self.n < 10:
            raise ValueError(f"n={self.n}: the metrics need at least 10 samples")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: need a whole number from 0 to 2^63 − 1")
        for name in ("n_action", "batch_size"):
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
        if self.protocol is not None and self.images is None:
            raise ValueError(f"protocol={self.protocol}: needs images, the folder of its pictures; or protocol=null, for other numbers")


def extractor_for(expert: Expert, settings: Evaluation) -> Extractor:
    """The extractor of an evaluation, tried on one sample.

    Raises:
        ValueError: an unknown one, one that does not fit the samples, or pictures or captions asked of an expert that has none.
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
        ValueError: weights that are absent or unsafe.
    """
    from ddil_agents.metrics.clip_score import ClipScore
    from ddil_agents.metrics.hps import HPS

    kinds = {"clip_score": ClipScore, "hpsv2": HPS}
    return {name: kinds[name](settings.weights, device=device) for name in settings.scores}


class Drawn(NamedTuple):
    """What is kept of n samples of one model."""

    features: Features
    """(n, d)."""
    classes: Tensor | None
    """(n,), where the extractor is a classifier."""
    scores: dict[str, float]
    """Mean of each score."""
    path: Tensor
    """The first trajectories, (n_paths, N + 1, *sample_shape)."""
    seconds: float
    """Of sampling."""


class Judge:
    """What every model of one comparison is held against: data, noise, conditions and the expert's trajectories, drawn once.

    Args:
        expert_policy: The expert as the models are to imitate it, on the grid below.
        grid: The N steps of the models.
        settings: How many, which seed, which extractor.
        store: Folder in which finished batches are kept, so that a killed evaluation goes on; None keeps none. The expert's
            are kept in the settings' own store, if there is one.

    Raises:
        ValueError: an unknown extractor, pictures or captions asked of an expert that has none, a store of other settings, or, under a
            protocol, fewer samples than it asks for.
    """

    def __init__(self, expert_policy: ExpertPolicy, grid: TimeGrid, settings: Evaluation | None = None, store: Path | None = None) -> None:
        self.settings = settings or Evaluation()
        self.expert_policy, self.grid = expert_policy, grid
        self.expert = expert = expert_policy.expert
        self.few_steps = ExpertPolicy(expert, 1, expert_policy.guidance_scale, expert_policy.project)
        self.extractor = extractor_for(expert, self.settings)
        self.real, self.real_c, self.training, self.c = self._data()
        self.n, data = self.settings.n, self.real if self.training is None else self.training
        if self.settings.protocol is not None and data is not None and len(data) < self.n:
            raise ValueError(
                f"protocol={self.settings.protocol}: {self.n} samples are asked for, and the expert's own data allow {len(data)}; "
                "load it with the protocol's captions and without data, or choose protocol=null for other numbers"
            )
        self.store = None if store is None else self._open(store)
        self.shared = self.store if self.settings.store is None else self._open(Path(self.settings.store) / f"seed{self.settings.seed}")
        self.expert_drawn = self._draw(expert_policy, grid, "ddim", self._baseline_names()[0])
        self.expert_path = self.expert_drawn.path
        self.real_features = self._real_features()
        self.training_read = None if self.training is None or self.settings.images is not None else self._read(self.training)
        if self.real is not None:
            self.real_noised = self._noised(self.real, self._generator("forward"))

    @cached_property
    def _images(self) -> str | None:
        """The folder of pictures as a result names it."""
        return None if self.settings.images is None else folder_digest(Path(self.settings.images))

    @cached_property
    def _data_digest(self) -> tuple[str | None, ...]:
        """Of what samples are held against: the expert's own data, and a folder of pictures."""
        return *(None if x is None else _digest(x) for x in (self.real, self.training)), self._images

    def _data(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The reference and its conditions; training data, where the reference is not they; and their conditions in turn, n of them."""
        try:
            training, own = self.expert.reference_data(self.settings.n)
        except NoDataError:  # data-free: each condition in turn
            ids = torch.arange(self.settings.n, device=self.expert.device)
            return None, None, None, ids % self.expert.num_conditions if self.expert.num_conditions else None
        c = None if own is None else own[torch.arange(self.settings.n, device=own.device) % len(own)]
        try:
            return *self.expert.reference_data(self.settings.n, held_out=True), training, c
        except NoDataError:  # none was held out
            return training, own, None, c

    def _real_features(self) -> Features | None:
        """Of the folder of pictures, or else of the expert's own reference."""
        if self.settings.images is None or self._images is None:
            return None if self.real is None else self._read(self.real)[0]
        files, values = picture_files(Path(self.settings.images)), []
        digest = self._images.rpartition(" ")[2]
        with tqdm(total=len(files), desc="real pictures", unit="picture") as bar:
            for start in range(0, len(files), KEPT):
                part, read = files[start : start + KEPT], []
                place = None if self.shared is None else self.shared / f"images-{digest}-{start:06d}.safetensors"
                if place is not None and place.is_file():
                    values.append(read_tensors(place, "remove it, and its pictures are read again")["features"])
                    bar.update(len(part))
                    continue
                for pictures in load_pictures(part):
                    read.append(self.extractor.features(pictures))
                    bar.update(len(pictures))
                values.append(torch.cat(read).cpu())
                if place is not None:
                    write_atomically(place, save({"features": values[-1]}))
        return Features(self.extractor.name, torch.cat(values).to(self.expert.device))

    def _read(self, samples: Tensor) -> tuple[Features, Tensor | None]:
        """Features (n, d) and classes (n,) of samples (n, *sample_shape), a batch at a time, on the expert's device."""
        values, classes = [], []
        for part in samples.split(self.settings.batch_size):
            seen = self.pictures(part) if self.extractor.of_pictures else part
            values.append(self.extractor.features(seen).to(self.expert.device))
            if (told := self.extractor.classes(seen)) is not None:
                classes.append(told.to(self.expert.device))
        return Features(self.extractor.name, torch.cat(values)), torch.cat(classes) if classes else None

    def pictures(self, samples: Tensor) -> Tensor:
        """Samples (n, *sample_shape) as picture metrics see them, uint8 (n, 256, 256, 3)."""
        pictures = self.expert.decode(samples)
        assert pictures is not None  # checked at the start
        return resize(pictures)

    def _generator(self, name: str, batch: int = 0) -> torch.Generator:
        """Of one kind of a batch's noise, whatever was drawn before it."""
        return torch.Generator(self.expert.device).manual_seed(stream_seed(self.settings.seed, f"{name}, batch {batch}"))

    def _noise_shape(self, batch: int) -> tuple[int, ...]:
        b = self.settings.batch_size
        return min(b, self.n - b * batch), *self.expert.sample_shape

    def noise(self, batch: int = 0) -> Tensor:
        """x_T of a batch, (b, *sample_shape)."""
        return torch.randn(self._noise_shape(batch), generator=self._generator("x_T", batch), device=self.expert.device)

    def _noised(self, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """The forward marginals at the times of the grid, (N, m, *sample_shape), m ≤ n_paths."""
        x_0, draws = x_0[: self.settings.n_paths], []
        for t in self.grid.times[:-1]:
            eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
            draws.append(self.expert.schedule.add_noise(x_0, eps, t.expand(len(x_0))))
        return torch.stack(draws)

    def _open(self, store: Path) -> Path:
        """Makes a store, or takes up one of the same settings."""
        store.mkdir(parents=True, exist_ok=True)
        path, now = store / "settings.json", json.dumps(self._measure() | {"batch_size": self.settings.batch_size})
        if path.is_file() and path.read_text() != now:
            raise ValueError(f"{store} holds an evaluation of other settings; remove it, or choose another")
        write_atomically(path, now)
        return store

    @torch.no_grad()
    def _place(self, name: str | None, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, what: str) -> Path | None:
        """Where something of a model is kept: under its name, and a digest of how it samples, what it does in a state, data and captions.

        Another student of the same name, or an expert of other weights, acts differently and finds nothing. A policy with an `act` of its
        own may hide what it does from that, and is not kept.
        """
        store = self.shared if isinstance(policy, ExpertPolicy) else self.store
        if store is None or name is None or type(policy).act is not DdimPolicy.act:
            return None
        x, nfe, does = self.noise()[:2], self.expert.nfe, []
        for t in grid.times[:-1][:2].unbind():  # some policies differ in all states but the first
            prediction = policy.predict(x, t.expand(len(x)), None if self.c is None else self.c[: len(x)], None)
            does.append(_digest(prediction.projected(policy.support).latent(grid.times[-1:].expand(len(x)), policy.schedule)))
        self.expert.nfe = nfe  # no sample has cost it
        about = (grid.times.tolist(), kernel, policy.nfe_per_action, does, self._data_digest, self._captions())
        return store / f"{name}-{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}-{what}"

    @torch.no_grad()
    def _draw(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None = None) -> Drawn:
        """n samples of a policy, a batch at a time; batches in the store under that name are not drawn again."""
        b, count = self.settings.batch_size, math.ceil(self.n / self.settings.batch_size)
        kept: list[dict[str, Tensor]] = []
        stem = self._place(name, policy, grid, kernel, "")
        for k in tqdm(range(count), desc=name or "samples", unit="batch", disable=count == 1, leave=False):
            place = None if stem is None else stem.with_name(f"{stem.name}{k:05d}.safetensors")
            if place is not None and place.is_file():
                stored = read_tensors(place, "remove it, and the batch is drawn again")
                if stored.keys() >= set(self.settings.scores):
                    others = set(get_args(Score)) - set(self.settings.scores)  # that were not asked for now
                    kept.append({key: value for key, value in stored.items() if key not in others})
                    continue
            start = time.monotonic()
            c = None if self.c is None else self.c[k * b : (k + 1) * b]
            with out_of_memory.named(f"while judging {min(b, self.n)} samples at a time", "lower the evaluation's batch_size"):
                path = unroll(policy, grid, self.noise(k), c, kernel=kernel, generator=self._generator("steps", k))
                if path.is_cuda:
                    torch.cuda.synchronize()
                seconds = torch.tensor(time.monotonic() - start)
                shown = max(self.settings.n_paths - k * b, 0)
                kept.append(self._measured(path[:, -1], c) | {"path": path[:shown].clone(), "seconds": seconds})
            if place is not None:
                write_atomically(place, save({key: value.cpu().contiguous() for key, value in kept[-1].items()}))
        device = self.expert.device
        whole = {key: torch.cat([part[key].to(device) for part in kept]) for key in kept[0] if key != "seconds"}
        features = Features(self.extractor.name, whole.pop("features"))
        path, classes = whole.pop("path"), whole.pop("classes", None)
        means = {key: float(value.double().mean()) for key, value in whole.items()}
        return Drawn(features, classes, means, path, sum(float(part["seconds"]) for part in kept))

    def _measured(self, samples: Tensor, c: Tensor | None) -> dict[str, Tensor]:
        """Features, classes and scores of one batch, each (b, …)."""
        features, classes = self._read(samples)
        found = {"features": features.values} | ({} if classes is None else {"classes": classes})
        if self.scorers:
            assert c is not None  # its captions were asked for at the start
            pictures, captions = self.pictures(samples), self.expert.captions(c)
            found |= {name: scorer.score(pictures, captions) for name, scorer in self.scorers.items()}
        return found

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The scores that were asked for."""
        return load_scorers(self.settings, self.expert.device)

    def to_data(self, features: Features, classes: Tensor | None = None, c: Tensor | None = None) -> dict[str, Any]:
        """Fréchet and kernel distance, precision, recall, density, coverage, Vendi score; accuracy where classes (n,) can be told."""
        result: dict[str, Any] = {"vendi": vendi_score(features)}
        if self.real_features is not None:
            result |= _compared(self.real_features, features)
        if self.training_read is not None:  # by which a model that memorises does better than by held-out data
            found = _compared(self.training_read[0], features)
            result |= {f"{name}_train": found[name] for name in ("frechet", "recall", "coverage")}
        if classes is not None and c is not None:
            result["accuracy"] = float((classes == c).double().mean())
        return result

    def floors(self) -> dict[str, Any]:
        """What a perfect model would score: no model can be asked for less.

        Returns:
            training_data: against the held-out reference, as a perfect model; in the columns `_train` as one that has memorised them.
            real_halves, teacher_halves: two halves of the reference, or of the expert's own states and samples.
            n and n_paths are the numbers of samples and of trajectories on each side. The teacher's halves are matched by class.
            Their frechet_to_expert is the floor of samplers that draw fresh noise, and so share none with the expert: of n samples
            even a perfect one is about half of it away, since this bias goes as 1/n, and nearer where no two samples share a condition,
            which halves then cannot be matched by.
        """
        found: dict[str, Any] = {}
        if self.real is not None and (halves := self._halves(self.real_noised.transpose(0, 1))):
            found["real_halves"] = {"n": halves["n_paths"], **halves}
        theirs = self._halves(self.expert_path[:, :-1])
        theirs = {name + "_to_expert" * (name != "n_paths"): value for name, value in theirs.items()}
        if (half := self.n // 2) >= 2:
            found["teacher_halves"] = {"n": half, "frechet_to_expert": self._between_teachers(half), **theirs}
        if self.settings.images is not None and self.real_features is not None:
            distance = split_half(frechet_distance, self.real_features)
            found.setdefault("real_halves", {}).update({"n": len(self.real_features) // 2, "frechet": distance})
        if self.training is not None and self.training_read is not None:
            noised = self._noised(self.training, self._generator("forward training"))
            m = len(self.training)
            scores = self.to_data(*self.training_read, None if self.c is None else self.c[:m]) | self._shift(noised.transpose(0, 1))
            found["training_data"] = {"n": m, "n_paths": noised.shape[1], **scores}
        return found

    def _shift(self, path: Tensor) -> dict[str, list[float]]:
        """Covariate shift by step: between visited states (m, N or N + 1, *sample_shape) and the forward marginals."""
        if self.real is None:
            return {}
        pairs = [(path[: len(x), i], x[: len(path)]) for i, x in enumerate(self.real_noised)]
        return self._between(pairs, list(self.real_noised), paired=True)

    def _shift_to_expert(self, path: Tensor) -> dict[str, list[float]]:
        """The same from the expert's states, each from the same noise as the policy's of its index: 0 for the expert itself."""
        theirs = [self.expert_path[:, i] for i in range(self.grid.num_steps)]
        found = self._between([(path[:, i], x) for i, x in enumerate(theirs)], theirs, paired=True)
        return {f"{name}_to_expert": values for name, values in found.items()}

    def _halves(self, path: Tensor) -> dict[str, Any]:
        """The floor of all three: between random halves of states (m, N, *sample_shape), where both have two."""
        states = list(path.transpose(0, 1))
        if len(path) < 4:
            return {}
        return {"n_paths": len(path) // 2, **self._between([split_half(lambda a, b: (a, b), x) for x in states], states)}

    def _between_teachers(self, half: int) -> float:
        """Fréchet distance between two sets of the expert's own samples, every other one in order of class."""
        order = torch.arange(self.n) if self.c is None else self.c.argsort(stable=True)
        even, odd = (self.expert_drawn.features[order[k : 2 * half : 2]] for k in (0, 1))
        return frechet_distance(even, odd)

    def _between(self, pairs: list[tuple[Tensor, Tensor]], scale: list[Tensor], paired: bool = False) -> dict[str, list[float]]:
        """Distances by step between two sets of states, each (m, *sample_shape).

        Args:
            pairs: The two sets at each step.
            scale: States that set the width of the kernel.
            paired: Whether two states of one index are of one condition, or started from one noise: the MMD² leaves such pairs out.
        """
        return {
            "shift": [sliced_wasserstein(a, b) for a, b in pairs],
            "mmd_shift": [mmd2(a, b, _width(x), paired=paired) for (a, b), x in zip(pairs, scale, strict=True)],
            "gaussian_shift": [gaussian_w2(a, b) for a, b in pairs],
        }

    @torch.no_grad()
    def judge(self, policy: DdimPolicy, grid: TimeGrid | None = None, kernel: Kernel = "ddim", name: str | None = None) -> dict[str, Any]:
        """Every metric of one policy; lists run over the steps of the grid.

        Args:
            policy: Who is judged.
            grid: Its times, if they are others than the judge's.
            kernel: How it samples.
            name: Under which its batches are kept in the store.

        Returns:
            frechet, kid, precision, recall, density, coverage, vendi, accuracy: samples against the reference.
            frechet_train, recall_train, coverage_train: samples against training data, where the reference is held out.
            frechet_to_expert: samples against the expert's own.
            endpoint_rmse, path_rmse: samples, and the latents after each step, against the expert's from the same noise; None
                where `renoise` draws more noise on the way, which even a perfect student then answers otherwise.
            clip_score, hpsv2, lpips: where they were asked for.
            action_mse_own, action_mse_expert, action_mse_forward: E (a − a*)² per entry on the policy's own states, on the
                expert's and on the forward-diffused reference; action_ratio, the first over the last (over the second without data).
            shift, mmd_shift, gaussian_shift: sliced W2, unbiased MMD² and Gaussian W2 between visited latents and
                the forward-diffused reference; shift_to_expert, mmd_shift_to_expert, gaussian_shift_to_expert: between them and those that
                the expert visits from the same noise, 0 for the expert; this MMD² leaves out the pairs that share their noise.
            diversity: mean distance between two visited latents, per entry.
            nfe_per_sample, seconds: cost of sampling.
            With a grid of its own only the samples are judged: its states are at other times. Under the `renoise` kernel
            the actions are still the next latents of DDIM, taken at the states that the fresh noise leads to.
        """
        drawn = self._draw(policy, grid or self.grid, kernel, name)
        path, m = drawn.path, min(self.settings.n_action, len(drawn.path))
        result = self._scored(drawn, policy, grid or self.grid, kernel, name)
        if grid is not None:
            return result
        c = None if self.c is None else self.c[:m]
        own, theirs, forward = [], [], []
        for i, (t, s) in enumerate(zip(self.grid.times[:-1], self.grid.times[1:], strict=True)):
            at, to = t.expand(m), s.expand(m)
            expert_action = self.expert_policy.act(path[:m, i], at, to, c)
            taken = path[:m, i + 1] if kernel == "ddim" else policy.act(path[:m, i], at, to, c)
            own.append(float((taken - expert_action).square().mean()))
            action = policy.act(self.expert_path[:m, i], at, to, c)
            theirs.append(float((action - self.expert_path[:m, i + 1]).square().mean()))
            if self.real is not None:
                x_t, expert_action = self._forward_actions[i]
                k = len(x_t)
                action = policy.act(x_t, t.expand(k), s.expand(k), None if self.real_c is None else self.real_c[:k])
                forward.append(float((action - expert_action).square().mean()))
        result |= {
            "path_rmse": [_rmse(path[:, i + 1], self.expert_path[:, i + 1]) for i in range(self.grid.num_steps)]
            if _follows(self.grid, kernel)
            else None,
            "action_mse_own": own,
            "action_mse_expert": theirs,
            "action_mse_forward": forward or None,
            "action_ratio": [a / b if b else None for a, b in zip(own, forward or theirs, strict=True)],
            "diversity": [pairwise_distance(path[:, i]) for i in range(self.grid.num_steps + 1)],
        }
        return result | {"shift": None, **self._shift(path), **self._shift_to_expert(path)}

    @cached_property
    def _forward_actions(self) -> list[tuple[Tensor, Tensor]]:
        """Forward-diffused states at each time, and the expert's actions there, each (m, *sample_shape)."""
        noised = self.real_noised[:, : self.settings.n_action]
        m = noised.shape[1]
        c = None if self.real_c is None else self.real_c[:m]
        place = self._place(f"{self._baseline_names()[0]}-on-data", self.expert_policy, self.grid, "ddim", "actions.safetensors")
        if place is not None and place.is_file():
            return list(zip(noised, read_tensors(place, "remove it, and it is made again")["actions"].to(noised.device), strict=True))
        pairs = zip(noised, self.grid.times[:-1], self.grid.times[1:], strict=True)
        actions = torch.stack([self.expert_policy.act(x_t, t.expand(m), s.expand(m), c) for x_t, t, s in pairs])
        if place is not None:
            write_atomically(place, save({"actions": actions.cpu()}))
        return list(zip(noised, actions, strict=True))

    @cached_property
    def _lpips(self) -> Callable[[Tensor, Tensor], Tensor]:
        return lpips_distance(self.settings.weights, device=self.expert.device)

    @torch.no_grad()
    def lpips_diversity(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None = None) -> float:
        """Mean LPIPS between two of a condition's 10 samples, over 50 conditions, each kept; all share the 10 draws of noise."""
        expert, stem = self.expert, self._place(name, policy, grid, kernel, "lpips")
        x_T = torch.randn(IN_GROUP, *expert.sample_shape, generator=self._generator("lpips x_T"), device=expert.device)

        def mean_of(condition: int) -> dict[str, float]:
            c = torch.full((IN_GROUP,), condition, device=expert.device) if expert.num_conditions else None
            group = self.pictures(unroll(policy, grid, x_T, c, kernel=kernel, generator=self._generator("lpips steps"))[:, -1])
            return {"lpips": group_diversity([group], self._lpips)}

        means = []
        for condition in tqdm(range(min(GROUPS, expert.num_conditions or 1)), desc="lpips", unit="condition", leave=False):
            place = None if stem is None else stem.with_name(f"{stem.name}-{condition:03d}.json")
            means.append(_kept(place, partial(mean_of, condition))["lpips"])
        return statistics.fmean(means)

    def sample(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel = "ddim") -> Tensor:
        """A policy's samples from the judge's first batch of noise and conditions, (b, *sample_shape)."""
        x_T = self.noise()
        c = None if self.c is None else self.c[: len(x_T)]
        return unroll(policy, grid, x_T, c, kernel=kernel, generator=self._generator("steps"))[:, -1]

    def baselines(self) -> dict[str, Tensor]:
        """The expert's samples by its full sampler, and by as few steps as the student has."""
        full, few = self._baseline_names()
        return {full: self.expert_path[:, -1], few: self.sample(self.few_steps, self.grid)}

    def judge_baselines(self) -> dict[str, Any]:
        """The metrics of the two; those of few steps are kept in the store, with what the expert would have done instead."""
        full, few = self._baseline_names()
        asked = "-".join(["scores", *self.settings.scores, *["lpips"] * self.settings.lpips])
        place = self._place(f"{few}-beside-{full}", self.few_steps, self.grid, "ddim", f"{asked}.json")
        return {full: self.judge_expert(), few: _kept(place, lambda: self.judge(self.few_steps, name=few))}

    def judge_expert(self) -> dict[str, Any]:
        """The metrics of the expert's own samples, which are there already."""
        scored = self._scored(self.expert_drawn, self.expert_policy, self.grid, "ddim", self._baseline_names()[0])
        at_no_distance = {"frechet_to_expert": 0.0, "endpoint_rmse": 0.0}
        return scored | at_no_distance | self._shift(self.expert_path) | self._shift_to_expert(self.expert_path)

    def _scored(self, drawn: Drawn, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None) -> dict[str, Any]:
        """What a policy's samples score and cost."""
        result = self.to_data(drawn.features, drawn.classes, self.c) | {
            "nfe_per_sample": policy.nfe_per_action * grid.num_steps,
            "frechet_to_expert": frechet_distance(self.expert_drawn.features, drawn.features),
            "endpoint_rmse": _rmse(drawn.path[:, -1], self.expert_path[:, -1]) if _follows(grid, kernel) else None,
            "seconds": drawn.seconds,
            **drawn.scores,
        }
        if self.settings.lpips:
            result["lpips"] = self.lpips_diversity(policy, grid, kernel, name)
        return result

    def _baseline_names(self) -> tuple[str, str]:
        n = self.grid.num_steps
        return f"teacher@{n * self.expert_policy.substeps}", f"teacher@{n}"

    def describe(self) -> dict[str, Any]:
        """What a result must say of how it was measured: results that differ in it are not compared."""
        s, found = self.settings, self._measure()
        if s.protocol is not None:
            found["protocol"] = s.protocol
        if self.extractor.of_pictures or s.scores or s.lpips:
            found["resize"] = RESIZE
        if self._images is not None:
            found["images"] = self._images
        if s.scores:
            found["scores"] = {name: scorer.name for name, scorer in self.scorers.items()}
        if s.lpips:
            found["lpips"] = LPIPS
        if (captions := self._captions()) is not None:
            found["captions"] = captions
        return found

    def _measure(self) -> dict[str, Any]:
        """What all models of a store share."""
        s = self.settings
        return {
            "extractor": self.extractor.name,
            "distance": frechet_name(self.extractor.name),
            "n": self.n,
            "reference": None if self.real is None else "training" if self.training is None else "held_out",
            "n_reference": None if self.real is None else len(self.real),
            "seed": s.seed,
            "n_paths": min(s.n_paths, self.n),
            "n_action": min(s.n_action, s.n_paths, self.n),
            "guidance_scale": self.expert_policy.guidance_scale,
        }

    def _captions(self) -> str | None:
        """A digest of all samples' captions, where conditions are texts."""
        try:
            captions = None if self.c is None else self.expert.captions(self.c)
        except ValueError:
            return None
        return None if captions is None else hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:12]


def _kept(place: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Numbers that are kept in a JSON file of a store."""
    if place is not None and place.is_file():
        try:
            found: dict[str, Any] = json.loads(place.read_text())
        except ValueError as error:
            raise ValueError(f"{place} is damaged ({error}); remove it, and it is made again") from error
        return found
    found = make()
    if place is not None:
        write_atomically(place, json.dumps(found))
    return found


def _compared(real: Features, fake: Features) -> dict[str, float]:
    """Two distances; precision, recall, density and coverage of as many of each, since these move with n."""
    m = min(len(real), len(fake))
    distances = {"frechet": frechet_distance(real, fake), "kid": kernel_distance(real, fake, 100 if m > 1000 else 1, min(m, 1000))[0]}
    return distances | dataclasses.asdict(precision_recall_density_coverage(real[:m], fake[:m]))


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _follows(grid: TimeGrid, kernel: Kernel) -> bool:
    """Whether x_T alone determines the sample."""
    return kernel == "ddim" or grid.num_steps == 1


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def _width(x: Tensor) -> float:
    """The bandwidth of the kernel that all models' states at one time are compared under: the forward marginal's median distance."""
    x = x.flatten(1).double()[:1000]
    return float(torch.pdist(x).median())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path
        return "not installed"


PACKAGES = ("ddil", "torch", "diffusers", "tensordict", "torchrl", "gymnasium", "accelerate")
PROVENANCE = ("date", "hardware", "python", *PACKAGES)


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, date, and the hardware of the device."""
    on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        **{p: _version(p) for p in PACKAGES},
    }


def evaluate_expert(
    expert: Expert, steps: list[int], settings: Evaluation, guidance_scale: float | None = None, store: Path | None = None
) -> dict[str, Any]:
    """The expert's own quality at each number of steps, against the data."""
    most = max(steps)
    judge = Judge(ExpertPolicy(expert, 1, guidance_scale), TimeGrid(expert.schedule, most).to(expert.device), settings, store)
    models = {}
    for n in steps:
        grid = TimeGrid(expert.schedule, n).to(expert.device)
        name, policy = f"teacher@{n}", ExpertPolicy(expert, 1, guidance_scale)
        models[name] = judge.judge_expert() if n == most else judge.judge(policy, grid, name=name)
    return {"settings": judge.describe(), "floors": judge.floors(), "models": models, **provenance(expert.device)}


def judge_student(judge: Judge, agent: str, policy: DdimPolicy, kernel: Kernel, kind: GridKind) -> dict[str, Any]:
    """A student's rows and its teacher's, on the judge's grid and in `also_steps` steps.

    Args:
        judge: Against what.
        agent: What the rows are called, `agent@4`.
        policy: The student.
        kernel, kind: How it samples.
    """
    own = f"{agent}@{judge.grid.num_steps}"
    models = judge.judge_baselines() | {own: judge.judge(policy, kernel=kernel, name=own)}
    for more in judge.settings.also_steps:
        grid = TimeGrid(judge.expert.schedule, more, kind).to(judge.expert.device)
        models.setdefault(few := f"teacher@{more}", judge.judge(judge.few_steps, grid, name=few))
        models.setdefault(own := f"{agent}@{more}", judge.judge(policy, grid, kernel, own))
    return models


def evaluate_run(learner: Agent, settings: Evaluation, store: Path | None = None) -> dict[str, Any]:
    """A student's quality beside its teacher's, on the learner's own grid."""
    judge = Judge(learner.reference, learner.grid, settings, store)
    models = judge_student(judge, learner.name, learner.student_policy, learner.kernel, learner.config.grid)
    return {"settings": judge.describe(), "floors": judge.floors(), "models": models, **provenance(learner.expert.device)}


def _settings_of_expert(run: str | None, env: str) -> dict[str, Any]:
    """The expert's settings in a run's config.yaml, none where there is no such file; or, without a run, in an env preset."""
    if run is None:
        return read_env(env)
    config = Path(run) / "config.yaml"
    return read_yaml(config).get("env") or {} if config.is_file() else {}


def main(argv: list[str] | None = None) -> None:
    from ddil_agents.cli import clear_errors, load_run, with_preset
    from ddil_agents.report import table

    parser = ArgumentParser(
        prog="python -m ddil_agents.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = ", ".join(preset_names("evaluate"))
    parser.add_argument("--config", action="config", help=f"settings as YAML: a file, or one of configs/evaluate: {presets}")
    parser.add_argument("--run", type=str | None, default=None, help="run directory whose student to judge; default: the expert itself")
    parser.add_argument("--env", type=str | None, default=None, help="preset or YAML file of the expert (default: digits); not with --run")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="numbers of sampling steps (default: 32 8 4 2 1); not with --run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="noise seeds")
    parser.add_argument(
        "--guidance_scale",
        type=float | None,
        default=None,
        help="default: the expert's, or the run's; with --run for a student that is told it",
    )
    parser.add_argument(
        "--captions", type=str | None, default=None, help="prompts in the place of the expert's own, or of its data: text or COCO's JSON"
    )
    parser.add_argument("--device", type=str | None, default=None, help="default: the expert's own")
    parser.add_argument("--out", type=str | None, default=None, help="JSON file for the results; beside it, batches until it is done")
    parser.add_class_arguments(Evaluation, None, skip={"seed"})
    with clear_errors(parser):
        args = read_arguments(parser, with_preset("evaluate", sys.argv[1:] if argv is None else argv))
        given = {f.name: args[f.name] for f in dataclasses.fields(Evaluation) if f.name != "seed"}
        out = None if args.out is None else Path(args.out)
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out}: need a file in a folder that exists")
        env: dict[str, Any] = {key: value for key, value in (("device", args.device), ("prompts", args.captions)) if value is not None}
        if args.protocol is not None and args.captions is None:
            raise ValueError(
                f"--protocol {args.protocol}: its samples are of its own captions, not of the expert's prompts; "
                "pass them as --captions FILE, or --protocol null for other numbers"
            )
        if args.run is not None and (args.env is not None or args.steps):
            raise ValueError("--run names expert and steps; leave --env and --steps out (--also_steps judges the run in more steps)")
        if args.run is None and args.captions is not None:
            takes = inspect.signature(find_expert(read_env(args.env or "digits")["expert"])).parameters
            if "prompts" not in takes:
                raise ValueError(f"--captions {args.captions}: the expert of {args.env or 'digits'} takes none; leave it out")
        if args.captions is not None:  # an expert has prompts, or data with captions of their own
            own = _settings_of_expert(args.run, args.env or "digits")
            env |= dict.fromkeys(key for key in ("data", "images", "data_cache") if key in own)
        learner = None if args.run is None else load_run(Path(args.run), args.guidance_scale, **env)
        expert = load_expert(args.env or "digits", **env) if learner is None else learner.expert
        results = []
        for seed in args.seeds:
            store = None if out is None else out.with_name(f".{out.name}.seed{seed}")
            settings = Evaluation(seed=seed, **given)
            if learner is None:
                results.append(evaluate_expert(expert, args.steps or [32, 8, 4, 2, 1], settings, args.guidance_scale, store))
            else:
                results.append(evaluate_run(learner, settings, store))
            print(table(results[-1]), flush=True)
        if out is not None:
            write_atomically(out, json.dumps(results, indent=1))
            for seed in args.seeds:
                shutil.rmtree(out.with_name(f".{out.name}.seed{seed}"))


if __name__ == "__main__":
    main()
