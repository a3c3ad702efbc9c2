"""Collecting: states of each source, with the expert's action at every one of them.

    forward:  x_t = α_t x_0 + σ_t ε                  (x_0, c) ~ data,  t ~ U(grid)
    teacher:  the expert unrolled from x_T ~ N(0, I); its label *is* its next step
    student:  the student unrolled; with p_expert > 0 each step's actor is drawn, expert or student (mixed rollouts)
    label:    x_s, where k guided expert DDIM steps lead from (x_t, t) to s

Algorithm 1 of DDIL draws *a state*, and so does `states_per_rollout` = 1: each rollout stops at a time drawn uniformly from the
grid, and that state alone is labelled. Its N states are not N draws: they share noise and condition. A state costs

    forward   k expert forwards                                   (twice as many under guidance, in every line)
    student   k expert and on average (N − 1)/2 student forwards
    teacher   k (N + 1)/2 expert forwards on average

`all` labels every state of a rollout, N for k N expert forwards and N − 1 student forwards. That is cheaper, and leaves a batch with
a fraction of the independent states. The labels are kept, since a fixed expert's label never goes stale. Each kind of randomness has
its own generator: with β = (1, 0, 0) no rollout draws a number, so the run is the vanilla method bit for bit.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.devices import ranks
from ddil_agents.states.beta import SOURCES, split_collection
from ddil_agents.states.episodes import collect_episode_states
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid
from ddil_env.mdp import Kernel
from ddil_env.worlds.world import World

STREAMS = ("data", "noise", "time", "rollout", "path", "guidance", "mixture", "loss", "real")

StatesPerRollout = Literal[1, "all"]


def stream_seed(seed: int, name: str) -> int:
    """Derives the seed of a named random stream: 32 bits of a hash, since torch's generator on the CPU keeps no more of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}, {name}".encode(), digest_size=4).digest())


def rank_stream_seed(seed: int, name: str) -> int:
    """Derives the seed of a named random stream of this rank; rank 0 has that of a single process."""
    return stream_seed(seed, f"{name}, rank {ranks.rank()}" if ranks.rank() else name)


def _rows(tensors: tuple[Tensor | None, ...], index: Tensor) -> list[Any]:
    return [None if a is None else a[index] for a in tensors]


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
        states_per_rollout: States that a teacher or student rollout gives: 1, at a time drawn uniformly, or all.
        world: Where rollouts are whole episodes (episodes.py); None: a rollout is one denoising.

    Attributes:
        collected: States of each source in the last collection, in which they lie source after source.
        world_steps: Samples that worlds have taken so far.
        unlabelled: States that the expert's own episodes have visited and that are not labelled yet, (m,).

    Raises:
        ValueError: states_per_rollout=all in a world.
    """

    shared: ClassVar[tuple[str, ...]] = ()  # streams that all ranks have in common
    on_host: ClassVar[tuple[str, ...]] = ("path",)  # streams that set the shapes of the work: a GPU would be waited for

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
        states_per_rollout: StatesPerRollout = 1,
        world: World | None = None,
    ) -> None:
        if world is not None and states_per_rollout == "all":
            raise ValueError("states_per_rollout=all: in a world each denoising of an episode gives one state; use 1")
        self.expert_policy, self.student_policy = expert_policy, student_policy
        self.expert = expert_policy.expert
        self.grid = grid
        self.kernel = kernel
        self.p_expert = p_expert
        self.guidance_range = guidance_range
        self.states_per_rollout = states_per_rollout
        seeds = {name: (stream_seed if name in self.shared else rank_stream_seed)(seed, name) for name in STREAMS}
        self.streams = {
            name: torch.Generator("cpu" if name in self.shared + self.on_host else self.expert.device).manual_seed(seeds[name])
            for name in STREAMS
        }
        self.world, self.world_steps = world, 0
        self.unlabelled: TensorDict | None = None
        if world is not None:
            self.streams["world"] = torch.Generator().manual_seed(rank_stream_seed(seed, "world"))
        self.collected = [0] * len(SOURCES)
        self._remainder = [0.0] * len(SOURCES)  # states of each source's share that earlier collections left out

    @torch.no_grad()
    def collect(self, n: int, beta: tuple[float, float, float], version: int) -> TensorDict:
        """Collects about n labelled states, βᵢ n of source i; what does not divide is carried to the next call.

        Args:
            n: States asked for.
            beta: Shares, in the order of SOURCES.
            version: Gradient steps that the student has had; recorded with each state.

        Returns:
            (m,) states: `x_t`, `x_s` (m, *sample_shape), `t`, `s` (m,), `c` (m,) if conditional, `w` (m,) with a guidance
            range, `source` uint8, `actors` (m, N) bool, true where the expert acted before this state, `version` int64,
            `nfe` int64, the expert forwards that the state took, in its rollout and for its label.
        """
        parts, self.collected = [], [0] * len(SOURCES)
        for i, (source, count) in enumerate(zip(SOURCES, self.counts(n, beta), strict=True)):
            if count:
                p_expert = {"teacher": 1.0, "student": self.p_expert}
                states = self.forward(count) if source == "forward" else self.rollout(count, p_expert[source])
                states["source"] = torch.full((len(states),), i, dtype=torch.uint8, device=states.device)
                states["version"] = torch.full((len(states),), version, dtype=torch.int64, device=states.device)
                parts.append(states)
                self.collected[i] = len(states)
        return torch.cat(parts) if parts else TensorDict(batch_size=[0], device=self.expert.device)

    def counts(self, n: int, beta: tuple[float, float, float]) -> list[int]:
        """Returns the number of forward draws, teacher rollouts and student rollouts of the next collection."""
        return split_collection(n, beta, self.states_per_draw(), self._remainder)

    def states_per_draw(self) -> tuple[int, int, int]:
        """Number of states that one forward draw, one teacher rollout and one student rollout give."""
        teacher, student = (len(self.rollout_times(p)) - 1 if self.states_per_rollout == "all" else 1 for p in (1.0, 0.0))
        return 1, teacher, student

    def forward(self, n: int) -> TensorDict:
        """Draws n forward-diffused states and labels them."""
        x_0, c = self.draw_data(n)
        step = torch.randint(self.grid.num_steps, (n,), generator=self.streams["time"], device=x_0.device)
        t = self.grid.times[step]
        x_t = self.add_noise(x_0, t)
        s, w = self.grid.previous(t), self.draw_guidance(n)
        before = self.expert.nfe
        x_s = self.label(x_t, t, s, c, w)
        actors = torch.zeros(n, self.grid.num_steps, dtype=torch.bool, device=x_0.device)
        return self.states(x_t=x_t, t=t, s=s, c=c, w=w, x_s=x_s, actors=actors, nfe=(self.expert.nfe - before) // n)

    def draw_data(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Data and conditions of n forward states."""
        return self.expert.sample_data(n, self.streams["data"])

    def execute(self, x_0: Tensor) -> Tensor:
        """What a world is given of samples x_0, (n, *sample_shape)."""
        return x_0

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        """Unrolls n trajectories and labels visited states; the expert acts with p_expert, drawn per step (in a world, per denoising)."""
        if self.world is not None:
            return self._rollout_in_world(self.world, n, p_expert)
        return self._rollout_all_states(n, p_expert) if self.states_per_rollout == "all" else self._rollout_one_state(n, p_expert)

    def _rollout_one_state(self, n: int, p_expert: float) -> TensorDict:
        """Unrolls n trajectories, each up to its j-th state of m, j ~ U{0 … m − 1}, and labels that state."""
        times = self.rollout_times(p_expert)  # (m + 1,), the last is 0
        m, device = len(times) - 1, self.expert.device
        x_t, c, w, expert_acts = self.start(n, m, p_expert)
        j = self.draw_stop_steps(n, m)  # (n,), falling, so that the rollouts that go on are the first of their batch
        for i, (t, u) in enumerate(pairwise(times[:-1])):
            k = int((j > i).sum())  # of numbers on the host
            if not k:
                break
            c_k, w_k = (None if a is None else a[:k] for a in (c, w))
            x_t[:k] = self.step(x_t[:k], t.expand(k), u.expand(k), c_k, w_k, expert_acts[:k, i])
        taken = torch.zeros(n, self.grid.num_steps, dtype=torch.bool)
        taken[:, :m] = expert_acts & (torch.arange(m) < j[:, None])
        j, actors = j.to(device, non_blocking=True), taken.to(device, non_blocking=True)
        t = times[j]
        s, acted = self.grid.previous(t), self.forwards_per_action(self.expert_policy) * actors.sum(1)
        before = self.expert.nfe
        x_s = self.label(x_t, t, s, c, w)
        nfe = (self.expert.nfe - before) // n + acted
        states = self.states(x_t=x_t, t=t, s=s, c=c, w=w, x_s=x_s, actors=actors, nfe=nfe)
        return states[torch.rand(n, generator=self.streams["rollout"], device=device).argsort()]  # a ring that is short cuts no time off

    def _rollout_in_world(self, world: World, n: int, p_expert: float) -> TensorDict:
        """Runs episodes in a world and labels n of the states that they visit."""
        before = self.expert.nfe
        states = collect_episode_states(self, world, n, p_expert)
        x_t, t, c, w = (states.get(key, None) for key in ("x_t", "t", "c", "w"))
        s = self.grid.previous(t)
        states["s"], states["x_s"] = s, self.label(x_t, t, s, c, w)
        states["nfe"] = torch.full((n,), (self.expert.nfe - before) // n, dtype=torch.int64, device=t.device)
        return states

    def draw_stop_steps(self, n: int, m: int) -> Tensor:
        """Draws the stop steps j of n rollouts: stratified uniform in 0 … m − 1, sorted descending, (n,) int64 on the host."""
        v = torch.rand(1, generator=self.streams["path"], dtype=torch.float64)
        return ((torch.arange(n) + v) * m / n).long().clamp(max=m - 1).flip(0)

    def _rollout_all_states(self, n: int, p_expert: float) -> TensorDict:
        """Unrolls n trajectories to the end and labels all m states of each."""
        times = self.rollout_times(p_expert)  # (m + 1,), the last is 0
        m, device = len(times) - 1, self.expert.device
        x_T, c, w, expert_acts = self.start(n, m, p_expert)
        x = x_T.new_empty(n, m, *x_T.shape[1:])
        x_s = torch.empty_like(x)  # the label at each state: where the expert acts, the next state
        x[:, 0] = x_T
        before = self.expert.nfe
        for i, (t, u) in enumerate(pairwise(times)):
            t, u = t.expand(n), u.expand(n)
            s = self.grid.previous(t)  # of (n,): an index of no axes would wait for the device
            if p_expert > 0:
                x_s[:, i] = self.label(x[:, i], t, s, c, w)
            if i + 1 < m:  # the sample itself is no state to train on
                x[:, i + 1] = self.step(x[:, i], t, u, c, w, expert_acts[:, i], x_s[:, i] if p_expert > 0 else None)
        earlier = torch.ones(m, m, dtype=torch.bool).tril(-1)  # state i has seen steps 0 … i−1
        taken = torch.zeros(n, m, self.grid.num_steps, dtype=torch.bool)
        taken[..., :m] = expert_acts[:, None] & earlier
        x_t, x_s, actors = (a.flatten(0, 1) for a in (x, x_s, taken.to(device, non_blocking=True)))  # (n · m, …)
        c, w = (None if a is None else a.repeat_interleave(m, dim=0) for a in (c, w))
        t, s = times[:-1].repeat(n), self.grid.previous(times[:-1]).repeat(n)
        if p_expert == 0:
            x_s = self.label(x_t, t, s, c, w)  # of all states at once, which is faster
        return self.states(x_t=x_t, t=t, s=s, c=c, w=w, x_s=x_s, actors=actors, nfe=(self.expert.nfe - before) // (n * m))

    def start(self, n: int, m: int, p_expert: float) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Draws x_T (n, *sample_shape), conditions and guidance scales of n rollouts of m steps, and the actors of their steps."""
        x_T = torch.randn(n, *self.expert.sample_shape, generator=self.streams["rollout"], device=self.expert.device)
        c = self.expert.sample_condition(n, self.streams["rollout"])
        return x_T, c, self.draw_guidance(n), self.draw_actors(n, m, p_expert)

    def draw_actors(self, n: int, m: int, p_expert: float) -> Tensor:
        """Draws whether the expert acts in each of m steps of n rollouts, (n, m) bool on the host."""
        return torch.rand(n, m, generator=self.streams["path"]) < p_expert

    def add_noise(self, x_0: Tensor, t: Tensor) -> Tensor:
        """Diffuses data x_0 (n, *sample_shape) to times t (n,)."""
        eps = torch.randn(x_0.shape, generator=self.streams["noise"], device=x_0.device)
        return self.expert.schedule.add_noise(x_0, eps, t)

    def label(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        """Returns the expert's action x_s (the label) at each state, (n, *sample_shape)."""
        return self.expert_policy.act(x_t, t, s, c, w)

    def rollout_times(self, p_expert: float) -> Tensor:
        """Returns the times of a rollout's m states, and 0, (m + 1,)."""
        return self.grid.times

    def step(
        self, x_t: Tensor, t: Tensor, u: Tensor, c: Tensor | None, w: Tensor | None, expert_acts: Tensor, action: Tensor | None = None
    ) -> Tensor:
        """Takes one step of a rollout to the states at u: the expert's action where it acts, elsewhere the student's.

        Args:
            x_t, t, u, c, w: States, the times that they are at and go to, conditions and guidance scales, each of n.
            expert_acts: Whether the expert acts, (n,) bool on the host.
            action: The expert's actions, where they are known; else it is run where it acts.
        """
        n = len(x_t)
        by_expert = int(expert_acts.sum())
        if by_expert == 0:
            return self.student_step(x_t, t, u, c, w)
        if by_expert == n:
            return self.expert_policy.act(x_t, t, u, c, w) if action is None else action
        theirs, own = (mask.nonzero().squeeze(1).to(x_t.device, non_blocking=True) for mask in (expert_acts, ~expert_acts))
        states = (x_t, t, u, c, w)
        stepped = self.student_step(*_rows(states, own))
        x_u = stepped.new_empty(x_t.shape)
        x_u[own] = stepped
        x_u[theirs] = (self.expert_policy.act(*_rows(states, theirs)) if action is None else action[theirs]).to(x_u.dtype)
        return x_u

    def student_step(self, x_t: Tensor, t: Tensor, u: Tensor, c: Tensor | None, w: Tensor | None) -> Tensor:
        """Takes the student's step from x_t (n, *sample_shape), with its kernel."""
        if self.kernel == "ddim":
            return self.student_policy.act(x_t, t, u, c, w)
        noise = torch.randn(x_t.shape, generator=self.streams["rollout"], device=x_t.device)
        return self.student_policy.act_renoise(x_t, t, u, noise, c, w)

    def draw_guidance(self, n: int) -> Tensor | None:
        """Draws w ~ U(guidance_range), (n,); None where there is one scale for all."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        return low + (high - low) * torch.rand(n, generator=self.streams["guidance"], device=self.expert.device)

    def forwards_per_action(self, policy: ExpertPolicy) -> int:
        """Number of forwards of one action of the expert; a state with its own w takes the guided pair in each."""
        return policy.nfe_per_action if self.guidance_range is None else policy.substeps * self.expert.guided_nfe

    def states(self, nfe: int | Tensor, **fields: Tensor | None) -> TensorDict:
        """Joins the fields that are not None into a TensorDict (n,)."""
        present = {k: v for k, v in fields.items() if v is not None}
        t = present["t"]
        present["nfe"] = nfe if isinstance(nfe, Tensor) else torch.full_like(t, nfe, dtype=torch.int64)
        return TensorDict(present, batch_size=[len(t)], device=t.device)

    def state_dict(self) -> dict[str, Any]:
        steps = {} if self.world is None else {"world_steps": self.world_steps}
        kept = {} if self.unlabelled is None else {"unlabelled": self.unlabelled.to_dict()}
        return steps | kept | {"owed": list(self._remainder), "streams": {name: g.get_state() for name, g in self.streams.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._remainder = list(state["owed"])
        self.world_steps = state.get("world_steps", 0)
        if "unlabelled" in state:
            kept = state["unlabelled"]
            self.unlabelled = TensorDict(kept, batch_size=[len(kept["t"])]).to(self.expert.device)
        for name, generator in self.streams.items():
            generator.set_state(state["streams"][name].cpu())
