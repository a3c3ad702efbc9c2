"""Processes that die at a chosen moment, and all of a run that does not depend on the clock."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddil_agents.training.metrics import read_metrics

ARGV = shlex.split(
    "--env env.yaml --num_updates 24 --teacher_steps 8 --batch_size 16 --collect_size 30 --updates_per_collect 5 --capacity 64 "
    "--prioritised true --p_expert .3 --beta.schedule linear --log_every 3 --checkpoint_every 7 --evaluate.n 20 --evaluate.n_action 5 "
    "--student '{width: 16}'"
)  # checkpoints at 7, 14, 21 and 24; lines at every 3 and at those


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, n: int, instead: Callable[..., Any], applies: Callable[..., bool] = lambda *_: True) -> None:
    """Calls `instead(original, *args)` in place of the n-th call of owner.name whose arguments apply."""
    original, calls = getattr(owner, name), [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        if applies(*args):
            calls[0] += 1
            if calls[0] == n:
                return instead(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def before(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    die()


def after(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    die()


def is_checkpoint(source: Any, target: Any) -> bool:
    return Path(target).name.startswith("step_")


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that does not depend on the clock."""
    result = json.loads((run / "result.json").read_text())
    rows = read_metrics(run / "metrics.jsonl")
    clock = ("seconds", "nfe_per_second", "train_seconds")
    return {
        "rows": [{k: v for k, v in row.items() if k not in clock} for row in rows],
        "lines": len((run / "metrics.jsonl").read_text().splitlines()),
        "models": {name: {k: v for k, v in model.items() if k not in clock} for name, model in result["models"].items()},
        "nfe": (result["teacher_nfe"], result["student_nfe"]),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("step_*"))[-2:],  # a kill may leave an old one
        "config": (run / "config.yaml").read_text(),
    }
