"""What rollouts of a surrogate of the Kuramoto–Sivashinsky equation are worth: its teacher by number of steps, and students.

    python benchmarks/kuramoto.py                                    # the shipped teacher @8, 4, 2, 1
    python benchmarks/kuramoto.py --runs runs/bc runs/dagger         # beside students of it

bounded      share of rollouts all of whose frames stay within 5 standard deviations of the attractor
W2 late      sliced 2-Wasserstein distance of the last quarter of the frames to as many states of the solver, every tenth frame; a rollout
             that ended counts with its last frame within the bound
valid time   frames until a rollout's error against the solver's from the same start is .4 of the attractor's standard deviation
error        mean squared error of a sample on held-out histories, against the recorded one
recovery     root mean square error of the next frame after histories with noise of .1 standard deviations, in units of the noise: below 1
             a model leads back
high modes   energy of the modes 9 to 23 late in the rollouts, over the solver's
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ddil_agents.commands.load import load_run
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.results import markdown_table
from ddil_env import DdimPolicy, ExpertPolicy, TimeGrid, unroll
from ddil_env.experts.kuramoto import Kuramoto
from ddil_env.worlds.kuramoto import spectrum, valid_time

NOISE = 0.1
COLUMNS = {
    "bounded": "{:.3f}", "W2 late": "{:.3f}", "valid time": "{:.1f}", "error": "{:.4f}", "recovery": "{:.3f}", "high modes": "{:.3g}"
}  # fmt: skip


class Rollouts:
    """Measures policies on n rollouts from one set of starts."""

    def __init__(self, expert: Kuramoto, n: int, seed: int) -> None:
        self.expert = expert
        self.evaluator = EpisodeEvaluator(ExpertPolicy(expert), TimeGrid(expert.schedule, 8), n, seed)
        num_frames = self.evaluator.world.num_frames
        self.late = torch.arange(num_frames * 3 // 4, num_frames, 10)
        starts = self.evaluator.expert_episodes.c[0, :, -1, 0]
        self.truth = self.solve(starts, num_frames)
        others = expert.equation.on_attractor([torch.Generator().manual_seed(10**9 + i) for i in range(n)]) / expert.std
        self.reference = self.solve(others, len(self.late) * 10)[::10]

    def solve(self, starts: Tensor, num_frames: int) -> Tensor:
        expert = self.expert
        return (expert.equation.trajectory(starts * expert.std, num_frames, expert.dt) / expert.std).float()

    def measure(self, policy: DdimPolicy, grid: TimeGrid) -> dict[str, float]:
        """The numbers of COLUMNS."""
        expert, episodes = self.expert, self.evaluator.run(policy, grid)
        frames = torch.zeros_like(self.truth)
        frames[: len(episodes.c)] = episodes.c[:, :, -1, 0]
        bounded = self.evaluator.world.succeeded(episodes.total_reward)
        assert bounded is not None
        last = torch.minimum(self.late[:, None], episodes.length - 1)  # (frames, n)
        x_0, c = expert.reference_data(1024, held_out=True)
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(x_0.shape, generator=generator)
        noise = NOISE * torch.randn(c.shape, generator=generator)
        sample, recovered = (unroll(policy, grid, x_T, history)[:, -1] for history in (c, c + noise))
        transition = self.evaluator.world.transition
        off = transition(c + noise, recovered)[0] - transition(c, x_0)[0]
        return self.of_frames(frames.gather(0, last[..., None].expand(-1, -1, frames.shape[2]))) | {
            "bounded": float(bounded.float().mean()),
            "valid time": float(valid_time(frames, self.truth).double().mean()),
            "error": float((sample - x_0).square().mean()),
            "recovery": float(off.square().mean().sqrt()) / NOISE,
        }

    def of_frames(self, late: Tensor) -> dict[str, float]:
        """Of late frames (frames, n, points): what their distribution is."""
        high = (spectrum(frames)[9:24].sum() for frames in (late, self.reference))
        return {
            "W2 late": sliced_wasserstein(late.flatten(0, 1), self.reference.flatten(0, 1)),
            "high modes": float(next(high) / next(high)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 2, 1], help="of the teacher (default: %(default)s)")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run directories of students")
    parser.add_argument("--weights", help="of another teacher; default: the shipped one")
    parser.add_argument("--n", type=int, default=64, help="rollouts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    expert = Kuramoto(weights=args.weights)
    rollouts = Rollouts(expert, args.n, args.seed)
    found: dict[str, dict[str, float]] = {"solver": rollouts.of_frames(rollouts.truth[rollouts.late])}
    for steps in args.steps:
        found[f"teacher@{steps}"] = rollouts.measure(ExpertPolicy(expert), TimeGrid(expert.schedule, steps))
    for run in args.runs:
        learner = load_run(run)
        found[str(run)] = rollouts.measure(learner.student_policy, learner.grid)
    cells = [["", *COLUMNS]]
    for name, row in found.items():
        cells.append([name, *(form.format(row[key]) if key in row else "" for key, form in COLUMNS.items())])
    print("\n".join(markdown_table(cells)))
    if args.out is not None:
        args.out.write_text(json.dumps({"n": args.n, "seed": args.seed, "models": found, **provenance(expert.device)}, indent=1))


if __name__ == "__main__":
    main()
