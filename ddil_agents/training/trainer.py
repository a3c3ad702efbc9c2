"""How any algorithm is trained: collect states, draw a batch, take the gradient steps that are due, and tell the callbacks.

algorithm    which states, labels, networks and losses
trainer      optimisers, averaged weights, precision, gradient accumulation, memory, processes, checkpoints
callbacks    metrics, progress bar, checkpoint files, evaluation, and those of the user
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from ddil_agents.devices import out_of_memory, ranks, sharding
from ddil_agents.states.batch import Batch
from ddil_agents.states.collect import own_seed
from ddil_agents.training.average import Average
from ddil_agents.training.callbacks import Callback, CheckpointCallback, ProgressBarCallback, Stopwatch
from ddil_agents.training.checkpoint import save_checkpoint
from ddil_agents.training.metrics import MetricsCallback, RunFiles
from ddil_agents.training.tracking import Tracker
from ddil_agents.training.trainable import Loss, Trainable
from ddil_env import NetworkDenoiser

if TYPE_CHECKING:
    from ddil_agents.algorithm import Algorithm
    from ddil_agents.config import LearnerConfig


@dataclass(frozen=True)
class GradientStep:
    """One network's gradient step in an update.

    Attributes:
        network: Its key in the algorithm's `networks`.
        loss: The loss of each state of a batch, (b,); its mean is minimised.
        learning_rate: AdamW's, after warm-up.
        every: It is taken in each `every`-th update, from the first on.
        frozen: Networks that gradient flows through and that stay as they are: those of other steps that this loss calls.
    """

    network: str
    loss: Callable[[Batch], Tensor]
    learning_rate: float
    every: int = 1
    frozen: tuple[str, ...] = ()

    def count(self, updates: int) -> int:
        """How many such steps there are in so many updates."""
        return -(-updates // self.every)


class Trainer:
    """Takes an algorithm's gradient steps, and does all around them that is the same for every algorithm.

    Args:
        algorithm: With its config and networks; its `gradient_steps` say which network learns on which loss.

    Attributes:
        trainables: Optimiser, schedule and wrapper of each network, by name.
        ema: The averaged student.
        clock: Seconds of training.
        gradient_accumulation: Parts that a batch is cut into; doubled where memory ran out and the config allows it.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        config, expert = algorithm.config, algorithm.expert
        self.gradient_accumulation = config.gradient_accumulation
        self.ema = Average(algorithm.networks["student"], config.ema, algorithm.ema_warm_up)
        self.ema.module.eval()
        if config.compile:
            expert.compile()
            cast(NetworkDenoiser, self.ema.module).network.compile()
        self.accelerator = ranks.join(config.mixed_precision, expert.device)
        sharding.shard(self.ema.module, expert.device)
        if not ranks.is_main():
            torch.manual_seed(own_seed(config.seed, "dropout"))  # the main rank's is the caller's, as in a single process
        self.trainables = {
            step.network: Trainable(
                algorithm.networks[step.network],
                config,
                self.accelerator,
                step.learning_rate,
                step.count(config.num_updates),
                step.count(config.warmup_updates),
            )
            for step in algorithm.gradient_steps()
        }
        self.clock = Stopwatch()
        self.metrics = MetricsCallback()
        self.callbacks: list[Callback] = []
        self._callback_states: dict[str, Any] = {}  # of the checkpoint that was loaded

    def train(
        self,
        out: Path | None = None,
        *,
        progress: bool = True,
        checkpoint_every: int = 500,
        log_every: int = 10,
        track: Tracker = "none",
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Trains until the algorithm's `total_updates`, from whatever step it has reached.

        Args:
            out: Run directory; None writes nothing.
            progress: Whether to show a bar.
            checkpoint_every: Updates between checkpoints.
            log_every: Updates that one line of metrics sums up.
            track: A live page to send the lines to, besides.
            callbacks: More of them.

        Raises:
            FloatingPointError: the loss is not finite; names the step and the sources.
        """
        if sharding.asked() and not sharding.is_sharded(self.ema.module):
            raise ValueError("a sharded learner trains once: its average has been brought together; load its checkpoint into a new one")
        algorithm = self.algorithm
        algorithm.expert.release()
        self.metrics = MetricsCallback(log_every)
        own: list[Callback] = [RunFiles(self.clock, track), self.metrics, *([ProgressBarCallback()] if progress else [])]
        self.callbacks = [*own, *callbacks, CheckpointCallback(checkpoint_every)]  # last: what it saves, the others have seen
        try:
            for callback in self.callbacks:
                callback.on_start(algorithm, out)
            for name, callback in self._named_callbacks():
                if name in self._callback_states:
                    callback.load_state_dict(self._callback_states[name])
            self._run()
            for callback in self.callbacks:
                callback.on_end(algorithm)
        except BaseException:
            for callback in self.callbacks:
                with suppress(Exception):  # the first error is the one to tell
                    callback.close()
            raise
        for callback in self.callbacks:
            callback.close()
        self.callbacks = []
        self.unshard()

    def _run(self) -> None:
        algorithm = self.algorithm
        while algorithm.step < algorithm.total_updates:
            if algorithm.step % algorithm.collect_every == 0:
                states = self.collect()
                for callback in self.callbacks:
                    callback.on_collect(algorithm, states)
            batch = algorithm.draw()  # s ~ Σᵢ βᵢ ρᵢ, DDIL Alg. 1
            measured = self.update(batch)  # L_Distill, DDIL Eq. 2
            self.metrics.add(batch, measured)
            if algorithm.config.prioritised:
                self.metrics.check(algorithm)  # a priority is a loss, and the buffer would name neither step nor source
                algorithm.buffer.update_priority(batch["index"], measured["loss"])
            for callback in self.callbacks:
                if callback.on_update(algorithm, Batch(batch), measured) is False:
                    algorithm.total_updates = algorithm.step

    def collect(self) -> TensorDict:
        """The algorithm's next collection; counts the expert forwards that it takes."""
        algorithm, before = self.algorithm, self.algorithm.expert.nfe
        cure = "lower collect_size, or batch_size where each update collects its own; of a pipeline's expert also max_batch"
        doing = f"while collecting {algorithm.collect_size} states"
        with sharding.gathered(algorithm.networks["student"]), out_of_memory.named(doing, cure):
            states = algorithm.collect()
        algorithm.teacher_nfe += algorithm.expert.nfe - before
        return states

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """One update: the gradient steps that are due, on the same states.

        Returns:
            On the device: `loss` of each state (b,) and `grad_norm` of the student's step, `critic_loss` and `critic_grad_norm` of a
            network named critic.
        """
        algorithm, before, parts = self.algorithm, self.algorithm.expert.nfe, self.split(batch)
        measured: dict[str, Tensor] = {}
        for step in algorithm.gradient_steps():
            if algorithm.step % step.every:
                continue
            prefix = "" if step.network == "student" else f"{step.network}_"
            with ExitStack() as stack:
                for name in step.frozen:
                    stack.enter_context(self.trainables[name].frozen())
                losses, norm = self.minimise(step.network, step.loss, parts)
            measured |= {f"{prefix}loss": losses, f"{prefix}grad_norm": norm}
            if step.network == "student":
                self.ema.update_parameters(algorithm.networks["student"])
        algorithm.step += 1
        algorithm.teacher_nfe += algorithm.expert.nfe - before
        return measured

    def split(self, batch: TensorDict) -> list[TensorDict]:
        """The batch in the parts that gradient accumulation takes it in."""
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
        size, config = max(map(len, parts)), self.algorithm.config
        halves = config.halve_batch_on_oom and size > 1
        streams = self.algorithm.collector.streams.values()
        generators = [torch.default_generator, *torch.cuda.default_generators, *streams] if halves else []
        draws = [(generator, generator.get_state()) for generator in generators]
        doing = f"at step {self.algorithm.step + 1}, in the gradient of {size} of batch_size={config.batch_size} states at a time"
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

    def extend_to(self, total_updates: int) -> None:
        """Moves the end of training to that step; learning rates run their course over what is then the whole.

        Raises:
            ValueError: the buffer keeps every state (`capacity` null) and has no room for so many.
        """
        algorithm = self.algorithm
        if algorithm.config.capacity is None and total_updates > algorithm.config.num_updates:
            raise ValueError(
                f"{algorithm.step} + {total_updates - algorithm.step} gradient steps: capacity=null keeps every state of "
                f"num_updates={algorithm.config.num_updates}; build the learner with as many as it shall take in all"
            )
        algorithm.total_updates = total_updates
        for step in algorithm.gradient_steps():
            self.trainables[step.network].extend_to(step.count(total_updates))

    def unshard(self) -> None:
        """Brings a sharded average together on every rank, which can then use it without the others."""
        if sharding.is_sharded(self.ema.module):
            average = self.algorithm.seeded_student()
            average.load_state_dict(sharding.whole(self.ema.module.state_dict()))
            self.ema.module = average.eval()
            self.algorithm.update_student_policy()

    def save_checkpoint(self, directory: Path) -> None:
        """Writes the lines of metrics up to here and then a checkpoint below the directory."""
        self.metrics.flush(self.algorithm)  # refuses a loss that is not finite: no such state is saved
        path = save_checkpoint(self.algorithm, directory)
        for callback in self.callbacks:
            callback.on_checkpoint(self.algorithm, path)

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        """The callbacks by names that a resumed run finds again, whether or not it shows a bar."""
        names = [type(callback).__qualname__ for callback in self.callbacks]
        return [(f"{name} {names[:i].count(name)}", callback) for i, (name, callback) in enumerate(zip(names, self.callbacks, strict=True))]

    def state_dict(self) -> dict[str, Any]:
        """All that the next gradient steps depend on, in tensors and plain values; `checkpoint.OWN` of it differs by process."""
        algorithm, scaler, device = self.algorithm, self.accelerator.scaler, self.algorithm.expert.device
        return {
            "step": algorithm.step,
            "horizon": algorithm.total_updates,
            "gradient_accumulation": self.gradient_accumulation,
            "trainables": {name: trainable.state_dict() for name, trainable in self.trainables.items()},
            "ema": sharding.whole(self.ema.state_dict(), ranks.is_main()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "nfe": {"teacher": algorithm.teacher_nfe, "student": algorithm.student_nfe},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "callbacks": {name: state for name, callback in self._named_callbacks() if (state := callback.state_dict())},
            **algorithm.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: the algorithm was calibrated otherwise.
        """
        algorithm = self.algorithm
        algorithm.load_state_dict(state)
        algorithm.step, algorithm.total_updates = state["step"], state["horizon"]
        self.gradient_accumulation = state["gradient_accumulation"]
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state["trainables"][name])
        self.ema.load_state_dict(sharding.like(state["ema"], self.ema.state_dict()))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        algorithm.teacher_nfe = state["nfe"]["teacher"]
        student = cast(NetworkDenoiser, algorithm.networks["student"])
        student.nfe += state["nfe"]["student"] - algorithm.student_nfe  # which counts other networks too
        torch.set_rng_state(state["random"].cpu())
        if (random := state.get("random_cuda")) is not None and algorithm.expert.device.type == "cuda":
            torch.cuda.set_rng_state(random.cpu(), algorithm.expert.device)
        self._callback_states = state.get("callbacks", {})


def check_settings(config: LearnerConfig, device: torch.device) -> None:
    """Refuses settings that do not fit the device, or one another on several processes.

    Raises:
        ValueError: so.
    """
    if config.mixed_precision == "fp16" and device.type == "cpu":
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
