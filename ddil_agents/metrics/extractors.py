"""What the metrics see of a sample: its features, and its class where the extractor is a classifier.

`identity`        the sample itself, flattened: vectors and mixtures.
`latent_pool8`    latents averaged over 64 cells, an 8×8 grid of pictures: a coarse, always available judge of latent diffusion models.
`fd_mnist16_clf`  a small classifier of 16×16 MNIST; 97.4 % right on the 700 held-out test pictures.
`fd_digits8_clf`  the same for scikit-learn's 8×8 digits; 99.8 % right on 497 test pictures.
`fd_coloured_digits`  of decoded coloured digits: digit, ink and ground (coloured_digits.py); its class is the caption that is shown.
`inception_v3_2015`  of decoded pictures, the features of FID; its weights are fetched or given (inception.py).

The classifiers are fitted on the `fit` split alone: one that had seen the teacher's data would favour what the teacher
remembers of it. Fit them again by

    python -m ddil_agents.metrics.extractors --fit digits --out weights/

An extractor of one's own is a subclass, entered as `EXTRACTORS["name"] = MyExtractor`.
"""

from __future__ import annotations

import argparse
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddil_agents.metrics.frechet import FID_EXTRACTOR
from ddil_env.experts.digits import NUM_CLASSES, load_digits, spec_of
from ddil_env.weights import load_weights

CLASSIFIERS = {"digits": "fd_mnist16_clf", "digits8": "fd_digits8_clf"}  # data set → extractor
FEATURES = 64
BATCH = 1024  # samples a forward


class Extractor(ABC):
    """Maps samples (n, *sample_shape) to features (n, d) float32, on the samples' device and without gradient.

    Attributes:
        name: What results call it.
        of_pictures: Whether it reads uint8 pictures (n, height, width, 3) in place of samples.
    """

    name: str
    of_pictures: ClassVar[bool] = False

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor:
        """Features of samples (n, *sample_shape) → (n, d) float32."""

    def classes(self, samples: Tensor) -> Tensor | None:
        """Classes (n,) int64 of what `features` reads, or None where the extractor is no classifier."""
        return None


class Identity(Extractor):
    """The samples themselves, flattened."""

    name = "identity"

    def features(self, samples: Tensor) -> Tensor:
        features = samples.detach().flatten(1).float()
        if features.shape[1] > 4096:  # a covariance of 4096 numbers takes 134 MB and a minute; longer samples are no features
            raise ValueError(f"samples of {features.shape[1]} numbers are too long to be their own features; name another extractor")
        return features


class LatentPool(Extractor):
    """Latents averaged over the cells of a grid, 64 · channels features: 64 of a sequence, 8×8 of a picture, 4×4×4 of a video."""

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


class DigitsNet(nn.Module):
    """Four convolutions, pooled to 4×4, and a hidden layer of 64: 131 k parameters at either size."""

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
        weights: A safetensors file of one's own; default: the shipped one.

    Raises:
        ValueError: unknown data set, or weights that are absent, damaged or of another shape.
    """

    def __init__(self, dataset: str, weights: Path | None = None) -> None:
        self.network = DigitsNet(spec_of(dataset).size)
        self.name = CLASSIFIERS[dataset]
        load_weights(self.network, weights or Path(str(files("ddil_agents.metrics") / "weights" / f"{self.name}.safetensors")))
        self.network.eval().requires_grad_(False)

    def features(self, samples: Tensor) -> Tensor:
        return self._through(self.network.features, samples)

    def classes(self, samples: Tensor) -> Tensor:
        return self._through(self.network, samples).argmax(1)

    def _through(self, layer: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        """Applies a layer to pictures clamped to [−1, 1], a batch at a time.

        Raises:
            ValueError: pictures of another shape, none at all, or non-finite ones, which the clamp would hide.
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


def _coloured_digits() -> Extractor:
    from ddil_agents.metrics.coloured_digits import ColouredDigitReader

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
        from ddil_agents.metrics.inception import Inception

        return Inception(weights_dir, device)
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; choose one of: {', '.join([*EXTRACTORS, FID_EXTRACTOR])}")
    return EXTRACTORS[name]()


def default_extractor(expert: object) -> str:
    """The name of the extractor that an expert's `extractor` attribute asks for; `identity` where it has none."""
    return str(getattr(expert, "extractor", "identity"))


def augment(pictures: Tensor) -> Tensor:
    """Pictures (b, 1, h, w) turned by up to ±.2 rad, scaled by ±10 %, sheared, shifted by 1/10 of the side, with noise of up to .2."""
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
    """Fits a classifier from scratch on the `fit` split and writes it as float16 safetensors.

    AdamW 2e-3, weight decay 1e-2, 5 % of the updates warm-up and then cosine to 0 (one cycle).
    """
    from safetensors.torch import save_file
    from tqdm import trange

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
