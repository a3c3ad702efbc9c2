"""One part of `gpu.py` under way: its rows, its time, its failures, and how they are written down."""

from __future__ import annotations

import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ddil_agents.training.checkpoint import write_atomically


class OutOfTime(BaseException):
    """The time of a part is over. No Exception, so that no library that is under way catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the body after so many seconds, and again every five: one that falls into a destructor is lost."""

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory() -> None:
    gc.collect()
    with suppress(RuntimeError):  # of a GPU that a failed kernel has taken from this process
        torch.cuda.empty_cache()


def device_works(device: str) -> bool:
    """Whether the GPU still answers this process; after an illegal access or a failed assertion in a kernel it never does again."""
    try:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Report:
    """results.json and results.md of all parts, written anew after every row.

    Args:
        out: Their folder.
        facts: Hardware, versions, date and command.
    """

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts = out, facts
        self.parts: dict[str, Part] = {}
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        parts = {letter: part.as_dict() for letter, part in self.parts.items()}
        write_atomically(self.out / "results.json", json.dumps({**self.facts, "parts": parts}, indent=1) + "\n")
        told = "; ".join(f"{key}: {value}" for key, value in self.facts.items())
        text = "\n".join(f"\n## {letter}. {part.title}\n\n{part.markdown()}" for letter, part in self.parts.items())
        write_atomically(self.out / "results.md", f"# Measured by benchmarks/gpu.py\n\n{told}\n{text}")


class Part:
    """What one part has measured.

    Args:
        report: Writes it down.
        title: Of its table.
        device: Where it measures.
        dry: Whether with tiny shapes on the CPU.
        seconds: How long it may take.

    Attributes:
        rows: Measurements, one a line of the table.
        status: "running", "done", "failed", or "out of time".
    """

    def __init__(self, report: Report, title: str, device: str, dry: bool, seconds: float) -> None:
        self.report, self.title, self.device, self.dry = report, title, device, dry
        self.on_gpu = device.startswith("cuda")
        self.rows: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}
        self.status = "running"
        self.start = time.monotonic()
        self.seconds = seconds

    @property
    def left(self) -> float:
        """Seconds until its time is over."""
        return self.start + self.seconds - time.monotonic()

    def add(self, name: str, **numbers: Any) -> None:
        """Adds a line of the table, and writes all down."""
        self.rows.append({"name": name, **numbers})
        print(f"    {name}: {', '.join(f'{key} {cell(value)}' for key, value in numbers.items())}", flush=True)
        self.report.write()

    def save(self, name: str, text: str) -> None:
        """Writes a text beside the results."""
        write_atomically(self.report.out / name, text)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A measurement whose failure is recorded, with its traceback, and does not end the part."""
        try:
            yield
        except Exception as error:
            self.errors[name] = traceback.format_exc()
            self.add(name, failed=f"{type(error).__name__}: {error}".splitlines()[0][:160])
        finally:
            free_memory()

    def run(self, measure: Callable[..., None], **options: Any) -> None:
        """Calls measure(self, **options) until its time is over; whatever happens, what has been measured is written down."""
        try:
            with time_limit(self.seconds):
                measure(self, **options)
            self.status = "failed" if self.errors else "done"
        except OutOfTime:
            self.status = "out of time"
        except Exception:
            self.errors["part"] = traceback.format_exc()
            self.status = "failed"
        self.seconds = time.monotonic() - self.start
        free_memory()
        self.report.write()

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "status": self.status, "seconds": round(self.seconds, 1), "rows": self.rows, "errors": self.errors}

    def markdown(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [f"{self.status}, {self.seconds:.0f} s", ""]
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(cell(row.get(key)) for key in columns)} |" for row in self.rows]
        for name, error in self.errors.items():
            lines += ["", f"{name} failed:", "", *(f"    {line}" for line in error.splitlines())]
        return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A number, an interval (median, low, high), a list or a text, as a cell of a Markdown table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and len(value) == 3 and all(isinstance(x, float) for x in value):
        return "{:.3f} ({:.3f} … {:.3f})".format(*value)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
