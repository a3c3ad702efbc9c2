"""The Kuramoto–Sivashinsky equation: a solver, the world of its surrogates, and what their rollouts are measured by.

    u_t = −u u_x − u_xx − u_xxxx ,   u periodic on [0, L)

At L = 22 its solutions are chaotic, with a largest Lyapunov exponent of about .05. Fields are real, (…, points), of mean 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddil_env.worlds.autoregressive import Autoregressive
from ddil_env.worlds.episodes import Episodes

LENGTH, POINTS = 22.0, 48
TIME_STEP = 0.125  # of the solver
TRANSIENT = 150.0  # time after which a random start is on the attractor
BOUND = 5.0  # standard deviations of the attractor, which itself stays within 3
DRAWN = 128  # frames in a picture


class KuramotoSivashinsky:
    """Fourier modes in space and ETDRK4 in time (Kassam & Trefethen 2005), in float64, many fields at a time.

    Args:
        length: L.
        points: Of the grid.
        time_step: h.
        device: Where it computes.
    """

    def __init__(
        self, length: float = LENGTH, points: int = POINTS, time_step: float = TIME_STEP, device: torch.device | str = "cpu"
    ) -> None:
        self.length, self.points, self.time_step, self.device = length, points, time_step, torch.device(device)
        k = 2 * math.pi / length * torch.arange(points // 2 + 1, dtype=torch.float64)
        slope = -0.5j * k
        slope[-1] *= points % 2  # the derivative of the mode at the Nyquist frequency is no mode of the grid
        linear = k**2 - k**4
        z = linear[:, None] * time_step + torch.exp(1j * math.pi * (torch.arange(32, dtype=torch.float64) + 0.5) / 32)
        a, b, c = (
            ((-4 - z + z.exp() * (4 - 3 * z + z**2)) / z**3).mean(1).real,
            ((2 + z + z.exp() * (z - 2)) / z**3).mean(1).real,
            ((-4 - 3 * z - z**2 + z.exp() * (4 - z)) / z**3).mean(1).real,
        )  # means over a contour: the formulas themselves cancel near z = 0
        half = ((z / 2).expm1() / z).mean(1).real
        terms = [slope, (linear * time_step).exp(), (linear * time_step / 2).exp(), *(time_step * x for x in (half, a, b, c))]
        self.slope, self.decay, self.half_decay, self.half, self.a, self.b, self.c = (x.to(self.device) for x in terms)

    def _nonlinear(self, v: Tensor) -> Tensor:
        """The modes of −u u_x = −(u²)_x / 2."""
        return self.slope * torch.fft.rfft(torch.fft.irfft(v, self.points).square())

    def _step(self, v: Tensor) -> Tensor:
        """Modes (…, points // 2 + 1) a time step later."""
        n = self._nonlinear(v)
        first = self.half_decay * v + self.half * n
        n_first = self._nonlinear(first)
        second = self.half_decay * v + self.half * n_first
        n_second = self._nonlinear(second)
        third = self.half_decay * first + self.half * (2 * n_second - n)
        return self.decay * v + self.a * n + 2 * self.b * (n_first + n_second) + self.c * self._nonlinear(third)

    @torch.no_grad()
    def solve(self, u: Tensor, time: float) -> Tensor:
        """Fields u (…, points) a time later, in float64.

        Raises:
            ValueError: a time that is no multiple of the solver's step.
        """
        steps = round(time / self.time_step)
        if steps < 0 or not math.isclose(steps * self.time_step, time, abs_tol=1e-9):
            raise ValueError(f"time={time}: need a multiple of the solver's step {self.time_step}; pass a time_step that divides it")
        v = torch.fft.rfft(u.to(self.device, torch.float64))
        for _ in range(steps):
            v = self._step(v)
        return torch.fft.irfft(v, self.points)

    def trajectory(self, u: Tensor, num_frames: int, dt: float) -> Tensor:
        """u and the fields that follow it every dt, (num_frames, *u.shape) float64."""
        frames = [u.to(self.device, torch.float64)]
        for _ in range(num_frames - 1):
            frames.append(self.solve(frames[-1], dt))
        return torch.stack(frames)

    def on_attractor(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Fields (len(generators), points), one of each generator: random long waves, and what the equation makes of them."""
        waves = torch.stack([torch.randn(2, 6, generator=g, device=g.device, dtype=torch.float64).cpu() for g in generators])
        modes = torch.zeros(len(generators), self.points // 2 + 1, dtype=torch.complex128)
        modes[:, 1:7] = torch.complex(waves[:, 0], waves[:, 1]) * self.points / 8
        return self.solve(torch.fft.irfft(modes, self.points), TRANSIENT)


class KuramotoWorld(Autoregressive):
    """Frames of the equation, divided by the attractor's standard deviation; a start is a state of the attractor.

    An episode ends where a frame leaves ± `BOUND`. Each frame within earns 1, so that a return is the number of frames for which the
    rollout stayed bounded; an episode is a success if all did.

    Args:
        num_worlds: How many.
        equation: Computes the starts.
        std: The attractor's standard deviation.
        increment: A sample times this is added to the last frame; None: a sample is the next frame.
        dt: Time between frames.
        num_frames: Frames of an episode.
        bound: Largest value of a frame.
        device: Where the frames are.
    """

    def __init__(
        self,
        num_worlds: int,
        equation: KuramotoSivashinsky,
        std: float,
        increment: float | None,
        dt: float,
        num_frames: int = 400,
        bound: float = BOUND,
        device: torch.device | str = "cpu",
    ) -> None:
        def initial(generators: Sequence[torch.Generator]) -> Tensor:
            return (equation.on_attractor(generators) / std).float()[:, None, None]  # (n, history, channels, points)

        shape = (1, equation.points)
        super().__init__(num_worlds, initial, shape, num_frames=num_frames, increment=increment, bound=bound, device=device)
        self.equation, self.std, self.dt, self.limit = equation, std, dt, bound
        self.recent = torch.zeros(num_worlds, DRAWN, equation.points, device=self.device)
        self._truth: tuple[Tensor, Tensor] | None = None  # starts, and the solutions from there

    def start(self, rows: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        histories = super().start(rows, generators)
        self.recent[rows] = 0
        self.recent[rows, -1] = histories[:, -1, 0]
        return histories

    def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        histories, reward, done = super().advance(rows, x_0)
        self.recent[rows] = torch.cat([self.recent[rows, 1:], histories[:, -1].detach()], 1)
        return histories, reward, done

    def metrics(self, episodes: Episodes) -> dict[str, float | None]:
        """What the rollouts are worth beside the solver's from the same starts, for frames of one history.

        valid_time: frames until a rollout has left the solution, as `valid_time` below.
        late_shift: 2-Wasserstein distance of the values in the last quarter of the frames to those of the solutions there; a rollout that
            ended counts with its last frame, clipped to the bound.
        high_modes: energy of the modes from 9 on there, over the solutions'.
        """
        starts, k = episodes.c[0, :, -1, 0], self.num_frames
        if self._truth is None or not torch.equal(self._truth[0], starts):
            self._truth = starts, (self.equation.trajectory(starts * self.std, k, self.dt) / self.std).to(starts)
        truth, frames = self._truth[1], torch.zeros_like(self._truth[1])
        frames[: len(episodes.c)] = episodes.c[:, :, -1, 0]
        at = torch.arange(k * 3 // 4, k, max(1, k // 40), device=frames.device)  # evenly over the last quarter
        last = torch.minimum(at[:, None], episodes.length.to(at.device) - 1)  # (late frames, n)
        late = frames.gather(0, last[..., None].expand(-1, -1, frames.shape[2])).clamp(-self.limit, self.limit)
        gap = late.flatten().sort().values - truth[at].flatten().sort().values
        high = [spectrum(x)[9:].sum() for x in (late, truth[at])]
        return {
            "valid_time": float(valid_time(frames, truth).double().mean()),
            "late_shift": float(gap.square().mean().sqrt()),
            "high_modes": float(high[0] / high[1]),
        }

    def render(self, row: int = 0) -> Tensor:
        """The last 128 frames of a world, time to the right, positive values red and negative ones blue."""
        v = (self.recent[row].T.cpu() / 3).clamp(-1, 1)  # (points, frames)
        colours = torch.stack([1 - (-v).clamp(min=0), 1 - v.abs(), 1 - v.clamp(min=0)], -1)
        return (255 * colours).byte().repeat_interleave(4, 0).repeat_interleave(4, 1)


def valid_time(frames: Tensor, truth: Tensor, threshold: float = 0.4) -> Tensor:
    """Frames until a rollout has left the solution from the same start, (n,) int64.

    Args:
        frames, truth: Rollouts and solutions, (K, n, *frame).
        threshold: Of the root mean square of frames − truth, in units of that of all of `truth`.
    """
    error = (frames - truth).flatten(2).square().mean(2).sqrt() / truth.square().mean().sqrt()  # (K, n)
    return (error <= threshold).long().cumprod(0).sum(0)


def spectrum(frames: Tensor) -> Tensor:
    """Mean energy |û_k|² of each mode of frames (…, points), (points // 2 + 1,); the modes are those of a unit-norm transform."""
    return torch.fft.rfft(frames.double(), norm="forward").abs().square().flatten(0, -2).mean(0)
