"""A student as an expert: in progressive distillation the student of one stage is the teacher of the next.

    expert_{k+1} = student_k        Salimans & Ho 2021, Alg. 2: θ ← η after each halving of the steps

A guided teacher takes two forwards for each sample. Its student takes one: it has either learned the guidance at one scale, or takes
the scale as an input (Meng et al. 2023, §3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_env.denoiser import NetworkDenoiser
from ddil_env.expert import Expert
from ddil_env.guidance import GuidanceConditioning, no_guidance_below_1
from ddil_env.prediction import Prediction
from ddil_env.support import Support
from ddil_env.time_grid import TimeGrid
from ddil_env.worlds.world import World


class Distilled(Expert):
    """An expert that predicts with a student; data, conditions, pictures and students remain those of the student's own expert.

    Students that it makes start from the original expert's weights. To start one from the student, load the student's state_dict.

    Args:
        origin: The expert that made the student.
        student: The student. It is copied, so that training it further does not change this expert.
        guidance_scale: Default guidance scale of a student with a guidance embedding; default: the origin's. A student without one has
            its guidance built in, and supports no other: a scale of 1 (or less) alone.
        grid: The times that the student was trained on, which its policy steps over; default: those of the origin.

    Raises:
        ValueError: a guidance scale that is not finite, or is above 1 for a student without a guidance embedding.
    """

    guided_nfe = 1

    def __init__(self, origin: Expert, student: NetworkDenoiser, guidance_scale: float | None = None, grid: TimeGrid | None = None) -> None:
        self.origin, self.grid = origin, grid
        self.student = copy.deepcopy(student).eval().requires_grad_(False)
        if guidance_scale is None:
            guidance_scale = origin.guidance_scale if student.guidance_embedding else 1.0
        super().__init__(
            origin.schedule,
            origin.sample_shape,
            num_conditions=origin.num_conditions,
            condition_shape=origin.condition_shape,
            guidance_scale=guidance_scale,
            support=origin.support,
            device=origin.device,
        )
        self.extractor = origin.extractor
        self.max_batch = origin.max_batch

    def check_guidance(self, guidance_scale: float) -> float:
        guidance_scale = no_guidance_below_1(guidance_scale)
        if guidance_scale != 1 and not self.student.guidance_embedding:
            raise ValueError(
                f"guidance_scale={guidance_scale}: this student has its teacher's guidance built in; use guidance_scale=1, "
                "or distil one with guidance_embedding=True"
            )
        return guidance_scale

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        return self.guided(x_t, t, c)

    @torch.no_grad()
    def guided(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, guidance_scale: Tensor | float | None = None) -> Prediction:
        """Predicts with guidance in one forward for each sample.

        Args:
            x_t, t, c: As in `predict`.
            guidance_scale: w, a number or (b,) tensor, an input of the network; default: the expert's own.

        Raises:
            ValueError: a scale above 1 for a student without a guidance embedding.
        """
        w = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.student.guidance_embedding:
            scales = w.clamp(min=1) if isinstance(w, Tensor) else torch.full_like(t, self.check_guidance(w))
        else:
            scales = None
            for scale in w.unique().tolist() if isinstance(w, Tensor) else [w]:
                self.check_guidance(scale)
        self.nfe += len(x_t)
        return self.student.predict(x_t, t, c, scales)

    def substep_times(self, t: Tensor, s: Tensor, k: int) -> Tensor:
        """The times (k + 1, b) that the expert's policy steps over from t (b,) to s (b,): times of its grid, evenly by index."""
        if self.grid is None:
            return self.origin.substep_times(t, s, k)
        i, j = ((self.grid.times[:, None] > u).sum(0) for u in (t, s))  # t = grid.times[i], s = grid.times[j]; (b,) each
        index = i + (j - i) * torch.arange(1, k, device=t.device)[:, None] // k
        return torch.cat([t[None], self.grid.times[index], s[None]])

    def make_world(self, num_worlds: int, **options: Any) -> World | None:
        return self.origin.make_world(num_worlds, **options)

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        return self.origin.sample_condition(n, generator)

    @contextmanager
    def prompted(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        with self.origin.prompted(prompts) as ids:
            yield ids

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        return self.origin.sample_data(n, generator)

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor | None]:
        return self.origin.reference_data(n, held_out)

    def release(self) -> None:
        self.origin.release()

    def encode(self, samples: Tensor) -> Tensor:
        return self.origin.encode(samples)

    def decode(self, x_0: Tensor) -> Tensor | None:
        return self.origin.decode(x_0)

    def make_student(self, *args: Any, **overrides: Any) -> NetworkDenoiser:
        return self.origin.make_student(*args, **overrides)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        return self.origin.critic_features(student)

    def save_student(
        self,
        student: NetworkDenoiser,
        directory: Path,
        num_steps: int,
        grid: str = "linspace",
        kernel: str = "ddim",
        guidance: GuidanceConditioning | None = None,
    ) -> None:
        self.origin.save_student(student, directory, num_steps, grid, kernel, *([] if guidance is None else [guidance]))

    def sampling_support(self, support: Support) -> Support | None:
        return self.origin.sampling_support(support)

    def load_student(self, directory: Path, *args: Any, **overrides: Any) -> NetworkDenoiser:
        return self.origin.load_student(directory, *args, **overrides)
