"""Backward simulation: the states that distribution matching trains on (Yin et al. 2024; DDIL §4.2, "DMD2 + DDIL").

One index j is drawn for each collection. The state x_{t_j} is reached, by source,

    student:  by steps 0 … j−1 of the student; each diffuses the student's x̂_0 to the next time with fresh noise
    teacher:  by steps 0 … j−1 of the teacher's DDIM sampler
    forward:  by diffusing data to t_j

With p_expert > 0 student rollouts are mixed: teacher and student alternate at random. At j = 0 the state is pure noise for every source,
because the sampler starts from it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.states.beta import draw_sources
from ddil_agents.states.collect import Collector
from ddil_agents.states.episodes import collect_episode_states


class BackwardSimulation(Collector):
    """Collects states at one time t_j of the student's grid per collection, without labels: DMD2's loss needs none.

    Args:
        noise_level: The time t_j (not a σ) to unroll to; the grid's nearest time is used. None draws one at random for each collection.

    Raises:
        ValueError: noise_level is greater than the last time of the teacher's schedule.
    """

    # All ranks draw the same j and the same number of states per source, so that their collections take equally long. A teacher's step
    # takes k guided forwards where a student's takes one: with draws of their own, 64 ranks of configs/dmd2/paper.yaml would spend two
    # fifths of their time waiting for one another.
    shared: ClassVar[tuple[str, ...]] = ("time", "mixture")

    def __init__(self, *args: Any, noise_level: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if noise_level is not None and noise_level > self.expert.schedule.num_train_steps:
            raise ValueError(f"noise_level={noise_level:g} lies beyond the teacher's chain of {self.expert.schedule.num_train_steps} steps")
        distance = None if noise_level is None else (self.grid.times[:-1] - noise_level).abs()
        self.fixed = None if distance is None else int(distance.argmin())
        self.j = 0

    def collect(self, n: int, beta: tuple[float, float, float], version: int) -> TensorDict:
        drawn = torch.randint(self.grid.num_steps, (1,), generator=self.streams["time"])
        self.j = int(drawn) if self.fixed is None else self.fixed
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
        if self.world is not None:
            states = collect_episode_states(self, self.world, n, p_expert, self.j)
            return self._arrived(states["x_t"], states["c"], states["actors"][:, : self.j])
        x_t, c, _, expert_acts = self.start(n, self.j, p_expert)
        for i, (t, s) in enumerate(pairwise(self.grid.times[: self.j + 1])):
            x_t = self.step(x_t, t.expand(n), s.expand(n), c, None, expert_acts[:, i])
        return self._arrived(x_t, c, expert_acts.to(x_t.device, non_blocking=True))

    def _arrived(self, x_t: Tensor, c: Tensor | None, expert_acts: Tensor) -> TensorDict:
        t = self.grid.times[self.j].repeat(len(x_t))
        actors = torch.zeros(len(x_t), self.grid.num_steps, dtype=torch.bool, device=x_t.device)
        actors[:, : expert_acts.shape[1]] = expert_acts
        nfe = self.forwards_per_action(self.expert_policy) * actors.sum(1)
        return self.states(x_t=x_t, t=t, s=self.grid.previous(t), c=c, actors=actors, nfe=nfe)
