"""Policies on the diffusion MDP: (x_t, t, s, c) → the next latent x_s. An expert and a student differ in the denoiser alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from ddil_env.expert import Denoiser, Expert, Predict
from ddil_env.prediction import Prediction
from ddil_env.schedule import NoiseSchedule
from ddil_env.steps import invert_ddim, renoise_step
from ddil_env.support import Support, Unbounded
from ddil_env.time_grid import substep_times


class DdimPolicy(TensorDictModuleBase):
    """A denoiser as a policy: its action at (x_t, t) is the latent that `substeps` DDIM steps put at s.

    Reads `x_t`, `t`, `s` and, if conditional, `c` of a TensorDict and writes `action`.

    Args:
        predict: The denoiser's predict(x_t, t, c, w), w None for its own guidance; a subclass has a method of that name instead.
        schedule: Of the times that it steps over.
        substeps: Denoiser steps in one action.
        support: Where its estimates of x_0 are projected.
        conditional: Whether the observation has `c`.
        max_batch: Largest batch that goes through the denoiser at once; larger ones go in parts.

    Raises:
        ValueError: substeps is less than 1.
    """

    by_expert: bool | Tensor = False  # whether an expert takes its actions; (b,) of the last ones, where it takes some

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
        if substeps < 1:
            raise ValueError(f"substeps={substeps}: an action takes at least one step of the denoiser")
        self.out_keys = ["action"]
        self.in_keys = ["x_t", "t", "s", "c"] if conditional else ["x_t", "t", "s"]
        self._predict = predict
        self.schedule = schedule
        self.substeps = substeps
        self.support = Unbounded() if support is None else support
        self.max_batch = max_batch
        self.nfe_per_action = substeps

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        """What the denoiser believes at (x_t, t)."""
        assert self._predict is not None
        return self._predict(x_t, t, c, w)

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The action x_s (b, *sample_shape) at states x_t (b, *sample_shape), t (b,), for targets s (b,).

        Args:
            c: Condition ids, (b,).
            w: Guidance scales, (b,); default: the policy's own.
        """
        if self.max_batch is not None and len(x_t) > self.max_batch:
            parts = [[None] * len(x_t) if a is None else a.split(self.max_batch) for a in (x_t, t, s, c, w)]
            return torch.cat([self.act(*part) for part in zip(*parts, strict=False)])
        for now, then in pairwise(self.times(t, s)):
            x_t = self.predict(x_t, now, c, w).projected(self.support).latent(then, self.schedule)
        return x_t

    def times(self, t: Tensor, s: Tensor) -> Tensor:
        """The times that an action steps over, from t to s, each (b,): (substeps + 1, b)."""
        return substep_times(self.schedule, t, s, self.substeps)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """Where the `renoise` kernel leads: the action's estimate of x_0, diffused to s with fresh noise (b, *sample_shape)."""
        return renoise_step(invert_ddim(self.schedule, x_t, t, self.act(x_t, t, s, c, w), s), s, noise)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        axes = tensordict.batch_dims  # (*batch, …) → (b, …) and back: an env may have any batch shape, and a trajectory has two axes
        flat = [tensordict[key].reshape(-1, *tensordict[key].shape[axes:]) for key in self.in_keys]
        return tensordict.set("action", self.act(*flat).reshape(tensordict["x_t"].shape))


class ExpertPolicy(DdimPolicy):
    """The expert's action: `substeps` of its own DDIM steps, over times that it was trained on, guided, projected onto a support.

    Args:
        expert: The teacher.
        substeps: k; on an N-step grid the expert then acts as its own N·k-step sampler.
        guidance_scale: Classifier-free guidance; default: the expert's own.
        project: False leaves the estimates where they fall (no thresholding).
        support: Where they are projected; default: the expert's own.
        schedule: Whose levels it steps between; default: the expert's own.
    """

    by_expert = True

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
            conditional=expert.num_conditions > 0,
            max_batch=expert.max_batch,
        )
        self.expert = expert
        self.guidance_scale = own
        self.nfe_per_action = substeps * (1 if own == 1 else expert.guided_nfe)
        self.project = project

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        return self.expert.guided(x_t, t, c, self.guidance_scale if w is None else w)

    def times(self, t: Tensor, s: Tensor) -> Tensor:
        return self.expert.times_between(t, s, self.substeps)


class StudentPolicy(DdimPolicy):
    """A student's action: one DDIM step of its own.

    Args:
        student: The learner's denoiser.
        expert: The expert that it imitates; gives schedule and conditions.
        support: Where the student's estimates are projected; default: nowhere.
        guidance_scale: What a guidance-conditioned student is told where a state does not say; default: nothing is told.
    """

    def __init__(self, student: Denoiser, expert: Expert, support: Support | None = None, guidance_scale: float | None = None) -> None:
        super().__init__(None, expert.schedule, support=support, conditional=expert.num_conditions > 0, max_batch=expert.max_batch)
        self.student = student
        self.guidance_scale = guidance_scale

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        if self.guidance_scale is None:
            return self.student.predict(x_t, t, c)
        return self.student.predict(x_t, t, c, torch.full_like(t, self.guidance_scale) if w is None else w)
