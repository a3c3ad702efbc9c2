"""Exact, atomic checkpoints.

A checkpoint is a folder `step_00000500/` of `state.pt`, read with weights_only, and `manifest.json`, which holds the
file's SHA-256. It is written beside its place, flushed to the disk and renamed there, so a run that is killed at any moment, or
finds the disk full, leaves only whole checkpoints; a damaged one is refused by its checksum, and never passed over for an older one.
Of a run on several processes `state.pt` is the main one's, and each other's own states and streams are in `rank_0001.pt`, … beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ddil_agents.devices import ranks
from ddil_env.support import Support, support_from_dict, support_to_dict

if TYPE_CHECKING:
    from ddil_agents.training.trained_agent import TrainedAgent

KEEP = 2  # checkpoints of a run that stay on the disk
OWN = ("buffer", "collector", "nfe", "random")  # of a learner's state, what differs by process
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a disk, a quota or a limit that is reached
MAY_DIFFER = {"halve_batch_on_oom"}  # settings that a run may go on without: they are of the machine


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the path in an error of the disk, however the library beneath has put it.

    Raises:
        OSError: so, with the system's number.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = _code(error)
        if code is None:
            raise
        cure = "; make room and go on with --resume: what has been saved is whole" if code in FULL else ""
        raise OSError(code, f"cannot write {path}: {os.strerror(code)}{cure}") from error


def _code(error: BaseException | None) -> int | None:
    """The system's number of an error, or of the one that it hides; safetensors and shutil give it in words."""
    while error is not None:
        said = re.search(r"(?:\[Errno |os error )(\d+)", str(error)) if isinstance(error, OSError | SafetensorError) else None
        if said:
            return int(said[1])
        error = error.__context__
    return None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file in whole or not at all.

    Raises:
        OSError: not at all; names it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two runs may write one file
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            _flush(partial)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def folder_atomically(final: Path) -> Iterator[Path]:
    """A folder to fill, which then takes its place in whole, over the one that is there; or not at all.

    Raises:
        OSError: not at all; names it.
    """
    partial = final.with_name(f".{final.name}.partial")
    with writing(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.rglob("*"):
                _flush(path)
            _put(partial, final)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # its room, too
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(agent: TrainedAgent, directory: Path) -> Path:
    """Writes `directory/step_N` and removes all but the newest two; returns its path. Every rank has to call it.

    Raises:
        OSError: it cannot be written; those before it remain.
    """
    final = directory / f"step_{agent.step:08d}"
    partial = directory / f".{final.name}.partial"
    try:
        with ranks.together(), writing(partial):
            if ranks.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with ranks.together(), writing(final):
            state = agent.trainer.state_dict()
            own = partial / _file(ranks.rank())
            with own.open("wb") as file:  # by its path torch.save would not say why it failed
                torch.save(state if ranks.is_main() else {key: state[key] for key in OWN}, file)
            _flush(own)
            digest = _sha256(own)
        digests = ranks.gathered(digest)
        with ranks.together(), writing(final):
            if ranks.is_main():
                manifest = {"step": agent.step, "agent": agent.name, "sha256": digest, "config": agent.config_dict()}
                if len(digests) > 1:
                    manifest["ranks"] = digests[1:]
                (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
                _flush(partial / "manifest.json")
                _put(partial, final)
                for old in checkpoints(directory)[:-KEEP]:
                    hidden = directory / f".{old.name}.stale"  # a removal can be cut short, a renaming cannot
                    os.replace(old, hidden)
                    shutil.rmtree(hidden)
    except Exception:
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _file(rank: int) -> str:
    """A rank's part of a checkpoint."""
    return f"rank_{rank:04d}.pt" if rank else "state.pt"


def _put(partial: Path, final: Path) -> None:
    """Moves a folder whose files are on the disk to its place."""
    directory = final.parent
    _flush(partial)
    stale = directory / f".{final.name}.stale"
    if final.exists():  # one is there already; moved aside whole, since a removal can be cut short
        shutil.rmtree(stale, ignore_errors=True)
        os.replace(final, stale)
    os.replace(partial, final)
    _flush(directory)
    shutil.rmtree(stale, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in a directory, oldest first."""
    return sorted(directory.glob("step_*"))


def load_checkpoint(agent: TrainedAgent, directory: Path) -> None:
    """Restores the learner from a checkpoint folder, or from the newest in a folder of them. Every rank has to call it.

    Raises:
        ValueError: none there, a damaged one, or one of another agent, config, version or number of processes.
    """
    with ranks.together():
        path, state = _read(agent, directory)
        try:
            agent.trainer.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:  # what it lacks, or has of another shape
            raise _of_another_version(path, repr(error)) from error


def _of_another_version(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} was written by another version of ddil ({how}); go on with that version, or start a new run")


def _read(agent: TrainedAgent, directory: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that is taken up, and this rank's state in it."""
    found = [directory] if (directory / "manifest.json").is_file() else checkpoints(directory)
    if not found:
        raise ValueError(f"no checkpoint in {directory}")
    path = found[-1]
    cure = f"remove {path} to resume from the one before it" if len(found) > 1 else "start a new run"
    parts = dict.fromkeys([0, ranks.rank()])  # the main rank's, and what is this one's own over it
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        digests, name, theirs = [manifest["sha256"], *manifest.get("ranks", [])], manifest["agent"], manifest["config"]
        damaged = [_file(part) for part in parts if part < len(digests) and _sha256(path / _file(part)) != digests[part]]
        ours = json.loads(json.dumps(agent.config_dict()))
        strange = sorted(ours.keys() ^ theirs.keys()) if name == agent.name else []
        different = sorted(key for key in ours.keys() - MAY_DIFFER if ours[key] != theirs.get(key))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {cure}") from error
    if len(digests) != ranks.world():
        raise ValueError(
            f"{path} is of {len(digests)} processes, each with states and random numbers of its own, and here are {ranks.world()}; "
            f"go on with {len(digests)} (torchrun --nproc_per_node), or start a new run"
        )
    if damaged:
        raise ValueError(f"{path}/{damaged[0]} is damaged: its SHA-256 is not the manifest's; {cure}")
    if strange:
        raise _of_another_version(path, f"{strange[0]} is a setting in one of them alone")
    if name != agent.name or different:
        raise ValueError(
            f"{path} is of {name} with another config; it differs in: {', '.join(different) or 'the agent'}. "
            "Load it into a learner built with the same config."
        )
    state: dict[str, Any] = {}
    for part in parts:
        try:  # Ranks of one machine read the main one's part through one mapping.
            state |= torch.load(path / _file(part), weights_only=True, map_location="cpu", mmap=ranks.world() > 1)
        except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path / _file(part)} holds more than tensors and plain values, and is not read; {cure}") from error
    return path, state


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
