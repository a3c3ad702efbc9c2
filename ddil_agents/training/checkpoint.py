"""Writes and reads checkpoints: networks, optimisers, the averaged student, buffer, random streams and counters.

A checkpoint is written under another name, flushed to the disk and then renamed, so that a run that is killed at any moment, or finds the
disk full, leaves only complete checkpoints. A damaged checkpoint is an error; an older one is never loaded in its place.

A checkpoint is a folder `step_00000500/` of these files:

    manifest.json           step, agent (its name), config, expert (its identity), sha256 of state.pt, and with several processes
                            `ranks`, the SHA-256 of each rank's file
    state.pt                the state below, read with weights_only
    rank_0001.pt, …         with several processes, the keys of another rank whose values differ from the main rank's (`PER_RANK`)

The state, as `Trainer.state_dict` and `TrainedAgent.state_dict` make it:

    step                    updates so far
    horizon                 updates at the end of training, which the schedules of learning rate and β refer to
    gradient_accumulation   parts of a batch; more than the config's after a batch was halved to save memory
    trainables              of each network in training, by name: network (weights), optimizer (moments), and of its learning rate
                            last_epoch (steps so far), horizon (steps in all), last_learning_rate
    ema                     the averaged student: its weights, and n_averaged, the steps so far
    scaler                  the loss scale of fp16; else None
    nfe                     teacher and student forwards so far
    random, random_cuda     torch's global generators
    callbacks               of each callback that keeps a state, by name
    buffer                  build (capacities and settings), states, writer (ring positions), sampler (priorities), generator
    collector               streams (random streams by name), owed (`Collector.counts`), world_steps and unlabelled (states) in a world
    adaptive_shares         of the schedule `adaptive`: exponents and step; absent with another
    support                 the calibrated quantiles that estimates are projected onto; None without

What lies beside the checkpoints in a run directory is in training/metrics.py (metrics.jsonl, support.json).
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

NUM_KEPT = 2  # checkpoints of a run that are kept
PER_RANK = ("buffer", "collector", "nfe", "random", "random_cuda")  # keys of an agent's state whose values differ between processes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error codes of a full disk, quota or file size limit
MAY_DIFFER_ON_RESUME = {"halve_batch_on_oom"}  # settings that a resumed run may change: they depend on the machine


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns an error of the disk inside the block, in whatever form a library raises it, into one that names the path.

    Raises:
        OSError: writing failed; with the system's error code.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = _errno_of(error)
        if code is None:
            raise
        cure = "; make room and start it again, a training with --resume: what has been saved is whole" if code in DISK_FULL else ""
        raise OSError(code, f"cannot write {path}: {os.strerror(code)}{cure}") from error


def _errno_of(error: BaseException | None) -> int | None:
    """The system's error code of an error or of its cause; safetensors and shutil give it only in their message."""
    while error is not None:
        match = re.search(r"(?:\[Errno |os error )(\d+)", str(error)) if isinstance(error, OSError | SafetensorError) else None
        if match:
            return int(match[1])
        error = error.__context__
    return None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all. A link is followed; what is no regular file, such as a pipe, is written to.

    Raises:
        OSError: it was not written; the message names the file.
    """
    data, file = content.encode() if isinstance(content, str) else content, path.resolve()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")  # a name per process, because two runs may write the same file
    with explain_write_errors(path):
        if not is_regular(path):
            with path.open("ab") as stream:  # /dev/stdout may be a file that holds what was printed
                stream.write(data)
            return
        try:
            partial.write_bytes(data)
            _flush(partial)
            os.replace(partial, file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def is_regular(path: Path) -> bool:
    """Whether a path is of a regular file, or of one that is still to be: neither a device nor a pipe, nor a process's open file."""
    of_system = any(path.absolute().is_relative_to(folder) for folder in ("/dev", "/proc"))
    return not of_system and (path.is_file() or not path.exists())


@contextmanager
def folder_atomically(final: Path) -> Iterator[Path]:
    """Yields a folder to fill, which replaces `final` at the end of the block, completely or not at all.

    Raises:
        OSError: it was not written; the message names the folder.
    """
    partial = final.with_name(f".{final.name}.partial")
    with explain_write_errors(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.rglob("*"):
                _flush(path)
            _move_into_place(partial, final)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # frees its space
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(agent: TrainedAgent, directory: Path) -> Path:
    """Writes the checkpoint `directory/step_N` and removes all but the newest two; every rank needs to call it.

    Returns:
        The checkpoint's path.

    Raises:
        OSError: it was not written; earlier checkpoints remain.
    """
    final = directory / f"step_{agent.step:08d}"
    partial = directory / f".{final.name}.partial"
    try:
        with ranks.sync_errors(), explain_write_errors(partial):
            if ranks.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with ranks.sync_errors(), explain_write_errors(final):
            state = agent.trainer.state_dict()
            path = partial / _rank_file(ranks.rank())
            with path.open("wb") as file:  # with a path instead of a file torch.save would not say why it failed
                torch.save(state if ranks.is_main() else {key: state[key] for key in PER_RANK}, file)
            _flush(path)
            digest = _sha256(path)
        digests = ranks.all_gather(digest)
        with ranks.sync_errors(), explain_write_errors(final):
            if ranks.is_main():
                manifest = {"step": agent.step, "agent": agent.name, "sha256": digest, "config": agent.config_dict()}
                manifest["expert"] = agent.expert.identity()
                if len(digests) > 1:
                    manifest["ranks"] = digests[1:]
                (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
                _flush(partial / "manifest.json")
                _move_into_place(partial, final)
                for old in checkpoints(directory)[:-NUM_KEPT]:
                    hidden = directory / f".{old.name}.stale"  # a kill can interrupt the removal, but not the renaming
                    os.replace(old, hidden)
                    shutil.rmtree(hidden)
    except Exception:
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _rank_file(rank: int) -> str:
    """Name of the file with a rank's part of a checkpoint."""
    return f"rank_{rank:04d}.pt" if rank else "state.pt"


def _move_into_place(partial: Path, final: Path) -> None:
    """Renames a folder whose files are flushed to its final name."""
    directory = final.parent
    _flush(partial)
    stale = directory / f".{final.name}.stale"
    if final.exists():  # moved aside first, because a kill can interrupt the removal, but not the renaming
        shutil.rmtree(stale, ignore_errors=True)
        os.replace(final, stale)
    os.replace(partial, final)
    _flush(directory)
    shutil.rmtree(stale, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(directory: Path) -> list[Path]:
    """Lists the checkpoints in a directory, oldest first."""
    return sorted(directory.glob("step_*"))


def load_checkpoint(agent: TrainedAgent, directory: Path) -> None:
    """Loads a checkpoint, or the newest in a folder of checkpoints, into an agent; every rank needs to call it.

    Raises:
        ValueError: there is none, or it is damaged, or of another agent, config, version or number of processes.
    """
    with ranks.sync_errors():
        path, state = _read_checkpoint(agent, directory)
        try:
            agent.trainer.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:  # a key is missing, or a value has another shape
            raise _version_error(path, repr(error)) from error


def _version_error(path: Path, how: str) -> ValueError:
    return ValueError(f"{path} was written by another version of ddil ({how}); go on with that version, or start a new run")


def _read_checkpoint(agent: TrainedAgent, directory: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the path of the checkpoint to load, and this rank's state in it."""
    found = [directory] if (directory / "manifest.json").is_file() else checkpoints(directory)
    if not found:
        raise ValueError(f"no checkpoint in {directory}")
    path = found[-1]
    cure = f"remove {path} to resume from the one before it" if len(found) > 1 else "start a new run"
    parts = dict.fromkeys([0, ranks.rank()])  # the main rank's part, and over it this rank's own
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        digests, name, saved_config = [manifest["sha256"], *manifest.get("ranks", [])], manifest["agent"], manifest["config"]
        damaged = [_rank_file(part) for part in parts if part < len(digests) and _sha256(path / _rank_file(part)) != digests[part]]
        config = json.loads(json.dumps(agent.config_dict()))
        unknown = sorted(config.keys() ^ saved_config.keys()) if name == agent.name else []
        different = sorted(key for key in config.keys() - MAY_DIFFER_ON_RESUME if config[key] != saved_config.get(key))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {cure}") from error
    if len(digests) != ranks.world_size():
        raise ValueError(
            f"{path} is of {len(digests)} processes, each with states and random numbers of its own, and here are {ranks.world_size()}; "
            f"go on with {len(digests)} (torchrun --nproc_per_node), or start a new run"
        )
    if damaged:
        raise ValueError(f"{path}/{damaged[0]} is damaged: its SHA-256 is not the manifest's; {cure}")
    if unknown:
        raise _version_error(path, f"only one of them has the setting {unknown[0]}")
    if name != agent.name or different:
        raise ValueError(
            f"{path} is of {name} with another config; it differs in: {', '.join(different) or 'the agent'}. "
            "Load it into an agent built with the same config."
        )
    check_same_expert(path, manifest.get("expert"), agent.expert.identity())
    state: dict[str, Any] = {}
    for part in parts:
        try:  # with several ranks on a machine, mmap lets them share the memory of the main rank's part
            state |= torch.load(path / _rank_file(part), weights_only=True, map_location="cpu", mmap=ranks.world_size() > 1)
        except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path / _rank_file(part)} holds more than tensors and plain values, and is not read; {cure}") from error
    return path, state


def check_same_expert(path: Path, saved: dict[str, Any] | None, expert: dict[str, Any]) -> None:
    """Refuses an expert that differs from the one that a run began with.

    Args:
        path: What was trained on that one, for the message.
        saved: The identity of that one, which may lack entries that an earlier version did not write; None if it is not known.
        expert: The identity of the expert that is here.

    Raises:
        ValueError: an entry differs.
    """
    here = json.loads(json.dumps(expert))
    for key, value in sorted((saved or {}).items()):
        if here.get(key) != value:
            raise ValueError(
                f"{path} was trained on another expert: its {key} is {value!r}, here {here.get(key)!r}; labels of both would be mixed: "
                "restore the run's env settings, model and data, or start a new run"
            )


def write_support(directory: Path, support: Support, teacher_nfe: int) -> None:
    """Writes support.json: a calibrated support, and the number of teacher forwards of the calibration."""
    write_atomically(directory / "support.json", json.dumps({**support_to_dict(support), "teacher_nfe": teacher_nfe}))


def read_support(directory: Path) -> tuple[Support | None, int]:
    """Reads support.json, a support and its number of teacher forwards; returns None and 0 if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / "support.json"
    if not path.is_file():
        return None, 0
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        nfe = int(stored.pop("teacher_nfe"))
        return support_from_dict(stored), nfe
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot read {path} ({error}); remove it, and the support is calibrated anew") from error
