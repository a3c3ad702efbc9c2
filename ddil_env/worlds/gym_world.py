"""Any Gymnasium environment with a Box action as a world: a sample is an action, or a chunk of actions; a condition the observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ddil_env.worlds.world import World


class GymWorld(World):
    """Environments of one kind, each stepped while its episode lasts.

    Actions are in [−1, 1], stretched to the environment's own bounds and clipped there. Observations are normalised and clipped: a
    student meets observations that no demonstration had.

    Args:
        env_id: The environment's id.
        num_worlds: How many of them.
        mean, std: Of the observations, (observation,) each, as the model was trained; default: 0 and 1.
        clip: Normalised observations are clipped to ± this.
        history: Observations in a condition, oldest first; at the start of an episode the first one is repeated.
        chunk: Actions in a sample. With 1 a sample is (action,), with more (chunk, action).
        execute: How many of a sample's actions are executed before the next sample (receding horizon).
        num_frames: Samples after which an episode is cut off; default: as many as the environment's own time limit takes.
        success: Sum of rewards from which on an episode is a success; default: the environment's own `reward_threshold`.
        device: Where conditions are put.
        options: Keyword arguments of `gymnasium.make`.

    Raises:
        ValueError: an environment that does not exist or lacks a package, that takes no Box of actions or gives no Box of observations, or
            without a time limit where `num_frames` is not given.
    """

    def __init__(
        self,
        env_id: str,
        num_worlds: int,
        *,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        clip: float = 5.0,
        history: int = 1,
        chunk: int = 1,
        execute: int = 1,
        num_frames: int | None = None,
        success: float | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        if num_worlds < 1:
            raise ValueError(f"num_worlds={num_worlds}: need at least 1")
        if not 1 <= execute <= chunk:
            raise ValueError(f"execute={execute}: need 1 to chunk={chunk} actions of each sample")
        try:
            self.envs = [gymnasium.make(env_id, **options) for _ in range(num_worlds)]
        except (gymnasium.error.Error, TypeError) as error:
            raise ValueError(f"cannot make {env_id!r}: {error}") from error
        first = self.envs[0]
        for name, space in (("action", first.action_space), ("observation", first.observation_space)):
            if not isinstance(space, spaces.Box):
                raise ValueError(f"{env_id!r} has {name}s in {space}; a world needs a Box of them, and for actions a continuous variant")
        limit = None if first.spec is None else first.spec.max_episode_steps
        if num_frames is None and limit is None:
            raise ValueError(f"{env_id!r} has no time limit, and its episodes might never end; pass num_frames")
        action, observation = cast(spaces.Box, first.action_space), cast(spaces.Box, first.observation_space)
        d, o = int(np.prod(action.shape)), int(np.prod(observation.shape))
        frames = -(-int(limit or 0) // execute) if num_frames is None else num_frames
        super().__init__(num_worlds, (d,) if chunk == 1 else (chunk, d), (history * o,), frames, device)
        self.low, self.high = action.low.reshape(-1), action.high.reshape(-1)
        if not bool(np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError(f"{env_id!r} has unbounded actions; wrap it in gymnasium.wrappers.RescaleAction, or give its actions bounds")
        self.action_shape, self.execute, self.history, self.clip = action.shape, execute, history, clip
        self.mean = np.zeros(o, np.float32) if mean is None else np.asarray(mean, np.float32)
        self.std = np.ones(o, np.float32) if std is None else np.asarray(std, np.float32)
        threshold = None if first.spec is None else first.spec.reward_threshold
        self.success = threshold if success is None else success
        self.observations = np.zeros((num_worlds, history, o), np.float32)

    def start(self, rows: list[int], generators: Sequence[torch.Generator]) -> Tensor:
        for row, generator in zip(rows, generators, strict=True):
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            observation, _ = self.envs[row].reset(seed=seed)
            self.observations[row] = self.normalise(np.asarray(observation, np.float32).reshape(-1))
        return self._conditions(rows)

    def advance(self, rows: list[int], x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = x_0.detach().cpu().numpy().reshape(len(rows), -1, len(self.low)).clip(-1, 1)  # (n, chunk, action)
        actions = self.low + (unit + 1) / 2 * (self.high - self.low)
        rewards, dones = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        for actions_now in actions.reshape(len(rows), -1, *self.action_shape).astype(np.float32).swapaxes(0, 1)[: self.execute]:
            running = np.flatnonzero(~dones)
            steps = [self.envs[rows[i]].step(actions_now[i]) for i in running]
            if not steps:
                break
            observations, reward, terminated, truncated, _ = zip(*steps, strict=True)
            at = [rows[i] for i in running]
            new = self.normalise(np.array(observations, np.float32).reshape(len(at), -1))
            self.observations[at] = np.concatenate([self.observations[at, 1:], new[:, None]], 1)
            rewards[running] += np.asarray(reward, np.float32)
            dones[running] = np.logical_or(terminated, truncated)
        return self._conditions(rows), torch.from_numpy(rewards), torch.from_numpy(dones)

    def normalise(self, observations: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(observations − mean) / std, clipped, (…, observation)."""
        return ((observations - self.mean) / self.std).clip(-self.clip, self.clip)

    def _conditions(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(self.observations[rows].reshape(len(rows), -1)).to(self.device)

    def succeeded(self, total_reward: Tensor) -> Tensor | None:
        return None if self.success is None else total_reward >= self.success

    @property
    def can_render(self) -> bool:
        return self.envs[0].render_mode is not None

    def render(self, row: int = 0) -> Tensor | None:
        picture = self.envs[row].render()
        return None if picture is None else torch.from_numpy(np.asarray(picture, np.uint8).copy())
