"""A student whose first step is wrong by a planted bias: what it is trained on decides how well its second step copes.

    python benchmarks/planted_bias.py [--bias .5 1 1.5] [--seed 0] [--out planted_bias.json]

Data ±1, so that the expert is D(x_t) = tanh(α x_t/σ²); grid 999 → 500 → 0; x_T ~ N(0, 1). The student's first action is the
expert's plus b, frozen; its second predicts x̂_0 = θ x + c. Whatever the states trained on, the optimum is a least-squares fit

    (θ*, c*) = argmin Σᵢ βᵢ E_{x ~ ρᵢ} (θ x + c − D(x))²

whose error on the student's own states is known by Gauss–Hermite quadrature. With ρ the forward marginal that is BC; with the
student's own states, DAgger; half and half lies between. The learner has to find each. 25 s on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddil_agents import Beta, Dagger, DaggerConfig
from ddil_agents.evaluation.provenance import provenance
from ddil_env import GaussianMixtureExpert, NetworkDenoiser, NoiseSchedule, invert_ddim

MIDDLE = 500  # the time of the one step that is learned
MIXTURES = {"BC": Beta(1, 0, 0), "50/50": Beta(0.5, 0, 0.5), "DAgger": Beta(0, 0, 1)}
NODES = 200


def posterior_mean(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Tensor:
    """D(x_t) = E[x_0 | x_t] = tanh(α x_t/σ²) for x_0 = ±1."""
    alpha, sigma = schedule(t, x_t)
    return torch.tanh(alpha * x_t / sigma**2)


def first_action(schedule: NoiseSchedule, x_T: Tensor, bias: float) -> Tensor:
    """The expert's DDIM action from 999 to 500, plus b: x_500 (n, 1)."""
    t, s = (torch.full((len(x_T),), time) for time in (float(schedule.t_max), float(MIDDLE)))
    return schedule.prediction(posterior_mean(schedule, x_T, t), x_T, t, "x_0").latent(s) + bias


class BiasedThenAffine(nn.Module):
    """x̂_0 whose DDIM step from 999 lands on the expert's action + b, and θ x + c at 500; only θ and c are trained."""

    def __init__(self, schedule: NoiseSchedule, bias: float) -> None:
        super().__init__()
        self.schedule, self.bias = schedule, bias
        self.theta, self.c = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        first, middle = torch.full_like(t, self.schedule.t_max), torch.full_like(t, MIDDLE)
        biased = invert_ddim(self.schedule, x_t, first, first_action(self.schedule, x_t, self.bias), middle).x_0
        return torch.where((t > MIDDLE)[:, None], biased, self.theta * x_t + self.c)  # (b, 1)


class Signs(GaussianMixtureExpert):
    """Data ±1 (width 1e-6), and students with a planted bias."""

    def __init__(self) -> None:
        super().__init__([[-1.0], [1.0]], 1e-6)

    def make_student(self, *, bias: float) -> NetworkDenoiser:
        return NetworkDenoiser(BiasedThenAffine(self.schedule, bias), self.schedule, "x_0")


@dataclass(frozen=True)
class Fit:
    """An affine second step, and its error."""

    theta: float
    c: float
    on_policy: float
    """E (θ x + c − D(x))² over the student's own states."""
    forward: float
    """The same over the forward marginal."""


def quadrature(bias: float) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Nodes x at 500, weights that sum to 1, and D(x), each (m,) float64: of the forward marginal and of the student's own states."""
    schedule = NoiseSchedule("scaled_linear")
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)  # of N(0, 1), once normalised
    weights = weights / weights.sum()
    alpha, sigma = (float(a) for a in schedule.coefficients(torch.tensor(float(MIDDLE))))
    forward = np.concatenate([sigma * nodes - alpha, sigma * nodes + alpha])
    student = first_action(schedule, torch.tensor(nodes)[:, None], bias)[:, 0].numpy()
    states = {"forward": (forward, np.tile(weights / 2, 2)), "student": (student, weights)}
    return {name: (x, w, np.tanh(alpha * x / sigma**2)) for name, (x, w) in states.items()}


def errors(theta: float, c: float, bias: float) -> Fit:
    """A second step with its exact errors."""
    mse = {name: float(w @ (theta * x + c - d) ** 2) for name, (x, w, d) in quadrature(bias).items()}
    return Fit(theta, c, mse["student"], mse["forward"])


def optimum(bias: float, beta: Beta) -> Fit:
    """The least-squares second step under Σᵢ βᵢ ρᵢ, by quadrature."""
    states, (forward, _, student) = quadrature(bias), beta(0)
    x, w, d = (np.concatenate(parts) for parts in zip(states["forward"], states["student"], strict=True))
    w = w * np.repeat([forward, student], [2 * NODES, NODES])
    design = np.stack([x, np.ones_like(x)], 1) * np.sqrt(w)[:, None]
    theta, c = np.linalg.lstsq(design, np.sqrt(w) * d, rcond=None)[0]
    return errors(float(theta), float(c), bias)


def learned(bias: float, beta: Beta, seed: int = 0, num_updates: int = 300) -> Fit:
    """The second step that the learner converges to."""
    config = DaggerConfig(
        beta=beta,
        num_updates=num_updates,
        num_steps=2,
        teacher_steps=2,
        batch_size=4096,
        collect_size=4096,
        updates_per_collect=1,
        capacity=32768,
        learning_rate=0.03,
        warmup_updates=0,
        max_grad_norm=100.0,
        ema=0.98,  # at 0.99 the first steps would still weigh 5 %
        seed=seed,
        student={"bias": bias},
    )
    network = Dagger(Signs(), config).learn(progress=False).ema_student.network
    return errors(network.theta.item(), network.c.item(), bias)


def measure(biases: list[float], seed: int, show: Callable[[str], object] = print) -> list[dict[str, object]]:
    """Every mixture at every bias: what was learned beside the optimum."""
    rows: list[dict[str, object]] = []
    show(f"{'b':>4} {'states':>7} | {'θ':>8} {'c':>8} {'on-policy':>10} {'optimum':>8} {'ratio':>7} | {'forward':>8} {'optimum':>8}")
    for bias in biases:
        for name, beta in MIXTURES.items():
            got, best = learned(bias, beta, seed), optimum(bias, beta)
            ratio = got.on_policy / best.on_policy
            rows.append({"bias": bias, "states": name, "learned": asdict(got), "optimum": asdict(best), "ratio": ratio})
            show(
                f"{bias:4g} {name:>7} | {got.theta:8.5f} {got.c:8.5f} {got.on_policy:10.5f} {best.on_policy:8.5f} {ratio:7.4f} | "
                f"{got.forward:8.5f} {best.forward:8.5f}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bias", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="b, added to x_500")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the results")
    args = parser.parse_args()
    rows = measure(args.bias, args.seed)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"seed": args.seed, "rows": rows, **provenance(torch.device("cpu"))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
