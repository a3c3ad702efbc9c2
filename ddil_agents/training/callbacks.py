"""Callbacks: what happens beside the gradient steps of a training, each in a class of its own.

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

TIMED_UPDATES = 20  # after which the time that a run takes is known
LONG = 300.0  # seconds from which on it is said


class Callback:
    """Does nothing; override what you need. Where training runs on several processes, every one of them calls its own.

    A callback must not draw from the streams of the agent or from torch's global generator: the run would no longer be the same without it.
    """

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        """Before the first update, also of a resumed run.

        Args:
            agent: In training; `agent.step` of `agent.total_updates` updates are done.
            out: The run directory, if there is one.
        """

    def on_collect(self, agent: Algorithm, states: TensorDict) -> None:
        """After states (n,) were collected and labelled; their keys are those of `Collector.collect`."""

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        """After an update; False ends the training here.

        Args:
            agent: In training.
            batch: The states that the update learned from.
            measured: On the device: `loss` of each state (b,), `grad_norm`, and those of other networks that took a step.
        """

    def on_log(self, agent: Algorithm, row: dict[str, Any]) -> None:
        """With every line of metrics.jsonl."""

    def on_evaluate(self, agent: Algorithm, row: dict[str, Any]) -> None:
        """With every line of eval.jsonl."""

    def on_checkpoint(self, agent: Algorithm, path: Path) -> None:
        """After a checkpoint was written to that folder."""

    def on_end(self, agent: Algorithm) -> None:
        """After the last update; not where an error ended the training."""

    def close(self) -> None:
        """At the very end, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, in tensors and plain values; kept in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned; called after `on_start`."""


class ProgressBarCallback(Callback):
    """A bar of the updates, with the last line of metrics behind it; of a long run also says after 20 updates how long it will take."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self._first, self._began = 0, 0.0

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        self._first, self._began = agent.step, time.monotonic()
        self.bar = tqdm(total=agent.total_updates, initial=agent.step, desc=agent.name, unit="update", disable=not ranks.is_main())

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        assert self.bar is not None
        self.bar.update()
        if agent.step == self._first + TIMED_UPDATES and ranks.is_main():
            each = (time.monotonic() - self._began) / TIMED_UPDATES
            left = (agent.total_updates - agent.step) * each
            if left > LONG:
                tqdm.write(f"{each:.3g} s an update; about {describe_duration(left)} left, and the evaluation", file=sys.stderr)
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
    """As in `2 h 5 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class CheckpointCallback(Callback):
    """Writes `out`/checkpoints at every `every`-th update and at the last.

    Args:
        every: Updates between two checkpoints.
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
    """Seconds of training, without those of what it is paused for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.monotonic()

    def start(self, seconds: float = 0.0) -> None:
        """Goes on from so many seconds."""
        self.seconds, self._since = seconds, time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap, which `seconds` then includes."""
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        self.seconds += elapsed
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no time passes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began
