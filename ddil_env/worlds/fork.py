"""A board of pegs: a point finds its way between them, left or right of each, so that many ways are right and can be counted.

    position' = position + SPEED · a / max(1, ‖a‖) ;   c = (offset from the peg ahead, distance to its row − 1)

Rows lie ROW apart, a row's pegs too, and the rows are staggered as on a Galton board: who passes a peg meets the next one straight ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ddil_env.worlds.episodes import Episodes
from ddil_env.worlds.world import World

ROW = 2.0  # distance of rows, and of the pegs of a row
HALF_WIDTH = 0.75  # of a peg, which has no height; the gaps between pegs are ROW − 2 · HALF_WIDTH wide
SPEED = 0.2  # of a point, a sample
START_STD = 0.05  # of the first offset


class Fork(World):
    """Points that pass `num_rows` rows of pegs. A sample is a direction, a condition where the point is.

    A reward of 1 is given for each row that is passed. An episode ends at a peg, which is a failure, behind the last row, which is a
    success, or after `num_frames` samples. The gradient of conditions by samples is exact.

    Args:
        num_worlds: How many points.
        num_rows: Rows of pegs; there are 2^num_rows routes. The straight ways between gaps take about 11 samples a row.
        num_frames: Samples after which an episode ends; default: 14 for each row.
        device: Where it computes.
    """

    def __init__(self, num_worlds: int, *, num_rows: int = 5, num_frames: int | None = None, device: torch.device | str = "cpu") -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows}: need at least 1")
        super().__init__(num_worlds, (2,), (2,), 14 * num_rows if num_frames is None else num_frames, device)
        self.num_rows = num_rows
        self.position = torch.zeros(num_worlds, 2, device=self.device)
        self.passed = torch.zeros(num_worlds, dtype=torch.int64, device=self.device)  # rows
        self.paths: list[list[tuple[float, float]]] = [[] for _ in range(num_worlds)]  # what `render` draws

    def start(self, rows: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        offsets = torch.stack([START_STD * torch.randn((), generator=generator, device=generator.device) for generator in generators])
        position, passed = self.position.clone(), self.passed.clone()
        position[rows] = torch.stack([offsets, torch.zeros_like(offsets)], 1).to(self.device)
        passed[rows] = 0
        self.position, self.passed = position, passed
        for row in rows:
            self.paths[row] = []
        return self._conditions(rows)

    def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, passed = self.position[rows], self.passed[rows]
        after = before + displacement(x_0)
        line = ROW * (passed + 1)
        crosses = after[:, 1] >= line
        share = ((line - before[:, 1]) / (after[:, 1] - before[:, 1]).clamp(min=1e-9)).clamp(0, 1)  # of the step, at the row
        gap = offset(before[:, 0] + share * (after[:, 0] - before[:, 0]), passed).abs() >= HALF_WIDTH
        position, rows_passed = self.position.clone(), self.passed.clone()  # copies, so that what a graph holds is left alone
        position[rows], rows_passed[rows] = after, passed + (crosses & gap)
        self.position, self.passed = position, rows_passed
        for row, (x, y) in zip(rows, before.tolist(), strict=True):
            self.paths[row].append((x, y))
        done = (crosses & ~gap) | (self.passed[rows] == self.num_rows)
        return self._conditions(rows), (crosses & gap).float(), done

    def transition(self, c: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
        x, ahead = c[:, 0], c[:, 1] + 1  # offset from the peg ahead, distance to its row
        step = displacement(x_0)
        crosses = step[:, 1] >= ahead
        share = (ahead / step[:, 1].clamp(min=1e-9)).clamp(0, 1)  # of the step, at the row
        gap = offset(x + share * step[:, 0], torch.zeros_like(x)).abs() >= HALF_WIDTH
        passes = (crosses & gap).to(x.dtype)
        return torch.stack([offset(x + step[:, 0], passes), ahead - step[:, 1] + ROW * passes - 1], 1), crosses & ~gap

    def _conditions(self, rows: list[int]) -> Tensor:
        position, passed = self.position[rows], self.passed[rows]
        return torch.stack([offset(position[:, 0], passed), ROW * (passed + 1) - position[:, 1] - 1], 1)

    def succeeded(self, total_reward: Tensor) -> Tensor:
        return total_reward >= self.num_rows

    def metrics(self, episodes: Episodes) -> dict[str, float | None]:
        """`route_entropy`: of the gaps that the n successful episodes took, in nats, −Σ p ln p + (number of routes − 1) / 2n.

        The second term corrects the bias of the first (Miller 1955). Few successes still hide routes: look at `success` beside it. Without
        any it is None.
        """
        success = self.succeeded(episodes.total_reward)
        x = episodes.c[0, :, 0] + displacement(episodes.x_0)[..., 0].cumsum(0)  # (K, n), after each sample
        crossed = episodes.reward > 0
        at_rows = x[:, success].T[crossed[:, success].T].reshape(-1, self.num_rows)  # (successes, num_rows)
        gaps = ((at_rows - ROW / 2 * torch.arange(self.num_rows, device=x.device)) / ROW).floor()
        if not (n := len(gaps)):
            return {"route_entropy": None}
        counts = torch.unique(gaps, dim=0, return_counts=True)[1].double()
        return {"route_entropy": float((counts / n * (n / counts).log()).sum() + (len(counts) - 1) / (2 * n))}

    def render(self, row: int = 0) -> Tensor:
        scale, wide = 24, self.num_rows + 1.5  # pixels a unit; from the middle to a side
        size = round(2 * wide * scale), round((ROW * self.num_rows + 1) * scale)
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)

        def pixel(x: float, y: float) -> tuple[float, float]:
            return (wide + x) * scale, (y + 0.5) * scale

        for k in range(self.num_rows):
            for peg in range(-math.ceil(wide), math.ceil(wide) + 1):
                if (peg - k) % 2 == 0:
                    draw.line([pixel(peg - HALF_WIDTH, ROW * (k + 1)), pixel(peg + HALF_WIDTH, ROW * (k + 1))], "dimgray", 3)
        here = tuple(self.position[row].tolist())
        path = [pixel(x, y) for x, y in [*self.paths[row], here]]
        if len(path) > 1:
            draw.line(path, "royalblue", 2)
        x, y = path[-1]
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], "crimson")
        return torch.from_numpy(np.array(picture))


def offset(x: Tensor, row: Tensor) -> Tensor:
    """How far right of the nearest peg of a row the abscissas x (n,) lie, in [−ROW / 2, ROW / 2)."""
    return (x - ROW / 2 * row + ROW / 2) % ROW - ROW / 2


def displacement(a: Tensor) -> Tensor:
    """What samples (*n, 2) add to a position."""
    return SPEED * a / a.norm(dim=-1, keepdim=True).clamp(min=1)
