"""Backward simulation: the states that distribution matching trains on (Yin et al. 2024; DDIL §4.2, "DMD2 + DDIL").

One index j is drawn for each collection. The state x_{t_j} is reached, by source,

    student:  by steps 0 … j−1 of the student; each diffuses the student's x̂_0 to the next time with fresh noise
    teacher:  by steps 0 … j−1 of the teacher's DDIM sampler
    forward:  by diffusing data to t_j

With p_expert > 0 student rollouts are mixed: teacher and student alternate at random. At j = 0 the state is pure noise for every source,
because the sampler starts from it.

In a world the conditions of rollouts are those that whole episodes have visited: of the teacher, and of the student as it was up to
`episodes_every` collections ago. So the student matches the teacher on conditions of its own making (Self-Forcing, Huang et al. 2025).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.states.beta import draw_sources
from ddil_agents.states.collect import Collector
from ddil_agents.states.episodes import visit_states
from ddil_env.worlds.world import World


class BackwardSimulation(Collector):
    """Collects states at one time t_j of the student's grid per collection, without labels: DMD2's loss needs none.

    Args:
        noise_level: The time t_j (not a σ) to unroll to; the grid's nearest time is used. None draws one at random for each collection.
        episodes_every: Collections between two runs of episodes, in a world.

    Raises:
        ValueError: noise_level is greater than the last time of the teacher's schedule.
    """

    # All ranks draw the same j and the same number of states per source, so that their collections take equally long. A teacher's step
    # takes k guided forwards where a student's takes one: with draws of their own, 64 ranks of configs/dmd2/paper.yaml would spend two
    # fifths of their time waiting for one another.
    shared: ClassVar[tuple[str, ...]] = ("time", "mixture")

    def __init__(self, *args: Any, noise_level: float | None, episodes_every: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if noise_level is not None and noise_level > self.expert.schedule.num_train_steps:
            raise ValueError(f"noise_level={noise_level:g} lies beyond the teacher's chain of {self.expert.schedule.num_train_steps} steps")
        distance = None if noise_level is None else (self.grid.times[:-1] - noise_level).abs()
        self.fixed = None if distance is None else int(distance.argmin())
        self.j = 0
        self.episodes_every, self.collections = episodes_every, 0
        self.visited: dict[float, Tensor] = {}  # conditions of the newest episodes, by the probability that the expert acts

    def collect(self, n: int, beta: tuple[float, float, float], version: int) -> TensorDict:
        drawn = torch.randint(self.grid.num_steps, (1,), generator=self.streams["time"])
        self.j = int(drawn) if self.fixed is None else self.fixed
        if self.collections % self.episodes_every == 0:
            self.visited = {}
        self.collections += 1
        return super().collect(n, beta, version)

    def counts(self, n: int, beta: tuple[float, float, float]) -> list[int]:
        """States of each source: n draws with the probabilities β."""
        source = draw_sources(torch.tensor(beta, dtype=torch.float64), n, self.streams["mixture"])
        return torch.bincount(source, minlength=3).tolist()

    def forward(self, n: int) -> TensorDict:
        x_0, c = self.expert.sample_data(n, self.streams["data"])
        eps = torch.randn(x_0.shape, generator=self.streams["noise"], device=x_0.device)
        t = self.grid.times[self.j].expand(n)
        # The sampler starts from pure noise; data diffused to the first time would hold some signal (√ᾱ_999 = .068 in Stable Diffusion).
        x_t = self.expert.schedule.add_noise(x_0, eps, t) if self.j else eps
        return self._arrived(x_t, c, torch.zeros(n, 0, dtype=torch.bool, device=x_0.device))

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        x_t, c, _, expert_acts = self.start(n, self.j, p_expert)
        if self.world is not None:  # one actor for each denoising, as in episodes
            c, expert_acts = self.draw_visited(self.world, n, p_expert), self.draw_actors(n, 1, p_expert).expand(n, self.j)
        for i, (t, s) in enumerate(pairwise(self.grid.times[: self.j + 1])):
            x_t = self.step(x_t, t.expand(n), s.expand(n), c, None, expert_acts[:, i])
        return self._arrived(x_t, c, expert_acts.to(x_t.device, non_blocking=True))

    def draw_visited(self, world: World, n: int, p_expert: float) -> Tensor:
        """Draws n of the conditions that the newest episodes have visited, (n, *condition_shape)."""
        if p_expert not in self.visited:
            self.visited[p_expert] = visit_states(self, world, p_expert)["c"]
        c = self.visited[p_expert]
        return c[torch.randint(len(c), (n,), generator=self.streams["rollout"], device=c.device)]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"collections": self.collections, "visited": self.visited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.collections = state["collections"]
        self.visited = {p_expert: c.to(self.expert.device) for p_expert, c in state["visited"].items()}

    def _arrived(self, x_t: Tensor, c: Tensor | None, expert_acts: Tensor) -> TensorDict:
        t = self.grid.times[self.j].repeat(len(x_t))
        actors = torch.zeros(len(x_t), self.grid.num_steps, dtype=torch.bool, device=x_t.device)
        actors[:, : expert_acts.shape[1]] = expert_acts
        nfe = self.forwards_per_action(self.expert_policy) * actors.sum(1)
        return self.states(x_t=x_t, t=t, s=self.grid.previous(t), c=c, actors=actors, nfe=nfe)
