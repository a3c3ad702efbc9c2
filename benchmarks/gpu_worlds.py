"""Parts a and e of `gpu.py` in worlds, in which a student's samples decide its next conditions."""

from __future__ import annotations

import importlib.util
import statistics
import time
from functools import partial
from typing import Any

import torch
from gpu_checks import HostDraws, check_learner, count_waits, settings
from gpu_report import Part
from throughput import apart

from ddil_agents import DMD2, Dagger
from ddil_agents.states.episodes import visit_states
from ddil_env import Expert, load_expert

WORLDS = ("fork", "kuramoto", "lunar_lander")
OWN: dict[str, Any] = {"guidance_scale": None, "guidance_range": None}  # their experts have no null condition
LIMIT = 1e-4  # as of a denoising; frames are few, so that what a world makes of rounding stays small


def to_be_had(part: Part) -> list[str]:
    """The worlds whose packages are here; the others are written down."""
    missing = [] if importlib.util.find_spec("Box2D") else ["lunar_lander"]
    for name in missing:
        part.add(name, left_out="box2d is not installed here")
    return [name for name in WORLDS if name not in missing]


def open_expert(name: str, device: str, num_frames: int) -> Expert:
    """A world's expert, whose episodes last so many frames at most."""
    expert = load_expert(name, device=device)
    expert.make_world = partial(expert.make_world, num_frames=num_frames)  # type: ignore[method-assign]
    return expert


def check_episodes(part: Part, name: str, expert: Expert, reference: Expert) -> None:
    """States that the same episodes visit on both devices, half of the denoisings by the expert."""
    found = []
    for each in (reference, expert):
        with HostDraws(), torch.no_grad():
            collector = Dagger(each, settings(Dagger, num_worlds=4, **OWN)).collector
            assert collector.world is not None
            found.append(visit_states(collector, collector.world, p_expert=0.5))
    same = len(found[0]) == len(found[1])
    differences = {key: apart(found[1][key].cpu(), found[0][key]) if same else float("inf") for key in ("x_t", "c")}
    within = max(differences.values()) <= LIMIT
    part.add(f"episodes, {name}", states=differences["x_t"], conditions=differences["c"], within="yes" if within else "no")
    assert within, f"episodes of {name} differ: {[len(states) for states in found]} states, {differences}"


def correctness(part: Part, updates: int) -> None:
    """Of part a."""
    for name in to_be_had(part):
        experts = [open_expert(name, device, 3 if part.dry else 12) for device in (part.device, "cpu")]
        with part.attempt(f"episodes, {name}"):
            check_episodes(part, name, *experts)
        for agent in (Dagger, DMD2):
            own = {**OWN, "num_worlds": 4}
            if part.on_gpu:
                with part.attempt(f"waits, {agent.name}, {name}"):
                    count_waits(part, agent, name, experts[0], **own)
            with part.attempt(f"{agent.name}, {name}"):
                check_learner(part, agent, name, *experts, updates, [False], **own)


def rollouts(part: Part) -> None:
    """Of part e: whole episodes of a student, whose policy is on the device; the simulators of lunar landers are on the host."""
    num_worlds, frames, rounds = (4, 3, 1) if part.dry else (256, 30, 3)
    for name in to_be_had(part):
        with part.attempt(f"episodes, {name}"):
            learner = Dagger(open_expert(name, part.device, frames), settings(Dagger, num_worlds=num_worlds, **OWN))
            collector, times, samples = learner.collector, [], 0
            assert collector.world is not None
            for _ in range(rounds + 1):  # the first fills caches
                if part.on_gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.no_grad():
                    samples = len(visit_states(collector, collector.world, p_expert=0.0))
                if part.on_gpu:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[1:])
            steps = samples * learner.grid.num_steps
            part.add(
                f"episodes, {name}, {num_worlds} worlds", ms=1e3 * seconds, samples_per_s=samples / seconds, steps_per_s=steps / seconds
            )
