"""Reads pictures for the encoders, cropped and resized, and converts decoded tensors to pictures."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ddil_env.data.files import Pair, formats
from ddil_env.errors import BROKEN_LATENTS, check_finite


class Picture(NamedTuple):
    """A picture that was read: its pixels, uint8 (height, width, 3), and hashes of all its pixels and of its file's bytes."""

    pixels: Tensor
    sha256: bytes
    file_sha256: str


def on_white(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB; what is transparent in it shows white."""
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_picture(content: bytes) -> Image.Image:
    """Decodes a picture to RGB, rotated as its EXIF says, on white where it is transparent; of an animation the first frame.

    Raises:
        Exception: whatever Pillow raises for bytes that are no picture, are cut short, or decode to 90 million pixels and more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=formats()) as opened:  # Pillow's other plug-ins never see the bytes
            if opened.mode.startswith("I") or opened.mode == "F":  # convert() would clip these to white
                raise ValueError(f"mode {opened.mode} has more than 8 bits a channel")
            return on_white(ImageOps.exif_transpose(opened))


def load_picture(content: bytes, height: int, width: int) -> Tensor:
    """Decodes a picture, uint8 (height, width, 3), as `decode_picture` and `fit` do; errors as there."""
    return fit(decode_picture(content), height, width)


def fit(image: Image.Image, height: int, width: int) -> Tensor:
    """Crops a picture in the middle to the aspect of this size, in pixels, and resizes it with Lanczos: uint8 (height, width, 3).

    For a square this is the protocol `centre_crop_lanczos` of ddil_agents.evaluation.metrics.pictures, by which samples are evaluated.
    """
    scale = min(image.width / width, image.height / height)
    w, h = round(width * scale), round(height * scale)
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    image = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))  # (height, width, 3)


class PictureReader(Dataset[Picture | str]):
    """Reads a pair's picture, or says why it cannot. The pair itself is the index, so that no worker holds the whole source.

    Args:
        height, width: Size of the pictures, in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __getitem__(self, pair: Pair) -> Picture | str:
        try:
            content = pair.read()
            image = decode_picture(content)
            sha256 = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).digest()
            return Picture(fit(image, self.height, self.width), sha256, hashlib.sha256(content).hexdigest())
        except UnidentifiedImageError:  # its own text holds an address in memory
            return "no picture of a format that Pillow reads here"
        except Exception as error:  # Pillow's plug-ins raise errors of many kinds for damaged files
            return f"{type(error).__name__}: {error}"


def to_uint8(pictures: Tensor) -> Tensor:
    """Converts floats in [−1, 1], (b, 3 or 1, h, w), to uint8 (b, h, w, 3) on the CPU.

    Raises:
        ValueError: NaN or infinite values, which would be black.
    """
    check_finite(pictures, BROKEN_LATENTS)
    levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return levels.expand(-1, -1, -1, 3).contiguous().cpu()
