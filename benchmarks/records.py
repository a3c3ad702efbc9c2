"""The records of long benchmarks: a file for each run, and a file of lines that is committed, so that no run is made twice."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from ddil_agents.training.checkpoint import write_atomically

Key = tuple[str, str, int]  # a run: its cell, arm and seed
Records = dict[Key, dict[str, Any]]


class Task(Protocol):
    """The arms of one seed of one cell."""

    @property
    def cell(self) -> str: ...

    @property
    def seed(self) -> int: ...

    def place(self, arm: str) -> Path:
        """Where the record of an arm lies."""


def place_of(runs: Path, key: Key) -> Path:
    """Where the record of a run lies, in the folder of its cell."""
    cell, arm, seed = (str(x).replace(",", "").replace("'", "").replace(" ", "_") for x in key)
    return runs / cell / f"{arm}-s{seed}.json"


def key_of(record: dict[str, Any]) -> Key:
    return record["cell"], record["arm"], record["seed"]


def read_records(path: Path) -> Records:
    """The runs of a file of lines; none if there is no such file."""
    lines = map(json.loads, path.read_text().splitlines() if path.is_file() else ())
    return {key_of(line): line for line in lines}


def collect_records(runs: Path, kept: Path, check: Callable[[Records], None]) -> Records:
    """Reads the records of --runs and of the file that is kept, checks them, and writes all of them to that file."""
    found = (json.loads(path.read_text()) for path in sorted(runs.glob("*/*-s*.json")))
    records = read_records(kept) | {key_of(record): record for record in found}
    check(records)
    write_atomically(kept, "".join(json.dumps(record) + "\n" for _, record in sorted(records.items())))
    return records


def restore_records(records: Records, tasks: Iterable[Task]) -> int:
    """Writes the kept records where a run looks for them, so that none is run again; returns how many."""
    known, restored = {(task.cell, task.seed): task for task in tasks}, 0
    for (cell, arm, seed), record in records.items():
        task = known.get((cell, seed))
        if task is not None and not task.place(arm).is_file():
            task.place(arm).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(task.place(arm), json.dumps(record))
            restored += 1
    return restored


def run_tasks(
    run: Callable[[Any], None], tasks: Sequence[Task], runs: Path, kept: Path, check: Callable[[Records], None], jobs: int
) -> Records:
    """Runs what has no record yet, so many tasks at a time, and returns all records, those of earlier calls among them.

    Args:
        run: Writes a record for each arm of a task that has none; a function of a module, which other processes import.
        tasks: In the order in which they begin.
        runs, kept, check: As in `collect_records`.
        jobs: Processes.
    """
    print(f"{restore_records(collect_records(runs, kept, check), tasks)} records restored from {kept}", flush=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for number, ended in enumerate(as_completed(pool.submit(run, task) for task in tasks), 1):
            ended.result()
            print(f"{number} of {len(tasks)} seeds of cells, {len(collect_records(runs, kept, check))} runs", flush=True)
    return collect_records(runs, kept, check)
