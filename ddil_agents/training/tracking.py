"""Sends a run's metrics to an experiment tracker, trackio or Weights & Biases, beside TensorBoard.

Runs are in the project `ddil`. Because several runs of a comparison have directories of the same name, each run draws an id at its first
start and keeps it in the file `tracking_id` of its directory; the id is appended to the run's name, and is wandb's run id.
trackio keeps every line that it is sent: after a resume, lines that are logged a second time are there twice.
"""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import Any, Literal

from ddil_agents.training.checkpoint import write_atomically

Tracker = Literal["none", "trackio", "wandb"]


def check_tracker(tracker: Tracker) -> None:
    """Checks that a tracker is installed.

    Raises:
        ValueError: it is not.
    """
    if tracker != "none":
        try:
            importlib.import_module(tracker)
        except ImportError as error:
            raise ValueError(
                f"track={tracker}: {error}; pip install {tracker}, or leave track out: TensorBoard is always written"
            ) from error


def start_tracker(tracker: Tracker, out: Path, config: dict[str, Any]) -> Any:
    """Starts a run of the tracker, or continues that of the same run directory.

    Args:
        tracker: Which tracker.
        out: The run directory.
        config: The run's settings, for the tracker to show.

    Returns:
        The tracker's run; None for `none`.

    Raises:
        OSError: the file `tracking_id` cannot be written.
    """
    if tracker == "none":
        return None
    path = out / "tracking_id"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(6))  # not from the run's random streams, which a tracker must not change
    key = path.read_text(encoding="utf-8").strip()
    run_id = {"id": key} if tracker == "wandb" else {}  # trackio resumes by name
    name = f"{out.resolve().name}-{key}"
    return importlib.import_module(tracker).init(project="ddil", name=name, config=config, resume="allow", **run_id)
