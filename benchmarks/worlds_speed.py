"""What collecting states in a world costs beside a bare loop over the same simulators and network, and beside TorchRL's collector.

    python benchmarks/worlds_speed.py

Sixteen lunar landers, a student of 2 steps (an MLP of width 64, depth 3), episodes that are cut off after 50 frames, which is before any of
them ends, so that all do the same work. Rounds take turns; a ratio is of two neighbours in a round. Written to results/worlds_speed.json.

    ours       ddil_agents.states.episodes.visit_states: a state of each denoising, ragged ends, streams of its own
    bare       the same loop by hand: two actions of the same policy and one of each simulator in a frame, nothing is kept
    torchrl    torchrl.collectors.Collector over SerialEnv of GymEnv, with the same policy
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import Collector as TorchRLCollector
from torchrl.envs import GymEnv, SerialEnv

from ddil_agents import Beta, Dagger, DaggerConfig
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.states.episodes import visit_states
from ddil_agents.training.checkpoint import write_atomically
from ddil_env.experts.lunar_lander import ENV, LunarLander
from ddil_env.worlds import GymWorld

WORLDS, STEPS, FRAMES, REPEATS = 16, 2, 50, 5


def make_agent() -> Dagger:
    settings = {"num_steps": STEPS, "num_worlds": WORLDS, "student": {"width": 64, "depth": 3}, "beta": Beta(0, 0, 1)}
    agent = Dagger(LunarLander(), DaggerConfig(**settings))  # type: ignore[arg-type]
    agent.collector.world = agent.expert.make_world(WORLDS, num_frames=FRAMES)
    return agent


def ours(agent: Dagger) -> int:
    """Visits of one episode in each world."""
    collector = agent.collector
    assert collector.world is not None
    return len(visit_states(collector, collector.world, 0.0))


@torch.no_grad()
def act(agent: Dagger, c: Tensor) -> Tensor:
    """Actions (n, 2) for normalised observations (n, 8): N steps of DDIM from fresh noise."""
    x = torch.randn(len(c), 2)
    for t, s in pairwise(agent.grid.times):
        x = agent.student_policy.act(x, t.expand(len(c)), s.expand(len(c)), c)
    return x


def bare(agent: Dagger, world: GymWorld) -> int:
    """Visits of one episode in each world, by a loop that keeps nothing."""
    observations = [env.reset(seed=int(torch.randint(2**31, ())))[0] for env in world.envs]
    running, visits = list(range(WORLDS)), 0
    for _ in range(world.num_frames):
        c = torch.from_numpy(((np.stack([observations[i] for i in running]) - world.mean) / world.std).clip(-5, 5))
        actions = act(agent, c).numpy().clip(-1, 1)
        still = []
        for i, action in zip(running, actions, strict=True):
            observations[i], _, terminated, truncated, _ = world.envs[i].step(action)
            if not (terminated or truncated):
                still.append(i)
        visits += len(running)
        running = still
        if not running:
            break
    return visits


class TorchRL:
    """The same visits by TorchRL's collector, `frames` of them at a time."""

    def __init__(self, agent: Dagger, frames: int) -> None:
        mean, std = (torch.as_tensor(x) for x in (agent.expert.mean, agent.expert.std))  # type: ignore[attr-defined]
        policy = TensorDictModule(lambda o: act(agent, ((o - mean) / std).clamp(-5, 5)).clamp(-1, 1), ["observation"], ["action"])
        env = SerialEnv(WORLDS, lambda: GymEnv(ENV, continuous=True))
        self.collector = TorchRLCollector(env, policy, frames_per_batch=frames, total_frames=-1, trust_policy=True)
        self.batches = iter(self.collector)

    def __call__(self) -> int:
        return next(self.batches).numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/worlds_speed.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    agent = make_agent()
    world = agent.collector.world
    assert isinstance(world, GymWorld)
    runs: dict[str, Any] = {"ours": lambda: ours(agent), "bare": lambda: bare(agent, world), "torchrl": TorchRL(agent, ours(agent))}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            visits = sum(run() for _ in range(REPEATS))
            if number:  # the first round warms up
                speeds[name].append(visits / (time.perf_counter() - began))
    result: dict[str, Any] = {name: {"visits_per_second": statistics.median(x), "rounds": x} for name, x in speeds.items()}
    for other in ("bare", "torchrl"):
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[other], strict=True)]
        result[f"ours / {other}"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        print(f"ours / {other}: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
    write_atomically(args.out, json.dumps(result | provenance(agent.expert.device), indent=1) + "\n")
    print({name: round(statistics.median(x)) for name, x in speeds.items()}, args.out)


if __name__ == "__main__":
    main()
