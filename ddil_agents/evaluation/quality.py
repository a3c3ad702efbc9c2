"""Quality of samples: FID, KID, precision, recall, density, coverage, Vendi score and accuracy, from features."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddil_agents.evaluation.cache import read_cached, write_cached
from ddil_agents.evaluation.metrics.extractor import Extractor
from ddil_agents.evaluation.metrics.features import Features
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_agents.evaluation.metrics.kid import kernel_distance
from ddil_agents.evaluation.metrics.pictures import load_pictures, picture_files
from ddil_agents.evaluation.metrics.precision_recall import precision_recall_density_coverage
from ddil_agents.evaluation.metrics.vendi import vendi_score

PICTURES_PER_FILE = 1024  # real pictures whose features one file of the cache holds


def read_folder_features(extractor: Extractor, folder: Path, folder_id: str, cache: Path | None, device: torch.device) -> Features:
    """Features of the pictures of a folder, (n, d); those of each 1024 pictures are cached.

    Args:
        extractor: Reads the pictures.
        folder: Where they are.
        folder_id: The digest that tells this folder from others in the cache.
        cache: Folder of the cache; None caches nothing.
        device: Where the features are put.
    """
    files, values = picture_files(folder), []
    with tqdm(total=len(files), desc="real pictures", unit="picture") as bar:
        for start in range(0, len(files), PICTURES_PER_FILE):
            part = files[start : start + PICTURES_PER_FILE]
            path = None if cache is None else cache / f"images-{folder_id}-{start:06d}.safetensors"
            if (cached := read_cached(path, "its pictures are read")) is not None:
                values.append(cached["features"])
                bar.update(len(part))
                continue
            batches = []
            for pictures in load_pictures(part):
                batches.append(extractor.features(pictures))
                bar.update(len(pictures))
            values.append(torch.cat(batches).cpu())
            write_cached(path, {"features": values[-1]})
    return Features(extractor.name, torch.cat(values).to(device))


def score_features(
    features: Features, reference: Features | None, training: Features | None, classes: Tensor | None = None, c: Tensor | None = None
) -> dict[str, Any]:
    """Every metric of a model's samples that their features (n, d) give.

    Args:
        features: Of the samples.
        reference: Of the real data that samples are compared with; None without data.
        training: Of the training data, where the reference is held-out data.
        classes: What the samples are classified as, (n,); None where the extractor is no classifier.
        c: The conditions that they were drawn under, (n,).

    Returns:
        vendi; with a reference also frechet, kid, precision, recall, density and coverage; with training data also frechet_train,
        recall_train and coverage_train; with classes and conditions also accuracy.
    """
    scores: dict[str, Any] = {"vendi": vendi_score(features)}
    if reference is not None:
        scores |= compare_features(reference, features)
    if training is not None:  # a model that memorises scores better against these than against held-out data
        against_training = compare_features(training, features)
        scores |= {f"{name}_train": against_training[name] for name in ("frechet", "recall", "coverage")}
    if classes is not None and c is not None:
        scores["accuracy"] = float((classes == c).double().mean())
    return scores


def compare_features(real: Features, fake: Features) -> dict[str, float]:
    """Fréchet and kernel distance; precision, recall, density and coverage, which depend on n, of equally many of each set."""
    m = min(len(real), len(fake))
    distances = {"frechet": frechet_distance(real, fake), "kid": kernel_distance(real, fake, 100 if m > 1000 else 1, min(m, 1000))[0]}
    return distances | dataclasses.asdict(precision_recall_density_coverage(real[:m], fake[:m]))


def frechet_between_halves(features: Features, c: Tensor | None, half: int) -> float:
    """Fréchet distance between two halves of one set, which take every other sample in order of class.

    Args:
        features: Of the set, (n, d).
        c: Its classes, (n,), or None.
        half: Samples in each half.
    """
    order = torch.arange(len(features)) if c is None or c.is_floating_point() else c.argsort(stable=True)
    even, odd = (features[order[k : 2 * half : 2]] for k in (0, 1))
    return frechet_distance(even, odd)
