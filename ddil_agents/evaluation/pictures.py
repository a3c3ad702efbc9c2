"""Samples as a person can see them: grids of pictures, scatter plots."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddil_agents.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from ddil_agents.evaluation.evaluator import Evaluator


def picture_rows(evaluator: Evaluator, samples: dict[str, Tensor], columns: int = 20) -> dict[str, np.ndarray]:
    """Each model's first samples as one strip of pictures, (height, columns · width, 3), same noise a column."""
    rows = {}
    for name, x_0 in samples.items():
        pictures = evaluator.expert.decode(x_0[:columns])
        if pictures is None:
            return {}
        rows[name] = torch.cat(list(pictures), dim=1).numpy()
    return rows


def save_samples(path: Path, rows: dict[str, np.ndarray], scale: int = 3) -> bool:
    """Writes a grid of strips, each with its model's name; False where there are no pictures."""
    if not rows:
        return False
    from PIL import Image, ImageDraw

    margin = 12 + 7 * max(map(len, rows))
    strips = [np.repeat(np.repeat(row, scale, 0), scale, 1) for row in rows.values()]
    canvas = Image.new("RGB", (margin + strips[0].shape[1], sum(s.shape[0] + 4 for s in strips)), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for name, strip in zip(rows, strips, strict=True):
        draw.text((6, y + strip.shape[0] // 2 - 6), name, fill="black")
        canvas.paste(Image.fromarray(strip), (margin, y))
        y += strip.shape[0] + 4
    canvas.save(drawn := io.BytesIO(), format="PNG")
    write_atomically(path, drawn.getvalue())
    return True


def save_scatter(path: Path, evaluator: Evaluator, samples: dict[str, Tensor]) -> None:
    """For samples in the plane: one panel a model, over the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(samples), 3.2), layout="constrained")
    for axis, (name, x_0) in zip(np.atleast_1d(figure.subplots(1, len(samples), sharex=True, sharey=True)), samples.items(), strict=True):
        if evaluator.real is not None:
            axis.scatter(*evaluator.real.cpu().T, s=2, c="lightgrey")
        axis.scatter(*x_0.cpu().T, s=2)
        axis.set_title(name)
        axis.set_aspect("equal")
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, drawn.getvalue())


def save_pictures(path: Path, evaluator: Evaluator, samples: dict[str, Tensor]) -> bool:
    """The samples as a person can see them: a grid of pictures, or a scatter plot in the plane; False for other shapes."""
    if evaluator.expert.sample_shape == (2,):
        save_scatter(path, evaluator, samples)
        return True
    return save_samples(path, picture_rows(evaluator, samples))
