"""A run's numbers on a live page, beside TensorBoard's: trackio or Weights & Biases, whichever the user has installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

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
    """A tracker's run in the project `ddil`, named after the run directory and taken up again by a resume; None for `none`."""
    if tracker == "none":
        return None
    return importlib.import_module(tracker).init(project="ddil", name=out.resolve().name, config=config, resume="allow")
