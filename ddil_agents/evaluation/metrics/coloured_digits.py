"""Reads a picture of a coloured digit: the digit by a classifier, ink and ground, the colours of digit and background, from its pixels.

    ground = the colour of the palette nearest to the border's median
    ink    = the one nearest to the mean of the 3 % of pixels that differ most from it
    cover  = ⟨x − ground, ink − ground⟩ / ‖ink − ground‖², clamped to [0, 1]           the digit in grey, which the classifier reads

The class of a picture is the caption that describes it, so accuracy is the share of samples that show what their caption says. On real
pictures it reads every colour right, and the digit as often as the classifier `fd_mnist16_clf` does.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ddil_agents.evaluation.metrics.digits_classifier import DigitsClassifier
from ddil_agents.evaluation.metrics.extractor import Extractor
from ddil_env.experts.coloured_digits import SIZE, combinations, palette

NUM_INK_PIXELS = 31  # of the 1024 pixels; every digit has at least as many


class ColouredDigitReader(Extractor):
    """70 features of a coloured digit: 64 of its cover by the digit classifier, 3 each of its ink and its ground. Classes are captions."""

    name = "fd_coloured_digits"
    of_pictures: ClassVar[bool] = True

    def __init__(self) -> None:
        self.classifier = DigitsClassifier("digits")

    def features(self, samples: Tensor) -> Tensor:
        cover, ink, ground = self.read(samples)
        return torch.cat([self.classifier.features(cover), palette()[ink], palette()[ground]], 1)

    def classes(self, samples: Tensor) -> Tensor:
        """Index of the caption that describes each picture, (n,)."""
        cover, ink, ground = self.read(samples)
        shown = torch.stack([self.classifier.classes(cover), ink, ground], 1)  # (n, 3)
        return (shown[:, None] == combinations()).all(2).int().argmax(1)  # a caption exists for every digit, ink and different ground

    def read(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cover (n, 1, 16, 16) in [−1, 1], ink (n,) and ground (n,) of uint8 pictures (n, height, width, 3)."""
        x = F.interpolate(pictures.cpu().permute(0, 3, 1, 2).float() / 127.5 - 1, size=(SIZE, SIZE), mode="area")  # (n, 3, 32, 32)
        border = torch.ones(SIZE, SIZE, dtype=torch.bool)
        border[2:-2, 2:-2] = False
        ground = self._nearest(x[:, :, border].median(2).values)
        off = x - palette()[ground][:, :, None, None]
        inked = off.square().sum(1).flatten(1).topk(NUM_INK_PIXELS).indices  # (n, 31)
        mean = x.flatten(2).gather(2, inked[:, None].expand(-1, 3, -1)).mean(2)  # (n, 3)
        ink = self._nearest(mean, excluding=ground)
        axis = (palette()[ink] - palette()[ground])[:, :, None, None]
        cover = ((off * axis).sum(1, keepdim=True) / axis.square().sum(1, keepdim=True)).clamp(0, 1)
        return F.avg_pool2d(cover, 2) * 2 - 1, ink, ground

    def _nearest(self, colour: Tensor, excluding: Tensor | None = None) -> Tensor:
        """Index of the palette's nearest colour to each colour (n, 3), (n,); never that of `excluding` (n,)."""
        distance = torch.cdist(colour, palette())
        if excluding is not None:
            distance.scatter_(1, excluding[:, None], torch.inf)
        return distance.argmin(1)
