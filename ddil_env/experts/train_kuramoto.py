"""Trains the surrogate of the Kuramoto–Sivashinsky equation, in about five minutes on one core.

Its histories are noised, by up to .15 of the attractor's standard deviation, and its targets are the true next frames: so it learns to lead
back to the attractor from where it errs, and is a sound labeller where students will wander. With --noise 0, on clean histories, it does
not: it errs as little on solutions, and its own rollouts diverge.

    python -m ddil_env.experts.train_kuramoto --out kuramoto.safetensors
    python -m ddil_env.experts.train_kuramoto --out clean.safetensors --noise 0
    python -m ddil_env.experts.train_kuramoto --out far.safetensors --dt 3 --absolute
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ddil_env.experts.kuramoto import surrogate
from ddil_env.experts.train_denoiser import save_expert, train_denoiser
from ddil_env.worlds.kuramoto import KuramotoSivashinsky


def record(seeds: range, num_frames: int, dt: float) -> Tensor:
    """Solutions on the attractor, (len(seeds), num_frames, points) float64."""
    equation = KuramotoSivashinsky()
    starts = equation.on_attractor([torch.Generator().manual_seed(seed) for seed in seeds])
    return equation.trajectory(starts, num_frames, dt).transpose(0, 1)


def make_draw(solutions: Tensor, noise: float, absolute: bool) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Makes the function that draws training pairs of solutions (sequences, frames, points).

    Args:
        solutions: From `record`.
        noise: Largest noise of a history, in the attractor's standard deviations; 0: histories are clean.
        absolute: Whether a sample is the next frame, divided by the attractor's standard deviation, or the increment to it, divided by
            that of increments.

    Returns:
        n → samples (n, 1, points) and histories (n, 1, 1, points).
    """
    std, increment = solutions.std(), solutions.diff(dim=1).std()
    past, following = (x.flatten(0, 1)[:, None].div(std).float() for x in (solutions[:, :-1], solutions[:, 1:]))

    def draw(n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(past), (n,))
        history = past[rows] + noise * torch.rand(n, 1, 1) ** 3 * torch.randn(n, *past.shape[1:])  # on all scales, half below .02
        shift = int(torch.randint(past.shape[-1], ()))  # the equation is the same everywhere
        x_0 = following[rows] if absolute else (following[rows] - history) * (std / increment).float()
        return x_0.roll(shift, -1), history.roll(shift, -1)[:, None]

    return draw


def train(
    out: Path, *, dt: float = 0.5, noise: float = 0.15, absolute: bool = False, sequences: int = 40, updates: int = 5000, seed: int = 0
) -> None:
    """Trains a surrogate and writes it to a safetensors file, with recorded solutions and what normalises them; arguments as in --help."""
    torch.manual_seed(seed)
    solutions = record(range(10_000 + 1000 * seed, 10_256 + 1000 * seed), 400, dt)
    std, increment = solutions.std(), solutions.diff(dim=1).std()
    network = surrogate()
    loss = train_denoiser(network, make_draw(solutions, noise, absolute), updates, batch_size=128)
    frames = (record(range(50_000, 50_000 + sequences), 100, dt) / std).float()
    data = {"frames": frames, "dt": torch.tensor(dt), "std": std} | ({} if absolute else {"increment": increment / std})
    print(f"loss {loss:.4f}")
    save_expert(out, network, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--dt", type=float, default=0.5, help="time between two frames (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.15, help="largest noise of a history; 0: clean ones (default: %(default)s)")
    parser.add_argument("--absolute", action="store_true", help="a sample is the next frame; default: the increment to it")
    parser.add_argument("--sequences", type=int, default=40, help="of 100 frames that are kept (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=5000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of solutions, weights and noise (default: %(default)s)")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
