"""Writes animations of episodes in a world: models below one another, the same starts and noise in every row."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy, ExpertPolicy, TimeGrid
from ddil_env.mdp import Kernel

EPISODES, FRAMES, HEIGHT = 4, 120, 150  # at most: columns, frames of an animation, pixels of a picture
GAP, LETTERS = 4, 26  # pixels between pictures, and of names, which are to be read on a phone


def render_episodes(
    evaluator: EpisodeEvaluator, policy: DdimPolicy, grid: TimeGrid | None = None, kernel: Kernel = "ddim", episodes: int = EPISODES
) -> np.ndarray | None:
    """Pictures of the first episodes that an evaluation of the policy runs, as strips of them side by side.

    Returns:
        (frames, height, width, 3) uint8; a picture stands still where its episode has ended. None for a world that is not rendered.
    """
    world, strips = evaluator.world, list[np.ndarray]()
    columns, every = range(min(episodes, evaluator.n)), max(1, world.num_frames // (2 * FRAMES))
    if not world.can_render:
        return None

    def small(picture: Tensor) -> np.ndarray:
        scale = min(1.0, HEIGHT / len(picture))
        size = round(picture.shape[1] * scale), round(len(picture) * scale)
        pixels = np.asarray(Image.fromarray(picture.numpy()).resize(size, Image.Resampling.LANCZOS))
        return np.pad(pixels, ((0, 0), (0, GAP), (0, 0)), constant_values=255)

    def render() -> None:
        strips.append(np.concatenate([small(picture) for row in columns if (picture := world.render(row)) is not None], 1))

    def before_step(frame: int, running: list[int]) -> None:
        if frame % every == 0 and set(running) & set(columns):
            render()

    evaluator.run(policy, grid or evaluator.grid, kernel, before_step)
    render()  # where they ended
    return np.stack(strips)


def save_animation(path: Path, films: dict[str, np.ndarray], seconds: float = 8.0) -> None:
    """Writes strips of pictures below one another as a GIF, each beside its model's name.

    Args:
        path: The GIF.
        films: Of each model, (frames, height, width, 3) uint8, all of one height and width; a shorter one stands still at its end.
        seconds: How long it runs before it starts again.
    """
    length = max(map(len, films.values()))
    _, high, wide, _ = next(iter(films.values())).shape
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), min(LETTERS, high // 2))
    margin = 16 + round(max(font.getlength(name) for name in films))
    pictures = []
    for frame in np.linspace(0, length - 1, min(length, FRAMES)).round().astype(int):
        canvas = Image.new("RGB", (margin + wide, len(films) * (high + GAP)), "white")
        draw = ImageDraw.Draw(canvas)
        for i, (name, film) in enumerate(films.items()):
            y = i * (high + GAP)
            draw.text((6, y + high // 2), name, fill="black", font=font, anchor="lm")
            canvas.paste(Image.fromarray(film[min(frame, len(film) - 1)]), (margin, y))
        pictures.append(canvas.convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    durations = [round(1000 * seconds / len(pictures))] * (len(pictures) - 1) + [1500]
    pictures[0].save(gif := io.BytesIO(), "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, gif.getvalue())


def save_episodes(path: Path, evaluator: EpisodeEvaluator, students: dict[str, tuple[DdimPolicy, TimeGrid, Kernel]]) -> bool:
    """Writes an animation of first episodes: of the teacher in all its steps and in as few as the evaluation's grid has, and of students.

    Args:
        path: The GIF.
        evaluator: Runs the episodes.
        students: Policies by name, with their grid and kernel.

    Returns:
        Whether a file was written: not in a world that is not rendered.
    """
    teacher, grid = evaluator.expert_policy, evaluator.grid
    few = ExpertPolicy(teacher.expert, 1, teacher.guidance_scale)
    policies: dict[str, tuple[DdimPolicy, TimeGrid, Kernel]] = {
        f"teacher@{teacher.substeps * grid.num_steps}": (teacher, grid, "ddim"),
        f"teacher@{grid.num_steps}": (few, grid, "ddim"),
        **students,
    }
    films = {name: film for name, args in policies.items() if (film := render_episodes(evaluator, *args)) is not None}
    if films:
        save_animation(path, films)
    return bool(films)
