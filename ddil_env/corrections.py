"""Exposure bias mended at inference, without training: policies made of policies, for `unroll`, the environments and the Judge.

    epsilon scaling     ε̂' = ε̂/λ ,  x̂_0' = (x_t − σ_t ε̂')/α_t                    Ning et al. 2024
    time shift          t' = argmin |Var(x_t) − σ_τ²| over τ in t − w/2 … t + w/2       Li et al. 2024
    mixing              a = a*(x_t) with probability p, else a_θ(x_t)                   teacher and student in turns

    policy = ScaledEpsilon(agent.student_policy, 1.005)
    samples = unroll(policy, agent.grid, x_T)[:, -1]

Each asks the policy beneath it once an action, and has its cost. They can be put into one another, epsilon scaling innermost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.policy import DdimPolicy
from ddil_env.prediction import Prediction


class ScaledEpsilon(DdimPolicy):
    """Epsilon scaling: the noise estimate is divided by λ before the step is made of it.

    Along its own samples a network finds more noise than there is, ‖ε̂‖ too large, and takes off too much. Their sampler scales ε̂
    and reads x̂_0 off the scaled one, so that α_t x̂_0' + σ_t ε̂' = x_t still holds; so does this. Projection onto the support comes after.
    Unlike theirs it leaves the first state alone: pure noise holds no earlier step's error, and x̂_0 moves by σ/α there, on a cosine
    schedule by thousands, which their samplers clip to ±1 and a student's does not.

    Args:
        policy: The one to correct.
        scale: λ; 1 changes nothing, 1.004 … 1.017 are theirs for 100 steps.

    Raises:
        ValueError: a scale that is not positive, or a policy that is made of others.
    """

    def __init__(self, policy: DdimPolicy, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: epsilon is divided by it; need a positive number near 1, such as 1.005")
        if type(policy).act is not DdimPolicy.act:
            raise ValueError(f"a {type(policy).__name__} is made of other policies; scale those")

        def predict(x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
            pred = policy.predict(x_t, t, c, w)
            alpha, sigma = pred.schedule(t, pred.x_0)
            off = (1 - 1 / scale) * pred.eps  # ε̂ − ε̂/λ
            first = broadcast(t >= pred.schedule.t_max, off)
            off, moved = (torch.where(first, 0, change) for change in (off, sigma / alpha * off))
            return Prediction(pred.x_0 + moved, pred.eps - off, t, pred.schedule)

        super().__init__(
            predict,
            policy.schedule,
            substeps=policy.substeps,
            support=policy.support,
            conditional="c" in policy.in_keys,
            max_batch=policy.max_batch,
        )
        self.nfe_per_action, self.by_expert = policy.nfe_per_action, policy.by_expert
        self.policy, self.scale = policy, scale


class TimeShifted(DdimPolicy):
    """The time-shift sampler: a state is read at the time whose noise it holds, and the step is made from there.

    The variance over a sample's entries stands for σ², as if the data had none; so it misleads at small t, where the data show,
    and for samples of few entries. `cutoff` and `window` bound the harm; `data_variance` v compares with α_τ² v + σ_τ² instead.
    (Of their released solvers one shifts the network's time alone, another the time stepped to;
    here the whole step is made from the shifted time.)

    Args:
        policy: The one to correct.
        window: w; times up to w/2 away are tried, in whole steps of the chain, later than s.
        cutoff: Down to which time; the first state, pure noise, is never shifted.
        data_variance: v, of a clean sample's entries; 0 is the paper's.

    Raises:
        ValueError: a negative window, cutoff or variance.
    """

    def __init__(self, policy: DdimPolicy, window: int, cutoff: float, data_variance: float = 0.0) -> None:
        for name, value in (("window", window), ("cutoff", cutoff), ("data_variance", data_variance)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: need a number ≥ 0")
        conditional = "c" in policy.in_keys
        super().__init__(policy.predict, policy.schedule, substeps=policy.substeps, support=policy.support, conditional=conditional)
        self.nfe_per_action = policy.nfe_per_action
        self.policy, self.window, self.cutoff, self.data_variance = policy, window, cutoff, data_variance

    def shifted(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """t', (b,)."""
        near = torch.arange(-(self.window // 2), self.window // 2 + 1, device=t.device, dtype=t.dtype)
        tau = t[:, None] + near[near.abs().argsort(stable=True)]  # (b, w + 1), t itself first, so that a tie leaves it
        inside = (tau > s[:, None]) & (tau >= 1) & (tau <= self.schedule.t_max)
        alpha, sigma = self.schedule.coefficients(torch.where(inside, tau, t[:, None]))
        gap = (x_t.flatten(1).double().var(1)[:, None] - (alpha**2 * self.data_variance + sigma**2)).abs()
        best = tau.gather(1, gap.masked_fill(~inside, math.inf).argmin(1, keepdim=True))[:, 0]
        return torch.where((t > self.cutoff) & (t < self.schedule.t_max), best, t)

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        x_s = self.policy.act(x_t, self.shifted(x_t, t, s), s, c, w)
        self.by_expert = self.policy.by_expert
        return x_s

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        return self.policy.jump(x_t, self.shifted(x_t, t, s), s, noise, c, w)


class Mixed(DdimPolicy):
    """Teacher and student in turns: who acts is drawn for each sample and step.

    `nfe_per_action` is the mean: only the one that acts is computed.

    Args:
        teacher, student: The two policies.
        p: Probability that the teacher acts.
        seed: Of the draws, which go on from call to call.

    Raises:
        ValueError: p outside [0, 1].
    """

    def __init__(self, teacher: DdimPolicy, student: DdimPolicy, p: float, seed: int = 0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}: need a probability in [0, 1]; 0 is the student, 1 the teacher")
        super().__init__(student.predict, student.schedule, support=student.support, conditional="c" in student.in_keys)
        self.nfe_per_action = p * teacher.nfe_per_action + (1 - p) * student.nfe_per_action  # type: ignore[assignment]
        self.teacher, self.student, self.p, self.seed = teacher, student, p, seed
        self._generator: torch.Generator | None = None  # on the device of the first states

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(x_t.device).manual_seed(self.seed)
        self.by_expert = by_teacher = torch.rand(len(x_t), generator=self._generator, device=x_t.device) < self.p
        x_s = torch.empty_like(x_t)
        for policy, acts in ((self.teacher, by_teacher), (self.student, ~by_teacher)):
            if acts.any():
                c_own, w_own = (None if a is None else a[acts] for a in (c, w))
                x_s[acts] = policy.act(x_t[acts], t[acts], s[acts], c_own, w_own)
        return x_s
