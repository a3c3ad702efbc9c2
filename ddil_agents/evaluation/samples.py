"""Drawing the samples of an evaluation, a batch at a time; each finished batch is cached, so that a killed evaluation continues."""

from __future__ import annotations

import math
import statistics
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from ddil_agents.devices import out_of_memory
from ddil_agents.evaluation.cache import (
    is_cacheable,
    open_cache,
    policy_digest,
    read_cached,
    read_or_compute,
    tensor_digest,
    text_digest,
    write_cached,
)
from ddil_agents.evaluation.metrics.diversity import LPIPSDistance, group_diversity, lpips_distance
from ddil_agents.evaluation.metrics.features import Features
from ddil_agents.evaluation.metrics.frechet import frechet_name
from ddil_agents.evaluation.metrics.pictures import folder_digest, resize
from ddil_agents.evaluation.settings import Evaluation, Score, Scorer, extractor_for, load_scorers
from ddil_agents.states.collect import stream_seed
from ddil_env import DdimPolicy, ExpertPolicy, NoDataError, TimeGrid, unroll
from ddil_env.mdp import Kernel

LPIPS_CONDITIONS, LPIPS_SAMPLES = 50, 10  # prompts, and samples of each, in the LPIPS diversity of DDIL, Section 5


class DrawnSamples(NamedTuple):
    """What an evaluation stores of n samples of one model."""

    features: Features
    """(n, d)."""
    classes: Tensor | None
    """(n,) where the extractor is a classifier, else None."""
    scores: dict[str, float]
    """Mean of each score over the samples."""
    path: Tensor
    """The first trajectories, (n_paths, N + 1, *sample_shape)."""
    seconds: float
    """Time that sampling took."""


class ProgressPolicy:
    """A policy that moves a progress bar by one with every step, so that the bar moves within a batch too."""

    def __init__(self, policy: DdimPolicy, bar: tqdm[Any]) -> None:
        self.policy, self.bar = policy, bar

    def act(self, *args: Any) -> Tensor:
        return self._advance(self.policy.act(*args))

    def act_renoise(self, *args: Any) -> Tensor:
        return self._advance(self.policy.act_renoise(*args))

    def _advance(self, x_s: Tensor) -> Tensor:
        self.bar.update()
        return x_s


class SampleDrawer:
    """Draws n samples of any policy from the same noise and conditions, and holds the data that samples are compared with.

    Args:
        expert_policy: The teacher as students imitate it, on the grid below.
        grid: The N steps of the students.
        settings: How many samples, which seed, which extractor.
        store: Folder of the cache, so that a killed evaluation continues; None caches nothing. The teacher's samples are cached in
            `settings.store` instead, if that is given.

    Attributes:
        real, real_c: The reference that samples are compared with, held-out data where there are any, (m, *sample_shape), and its
            condition ids (m,); None without data.
        training: The training data, where the reference is held-out data; else None.
        c: Condition ids of the n samples, (n,), or None.

    Raises:
        ValueError: an unknown extractor; pictures or captions are needed and the expert has none; a cache of other settings; or fewer
            samples than the protocol prescribes.
    """

    def __init__(self, expert_policy: ExpertPolicy, grid: TimeGrid, settings: Evaluation | None = None, store: Path | None = None) -> None:
        self.settings = settings or Evaluation()
        self.expert_policy, self.grid = expert_policy, grid
        self.expert = expert_policy.expert
        self.extractor = extractor_for(self.expert, self.settings)
        self.real, self.real_c, self.training, self.c = self._load_data()
        self.n, data = self.settings.n, self.real if self.training is None else self.training
        if self.settings.protocol is not None and data is not None and len(data) < self.n:
            raise ValueError(
                f"protocol={self.settings.protocol}: {self.n} samples are asked for, and the expert's own data allow {len(data)}; "
                "load it with the protocol's captions and without data, or choose protocol=null for other numbers"
            )
        cache_settings = self._base_settings() | {"batch_size": self.settings.batch_size}
        self.cache = None if store is None else open_cache(store, cache_settings)
        shared = self.settings.store
        self.expert_cache = self.cache if shared is None else open_cache(Path(shared) / f"seed{self.settings.seed}", cache_settings)

    @cached_property
    def _image_folder_digest(self) -> str | None:
        """Identifies the folder of real pictures in a result: their number, and a digest."""
        store = None if self.settings.store is None else Path(self.settings.store)
        return None if self.settings.images is None else folder_digest(Path(self.settings.images), store)

    @cached_property
    def _data_digest(self) -> tuple[str | None, ...]:
        """Digests of what samples are compared with: reference, training data, folder of pictures."""
        return *(None if x is None else tensor_digest(x) for x in (self.real, self.training)), self._image_folder_digest

    def _load_data(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Reads `real`, `real_c`, `training` and `c`: the conditions of the training data, repeated up to n."""
        try:
            training, own = self.expert.reference_data(self.settings.n)
        except NoDataError:  # data-free: each condition in turn
            ids = torch.arange(self.settings.n, device=self.expert.device)
            return None, None, None, ids % self.expert.num_conditions if self.expert.num_conditions else None
        c = None if own is None else own[torch.arange(self.settings.n, device=own.device) % len(own)]
        try:
            return *self.expert.reference_data(self.settings.n, held_out=True), training, c
        except NoDataError:  # the expert holds no data out
            return training, own, None, c

    def extract_features(self, samples: Tensor) -> tuple[Features, Tensor | None]:
        """Features (n, d) and classes (n,) of samples (n, *sample_shape), a batch at a time, on the expert's device."""
        values, classes = [], []
        for batch in samples.split(self.settings.batch_size):
            inputs = self.pictures(batch) if self.extractor.of_pictures else batch
            values.append(self.extractor.features(inputs).to(self.expert.device))
            if (predicted := self.extractor.classes(inputs)) is not None:
                classes.append(predicted.to(self.expert.device))
        return Features(self.extractor.name, torch.cat(values)), torch.cat(classes) if classes else None

    def pictures(self, samples: Tensor) -> Tensor:
        """Samples (n, *sample_shape) as picture metrics read them, uint8 (n, 256, 256, 3)."""
        pictures = self.expert.decode(samples)
        assert pictures is not None  # checked by extractor_for
        return resize(pictures)

    def _generator(self, name: str, batch: int = 0) -> torch.Generator:
        """A fresh generator for one kind of noise of one batch: what was drawn before does not change it."""
        return torch.Generator(self.expert.device).manual_seed(stream_seed(self.settings.seed, f"{name}, batch {batch}"))

    def noise(self, batch: int = 0) -> Tensor:
        """x_T of a batch, (b, *sample_shape)."""
        b = min(self.settings.batch_size, self.n - self.settings.batch_size * batch)
        return torch.randn((b, *self.expert.sample_shape), generator=self._generator("x_T", batch), device=self.expert.device)

    def _cache_path(self, name: str | None, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, suffix: str) -> Path | None:
        """The file in which something of a model is cached: NAME-DIGEST-SUFFIX; None where nothing is cached.

        Another student of the same name, or a teacher of other weights, has another digest. A policy that overrides `act` is not cached:
        the digest cannot see what it does.
        """
        cache = self.expert_cache if isinstance(policy, ExpertPolicy) else self.cache
        if cache is None or name is None or not is_cacheable(policy):
            return None
        x, nfe = self.noise()[:2], self.expert.nfe
        c = None if self.c is None else self.c[: len(x)]
        digest = policy_digest(policy, grid, kernel, x, c, self._data_digest, self._captions_digest())
        self.expert.nfe = nfe  # the forwards of the digest are no cost of sampling
        return cache / f"{name}-{digest}-{suffix}"

    @torch.no_grad()
    def _draw(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None = None) -> DrawnSamples:
        """Draws n samples of a policy, a batch at a time; reads the batches that are cached under the name."""
        b, num_batches = self.settings.batch_size, math.ceil(self.n / self.settings.batch_size)
        batches: list[dict[str, Tensor]] = []
        stem = self._cache_path(name, policy, grid, kernel, "")
        with tqdm(total=num_batches * grid.num_steps, desc=name or "samples", unit="step", leave=False) as bar:
            for k in range(num_batches):
                path = None if stem is None else stem.with_name(f"{stem.name}{k:05d}.safetensors")
                cached = read_cached(path, "the batch is drawn")
                if cached is not None and cached.keys() >= set(self._score_keys.values()):
                    scores = {key for key in cached if key.partition(" ")[0] in get_args(Score)}
                    other_scores = scores - set(self._score_keys.values())  # that an earlier evaluation asked for
                    batches.append({key: value for key, value in cached.items() if key not in other_scores})
                    bar.update(grid.num_steps)
                    continue
                start = time.monotonic()
                c = None if self.c is None else self.c[k * b : (k + 1) * b]
                with out_of_memory.explain(f"while evaluating {min(b, self.n)} samples at a time", "lower the evaluation's batch_size"):
                    actor = cast(DdimPolicy, ProgressPolicy(policy, bar))
                    states = unroll(actor, grid, self.noise(k), c, kernel=kernel, generator=self._generator("steps", k))
                    if states.is_cuda:
                        torch.cuda.synchronize()
                    seconds = torch.tensor(time.monotonic() - start)
                    num_paths = max(self.settings.n_paths - k * b, 0)
                    measured = self._measure_batch(states[:, -1], c)
                    batches.append(measured | {"path": states[:num_paths].clone(), "seconds": seconds})
                write_cached(path, batches[-1])
        device = self.expert.device
        joined = {key: torch.cat([batch[key].to(device) for batch in batches]) for key in batches[0] if key != "seconds"}
        features = Features(self.extractor.name, joined.pop("features"))
        path_states, classes = joined.pop("path"), joined.pop("classes", None)
        means = {name: float(joined[key].double().mean()) for name, key in self._score_keys.items()}
        return DrawnSamples(features, classes, means, path_states, sum(float(batch["seconds"]) for batch in batches))

    def _measure_batch(self, samples: Tensor, c: Tensor | None) -> dict[str, Tensor]:
        """Features, classes and scores of one batch, each (b, …)."""
        features, classes = self.extract_features(samples)
        measured = {"features": features.values} | ({} if classes is None else {"classes": classes})
        if self.scorers:
            assert c is not None  # extractor_for has read captions
            pictures, captions = self.pictures(samples), self.expert.captions(c)
            measured |= {self._score_keys[name]: scorer.score(pictures, captions) for name, scorer in self.scorers.items()}
        return measured

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The networks of `settings.scores`, by name of the score."""
        return load_scorers(self.settings, self.expert.device)

    @cached_property
    def _score_keys(self) -> dict[str, str]:
        """The names of scores in a batch's file, by name of the score: those by other weights are no scores of this evaluation."""
        return {name: f"{name} {scorer.weights}" for name, scorer in self.scorers.items()}

    def digests_of_weights(self) -> dict[str, str]:
        """Digests of the weights of extractor, scorers and LPIPS, as far as this evaluation has any."""
        own = {} if self.extractor.weights is None else {"extractor": self.extractor.weights}
        lpips = {"lpips": self._lpips.weights} if self.settings.lpips else {}
        return own | {name: scorer.weights for name, scorer in self.scorers.items()} | lpips

    @cached_property
    def _lpips(self) -> LPIPSDistance:
        return lpips_distance(self.settings.weights, device=self.expert.device)

    @torch.no_grad()
    def lpips_diversity(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, name: str | None = None) -> float:
        """Mean LPIPS between two of a condition's 10 samples, over 50 conditions; all conditions start from the same 10 draws of noise.

        The mean of each condition is cached.
        """
        expert, stem = self.expert, self._cache_path(name, policy, grid, kernel, f"lpips-{self._lpips.weights}")
        x_T = torch.randn(LPIPS_SAMPLES, *expert.sample_shape, generator=self._generator("lpips x_T"), device=expert.device)

        def measure_condition(condition: int) -> dict[str, float]:
            c = torch.full((LPIPS_SAMPLES,), condition, device=expert.device) if expert.num_conditions else None
            group = self.pictures(unroll(policy, grid, x_T, c, kernel=kernel, generator=self._generator("lpips steps"))[:, -1])
            return {"lpips": group_diversity([group], self._lpips)}

        means = []
        for condition in tqdm(range(min(LPIPS_CONDITIONS, expert.num_conditions or 1)), desc="lpips", unit="condition", leave=False):
            path = None if stem is None else stem.with_name(f"{stem.name}-{condition:03d}.json")
            means.append(read_or_compute(path, partial(measure_condition, condition))["lpips"])
        return statistics.fmean(means)

    def sample(self, policy: DdimPolicy, grid: TimeGrid, kernel: Kernel = "ddim") -> Tensor:
        """A policy's samples from the first batch of noise and conditions, (b, *sample_shape)."""
        x_T = self.noise()
        c = None if self.c is None else self.c[: len(x_T)]
        return unroll(policy, grid, x_T, c, kernel=kernel, generator=self._generator("steps"))[:, -1]

    def _baseline_names(self) -> tuple[str, str]:
        """Names of the teacher in its full number of steps, and in as few as the student has."""
        n = self.grid.num_steps
        return f"teacher@{n * self.expert_policy.substeps}", f"teacher@{n}"

    def _base_settings(self) -> dict[str, Any]:
        """The settings that all models in one cache share."""
        s = self.settings
        return {
            "extractor": self.extractor.name,
            **({} if self.extractor.weights is None else {"weights": {"extractor": self.extractor.weights}}),
            "distance": frechet_name(self.extractor.name),
            "n": self.n,
            "reference": None if self.real is None else "training" if self.training is None else "held_out",
            "n_reference": None if self.real is None else len(self.real),
            "seed": s.seed,
            "n_paths": min(s.n_paths, self.n),
            "n_action": min(s.n_action, s.n_paths, self.n),
            "guidance_scale": self.expert_policy.guidance_scale,
        }

    def _captions_digest(self) -> str | None:
        """A digest of the captions of all samples; None where conditions are not texts."""
        try:
            captions = None if self.c is None else self.expert.captions(self.c)
        except ValueError:
            return None
        return None if captions is None else text_digest(captions)
