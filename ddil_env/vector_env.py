"""The diffusion MDP as a natively batched Gymnasium environment, in numpy or in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ddil_env.errors import BROKEN_ACTIONS, check_choice, check_finite, check_whole
from ddil_env.expert import Expert
from ddil_env.gym_env import (
    apply_reset_options,
    check_render_mode,
    load_env_expert,
    make_spaces,
    render_modes_of,
    render_states,
    to_observation,
    to_real,
)
from ddil_env.mdp import DenoisingMDP, Kernel, Reward, State
from ddil_env.time_grid import GridKind


class DenoisingVectorEnv(VectorEnv[dict[str, Any], Any, Any]):
    """A batch of diffusion MDPs in one process: all environments make a step in one batched network call.

    All three autoreset modes are supported. `reset(options={"reset_mask": mask})` restarts some of the environments.

    Args:
        expert, num_steps, render_mode, action_bound, device, expert_kwargs: As in DenoisingGymEnv.
        kernel, reward, substeps, guidance_scale, grid: As in DenoisingMDP.
        num_envs: Size of the batch.
        autoreset_mode: `NextStep`, `SameStep` or `Disabled`, or gymnasium's enum.
        output: `numpy`, or `torch` to keep every observation, reward and flag on the device. Gymnasium's wrappers that compute with
            rewards and flags, such as RecordEpisodeStatistics and NormalizeReward, do so in numpy, and raise a TypeError over `torch`:
            use `numpy` inside them, and Gymnasium's NumpyToTorch around them for tensors.
    """

    def __init__(
        self,
        expert: Expert | str,
        num_envs: int = 1,
        num_steps: int = 4,
        render_mode: str | None = None,
        action_bound: float | None = None,
        device: str | None = None,
        expert_kwargs: dict[str, Any] | None = None,
        kernel: Kernel = "ddim",
        reward: Reward = "none",
        substeps: int = 1,
        guidance_scale: float | None = None,
        grid: GridKind = "linspace",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        output: Literal["numpy", "torch"] = "numpy",
    ) -> None:
        check_whole("num_envs", num_envs, 0)
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: need at least one environment")
        check_choice("output", output, ("numpy", "torch"))
        check_choice("autoreset_mode", getattr(autoreset_mode, "value", autoreset_mode), [mode.value for mode in AutoresetMode])
        self.expert = load_env_expert(expert, device, expert_kwargs)
        self.mdp = DenoisingMDP(
            self.expert,
            num_steps,
            kernel=kernel,
            reward=reward,
            substeps=substeps,
            guidance_scale=guidance_scale,
            grid=grid,
            world=self.expert.make_world(num_envs),
        )
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.output = output
        modes = render_modes_of(self.mdp)
        check_render_mode(render_mode, modes)
        self.render_mode = render_mode
        self.metadata = {"render_modes": modes, "render_fps": 4, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = make_spaces(self.expert, action_bound)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[torch.Generator] = []
        self._state: State | None = None
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.mdp.device)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed if isinstance(seed, int) else None)
        self._seed(seed)
        options = options or {}
        if "reset_mask" in options:
            mask = torch.as_tensor(options["reset_mask"], device=self.mdp.device)
            if mask.dtype != torch.bool:
                raise ValueError(f"reset_mask of {mask.dtype}: need true and false")
            if mask.shape != (self.num_envs,) or not bool(mask.any()):
                raise ValueError(f"reset_mask of shape {tuple(mask.shape)}: need ({self.num_envs},) with at least one True")
            if self._state is None and not bool(mask.all()):
                raise gymnasium.error.ResetNeeded("the first reset must start every environment; leave reset_mask out")
        else:
            mask = torch.ones(self.num_envs, dtype=torch.bool, device=self.mdp.device)
        start = self.mdp.start(self._select_generators(mask), _rows(mask))
        self._set_rows(mask, apply_reset_options(self.mdp, options, start))
        self._ended &= ~mask
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        x_s = to_real("actions", actions, self.mdp.device).float()
        if x_s.shape != self._state.x_t.shape:
            raise ValueError(f"actions of shape {tuple(x_s.shape)}: need {tuple(self._state.x_t.shape)}")
        ended = self._ended
        if self.autoreset_mode == AutoresetMode.DISABLED and bool(ended.any()):
            raise gymnasium.error.ResetNeeded("an episode has ended; reset it with reset(options={'reset_mask': mask})")
        running = ~ended
        reward = torch.zeros(self.num_envs, device=self.mdp.device)
        terminated = torch.zeros_like(running)
        if bool(running.any()):
            generators = self._select_generators(running)
            check_finite(x_s[running], BROKEN_ACTIONS)
            now = self._state.map(lambda v: v[running])
            after, reward[running], terminated[running] = self.mdp.step(
                now, x_s[running].clone(), partial(self.mdp.noise, generators), _rows(running)
            )
            self._set_rows(running, after)
        if bool(ended.any()):  # NEXT_STEP: the action is ignored, the observation is the new episode's
            self._set_rows(ended, self.mdp.start(self._select_generators(ended), _rows(ended)))
        info: dict[str, Any] = {}
        self._ended = terminated.clone()
        if self.autoreset_mode == AutoresetMode.SAME_STEP and bool(terminated.any()):
            info = {
                "final_obs": self._observe(),
                "_final_obs": self._to_output(terminated),
                "final_info": {},
                "_final_info": self._to_output(terminated),
            }
            self._set_rows(terminated, self.mdp.start(self._select_generators(terminated), _rows(terminated)))
            self._ended = torch.zeros_like(terminated)
        truncated = torch.zeros_like(terminated)
        return self._observe(), self._to_output(reward), self._to_output(terminated), self._to_output(truncated), info

    def expert_action(self) -> Any:
        """The expert's actions at the present states, (num_envs, *sample_shape), at the cost of its forwards."""
        if self._state is None or bool((self._state.t <= 0).any()):
            raise gymnasium.error.ResetNeeded("every environment must be in the middle of an episode; call reset() first")
        return self._to_output(self.mdp.expert_action(self._state))

    def render(self) -> tuple[np.ndarray, ...] | None:
        if self.render_mode is None or self._state is None:
            return None
        return tuple(render_states(self.mdp, self._state.x_t))

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if isinstance(seed, int):
            seeds: Sequence[int | None] = [seed + i for i in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: need one each")
        if not self._generators:
            torch_seeds = self.np_random.integers(2**31, size=self.num_envs)
            self._generators = [torch.Generator(self.mdp.device).manual_seed(int(s)) for s in torch_seeds]
        for generator, s in zip(self._generators, seeds, strict=True):
            if s is not None:
                generator.manual_seed(s)

    def _select_generators(self, mask: Tensor) -> list[torch.Generator]:
        return list(compress(self._generators, mask.tolist()))

    def _set_rows(self, mask: Tensor, rows: State) -> None:
        """Replaces the states where mask is set by rows (sum(mask), …), out of place: earlier observations may share the tensors."""
        if self._state is None:
            self._state = rows
            return
        self._state = self._state.map(lambda old, new: old.index_put((mask,), new), rows)

    def _observe(self) -> dict[str, Any]:
        assert self._state is not None
        return {key: self._to_output(value) for key, value in to_observation(self._state).items()}

    def _to_output(self, value: Tensor) -> Any:
        return value.clone() if self.output == "torch" else value.cpu().numpy().copy()


def _rows(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()
