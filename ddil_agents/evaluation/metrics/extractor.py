"""The base class of feature extractors, and the two that need no weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

FEATURES = 64
BATCH = 1024  # samples in one forward


class Extractor(ABC):
    """Maps samples (n, *sample_shape) to features (n, d) float32, on the samples' device and without gradient.

    Attributes:
        name: Its name in results.
        weights: A digest of its weights; None where they are none, or this package's own.
        of_pictures: Whether it reads uint8 pictures (n, height, width, 3) in place of samples.
    """

    name: str
    weights: str | None = None
    of_pictures: ClassVar[bool] = False

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor:
        """Features (n, d) float32 of samples (n, *sample_shape), or of pictures where `of_pictures`."""

    def classes(self, samples: Tensor) -> Tensor | None:
        """Predicted classes (n,) int64 of the same input, or None where the extractor is no classifier."""
        return None


class Identity(Extractor):
    """The samples themselves, flattened."""

    name = "identity"

    def features(self, samples: Tensor) -> Tensor:
        features = samples.detach().flatten(1).float()
        if features.shape[1] > 4096:  # their covariance takes 134 MB and a minute
            raise ValueError(f"samples of {features.shape[1]} numbers are too long to be their own features; name another extractor")
        return features


class LatentPool(Extractor):
    """Latents averaged over 64 cells, 64 · channels features: the cells are 64 along a sequence, 8×8 of a picture, 4×4×4 of a video."""

    name = "latent_pool8"

    def features(self, samples: Tensor) -> Tensor:
        if not 3 <= samples.ndim <= 5:
            raise ValueError(f"{self.name} reads latents (n, channels, *axes) of one to three axes; got {tuple(samples.shape)}")
        latents = samples.detach().float()
        if samples.ndim == 3:
            return F.adaptive_avg_pool1d(latents, 64).flatten(1)
        if samples.ndim == 5:
            return F.adaptive_avg_pool3d(latents, 4).flatten(1)
        return F.adaptive_avg_pool2d(latents, 8).flatten(1)
