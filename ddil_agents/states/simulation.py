"""Backward simulation: the states that distribution matching trains on (Yin et al. 2024; DDIL §4.2, "DMD2 + DDIL").

One index j is drawn for each collection; the state x_{t_j} is, by source,

    student:  steps 0 … j−1 of the student, whose x̂_0 is diffused to the next time anew in each
    teacher:  steps 0 … j−1 of the teacher's DDIM; with p_expert the two alternate within a trajectory
    forward:  data, diffused to t_j

and at j = 0 pure noise, whatever the source: that is what the sampler starts from.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.states.collect import Collector
from ddil_agents.states.episodes import visit


class BackwardSimulation(Collector):
    """States at one time t_j of the student's grid a collection, unlabelled: the feedback depends on the critic.

    Args:
        noise_level: Of t_j, if it is fixed.

    Raises:
        ValueError: a noise_level beyond the chain.
    """

    # j, and how many states each source gives: the work of a collection, for which the ranks would otherwise wait for one another. A
    # state of the teacher's takes k guided forwards for each of the student's: drawn apart, 64 ranks of configs/dmd2/paper.yaml would
    # spend two fifths of their time waiting.
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
        """n states in all, each of source i with probability βᵢ."""
        shares = torch.tensor(beta, dtype=torch.float64)
        source = torch.multinomial(shares, n, replacement=True, generator=self.streams["mixture"])
        return torch.bincount(source, minlength=3).tolist()

    def forward(self, n: int) -> TensorDict:
        x_0, c = self.expert.sample_data(n, self.streams["data"])
        eps = torch.randn(x_0.shape, generator=self.streams["noise"], device=x_0.device)
        t = self.grid.times[self.j].expand(n)
        # At the first step the sampler meets pure noise, and diffused data still hold some signal (√ᾱ_999 = .068 in Stable Diffusion).
        x_t = self.expert.schedule.add_noise(x_0, eps, t) if self.j else eps
        return self._arrived(x_t, c, torch.zeros(n, 0, dtype=torch.bool, device=x_0.device))

    def rollout(self, n: int, p_expert: float) -> TensorDict:
        if self.world is not None:
            states = visit(self, self.world, n, p_expert, self.j)
            return self._arrived(states["x_t"], states["c"], states["actors"][:, : self.j])
        x_t, c, _, by_expert = self.start(n, self.j, p_expert)
        for i, (t, s) in enumerate(pairwise(self.grid.times[: self.j + 1])):
            x_t = self.follow(x_t, t.expand(n), s.expand(n), c, None, by_expert[:, i])
        return self._arrived(x_t, c, by_expert.to(x_t.device, non_blocking=True))

    def _arrived(self, x_t: Tensor, c: Tensor | None, by_expert: Tensor) -> TensorDict:
        t = self.grid.times[self.j].repeat(len(x_t))
        actors = torch.zeros(len(x_t), self.grid.num_steps, dtype=torch.bool, device=x_t.device)
        actors[:, : by_expert.shape[1]] = by_expert
        nfe = self.cost(self.expert_policy) * actors.sum(1)
        return self.states(x_t=x_t, t=t, s=self.grid.previous(t), c=c, actors=actors, nfe=nfe)
