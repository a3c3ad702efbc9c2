"""The diffusion MDP, batched, on the device: the core that the TorchRL and the Gymnasium environments share.

    state   (x_t, t, s, c)      s = the time that the next action must reach, c = condition id, fixed in an episode
    action  x_s                 the next latent
    start   x_T ~ N(0, I), t = t_max
    end     t = 0
    kernel  `ddim`:    the next state is the action itself, P = δ(a)             DDIL §3.1
            `renoise`: the action's implied estimate x̂_0 is diffused to s anew   Song et al. 2023, Alg. 1

The kernel is the MDP's transition: `ddim` samples as diffusers' DDIMScheduler does, `renoise` as its LCMScheduler. Both take the same
actions, so that every policy runs under both: `renoise` computes x̂_0 from the action by the inverse of the DDIM step (Salimans & Ho 2021,
App. G) and replaces the action's noise by a fresh draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddil_env.broadcast import broadcast
from ddil_env.errors import check_choice
from ddil_env.expert import Expert
from ddil_env.policy import ExpertPolicy
from ddil_env.steps import invert_ddim, renoise_step
from ddil_env.time_grid import GridKind, TimeGrid
from ddil_env.worlds.world import World

Kernel = Literal["ddim", "renoise"]
Reward = Literal["none", "expert_l2", "expert_loglik"]

# At the last step the posterior's standard deviation is 0 and log p infinite; 0.02 is 2.5 grey levels of an 8-bit pixel scaled to ±1.
LOGLIK_MIN_STD = 0.02


class State(NamedTuple):
    """A batch of states: x_t (b, *sample_shape) float32, t and s (b,) float32, c (b,) int64, (b, *condition_shape) float32, or None."""

    x_t: Tensor
    t: Tensor
    s: Tensor
    c: Tensor | None

    def map(self, f: Callable[..., Tensor], *others: State) -> State:
        """The state of f applied to each tensor, together with the same tensor of the other states."""
        columns = list(zip(self, *others, strict=True))
        x_t, t, s = (f(*column) for column in columns[:3])
        return State(x_t, t, s, None if self.c is None else f(*columns[3]))


class DenoisingMDP:
    """The reverse diffusion process of one expert as a Markov decision process.

    Args:
        expert: The diffusion model; gives shape, schedule, conditions, and the action a* of the reward.
        num_steps: N, the number of steps of an episode.
        kernel: The transition, `ddim` or `renoise`.
        reward: `none` is 0. `expert_l2` is −mean (a − a*)² over the latent's entries, where a* is the expert's action.
            `expert_loglik` is log N(a; a*, σ̃²) per entry, where σ̃ is the standard deviation of the DDPM posterior (η = 1;
            Song et al. 2021, Eq. 16), at least 0.02. Both run the expert at every step.
        substeps: Expert steps in a*.
        guidance_scale: The expert's guidance scale in a*; default: its own.
        grid: Kind of the time grid.
        world: Where samples go and conditions come from; its reward is added to the chosen one. None: a sample ends its episode.

    Raises:
        ValueError: a world of other shapes than the expert's, num_steps or substeps out of range, an unknown kernel, reward or grid, or a
            guidance scale that the expert does not support.
    """

    def __init__(
        self,
        expert: Expert,
        num_steps: int = 4,
        *,
        kernel: Kernel = "ddim",
        reward: Reward = "none",
        substeps: int = 1,
        guidance_scale: float | None = None,
        grid: GridKind = "linspace",
        world: World | None = None,
    ) -> None:
        check_choice("kernel", kernel, Kernel)
        check_choice("reward", reward, Reward)
        if world is not None and (world.sample_shape, world.condition_shape) != (expert.sample_shape, expert.condition_shape):
            raise ValueError(
                f"the world takes samples {world.sample_shape} and answers {world.condition_shape}, the expert's are "
                f"{expert.sample_shape} and {expert.condition_shape}; make the world with expert.make_world(), or give both the same shapes"
            )
        self.expert = expert
        self.world = world
        self.device = expert.device
        self.kernel = kernel
        self.grid = TimeGrid(expert.schedule, num_steps, grid).to(expert.device)
        self.policy = ExpertPolicy(expert, substeps, guidance_scale)
        self._reward = {"none": self._no_reward, "expert_l2": self._expert_l2, "expert_loglik": self._expert_loglik}[reward]

    def start(self, generators: list[torch.Generator], rows: list[int] | None = None) -> State:
        """Starts episodes, one for each generator, so that an episode depends on its own seed alone.

        Args:
            generators: One for each episode.
            rows: Which of the world's they are; default: all.
        """
        x_t = self.noise(generators)
        if self.world is not None:
            t = self.grid.times[:1].expand(len(generators)).clone()
            return State(x_t, t, self.grid.previous(t), self.world.reset(generators, rows).to(self.device))
        conditions = [c for g in generators if (c := self.expert.sample_condition(1, g)) is not None]
        t = self.grid.times[:1].expand(len(generators)).clone()
        return State(x_t, t, self.grid.previous(t), torch.cat(conditions) if conditions else None)

    def noise(self, generators: list[torch.Generator], rows: list[int] | None = None) -> Tensor:
        """Draws ε ~ N(0, I), one sample from each generator, or from each of those rows, (n, *sample_shape)."""
        chosen = generators if rows is None else [generators[row] for row in rows]
        return torch.stack([torch.randn(self.expert.sample_shape, generator=g, device=self.device) for g in chosen])

    def state_at(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> State:
        """The state at a chosen latent and time.

        Args:
            x_t: Latents, (b, *sample_shape).
            t: Times, (b,); they need not lie on the grid.
            c: Condition ids (b,), condition tensors (b, *condition_shape), or None.

        Raises:
            ValueError: the MDP has a world, t is outside (0, t_max] or between the whole numbers of a discrete schedule, or a condition id
                does not exist.
        """
        if self.world is not None:
            raise ValueError("cannot start at a chosen state in a world, which sets the condition itself; reset without one")
        if not bool(((t > 0) & (t <= self.expert.schedule.t_max)).all()):
            raise ValueError(f"cannot start at t={t.tolist()[:4]}: need 0 < t ≤ {self.expert.schedule.t_max}")
        if self.expert.schedule.discrete and not bool((t == t.round()).all()):
            raise ValueError(f"cannot start at t={t.tolist()[:4]}: a {self.expert.schedule.kind} schedule has whole times only; round t")
        if c is not None and not self.expert.conditional:
            raise ValueError(f"cannot start with c={c.tolist()[:4]}: this expert is unconditional; leave c out")
        if self.expert.condition_shape is not None:
            return State(x_t, t, self.grid.previous(t), c)
        last = self.expert.num_conditions - (self.expert.null_condition is None)
        if c is not None and not bool(((c >= 0) & (c <= last)).all()):
            raise ValueError(f"cannot start with c={c.tolist()[:4]}: condition ids are 0 … {last}")
        return State(x_t, t, self.grid.previous(t), c)

    def step(
        self, state: State, action: Tensor, noise: Callable[..., Tensor], worlds: list[int] | None = None
    ) -> tuple[State, Tensor, Tensor]:
        """Makes one transition.

        Args:
            state: The states in which the actions are taken.
            action: The next latents, (b, *sample_shape).
            noise: Draws fresh ε of the same shape, or given a list of rows of those; only the `renoise` kernel and a world call it.
            worlds: Which of the worlds the states are in; default: all, in order.

        Returns:
            The next state, the reward (b,) float32 and whether the episode ended (b,) bool.
        """
        reward = self._reward(state, action)
        x_s = action
        if self.kernel == "renoise":
            fresh = renoise_step(invert_ddim(self.expert.schedule, state.x_t, state.t, action, state.s), state.s, noise())
            x_s = torch.where(broadcast(state.s > 0, action), fresh.to(action.dtype), action)
        following, ended = State(x_s, state.s, self.grid.previous(state.s), state.c), state.s <= 0
        if self.world is None:
            return following, reward, ended
        return self._enter_world(self.world, following, reward, ended.nonzero()[:, 0].tolist(), noise, worlds)

    def _enter_world(
        self, world: World, state: State, reward: Tensor, rows: list[int], noise: Callable[..., Tensor], worlds: list[int] | None
    ) -> tuple[State, Tensor, Tensor]:
        """Gives the world the samples that are ready, those of `rows`; where its episode goes on, the next denoising begins."""
        terminated = torch.zeros(len(reward), dtype=torch.bool, device=self.device)
        if not rows:
            return state, reward, terminated
        assert state.c is not None  # of a world's shape
        into = rows if worlds is None else [worlds[row] for row in rows]
        c, earned, done = (x.to(self.device) for x in world.step(state.x_t[rows].to(world.device), into))
        x_t, t, conditions = state.x_t.clone(), state.t.clone(), state.c.clone()
        terminated[rows], conditions[rows] = done, c
        reward = reward.clone()
        reward[rows] += earned
        if going_on := [row for row, ended in zip(rows, done.tolist(), strict=True) if not ended]:
            x_t[going_on], t[going_on] = noise(going_on).to(x_t), self.grid.times[0]
        return State(x_t, t, self.grid.previous(t), conditions), reward, terminated

    def expert_action(self, state: State) -> Tensor:
        """The expert's actions a*, (b, *sample_shape)."""
        return self.policy.act(*state)

    def _no_reward(self, state: State, action: Tensor) -> Tensor:
        return torch.zeros(len(action), device=action.device)

    def _expert_l2(self, state: State, action: Tensor) -> Tensor:
        return -(action - self.expert_action(state)).square().flatten(1).mean(1).float()

    def _expert_loglik(self, state: State, action: Tensor) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(self.expert.schedule.coefficients, (state.t, state.s))
        # σ̃² = σ_s²/σ_t² (1 − α_t²/α_s²) for VP, written for any (α, σ): σ_s² (1 − (α_t σ_s / (α_s σ_t))²)
        posterior = sigma_s * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2).clamp(min=0).sqrt()
        std = posterior.clamp(min=LOGLIK_MIN_STD).float()
        z = (action - self.expert_action(state)) / broadcast(std, action)
        return -0.5 * z.square().flatten(1).mean(1).float() - std.log() - 0.5 * math.log(2 * math.pi)
