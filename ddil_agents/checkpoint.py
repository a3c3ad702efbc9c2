"""Exact, atomic checkpoints.

A checkpoint is a folder `step_00000500/` of `state.pt`, read with weights_only, and `manifest.json`, which holds the
file's SHA-256. It is written beside its place, flushed to the disk and renamed there, so a run that is killed at any moment
leaves only whole checkpoints; a damaged one is refused by its checksum. Of a run on several processes `state.pt` is the main one's,
and each other's own states and streams are in `rank_0001.pt`, … beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddil_agents import ranks
from ddil_env.support import Support, support_from_dict, support_to_dict

if TYPE_CHECKING:
    from ddil_agents.learner import Learner

KEEP = 2  # checkpoints of a run that stay on the disk
OWN = ("buffer", "collector", "nfe", "random")  # of a learner's state, what differs by process


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file in whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two runs may write one file
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(learner: Learner, directory: Path) -> Path:
    """Writes `directory/step_N` and removes all but the newest two; returns its path. Every rank has to call it."""
    final = directory / f"step_{learner.step:08d}"
    partial = directory / f".{final.name}.partial"
    with ranks.together():
        if ranks.is_main():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
    with ranks.together():
        state = learner.state_dict()
        own = partial / _file(ranks.rank())
        torch.save(state if ranks.is_main() else {key: state[key] for key in OWN}, own)
        _flush(own)
        digest = _sha256(own)
    digests = ranks.gathered(digest)
    with ranks.together():
        if ranks.is_main():
            manifest = {"step": learner.step, "agent": learner.name, "sha256": digest, "config": learner.config_dict()}
            if len(digests) > 1:
                manifest["ranks"] = digests[1:]
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _put(partial, final)
    return final


def _file(rank: int) -> str:
    """A rank's part of a checkpoint."""
    return f"rank_{rank:04d}.pt" if rank else "state.pt"


def _put(partial: Path, final: Path) -> None:
    """Flushes a checkpoint, moves it to its place and removes the old ones."""
    directory = final.parent
    for path in (partial / "manifest.json", partial):
        _flush(path)
    stale = directory / f".{final.name}.stale"
    if final.exists():  # the same step again; moved aside whole, since a removal can be cut short
        shutil.rmtree(stale, ignore_errors=True)
        os.replace(final, stale)
    os.replace(partial, final)
    _flush(directory)
    shutil.rmtree(stale, ignore_errors=True)
    for old in checkpoints(directory)[:-KEEP]:
        hidden = directory / f".{old.name}.stale"  # a removal can be cut short, a renaming cannot
        os.replace(old, hidden)
        shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in a directory, oldest first."""
    return sorted(directory.glob("step_*"))


def load_checkpoint(learner: Learner, directory: Path) -> None:
    """Restores the learner from a checkpoint folder, or from the newest in a folder of them. Every rank has to call it.

    Raises:
        ValueError: none there, a damaged one, or one of another agent or config, or of another number of processes.
    """
    with ranks.together():
        learner.load_state_dict(_read(learner, directory))


def _read(learner: Learner, directory: Path) -> dict[str, Any]:
    """This rank's state in a checkpoint."""
    found = [directory] if (directory / "manifest.json").is_file() else checkpoints(directory)
    if not found:
        raise ValueError(f"no checkpoint in {directory}")
    path = found[-1]
    cure = f"remove {path} to resume from the one before it" if len(found) > 1 else "start a new run"
    parts = dict.fromkeys([0, ranks.rank()])  # the main rank's, and what is this one's own over it
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        digests, agent, theirs = [manifest["sha256"], *manifest.get("ranks", [])], manifest["agent"], manifest["config"]
        damaged = [_file(part) for part in parts if part < len(digests) and _sha256(path / _file(part)) != digests[part]]
        ours = json.loads(json.dumps(learner.config_dict()))
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {cure}") from error
    if len(digests) != ranks.world():
        raise ValueError(
            f"{path} is of {len(digests)} processes, each with states and random numbers of its own, and here are {ranks.world()}; "
            f"go on with {len(digests)} (torchrun --nproc_per_node), or start a new run"
        )
    if damaged:
        raise ValueError(f"{path}/{damaged[0]} is damaged: its SHA-256 is not the manifest's; {cure}")
    if agent != learner.name or different:
        raise ValueError(
            f"{path} is of {agent} with another config; it differs in: {', '.join(different) or 'the agent'}. "
            "Load it into a learner built with the same config."
        )
    state: dict[str, Any] = {}
    for part in parts:
        # Ranks of one machine read the main one's part through one mapping.
        state |= torch.load(path / _file(part), weights_only=True, map_location="cpu", mmap=ranks.world() > 1)
    return state


def write_support(directory: Path, support: Support, teacher_nfe: int) -> None:
    """Writes support.json: a calibrated support, and the expert forwards that the calibration took."""
    write_atomically(directory / "support.json", json.dumps({**support_to_dict(support), "teacher_nfe": teacher_nfe}))


def read_support(directory: Path) -> tuple[Support | None, int]:
    """What `write_support` wrote; None and 0 where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / "support.json"
    if not path.is_file():
        return None, 0
    try:
        stored = json.loads(path.read_text())
        nfe = int(stored.pop("teacher_nfe"))
        return support_from_dict(stored), nfe
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot read {path} ({error}); remove it, and the support is calibrated anew") from error
