"""Trains the fork's diffusion policy, in about a minute on one core.

A scripted guide says where to go from everywhere on the board, so that the policy is a sound labeller where students will wander: towards
the middle of a gap beside the peg ahead, the right one with probability sigmoid(offset / 0.1). Demonstrations are the guide's own ways.

    python -m ddil_env.experts.train_fork --out fork.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ddil_env.experts.diffusion_policy import policy_network
from ddil_env.experts.fork import DEPTH, WIDTH
from ddil_env.experts.train_denoiser import save_expert, train_denoiser
from ddil_env.worlds.episodes import run_episodes
from ddil_env.worlds.fork import ROW, Fork

UNDECIDED = 0.1  # offsets below which the guide may take either side


def guide(c: Tensor) -> Tensor:
    """A direction of length 1 for each condition (n, 2), drawn anew each time, (n, 2)."""
    offset, distance = c[:, 0], c[:, 1] + 1
    side = 2 * torch.bernoulli((offset / UNDECIDED).sigmoid()) - 1
    way = torch.stack([side * ROW / 2 - offset, distance + 0.1], 1)  # a little behind the row, so that it is crossed
    return way / way.norm(dim=1, keepdim=True)


def positions(n: int) -> Tensor:
    """Conditions from everywhere before a row, (n, 2)."""
    return torch.rand(n, 2) * torch.tensor([ROW, ROW + 0.1]) - torch.tensor([ROW / 2, 1.0])


def demonstrations(n: int, seed: int) -> dict[str, Tensor]:
    """The guide's ways: conditions `c` (m, 2), directions `x_0` (m, 2) and of which episode `episode` (m,)."""
    episodes = run_episodes(Fork(n), [torch.Generator().manual_seed(seed + i) for i in range(n)], lambda c, rows, frame: guide(c))
    alive = episodes.alive.T  # (n, K): whole episodes, one after the other
    number = torch.arange(n)[:, None].expand(alive.shape)
    return {"c": episodes.c.transpose(0, 1)[alive], "x_0": episodes.x_0.transpose(0, 1)[alive], "episode": number[alive]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--demos", type=int, default=40, help="demonstrations that are kept (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    network = policy_network((2,), (2,), WIDTH, DEPTH)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        c = positions(n)
        return guide(c), c

    print(f"loss {train_denoiser(network, draw, args.updates):.4f}")
    save_expert(args.out, network, demonstrations(args.demos, 50_000))


if __name__ == "__main__":
    main()
