"""Recorded trajectories in the form that the page's viewer shows: sprite sheets of pictures, points in the plane, or only numbers."""

from __future__ import annotations

import base64
import inspect
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddil_agents.comparison.page.figures import PLACEHOLDER, TEACHER, Figure, Group, Points, format_number, inline_svg
from ddil_agents.comparison.page.plots import arm_styles
from ddil_agents.evaluation.trajectories import Trajectories
from ddil_env import Expert, NoDataError
from ddil_env.presets import find_expert, make_expert

MAX_SIDE = 64  # pixels; larger pictures are shrunk, because ten trajectories of each arm are hundreds of pictures
NUM_DATA_POINTS = 300  # real data drawn behind points in the plane


def read_trajectories(result: dict[str, Any], out: Path) -> dict[str, Trajectories]:
    """Reads the recorded trajectories of the first seed: of the teacher at the times of each arm, where they differ, and of the arms."""
    runs = [run for run in result["budgets"]["updates"]["runs"] if run["seed"] == result["comparison"]["first_seed"]]
    teachers, students = (
        {run["arm"]: Trajectories.load(path) for run in runs if (path := out / run["directory"] / f"{who}.safetensors").is_file()}
        for who in ("teacher", "trajectories")
    )
    by_times: dict[tuple[float, ...], tuple[str, Trajectories]] = {}
    for arm, recorded in teachers.items():
        by_times.setdefault(tuple(recorded.times.tolist()), (arm, recorded))
    named = {"teacher" if i == 0 else f"teacher, times of {arm}": recorded for i, (arm, recorded) in enumerate(by_times.values())}
    return named | students


def read_animation(out: Path) -> str:
    """The animation of episodes as a data URI; empty if there is none."""
    path = out / "episodes.gif"
    return f"data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else ""


def describe_conditions(c: Tensor) -> list[str]:
    """Ids of conditions as text, "" of the null condition and of conditions that are tensors."""
    return [f"condition {i}" if i >= 0 else "" for i in c.tolist()] if c.ndim == 1 else [""] * len(c)


def load_expert(result: dict[str, Any]) -> Expert:
    """Loads the comparison's expert, on a GPU if there is one."""
    env = dict(result["env_config"])
    name = env.pop("expert")
    if torch.cuda.is_available() and "device" in inspect.signature(find_expert(name)).parameters:
        env["device"] = "cuda"
    return make_expert(name, **env)


def viewer_data(result: dict[str, Any], trajectories: dict[str, Trajectories]) -> dict[str, Any]:
    """Data of the viewer, for the template and the script.

    Returns:
        models: For each model its name, whether the teacher acts (n, N), times and error (n, N); and `sheet`, a sprite sheet, with the
            aspect `ratio` of its pictures; or `x_t` and `x_0` in the plane.
        conditions: Conditions of the samples, as text.
        cloud: Real data in the plane.
        reach: For each sample, half the width of a square around the origin that contains its points.
        kind: pictures, plane or numbers.
        note: Why there are no pictures, if the expert could not be loaded.
        steps: The largest format_number of steps.
    """
    shown: dict[str, Any] = {"models": [], "conditions": [], "cloud": [], "reach": [], "kind": "numbers", "note": "", "steps": 0}
    if not trajectories:
        return shown
    expert: Expert | None = None
    try:
        expert = load_expert(result)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        shown["note"] = f"The expert could not be loaded, so there are no pictures: {error}"
    first = next(iter(trajectories.values()))
    plane = first.x_t.shape[2:] == (2,)
    shown["conditions"] = describe_conditions(first.c)
    shown["steps"] = max(len(t.times) for t in trajectories.values()) - 1
    for name, t in trajectories.items():
        model = {
            "name": name,
            "teacher": t.by_expert.int().tolist(),
            "times": to_rounded_lists(t.times),
            "error": to_rounded_lists(t.error),
        }
        if plane:
            model |= {"x_t": to_rounded_lists(t.x_t), "x_0": to_rounded_lists(t.x_0)} if is_finite(t) else {"x_t": None, "x_0": None}
        elif expert is not None and (sheet := sprite_sheet(expert, t)) is not None:
            model |= {"sheet": data_uri(sheet), "ratio": aspect_ratio(sheet, t)}
        shown["models"].append(model)
    if plane:
        shown |= {"kind": "plane", "cloud": [] if expert is None else sample_cloud(expert)}
        points = torch.cat([x for t in trajectories.values() if is_finite(t) for x in (t.x_t, t.x_0)], 1)  # (n, all, 2)
        data = max((abs(x) for point in shown["cloud"] for x in point), default=0.0)
        shown["reach"] = [1.1 * max(data, x) for x in points.abs().flatten(1).amax(1).tolist()]
    elif "sheet" in shown["models"][0]:
        shown["kind"] = "pictures"
    return shown


def samples_in_the_plane(result: dict[str, Any], trajectories: dict[str, Trajectories], cloud: list[list[float]]) -> Group:
    """A figure for each arm: its samples in the plane, each joined to the teacher's from the same noise; empty for other samples."""
    group = Group("", [])
    if "teacher" not in trajectories or trajectories["teacher"].x_t.shape[2:] != (2,):
        return group
    goal = trajectories["teacher"].x_t[:, -1].double().cpu().numpy()  # (n, 2)
    for i, (arm, style) in enumerate(arm_styles(result).items()):
        if arm not in trajectories:
            continue
        ends = trajectories[arm].x_t[:, -1].double().cpu().numpy()
        shown = [Points("teacher", TEACHER, *goal.T.tolist()), Points(arm, style, *ends.T.tolist())]

        def draw(axes: Axes, shown: list[Points] = shown) -> None:
            if cloud:
                x, y = zip(*cloud, strict=True)
                axes.scatter(x, y, s=3, color=PLACEHOLDER["muted"], alpha=0.35, linewidths=0)
            axes.plot([s.x for s in shown], [s.y for s in shown], color=shown[1].style.colour, lw=1)
            for series, size in zip(shown, (50, 26), strict=True):
                axes.scatter(series.x, series.y, s=size, marker=series.style.marker, color=series.style.colour, linewidths=0, zorder=3)
            axes.set_aspect("equal", "datalim")

        label = f"{len(goal)} samples of {arm}, each joined to the teacher's sample from the same noise. The numbers follow as a table."
        rows = [[str(k + 1), *map(format_number, (*a, *b))] for k, (a, b) in enumerate(zip(goal, ends, strict=True))]
        headings = ["sample", "teacher, x", "y", f"{arm}, x", "y"]
        caption = "Short lines: the student ends where the teacher does. Faint points: real data."
        group.add(Figure(arm, caption, inline_svg(draw, f"plane-{i}", label, (4.4, 3.6)), headings, rows), shown)
    return group


def sprite_sheet(expert: Expert, t: Trajectories) -> NDArray[np.uint8] | None:
    """All pictures of a model in one, (2n · height, (N + 1) · width, 3); each sample has two rows, x_t and x̂_0. None without pictures."""
    estimates = torch.cat([t.x_0, t.x_t[:, -1:]], 1)  # (n, N + 1, *sample_shape); the last estimate is the sample
    rows = []
    for latents in torch.stack([t.x_t, estimates], 1).flatten(0, 1):  # a row at a time, because large decoders need much memory
        pictures = expert.decode(latents.to(expert.device))
        if pictures is None:
            return None
        rows.append(np.concatenate([shrink(picture) for picture in pictures.numpy()], 1))
    return np.concatenate(rows, 0)


def shrink(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrinks a picture (height, width, 3) until no side is larger than MAX_SIDE."""
    height, width = picture.shape[:2]
    if max(height, width) <= MAX_SIDE:
        return picture
    scale = MAX_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def aspect_ratio(sheet: NDArray[np.uint8], t: Trajectories) -> float:
    """Width over height of one picture of a sprite sheet."""
    return (sheet.shape[1] / t.x_t.shape[1]) / (sheet.shape[0] / (2 * len(t.x_t)))


def data_uri(picture: NDArray[np.uint8]) -> str:
    """A data URI: PNG for grey or small sheets, JPEG for large coloured ones, whose PNG would have megabytes."""
    grey = bool((picture == picture[..., :1]).all())
    image, file = Image.fromarray(picture[..., 0] if grey else picture), io.BytesIO()
    kind = "png" if grey or picture.size < 300_000 else "jpeg"
    image.save(file, kind, optimize=True, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def sample_cloud(expert: Expert) -> list[list[float]]:
    """Points of real data in the plane; empty without data."""
    try:
        return to_rounded_lists(expert.sample_data(NUM_DATA_POINTS, torch.Generator(expert.device).manual_seed(0))[0])
    except NoDataError:
        return []


def is_finite(t: Trajectories) -> bool:
    """Whether all states and estimates are finite."""
    return bool(t.x_t.isfinite().all() and t.x_0.isfinite().all())


def to_rounded_lists(x: Tensor) -> Any:
    """A tensor as nested lists of numbers with three digits; None where a number is not finite."""
    values: list[Any] = [float(f"{value:.3g}") if math.isfinite(value) else None for value in x.flatten().tolist()]
    for size in reversed(x.shape[1:]):
        values = [values[i : i + size] for i in range(0, len(values), size)]
    return values
