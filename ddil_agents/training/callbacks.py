"""Callbacks: code that runs at certain events of a training, such as after an update or a checkpoint.

    class StopAtLoss(Callback):
        def __init__(self, loss: float) -> None:
            self.loss = loss

        def on_log(self, agent, row):
            self.reached = row["loss"] is not None and row["loss"] < self.loss

        def on_update(self, agent, batch, measured):
            return not self.reached

    Dagger("digits").learn(callbacks=[StopAtLoss(0.01)])

In a run's YAML, `callbacks: [{class_path: my_pkg.StopAtLoss, init_args: {loss: 0.01}}]`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from ddil_agents.devices import ranks
from ddil_agents.states.batch import Batch

if TYPE_CHECKING:
    from ddil_agents.algorithm import Algorithm

TIMED_UPDATES = 20  # the first updates, whose time predicts that of the run
LONG = 300.0  # seconds; a run that takes longer says so


class Callback:
    """The base class of callbacks, whose methods do nothing. With several processes, each process calls its own callbacks.

    A callback must not draw from the agent's random streams or from torch's global generator, which would change the run.
    """

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        """Called before the first update, also of a resumed run.

        Args:
            agent: The agent; `agent.step` of `agent.total_updates` updates are done.
            out: The run directory, if there is one.
        """

    def on_collect(self, agent: Algorithm, states: TensorDict) -> None:
        """Called after states (n,) were collected and labelled; `Collector.collect` lists their keys."""

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        """Called after an update; returning False ends the training.

        Args:
            agent: The agent.
            batch: The states of the update.
            measured: What `Trainer.update` returns: `loss` of each state (b,), `grad_norm`, and those of other networks that took a step.
        """

    def on_log(self, agent: Algorithm, row: dict[str, Any]) -> None:
        """Called with every line of metrics.jsonl."""

    def on_evaluate(self, agent: Algorithm, row: dict[str, Any]) -> None:
        """Called with every line of eval.jsonl."""

    def on_checkpoint(self, agent: Algorithm, path: Path) -> None:
        """Called after a checkpoint was written to the folder `path`."""

    def on_end(self, agent: Algorithm) -> None:
        """Called after the last update, unless an error ended the training."""

    def close(self) -> None:
        """Called last, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run, in tensors and plain values; checkpoints keep it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; called after `on_start`."""


class ProgressBarCallback(Callback):
    """Shows a progress bar with the last line of metrics, and for a long run, after 20 updates, an estimate of its time."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self._first_step, self._started_at = 0, 0.0

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        self._first_step, self._started_at = agent.step, time.monotonic()
        self.bar = tqdm(total=agent.total_updates, initial=agent.step, desc=agent.name, unit="update", disable=not ranks.is_main())

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        assert self.bar is not None
        self.bar.update()
        if agent.step == self._first_step + TIMED_UPDATES and ranks.is_main():
            seconds = (time.monotonic() - self._started_at) / TIMED_UPDATES
            remaining = (agent.total_updates - agent.step) * seconds
            if remaining > LONG:
                tqdm.write(f"{seconds:.3g} s an update; about {describe_duration(remaining)} left, and the evaluation", file=sys.stderr)
        return None

    def on_log(self, agent: Algorithm, row: dict[str, Any]) -> None:
        assert self.bar is not None
        shares = "/".join(f"{share:.2f}" for share in row["beta"].values())
        counts = "/".join(map(str, row["source_counts"].values()))
        loss = "" if row["loss"] is None else f"loss={row['loss']:.4f} "
        self.bar.set_postfix_str(f"{loss}β={shares} drawn={counts} NFE/s={row['nfe_per_second']:.0f}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def describe_duration(seconds: float) -> str:
    """Formats a duration, as in `2 h 5 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class CheckpointCallback(Callback):
    """Writes a checkpoint to `out`/checkpoints after every `every`-th update and after the last.

    Args:
        every: Number of updates between two checkpoints.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.out: Path | None = None

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        self.out = out

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        if self.out is not None and (agent.step % self.every == 0 or agent.step == agent.total_updates):
            agent.trainer.save_checkpoint(self.out / "checkpoints")
        return None


class Stopwatch:
    """Measures the seconds of training, without those of blocks inside `paused`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.monotonic()

    def start(self, seconds: float = 0.0) -> None:
        """Starts the clock at this number of seconds."""
        self.seconds, self._since = seconds, time.monotonic()

    def lap(self) -> float:
        """Adds the seconds since the last lap to `seconds`, and returns them."""
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        self.seconds += elapsed
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time of the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - start
