"""The diffusion MDP as Gymnasium environments: single (numpy) and natively batched (numpy or torch).

    gymnasium.make("ddil/Digits-v0", num_steps=4)
    gymnasium.make_vec("ddil/Digits-v0", num_envs=64, vector_kwargs=None, output="torch")

Observation Dict(x_t, t, s, [c]): the latent, its time, the time that the action must reach, the condition id. Action: the next latent.
Environment i of a batch that is seeded with s has the same episodes as a single environment that is seeded with s + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ddil_env.errors import BROKEN_ACTIONS, check_finite
from ddil_env.expert import Expert
from ddil_env.mdp import DenoisingMDP, Kernel, Reward, State
from ddil_env.presets import load_expert, preset_names
from ddil_env.time_grid import GridKind

MIN_RENDER_SIZE = 128  # smaller pictures are enlarged to at least so many pixels, by a whole factor


def load_env_expert(expert: Expert | str, device: str | None, kwargs: dict[str, Any] | None) -> Expert:
    """Loads the expert of a preset, or returns an Expert as it is.

    Raises:
        ValueError: what load_expert refuses, including arguments or a device for an expert that exists already.
    """
    overrides = {**(kwargs or {}), **({} if device is None else {"device": device})}
    return load_expert(expert, **overrides)


def make_spaces(expert: Expert, action_bound: float | None) -> tuple[spaces.Dict, spaces.Box]:
    """Observation and action space of one environment."""
    if action_bound is not None and not action_bound > 0:
        raise ValueError(f"action_bound={action_bound}: need a positive number, or None for an unbounded action")
    shape, reach = expert.sample_shape, np.inf if action_bound is None else action_bound
    time = spaces.Box(0.0, float(expert.schedule.t_max), (1,), np.float32)
    observation: dict[str, spaces.Space[Any]] = {"x_t": spaces.Box(-np.inf, np.inf, shape, np.float32), "t": time, "s": time}
    if expert.num_conditions:
        observation["c"] = spaces.Discrete(expert.num_conditions + (expert.null_condition is not None))
    elif expert.condition_shape is not None:
        observation["c"] = spaces.Box(-np.inf, np.inf, expert.condition_shape, np.float32)
    return spaces.Dict(observation), spaces.Box(-reach, reach, shape, np.float32)


def to_observation(state: State) -> dict[str, Tensor]:
    """The entries of the observation; t and s get a trailing axis, (b, 1)."""
    entries = {"x_t": state.x_t, "t": state.t[:, None], "s": state.s[:, None], "c": state.c}
    return {key: value for key, value in entries.items() if value is not None}


def render_states(mdp: DenoisingMDP, x_t: Tensor) -> Sequence[np.ndarray]:
    """Pictures uint8 (height, width, 3) of n states: of their worlds, or the decoded latents, enlarged to at least 128 pixels."""
    if mdp.world is not None:
        return [picture.numpy() for i in range(len(x_t)) if (picture := mdp.world.render(i)) is not None]
    expert = mdp.expert
    pictures = expert.decode(x_t)
    if pictures is None:
        raise ValueError(f"{type(expert).__name__} has no pictures to render; use render_mode=None")
    factor = -(-MIN_RENDER_SIZE // pictures.shape[1])
    return list(pictures.repeat_interleave(factor, 1).repeat_interleave(factor, 2).numpy())


def render_modes_of(mdp: DenoisingMDP) -> list[str]:
    if mdp.world is not None:
        return ["rgb_array"] if mdp.world.can_render else []
    expert = mdp.expert
    return [] if expert.decode(torch.zeros(1, *expert.sample_shape, device=expert.device)) is None else ["rgb_array"]


def check_render_mode(render_mode: str | None, modes: list[str]) -> None:
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"unknown render_mode {render_mode!r}; this expert offers: {', '.join(modes) or 'none, it has no pictures'}")


def to_real(what: str, value: Any, device: torch.device) -> Tensor:
    """Converts real numbers, in whatever array or list, to a tensor.

    Raises:
        ValueError: there are no numbers, or complex ones, whose imaginary part would be lost, or true and false.
    """
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}={value!r:.60}: need an array of real numbers ({error})") from error
    if tensor.dtype == torch.bool:
        raise ValueError(f"{what} holds true or false; pass numbers")
    if tensor.is_complex():
        raise ValueError(f"{what} holds complex numbers; pass real ones")
    return tensor


def apply_reset_options(mdp: DenoisingMDP, options: dict[str, Any], drawn: State) -> State:
    """Replaces the drawn start's `x_t`, `t` and `c` by those that the caller gives.

    Raises:
        ValueError: an unknown option, a wrong shape or dtype, or a state that does not exist.
    """

    def option(key: str, default: Tensor) -> Tensor:
        if key not in options:
            return default
        value = to_real(f"reset option {key!r}", options[key], default.device)
        single = [default.shape[1:], torch.Size([1])] if len(default) == 1 else []
        if value.shape not in [default.shape, torch.Size([*default.shape, 1]), *single]:
            raise ValueError(f"reset option {key!r} of shape {tuple(value.shape)}: need {tuple(default.shape)}")
        if not default.is_floating_point() and value.is_floating_point():
            raise ValueError(f"reset option {key!r} of {value.dtype}: condition ids are whole numbers; pass int64")
        if key == "x_t" and not bool(torch.isfinite(value).all()):
            raise ValueError("reset option 'x_t' holds NaN or infinity; pass finite numbers")
        value = value.to(default.dtype)
        return value.reshape(default.shape).clone()  # the caller may still write into its own array

    unknown = set(options) - {"x_t", "t", "c", "reset_mask"}
    if unknown:
        raise ValueError(f"unknown reset options {sorted(unknown)}; known: x_t, t, c, and reset_mask for a vector env")
    if not options.keys() & {"x_t", "t", "c"}:
        return drawn
    return mdp.state_at(option("x_t", drawn.x_t), option("t", drawn.t), None if drawn.c is None else option("c", drawn.c))


class DenoisingGymEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One diffusion MDP, with numpy observations and actions.

    `reset(options={"x_t": ..., "t": ..., "c": ...})` starts at a chosen state.

    Args:
        expert: An Expert, or the name of a preset.
        num_steps: N, the number of steps of an episode.
        render_mode: `rgb_array` shows the decoded latent, or the world.
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
        self.expert = load_env_expert(expert, device, expert_kwargs)
        self.mdp = DenoisingMDP(
            self.expert,
            num_steps,
            kernel=kernel,
            reward=reward,
            substeps=substeps,
            guidance_scale=guidance_scale,
            grid=grid,
            world=self.expert.make_world(1),
        )
        self.metadata = {**self.metadata, "render_modes": render_modes_of(self.mdp)}
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.observation_space, self.action_space = make_spaces(self.expert, action_bound)  # type: ignore[assignment]
        self.expert_action = expert_action
        self._generator: torch.Generator | None = None
        self._state: State | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or self._generator is None:
            torch_seed = seed if seed is not None else int(self.np_random.integers(2**31))
            self._generator = torch.Generator(self.mdp.device).manual_seed(torch_seed)
        self._state = apply_reset_options(self.mdp, options or {}, self.mdp.start([self._generator]))
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._state is None or self._generator is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        if float(self._state.t[0]) <= 0:
            raise gymnasium.error.ResetNeeded("the episode has ended at t = 0; call reset() before the next step()")
        x_s = to_real("action", action, self.mdp.device).float()[None].clone()
        if x_s.shape != self._state.x_t.shape:
            raise ValueError(f"action of shape {tuple(x_s.shape[1:])}: need the latent's, {self.expert.sample_shape}")
        check_finite(x_s, BROKEN_ACTIONS)
        self._state, reward, terminated = self.mdp.step(self._state, x_s, partial(self.mdp.noise, [self._generator]))
        observation, info = self._observe()
        return observation, float(reward[0]), bool(terminated[0]), False, info

    def _observe(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Copies the observation and info of the present state: the next step must not change what the caller holds."""
        assert self._state is not None
        observation = {key: value[0].cpu().numpy().copy() for key, value in to_observation(self._state).items()}
        if "c" in observation and observation["c"].ndim == 0:
            observation["c"] = observation["c"][()]  # a Discrete space holds a scalar
        info: dict[str, Any] = {}
        if self.expert_action and float(self._state.t[0]) > 0:
            info["expert_action"] = self.mdp.expert_action(self._state)[0].cpu().numpy()
        return observation, info

    def render(self) -> np.ndarray | None:
        if self.render_mode is None or self._state is None:
            return None
        return render_states(self.mdp, self._state.x_t)[0]


def register_envs() -> None:
    """Registers every preset of configs/env as ddil/<Name>-v0: digits → ddil/Digits-v0, sd15 → ddil/SD15-v0, dit → ddil/DiT-v0."""
    spelling = {"dit": "DiT", "ddpm": "DDPM"}
    for preset in preset_names("env"):
        name = "".join(part.upper() if part[:2] in ("sd", "ss") else spelling.get(part, part.capitalize()) for part in preset.split("_"))
        if (env_id := f"ddil/{name}-v0") not in gymnasium.registry:
            gymnasium.register(
                id=env_id,
                entry_point="ddil_env.gym_env:DenoisingGymEnv",
                vector_entry_point="ddil_env.vector_env:DenoisingVectorEnv",
                kwargs={"expert": preset},
            )
