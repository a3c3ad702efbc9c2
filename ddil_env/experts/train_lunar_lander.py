"""Trains the lander's diffusion policy, in about two minutes on one core.

The scripted controller flies under disturbance: its actions are executed with noise, so that the data hold states off its own path and
what it does there. So the policy is a sound labeller where students will wander. Demonstrations are its landings without disturbance.

    python -m ddil_env.experts.train_lunar_lander --out lander.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium.envs.box2d.lunar_lander import heuristic
from torch import Tensor
from tqdm import tqdm

from ddil_env.experts.diffusion_policy import policy_network
from ddil_env.experts.lunar_lander import DEPTH, ENV, WIDTH
from ddil_env.experts.train_denoiser import save_expert, train_denoiser


def fly(seeds: range, disturbance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (m, 8), the controller's actions there (m, 2) and episodes (m,), under execution noise drawn up to `disturbance`."""
    env = gymnasium.make(ENV, continuous=True)
    observations, actions, episodes = [], [], []
    for number, seed in enumerate(tqdm(seeds, desc="flights", unit="flight")):
        generator = np.random.default_rng(seed)
        observation, _ = env.reset(seed=seed)
        spread, done = disturbance * generator.uniform(), False
        while not done:
            action = np.clip(heuristic(env.unwrapped, observation), -1, 1)
            observations.append(observation)
            actions.append(action)
            episodes.append(number)
            executed = np.clip(action + spread * generator.standard_normal(2), -1, 1).astype(np.float32)
            observation, _, terminated, truncated, _ = env.step(executed)
            done = terminated or truncated
    return (
        torch.from_numpy(np.array(observations, np.float32)),
        torch.from_numpy(np.array(actions, np.float32)),
        torch.tensor(episodes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--flights", type=int, default=150, help="flights under disturbance (default: %(default)s)")
    parser.add_argument("--demos", type=int, default=40, help="landings without disturbance that are kept (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    observations, actions, _ = fly(range(10_000 + 1000 * args.seed, 10_000 + 1000 * args.seed + args.flights), 1.0)
    mean, std = observations.mean(0), observations.std(0)
    c = ((observations - mean) / std).clamp(-5, 5)
    network = policy_network((2,), (8,), WIDTH, DEPTH)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(c), (n,))
        return actions[rows], c[rows]

    loss = train_denoiser(network, draw, args.updates)
    demos, demo_actions, episodes = fly(range(50_000, 50_000 + args.demos), 0.0)
    data = {"mean": mean, "std": std, "c": ((demos - mean) / std).clamp(-5, 5), "x_0": demo_actions, "episode": episodes}
    print(f"loss {loss:.4f}")
    save_expert(args.out, network, data)


if __name__ == "__main__":
    main()
