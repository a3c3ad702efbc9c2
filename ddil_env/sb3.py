"""The diffusion MDP for stable-baselines3: a VecEnv, and a wrapper that lets any policy stand where a model is expected.

    env = SB3VecEnv(DenoisingVectorEnv("digits", 64, substeps=8, reward="expert_l2", action_bound=4.0, autoreset_mode="SameStep"))
    evaluate_policy(SB3Policy(ExpertPolicy(env.env.expert, 8)), env)   # (0.0, 0.0): the expert's actions are the reward's own a*
    PPO("MultiInputPolicy", env).learn(100_000)

Needs `pip install 'ddil[sb3]'`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from ddil_env.policy import DdimPolicy, ExpertPolicy
from ddil_env.vector_env import DenoisingVectorEnv

Indices = int | Iterable[int] | None  # which of the environments; None is all


def _device_of(policy: DdimPolicy) -> torch.device:
    """The device of the policy's networks, also of those that it wraps; the CPU if it has none."""
    experts = (part.expert.device for part in policy.modules() if isinstance(part, ExpertPolicy))
    students = (parameter.device for parameter in policy.parameters())
    return next(chain(experts, students), torch.device("cpu"))


class SB3Policy:
    """A policy of this library with the `predict` of a stable-baselines3 model, for `evaluate_policy`.

    Args:
        policy: An expert's, a student's or a mixed policy.
        device: Where it computes; default: where its networks are.
    """

    def __init__(self, policy: DdimPolicy, device: torch.device | str | None = None) -> None:
        self.policy = policy
        self.device = _device_of(policy) if device is None else torch.device(device)

    def predict(
        self,
        observation: dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The actions and the unchanged state, as stable-baselines3's models return them.

        Args:
            observation: x_t (n, *sample_shape), t and s (n, 1) and, if conditional, c (n,); or one environment's, without n.
            state, episode_start, deterministic: Ignored: the policies have no memory, and a mixed policy draws from its own seed.

        Returns:
            The next latents, (n, *sample_shape), or (*sample_shape) for a single observation, and `state`.

        Raises:
            ValueError: the observation lacks what the policy reads.
        """
        keys = [str(key) for key in self.policy.in_keys]
        if missing := [key for key in keys if key not in observation]:
            raise ValueError(f"the observation lacks {', '.join(missing)}: this policy reads {', '.join(keys)}; use the env of its expert")
        single = np.ndim(observation["t"]) == 1
        batch = {key: torch.as_tensor(np.asarray(observation[key])[None] if single else observation[key]) for key in keys}
        batch = {key: value.to(self.device) for key, value in batch.items()}
        action = self.policy.act(batch["x_t"], batch["t"][:, 0], batch["s"][:, 0], batch.get("c")).cpu().numpy()
        return (action[0] if single else action), state


class SB3VecEnv(VecEnv):
    """A natively batched environment as a stable-baselines3 VecEnv: one process, one batched network call for each step.

    `set_options` takes the options of the environment's `reset` without the batch axis: one mapping for all, or one for each.

    Args:
        env: An environment with same-step autoreset and numpy output.

    Raises:
        ValueError: another autoreset mode or output.
    """

    def __init__(self, env: DenoisingVectorEnv) -> None:
        if env.autoreset_mode != AutoresetMode.SAME_STEP or env.output != "numpy":
            raise ValueError(
                f"autoreset_mode={env.autoreset_mode.value!r}, output={env.output!r}: stable-baselines3 takes numpy arrays and resets "
                "in the step that ends an episode; build the env with autoreset_mode='SameStep', output='numpy'"
            )
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:
        keys = self._options[0].keys()
        if any(options.keys() != keys for options in self._options):
            raise ValueError(f"reset options {[sorted(options) for options in self._options]}: every environment needs the same ones")
        observation, _ = self.env.reset(seed=self._seeds, options={key: np.stack([o[key] for o in self._options]) for key in keys})
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observation, reward, terminated, _, info = self.env.step(self._actions)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        for i in np.flatnonzero(terminated):
            infos[i]["terminal_observation"] = {key: value[i] for key, value in info["final_obs"].items()}
        return observation, reward, terminated, infos

    def close(self) -> None:
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self.env.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        self._check_all(indices)
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any) -> list[Any]:
        """Calls the batched method once; returns each environment's row of its result."""
        self._check_all(indices)
        rows = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [None] * self.num_envs if rows is None else list(rows)

    def env_is_wrapped(self, wrapper_class: type, indices: Indices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def _check_all(self, indices: Indices) -> None:
        if (chosen := list(self._get_indices(indices))) != list(range(self.num_envs)):
            raise ValueError(f"indices={chosen}: the {self.num_envs} environments are one batch; leave indices out")
