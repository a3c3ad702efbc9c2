"""The cache of an evaluation: the folder in which finished batches, features and scores are stored, so that a killed evaluation continues.

The file of a model is named after a digest of how that model samples, so a file is read only for the model that it was computed for:

    settings.json                            the settings that all files of the folder were computed under
    NAME-DIGEST-00000.safetensors            a batch of samples: features, classes, scores, first trajectories, seconds (samples.py)
    NAME-DIGEST-lpips-000.json               LPIPS diversity of one condition's samples (samples.py)
    images-DIGEST-000000.safetensors         features of up to 1024 pictures of a folder, the reference of FID (quality.py)
    teacher@32-on-data-DIGEST-actions.safetensors       the teacher's actions on noised data (evaluator.py)
    teacher@4-beside-teacher@32-DIGEST-scores.json      the metrics of the teacher in few steps (evaluator.py)

Files of the teacher and of a folder lie in `Evaluation.store`/seedN if that is given; the runs of a comparison share them so. Features of
an expert's own data, which are the reference without a folder, are not kept but extracted anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddil_agents.training.checkpoint import write_atomically
from ddil_env import DdimPolicy, TimeGrid
from ddil_env.mdp import Kernel
from ddil_env.weights import read_tensors


def open_cache(folder: Path, settings: dict[str, Any]) -> Path:
    """Makes a cache folder, or opens one that was made under the same settings.

    Raises:
        ValueError: the folder was made under other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "settings.json", json.dumps(settings)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder} holds an evaluation of other settings; remove it, or choose another")
    write_atomically(path, text)
    return folder


def is_cacheable(policy: DdimPolicy) -> bool:
    """Whether `policy_digest` sees all that the policy does: not where a subclass overrides `act`."""
    return type(policy).act is DdimPolicy.act


@torch.no_grad()
def policy_digest(
    policy: DdimPolicy,
    grid: TimeGrid,
    kernel: Kernel,
    x: Tensor,
    c: Tensor | None,
    data_digest: tuple[str | None, ...],
    captions_digest: str | None,
) -> str:
    """Eight hex digits that tell two models of the same name apart: their weights, how they sample, the data and the captions.

    The weights enter through the predictions for a few states. The order of all inputs is fixed: another order gives other names, and
    every existing cache would be computed again.

    Args:
        policy: The model.
        grid: The times that it samples at.
        kernel: The transition that it samples with.
        x: States to predict for, (b, *sample_shape).
        c: Their condition ids, (b,), or None.
        data_digest: Digests of the data that samples are compared with.
        captions_digest: Digest of the captions.
    """
    predictions = []
    for t in grid.times[:-1][:2].unbind():  # two times, because some policies differ in all states but the first
        prediction = policy.predict(x, t.expand(len(x)), c, None)
        latent = prediction.projected(policy.support).latent(grid.times[-1:].expand(len(x)), policy.schedule)
        predictions.append(tensor_digest(latent))
    inputs = (grid.times.tolist(), kernel, policy.nfe_per_action, predictions, data_digest, captions_digest)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:8]


def tensor_digest(x: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def text_digest(texts: list[str]) -> str:
    """Twelve hex digits of a list of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def read_cached(path: Path | None, lost: str) -> dict[str, Tensor] | None:
    """Reads the tensors of a safetensors file of a cache; None where there is no such file or no cache.

    Args:
        path: The file; None where nothing is cached.
        lost: What is computed again if a damaged file is removed, such as `the batch is drawn`.

    Raises:
        ValueError: the file is damaged.
    """
    return read_tensors(path, f"remove it, and {lost} again") if path is not None and path.is_file() else None


def write_cached(path: Path | None, tensors: dict[str, Tensor]) -> None:
    """Writes tensors to a safetensors file of a cache, atomically; nothing where `path` is None."""
    if path is not None:
        write_atomically(path, save({key: value.cpu().contiguous() for key, value in tensors.items()}))


def read_or_compute(path: Path | None, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads numbers by name, or lists of them, from a JSON file of a cache; computes and writes them where there is no such file.

    Args:
        path: The file; None neither reads nor writes.
        compute: Returns the numbers.

    Raises:
        ValueError: the file is damaged.
    """
    if path is not None and path.is_file():
        return read_numbers(path)
    computed = compute()
    if path is not None:
        write_atomically(path, json.dumps(computed))
    return computed


def read_numbers(path: Path) -> dict[str, Any]:
    """Reads numbers by name, or lists of them, from a JSON file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(numbers, dict) or not all(map(_is_measured, numbers.values())):
            raise ValueError("not numbers by name")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and it is computed again") from error
    return numbers


def _is_measured(value: Any) -> bool:
    """Whether a value is a number, null, or a list or mapping of those."""
    if isinstance(value, dict | list):
        return all(map(_is_measured, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, int | float)
