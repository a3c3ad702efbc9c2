"""Collecting: states of each source, with the expert's label for every one of them.

    forward:  x_t = α_t x_0 + σ_t ε                  (x_0, c) ~ data,  t ~ U(grid)
    teacher:  the expert unrolled from x_T ~ N(0, I); its label *is* its next step, so it costs nothing more
    student:  the student unrolled; with p_expert > 0 each step's actor is drawn, expert or student (mixed rollouts)
    label:    k expert DDIM steps t → s, inverted to x_tgt (Salimans & Ho 2021, App. G)

Expert forwards are the cost: k a state for every source, twice as many under guidance. The labels are kept, since a
fixed expert's label never goes stale. Each kind of randomness has its own generator: with β = (1, 0, 0) no rollout draws
a number, so the run is the vanilla method bit for bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.buffer import SOURCES
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid, invert_ddim
from ddil_env.schedule import broadcast

STREAMS = ("data", "noise", "time", "rollout")


def stream_seed(seed: int, name: str) -> int:
    """A seed of its own for each named stream of a run."""
    return (seed * 1_000_003 + sum(ord(ch) * 257**i for i, ch in enumerate(name))) % 2**63


class Collector:
    """Draws labelled states from the three sources.

    Args:
        expert_policy: Labels, and unrolls the teacher.
        student_policy: Unrolls the student.
        grid: The student's N times.
        p_expert: Probability that the expert acts in a step of a student rollout.
        seed: Of the streams.
    """

    def __init__(self, expert_policy: ExpertPolicy, student_policy: StudentPolicy, grid: TimeGrid, p_expert: float, seed: int) -> None:
        self.expert_policy, self.student_policy = expert_policy, student_policy
        self.expert = expert_policy.expert
        self.grid = grid
        self.p_expert = p_expert
        self.streams = {name: torch.Generator(self.expert.device).manual_seed(stream_seed(seed, name)) for name in STREAMS}
        self._owed = [0.0] * len(SOURCES)  # states that each source's share still owes, so that small collects add up to β exactly

    @torch.no_grad()
    def collect(self, n: int, beta: tuple[float, float, float], version: int) -> TensorDict:
        """About n labelled states, βᵢ n of source i, what does not divide carried to the next call.

        Args:
            n: States asked for.
            beta: Shares, in the order of SOURCES.
            version: Gradient steps that the student has had; recorded with each state.

        Returns:
            (m,) states: `x_t`, `x_tgt` (m, *sample_shape), `t`, `s` (m,), `c` (m,) if conditional, `source` uint8,
            `actors` (m, N) bool, true where the expert acted before this state, `version` int64, `nfe` int64, the expert
            forwards that the label took.
        """
        parts = []
        for i, (source, share) in enumerate(zip(SOURCES, beta, strict=True)):
            self._owed[i] += n * share
            unit = 1 if source == "forward" else self.grid.num_steps  # a rollout gives a state a step
            count = int(self._owed[i] / unit + 1e-9)
            self._owed[i] -= count * unit
            if count:
                p_expert = {"teacher": 1.0, "student": self.p_expert}
                states = self.forward(count) if source == "forward" else self.rollout(count, p_expert[source])
                states["source"] = torch.full((len(states),), i, dtype=torch.uint8, device=states.device)
                states["version"] = torch.full((len(states),), version, dtype=torch.int64, device=states.device)
                parts.append(states)
        return torch.cat(parts) if parts else TensorDict(batch_size=[0], device=self.expert.device)

    def forward(self, n: int) -> TensorDict:
        """n forward-diffused states, labelled."""
        x_0, c = self.expert.sample_data(n, self.streams["data"])
        eps = torch.randn(x_0.shape, generator=self.streams["noise"], device=x_0.device)
        step = torch.randint(self.grid.num_steps, (n,), generator=self.streams["time"], device=x_0.device)
        t = self.grid.times[step]
        x_t = self.expert.schedule.add_noise(x_0, eps, t)
        s = self.grid.previous(t)
        actors = torch.zeros(n, self.grid.num_steps, dtype=torch.bool, device=x_0.device)
        return self._states(x_t, t, s, c, self.expert_policy.act(x_t, t, s, c), actors)

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        """The N states of each of n denoisings, labelled, (n · N,); the actor of every step is drawn with p_expert."""
        num_steps, shape = self.grid.num_steps, self.expert.sample_shape
        stream, device = self.streams["rollout"], self.expert.device
        x = torch.empty(n, num_steps, *shape, device=device)
        x_s = torch.empty_like(x)  # the expert's action at each state
        x[:, 0] = torch.randn(n, *shape, generator=stream, device=device)
        c = self.expert.sample_condition(n, stream)
        by_expert = torch.rand(n, num_steps, generator=stream, device=device) < p_expert
        for i, (t, s) in enumerate(pairwise(self.grid.times)):
            t, s = t.expand(n), s.expand(n)
            x_s[:, i] = self.expert_policy.act(x[:, i], t, s, c)
            if i + 1 == num_steps:
                break  # the sample itself is no state to train on
            if p_expert >= 1:
                x[:, i + 1] = x_s[:, i]
            else:
                x[:, i + 1] = torch.where(broadcast(by_expert[:, i], x_s[:, i]), x_s[:, i], self.student_policy.act(x[:, i], t, s, c))
        before = torch.ones(num_steps, num_steps, dtype=torch.bool, device=device).tril(-1)  # state i has seen steps 0 … i−1
        actors = by_expert[:, None] & before  # (n, N, N)
        t, s = (times.repeat(n) for times in (self.grid.times[:-1], self.grid.times[1:]))  # (n · N,)
        c = None if c is None else c.repeat_interleave(num_steps)
        return self._states(x.flatten(0, 1), t, s, c, x_s.flatten(0, 1), actors.flatten(0, 1))

    def _states(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, x_s: Tensor, actors: Tensor) -> TensorDict:
        x_tgt = invert_ddim(self.expert.schedule, x_t, t, x_s, s).x_0
        nfe = torch.full_like(t, self.expert_policy.nfe_per_action, dtype=torch.int64)
        fields = {"x_t": x_t, "t": t, "s": s, "c": c, "x_tgt": x_tgt, "actors": actors, "nfe": nfe}
        return TensorDict({k: v for k, v in fields.items() if v is not None}, batch_size=[len(x_t)], device=x_t.device)

    def state_dict(self) -> dict[str, Any]:
        return {"owed": list(self._owed), "streams": {name: g.get_state() for name, g in self.streams.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._owed = list(state["owed"])
        for name, generator in self.streams.items():
            generator.set_state(state["streams"][name].cpu())
