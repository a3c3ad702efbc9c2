"""How far a sampler's distribution is from the teacher's own scores: what distribution matching makes small, measured from outside.

    python benchmarks/score_distance.py --runs runs/paper-benchmark --seed 0        # goes on at the sampler where it stopped

    D = mean over τ of E ‖x̂_φ(x_τ) − x̂_teacher(x_τ)‖² / d ,   x_τ = α_τ x + σ_τ ε ,   x ~ the sampler

where φ is a denoiser fitted to the sampler's samples, from the teacher's weights: 0 where the sampler's scores are the teacher's, which
is where DMD2 rests. Fitted on one half of the samples, measured on the other. The floor is D of samples that DMD2 would leave as they
are, up to the fit's own error: those of the stochastic sampler of the teacher's scores, in 100 steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from digits import interval
from paper import Run, Stochastic, students
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ddil_agents.evaluation.provenance import provenance
from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy, Expert, ExpertPolicy, TimeGrid, load_expert, unroll
from ddil_env.mdp import Kernel

TIMES = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)


def drawn(policy: DdimPolicy, grid: TimeGrid, kernel: Kernel, expert: Expert, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n samples and their classes, from noise that all samplers share."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.arange(n) % expert.num_conditions
    parts = []
    for ids in c.split(500):
        x_T = torch.randn(len(ids), *expert.sample_shape, generator=generator)
        parts.append(unroll(policy, grid, x_T, ids, kernel=kernel, generator=generator)[:, -1])
    return torch.cat(parts), c


def distance(x: Tensor, c: Tensor, expert: Expert, updates: int, seed: int) -> float:
    """D of samples x (n, *sample_shape) with classes c (n,)."""
    torch.manual_seed(seed)
    half = len(x) // 2
    network = expert.make_student()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, updates)

    def noised(index: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x[index])
        return expert.schedule.add_noise(x[index], eps, t), eps

    for _ in range(updates):
        index = torch.randint(half, (64,))
        t = torch.randint(1, expert.schedule.num_train_steps, (64,)).float()
        x_t, eps = noised(index, t)
        alpha, sigma = expert.schedule(t, x_t)
        pred = network(x_t, t, c[index])
        v, truth = alpha * pred.eps - sigma * pred.x_0, alpha * eps - sigma * x[index]
        loss = (v - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(network)
    found, rest = [], torch.arange(half, len(x))
    with torch.no_grad():
        for tau in TIMES:
            t = torch.full((len(rest),), float(tau))
            x_t, _ = noised(rest, t)
            theirs, teachers = average.module(x_t, t, c[rest]).x_0, expert.predict(x_t, t, c[rest]).x_0
            found.append(float((theirs - teachers).square().mean()))
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper-benchmark"), help="of benchmarks/paper.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/score_distance.json"))
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the samples")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--n", type=int, default=2000, help="samples")
    parser.add_argument("--updates", type=int, default=400, help="gradient steps of a fit")
    parser.add_argument("--fits", type=int, default=3, help="fits of each sampler, from other draws")
    args = parser.parse_args()
    torch.set_num_threads(1)
    expert = load_expert("digits")
    grid = TimeGrid(expert.schedule, args.steps)
    samplers: dict[str, tuple[DdimPolicy, TimeGrid, Kernel]] = {
        "teacher, stochastic, 100 steps": (Stochastic(expert, args.seed), TimeGrid(expert.schedule, 100), "ddim"),
        f"teacher, DDIM, {args.steps} steps": (ExpertPolicy(expert), grid, "ddim"),
    }
    compared = [("lcm", "baseline"), ("dmd2", "baseline"), ("dmd2", "+ DDIL"), ("dmd2", "+ Reflected + DDIL")]
    compared += [("dmd2", "baseline, every step")] if args.steps == 8 else []
    for method, variant in compared:
        run = Run(method, variant, args.seed, args.steps if method == "dmd2" else 4)
        policy, kind, kernel = students(run, args.runs / run.folder, expert)[args.steps]
        samplers[f"{method} {variant}"] = policy, TimeGrid(expert.schedule, args.steps, kind), kernel
    settings = {key: value for key, value in vars(args).items() if key not in ("runs", "out")}
    before = json.loads(args.out.read_text()) if args.out.is_file() else {}
    models: dict[str, Any] = before["D"] if before and all(before[key] == value for key, value in settings.items()) else {}
    for name, (policy, times, kernel) in (bar := tqdm(samplers.items(), unit="sampler")):
        bar.set_postfix_str(name)
        if name not in models:
            x, c = drawn(policy, times, kernel, expert, args.n, args.seed)
            values = [distance(x, c, expert, args.updates, fit) for fit in range(args.fits)]
            models[name] = (*interval(values), values)
            write_atomically(args.out, json.dumps({"D": models, **settings, **provenance(torch.device("cpu"))}, indent=1))
    for name, (mean, half, _) in models.items():
        print(f"| {name} | {1e3 * mean:.3f} ± {1e3 * half:.3f} |")


if __name__ == "__main__":
    main()
