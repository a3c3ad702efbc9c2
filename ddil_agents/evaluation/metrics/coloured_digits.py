"""Whether a coloured digit shows what its caption says, measured exactly: the digit by a classifier, both colours by pixels.

    ground = the colour of the palette nearest to the border's median
    ink    = the one nearest to the mean of the 3 % of pixels that differ most from it
    cover  = ⟨x − ground, ink − ground⟩ / ‖ink − ground‖², clamped to [0, 1]           the digit in grey, as `fd_mnist16_clf` knows it

Of real pictures it reads all colours right, and the digit as often as the classifier does.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ddil_agents.evaluation.metrics.digits_classifier import DigitsClassifier
from ddil_agents.evaluation.metrics.extractor import Extractor
from ddil_env.experts.coloured_digits import SIZE, combinations, palette

INKED = 31  # pixels of 32×32 that certainly are ink


class ColouredDigitReader(Extractor):
    """Features (70) of a coloured digit: those of its cover by the digit classifier, its ink and its ground; its class is its caption."""

    name = "fd_coloured_digits"
    of_pictures: ClassVar[bool] = True

    def __init__(self) -> None:
        self.classifier = DigitsClassifier("digits")

    def features(self, samples: Tensor) -> Tensor:
        cover, ink, ground = self.read(samples)
        return torch.cat([self.classifier.features(cover), palette()[ink], palette()[ground]], 1)

    def classes(self, samples: Tensor) -> Tensor:
        """The place of the caption that a picture deserves, (n,)."""
        cover, ink, ground = self.read(samples)
        shown = torch.stack([self.classifier.classes(cover), ink, ground], 1)  # (n, 3)
        return (shown[:, None] == combinations()).all(2).int().argmax(1)  # every digit, ink and other ground has a caption

    def read(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cover (n, 1, 16, 16) in [−1, 1], ink (n,) and ground (n,) of uint8 pictures (n, height, width, 3)."""
        x = F.interpolate(pictures.cpu().permute(0, 3, 1, 2).float() / 127.5 - 1, size=(SIZE, SIZE), mode="area")  # (n, 3, 32, 32)
        border = torch.ones(SIZE, SIZE, dtype=torch.bool)
        border[2:-2, 2:-2] = False
        ground = self._nearest(x[:, :, border].median(2).values)
        off = x - palette()[ground][:, :, None, None]
        inked = off.square().sum(1).flatten(1).topk(INKED).indices  # (n, 31)
        mean = x.flatten(2).gather(2, inked[:, None].expand(-1, 3, -1)).mean(2)  # (n, 3)
        ink = self._nearest(mean, besides=ground)
        axis = (palette()[ink] - palette()[ground])[:, :, None, None]
        cover = ((off * axis).sum(1, keepdim=True) / axis.square().sum(1, keepdim=True)).clamp(0, 1)
        return F.avg_pool2d(cover, 2) * 2 - 1, ink, ground

    def _nearest(self, colour: Tensor, besides: Tensor | None = None) -> Tensor:
        """The place in the palette nearest to each colour (n, 3), (n,)."""
        distance = torch.cdist(colour, palette())
        if besides is not None:
            distance.scatter_(1, besides[:, None], torch.inf)
        return distance.argmin(1)
