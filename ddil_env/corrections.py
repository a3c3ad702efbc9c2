"""Corrections of exposure bias at inference, without training: policies that wrap policies, for `unroll`, environments and evaluation.

    epsilon scaling     ε̂' = ε̂/λ ,  x̂_0' = (x_t − σ_t ε̂')/α_t                    Ning et al. 2024
    time shift          t' = argmin |Var(x_t) − σ_τ²| over τ in t − w/2 … t + w/2       Li et al. 2024
    mixing              a = a*(x_t) with probability p, else a_θ(x_t)                   teacher and student act by chance

    policy = ScaledEpsilon(agent.student_policy, 1.005)
    samples = unroll(policy, agent.grid, x_T)[:, -1]

Each queries the wrapped policy once for each action, so that it costs the same. They can be nested, with epsilon scaling innermost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.policy import DdimPolicy
from ddil_env.prediction import Prediction


class ScaledEpsilon(DdimPolicy):
    """Epsilon scaling: the noise estimate is divided by λ before the step.

    On its own samples a network overestimates the noise, ‖ε̂‖ is too large, and it removes too much. As in the paper's sampler, x̂_0 is
    computed from the scaled ε̂, so that α_t x̂_0' + σ_t ε̂' = x_t still holds; projection onto the support follows. Unlike the paper's
    sampler this leaves the first state alone: pure noise holds no error of an earlier step, and the change in x̂_0 is multiplied by σ/α
    there, which is thousands on a cosine schedule. The paper's samplers clip x̂_0 to ±1; a student's does not.

    Args:
        policy: The policy to correct.
        scale: λ; 1 changes nothing, and the paper uses 1.004 … 1.017 for 100 steps.

    Raises:
        ValueError: a scale that is not positive, or a policy that wraps others.
    """

    def __init__(self, policy: DdimPolicy, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}: epsilon is divided by it; need a positive number near 1, such as 1.005")
        if type(policy).act is not DdimPolicy.act:
            raise ValueError(f"a {type(policy).__name__} wraps other policies; apply ScaledEpsilon to the inner policy")

        def predict(x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
            pred = policy.predict(x_t, t, c, w)
            alpha, sigma = pred.schedule(t, pred.x_0)
            eps_change = (1 - 1 / scale) * pred.eps  # ε̂ − ε̂/λ
            first = broadcast(t >= pred.schedule.t_max, eps_change)
            eps_change, x_0_change = (torch.where(first, 0, change) for change in (eps_change, sigma / alpha * eps_change))
            return Prediction(pred.x_0 + x_0_change, pred.eps - eps_change, t, pred.schedule)

        super().__init__(
            predict,
            policy.schedule,
            substeps=policy.substeps,
            support=policy.support,
            conditional="c" in policy.in_keys,
            max_batch=policy.max_batch,
        )
        self.nfe_per_action, self.acted_by_expert = policy.nfe_per_action, policy.acted_by_expert
        self.policy, self.scale = policy, scale


class TimeShifted(DdimPolicy):
    """The time-shift sampler: each state is given the time whose noise level fits it best, and the step starts from that time.

    The variance over a sample's entries is compared with σ_τ², as if the data had no variance. This misleads at small t, where the data
    dominate, and for samples of few entries; `cutoff` and `window` limit the harm, and with `data_variance` v the variance is compared
    with α_τ² v + σ_τ². One of the paper's released solvers shifts only the network's time and another only the target time; here the
    whole step starts from the shifted time.

    Args:
        policy: The policy to correct.
        window: w; times up to w/2 away are tried, in whole steps of the chain, as long as they are later than s.
        cutoff: Times up to this one are not shifted; nor is the first state, pure noise.
        data_variance: v, the variance of a clean sample's entries; the paper uses 0.

    Raises:
        ValueError: a negative or infinite window, cutoff or variance.
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
        """The shifted times t' (b,) of x_t (b, *sample_shape) at t (b,), for steps to s (b,)."""
        offsets = torch.arange(-(self.window // 2), self.window // 2 + 1, device=t.device, dtype=t.dtype)
        tau = t[:, None] + offsets[offsets.abs().argsort(stable=True)]  # (b, w + 1), t itself first, so that it wins a tie
        inside = (tau > s[:, None]) & (tau >= 1) & (tau <= self.schedule.t_max)
        alpha, sigma = self.schedule.coefficients(torch.where(inside, tau, t[:, None]))
        gap = (x_t.flatten(1).double().var(1)[:, None] - (alpha**2 * self.data_variance + sigma**2)).abs()
        best = tau.gather(1, gap.masked_fill(~inside, math.inf).argmin(1, keepdim=True))[:, 0]
        return torch.where((t > self.cutoff) & (t < self.schedule.t_max), best, t)

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        x_s = self.policy.act(x_t, self.shifted(x_t, t, s), s, c, w)
        self.acted_by_expert = self.policy.acted_by_expert
        return x_s

    def act_renoise(self, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        return self.policy.act_renoise(x_t, self.shifted(x_t, t, s), s, noise, c, w)


class Mixed(DdimPolicy):
    """A mixture of teacher and student: which of them acts is drawn for each sample and step.

    Only the policy that acts runs, so that `nfe_per_action` is a mean.

    Args:
        teacher, student: The two policies.
        p: Probability that the teacher acts.
        seed: Seed of the draws; they continue from call to call.

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
        self.acted_by_expert = by_teacher = torch.rand(len(x_t), generator=self._generator, device=x_t.device) < self.p
        x_s = torch.empty_like(x_t)
        for policy, acts in ((self.teacher, by_teacher), (self.student, ~by_teacher)):
            if acts.any():
                c_own, w_own = (None if a is None else a[acts] for a in (c, w))
                x_s[acts] = policy.act(x_t[acts], t[acts], s[acts], c_own, w_own)
        return x_s
