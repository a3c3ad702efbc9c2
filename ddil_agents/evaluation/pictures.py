"""Writes sample grids of pictures, and scatter plots of samples in the plane."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from ddil_agents.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from ddil_agents.evaluation.evaluator import Evaluator


def picture_rows(evaluator: Evaluator, samples: dict[str, Tensor], columns: int = 20) -> dict[str, np.ndarray]:
    """Each model's first samples as one strip of pictures, (height, columns · width, 3); empty where the expert decodes no pictures.

    Where all models started from the same noise, the pictures of one column share theirs.
    """
    rows = {}
    for name, x_0 in samples.items():
        pictures = evaluator.expert.decode(x_0[:columns])
        if pictures is None:
            return {}
        rows[name] = torch.cat(list(pictures), dim=1).numpy()
    return rows


def save_samples(path: Path, rows: dict[str, np.ndarray], scale: int = 3) -> bool:
    """Writes strips of pictures below one another as a PNG, each beside its model's name.

    Args:
        path: The PNG.
        rows: A strip for each model, from `picture_rows`.
        scale: Pixels of the PNG for each pixel of a picture.

    Returns:
        Whether there were any pictures to write.
    """
    if not rows:
        return False
    margin = 12 + 7 * max(map(len, rows))
    strips = [np.repeat(np.repeat(row, scale, 0), scale, 1) for row in rows.values()]
    canvas = Image.new("RGB", (margin + strips[0].shape[1], sum(s.shape[0] + 4 for s in strips)), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for name, strip in zip(rows, strips, strict=True):
        draw.text((6, y + strip.shape[0] // 2 - 6), name, fill="black")
        canvas.paste(Image.fromarray(strip), (margin, y))
        y += strip.shape[0] + 4
    canvas.save(png := io.BytesIO(), format="PNG")
    write_atomically(path, png.getvalue())
    return True


def save_scatter(path: Path, evaluator: Evaluator, samples: dict[str, Tensor]) -> None:
    """Writes samples in the plane, each (b, 2), as a PNG: one panel for each model, the real data in grey."""
    figure = Figure(figsize=(3 * len(samples), 3.2), layout="constrained")
    for axis, (name, x_0) in zip(np.atleast_1d(figure.subplots(1, len(samples), sharex=True, sharey=True)), samples.items(), strict=True):
        if evaluator.real is not None:
            axis.scatter(*evaluator.real.cpu().T, s=2, c="lightgrey")
        axis.scatter(*x_0.cpu().T, s=2)
        axis.set_title(name)
        axis.set_aspect("equal")
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, png.getvalue())


def save_pictures(path: Path, evaluator: Evaluator, samples: dict[str, Tensor]) -> bool:
    """Writes samples as a grid of pictures, or as a scatter plot where they lie in the plane.

    Returns:
        Whether a file was written: not for samples that are neither.
    """
    if evaluator.expert.sample_shape == (2,):
        save_scatter(path, evaluator, samples)
        return True
    return save_samples(path, picture_rows(evaluator, samples))
