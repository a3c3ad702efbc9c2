"""Policies on the diffusion MDP: (x_t, t, s, c) → the next latent x_s. An expert's and a student's differ only in the denoiser."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from ddil_env.denoiser import Denoiser, Predict
from ddil_env.errors import check_whole
from ddil_env.expert import Expert
from ddil_env.prediction import Prediction
from ddil_env.schedule import NoiseSchedule
from ddil_env.steps import invert_ddim, renoise_step
from ddil_env.support import Support, Unbounded
from ddil_env.time_grid import TimeGrid, substep_times


class DdimPolicy(TensorDictModuleBase):
    """A denoiser as a policy: its action at (x_t, t) is the latent at s after `substeps` DDIM steps.

    As a TensorDict module it reads `x_t`, `t`, `s` and, if conditional, `c`, and writes `action`.

    Args:
        predict: The denoiser's predict(x_t, t, c, w), with w None for its own guidance scale; None in a subclass that overrides the
            method `predict`.
        schedule: The schedule of the times that the policy steps over.
        substeps: Denoiser steps in one action.
        support: Where estimates of x_0 are projected; default: they are not.
        conditional: Whether the observation has `c`.
        max_batch: Largest batch that goes through the denoiser at once; larger ones are split.

    Attributes:
        nfe_per_action: Forwards that an action takes for each sample.
        acted_by_expert: Whether an expert acted: one bool for all samples or, in a policy that mixes, (b,) bool for the last actions.

    Raises:
        ValueError: substeps is less than 1.
    """

    acted_by_expert: bool | Tensor = False

    def __init__(
        self,
        predict: Predict | None,
        schedule: NoiseSchedule,
        *,
        substeps: int = 1,
        support: Support | None = None,
        conditional: bool = True,
        max_batch: int | None = None,
    ) -> None:
        super().__init__()
        check_whole("substeps", substeps, 1, int(schedule.t_max), ", the teacher's chain: steps of the denoiser in an action")
        self.out_keys = ["action"]
        self.in_keys = ["x_t", "t", "s", "c"] if conditional else ["x_t", "t", "s"]
        self._predict = predict
        self.schedule = schedule
        self.substeps = substeps
        self.support = Unbounded() if support is None else support
        self.max_batch = max_batch
        self.nfe_per_action = substeps

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        """The denoiser's prediction at (x_t, t); arguments as in `act`."""
        assert self._predict is not None
        return self._predict(x_t, t, c, w)

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The actions x_s, (b, *sample_shape).

        Args:
            x_t: Latents, (b, *sample_shape).
            t: Their times, (b,).
            s: The times to reach, (b,).
            c: Condition ids, (b,), or None.
            w: Guidance scales, (b,); default: the policy's own.
        """
        if self.max_batch is not None and len(x_t) > self.max_batch:
            columns = [[None] * len(x_t) if a is None else a.split(self.max_batch) for a in (x_t, t, s, c, w)]
            return torch.cat([self.act(*part) for part in zip(*columns, strict=False)])
        for now, after in pairwise(self.substep_times(t, s)):
            x_t = self.predict(x_t, now, c, w).projected(self.support).latent(after, self.schedule)
        return x_t

    def substep_times(self, t: Tensor, s: Tensor) -> Tensor:
        """The times (substeps + 1, b) that an action steps over, from t (b,) to s (b,)."""
        return substep_times(self.schedule, t, s, self.substeps)

    def act_renoise(self, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The next latents under the `renoise` kernel: the actions' estimates of x_0, diffused to s with fresh noise.

        Args:
            x_t, t, s, c, w: As in `act`.
            noise: Fresh ε ~ N(0, I), (b, *sample_shape).
        """
        return renoise_step(invert_ddim(self.schedule, x_t, t, self.act(x_t, t, s, c, w), s), s, noise)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        axes = tensordict.batch_dims  # (*batch, …) → (b, …) and back: an env's batch may have any shape, a trajectory's has two axes
        flat = [tensordict[key].reshape(-1, *tensordict[key].shape[axes:]) for key in self.in_keys]
        return tensordict.set("action", self.act(*flat).reshape(tensordict["x_t"].shape))


class ExpertPolicy(DdimPolicy):
    """The expert's policy: an action is `substeps` guided DDIM steps of the expert, each estimate projected onto a support.

    Args:
        expert: The teacher.
        substeps: k; on an N-step grid the expert acts as an N·k-step sampler.
        guidance_scale: Scale of classifier-free guidance; default: the expert's own.
        project: Whether estimates of x_0 are projected (thresholding).
        support: Where they are projected; default: the expert's own.
        schedule: Gives α and σ of the times that it steps to; default: the expert's own.

    Raises:
        ValueError: substeps is less than 1, or a guidance scale that the expert does not support.
    """

    acted_by_expert = True

    def __init__(
        self,
        expert: Expert,
        substeps: int = 1,
        guidance_scale: float | None = None,
        project: bool = True,
        support: Support | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        own = expert.guidance_scale if guidance_scale is None else expert.check_guidance(guidance_scale)
        super().__init__(
            None,
            expert.schedule if schedule is None else schedule,
            substeps=substeps,
            support=(expert.support if support is None else support) if project else None,
            conditional=expert.conditional,
            max_batch=expert.max_batch,
        )
        self.expert = expert
        self.guidance_scale = own
        self.nfe_per_action = substeps * (1 if own == 1 else expert.guided_nfe)
        self.project = project

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        return self.expert.guided(x_t, t, c, self.guidance_scale if w is None else w)

    def substep_times(self, t: Tensor, s: Tensor) -> Tensor:
        return self.expert.substep_times(t, s, self.substeps)


class StudentPolicy(DdimPolicy):
    """The student's policy: an action is one DDIM step of the student.

    Args:
        student: The learner's denoiser.
        expert: The expert that it imitates; gives schedule and conditions.
        support: Where the student's estimates of x_0 are projected; default: they are not.
        guidance_scale: The guidance scale that a student with a guidance embedding gets where `act` is given no w; None for a student
            without a guidance embedding.
        grid: The times that the student was trained for; an environment of other times is refused. None: any times.
        kernel: How it samples, `ddim` or `renoise`; an environment of another kernel is refused. None: either.
    """

    def __init__(
        self,
        student: Denoiser,
        expert: Expert,
        support: Support | None = None,
        guidance_scale: float | None = None,
        *,
        grid: TimeGrid | None = None,
        kernel: str | None = None,
    ) -> None:
        super().__init__(None, expert.schedule, support=support, conditional=expert.conditional, max_batch=expert.max_batch)
        self.student = student
        self.guidance_scale = guidance_scale
        self.grid, self.kernel = grid, kernel

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The action at an environment's states.

        Raises:
            ValueError: the environment steps to a time that the student was not trained to step to.
        """
        if self.grid is not None:
            strange = tensordict["s"][~torch.isin(tensordict["s"], self.grid.times.to(tensordict["s"]))]
            if len(strange):
                times = ", ".join(f"{t:g}" for t in self.grid.times.tolist())
                raise ValueError(
                    f"the environment steps to t = {float(strange[0]):g}, and this student was trained to step through {times}; make its "
                    "environment with agent.make_env()"
                )
        return super().forward(tensordict)

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        if self.guidance_scale is None:
            return self.student.predict(x_t, t, c)
        return self.student.predict(x_t, t, c, torch.full_like(t, self.guidance_scale) if w is None else w)
