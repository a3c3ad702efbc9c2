"""Demonstrations from local Minari datasets (Younis et al. 2024), the offline datasets of Gymnasium environments."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor


def read_demonstrations(
    dataset_id: str, env_id: str, action_shape: tuple[int, ...], observation_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads the episodes of a local dataset; nothing is downloaded. Those without an action are left out, and counted in a warning.

    Args:
        dataset_id: As Minari names it, such as `me/landings-v0`; it looks in MINARI_DATASETS_PATH, or in ~/.minari/datasets.
        env_id: The environment that the demonstrations must be of.
        action_shape, observation_shape: Of one action and of one observation.

    Returns:
        Observations (m, *observation_shape), the actions taken there (m, *action_shape), in [−1, 1] of the environment's bounds, and their
        episodes (m,), from 0 on.

    Raises:
        ImportError: Minari is not installed.
        ValueError: there is no such dataset, or it is of another environment, of other spaces, empty or not finite.
    """
    try:
        import minari
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise ImportError(f"data={dataset_id!r} is a Minari dataset: pip install 'ddil[worlds]'") from error
    try:
        dataset = minari.load_dataset(dataset_id, download=False)
    except (ValueError, OSError) as error:
        found = "cannot be read" if (get_dataset_path(dataset_id) / "data").exists() else "is not there"
        raise ValueError(
            f"data={dataset_id!r}: the dataset {found} in {get_dataset_path()}; MINARI_DATASETS_PATH names another folder, and "
            f"`minari download {dataset_id}` fetches a published one"
        ) from error
    recorded = None if dataset.env_spec is None else dataset.env_spec.id
    if recorded is not None and recorded != env_id:
        raise ValueError(f"data={dataset_id!r} was recorded in {recorded}; need demonstrations of {env_id}")
    of = {"action": (dataset.action_space, action_shape), "observation": (dataset.observation_space, observation_shape)}
    for name, (space, shape) in of.items():
        if not isinstance(space, spaces.Box) or space.shape != shape:
            raise ValueError(f"data={dataset_id!r} has {name}s in {space}; {env_id} needs a Box of shape {shape} here")
    box = dataset.action_space
    if not np.isfinite([box.low, box.high]).all():
        raise ValueError(f"data={dataset_id!r} has unbounded actions, {box}; record it in an environment with bounds")
    observations: list[Any] = []
    actions: list[Any] = []
    episodes: list[Any] = []
    empty = 0
    for episode in dataset.iterate_episodes():
        taken = np.asarray(episode.actions, np.float32)
        if not len(taken):
            empty += 1
            continue
        observations.append(np.asarray(episode.observations, np.float32)[: len(taken)])  # without the one after the last action
        actions.append(2 * (taken - box.low) / (box.high - box.low) - 1)
        episodes.append(np.full(len(taken), len(episodes)))
    if not episodes:
        raise ValueError(f"data={dataset_id!r} has no episode with an action")
    if empty:
        warnings.warn(f"data={dataset_id!r}: {empty} episodes without an action are left out", stacklevel=2)
    c, a, e = (torch.from_numpy(np.concatenate(parts)) for parts in (observations, actions, episodes))
    if not bool(torch.isfinite(c).all() and torch.isfinite(a).all()):
        raise ValueError(f"data={dataset_id!r} holds observations or actions that are not finite")
    return c.float(), a.float(), e.long()
