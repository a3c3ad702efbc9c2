"""A run's metrics: accumulated on the device over `log_every` updates, then written as one line.

metrics.jsonl     one JSON object per line
tensorboard/      the same numbers
support.json      the support that estimates are projected onto, if it was calibrated
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ddil_agents.devices import ranks
from ddil_agents.states.batch import Batch
from ddil_agents.states.beta import SOURCES
from ddil_agents.training.callbacks import Callback, Stopwatch
from ddil_agents.training.checkpoint import explain_write_errors, write_atomically, write_support
from ddil_agents.training.tracking import Tracker, start_tracker
from ddil_env.support import CountingSupport

if TYPE_CHECKING:
    from ddil_agents.agent import Agent
    from ddil_agents.algorithm import Algorithm


class RunFiles(Callback):
    """Writes a run's metrics to metrics.jsonl, to tensorboard/ and, if requested, to an experiment tracker.

    A resumed run drops the lines after its checkpoint, because it logs those updates again.

    Args:
        clock: The clock of the training; a resumed run sets it to the seconds of the last line that it keeps.
        track: The experiment tracker, or `none`.
    """

    def __init__(self, clock: Stopwatch, track: Tracker = "none") -> None:
        self.clock, self.track = clock, track
        self.path: Path | None = None
        self._board: Any = None
        self._live: Any = None

    def on_start(self, agent: Agent, out: Path | None) -> None:
        self.clock.start()
        if out is None or not ranks.is_main():
            return
        self.path = out / "metrics.jsonl"
        rows = read_metrics(self.path, agent.step) if self.path.is_file() else []
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=agent.step + 1)
        self._live = start_tracker(self.track, out, agent.config_dict())
        self.clock.start(rows[-1]["seconds"] if rows else 0.0)

    def on_log(self, agent: Agent, row: dict[str, Any]) -> None:
        """Writes a line of metrics.

        Raises:
            OSError: the disk is full; a resumed run drops the incomplete line.
        """
        if self.path is not None:
            with explain_write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._draw(row)

    def on_evaluate(self, agent: Agent, row: dict[str, Any]) -> None:
        self._draw({"step": row["step"], "evaluation": {key: value for key, value in row.items() if key not in ("step", "seconds")}})

    def _draw(self, row: dict[str, Any]) -> None:
        """Sends the numbers of a line to TensorBoard and to the tracker."""
        if self.path is None:
            return
        scalars = flatten({key: value for key, value in row.items() if key != "step"})
        with explain_write_errors(self.path.with_name("tensorboard")):
            for key, value in scalars.items():
                self._board.add_scalar(key, value, row["step"])
        if self._live is not None:
            self._live.log(scalars, step=row["step"])

    def close(self) -> None:
        if self.path is not None:
            with explain_write_errors(self.path.with_name("tensorboard")):
                self._board.close()
        if self._live is not None:
            self._live.finish()


class MetricsCallback(Callback):
    """Accumulates the metrics of updates on the device, and sends a line for every `log_every` of them to the `on_log` of all callbacks.

    No update waits for the device or for another rank in between.

    Args:
        log_every: Number of updates in a line.
    """

    def __init__(self, log_every: int = 10) -> None:
        self.log_every = log_every
        self._pending: list[dict[str, Tensor]] = []
        self._nfe_since = 0

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        self._nfe_since = sum(agent.total_nfe())
        calibrated = agent.config.thresholding.kind == "quantile"
        if out is not None and ranks.is_main() and calibrated and not (out / "support.json").is_file():
            write_support(out, agent.support, agent.teacher_nfe)

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        if agent.step % self.log_every == 0 or agent.step == agent.total_updates:
            self.flush(agent)
        return None

    def on_end(self, agent: Algorithm) -> None:
        self.flush(agent)

    def add(self, batch: TensorDict, measured: dict[str, Tensor]) -> None:
        """Adds an update: the number of states of each source, the sum of the loss over them, and the mean of every other measured value.

        Args:
            batch: The states of the update.
            measured: What `Trainer.update` returned; a network that takes no step in this update has no values in it.
        """
        one_hot = torch.nn.functional.one_hot(batch["source"].long(), len(SOURCES))  # (b, 3)
        kept = {f"drawn/{name}": n for name, n in zip(SOURCES, one_hot.sum(0), strict=True)}
        for name, value in measured.items():
            if name == "loss":  # not a product: inf · 0 is not finite in every source
                sums = torch.where(one_hot > 0, value[:, None], 0).sum(0)
                kept |= {f"loss/{source}": x for source, x in zip(SOURCES, sums, strict=True)}
            else:
                kept[name] = value.mean()
        self._pending.append(kept)

    def check_finite(self, agent: Algorithm) -> list[dict[str, float]]:
        """Returns the metrics of each update since the last line, summed over the ranks; this waits for the device.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; the message names the update and the sources of its states.
        """
        if not self._pending:
            return []
        flat = torch.stack([value.double() for step in self._pending for value in step.values()])
        values = iter(ranks.sum_over_ranks(flat).tolist())
        steps = [{name: next(values) / (1 if "/" in name else ranks.world_size()) for name in step} for step in self._pending]
        scaled = agent.trainer.accelerator.scaler is not None  # with fp16 the scaler skips steps with infinite gradients
        for i, step in enumerate(steps):
            broken = [name for name, x in step.items() if not (math.isfinite(x) or (scaled and name.endswith("grad_norm")))]
            if broken:
                at = f"is not finite at step {agent.step - len(steps) + i + 1}"
                sources = [f"{n} ({int(step[f'drawn/{n}'])} states)" for n in SOURCES if f"loss/{n}" in broken]
                what = (
                    f"loss {at}, on states of: {', '.join(sources)}"
                    if sources
                    else f"{'gradient' if broken == ['grad_norm'] else broken[0]} {at}"
                )
                raise FloatingPointError(
                    f"the {what}. Lower learning_rate, raise warmup_updates, "
                    "or look at the expert's labels; checkpoints are of earlier, finite steps."
                )
        return steps

    def flush(self, agent: Algorithm) -> None:
        """Sends the line of the updates since the last line to all callbacks."""
        if not self._pending:
            return
        steps = self.check_finite(agent)
        self._pending = []
        drawn = {n: sum(int(step[f"drawn/{n}"]) for step in steps) for n in SOURCES}
        # Loss and counts are over the updates in which the student took a step.
        with_loss = [step for step in steps if f"loss/{SOURCES[0]}" in step]
        sums = {n: sum(step[f"loss/{n}"] for step in with_loss) for n in SOURCES}
        counts = {n: sum(int(step[f"drawn/{n}"]) for step in with_loss) for n in SOURCES}
        others = {name: [step[name] for step in steps if name in step] for name in sorted({*itertools.chain(*steps)}) if "/" not in name}
        clipped = {role: float(fraction) for role, fraction in clipped_shares(agent).items()}
        elapsed = agent.trainer.clock.lap()
        teacher_nfe, student_nfe = agent.total_nfe()
        nfe, self._nfe_since = teacher_nfe + student_nfe - self._nfe_since, teacher_nfe + student_nfe
        held = ranks.sum_over_ranks(torch.tensor(list(agent.buffer.counts.values()), device=agent.expert.device)).tolist()
        row = {
            "step": agent.step,
            "loss": sum(sums.values()) / sum(counts.values()) if with_loss else None,
            "loss_by_source": {n: sums[n] / counts[n] if counts[n] else None for n in SOURCES},
            **{name: statistics.fmean(values) for name, values in others.items()},
            **{f"{name}_max": max(values) for name, values in others.items() if name.endswith("grad_norm")},  # a mean hides a spike
            "clipped": {role: x if math.isfinite(x) else None for role, x in clipped.items()},
            "learning_rate": agent.trainer.trainables["student"].last_learning_rate,
            "gradient_accumulation": agent.trainer.gradient_accumulation,
            "beta": dict(zip(SOURCES, agent.beta(), strict=True)),
            "source_counts": drawn,
            "held": dict(zip(SOURCES, held, strict=True)),
            "teacher_nfe": teacher_nfe,
            "student_nfe": student_nfe,
            **world_steps(agent),
            "teacher_nfe_per_update": teacher_nfe / agent.step,
            "nfe_per_second": nfe / elapsed,
            "seconds": agent.trainer.clock.seconds,
        }
        for callback in agent.trainer.callbacks:
            callback.on_log(agent, row)


def world_steps(agent: Algorithm) -> dict[str, int]:
    """Samples that worlds have taken so far, over all ranks, as `world_steps`; empty without a world."""
    collector = agent.collector
    if collector.world is None:
        return {}
    return {"world_steps": int(ranks.sum_over_ranks(torch.tensor(collector.world_steps, device=agent.expert.device)))}


def clipped_shares(agent: Algorithm) -> dict[str, Tensor]:
    """The fraction of entries that thresholding has changed since the last call, by role, over all ranks; NaN if there were no entries."""
    meters = {role: support for role, support in agent.thresholds.items() if isinstance(support, CountingSupport)}
    counts = [meter.pop_counts().to(agent.expert.device) for meter in meters.values()]  # (2,) each; on the CPU if there were no entries
    shares = [changed / seen for changed, seen in ranks.sum_over_ranks(torch.stack(counts))] if counts else []
    return dict(zip(meters, shares, strict=True))


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens a nested mapping, without entries that are None: {"beta": {"forward": 1}} → {"beta/forward": 1}."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def read_metrics(path: Path, until: int | None = None, needs: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Reads the lines of a metrics.jsonl or eval.jsonl up to a step; an incomplete last line, as a killed run leaves it, is left out.

    Args:
        path: The file.
        until: The last step; default: all.
        needs: What each line holds beside `step` and `seconds`.

    Raises:
        ValueError: the file cannot be read, a line before the last is damaged, or a line holds something else than numbers by name.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); remove it, and the run goes on without its past lines") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is damaged ({error}); remove that line") from error
        if (fault := _fault_of_row(row, needs)) is not None:
            raise ValueError(f"line {number} of {path} is damaged ({fault}); remove that line")
        if until is not None and row["step"] > until:
            break
        rows.append(row)
    return rows


def _fault_of_row(row: Any, needs: tuple[str, ...]) -> str | None:
    """What in a line is no number by its name, or missing; None if nothing is. A value may be null but for the step and the seconds."""
    if not isinstance(row, dict):
        return f"{row!r:.60} is no object"
    for name, value in row.items():
        if isinstance(value, dict):
            if (fault := _fault_of_row({"step": 0, "seconds": 0, **value}, ())) is not None:
                return f"in {name}, {fault}"
        elif not isinstance(value, int | float | None) or (name in ("step", "seconds") and (value is None or isinstance(value, bool))):
            return f"{name} is {value!r:.60}, not a number"
    if missing := [name for name in ("step", "seconds", *needs) if name not in row]:
        return f"it has no {', '.join(missing)}"
    return None if isinstance(row["step"], int) else f"step is {row['step']!r}, not a whole number"
