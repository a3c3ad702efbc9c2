"""Finds a pipeline's folder: a path, the hub's cache or the hub; and says what to do with files that are no such folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # owner/name
ADAPTER_KEYS = ("lora", "hada_", "lokr_", ".base_layer.", ".dora_scale")  # parts of the names of an adapter's tensors
INDEX = "model_index.json"


def locate(model: str, pipeline: str, patterns: list[str], lacking: Callable[[Path], list[str]], local_files_only: bool = False) -> Path:
    """The folder of a pipeline: `model` itself, or a hub id's snapshot.

    The hub's cache is looked up first, so that a rerun reads the same weights; files that it lacks are fetched. An unreachable hub is
    given up after seconds.

    Args:
        model: A folder or a hub id.
        pipeline: Name of the pipeline's class, for the messages.
        patterns: The files to fetch.
        lacking: The files that a snapshot lacks.
        local_files_only: Whether the hub is never asked.

    Raises:
        ValueError: `model` is no folder, and neither the cache nor the hub has it, or not all of it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(how_to_convert(folder, pipeline))
    cure = f"pass --env.model PATH to a folder that holds {INDEX} (of a run, write it as env.model into its config.yaml)"
    if not re.fullmatch(HUB_ID, model):
        raise ValueError(f"no weights: there is no folder {folder.absolute()}; {cure}, or a hub id such as owner/name")
    absent = f"is neither a folder ({folder.absolute()}) nor in the hub's cache ({constants.HF_HUB_CACHE})"
    try:
        cached = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if not (missing := lacking(cached)):
            return cached
        absent = f"is in the hub's cache without {', '.join(missing)} ({cached})"
    except LocalEntryNotFoundError:
        pass
    cause: Exception | None = None
    if local_files_only or constants.HF_HUB_OFFLINE:
        hub = "the hub was not asked (" + ("local_files_only" if local_files_only else "HF_HUB_OFFLINE is set") + ")"
    else:
        try:
            model_info(model, timeout=3)  # one quick request first: the download itself would retry for minutes
            return Path(snapshot_download(model, allow_patterns=patterns))
        except Exception as error:  # the errors of requests, httpx or httpx2, depending on the hub client's version
            cause, hub = error, f"the hub {constants.ENDPOINT} did not give it ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    raise ValueError(
        f"no weights: {model!r} {absent}, and {hub}; {cure}, or run `hf download {model}` on a machine with a network"
    ) from cause


def how_to_convert(path: Path, pipeline: str) -> str:
    """What to run to make a pipeline's folder of one file, or of a folder that holds an adapter; the text of an error."""
    file = path if path.is_file() else next(iter(sorted(path.glob("*.safetensors"))), path)
    new = file.parent / f"{file.stem}-folder"
    if any(part in key for key in tensor_names(file) for part in ADAPTER_KEYS):
        load = f"p = P.from_pretrained('BASE'); p.load_lora_weights({str(file)!r}); p.fuse_lora(); p.unload_lora_weights()"
        return (
            f"{file} holds adapters (LoRA) and no model; fuse them into the model BASE that they were trained over, and pass "
            f"--env.model {new}: {_python(pipeline, f'{load}; p.save_pretrained({str(new)!r})')}"
        )
    if file.suffix not in (".safetensors", ".ckpt"):
        return f"{path} is no folder; pass the pipeline's own folder, which holds {INDEX}"
    pickled = "which is a pickle and can run any code: do this only if you trust it. " if file.suffix == ".ckpt" else ""
    return (
        f"{file} is a model of one file, {pickled}convert it into a folder, see that prediction_type and rescale_betas_zero_snr in "
        f"scheduler/scheduler_config.json are the model's, which such a file need not say, and pass --env.model {new}: "
        f"{_python(pipeline, f'P.from_single_file({str(file)!r}).save_pretrained({str(new)!r})')}"
    )


def _python(pipeline: str, code: str) -> str:
    quoted = re.sub(r'(["$`\\])', r"\\\1", code)  # as a shell reads a text between double quotes
    return f'python -c "from diffusers import {pipeline} as P; {quoted}"'


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, sorted; none for another or a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())
    except (SafetensorError, OSError):
        return []


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: the file is absent or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); a pipeline's folder is what diffusers' save_pretrained writes") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch it again")
    return value
