"""Trains the lander's diffusion policy, in about two minutes on one core.

The scripted controller flies under disturbance: its actions are executed with noise, so that the data hold states off its own path and
what it does there. So the policy is a sound labeller where students will wander. Demonstrations are its landings without disturbance.

    python -m ddil_env.experts.train_lunar_lander --out lander.safetensors
    python -m ddil_env.experts.train_lunar_lander --minari scripted/landings-v0     # the demonstrations, as a local Minari dataset
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.envs.box2d.lunar_lander import heuristic
from torch import Tensor
from tqdm import tqdm

from ddil_env.experts.diffusion_policy import CLIP, policy_network
from ddil_env.experts.lunar_lander import DEPTH, ENV, WIDTH
from ddil_env.experts.train_denoiser import save_expert, train_denoiser

DEMOS = 50_000  # the first demonstration's seed


class Flight(NamedTuple):
    """An episode of T steps."""

    observations: list[Any]
    """T + 1 of them, (8,) each."""
    actions: list[Any]
    """The controller's own, (2,) each, before any noise."""
    rewards: list[float]
    terminated: bool


def fly(env: gymnasium.Env, seed: int, disturbance: float) -> Flight:
    """Flies once, under execution noise of a size that is drawn up to `disturbance`."""
    generator = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    spread = disturbance * generator.uniform()
    observations, actions, rewards, terminated, truncated = [observation], [], [], False, False
    while not (terminated or truncated):
        action = np.clip(heuristic(env.unwrapped, observation), -1, 1)
        executed = np.clip(action + spread * generator.standard_normal(2), -1, 1).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(executed)
        observations.append(observation)
        actions.append(action.astype(np.float32))
        rewards.append(float(reward))
    return Flight(observations, actions, rewards, bool(terminated))


def fly_all(seeds: range, disturbance: float) -> list[Flight]:
    env = gymnasium.make(ENV, continuous=True)
    return [fly(env, seed, disturbance) for seed in tqdm(seeds, desc="flights", unit="flight")]


def as_pairs(flights: list[Flight]) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (m, 8), the controller's actions there (m, 2) and the numbers of their flights (m,)."""
    observations = np.array([o for flight in flights for o in flight.observations[:-1]], np.float32)
    actions = np.array([a for flight in flights for a in flight.actions], np.float32)
    numbers = [i for i, flight in enumerate(flights) for _ in flight.actions]
    return torch.from_numpy(observations), torch.from_numpy(actions), torch.tensor(numbers)


def keep_in_minari(dataset_id: str, flights: list[Flight]) -> None:
    """Keeps flights as a local Minari dataset."""
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for i, flight in enumerate(flights):
        ends = [False] * (len(flight.actions) - 1)
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=np.array(flight.observations, np.float32),
                actions=np.array(flight.actions, np.float32),
                rewards=flight.rewards,
                terminations=[*ends, flight.terminated],
                truncations=[*ends, not flight.terminated],
            )
        )
    env = gymnasium.make(ENV, continuous=True)
    minari.create_dataset_from_buffers(dataset_id, buffers, env, eval_env=env, algorithm_name="gymnasium.envs.box2d.lunar_lander.heuristic")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="safetensors file to write")
    parser.add_argument("--minari", metavar="ID", help="id of a local Minari dataset to write, of the demonstrations")
    parser.add_argument("--flights", type=int, default=150, help="flights under disturbance (default: %(default)s)")
    parser.add_argument("--demos", type=int, default=40, help="landings without disturbance that are kept (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out is None and args.minari is None:
        parser.error("nothing to write: pass --out FILE, --minari ID or both")
    demonstrations = fly_all(range(DEMOS, DEMOS + args.demos), 0.0)
    if args.minari is not None:
        keep_in_minari(args.minari, demonstrations)
    if args.out is None:
        return
    torch.manual_seed(args.seed)
    observations, actions, _ = as_pairs(fly_all(range(10_000 + 1000 * args.seed, 10_000 + 1000 * args.seed + args.flights), 1.0))
    mean, std = observations.mean(0), observations.std(0)
    c = ((observations - mean) / std).clamp(-CLIP, CLIP)
    network = policy_network((2,), (8,), WIDTH, DEPTH)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(c), (n,))
        return actions[rows], c[rows]

    loss = train_denoiser(network, draw, args.updates)
    demos, demo_actions, episodes = as_pairs(demonstrations)
    data = {"mean": mean, "std": std, "c": ((demos - mean) / std).clamp(-CLIP, CLIP), "x_0": demo_actions, "episode": episodes}
    print(f"loss {loss:.4f}")
    save_expert(args.out, network, data)


if __name__ == "__main__":
    main()
