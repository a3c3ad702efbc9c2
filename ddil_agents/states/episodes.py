"""Collects training states from episodes in a world, where a student's own samples determine its next conditions.

    c_0 ~ world ;   x_T ~ N(0, I), x_{t_1}, …, x_0 by the actor of this denoising ;   c_{k+1} = world.step(x_0)

The actor is drawn anew for each denoising, the expert with p_expert (DAgger's mixture policy, Ross et al. 2011): a mixture inside one would
visit neither policy's conditions. Every denoising gives one state, at a time drawn uniformly, and of all that were visited a random part is
labelled: visits cost forwards of the actor and steps of the simulator, labels the expert's forwards. The expert does not change, so that
visits of its own episodes that were not labelled are kept for later collections.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_env.worlds.episodes import run_episodes
from ddil_env.worlds.world import World

if TYPE_CHECKING:
    from ddil_agents.states.collect import Collector


def collect_episode_states(collector: Collector, world: World, n: int, p_expert: float) -> TensorDict:
    """Collects n states of whole episodes, drawn from all that were visited.

    Args:
        collector: Whose policies act, and whose streams are drawn from.
        world: Every world runs one episode after the other until there are n states.
        n: States asked for.
        p_expert: Probability that the expert acts in a denoising.

    Returns:
        (n,) `x_t`, `t`, `c`, `w` with a guidance range, `actors` (n, N) bool, true where the expert acted in a step of this
        denoising that lies before the state.
    """
    keep = p_expert == 1
    parts = [collector.unlabelled] if keep and collector.unlabelled is not None else []
    while sum(map(len, parts)) < n:
        parts.append(visit_states(collector, world, p_expert))
    visited = torch.cat(parts)
    visited = visited[torch.randperm(len(visited), generator=collector.streams["path"]).to(visited.device, non_blocking=True)]
    if keep:
        collector.unlabelled = visited[n:].clone()  # a copy, so that the rest is freed
    return visited[:n]


def visit_states(collector: Collector, world: World, p_expert: float) -> TensorDict:
    """Runs an episode in every world and takes a state of each of its denoisings, at a time drawn uniformly.

    Returns:
        (m,) states, as `collect_episode_states` does.
    """
    device, times, parts = collector.expert.device, collector.rollout_times(p_expert), list[tuple[Any, ...]]()
    m, shape = len(times) - 1, (world.num_frames, world.num_worlds)  # the last time is 0
    acting = torch.rand(shape, generator=collector.streams["path"]) < p_expert  # of each denoising: whether the expert acts, …
    stops = torch.randint(m, shape, generator=collector.streams["path"])  # … and before which step its state is taken

    def act(c: Tensor, rows: Tensor, frame: int) -> Tensor:
        k, expert_acts, j = len(rows), acting[frame, rows], stops[frame, rows]
        x = torch.randn(k, *collector.expert.sample_shape, generator=collector.streams["rollout"], device=device)
        w, visited = collector.draw_guidance(k), []
        for t, u in pairwise(times):
            visited.append(x)
            x = collector.step(x, t.expand(k), u.expand(k), c, w, expert_acts)
        parts.append((torch.stack(visited, 1), c, w, expert_acts, j))
        return collector.execute(x)

    seeds = torch.randint(2**62, (world.num_worlds,), generator=collector.streams["world"]).tolist()
    run_episodes(world, [torch.Generator().manual_seed(seed) for seed in seeds], act)
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    visited, c, w, expert_acts, j = columns  # (k, m, *sample_shape), …
    stop = j.to(device, non_blocking=True)
    collector.world_steps += len(j)
    actors = torch.zeros(len(j), collector.grid.num_steps, dtype=torch.bool)
    actors[:, :m] = expert_acts[:, None] & (torch.arange(m) < j[:, None])
    x_t = visited[torch.arange(len(j), device=device), stop]
    fields = {"x_t": x_t, "t": times[stop], "c": c, "actors": actors.to(device, non_blocking=True)}
    return TensorDict(fields if w is None else fields | {"w": w}, batch_size=[len(j)], device=device)
