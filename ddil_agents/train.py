"""The training loop, once for every learner, and the run directory's metrics.

metrics.jsonl     one object a line, every `log_every` gradient steps: the source of truth
tensorboard/      the same numbers
checkpoints/      whole states, every `checkpoint_every` gradient steps
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from ddil_agents.buffer import SOURCES
from ddil_agents.checkpoint import save_checkpoint, write_atomically

if TYPE_CHECKING:
    from ddil_agents.learner import Learner


def train(learner: Learner, out: Path | None = None, *, progress: bool = True, checkpoint_every: int = 500, log_every: int = 10) -> None:
    """Trains to the learner's horizon, from whatever step it has reached.

    Args:
        learner: Fresh, or restored from a checkpoint.
        out: Run directory; None writes nothing.
        progress: Whether to show a bar.
        checkpoint_every: Gradient steps between checkpoints.
        log_every: Gradient steps that one line of metrics sums up.

    Raises:
        FloatingPointError: the loss is not finite; names the step and the sources.
    """
    config = learner.config
    log = MetricsLog(learner, out)
    bar = tqdm(total=learner.horizon, initial=learner.step, desc=learner.name, unit="update", disable=not progress)
    with log, bar:
        while learner.step < learner.horizon:
            if learner.step % config.updates_per_collect == 0:
                learner.collect()
            batch = learner.buffer.sample(config.batch_size, learner.beta())  # s ~ Σᵢ βᵢ ρᵢ, DDIL Alg. 1
            losses, norm = learner.update(batch)  # L_Distill, DDIL Eq. 2
            log.add(batch, losses, norm)
            if config.prioritised:
                log.check()  # a priority is a loss, and the buffer would name neither step nor source
                learner.buffer.update_priority(batch["index"], losses)
            bar.update()
            last = learner.step == learner.horizon
            if learner.step % log_every == 0 or last:
                bar.set_postfix_str(log.flush())
            if out is not None and (learner.step % checkpoint_every == 0 or last):
                log.flush()  # a state with a non-finite loss is never saved
                save_checkpoint(learner, out / "checkpoints")


class MetricsLog:
    """Sums up gradient steps on the device and writes them a line at a time, so that no step waits for a number.

    After a resume the lines past the checkpoint are dropped: they are about to be written again.
    """

    def __init__(self, learner: Learner, out: Path | None) -> None:
        self.learner = learner
        self._pending: list[Tensor] = []
        self._since, self._nfe_since = time.monotonic(), self._nfe()
        self._seconds = 0.0
        self._file: Any = None
        self._board: Any = None
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter

            path = out / "metrics.jsonl"
            rows = read_metrics(path, learner.step) if path.is_file() else []
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._seconds = rows[-1]["seconds"] if rows else 0.0
            self._file = path.open("a")
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=learner.step + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _nfe(self) -> int:
        return self.learner.teacher_nfe + self.learner.student_nfe

    def add(self, batch: TensorDict, losses: Tensor, norm: Tensor) -> None:
        """Keeps one gradient step: norm, and each source's count and summed loss, (7,) on the device."""
        one_hot = torch.nn.functional.one_hot(batch["source"].long(), len(SOURCES))  # (b, 3)
        sums = torch.where(one_hot > 0, losses[:, None], 0).sum(0)  # no product: inf · 0 would blame every source
        self._pending.append(torch.cat([norm.to(losses.dtype).reshape(1), one_hot.sum(0).to(losses.dtype), sums]))

    def check(self) -> Tensor:
        """The steps since the last line, (n, 7) on the CPU: the one wait for the device.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; names the step and the sources.
        """
        steps = torch.stack(self._pending).double().cpu()
        scaled = self.learner.accelerator.scaler is not None  # fp16's scaler meets infinite gradients and skips those steps
        for i, (norm, *counts_and_sums) in enumerate(steps.tolist()):
            counts, sums = counts_and_sums[:3], counts_and_sums[3:]
            broken = [f"{name} ({int(n)} states)" for name, n, x in zip(SOURCES, counts, sums, strict=True) if not math.isfinite(x)]
            if broken or not (scaled or math.isfinite(norm)):
                what = (
                    f"loss is not finite at step {{}}, on states of: {', '.join(broken)}" if broken else "gradient is not finite at step {}"
                )
                raise FloatingPointError(
                    f"the {what.format(self.learner.step - len(steps) + i + 1)}. Lower learning_rate, raise warmup_updates, "
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
        counts, sums = steps[:, 1:4].sum(0), steps[:, 4:].sum(0)
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        self._seconds += elapsed
        nfe, self._nfe_since = self._nfe() - self._nfe_since, self._nfe()
        row = {
            "step": learner.step,
            "loss": float(sums.sum() / counts.sum()),
            "loss_by_source": {n: float(s / k) if k else None for n, s, k in zip(SOURCES, sums, counts, strict=True)},
            "grad_norm": float(steps[:, 0].mean()),
            "learning_rate": learner.last_learning_rate,
            "beta": dict(zip(SOURCES, learner.beta(), strict=True)),
            "source_counts": {n: int(k) for n, k in zip(SOURCES, counts, strict=True)},
            "held": learner.buffer.counts,
            "teacher_nfe": learner.teacher_nfe,
            "student_nfe": learner.student_nfe,
            "teacher_nfe_per_update": learner.teacher_nfe / learner.step,
            "nfe_per_second": nfe / elapsed,
            "seconds": self._seconds,
        }
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for key, value in flatten(row).items():
                self._board.add_scalar(key, value, learner.step)
        shares = "/".join(f"{b:.2f}" for b in learner.beta())
        drawn = "/".join(str(int(k)) for k in counts)
        return f"loss={row['loss']:.4f} β={shares} drawn={drawn} NFE/s={row['nfe_per_second']:.0f}"


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
