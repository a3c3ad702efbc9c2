"""The diffusion MDP as a TorchRL environment, batched on the device.

    env = DenoisingEnv("digits", num_steps=4, batch_size=[64])
    trajectory = env.rollout(4, ExpertPolicy(env.expert, substeps=8))

For collecting training states use ddil_agents.states.collect, which walks the same MDP over plain tensors: a TorchRL
rollout keeps each latent three times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from ddil_env.errors import BROKEN_ACTIONS
from ddil_env.expert import Expert, check_device
from ddil_env.mdp import DenoisingMDP, Kernel, Reward, State
from ddil_env.presets import load_expert
from ddil_env.time_grid import GridKind
from ddil_env.worlds.world import World


class DenoisingEnv(EnvBase):
    """States `x_t`, `t`, `s` (the time to reach next) and, if conditional, `c`; `action` is the latent at s.

    `env.reset()` starts at pure noise; `env.reset(td, set_state=True)` starts at td's `x_t`, `t` (and `c`), which
    need not lie on the grid. Element i of the batch draws from its own stream, seeded seed + i.

    Actions that are not finite are refused: at once on a CPU; on a GPU, where looking at each action would wait for the device, at the
    end of a `rollout` or at the next `reset`.

    Args:
        expert: An Expert, or the name of a preset.
        num_steps: N, steps of an episode.
        batch_size: Shape of the batch.
        device: Where to compute; default: where the expert is.
        kernel, reward, substeps, guidance_scale, grid: As in DenoisingMDP.
        world: As many worlds as environments; default: those of an expert that has them (an episode is then many denoisings). None: an
            episode is one denoising, of a condition that is drawn.

    Raises:
        ValueError: what DenoisingMDP or the expert refuses; a device that is not the expert's.
    """

    _supports_set_state = True

    def __init__(
        self,
        expert: Expert | str,
        num_steps: int = 4,
        batch_size: Sequence[int] = (64,),
        device: torch.device | str | None = None,
        *,
        kernel: Kernel = "ddim",
        reward: Reward = "none",
        substeps: int = 1,
        guidance_scale: float | None = None,
        grid: GridKind = "linspace",
        world: World | Literal["expert"] | None = "expert",
    ) -> None:
        if isinstance(expert, str):
            expert = load_expert(expert, **({} if device is None else {"device": device}))
        elif device is not None and check_device(device) != expert.device:
            raise ValueError(
                f"device={str(device)!r}, but the expert is on {str(expert.device)!r}; build the expert with device={str(device)!r}"
            )
        if min(batch_size, default=1) < 1:
            raise ValueError(f"batch_size={list(batch_size)}: every axis needs at least one environment")
        super().__init__(device=expert.device, batch_size=torch.Size(batch_size))
        self.expert = expert
        if world == "expert":
            world = expert.make_world(self.batch_size.numel())
        elif world is not None and world.num_worlds != self.batch_size.numel():
            raise ValueError(f"{world.num_worlds} worlds for batch_size={list(batch_size)}: need one for each environment")
        self.mdp = DenoisingMDP(
            expert, num_steps, kernel=kernel, reward=reward, substeps=substeps, guidance_scale=guidance_scale, grid=grid, world=world
        )
        self.num_steps = num_steps
        latent = Unbounded((*self.batch_size, *expert.sample_shape), device=self.device)
        time = Bounded(0.0, float(expert.schedule.t_max), self.batch_size, device=self.device, dtype=torch.float32)
        observation = {"x_t": latent, "t": time, "s": time.clone()}
        if expert.num_conditions:
            ids = expert.num_conditions + (expert.null_condition is not None)
            observation["c"] = Categorical(ids, self.batch_size, device=self.device)
        elif expert.condition_shape is not None:
            observation["c"] = Unbounded((*self.batch_size, *expert.condition_shape), device=self.device)
        self.observation_spec = Composite(observation, shape=self.batch_size)
        self.state_spec = self.observation_spec.clone()
        self.action_spec = latent.clone()
        self.reward_spec = Unbounded((*self.batch_size, 1), device=self.device)
        self.full_done_spec = Composite(
            {key: Categorical(2, (*self.batch_size, 1), dtype=torch.bool, device=self.device) for key in ("done", "terminated")},
            shape=self.batch_size,
        )
        self._checks_each_step = self.device.type == "cpu"
        self._broken = torch.zeros((), dtype=torch.int64, device=self.device)  # environments with actions that are not finite
        self._generators: list[torch.Generator] = []
        self._set_seed(int(torch.randint(2**31, ()).item()))

    def rollout(self, max_steps: int, policy: Any = None, *args: Any, **kwargs: Any) -> TensorDictBase:
        """As in TorchRL.

        Raises:
            ValueError: the policy is a student's that samples by another kernel, or steps through other times; or its actions are not
                finite.
        """
        kernel = getattr(policy, "kernel", None)
        if kernel not in (None, self.mdp.kernel):
            raise ValueError(
                f"kernel={self.mdp.kernel}, and this student samples by {kernel}; make its environment with agent.make_env(), or pass "
                f"kernel={kernel!r}"
            )
        trajectory = super().rollout(max_steps, policy, *args, **kwargs)
        self._refuse_broken_actions()
        return trajectory

    def _set_seed(self, seed: int | None) -> None:
        first = 0 if seed is None else seed
        self._generators = [torch.Generator(self.device).manual_seed(first + i) for i in range(self.batch_size.numel())]

    def _flat(self, td: TensorDictBase) -> State:
        """The MDP's state, the batch flattened to one axis."""
        n, shape = self.batch_size.numel(), self.expert.sample_shape
        c = td.get("c", None)
        return State(
            td["x_t"].reshape((n, *shape)),
            td["t"].reshape(n),
            td["s"].reshape(n),
            None if c is None else c.reshape(n, *c.shape[len(self.batch_size) :]),
        )

    def _unflat(self, state: State, **others: Tensor) -> TensorDict:
        """A TensorDict of the env's batch shape; `others` (n,) gain a trailing axis."""
        fields = {k: v.reshape((*self.batch_size, *v.shape[1:])) for k, v in state._asdict().items() if v is not None}
        fields |= {k: v.reshape((*self.batch_size, 1)) for k, v in others.items()}
        return TensorDict(fields, batch_size=self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None, set_state: bool = False, **kwargs: Any) -> TensorDict:
        self._refuse_broken_actions()
        if tensordict is not None and "_reset" in tensordict:
            state = self._partial_start(tensordict["_reset"].reshape(-1))
        elif tensordict is not None and set_state:
            state = self._chosen_start(tensordict)
        else:
            state = self.mdp.start(self._generators)
        done = torch.zeros(len(state.t), dtype=torch.bool, device=self.device)
        return self._unflat(state, done=done, terminated=done.clone())

    def _chosen_start(self, tensordict: TensorDictBase) -> State:
        """The state that the caller gives: `x_t`, `t` and, unless a condition is to be drawn, `c`."""
        missing = {"x_t", "t"} - set(tensordict.keys())
        if missing:
            raise ValueError(f"set_state=True needs `x_t` and `t`; {', '.join(sorted(missing))} is missing")
        given = self._flat(tensordict.copy().set("s", tensordict["t"]))
        c = given.c if given.c is not None or not self.expert.conditional else self.mdp.start(self._generators).c
        return self.mdp.state_at(given.x_t, given.t.float(), c)

    def _partial_start(self, mask: Tensor) -> State:
        """New episodes where mask (n,) is set. TorchRL keeps the other rows itself, so theirs are zeros here."""
        rows = mask.nonzero()[:, 0].tolist()
        if not rows:
            return self._flat(self.observation_spec.zero())
        started = self.mdp.start([self._generators[row] for row in rows], rows)
        return started.map(lambda v: v.new_zeros(len(mask), *v.shape[1:]).index_put((mask,), v))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state = self._flat(tensordict)
        action = tensordict["action"]
        if action.shape != (expected := (*self.batch_size, *self.expert.sample_shape)) or action.dtype != state.x_t.dtype:
            raise ValueError(f"actions of shape {tuple(action.shape)}, {action.dtype}: need {tuple(expected)}, {state.x_t.dtype}")
        action = action.reshape(state.x_t.shape)
        self._broken += (~torch.isfinite(action).flatten(1).all(1) & (state.t > 0)).sum()
        if self._checks_each_step:
            self._refuse_broken_actions()
        after, reward, terminated = self.mdp.step(state, action, partial(self.mdp.noise, self._generators))
        return self._unflat(after, reward=reward, done=terminated, terminated=terminated.clone())

    def _refuse_broken_actions(self) -> None:
        if broken := int(self._broken):
            self._broken.zero_()
            raise ValueError(BROKEN_ACTIONS.format(broken))
