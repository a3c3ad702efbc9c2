"""Speed beside the field's own loops: a denoising, an LCM step, a DMD2 step and a draw from the buffer, in one table.

    python benchmarks/throughput.py [--model small] [--rounds 40] [--out benchmarks/results/throughput]
    python benchmarks/throughput.py --device cuda --model sd15-architecture --compile

Both sides run in one process on the same weights, each once a round in an order drawn anew; a ratio is the median over rounds of theirs /
ours in the same round, more than 1 where we are faster, with a distribution-free 95 % interval. The clock is the processor's time on a
CPU, which other work on the machine disturbs less, and the wall's on a GPU. The limit is the time of the forwards and backwards that the
work cannot do without, run on our networks in the same round, and "of limit" its share of our time. Before the clock starts both sides take
three steps in float32 from the same states, noise and times, and the benchmark stops where they differ: `difference` is the largest,
relative, in losses, gradient norms and samples. How far their weights come apart, by the way that they have gone, is checked too.

    rollout   diffusers' StableDiffusionPipeline on ready embeddings, to latents, against `unroll` and TorchRL's `env.rollout`
    lcm       the step of diffusers' LCM script (peers.py) against collect, draw, update and metrics as `train` runs them
              "fresh": every state is labelled anew, as the script does;  "reused": each label serves 4 steps, as in configs/lcm/paper.yaml,
              which is less work than the script's
    dmd2      the iteration of the official code (peers.py), with two steps of backward simulation, against collect, update and metrics
    buffer    a raw index of the same tensors against a draw by β, of 256 states of two 4 × 64 × 64 latents

`--compile` is our networks through torch.compile; theirs run as their scripts do. On a GPU both are in bfloat16 (`--dtype`).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import buffer
import diffusers
import torch
from peers import LEARNING_RATE, ConsistencyScript, DMD2Script
from rollout import Way, bare_sd, sd_expert, timed
from throughput_report import row, table
from torch import Tensor, nn

from ddil_agents import DMD2, LCM, Algorithm, Beta, DMD2Config, LCMConfig
from ddil_agents.training.metrics import MetricsCallback
from ddil_env import DenoisingEnv, ExpertPolicy, TimeGrid
from ddil_env.rollout import unroll

MODELS = {"tiny": "sd", "small": "sd_wide", "sd15-architecture": "sd15"}  # the UNets of rollout.py
PARTS = ("rollout", "lcm", "dmd2", "buffer")
NUM_STEPS = 4
SIMULATED = 2  # steps of DMD2's backward simulation: to its grid's third time, 499
REUSE = 4  # gradient steps that a label serves
R = 10  # DMD2's iterations for one step of the student, as published for Stable Diffusion 1.5
TOLERANCE = 1e-3, 1e-2  # in float32: of numbers, and of the way that weights have gone
PRECISION = {"float32": "no", "bfloat16": "bf16"}
SHARED: dict[str, Any] = {
    "num_updates": 1_000_000,  # no visible fall of a linear rate
    "warmup_updates": 0,
    "learning_rate": LEARNING_RATE,
    "weight_decay": 0.01,
    "adam_betas": (0.9, 0.999),
}
Same = tuple[dict[str, Way], float, float]  # ways to time that do the same, by how much numbers differ, and by how much weights


class Case:
    """One model on one device, and the inputs of both sides.

    Args:
        model: Of MODELS.
        device, dtype, batch_size, compiled: As on the command line.
    """

    def __init__(self, model: str, device: str, dtype: str, batch_size: int, compiled: bool) -> None:
        self.model, self.device, self.dtype, self.batch_size, self.compiled = model, device, dtype, batch_size, compiled
        self.expert = sd_expert(MODELS[model], device, dtype)
        self.stock = copy.deepcopy(self.expert.network.unet)  # theirs, as diffusers builds it
        self.x_0 = torch.randn(batch_size, *self.expert.sample_shape, device=device)
        self.c = torch.arange(batch_size, device=device) % self.expert.num_conditions
        self.text = self.texts(self.c)
        self.null = self.texts(torch.full_like(self.c, self.expert.null_condition))
        self.expert.sample_data = lambda n, generator=None: (self.x_0[:n], self.c[:n])  # theirs are ready, too
        if compiled:
            self.expert.compile()

    def texts(self, c: Tensor) -> Tensor:
        return self.expert.network.embeddings.tables["text"][c].float()

    def settings(self, **own: Any) -> dict[str, Any]:
        shared = {**SHARED, "batch_size": self.batch_size, "compile": self.compiled}
        return {**shared, "mixed_precision": PRECISION[self.dtype], **own}

    def pair(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher's network is given for guidance at x (b, 4, h, w), t (b,)."""
        return torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.c, torch.full_like(self.c, self.expert.null_condition)])


class Loop:
    """A learner's steps as `train` takes them, with its metrics."""

    def __init__(self, learner: Algorithm) -> None:
        self.learner, self.log, self.steps = learner, MetricsCallback(), 0

    def __call__(self, collect: bool = True) -> None:
        if collect:
            self.learner.trainer.collect()
        batch = self.learner.draw()
        self.log.add(batch, self.learner.trainer.update(batch))
        self.steps += 1
        if self.steps % 10 == 0:
            self.log.flush(self.learner)


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in network.parameters()])


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def moved_apart(ours: nn.Module, theirs: nn.Module, start: Tensor) -> float:
    """How far two networks came apart, by the way that one has gone."""
    return float((weights(ours) - weights(theirs)).norm() / (weights(theirs) - start).norm())


def forward_backward(network: nn.Module, *given: Tensor | None) -> None:
    network(*given).float().square().mean().backward()
    network.zero_grad()


def rollout(case: Case) -> Same:
    expert, x_T, c = case.expert, case.x_0, case.c
    policy, grid = ExpertPolicy(expert), TimeGrid(expert.schedule, NUM_STEPS).to(case.device)
    env = DenoisingEnv(expert, NUM_STEPS, [case.batch_size])
    ours, expert.network.unet = expert.network.unet, case.stock
    theirs = bare_sd(expert, grid, x_T, c)["pipeline"]
    expert.network.unet = ours
    pairs = [case.pair(x_T, t.expand(case.batch_size)) for t in grid.times[:-1]]

    @torch.no_grad()
    def by_env() -> None:
        env.rollout(NUM_STEPS, policy)

    def by_unroll() -> Tensor:
        return unroll(policy, grid, x_T, c)[:, -1]

    @torch.no_grad()
    def limit() -> None:
        for pair in pairs:
            expert.network(*pair)

    return {"theirs": theirs, "unroll": by_unroll, "env": by_env, "limit": limit}, apart(by_unroll(), theirs()), 0.0


def lcm(case: Case) -> Same:
    own = {"ema": 0.95, "guidance_range": (6, 16), "beta": Beta(1, 0, 0), "collect_size": case.batch_size, "capacity": case.batch_size}
    learner = LCM(case.expert, LCMConfig(**case.settings(**own)))
    student, average = learner.networks["student"].network, learner.ema_student.network
    script = ConsistencyScript(case.stock, copy.deepcopy(student.unet), getattr(torch, case.dtype))
    start, differences = weights(script.student), []
    for i in range(3):
        states = learner.trainer.collect()
        measured = learner.trainer.update(states)
        index = (states["t"].long() + 1) // 20 - 1
        loss, norm = script.descend(script.loss(states["x_t"], index, states["w"].cpu() - 1, case.text, case.null))
        differences += [apart(measured["loss"].mean(), torch.tensor(loss)), apart(measured["grad_norm"], norm)]
        if i == 0:  # theirs averages the weights before the first step, too
            script.target.load_state_dict(average.unet.state_dict())
    drift = max(moved_apart(student.unet, script.student, start), moved_apart(average.unet, script.target, start))
    loop, x_t, t, s, w = Loop(learner), *(states[key] for key in ("x_t", "t", "s", "w"))
    pair = case.pair(x_t, t)

    @torch.no_grad()
    def labels() -> None:
        case.expert.network(*pair)

    def limit() -> None:  # of a step whose labels are there
        with learner.trainer.accelerator.autocast():
            with torch.no_grad():
                average(x_t, s, case.c, w)
            forward_backward(student, x_t, t, case.c, w)

    def reused() -> None:
        for i in range(REUSE):
            loop(collect=i == 0)

    def theirs() -> None:
        script.step(case.x_0, case.text, case.null)

    return {"theirs": theirs, "fresh": loop, "reused": reused, "labels": labels, "limit": limit}, max(differences), drift


def dmd2(case: Case) -> Same:
    own = {"noise_level": 499, "guidance_scale": DMD2Script.guidance_scale, "critic_updates": 2, "max_grad_norm": 10.0}
    learner = DMD2(case.expert, DMD2Config(**case.settings(critic_learning_rate=LEARNING_RATE, **own)))
    student, critic = learner.networks["student"].network, learner.networks["critic"].denoiser.network
    networks = copy.deepcopy(student.unet), copy.deepcopy(critic.unet)
    generator = torch.Generator(case.device)
    script = DMD2Script(case.stock, *networks, getattr(torch, case.dtype), generator)
    start, differences = weights(script.student), []
    for i in range(3):  # the student's turn, the critic's, the student's
        generator.set_state(learner.collector.streams["rollout"].get_state())
        states = learner.trainer.collect()
        x_T = script.randn(case.x_0)  # the collector then draws conditions
        case.expert.sample_condition(case.batch_size, generator)
        text = case.texts(states["c"])
        x_t, t = script.simulate(x_T, text, SIMULATED)
        generator.set_state(learner.collector.streams["loss"].get_state())
        measured, expected = learner.trainer.update(states), script.update(x_t, t, text, case.null, students_turn=i != 1)
        differences += [apart(states["x_t"], x_t), *(apart(measured[name].mean(), value) for name, value in expected.items())]
    drift = max(moved_apart(*both, start) for both in zip((student.unet, critic.unet), networks, strict=True))
    loop, t = Loop(learner), states["t"]
    pair = case.pair(x_t, t)

    def turn(students: bool) -> None:
        learner.step = 0 if students else 1
        loop()

    def limit(students: bool) -> None:
        with learner.trainer.accelerator.autocast():
            with torch.no_grad():
                for _ in range(SIMULATED if students else SIMULATED + 1):
                    student(x_t, t, case.c)
                if students:
                    critic(x_t, t, case.c)
                    case.expert.network(*pair)
            if students:
                forward_backward(student, x_t, t, case.c)
            forward_backward(critic, x_t, t, case.c)

    def theirs(students: bool) -> None:
        x_t, t = script.simulate(script.randn(case.x_0), case.text, SIMULATED)
        script.update(x_t, t, case.text, case.null, students)

    ways: dict[str, Way] = {}
    for name, students in (("student's turn", True), ("critic's turn", False)):
        for side, call in (("", turn), ("theirs, ", theirs), ("limit, ", limit)):
            ways[side + name] = lambda call=call, students=students: call(students)  # type: ignore[misc]
    return ways, max(differences), drift


def columns(part: str, times: dict[str, list[float]]) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Ours, theirs and the limit, by name."""
    if part == "buffer":
        return {name: (t, times["raw"], times["raw"]) for name, t in times.items() if name != "raw"}
    if part == "dmd2":
        found = {name: (times[name], times[f"theirs, {name}"], times[f"limit, {name}"]) for name in ("student's turn", "critic's turn")}
        mean = [[(s + (R - 1) * c) / R for s, c in zip(*both, strict=True)] for both in zip(*found.values(), strict=True)]
        return {**found, f"mean of {R}": (mean[0], mean[1], mean[2])}
    if part == "lcm":
        found = {}
        for name, steps in (("fresh", 1), ("reused", REUSE)):  # that a label serves, and that were timed at once
            limit = [own + labels / steps for own, labels in zip(times["limit"], times["labels"], strict=True)]
            found[name] = [t / steps for t in times[name]], times["theirs"], limit
        return found
    return {name: (times[name], times["theirs"], times["limit"]) for name in ("unroll", "env")}


def measure(part: str, case: Case, rounds: int, proof: str | None = None) -> list[dict[str, Any]]:
    """The lines of one part.

    Args:
        part: Of PARTS.
        case: What is timed.
        rounds: Timed rounds.
        proof: The model that shows that both sides do the same, in float32; default: the case's own.

    Raises:
        AssertionError: the two sides do not do the same.
    """
    clock = time.perf_counter if case.device.startswith("cuda") else time.process_time
    if part == "buffer":
        times, difference = buffer.timed(case.device, 4096, 256, 5 * rounds, clock), 0.0
    else:
        both = {"rollout": rollout, "lcm": lcm, "dmd2": dmd2}[part]
        # In float32, since bfloat16 would hide much; [1:] lets go of the networks before the timed ones are made.
        difference, drift = both(Case(proof or case.model, case.device, "float32", case.batch_size, compiled=False))[1:]
        gc.collect()
        torch.cuda.empty_cache()
        if not (difference <= TOLERANCE[0] and drift <= TOLERANCE[1]):
            raise AssertionError(f"{part}: ours and theirs differ by {difference:.1e} in numbers and {drift:.1e} in weights")
        ways, _, _ = both(case)
        times = timed(ways, case.device, rounds, clock)
    return [{**row(f"{part}, {name}", *each, case.device), "difference": difference} for name, each in columns(part, times).items()]


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--model", choices=MODELS, default="sd15-architecture" if on_gpu else "small")
    parser.add_argument("--dtype", choices=PRECISION, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--compile", action="store_true", help="our networks through torch.compile")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds of each part; of the buffer five times as many")
    parser.add_argument("--quick", action="store_true", help="the tiny UNet and two rounds: that it runs, not how fast")
    parser.add_argument("--out", type=Path, help="also write OUT.json and OUT.md")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if args.quick:
        args.model, args.rounds = "tiny", 2
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")

    buffer.keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 where the two sides are compared
    case = Case(args.model, args.device, dtype, args.batch_size, args.compile)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/throughput.py", *given]),
        "hardware": buffer.hardware(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": date.today().isoformat(),
        "model": args.model,
        "parameters": sum(p.numel() for p in case.stock.parameters()),
        "device": args.device,
        "dtype": dtype,
        "compile": args.compile,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "rows": [],
    }
    for part in args.parts:
        result["rows"] += measure(part, case, args.rounds)
    print(table(result))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
