"""Feature extractors by name: each maps samples to features, and to classes where it is a classifier.

`identity`        the sample itself, flattened, for vectors and mixtures.
`latent_pool8`    latents averaged over 64 cells, an 8×8 grid of pictures: coarse, but available for every latent diffusion model.
`fd_mnist16_clf`  a small classifier of 16×16 MNIST; 97.4 % right on the 700 held-out test pictures.
`fd_digits8_clf`  the same for scikit-learn's 8×8 digits; 99.8 % right on 497 test pictures.
`fd_coloured_digits`  decoded coloured digits: digit, ink and ground (coloured_digits.py); the class is the caption that describes them.
`inception_v3_2015`  decoded pictures; the features of FID, whose weights are downloaded or given (inception.py).

The classifiers are trained on the `fit` split only: a classifier that had been trained on the teacher's data would favour samples that
the teacher has memorised. Train them again by

    python -m ddil_agents.evaluation.metrics.digits_classifier --fit digits --out weights/

To add an extractor, subclass `Extractor` and register it: `EXTRACTORS["name"] = MyExtractor`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ddil_agents.evaluation.metrics.digits_classifier import CLASSIFIERS, DigitsClassifier
from ddil_agents.evaluation.metrics.extractor import Extractor, Identity, LatentPool
from ddil_agents.evaluation.metrics.frechet import FID_EXTRACTOR
from ddil_agents.evaluation.metrics.inception import Inception


def _coloured_digits() -> Extractor:
    from ddil_agents.evaluation.metrics.coloured_digits import ColouredDigitReader  # loads diffusers, which takes seconds

    return ColouredDigitReader()


EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "identity": Identity,
    "latent_pool8": LatentPool,
    "fd_coloured_digits": _coloured_digits,
    **{name: partial(DigitsClassifier, dataset) for dataset, name in CLASSIFIERS.items()},
}


def load_extractor(name: str, weights_dir: Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Loads an extractor.

    Args:
        name: A key of EXTRACTORS, or `inception_v3_2015`.
        weights_dir: Where Inception's weights are; None downloads them.
        device: Where Inception runs; the others run where their samples are.

    Raises:
        ValueError: the name is unknown, or the weights are absent.
    """
    if name == FID_EXTRACTOR:
        return Inception(weights_dir, device)
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; choose one of: {', '.join([*EXTRACTORS, FID_EXTRACTOR])}")
    return EXTRACTORS[name]()


def default_extractor(expert: object) -> str:
    """The `extractor` attribute of an expert; `identity` where it has none."""
    return str(getattr(expert, "extractor", "identity"))
