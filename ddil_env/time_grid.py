"""Time grids: the times that a sampler steps over, and the times between them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddil_env.errors import check_choice, check_whole
from ddil_env.schedule import NoiseSchedule

GridKind = Literal["linspace", "dmd2", "trailing", "lcm"]

LCM_SOLVER_STEPS = 50  # latent consistency models step over 50 teacher times, 999, 979, …, 19, and sample on some of them


class TimeGrid:
    """The N + 1 times of a few-step sampler, from `t_max` down to 0.

    Args:
        schedule: The schedule whose times these are.
        num_steps: N, the number of steps of an episode.
        kind: `linspace`, the paper's (the default of DPM-Solver++): 999, 749, 500, 250 → 0 for N = 4. `dmd2`: 999, 749, 499, 249 → 0,
            a constant stride of T // N. `trailing`: strides of T / N, rounded, as in Lin et al. 2024 and diffusers.
            `lcm`: N of the 50 trailing times, 999, 759, 499, 259 → 0, as diffusers' LCMScheduler picks them.

    Attributes:
        times: The N + 1 times, float32, descending.

    Raises:
        ValueError: an unknown kind, num_steps below 1 or above the schedule's `t_max`, or so many steps that two times are equal.
    """

    def __init__(self, schedule: NoiseSchedule, num_steps: int, kind: GridKind = "linspace") -> None:
        check_choice("time grid", kind, GridKind)
        check_whole("num_steps", num_steps, 1, int(schedule.t_max), ", the length of the teacher's chain")
        n, t_max = num_steps, schedule.t_max
        if kind == "linspace":
            times = t_max * torch.arange(n, -1, -1, dtype=torch.float64) / n  # multiplied first, so that halves are exact for every n
        elif kind == "lcm":
            solver = TimeGrid(schedule, min(LCM_SOLVER_STEPS, 2 * schedule.num_train_steps // 3), "trailing")
            times = lcm_times(solver, n).double()
        else:
            stride = schedule.num_train_steps // n if kind == "dmd2" else schedule.num_train_steps / n
            times = schedule.num_train_steps - stride * torch.arange(n + 1, dtype=torch.float64)
            if schedule.discrete:
                times = times.round() - 1  # in this order, for diffusers rounds the count of steps, not the time
            times[-1] = 0
        if schedule.discrete:
            times = times.round()
        if bool((times.diff() >= 0).any()):
            raise ValueError(
                f"num_steps={n}: a {kind} grid of so many steps reaches 0 early; need at most {2 * schedule.num_train_steps // 3}"
            )
        self.schedule = schedule
        self.num_steps = n
        self.kind = kind
        self.times = times.float()
        self._ascending = self.times.flip(0).contiguous()

    def to(self, device: torch.device | str) -> TimeGrid:
        """Moves the grid to a device, in place."""
        self.times, self._ascending = self.times.to(device), self._ascending.to(device)
        return self

    def previous(self, t: Tensor) -> Tensor:
        """The target times of steps from t (b,): the latest of the grid before t, (b,); 0 for 0. t need not lie on the grid."""
        index = torch.searchsorted(self._ascending, t.contiguous(), side="left") - 1
        return self._ascending[index.clamp(min=0)]


def lcm_times(solver: TimeGrid, num_steps: int) -> Tensor:
    """The times of a latent consistency model's sampler, (num_steps + 1,): times of its solver, evenly by index, and 0.

    Args:
        solver: The time grid of the solver that the model was trained with.
        num_steps: Steps of the sampler.

    Raises:
        ValueError: more steps than the solver has.
    """
    if num_steps > solver.num_steps:
        raise ValueError(f"num_steps={num_steps}: a latent consistency model samples in at most its solver's {solver.num_steps} steps")
    index = torch.arange(num_steps + 1, device=solver.times.device) * solver.num_steps // num_steps
    return solver.times[index]


def substep_times(schedule: NoiseSchedule, t: Tensor, s: Tensor, k: int) -> Tensor:
    """The times of k steps from t (b,) to s (b,) in equal strides, (k + 1, b); whole numbers for a discrete schedule.

    They are rounded up, so that only the last can be 0. Where t − s < k some times repeat; a step between equal times changes nothing.
    """
    if k == 1:  # a shortcut: the arithmetic below takes a tenth of the time that a rollout adds to its network
        times = torch.stack([t, s])
    else:
        i = torch.arange(k + 1, dtype=torch.float64, device=t.device)[:, None]
        times = ((k - i) * t.double() + i * s.double()) / k  # exact for whole strides, which `ceil` then does not change
    return (times.ceil() if schedule.discrete else times).float()
