"""What the metrics see of a sample: its features, and its class where the extractor is a classifier.

`identity`        the sample itself, flattened: vectors and mixtures.
`latent_pool8`    latents averaged over 64 cells, an 8×8 grid of pictures: a coarse, always available judge of latent diffusion models.
`fd_mnist16_clf`  a small classifier of 16×16 MNIST; 97.4 % right on the 700 held-out test pictures.
`fd_digits8_clf`  the same for scikit-learn's 8×8 digits; 99.8 % right on 497 test pictures.
`fd_coloured_digits`  of decoded coloured digits: digit, ink and ground (coloured_digits.py); its class is the caption that is shown.
`inception_v3_2015`  of decoded pictures, the features of FID; its weights are fetched or given (inception.py).

The classifiers are fitted on the `fit` split alone: one that had seen the teacher's data would favour what the teacher
remembers of it. Fit them again by

    python -m ddil_agents.evaluation.metrics.digits_classifier --fit digits --out weights/

An extractor of one's own is a subclass, entered as `EXTRACTORS["name"] = MyExtractor`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ddil_agents.evaluation.metrics.digits_classifier import CLASSIFIERS, DigitsClassifier
from ddil_agents.evaluation.metrics.extractor import Extractor, Identity, LatentPool
from ddil_agents.evaluation.metrics.frechet import FID_EXTRACTOR


def _coloured_digits() -> Extractor:
    from ddil_agents.evaluation.metrics.coloured_digits import ColouredDigitReader

    return ColouredDigitReader()


EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "identity": Identity,
    "latent_pool8": LatentPool,
    "fd_coloured_digits": _coloured_digits,
    **{name: partial(DigitsClassifier, dataset) for dataset, name in CLASSIFIERS.items()},
}


def load_extractor(name: str, weights_dir: Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of that name.

    Args:
        name: A key of EXTRACTORS, or `inception_v3_2015`.
        weights_dir: Where Inception's weights are; None downloads them.
        device: Where Inception runs; the others follow their samples.

    Raises:
        ValueError: unknown name, or no weights.
    """
    if name == FID_EXTRACTOR:
        from ddil_agents.evaluation.metrics.inception import Inception

        return Inception(weights_dir, device)
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; choose one of: {', '.join([*EXTRACTORS, FID_EXTRACTOR])}")
    return EXTRACTORS[name]()


def default_extractor(expert: object) -> str:
    """The name of the extractor that an expert's `extractor` attribute asks for; `identity` where it has none."""
    return str(getattr(expert, "extractor", "identity"))
