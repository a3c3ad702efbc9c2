"""A run's numbers on a live page, beside TensorBoard's: trackio or Weights & Biases, whichever the user has installed.

Both know a run of the project `ddil` by more than its directory's name, which a comparison gives to one run of every budget:
`tracking_id` in the run directory, drawn at the first start, goes to wandb as its id, and behind the name for both.
trackio keeps every line it is sent, so those that a resume writes again are there twice.
"""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import Any, Literal

from ddil_agents.training.checkpoint import write_atomically

Tracker = Literal["none", "trackio", "wandb"]


def check_tracker(tracker: Tracker) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        ValueError: so.
    """
    if tracker != "none":
        try:
            importlib.import_module(tracker)
        except ImportError as error:
            raise ValueError(
                f"track={tracker}: {error}; pip install {tracker}, or leave track out: TensorBoard is always written"
            ) from error


def start(tracker: Tracker, out: Path, config: dict[str, Any]) -> Any:
    """A tracker's run in the project `ddil`, taken up again by a resume of the run directory; None for `none`.

    Raises:
        OSError: the directory's `tracking_id` cannot be written.
    """
    if tracker == "none":
        return None
    path = out / "tracking_id"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(6))  # of the system's randomness: a seeded run draws the same with and without
    key = path.read_text().strip()
    own = {"id": key} if tracker == "wandb" else {}  # trackio resumes by name
    name = f"{out.resolve().name}-{key}"
    return importlib.import_module(tracker).init(project="ddil", name=name, config=config, resume="allow", **own)
