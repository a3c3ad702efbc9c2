"""The diffusion MDP as Gymnasium environments: single (numpy) and natively batched (numpy or torch).

    gymnasium.make("ddil/Digits-v0", num_steps=4)
    gymnasium.make_vec("ddil/Digits-v0", num_envs=64, vector_kwargs=None, output="torch")

Observation Dict(x_t, t, s, [c]): the latent, its time, the time that the action must reach, the condition id. Action: the next latent.
Environment i of a batch that is seeded with s has the same episodes as a single environment that is seeded with s + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from ddil_env.errors import check_choice
from ddil_env.expert import Expert
from ddil_env.mdp import DenoisingMDP, Kernel, Reward, State
from ddil_env.presets import load_expert, preset_names
from ddil_env.time_grid import GridKind

MIN_RENDER_SIZE = 128  # smaller pictures are enlarged to at least so many pixels, by a whole factor


def _load(expert: Expert | str, device: str | None, kwargs: dict[str, Any] | None) -> Expert:
    """Loads the expert of a preset, or returns an Expert as it is.

    Raises:
        ValueError: what load_expert refuses, including arguments or a device for an expert that exists already.
    """
    overrides = {**(kwargs or {}), **({} if device is None else {"device": device})}
    return load_expert(expert, **overrides)


def _make_spaces(expert: Expert, action_bound: float | None) -> tuple[spaces.Dict, spaces.Box]:
    """Observation and action space of one environment."""
    if action_bound is not None and not action_bound > 0:
        raise ValueError(f"action_bound={action_bound}: need a positive number, or None for an unbounded action")
    shape, reach = expert.sample_shape, np.inf if action_bound is None else action_bound
    time = spaces.Box(0.0, float(expert.schedule.t_max), (1,), np.float32)
    observation: dict[str, spaces.Space[Any]] = {"x_t": spaces.Box(-np.inf, np.inf, shape, np.float32), "t": time, "s": time}
    if expert.num_conditions:
        observation["c"] = spaces.Discrete(expert.num_conditions + (expert.null_condition is not None))
    return spaces.Dict(observation), spaces.Box(-reach, reach, shape, np.float32)


def _to_observation(state: State) -> dict[str, Tensor]:
    """The entries of the observation; t and s get a trailing axis, (b, 1)."""
    entries = {"x_t": state.x_t, "t": state.t[:, None], "s": state.s[:, None], "c": state.c}
    return {key: value for key, value in entries.items() if value is not None}


def _render_latents(expert: Expert, x_t: Tensor) -> np.ndarray:
    """The decoded latents, uint8 (n, height, width, 3), enlarged by a whole factor to at least 128 pixels."""
    pictures = expert.decode(x_t)
    if pictures is None:
        raise ValueError(f"{type(expert).__name__} has no pictures to render; use render_mode=None")
    factor = -(-MIN_RENDER_SIZE // pictures.shape[1])
    return pictures.repeat_interleave(factor, 1).repeat_interleave(factor, 2).numpy()


def _render_modes(expert: Expert) -> list[str]:
    return [] if expert.decode(torch.zeros(1, *expert.sample_shape, device=expert.device)) is None else ["rgb_array"]


def _check_render_mode(render_mode: str | None, modes: list[str]) -> None:
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"unknown render_mode {render_mode!r}; this expert offers: {', '.join(modes) or 'none, it has no pictures'}")


def _apply_reset_options(mdp: DenoisingMDP, options: dict[str, Any], drawn: State) -> State:
    """Replaces the drawn start's `x_t`, `t` and `c` by those that the caller gives.

    Raises:
        ValueError: an unknown option, a wrong shape or dtype, or a state that does not exist.
    """

    def option(key: str, default: Tensor) -> Tensor:
        if key not in options:
            return default
        value = torch.as_tensor(options[key], device=default.device)
        single = [default.shape[1:], torch.Size([1])] if len(default) == 1 else []
        if value.shape not in [default.shape, torch.Size([*default.shape, 1]), *single]:
            raise ValueError(f"reset option {key!r} of shape {tuple(value.shape)}: need {tuple(default.shape)}")
        if not default.is_floating_point() and value.is_floating_point():
            raise ValueError(f"reset option {key!r} of {value.dtype}: condition ids are whole numbers; pass int64")
        value = value.to(default.dtype)
        return value.reshape(default.shape).clone()  # the caller may still write into its own array

    unknown = set(options) - {"x_t", "t", "c", "reset_mask"}
    if unknown:
        raise ValueError(f"unknown reset options {sorted(unknown)}; known: x_t, t, c, and reset_mask for a vector env")
    if not options.keys() & {"x_t", "t", "c"}:
        return drawn
    return mdp.at(option("x_t", drawn.x_t), option("t", drawn.t), None if drawn.c is None else option("c", drawn.c))


class DenoisingGymEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One diffusion MDP, with numpy observations and actions.

    `reset(options={"x_t": ..., "t": ..., "c": ...})` starts at a chosen state.

    Args:
        expert: An Expert, or the name of a preset.
        num_steps: N, the number of steps of an episode.
        render_mode: `rgb_array` shows the decoded latent.
        action_bound: Half-width of the action box, for libraries that refuse an unbounded one; None is unbounded.
        expert_action: Whether `info["expert_action"]` holds the expert's action at each new state, at the cost of its forwards.
        device: Where to compute; default: the expert's own default.
        expert_kwargs: Keyword arguments of the preset's expert.
        kernel, reward, substeps, guidance_scale, grid: As in DenoisingMDP; the reward is 0 unless one is chosen.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        expert: Expert | str,
        num_steps: int = 4,
        render_mode: str | None = None,
        action_bound: float | None = None,
        expert_action: bool = False,
        device: str | None = None,
        expert_kwargs: dict[str, Any] | None = None,
        kernel: Kernel = "ddim",
        reward: Reward = "none",
        substeps: int = 1,
        guidance_scale: float | None = None,
        grid: GridKind = "linspace",
    ) -> None:
        self.expert = _load(expert, device, expert_kwargs)
        self.mdp = DenoisingMDP(
            self.expert, num_steps, kernel=kernel, reward=reward, substeps=substeps, guidance_scale=guidance_scale, grid=grid
        )
        self.metadata = {**self.metadata, "render_modes": _render_modes(self.expert)}
        _check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.observation_space, self.action_space = _make_spaces(self.expert, action_bound)  # type: ignore[assignment]
        self.expert_action = expert_action
        self._generator: torch.Generator | None = None
        self._state: State | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or self._generator is None:
            torch_seed = seed if seed is not None else int(self.np_random.integers(2**31))
            self._generator = torch.Generator(self.mdp.device).manual_seed(torch_seed)
        self._state = _apply_reset_options(self.mdp, options or {}, self.mdp.start([self._generator]))
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._state is None or self._generator is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        if float(self._state.t[0]) <= 0:
            raise gymnasium.error.ResetNeeded("the episode has ended at t = 0; call reset() before the next step()")
        x_s = torch.as_tensor(np.asarray(action, np.float32), device=self.mdp.device)[None].clone()
        if x_s.shape != self._state.x_t.shape:
            raise ValueError(f"action of shape {tuple(x_s.shape[1:])}: need the latent's, {self.expert.sample_shape}")
        generators = [self._generator]
        self._state, reward, terminated = self.mdp.step(self._state, x_s, lambda: self.mdp.noise(generators))
        observation, info = self._observe()
        return observation, float(reward[0]), bool(terminated[0]), False, info

    def _observe(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Copies the observation and info of the present state: the next step must not change what the caller holds."""
        assert self._state is not None
        observation = {key: value[0].cpu().numpy().copy() for key, value in _to_observation(self._state).items()}
        if "c" in observation:
            observation["c"] = observation["c"][()]  # a Discrete space holds a scalar
        info: dict[str, Any] = {}
        if self.expert_action and float(self._state.t[0]) > 0:
            info["expert_action"] = self.mdp.expert_action(self._state)[0].cpu().numpy()
        return observation, info

    def render(self) -> np.ndarray | None:
        if self.render_mode is None or self._state is None:
            return None
        return _render_latents(self.expert, self._state.x_t)[0]


class DenoisingVectorEnv(VectorEnv[dict[str, Any], Any, Any]):
    """A batch of diffusion MDPs in one process: all environments make a step in one batched network call.

    All three autoreset modes are supported. `reset(options={"reset_mask": mask})` restarts some of the environments.

    Args:
        expert, num_steps, render_mode, action_bound, device, expert_kwargs: As in DenoisingGymEnv.
        kernel, reward, substeps, guidance_scale, grid: As in DenoisingMDP.
        num_envs: Size of the batch.
        autoreset_mode: `NextStep`, `SameStep` or `Disabled`, or gymnasium's enum.
        output: `numpy`, or `torch` to keep every observation, reward and flag on the device.
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
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: need at least one environment")
        check_choice("output", output, ("numpy", "torch"))
        check_choice("autoreset_mode", getattr(autoreset_mode, "value", autoreset_mode), [mode.value for mode in AutoresetMode])
        self.expert = _load(expert, device, expert_kwargs)
        self.mdp = DenoisingMDP(
            self.expert, num_steps, kernel=kernel, reward=reward, substeps=substeps, guidance_scale=guidance_scale, grid=grid
        )
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.output = output
        modes = _render_modes(self.expert)
        _check_render_mode(render_mode, modes)
        self.render_mode = render_mode
        self.metadata = {"render_modes": modes, "render_fps": 4, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = _make_spaces(self.expert, action_bound)
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
            mask = torch.as_tensor(options["reset_mask"], dtype=torch.bool, device=self.mdp.device)
            if mask.shape != (self.num_envs,) or not bool(mask.any()):
                raise ValueError(f"reset_mask of shape {tuple(mask.shape)}: need ({self.num_envs},) with at least one True")
            if self._state is None and not bool(mask.all()):
                raise gymnasium.error.ResetNeeded("the first reset must start every environment; leave reset_mask out")
        else:
            mask = torch.ones(self.num_envs, dtype=torch.bool, device=self.mdp.device)
        start = self.mdp.start(self._select_generators(mask))
        self._set_rows(mask, _apply_reset_options(self.mdp, options, start))
        self._ended &= ~mask
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        x_s = torch.as_tensor(actions, dtype=torch.float32, device=self.mdp.device)
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
            now = self._state.map(lambda v: v[running])
            after, reward[running], terminated[running] = self.mdp.step(now, x_s[running].clone(), lambda: self.mdp.noise(generators))
            self._set_rows(running, after)
        if bool(ended.any()):  # NEXT_STEP: the action is ignored, the observation is the new episode's
            self._set_rows(ended, self.mdp.start(self._select_generators(ended)))
        info: dict[str, Any] = {}
        self._ended = terminated.clone()
        if self.autoreset_mode == AutoresetMode.SAME_STEP and bool(terminated.any()):
            info = {
                "final_obs": self._observe(),
                "_final_obs": self._to_output(terminated),
                "final_info": {},
                "_final_info": self._to_output(terminated),
            }
            self._set_rows(terminated, self.mdp.start(self._select_generators(terminated)))
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
        return tuple(_render_latents(self.expert, self._state.x_t))

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
        return {key: self._to_output(value) for key, value in _to_observation(self._state).items()}

    def _to_output(self, value: Tensor) -> Any:
        return value.clone() if self.output == "torch" else value.cpu().numpy().copy()


def register_envs() -> None:
    """Registers every preset of configs/env as ddil/<Name>-v0: digits → ddil/Digits-v0, sd15 → ddil/SD15-v0, dit → ddil/DiT-v0."""
    spelling = {"dit": "DiT", "ddpm": "DDPM"}
    for preset in preset_names("env"):
        name = "".join(part.upper() if part[:2] in ("sd", "ss") else spelling.get(part, part.capitalize()) for part in preset.split("_"))
        if (env_id := f"ddil/{name}-v0") not in gymnasium.registry:
            gymnasium.register(
                id=env_id,
                entry_point="ddil_env.gym_env:DenoisingGymEnv",
                vector_entry_point="ddil_env.gym_env:DenoisingVectorEnv",
                kwargs={"expert": preset},
            )
