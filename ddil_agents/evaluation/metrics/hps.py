"""Human preference score v2 (Wu et al. 2023): a CLIP score whose network was fine-tuned on human preferences."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from ddil_agents.evaluation.metrics.clip_score import ClipScore
from ddil_agents.evaluation.metrics.pictures import find_weights

REPOSITORY = "xswu/HPSv2"
CHECKPOINTS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPS(ClipScore):
    """HPSv2 as the raw cosine; the benchmark of the `hpsv2` package prints it times 100. Pictures are padded to a square, as there.

    Args:
        weights_dir: The weights, or a folder that holds `HPS_v2.1_compressed.pt` (v2.0: `HPS_v2_compressed.pt`) or the same as
            safetensors; None downloads them from the hub.
        version: `v2.1` or `v2.0`; their values are not comparable.
        device, batch_size: As in `ClipScore`.

    Raises:
        ImportError, ValueError: as `ClipScore`.
    """

    model = "ViT-H-14"

    def __init__(
        self, weights_dir: Path | None = None, version: str = "v2.1", *, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        if version not in CHECKPOINTS:
            raise ValueError(f"unknown version {version!r}; choose one of: {', '.join(CHECKPOINTS)}")
        name = CHECKPOINTS[version]
        if weights_dir is None:
            try:
                weights_dir = Path(hf_hub_download(REPOSITORY, name))
            except OSError as error:
                raise ValueError(
                    f"cannot download {name} ({error}); fetch it from {REPOSITORY} and pass its folder as weights_dir"
                ) from error
        path = find_weights(weights_dir, name, cure=f"download it from the hub's {REPOSITORY}")
        super().__init__(path, self.model, version, resize_mode="longest", device=device, batch_size=batch_size)
        self.name = f"hps_{version}"
