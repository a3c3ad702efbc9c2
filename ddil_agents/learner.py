"""What every agent shares, its student and what that is judged against; and what every learner does, in a gradient step.

A new learner is one file: a config, a class with `loss`, and a `main`.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from tqdm import tqdm

from ddil_agents.agent import Agent
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import out_of_memory, ranks, sharding
from ddil_agents.states.buffer import SourceBuffer
from ddil_agents.states.collect import Collector, own_seed, stream_seed
from ddil_agents.training.average import Average
from ddil_agents.training.checkpoint import load_checkpoint, save_checkpoint
from ddil_agents.training.loop import train
from ddil_agents.training.trainable import Loss, Trainable
from ddil_env import Expert, ExpertPolicy, NetworkDenoiser, StudentPolicy, Support, TimeGrid, Unbounded, unroll
from ddil_env.support import Metered, Role, build_support, support_to_dict


class Learner(Agent):
    """A student, and how it learns from an expert.

    Args:
        expert: An Expert, or the name of a preset.
        config: This learner's config; default: its defaults.
        support: Where estimates are projected, as an earlier run calibrated it; default: as the config says.

    Raises:
        ValueError: what the expert, the grid or the student refuse.
    """

    Config: ClassVar[type[LearnerConfig]] = LearnerConfig
    config: LearnerConfig
    support: Support
    roles: ClassVar[tuple[Role, ...]] = ("teacher", "target", "student")  # whose estimates there are to threshold
    ema_warm_up: ClassVar[bool] = True

    def __init__(self, expert: Expert | str, config: LearnerConfig | None = None, support: Support | None = None) -> None:
        super().__init__(expert, config)
        config = self.config
        if config.stages:
            raise ValueError(
                "a learner trains one stage; iterate over ddil_agents.training.stages.learners(agent, expert, plan(config)), "
                "or use the command"
            )
        if config.mixed_precision == "fp16" and self.expert.device.type == "cpu":
            raise ValueError("mixed_precision=fp16 scales its losses on a GPU alone; on a CPU use bf16 or no")
        if config.mixed_precision == "fp16" and sharding.asked():
            raise ValueError("mixed_precision=fp16 scales losses by what one rank sees; where networks are sharded use bf16 or no")
        if config.halve_batch_on_oom and ranks.world() > 1:
            raise ValueError(
                f"halve_batch_on_oom=true: {ranks.world()} processes cut their batches alike, and memory ends on one of them alone; "
                "leave it out and raise gradient_accumulation"
            )
        if (config.lora is not None or config.optimizer == "adamw8bit") and sharding.asked():
            raise ValueError(
                f"lora={config.lora}, optimizer={config.optimizer}: what is sharded are whole networks, with torch's AdamW; set lora "
                "to null and optimizer to adamw, or replicate, as configs/accelerate/8gpu.yaml does: with LoRA little is left to shard"
            )
        if strange := [role for role in config.thresholding.roles if role not in self.roles]:
            raise ValueError(
                f"thresholding.roles={config.thresholding.roles}: {self.name} has no {strange[0]}; it has {', '.join(self.roles)}"
            )
        if config.guidance_range is not None:
            low, high = map(self.expert.check_guidance, config.guidance_range)
            if not low <= self.reference.guidance_scale <= high:
                raise ValueError(
                    f"the expert's guidance_scale={self.reference.guidance_scale:g} lies outside guidance_range={config.guidance_range}; "
                    "set guidance_scale to one inside, at which the student is judged"
                )
        student = self.initial_student()
        before = self.expert.nfe
        self.support = build_support(config.thresholding, self.expert, self._sample_teacher) if support is None else support
        roles = config.thresholding.roles
        if "student" in roles and not {"teacher", "target"} & {*roles} and not isinstance(self.support, Unbounded):
            warnings.warn(
                f"thresholding.roles={roles}: the student is brought onto the support, and what it learns from is not; where that lies "
                "outside, the student's estimates are driven outward for ever; add teacher",
                stacklevel=2,
            )
        self.thresholds = {role: Metered(self.support) if role in roles else Unbounded() for role in self.roles}
        self.ema = Average(student, config.ema, self.ema_warm_up)
        self.ema.module.eval()
        if config.compile:
            self.expert.compile()
            self.average.network.compile()
        self.horizon, self.gradient_accumulation = config.num_updates, config.gradient_accumulation
        self.accelerator = ranks.join(config.mixed_precision, self.expert.device)
        sharding.shard(self.average, self.expert.device)
        if not ranks.is_main():
            torch.manual_seed(own_seed(config.seed, "dropout"))  # the main rank's is the caller's, as in a single process
        self.trainables = {"student": self.trainable("student", student, config.learning_rate)}
        self.expert_policy = self.labeller()
        self.student_policy = self._judged_policy()
        self.collector = self.make_collector(self.policy(self.trainables["student"].bare, self.thresholds["student"]))
        self.collect_size, self.collect_every = self.collection()
        self.buffer = SourceBuffer(self.capacities(), self.expert.device, config.prioritised, seed=own_seed(config.seed, "source"))
        self.teacher_nfe = self.expert.nfe - before  # of a calibration on the teacher's samples

    # What a new method may change.

    @abstractmethod
    def loss(self, batch: TensorDict) -> Tensor:
        """The loss of each state of the batch, (b,)."""

    def labeller(self) -> ExpertPolicy:
        """The expert as it labels states and unrolls the teacher."""
        return ExpertPolicy(self.expert, self.config.substeps, self.config.guidance_scale, support=self.thresholds["teacher"])

    def make_collector(
        self, student_policy: StudentPolicy, kind: type[Collector] = Collector, grid: TimeGrid | None = None, **own: Any
    ) -> Collector:
        """Where the states come from: `kind`, over the times of `grid` (default: the student's), with settings of its own."""
        c = self.config
        own |= {"kernel": self.kernel, "p_expert": c.p_expert, "guidance_range": c.guidance_range}
        own |= {"states_per_rollout": c.states_per_rollout}
        return kind(self.expert_policy, student_policy, self.grid if grid is None else grid, c.seed, **own)

    def collect(self) -> TensorDict:
        """Adds freshly labelled states to the buffer, and returns them."""
        if len(states := self.fresh_states()):
            self.buffer.extend(states)
        return states

    def collection(self) -> tuple[int, int]:
        """States of a collection, and the updates from one to the next."""
        return self.config.collect_size, self.config.updates_per_collect

    def capacities(self) -> list[int]:
        """States of each source that the buffer holds; of one that is never collected 1, the least that there can be."""
        c = self.config
        capacity = c.capacity or -(-c.num_updates // self.collect_every) * (self.collect_size + max(c.units))
        shares = [max(share) for share in zip(*(c.beta(i / 100) for i in range(101)), strict=True)]  # over the run
        held = [capacity if share > 0 else 1 for share in shares]
        if c.capacity is not None and c.student_collections is not None and shares[2] > 0:
            held[2] = min(held[2], c.student_collections * max(math.ceil(self.collect_size * shares[2]), c.units[2]))
        return held

    def draw(self) -> TensorDict:
        """The batch of the next update: s ~ Σᵢ βᵢ ρᵢ (DDIL Alg. 1)."""
        return self.buffer.sample(self.config.batch_size, self.beta())

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """One gradient step; what it measured, on the device: `loss` of each state (b,), `grad_norm` and any other scalars."""
        losses, norm = self.minimise("student", self.loss, self.parts(batch))
        self.ema.update_parameters(self.trainables["student"].bare)
        self.step += 1
        return {"loss": losses, "grad_norm": norm}

    def turns(self, network: str, updates: int) -> int:
        """Gradient steps that a network takes in so many updates."""
        return updates

    # What every method shares.

    def trainable(self, name: str, network: nn.Module, learning_rate: float) -> Trainable:
        """An optimiser for the network of that name, which warms up and ends in its own turns."""
        horizon, warmup = (self.turns(name, updates) for updates in (self.horizon, self.config.warmup_updates))
        return Trainable(network, self.config, self.accelerator, learning_rate, horizon, warmup)

    def policy(self, student: NetworkDenoiser, support: Support | None) -> StudentPolicy:
        """A student of this learner as a policy; one with a guidance embedding is told the guidance that it is judged at."""
        w = None if self.config.guidance_range is None else self.reference.guidance_scale
        return StudentPolicy(student, self.expert, support, w)

    def fresh_states(self) -> TensorDict:
        """Labelled states of the present β; counts the expert forwards that they take."""
        before = self.expert.nfe
        cure = "lower collect_size, or batch_size where each update collects its own; of a pipeline's expert also max_batch"
        with sharding.gathered(self.trainables["student"].bare), out_of_memory.named(f"while collecting {self.collect_size} states", cure):
            states = self.collector.collect(self.collect_size, self.beta(), self.step)
        self.teacher_nfe += self.expert.nfe - before
        return states

    def parts(self, batch: TensorDict) -> list[TensorDict]:
        """The batch as gradient accumulation takes it."""
        return list(batch.chunk(self.gradient_accumulation))

    def minimise(self, network: str, loss: Loss, parts: list[TensorDict]) -> tuple[Tensor, Tensor]:
        """One gradient step of a network.

        Where memory runs out and `halve_batch_on_oom` is set, it is begun again from the same draws with each part cut in two.

        Args:
            network: Of `trainables`.
            loss: The loss of each state of a part, (b,).
            parts: The batch, cut up; in place if it is cut anew.

        Returns:
            The loss of each state (b,) and the gradient's norm before clipping, both on the device.

        Raises:
            MemoryError: out of memory, and the parts may not be cut, or are of one state each.
        """
        size, config = max(map(len, parts)), self.config
        halves = config.halve_batch_on_oom and size > 1
        generators = [torch.default_generator, *torch.cuda.default_generators, *self.collector.streams.values()] if halves else []
        draws = [(generator, generator.get_state()) for generator in generators]
        doing = f"at step {self.step + 1}, in the gradient of {size} of batch_size={config.batch_size} states at a time"
        cure = f"lower batch_size, raise gradient_accumulation={self.gradient_accumulation}, or set halve_batch_on_oom"
        try:
            with out_of_memory.named(doing, cure if size > 1 else "no fewer go; free memory, or make the student smaller"):
                losses = self.trainables[network].accumulate(loss, parts)
        except MemoryError:
            if not halves:
                raise
        else:
            return losses, self.trainables[network].step()
        # From here on the error is gone, and with it the activations that its frames held.
        torch.cuda.empty_cache()
        for generator, state in draws:
            generator.set_state(state)
        parts[:] = [half for part in parts for half in part.chunk(2)]
        self.gradient_accumulation *= 2
        tqdm.write(f"out of memory {doing}; from here on gradient_accumulation is {self.gradient_accumulation}", file=sys.stderr)
        return self.minimise(network, loss, parts)

    def _sample_teacher(self, n: int) -> Tensor:
        """n samples of the teacher, for calibration where there are no data."""
        generator = torch.Generator(self.expert.device).manual_seed(stream_seed(self.config.seed, "calibration"))
        x_T = torch.randn(n, *self.expert.sample_shape, generator=generator, device=self.expert.device)
        return unroll(self.reference, self.grid, x_T, self.expert.sample_condition(n, generator))[:, -1]

    def start_from(self, student: NetworkDenoiser) -> None:
        """Takes another student's weights; a guidance embedding that the other lacks stays at zero.

        Raises:
            ValueError: the other is of another architecture.
        """
        own = self.trainables["student"].bare
        try:
            missing, strange = own.load_state_dict(sharding.like(student.state_dict(), own.state_dict()), strict=False)
        except RuntimeError as error:
            raise ValueError(f"the student cannot start from the last one's weights: {error}") from error
        embedding = len(missing) == 1 and self.config.guidance_range is not None and not student.guidance_embedding
        if strange or (missing and not embedding):
            raise ValueError(f"the student cannot start from the last one's weights: {[*missing, *strange][0]!r} is in one of them alone")
        self.average.load_state_dict(own.state_dict())

    @property
    def student(self) -> NetworkDenoiser:
        """The student in training, as a loss calls it."""
        return cast(NetworkDenoiser, self.trainables["student"].network)

    @property
    def average(self) -> NetworkDenoiser:
        """The averaged student: the one that is evaluated and saved."""
        return cast(NetworkDenoiser, self.ema.module)

    def beta(self) -> tuple[float, float, float]:
        """β at the present step."""
        return self.config.beta(self.step / self.horizon)

    def clipped(self) -> dict[str, Tensor]:
        """The fraction of entries that thresholding has moved since the last call, by role; NaN where it met none."""
        meters = {role: support for role, support in self.thresholds.items() if isinstance(support, Metered)}
        counts = [meter.take_counts().to(self.expert.device) for meter in meters.values()]  # (2,) each; one that met nothing is on the CPU
        shares = [moved / seen for moved, seen in ranks.total(torch.stack(counts))] if counts else []
        return dict(zip(meters, shares, strict=True))

    def extend(self, num_updates: int) -> None:
        if self.config.capacity is None and self.step + num_updates > self.config.num_updates:
            raise ValueError(
                f"{self.step} + {num_updates} gradient steps: capacity=null keeps every state of num_updates={self.config.num_updates}; "
                "build the learner with as many as it shall take in all"
            )
        self.horizon = self.step + num_updates
        for name, trainable in self.trainables.items():
            trainable.extend_to(self.turns(name, self.horizon))

    def train(self, out: Path | None = None, **options: Any) -> None:
        if sharding.asked() and not sharding.is_sharded(self.average):
            raise ValueError("a sharded learner trains once: its average has been brought together; load its checkpoint into a new one")
        self.expert.release()
        train(self, out, **options)
        self.unshard()

    def unshard(self) -> None:
        """Brings a sharded average together on every rank, which can then use it without the others."""
        if sharding.is_sharded(self.average):
            average = self._seeded_student()
            average.load_state_dict(sharding.whole(self.average.state_dict()))
            self.ema.module = average.eval()
            self.student_policy = self._judged_policy()

    def _judged_policy(self) -> StudentPolicy:
        return self.policy(self.average, self.support if "student" in self.config.thresholding.roles else None)

    def save(self, directory: str | Path) -> Path:
        """Writes config, student and everything that a resumed run needs into the directory, atomically."""
        return save_checkpoint(self, Path(directory))

    def load(self, directory: str | Path) -> Self:
        """Reads what `save` wrote, into a learner of the same config; the next gradient steps are those of the saved one.

        Sets torch's global generator too, which a student with dropout draws from.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of another config.
        """
        load_checkpoint(self, Path(directory))
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that the next gradient steps depend on, in tensors and plain values; `checkpoint.OWN` of it differs by process."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "horizon": self.horizon,
            "gradient_accumulation": self.gradient_accumulation,
            "trainables": {name: trainable.state_dict() for name, trainable in self.trainables.items()},
            "ema": sharding.whole(self.ema.state_dict(), ranks.is_main()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "buffer": self.buffer.state_dict(),
            "collector": self.collector.state_dict(),
            "support": self._calibration(),
            "nfe": {"teacher": self.teacher_nfe, "student": self.student_nfe},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.expert.device) if self.expert.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: the support was calibrated otherwise.
        """
        if state["support"] != self._calibration():
            raise ValueError("the saved learner's support was calibrated on other samples; pass it as support= (support.json of its run)")
        self.step, self.horizon = state["step"], state["horizon"]
        self.gradient_accumulation = state["gradient_accumulation"]
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state["trainables"][name])
        self.ema.load_state_dict(sharding.like(state["ema"], self.ema.state_dict()))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.buffer.load_state_dict(state["buffer"])
        self.collector.load_state_dict(state["collector"])
        self.teacher_nfe = state["nfe"]["teacher"]
        self.trainables["student"].bare.nfe += state["nfe"]["student"] - self.student_nfe  # which counts other networks too
        torch.set_rng_state(state["random"].cpu())
        if (random := state.get("random_cuda")) is not None and self.expert.device.type == "cuda":
            torch.cuda.set_rng_state(random.cpu(), self.expert.device)

    def _calibration(self) -> dict[str, Any] | None:
        return support_to_dict(self.support) if self.config.thresholding.kind == "quantile" else None

    @property
    def student_nfe(self) -> int:
        """Student forwards so far, training and rollouts together, with those of networks beside it (LCM's target, DMD2's critic)."""
        return int(self.trainables["student"].bare.nfe)
