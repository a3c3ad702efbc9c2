"""Collecting: states of each source, with the expert's action at every one of them.

    forward:  x_t = α_t x_0 + σ_t ε                  (x_0, c) ~ data,  t ~ U(grid)
    teacher:  the expert unrolled from x_T ~ N(0, I); its label *is* its next step, so it costs nothing more
    student:  the student unrolled; with p_expert > 0 each step's actor is drawn, expert or student (mixed rollouts)
    label:    x_s, where k guided expert DDIM steps lead from (x_t, t) to s

Expert forwards are the cost: k a state for every source, twice as many under guidance. The labels are kept, since a
fixed expert's label never goes stale. Each kind of randomness has its own generator: with β = (1, 0, 0) no rollout draws
a number, so the run is the vanilla method bit for bit.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents import ranks
from ddil_agents.buffer import SOURCES
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid
from ddil_env.mdp import Kernel
from ddil_env.schedule import broadcast

STREAMS = ("data", "noise", "time", "rollout", "guidance", "mixture", "loss", "real")


def stream_seed(seed: int, name: str) -> int:
    """A seed of its own for each named stream of a run: 32 bits of a hash, since torch's generator on the CPU keeps no more of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}, {name}".encode(), digest_size=4).digest())


def own_seed(seed: int, name: str) -> int:
    """A seed for this rank's own stream of that name; rank 0's is that of a single process."""
    return stream_seed(seed, f"{name}, rank {ranks.rank()}" if ranks.rank() else name)


class Collector:
    """Draws states from the three sources and labels them.

    Args:
        expert_policy: Labels, and unrolls the teacher.
        student_policy: Unrolls the student.
        grid: The times of the states; a label reaches from one to the next.
        seed: Of the streams.
        kernel: Of the student's steps.
        p_expert: Probability that the expert acts in a step of a student rollout.
        guidance_range: Draw each state's guidance scale w from here; default: the expert policy's own scale throughout.
    """

    shared: ClassVar[tuple[str, ...]] = ()  # streams that all ranks have in common; drawn on the host, so that no GPU is waited for

    def __init__(
        self,
        expert_policy: ExpertPolicy,
        student_policy: StudentPolicy,
        grid: TimeGrid,
        seed: int,
        *,
        kernel: Kernel = "ddim",
        p_expert: float = 0.0,
        guidance_range: tuple[float, float] | None = None,
    ) -> None:
        self.expert_policy, self.student_policy = expert_policy, student_policy
        self.expert = expert_policy.expert
        self.grid = grid
        self.kernel = kernel
        self.p_expert = p_expert
        self.guidance_range = guidance_range
        seeds = {name: (stream_seed if name in self.shared else own_seed)(seed, name) for name in STREAMS}
        self.streams = {
            name: torch.Generator("cpu" if name in self.shared else self.expert.device).manual_seed(seeds[name]) for name in STREAMS
        }
        self._owed = [0.0] * len(SOURCES)  # states that each source's share still owes, so that small collects add up to β exactly

    @torch.no_grad()
    def collect(self, n: int, beta: tuple[float, float, float], version: int) -> TensorDict:
        """About n labelled states, βᵢ n of source i, what does not divide carried to the next call.

        Args:
            n: States asked for.
            beta: Shares, in the order of SOURCES.
            version: Gradient steps that the student has had; recorded with each state.

        Returns:
            (m,) states: `x_t`, `x_s` (m, *sample_shape), `t`, `s` (m,), `c` (m,) if conditional, `w` (m,) with a guidance
            range, `source` uint8, `actors` (m, N) bool, true where the expert acted before this state, `version` int64,
            `nfe` int64, the expert forwards that the label took.
        """
        parts = []
        for i, (source, count) in enumerate(zip(SOURCES, self.counts(n, beta), strict=True)):
            if count:
                p_expert = {"teacher": 1.0, "student": self.p_expert}
                states = self.forward(count) if source == "forward" else self.rollout(count, p_expert[source])
                states["source"] = torch.full((len(states),), i, dtype=torch.uint8, device=states.device)
                states["version"] = torch.full((len(states),), version, dtype=torch.int64, device=states.device)
                parts.append(states)
        return torch.cat(parts) if parts else TensorDict(batch_size=[0], device=self.expert.device)

    def counts(self, n: int, beta: tuple[float, float, float]) -> list[int]:
        """Forward draws and rollouts of this collection, by source."""
        counts = []
        for i, (share, unit) in enumerate(zip(beta, self.units(), strict=True)):
            self._owed[i] += n * share
            counts.append(int(self._owed[i] / unit + 1e-9))
            self._owed[i] -= counts[i] * unit
        return counts

    def units(self) -> tuple[int, int, int]:
        """States that one forward draw, one teacher and one student rollout give."""
        return 1, self.grid.num_steps, self.grid.num_steps

    def forward(self, n: int) -> TensorDict:
        """n forward-diffused states, labelled."""
        x_0, c = self.expert.sample_data(n, self.streams["data"])
        step = torch.randint(self.grid.num_steps, (n,), generator=self.streams["time"], device=x_0.device)
        t = self.grid.times[step]
        x_t = self.noised(x_0, t)
        s, w = self.grid.previous(t), self.guidance(n)
        before = self.expert.nfe
        x_s = self.label(x_t, t, s, c, w)
        actors = torch.zeros(n, self.grid.num_steps, dtype=torch.bool, device=x_0.device)
        return self.states(x_t=x_t, t=t, s=s, c=c, w=w, x_s=x_s, actors=actors, nfe=(self.expert.nfe - before) // n)

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        """Every state that n denoisings visit, labelled; the actor of every step is drawn with p_expert."""
        times = self.visited(p_expert)  # (m + 1,), the last is 0
        m, shape = len(times) - 1, self.expert.sample_shape
        stream, device = self.streams["rollout"], self.expert.device
        x = torch.empty(n, m, *shape, device=device)
        x_s = torch.empty_like(x)  # the expert's action at each state
        x[:, 0] = torch.randn(n, *shape, generator=stream, device=device)
        c, w = self.expert.sample_condition(n, stream), self.guidance(n)
        by_expert = torch.rand(n, m, generator=stream, device=device) < p_expert
        may_act, before = p_expert > 0, self.expert.nfe
        for i, (t, u) in enumerate(pairwise(times)):
            t, u = t.expand(n), u.expand(n)
            s = self.grid.previous(t)  # of (n,): an index of no axes would wait for the device
            if may_act:
                x_s[:, i] = self.label(x[:, i], t, s, c, w)
            if i + 1 < m:  # the sample itself is no state to train on
                x[:, i + 1] = self.follow(x[:, i], t, u, c, w, x_s[:, i] if may_act else None, by_expert[:, i], p_expert)
        earlier = torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)  # state i has seen steps 0 … i−1
        actors = torch.zeros(n, m, self.grid.num_steps, dtype=torch.bool, device=device)
        actors[..., :m] = by_expert[:, None] & earlier
        x_t, x_s, actors = (a.flatten(0, 1) for a in (x, x_s, actors))  # (n · m, …)
        c, w = (None if a is None else a.repeat_interleave(m) for a in (c, w))
        t, s = times[:-1].repeat(n), self.grid.previous(times[:-1]).repeat(n)
        if not may_act:
            x_s = self.label(x_t, t, s, c, w)  # of all states at once, which is faster
        return self.states(x_t=x_t, t=t, s=s, c=c, w=w, x_s=x_s, actors=actors, nfe=(self.expert.nfe - before) // (n * m))

    def noised(self, x_0: Tensor, t: Tensor) -> Tensor:
        """Data x_0 (n, *sample_shape), diffused to t (n,)."""
        eps = torch.randn(x_0.shape, generator=self.streams["noise"], device=x_0.device)
        return self.expert.schedule.add_noise(x_0, eps, t)

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        """The expert's answer at the states: its action x_s, (n, *sample_shape)."""
        return self.expert_policy.act(x_t, t, s, c, w)

    def visited(self, p_expert: float) -> Tensor:
        """The times of a rollout's states, and 0, (m + 1,)."""
        return self.grid.times

    def follow(
        self, x_t: Tensor, t: Tensor, u: Tensor, c: Tensor | None, w: Tensor | None, x_s: Tensor | None, by_expert: Tensor, p_expert: float
    ) -> Tensor:
        """The next state of a rollout, at u: the expert's action x_s where it acts, elsewhere the student's step; None: it never does."""
        if x_s is not None and p_expert >= 1:
            return x_s
        if self.kernel == "ddim":
            own = self.student_policy.act(x_t, t, u, c, w)
        else:
            noise = torch.randn(x_t.shape, generator=self.streams["rollout"], device=x_t.device)
            own = self.student_policy.jump(x_t, t, u, noise, c, w)
        return own if x_s is None else torch.where(broadcast(by_expert, x_s), x_s, own)

    def guidance(self, n: int) -> Tensor | None:
        """w ~ U(guidance_range), (n,), or None where there is one scale for all."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        return low + (high - low) * torch.rand(n, generator=self.streams["guidance"], device=self.expert.device)

    def cost(self, policy: ExpertPolicy) -> int:
        """Forwards of one action of the expert, at a state as they come from here: one with a w of its own takes the guided pair."""
        return policy.nfe_per_action if self.guidance_range is None else policy.substeps * self.expert.guided_nfe

    def states(self, nfe: int, **fields: Tensor | None) -> TensorDict:
        """The fields that are there as one TensorDict (n,)."""
        present = {k: v for k, v in fields.items() if v is not None}
        t = present["t"]
        present["nfe"] = torch.full_like(t, nfe, dtype=torch.int64)
        return TensorDict(present, batch_size=[len(t)], device=t.device)

    def state_dict(self) -> dict[str, Any]:
        return {"owed": list(self._owed), "streams": {name: g.get_state() for name, g in self.streams.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._owed = list(state["owed"])
        for name, generator in self.streams.items():
            generator.set_state(state["streams"][name].cpu())
