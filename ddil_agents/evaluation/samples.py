"""Drawing the samples of an evaluation, a batch at a time, and keeping what is measured of them, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ddil_agents.devices import out_of_memory
from ddil_agents.evaluation.metrics.diversity import group_diversity, lpips_distance
from ddil_agents.evaluation.metrics.features import Features
from ddil_agents.evaluation.metrics.frechet import frechet_name
from ddil_agents.evaluation.metrics.pictures import folder_digest, resize
from ddil_agents.evaluation.settings import Evaluation, Score, Scorer, extractor_for, load_scorers
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy, ExpertPolicy, NoDataError, TimeGrid, unroll
from ddil_env.mdp import Kernel
from ddil_env.weights import read_tensors

GROUPS, IN_GROUP = 50, 10  # prompts and samples of each, in the diversity of DDIL, Section 5


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


class Shown:
    """A policy whose steps move a progress bar, also within a batch."""

    def __init__(self, policy: DdimPolicy, bar: tqdm[Any]) -> None:
        self.policy, self.bar = policy, bar

    def act(self, *args: Any) -> Tensor:
        return self._moved(self.policy.act(*args))

    def jump(self, *args: Any) -> Tensor:
        return self._moved(self.policy.jump(*args))

    def _moved(self, x_s: Tensor) -> Tensor:
        self.bar.update()
        return x_s


class Samples:
    """n samples of any policy from one noise and one set of conditions, and the data that they are held against.

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
        self.expert = expert_policy.expert
        self.extractor = extractor_for(self.expert, self.settings)
        self.real, self.real_c, self.training, self.c = self._data()
        self.n, data = self.settings.n, self.real if self.training is None else self.training
        if self.settings.protocol is not None and data is not None and len(data) < self.n:
            raise ValueError(
                f"protocol={self.settings.protocol}: {self.n} samples are asked for, and the expert's own data allow {len(data)}; "
                "load it with the protocol's captions and without data, or choose protocol=null for other numbers"
            )
        self.store = None if store is None else self._open(store)
        self.shared = self.store if self.settings.store is None else self._open(Path(self.settings.store) / f"seed{self.settings.seed}")

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
        with tqdm(total=count * grid.num_steps, desc=name or "samples", unit="step", leave=False) as bar:
            for k in range(count):
                place = None if stem is None else stem.with_name(f"{stem.name}{k:05d}.safetensors")
                if place is not None and place.is_file():
                    stored = read_tensors(place, "remove it, and the batch is drawn again")
                    if stored.keys() >= set(self.settings.scores):
                        others = set(get_args(Score)) - set(self.settings.scores)  # that were not asked for now
                        kept.append({key: value for key, value in stored.items() if key not in others})
                        bar.update(grid.num_steps)
                        continue
                start = time.monotonic()
                c = None if self.c is None else self.c[k * b : (k + 1) * b]
                with out_of_memory.explain(f"while judging {min(b, self.n)} samples at a time", "lower the evaluation's batch_size"):
                    shown_policy = cast(DdimPolicy, Shown(policy, bar))
                    path = unroll(shown_policy, grid, self.noise(k), c, kernel=kernel, generator=self._generator("steps", k))
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
            means.append(kept(place, partial(mean_of, condition))["lpips"])
        return statistics.fmean(means)

    def sample(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel = "ddim") -> Tensor:
        """A policy's samples from the judge's first batch of noise and conditions, (b, *sample_shape)."""
        x_T = self.noise()
        c = None if self.c is None else self.c[: len(x_T)]
        return unroll(policy, grid, x_T, c, kernel=kernel, generator=self._generator("steps"))[:, -1]

    def _baseline_names(self) -> tuple[str, str]:
        n = self.grid.num_steps
        return f"teacher@{n * self.expert_policy.substeps}", f"teacher@{n}"

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


def kept(place: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
