"""The Inception-v3 of December 2015, on whose features FID and KID are defined, in torch-fidelity's port from TensorFlow.

inception = Inception(weights_dir)
real = Features(inception.name, torch.cat([inception.features(x) for x in load_pictures(folder)]))
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ddil_agents.evaluation.metrics.extractor import Extractor
from ddil_agents.evaluation.metrics.frechet import FID_EXTRACTOR
from ddil_agents.evaluation.metrics.pictures import check_pictures, digest_weights, import_optional, pretrained_tensors


class Inception(Extractor):
    """2048 pooled features of uint8 pictures (n, height, width, 3), which the network resizes to 299×299 as TensorFlow 1 did.

    First resize all pictures in the same way (`pictures.resize`), because every resizing changes FID.

    Args:
        weights_dir: The weights, or a folder that holds `weights-inception-2015-12-05-6726825d.pth` (or
            `pt_inception-2015-12-05-6726825d.pth`, or safetensors); None downloads them.
        device: Where the network runs.
        batch_size: Pictures in one forward.

    Raises:
        ImportError: without the `eval` extra.
        ValueError: the weights are absent, unsafe or of another network.
    """

    name = FID_EXTRACTOR
    of_pictures = True

    def __init__(self, weights_dir: Path | None = None, device: str | torch.device = "cpu", batch_size: int = 32) -> None:
        fidelity = import_optional("torch_fidelity.feature_extractor_inceptionv3")
        tensors, where = pretrained_tensors(weights_dir, fidelity.URL_INCEPTION_V3, "pt_inception-2015-12-05-6726825d.pth")
        safe = io.BytesIO()  # torch-fidelity unpickles any file, so it is given one that was written here
        torch.save(tensors, safe)
        safe.seek(0)
        try:
            network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
        except RuntimeError as error:
            raise ValueError(f"{where} does not fit torch-fidelity's Inception-v3: {error}") from error
        self.weights = digest_weights(network)
        self.network, self.device, self.batch_size = network.to(device), device, batch_size

    @torch.no_grad()
    def features(self, samples: Tensor) -> Tensor:
        check_pictures(samples)
        batches = (x.to(self.device).permute(0, 3, 1, 2) for x in samples.split(self.batch_size))
        return torch.cat([self.network(x)[0].to(samples.device) for x in batches])
