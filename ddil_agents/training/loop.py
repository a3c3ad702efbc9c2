"""The training loop, once for every learner, and the run directory's metrics.

support.json      where estimates are projected, if that was calibrated
metrics.jsonl     one object a line, every `log_every` gradient steps: the source of truth
tensorboard/      the same numbers
checkpoints/      whole states, every `checkpoint_every` gradient steps
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from ddil_agents.devices import ranks
from ddil_agents.states.buffer import SOURCES
from ddil_agents.training.checkpoint import save_checkpoint, write_atomically, write_support, writing
from ddil_agents.training.tracking import Tracker, start

if TYPE_CHECKING:
    from ddil_agents.agent import Agent
    from ddil_agents.learner import Learner


def train(
    learner: Learner,
    out: Path | None = None,
    *,
    progress: bool = True,
    checkpoint_every: int = 500,
    log_every: int = 10,
    track: Tracker = "none",
) -> None:
    """Trains to the learner's horizon, from whatever step it has reached.

    Args:
        learner: Fresh, or restored from a checkpoint.
        out: Run directory; None writes nothing.
        progress: Whether to show a bar.
        checkpoint_every: Gradient steps between checkpoints.
        log_every: Gradient steps that one line of metrics sums up.
        track: A live page to send the lines to, besides.

    Raises:
        FloatingPointError: the loss is not finite; names the step and the sources.
    """
    config = learner.config
    log = MetricsLog(learner, out if ranks.is_main() else None, track)
    quiet = not (progress and ranks.is_main())
    bar = tqdm(total=learner.horizon, initial=learner.step, desc=learner.name, unit="update", disable=quiet)
    with log, bar:
        while learner.step < learner.horizon:
            if learner.step % learner.collect_every == 0:
                learner.collect()
            batch = learner.draw()  # s ~ Σᵢ βᵢ ρᵢ, DDIL Alg. 1
            measured = learner.update(batch)  # L_Distill, DDIL Eq. 2
            log.add(batch, measured)
            if config.prioritised:
                log.check()  # a priority is a loss, and the buffer would name neither step nor source
                learner.buffer.update_priority(batch["index"], measured["loss"])
            bar.update()
            last = learner.step == learner.horizon
            if learner.step % log_every == 0 or last:
                bar.set_postfix_str(log.flush())
            if out is not None and (learner.step % checkpoint_every == 0 or last):
                log.flush()  # a state with a non-finite loss is never saved
                save_checkpoint(learner, out / "checkpoints")


class RunFiles:
    """A run's metrics.jsonl and tensorboard/, and a live page if asked for: a line goes to all of them.

    After a resume the lines past the checkpoint are dropped: they are about to be written again.
    """

    def __init__(self, agent: Agent, out: Path | None, track: Tracker = "none") -> None:
        self._since, self.seconds = time.monotonic(), 0.0
        self.path: Path | None = None
        self._board: Any = None
        self._live: Any = None
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.path = out / "metrics.jsonl"
            rows = read_metrics(self.path, agent.step) if self.path.is_file() else []
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            self.seconds = rows[-1]["seconds"] if rows else 0.0
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=agent.step + 1)
            self._live = start(track, out, agent.config_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            # The first error is the one to tell.
            with writing(self.path.with_name("tensorboard")) if error[0] is None else suppress(OSError):
                self._board.close()
        if self._live is not None:
            self._live.finish()

    def lap(self) -> float:
        """Seconds since the last lap; `seconds` are those of the run."""
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        self.seconds += elapsed
        return elapsed

    def write(self, row: dict[str, Any]) -> None:
        """Writes the line of a step.

        Raises:
            OSError: the disk is full; the next resume drops what there is of the line.
        """
        if self.path is None:
            return
        flat = flatten(row)
        with writing(self.path):
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for key, value in flat.items():
                self._board.add_scalar(key, value, row["step"])
        if self._live is not None:
            self._live.log({key: value for key, value in flat.items() if key != "step"}, step=row["step"])


class MetricsLog(RunFiles):
    """Sums up gradient steps on the device and writes them a line at a time, so that no step waits for a number, or for another rank."""

    def __init__(self, learner: Learner, out: Path | None, track: Tracker = "none") -> None:
        super().__init__(learner, out, track)
        self.learner = learner
        self._pending: list[dict[str, Tensor]] = []
        self._nfe_since = sum(learner.spent())
        if out is not None and learner.config.thresholding.kind == "quantile" and not (out / "support.json").is_file():
            write_support(out, learner.support, learner.teacher_nfe)

    def add(self, batch: TensorDict, measured: dict[str, Tensor]) -> None:
        """Keeps one gradient step, on the device: each source's count, and what `update` measured.

        A (b,) loss is kept as each source's sum. A method that trains a network every R-th step alone measures its loss there alone.
        """
        one_hot = torch.nn.functional.one_hot(batch["source"].long(), len(SOURCES))  # (b, 3)
        kept = {f"drawn/{name}": n for name, n in zip(SOURCES, one_hot.sum(0), strict=True)}
        for name, value in measured.items():
            if name == "loss":  # no product: inf · 0 would blame every source
                sums = torch.where(one_hot > 0, value[:, None], 0).sum(0)
                kept |= {f"loss/{source}": x for source, x in zip(SOURCES, sums, strict=True)}
            else:
                kept[name] = value.mean()
        self._pending.append(kept)

    def check(self) -> list[dict[str, float]]:
        """The steps since the last line as numbers, over all ranks: the one wait for the device.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; names the step and the sources.
        """
        if not self._pending:
            return []
        flat = torch.stack([value.double() for step in self._pending for value in step.values()])
        values = iter(ranks.total(flat).tolist())
        steps = [{name: next(values) / (1 if "/" in name else ranks.world()) for name in step} for step in self._pending]
        scaled = self.learner.accelerator.scaler is not None  # fp16's scaler meets infinite gradients and skips those steps
        for i, step in enumerate(steps):
            broken = [name for name, x in step.items() if not (math.isfinite(x) or (scaled and name.endswith("grad_norm")))]
            if broken:
                at = f"is not finite at step {self.learner.step - len(steps) + i + 1}"
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

    def flush(self) -> str:
        """Writes one line for the steps since the last, and returns what the progress bar shows."""
        if not self._pending:
            return ""
        steps = self.check()
        self._pending = []
        learner = self.learner
        drawn = {n: sum(int(step[f"drawn/{n}"]) for step in steps) for n in SOURCES}
        # The loss is that of the steps that measured one; so are the counts beside it.
        with_loss = [step for step in steps if f"loss/{SOURCES[0]}" in step]
        sums = {n: sum(step[f"loss/{n}"] for step in with_loss) for n in SOURCES}
        counts = {n: sum(int(step[f"drawn/{n}"]) for step in with_loss) for n in SOURCES}
        others = {name: [step[name] for step in steps if name in step] for name in sorted({*itertools.chain(*steps)}) if "/" not in name}
        clipped = {role: float(fraction) for role, fraction in learner.clipped().items()}
        elapsed = self.lap()
        teacher_nfe, student_nfe = learner.spent()
        nfe, self._nfe_since = teacher_nfe + student_nfe - self._nfe_since, teacher_nfe + student_nfe
        held = ranks.total(torch.tensor(list(learner.buffer.counts.values()), device=learner.expert.device)).tolist()
        row = {
            "step": learner.step,
            "loss": sum(sums.values()) / sum(counts.values()) if with_loss else None,
            "loss_by_source": {n: sums[n] / counts[n] if counts[n] else None for n in SOURCES},
            **{name: statistics.fmean(values) for name, values in others.items()},
            **{f"{name}_max": max(values) for name, values in others.items() if name.endswith("grad_norm")},  # a mean hides one spike
            "clipped": {role: x if math.isfinite(x) else None for role, x in clipped.items()},
            "learning_rate": learner.trainables["student"].last_learning_rate,
            "gradient_accumulation": learner.gradient_accumulation,
            "beta": dict(zip(SOURCES, learner.beta(), strict=True)),
            "source_counts": drawn,
            "held": dict(zip(SOURCES, held, strict=True)),
            "teacher_nfe": teacher_nfe,
            "student_nfe": student_nfe,
            "teacher_nfe_per_update": teacher_nfe / learner.step,
            "nfe_per_second": nfe / elapsed,
            "seconds": self.seconds,
        }
        self.write(row)
        shares = "/".join(f"{b:.2f}" for b in learner.beta())
        loss = "" if row["loss"] is None else f"loss={row['loss']:.4f} "
        return f"{loss}β={shares} drawn={'/'.join(map(str, drawn.values()))} NFE/s={row['nfe_per_second']:.0f}"


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested mapping, keyed by path: {"beta": {"forward": 1}} → {"beta/forward": 1}."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def read_metrics(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to a step; a last line that a kill cut short is left out.

    Raises:
        ValueError: no such file, or a line before the last that is not a row of metrics.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); remove it, and the run goes on without its past lines") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step, _ = row["step"], row["seconds"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is damaged ({error}); remove that line") from error
        if until is not None and step > until:
            break
        rows.append(row)
    return rows
