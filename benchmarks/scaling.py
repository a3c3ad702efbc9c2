"""What a data-parallel run costs: forwards, bytes moved and memory, and the throughput that follows (docs/reference/scaling.md).

    python benchmarks/scaling.py [--gpus 1 8 64 256] [--peak 989e12] [--utilisation .35] [--inside 300e9] [--between 50e9]

The formulas of `forwards`, by which a run's plan is made too, are counted on toys in the tests; the throughput is arithmetic on
assumptions, and has not been measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddil_agents import DMD2Config, LCMConfig, LearnerConfig
from ddil_agents.commands.plan import forwards
from ddil_agents.states.beta import Beta
from ddil_agents.training.stages import replace_settings

BUCKET = 25e6  # bytes that DDP reduces at a time


@dataclass(frozen=True)
class Network:
    """A network: its weights, and the operations of one forward of one sample."""

    parameters: int
    flops: float


SD15 = Network(859_520_964, 803_273_441_280)  # Stable Diffusion 1.5's UNet at 64 × 64 latents


def memory(config: LearnerConfig, network: Network, teacher_bytes: int = 2, ranks: int = 1) -> dict[str, float]:
    """Bytes of each role in full fine-tuning, on one GPU; with ranks > 1 sharded over so many. No activations, no buffer.

    Weights, gradients and two momenta in float32 are 16 bytes a weight, the average 4.
    """
    roles: dict[str, float] = {"teacher": teacher_bytes, "student": 16 / ranks, "average": 4 / ranks}
    if isinstance(config, DMD2Config):
        roles["critic"] = 16 / ranks
    if ranks > 1:  # gathered whole: in rollouts the student, in the student's turn the critic, and in its own turn a network's parts
        roles["gathered"] = 8 if isinstance(config, DMD2Config) else 4
    return {role: bytes_a_weight * network.parameters for role, bytes_a_weight in roles.items()}


def moved(config: LearnerConfig, network: Network, ranks: int, sharded: bool = False) -> float:
    """Bytes that each rank sends in an update, on average, in float32 and by rings.

    An all-reduce takes 2 (W − 1)/W of its bytes, an all-gather or a reduce-scatter (W − 1)/W. Sharded, a network is gathered in forward
    and in backward and its gradients are scattered, in every part of gradient accumulation; for rollouts, and in another network's turn,
    it is gathered once.
    """
    share, size, parts = (ranks - 1) / ranks, 4 * network.parameters, config.gradient_accumulation
    dmd2 = isinstance(config, DMD2Config)
    turn = 1 / config.critic_updates if isinstance(config, DMD2Config) else 1.0
    if not sharded:
        return 2 * share * size * (turn + dmd2)
    every = 1 if isinstance(config, DMD2Config) and config.on_policy else config.updates_per_collect
    trained = 3 * parts * (turn + dmd2)
    seen = turn + (1 - turn) * parts if dmd2 else parts if isinstance(config, LCMConfig) else 0  # the critic, the student; the average
    return share * size * (trained + seen + 1 / every)


@dataclass(frozen=True)
class Cluster:
    """What the time of an update follows from.

    Attributes:
        peak: Operations a second of one GPU.
        utilisation: The share of them that networks reach, alone on a GPU.
        inside, between: Bytes a second that a GPU sends to another of its machine, and of another machine.
        machine: GPUs of one.
        latency: Seconds from one rank to the next.
    """

    peak: float = 989e12
    utilisation: float = 0.35
    inside: float = 300e9
    between: float = 50e9
    machine: int = 8
    latency: float = 10e-6


def all_reduce(network: Network, ranks: int, cluster: Cluster) -> float:
    """Seconds that the gradients of a network take: a ring's bytes, and a tree's steps for each bucket."""
    if ranks == 1:
        return 0.0
    size = 4 * network.parameters
    rate = cluster.inside if ranks <= cluster.machine else cluster.between
    steps = 2 * math.ceil(math.log2(ranks)) * math.ceil(size / BUCKET)
    return 2 * (ranks - 1) / ranks * size / rate + steps * cluster.latency


def update_seconds(
    config: LearnerConfig, network: Network, ranks: int, cluster: Cluster, *, guided: bool = False, checkpointing: bool = False
) -> dict[str, float]:
    """Seconds of an update: `compute`, and `reduce` that no backward hides. Networks are replicated (DDP)."""
    forward = network.flops / (cluster.peak * cluster.utilisation)
    counted = forwards(config, guided)
    dmd2 = isinstance(config, DMD2Config)
    turn = 1 / config.critic_updates if isinstance(config, DMD2Config) else 1.0
    reduce = 0.0
    for trained, turns in ((counted.trained_student, turn), (counted.trained_critic, float(dmd2))):
        if trained:
            backward = 2 * forward * trained / turns / config.gradient_accumulation  # of the last part, in which gradients are reduced
            reduce += turns * max(all_reduce(network, ranks, cluster) - backward, 0.0)
    return {"compute": forward * counted.work(checkpointing), "reduce": reduce}


def example() -> DMD2Config:
    """configs/dmd2/paper.yaml."""
    path = Path(__file__).parents[1] / "configs" / "dmd2" / "paper.yaml"
    own = {field.name for field in dataclasses.fields(DMD2Config)}
    settings = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key in own}
    made = replace_settings(DMD2Config(), settings)
    assert isinstance(made, DMD2Config)
    return made


def tables(gpus: list[int], cluster: Cluster) -> str:
    """The worked example of docs/reference/scaling.md, in Markdown: the preset, and the same on student states alone."""
    config = example()
    lines = ["| forwards an update, of one process | teacher | student | critic |", "|---|---|---|---|"]
    counted = forwards(config, guided=True)
    own = (counted.student + counted.trained_student, counted.critic + counted.trained_critic)
    lines.append(f"| R = {config.critic_updates}, b = {config.batch_size} | {counted.teacher:.1f} | {own[0]:.1f} | {own[1]:.1f} |")
    lines += ["", "| memory, GB | teacher | student | critic | average | gathered | sum |", "|---|---|---|---|---|---|---|"]
    for name, ranks in (("replicated", 1), ("sharded over 8", 8)):
        roles = {role: size / 1e9 for role, size in memory(config, SD15, ranks=ranks).items()}
        each = [f"{roles.get(role, 0):.1f}" for role in ("teacher", "student", "critic", "average", "gathered")]
        lines.append(f"| {name} | {' | '.join(each)} | {sum(roles.values()):.1f} |")
    lines += ["", "| GPUs | GB sent an update | compute | reduce | samples a second | of linear |", "|---|---|---|---|---|---|"]
    for title, arm in (("", config), (" *", dataclasses.replace(config, beta=Beta(0.0, 0.0, 1.0)))):
        alone = 0.0
        for ranks in gpus:
            spent = update_seconds(arm, SD15, ranks, cluster, guided=True)
            rate = ranks * arm.batch_size / sum(spent.values())
            alone = alone or rate / ranks
            seconds = " | ".join(f"{1e3 * spent[part]:.0f} ms" for part in ("compute", "reduce"))
            lines.append(f"| {ranks}{title} | {moved(arm, SD15, ranks) / 1e9:.1f} | {seconds} | {rate:.0f} | {rate / ranks / alone:.0%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 256])
    for field in dataclasses.fields(Cluster):
        default: Any = field.default
        parser.add_argument(f"--{field.name}", type=type(default), default=default)
    arguments = vars(parser.parse_args(argv))
    print(tables(arguments.pop("gpus"), Cluster(**arguments)))


if __name__ == "__main__":
    main()
