"""Small classifiers of digits, whose penultimate layer is the feature extractor for the embedded digits experts.

    python -m ddil_agents.evaluation.metrics.digits_classifier --fit digits --out weights/

They are trained on the `fit` split only, which no teacher is trained on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from ddil_agents.evaluation.metrics.extractor import BATCH, FEATURES, Extractor
from ddil_env.experts.digits import NUM_CLASSES, load_digits, spec_of
from ddil_env.weights import load_weights

CLASSIFIERS = {"digits": "fd_mnist16_clf", "digits8": "fd_digits8_clf"}  # data set → extractor


class DigitsNet(nn.Module):
    """Four convolutions, pooled to 4×4, and a hidden layer of 64 units; 131 thousand parameters at either size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU()),
            nn.AdaptiveAvgPool2d(8),  # (b, 32, size, size) → (b, 32, 8, 8)
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU()),
            nn.AvgPool2d(2),
            nn.Flatten(),  # → (b, 1024)
        )
        self.hidden = nn.Sequential(nn.Linear(1024, FEATURES), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, NUM_CLASSES))
        self.size = size

    def features(self, pictures: Tensor) -> Tensor:
        return self.hidden(self.stem(pictures))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


class DigitsClassifier(Extractor):
    """The penultimate layer of a digit classifier, 64 features.

    Args:
        dataset: `digits` (16×16) or `digits8` (8×8).
        weights: A safetensors file; default: the one that the package contains.

    Raises:
        ValueError: the data set is unknown; the weights are absent, damaged or of another shape.
    """

    def __init__(self, dataset: str, weights: Path | None = None) -> None:
        self.network = DigitsNet(spec_of(dataset).size)
        self.name = CLASSIFIERS[dataset]
        load_weights(self.network, weights or Path(str(files("ddil_agents.evaluation.metrics") / "weights" / f"{self.name}.safetensors")))
        self.network.eval().requires_grad_(False)

    def features(self, samples: Tensor) -> Tensor:
        return self._apply(self.network.features, samples)

    def classes(self, samples: Tensor) -> Tensor:
        return self._apply(self.network, samples).argmax(1)

    def _apply(self, layer: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        """Applies a layer to pictures clamped to [−1, 1], a batch at a time.

        Raises:
            ValueError: the pictures have another shape, there are none, or some are not finite, which the clamp would hide.
        """
        shape = (1, self.network.size, self.network.size)
        if tuple(samples.shape[1:]) != shape or len(samples) == 0:
            raise ValueError(f"{self.name} reads pictures of shape (n, {', '.join(map(str, shape))}), n ≥ 1; got {tuple(samples.shape)}")
        bad = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(samples)} samples hold NaN or infinite values: the sampler diverged")
        self.network.to(samples.device)
        with torch.no_grad():
            return torch.cat([layer(x.float().clamp(-1, 1)) for x in samples.split(BATCH)])


def augment(pictures: Tensor) -> Tensor:
    """Augments pictures (b, 1, h, w): rotation up to ±.2 rad, scale ±10 %, shear, shift by 1/10 of the side, noise with std up to .2."""
    b = len(pictures)
    angle, shear, scale_x, scale_y = (((torch.rand(b) * 2 - 1) * width) for width in (0.2, 0.2, 0.1, 0.1))
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift = (torch.rand(b, 2, 1) * 2 - 1) * 0.2  # the grid spans 2
    rows = [(1 + scale_x) * cos, shear - sin, sin, (1 + scale_y) * cos]
    affine = torch.cat([torch.stack(rows, 1).view(b, 2, 2), shift], 2)  # (b, 2, 3)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures + 1, grid, align_corners=False) - 1  # what moves in is background, −1
    return (moved + torch.rand(b, 1, 1, 1) * 0.2 * torch.randn_like(moved)).clamp(-1, 1)


def fit(dataset: str, out: Path, seed: int = 0, updates: int = 3000, batch_size: int = 64) -> Path:
    """Trains a classifier from scratch on the `fit` split and writes it as float16 safetensors.

    AdamW, learning rate 2e-3, weight decay 1e-2; 5 % of the updates are warm-up, then the rate falls to 0 along a cosine.
    """
    torch.manual_seed(seed)
    pictures, labels = load_digits(dataset, "fit")
    network = DigitsNet(spec_of(dataset).size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates, pct_start=0.05)
    start = time.monotonic()
    for _ in (bar := trange(updates, desc=f"fit {CLASSIFIERS[dataset]}")):
        index = torch.randint(len(labels), (batch_size,))
        loss = F.cross_entropy(network(augment(pictures[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the fit diverged: the last loss is {loss.item()}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{CLASSIFIERS[dataset]}.safetensors"
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path)
    pictures, labels = load_digits(dataset, "test")
    accuracy = (DigitsClassifier(dataset, path).classes(pictures) == labels).double().mean()
    print(f"{updates} updates in {time.monotonic() - start:.0f} s → {path} ({path.stat().st_size / 1e3:.0f} kB)")
    print(f"{CLASSIFIERS[dataset]}: accuracy {accuracy:.2%} on {len(labels)} held-out test pictures")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", choices=[*CLASSIFIERS], required=True, help="the data set whose classifier to fit")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder that receives NAME.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=3000, help="gradient steps")
    kwargs: dict[str, Any] = vars(parser.parse_args(argv))
    fit(kwargs.pop("fit"), **kwargs)


if __name__ == "__main__":
    main()
