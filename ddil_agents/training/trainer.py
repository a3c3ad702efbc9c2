"""The training loop of every algorithm: collect states, draw a batch, take the gradient steps, call the callbacks.

algorithm    says which states, labels, networks and losses
trainer      handles optimisers, averaged weights, precision, gradient accumulation, memory, processes and checkpoints
callbacks    handle metrics, progress bar, checkpoint files, evaluation, and what the user adds
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
from ddil_agents.states.collect import rank_stream_seed
from ddil_agents.training.alignment import align_gradients
from ddil_agents.training.callbacks import Callback, CheckpointCallback, ProgressBarCallback, Stopwatch
from ddil_agents.training.checkpoint import save_checkpoint
from ddil_agents.training.ema import EMAModel
from ddil_agents.training.metrics import MetricsCallback, RunFiles
from ddil_agents.training.tracking import Tracker
from ddil_agents.training.trainable import Loss, Trainable
from ddil_env import NetworkDenoiser

if TYPE_CHECKING:
    from ddil_agents.algorithm import Algorithm


@dataclass(frozen=True)
class GradientStep:
    """One network's gradient step in an update.

    Attributes:
        network: Key of the network in the algorithm's `networks`.
        loss: Returns the loss of each state of a batch, (b,); the step minimises its mean.
        learning_rate: Learning rate of AdamW after the warm-up.
        every: The step is taken in every `every`-th update, from the first on.
        frozen: Other networks that the loss calls, which get no gradient in this step.
    """

    network: str
    loss: Callable[[Batch], Tensor]
    learning_rate: float
    every: int = 1
    frozen: tuple[str, ...] = ()

    def count(self, updates: int) -> int:
        """Number of these steps in a number of updates."""
        return -(-updates // self.every)


class Trainer:
    """Trains an algorithm.

    Args:
        algorithm: An algorithm with its config and networks; its `gradient_steps` say which network minimises which loss.

    Attributes:
        trainables: Each network with its optimiser, by name.
        ema: The moving average of the student's weights.
        clock: Measures the seconds of training.
        gradient_accumulation: Number of parts of a batch; doubled when memory runs out and the config allows it.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        config, expert = algorithm.config, algorithm.expert
        self.gradient_accumulation = config.gradient_accumulation
        self.ema = EMAModel(algorithm.networks["student"], config.ema, algorithm.ema_warm_up)
        self.ema.module.eval()
        if config.compile:
            expert.compile()
            cast(NetworkDenoiser, self.ema.module).network.compile()
        self.accelerator = ranks.make_accelerator(config.mixed_precision, expert.device)
        sharding.shard(self.ema.module, expert.device)
        if not ranks.is_main():
            torch.manual_seed(rank_stream_seed(config.seed, "dropout"))  # the main rank keeps the caller's state, as a single process does
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
        self._callback_states: dict[str, Any] = {}  # from the checkpoint that was loaded

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
        """Trains from the algorithm's current step to its `total_updates`.

        Args:
            out: Run directory; None writes no files.
            progress: Whether to show a progress bar.
            checkpoint_every: Number of updates between two checkpoints.
            log_every: Number of updates in a line of metrics.
            track: Experiment tracker to send the metrics to.
            callbacks: Callbacks in addition to the trainer's own.

        Raises:
            FloatingPointError: the loss is not finite; the message names the update and the sources of its states.
        """
        if sharding.is_requested() and not sharding.is_sharded(self.ema.module):
            raise ValueError(
                "a sharded agent trains only once, because its average is gathered at the end; load its checkpoint into a new agent"
            )
        algorithm = self.algorithm
        algorithm.expert.release()
        self.metrics = MetricsCallback(log_every)
        first: list[Callback] = [RunFiles(self.clock, track), self.metrics, *([ProgressBarCallback()] if progress else [])]
        self.callbacks = [*first, *callbacks, CheckpointCallback(checkpoint_every)]  # the others see an update before it is saved
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
                with suppress(Exception):  # raise the first error, not those of closing
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
            if algorithm.config.prioritised and "loss" in measured:  # the student may take its step in every k-th update only
                self.metrics.check_finite(algorithm)  # this error names the update and the sources, the buffer's would not
                algorithm.buffer.update_priority(batch["index"], measured["loss"])
            for callback in self.callbacks:
                if callback.on_update(algorithm, Batch(batch), measured) is False:
                    algorithm.total_updates = algorithm.step

    def collect(self) -> TensorDict:
        """Collects states and counts the teacher forwards; returns the states.

        Raises:
            MemoryError: memory ran out.
        """
        algorithm, before = self.algorithm, self.algorithm.expert.nfe
        cure = "lower collect_size, or batch_size where each update collects its own; of a pipeline's expert also max_batch"
        doing = f"while collecting {algorithm.collect_size} states"
        with sharding.unsharded(algorithm.networks["student"]), out_of_memory.explain(doing, cure):
            states = algorithm.collect()
        algorithm.teacher_nfe += algorithm.expert.nfe - before
        if algorithm.adaptive_shares is not None and len(states):
            algorithm.adaptive_shares.update(align_gradients(algorithm, states), algorithm.step, algorithm.total_updates)
        return states

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Takes the gradient steps of one update, all on the same states.

        Returns:
            Tensors on the device: `loss` of each state (b,) and `grad_norm` of the student's step; for another network, such as one named
            critic, `critic_loss` and `critic_grad_norm`.
        """
        algorithm, before, parts = self.algorithm, self.algorithm.expert.nfe, self.split_batch(batch)
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

    def split_batch(self, batch: TensorDict) -> list[TensorDict]:
        """Splits a batch into the parts of gradient accumulation."""
        return list(batch.chunk(self.gradient_accumulation))

    def minimise(self, network: str, loss: Loss, parts: list[TensorDict]) -> tuple[Tensor, Tensor]:
        """Takes one gradient step of a network.

        If memory runs out and `halve_batch_on_oom` is set, each part is cut in two and the step is repeated with the same random numbers.

        Args:
            network: Key of the network in `trainables`.
            loss: Returns the loss of each state of a part, (b,).
            parts: The parts of the batch; the list is changed in place if they are cut.

        Returns:
            The loss of each state (b,) and the gradient's norm before clipping, both on the device.

        Raises:
            MemoryError: memory ran out, and `halve_batch_on_oom` is not set or the parts have one state each.
        """
        size, config = max(map(len, parts)), self.algorithm.config
        can_halve = config.halve_batch_on_oom and size > 1
        streams = self.algorithm.collector.streams.values()
        generators = [torch.default_generator, *torch.cuda.default_generators, *streams] if can_halve else []
        rng_states = [(generator, generator.get_state()) for generator in generators]
        doing = f"at step {self.algorithm.step + 1}, in the gradient of {size} of batch_size={config.batch_size} states at a time"
        cure = f"lower batch_size, raise gradient_accumulation={self.gradient_accumulation}, or set halve_batch_on_oom"
        try:
            with out_of_memory.explain(doing, cure if size > 1 else "there is no smaller batch; free memory, or make the student smaller"):
                losses = self.trainables[network].accumulate(loss, parts)
        except MemoryError:
            if not can_halve:
                raise
        else:
            return losses, self.trainables[network].step()
        # Outside the except block, where the error and the activations in its frames are freed.
        torch.cuda.empty_cache()
        for generator, state in rng_states:
            generator.set_state(state)
        parts[:] = [half for part in parts for half in part.chunk(2)]
        self.gradient_accumulation *= 2
        tqdm.write(f"out of memory {doing}; from here on gradient_accumulation is {self.gradient_accumulation}", file=sys.stderr)
        return self.minimise(network, loss, parts)

    def set_total_updates(self, total_updates: int) -> None:
        """Sets the end of training; the schedules of the learning rates are stretched to it.

        Raises:
            ValueError: the buffer keeps every state (`capacity` null) and is too small for this number of updates.
        """
        algorithm = self.algorithm
        if algorithm.config.capacity is None and total_updates > algorithm.config.num_updates:
            raise ValueError(
                f"{algorithm.step} + {total_updates - algorithm.step} gradient steps: capacity=null keeps every state of "
                f"num_updates={algorithm.config.num_updates}; build the agent with num_updates={total_updates}"
            )
        algorithm.total_updates = total_updates
        for step in algorithm.gradient_steps():
            self.trainables[step.network].set_total_steps(step.count(total_updates))

    def unshard(self) -> None:
        """Gathers a sharded average on every rank, which can then call it without the other ranks."""
        if sharding.is_sharded(self.ema.module):
            average = self.algorithm.seeded_student()
            average.load_state_dict(sharding.gather_state(self.ema.module.state_dict()))
            self.ema.module = average.eval()
            self.algorithm.update_student_policy()

    def save_checkpoint(self, directory: Path) -> None:
        """Writes the metrics up to here and then a checkpoint into the directory."""
        self.metrics.flush(self.algorithm)  # an error if a loss is not finite, so that no such state is saved
        path = save_checkpoint(self.algorithm, directory)
        for callback in self.callbacks:
            callback.on_checkpoint(self.algorithm, path)

    def _named_callbacks(self) -> list[tuple[str, Callback]]:
        """The callbacks with names under which checkpoints keep their state; they do not depend on the progress bar."""
        names = [type(callback).__qualname__ for callback in self.callbacks]
        return [(f"{name} {names[:i].count(name)}", callback) for i, (name, callback) in enumerate(zip(names, self.callbacks, strict=True))]

    def state_dict(self) -> dict[str, Any]:
        """All that the next updates depend on, in tensors and plain values; training/checkpoint.py lists the keys."""
        algorithm, scaler, device = self.algorithm, self.accelerator.scaler, self.algorithm.expert.device
        return {
            "step": algorithm.step,
            "horizon": algorithm.total_updates,
            "gradient_accumulation": self.gradient_accumulation,
            "trainables": {name: trainable.state_dict() for name, trainable in self.trainables.items()},
            "ema": sharding.gather_state(self.ema.state_dict(), ranks.is_main()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "nfe": {"teacher": algorithm.teacher_nfe, "student": algorithm.student_nfe},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "callbacks": {name: state for name, callback in self._named_callbacks() if (state := callback.state_dict())},
            **algorithm.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the algorithm's support was calibrated on other samples.
        """
        algorithm = self.algorithm
        algorithm.load_state_dict(state)
        algorithm.step, algorithm.total_updates = state["step"], state["horizon"]
        self.gradient_accumulation = state["gradient_accumulation"]
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state["trainables"][name])
        self.ema.load_state_dict(sharding.shard_state(state["ema"], self.ema.state_dict()))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        algorithm.teacher_nfe = state["nfe"]["teacher"]
        student = cast(NetworkDenoiser, algorithm.networks["student"])
        student.nfe += state["nfe"]["student"] - algorithm.student_nfe  # student_nfe counts other networks too
        torch.set_rng_state(state["random"].cpu())
        if (random := state.get("random_cuda")) is not None and algorithm.expert.device.type == "cuda":
            torch.cuda.set_rng_state(random.cpu(), algorithm.expert.device)
        self._callback_states = state.get("callbacks", {})
