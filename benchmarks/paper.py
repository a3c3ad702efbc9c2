"""Every method of the paper on the digits expert: baseline, + DDIL, + reflected + DDIL, over seeds.

    python benchmarks/paper.py --jobs 2                # hours on two cores; goes on where it stopped
    python benchmarks/paper.py --report_only           # the table, from the runs that are there

Guided, as the paper's: w = 3, the least of its ω ∈ [2, 14] (w = 1 + ω). DDIL comes in late, in a second part with a new warm-up (§5), as
the baseline has one too. PD is one staged run of 32 → 8 → 4 → 2 → 1 steps a seed, each stage in two parts, whose students are judged at
their own steps; with DDIL the second parts are half from mixed rollouts (§4.2). LCM is one student in two parts, sampled in 1, 2, 4 and
8. DMD2 has a student for each number of steps, each starting from that seed's plain LCM (so the caption of the paper's Table 3 can be
read: "adopting latent consistency distillation retrained for SSD1B"), with 400 steps of the student; its costs are on top of the LCM's.
In 8 steps DMD2 trains the last one alone; `every step` is a student whose steps it trains all, `a tenth` one with that share of teacher
rollouts. Within a method all variants take the same gradient steps, batches, initial weights and data; teacher and student forwards,
rollouts and critics included, are counted and shown. At batch 7 the paper's claim of stability is put to the test, with the norms of the
gradients.

Every student of a seed starts from the same noise and conditions; distances are to the same data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits import interval
from torch import Tensor

from ddil_agents.commands.load import load_run
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.checkpoint import write_atomically
from ddil_agents.training.metrics import read_metrics
from ddil_env import Expert, ExpertPolicy, StudentPolicy, TimeGrid, load_expert
from ddil_env.time_grid import GridKind

STEPS = (1, 2, 4, 8)
METRICS = (
    "frechet",
    "coverage",
    "recall",
    "accuracy",
    "frechet_to_expert",
    "teacher_nfe",
    "student_nfe",
    "minutes",
    "grad_norm",
    "grad_norm_max",
)
GUIDANCE = 3.0
DATA, HALF = {"forward": 1.0, "teacher": 0.0, "student": 0.0}, {"forward": 0.5, "teacher": 0.0, "student": 0.5}
LCM_PARTS = [  # the baseline's and DDIL's
    [{"num_updates": 360, "beta": DATA}, {"num_updates": 240, "expert": "original", "beta": second}] for second in (DATA, HALF)
]
DMD2_BETA = (
    "--beta.forward 0 --beta.teacher 0 --beta.student 1",  # the baseline's
    "--beta.forward 0 --beta.teacher .5 --beta.student .5",  # DDIL's
)
ROLES = {"pd": "[teacher]", "lcm": "[teacher,target]", "dmd2": "[teacher,student,critic]"}  # who is thresholded, DDIL §4.1
MORE = {  # what else a variant of DMD2 has, over the settings above it
    "on policy": "--on_policy true",
    "every step": "--noise_level null --learning_rate 1.25e-5",
    "a tenth": "--beta.teacher .1 --beta.student .9",
}
VARIANTS = ("baseline", "+ DDIL", "+ Reflected + DDIL")


class Stochastic(ExpertPolicy):
    """The teacher by the stochastic sampler of its scores, which is what DMD2 matches; DDIM follows their flow.

    x_s = α_s x̂_0 + √(σ_s² − η²) ε̂ + η z ,   η = σ_s/σ_t √(1 − α_t²/α_s²)          Song et al. 2021, Eq. 12 and 16
    """

    def __init__(self, expert: Expert, seed: int) -> None:
        super().__init__(expert)
        self.generator = torch.Generator().manual_seed(stream_seed(seed, "stochastic teacher"))

    @torch.no_grad()
    def act(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        pred = self.predict(x_t, t, c, w).projected(self.support)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule(t, x_t), self.schedule(s, x_t)
        eta = sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()
        z = torch.randn(x_t.shape, generator=self.generator)
        return alpha_s * pred.x_0 + (sigma_s**2 - eta**2).clamp(min=0).sqrt() * pred.eps + eta * z


class Run(NamedTuple):
    """One training run: its method, variant, seed and what else names it."""

    method: str
    variant: str
    seed: int
    num_steps: int = 4
    batch: int | None = None

    @property
    def row(self) -> str:
        """The row that it belongs to."""
        return f"{self.method} {self.variant}" + ("" if self.batch is None else f", batch {self.batch}")

    @property
    def folder(self) -> str:
        tag = self.row.replace(" ", "").replace(",", "-").replace("+", "-")
        return f"{tag}-{self.num_steps}-s{self.seed}" if self.method == "dmd2" else f"{tag}-s{self.seed}"

    def command(self, out: Path) -> list[str]:
        """The command line that trains it."""
        ddil, reflected = "DDIL" in self.variant, "Reflected" in self.variant
        agent = {"pd": "dagger" if ddil else "bc"}.get(self.method, self.method)
        settings = ["--config", "staged" if self.method == "pd" else "demo", "--guidance_scale", str(GUIDANCE)]
        if self.method == "lcm":
            settings += ["--stages", json.dumps(LCM_PARTS[ddil])]
        settings += ["--thresholding.roles", ROLES[self.method] if reflected else "[]"]
        if self.method == "dmd2":
            lcm = out.parent / Run("lcm", "baseline", self.seed).folder
            settings += ["--num_steps", str(self.num_steps), "--init", str(lcm), "--grid", "lcm", "--teacher_steps", "8"]
            settings += DMD2_BETA[ddil].split()
            # R = 5, not the demo's 2, under which the critic lagged in a trial of one seed in eight steps. And a student in one step has
            # the most to change, one in eight the least.
            settings += ["--critic_updates", "5", "--num_updates", "2000", "--updates_per_collect", "4"]
            rate = 1e-4 / self.num_steps if self.batch is None else 1e-4
            if self.num_steps == 8:
                # Trained at every step, it ends no better than the LCM. We think that the one critic, which fits the mixture of all
                # outputs, pushes the last to make up for the first: train the last step alone (t = 124), which bears a higher rate.
                settings, rate = [*settings, "--noise_level", "124"], 5e-5
            settings += ["--learning_rate", str(rate)]
        for name, flags in MORE.items():
            settings += flags.split() if name in self.variant else []
        if self.batch is not None:
            settings += ["--batch_size", str(self.batch), "--collect_size", str(2 * self.batch)]
        settings += ["--evaluate.n", "20", "--evaluate.n_action", "1", "--evaluate.also_steps", "[]", "--checkpoint_every", "10000"]
        return [sys.executable, "-m", f"ddil_agents.{agent}", "--env", "digits", "--seed", str(self.seed), "--out", str(out), *settings]


def plan(methods: list[str], seeds: list[int]) -> list[Run]:
    """Every run, in the order of seeds, so that an interrupted benchmark has whole seeds."""
    runs = []
    for seed in seeds:
        for method in ("pd", "lcm", "dmd2"):
            steps = STEPS if method == "dmd2" else (4,)
            runs += [Run(method, variant, seed, n) for n in steps for variant in VARIANTS if method in methods]
        if "small" in methods:
            small = ("baseline", "+ Reflected", "+ Reflected + DDIL")
            runs += [Run("dmd2", variant, seed, 4, 7) for variant in small]
        if "dmd2" in methods:
            runs.append(Run("dmd2", "baseline, on policy", seed))
            runs += [Run("dmd2", variant, seed, 8) for variant in ("baseline, every step", "+ DDIL, a tenth")]
    return runs


def train(run: Run, runs: Path) -> None:
    """Trains a run if it is not there; resumes one that was cut short."""
    out = runs / run.folder
    if (out / "result.json").is_file():
        return
    command = run.command(out)
    if (out / "config.yaml").is_file():
        command = [*command[:3], "--resume", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one run a core; more threads a run than cores would fight
    with (runs / f"{run.folder}.log").open("w") as log:
        if subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            print(f"{run.folder} failed: see {runs / run.folder}.log", flush=True)  # a diverged run is a result, and the rest goes on
            return
    print(f"{run.folder}: done", flush=True)


def students(run: Run, out: Path, expert: Expert) -> dict[int, tuple[StudentPolicy, GridKind, str]]:
    """The run's students by number of steps, each with its grid and kernel."""
    learner = load_run(out, device=str(expert.device))
    kind, kernel = learner.config.grid, learner.kernel
    if run.method == "pd":
        found = {}
        for stage in sorted(out.glob("stage_*"), key=lambda stage: int(stage.name.rpartition("_")[2])):  # of two parts, the second
            n = len(json.loads((stage / "result.json").read_text())["times"]) - 1
            found[n] = StudentPolicy(expert.load_student(stage / "student"), expert, learner.student_policy.support), kind, kernel
        return found
    return dict.fromkeys(STEPS if run.method == "lcm" else (run.num_steps,), (learner.student_policy, kind, kernel))


def cost(run: Run, out: Path, steps: int) -> dict[str, float]:
    """Forwards, minutes and gradient norms of the training up to the student of so many steps."""
    rows = read_metrics(out / "metrics.jsonl")
    if run.method == "pd":
        stages = list(out.glob("stage_*"))
        results = [json.loads((stage / "result.json").read_text()) for stage in stages]
        needed = [i for i, result in enumerate(results) if len(result["times"]) - 1 >= steps]
        nfe = {key: float(sum(results[i][key] for i in needed)) for key in ("teacher_nfe", "student_nfe")}
        by_stage = [read_metrics(stages[i] / "metrics.jsonl") for i in needed]
        seconds, rows = sum(rows[-1]["seconds"] for rows in by_stage), [row for rows in by_stage for row in rows]
    else:
        nfe = {key: float(rows[-1][key]) for key in ("teacher_nfe", "student_nfe")}
        seconds = rows[-1]["seconds"]
    norms = [row["grad_norm"] for row in rows if row.get("grad_norm") is not None]
    return nfe | {"minutes": seconds / 60, "grad_norm": statistics.fmean(norms), "grad_norm_max": max(norms)}


def evaluate(runs: list[Run], root: Path, seed: int, n: int) -> dict[str, dict[str, float]]:
    """Every model of one seed, by `row @steps`, against the same data from the same noise."""
    path = root / f"evaluation-s{seed}-n{n}.json"
    models: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    @cache
    def evaluator() -> Evaluator:
        expert = load_expert("digits", guidance_scale=GUIDANCE)
        return Evaluator(ExpertPolicy(expert, 8), TimeGrid(expert.schedule, 4), Evaluation(n=n, seed=seed))

    asked = [(f"teacher @{steps}", steps, False) for steps in (32, *STEPS)]
    for name, steps, stochastic in asked + [(f"teacher, stochastic @{steps}", steps, True) for steps in (100, *STEPS)]:
        if name not in models:
            expert = evaluator().expert
            policy = Stochastic(expert, seed) if stochastic else ExpertPolicy(expert)
            models[name] = evaluator().evaluate(policy, TimeGrid(expert.schedule, steps))
    if "training data" not in models:
        models["training data"] = evaluator().floors()["training_data"]
    write_atomically(path, json.dumps(models, indent=1))
    for run in runs:
        out = root / run.folder
        names = {steps: f"{run.row} @{steps}" for steps in ((run.num_steps,) if run.method == "dmd2" else STEPS)}
        if all(name in models for name in names.values()) or not (out / "result.json").is_file():
            continue
        for steps, (policy, kind, kernel) in students(run, out, evaluator().expert).items():
            grid = TimeGrid(evaluator().expert.schedule, steps, kind)
            models[names[steps]] = evaluator().evaluate(policy, grid, kernel) | cost(run, out, steps)
        write_atomically(path, json.dumps(models, indent=1))
    return models


def summary(by_seed: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each model's metrics over seeds, and its differences from the teacher in as many steps and from its baseline, paired by seed."""
    names = list(dict.fromkeys(name for models in by_seed.values() for name in models))
    rows: dict[str, Any] = {}
    for name in names:
        there = [models[name] for models in by_seed.values() if name in models]
        rows[name] = {key: (*interval(v), v) for key in METRICS if (v := [m[key] for m in there if m.get(key) is not None])}
    paired: dict[str, Any] = {}
    for name in names:
        steps = name.rpartition(" @")[2]
        against = {"teacher": f"teacher @{steps}"}
        if variant := next((v for v in ("+ Reflected + DDIL", "+ DDIL, a tenth", "+ DDIL", "+ Reflected") if v in name), None):
            against["baseline"] = name.replace(variant, "baseline", 1)
        for what, other in against.items():
            if other in names and not name.startswith("teacher"):
                pairs = [(models[name], models[other]) for models in by_seed.values() if name in models and other in models]
                found = {key: [a[key] - b[key] for a, b in pairs if key in a and key in b] for key in METRICS}
                paired[f"{name} − {what}"] = {key: (*interval(d), d) for key, d in found.items() if d}
    return {"models": rows, "paired": paired}


def markdown(result: dict[str, Any]) -> str:
    """The summary as Markdown tables."""
    columns = {
        "frechet": ("Fréchet ↓", 2), "coverage": ("coverage ↑", 3), "recall": ("recall ↑", 3), "accuracy": ("accuracy ↑", 3),
        "frechet_to_expert": ("Fréchet to teacher ↓", 2), "teacher_nfe": ("teacher NFE", 0), "student_nfe": ("student NFE", 0),
        "minutes": ("minutes, median", 1), "grad_norm": ("gradient norm", 3), "grad_norm_max": ("largest", 3),
    }  # fmt: skip
    lines = [f"| model | seeds | {' | '.join(heading for heading, _ in columns.values())} |", "|---|---|" + "---|" * len(columns)]

    def order(name: str) -> tuple[int, str]:
        return int(name.rpartition("@")[2]) if "@" in name else 99, name

    for name in sorted(result["models"], key=order):
        row = result["models"][name]
        cells = [
            f"{row[k][0]:,.{digits}f}" + (f" ± {row[k][1]:.{digits}f}" if digits else "") if k in row else "–"
            for k, (_, digits) in columns.items()
        ]
        if "minutes" in row:  # of runs that shared their cores with others: the middle one says most
            cells[list(columns).index("minutes")] = f"{statistics.median(row['minutes'][2]):.1f}"
        lines.append(f"| {name} | {len(row['frechet'][2])} | {' | '.join(cells)} |")
    lines += ["", "| paired difference | Fréchet | coverage | recall | accuracy | gradient norm |", "|---|---|---|---|---|---|"]
    for name in sorted(result["paired"], key=lambda n: (n.rpartition(" − ")[2], *order(n.rpartition(" − ")[0]))):
        row = result["paired"][name]
        keys = (("frechet", 2), ("coverage", 3), ("recall", 3), ("accuracy", 3), ("grad_norm", 3))
        lines.append(f"| {name} | {' | '.join(f'{row[k][0]:+.{d}f} ± {row[k][1]:.{d}f}' if k in row else '–' for k, d in keys)} |")
    how = f"n = {result['n']}, {result['extractor']}; {result['hardware']}, torch {result['torch']}, {result['date']}"
    lines += ["", f"{how}; mean ± 95 % over seeds."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper-benchmark"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paper.json"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["pd", "lcm", "dmd2", "small"], choices=["pd", "lcm", "dmd2", "small"])
    parser.add_argument("--n", type=int, default=500, help="samples of an evaluation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    if {"dmd2", "small"} & set(args.methods) and "lcm" not in args.methods:
        parser.error("dmd2 starts from the LCM students: name lcm among the --methods")
    if not 2 <= args.seeds <= 10:
        parser.error(f"--seeds {args.seeds}: need 2 … 10, of which the table of t holds the quantiles")
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    runs = plan(args.methods, list(range(args.seeds)))
    if not args.report_only:
        for wave in (("pd", "lcm"), ("dmd2",)):  # the second starts from the first
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda run: run.train(args.runs), [run for run in runs if run.method in wave]))
    by_seed = {seed: evaluate([r for r in runs if r.seed == seed], args.runs, seed, args.n) for seed in range(args.seeds)}
    result = summary(by_seed) | {"n": args.n, "extractor": load_expert("digits").extractor, **provenance(torch.device("cpu"))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(f"# Every method of the paper on the digits expert\n\n{markdown(result)}\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
