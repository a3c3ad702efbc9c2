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
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ddil_env.experts.diffusion_policy import policy_network
from ddil_env.experts.lunar_lander import DEPTH, ENV, WIDTH
from ddil_env.prediction import Prediction


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
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, args.updates)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for _ in tqdm(range(args.updates), unit="update"):
        rows = torch.randint(len(c), (512,))
        x_0, t = actions[rows], torch.randint(1, network.schedule.num_train_steps, (512,)).float()
        eps = torch.randn_like(x_0)
        predicted = network(network.schedule.add_noise(x_0, eps, t), t, c[rows])
        loss = (predicted.output("v") - Prediction(x_0, eps, t, network.schedule).output("v")).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(network)
    demos, demo_actions, episodes = fly(range(50_000, 50_000 + args.demos), 0.0)
    network.load_state_dict(average.module.state_dict())
    stored = {f"network.{name}": value.contiguous() for name, value in network.network.state_dict().items()}
    stored |= {"mean": mean, "std": std, "c": ((demos - mean) / std).clamp(-5, 5), "x_0": demo_actions, "episode": episodes}
    save_file(stored, args.out)
    print(f"loss {float(loss):.4f}; {args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
