"""Pictures as the encoders read them: decoded, cropped and resized, with the broken ones named."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ddil_env.data.sources import Pair

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other plug-ins never see the bytes: one of them runs a program


def load_picture(content: bytes, height: int, width: int) -> Tensor:
    """Decodes a picture, uint8 (height, width, 3): rotated as its EXIF says, centre-cropped to that aspect, resized with Lanczos.

    For a square this is the protocol `centre_crop_lanczos` of ddil_agents.evaluation.metrics.pictures, by which samples are evaluated.

    Args:
        content: The bytes of the file.
        height, width: Size of the result, in pixels.

    Raises:
        Exception: whatever Pillow raises for bytes that are no picture, are cut short, or decode to 90 million pixels and more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if opened.mode.startswith("I") or opened.mode == "F":  # convert() would clip these to white
                raise ValueError(f"mode {opened.mode} has more than 8 bits a channel")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    scale = min(image.width / width, image.height / height)
    w, h = round(width * scale), round(height * scale)
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    image = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))  # (height, width, 3)


class PictureReader(Dataset[Tensor | str]):
    """Reads a pair's picture, or says why it cannot. The pair itself is the index, so that no worker holds the whole source.

    Args:
        height, width: Size of the pictures, in pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __getitem__(self, pair: Pair) -> Tensor | str:
        try:
            return load_picture(pair.read(), self.height, self.width)
        except UnidentifiedImageError:  # its own text holds an address in memory
            return f"no picture in one of the formats {', '.join(FORMATS)}"
        except Exception as error:  # Pillow's plug-ins raise errors of many kinds for damaged files
            return f"{type(error).__name__}: {error}"
