import pytest
import torch
from torch import Tensor

from ddil_agents.evaluation.metrics import extractors
from ddil_agents.evaluation.metrics.extractor import Extractor


class Colour(Extractor):
    """Mean colour of a picture, and its spread."""

    name, of_pictures = "colour", True

    def features(self, samples: Tensor) -> Tensor:
        assert samples.dtype == torch.uint8
        assert samples.shape[1:] == (256, 256, 3)
        return torch.cat([samples.float().mean((1, 2)), samples.float().std((1, 2))], 1)


@pytest.fixture
def colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extractors.EXTRACTORS, "colour", Colour)
