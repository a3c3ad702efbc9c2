"""The diffusion MDP for stable-baselines3: its vector environment, and any policy where it expects a model.

    env = SB3VecEnv(DenoisingVectorEnv("digits", 64, substeps=8, reward="expert_l2", action_bound=4.0, autoreset_mode="SameStep"))
    evaluate_policy(SB3Policy(ExpertPolicy(env.env.expert, 8)), env)   # (0.0, 0.0): the expert is at no distance from itself
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

from ddil_env.gym_env import DenoisingVectorEnv
from ddil_env.policy import DdimPolicy, ExpertPolicy

Indices = int | Iterable[int] | None  # which of the environments; None is all


def _device_of(policy: DdimPolicy) -> torch.device:
    """Where the networks beneath compute; the CPU if there is none."""
    experts = (part.expert.device for part in policy.modules() if isinstance(part, ExpertPolicy))
    students = (parameter.device for parameter in policy.parameters())
    return next(chain(experts, students), torch.device("cpu"))


class SB3Policy:
    """An expert's or a student's policy, with the `predict` of a stable-baselines3 model: `evaluate_policy` scores it.

    Args:
        policy: Who acts.
        device: Where it computes; default: where its network is, also beneath a policy made of others.
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
        """The next latents, (n, *sample_shape), or (*sample_shape) for one observation alone, and the state as it came.

        Args:
            observation: x_t (n, *sample_shape), t and s (n, 1) and, if conditional, c (n,); or one environment's, without n.
            state, episode_start, deterministic: Of no effect: the policies have no memory, and what a mixed one draws is its own seed's.

        Raises:
            ValueError: the observation lacks what the policy reads.
        """
        keys = [str(key) for key in self.policy.in_keys]
        if missing := [key for key in keys if key not in observation]:
            raise ValueError(f"the observation lacks {', '.join(missing)}: this policy reads {', '.join(keys)}; use the env of its expert")
        single = np.ndim(observation["t"]) == 1
        parts = {key: torch.as_tensor(np.asarray(observation[key])[None] if single else observation[key]) for key in keys}
        parts = {key: value.to(self.device) for key, value in parts.items()}
        action = self.policy.act(parts["x_t"], parts["t"][:, 0], parts["s"][:, 0], parts.get("c")).cpu().numpy()
        return (action[0] if single else action), state


class SB3VecEnv(VecEnv):
    """A natively batched environment as stable-baselines3's: one process, one network call a step.

    `set_options` takes what the environment's `reset` does, without its batch axis: one mapping, or one an environment.

    Args:
        env: With same-step reset, and numpy output.

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
        """Calls the batched method once, and gives each environment its row of what it returns."""
        self._check_all(indices)
        rows = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [None] * self.num_envs if rows is None else list(rows)

    def env_is_wrapped(self, wrapper_class: type, indices: Indices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def _check_all(self, indices: Indices) -> None:
        if (chosen := list(self._get_indices(indices))) != list(range(self.num_envs)):
            raise ValueError(f"indices={chosen}: the {self.num_envs} environments are one batch; leave indices out")
