"""The batch that a loss receives."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor


class Batch:
    """States of one gradient step, with their labels. b is their number; all are on the expert's device.

    Args:
        states: (b,) with the keys of `Collector.collect`.
    """

    def __init__(self, states: TensorDict) -> None:
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    @property
    def x_t(self) -> Tensor:
        """Latents, (b, *sample_shape)."""
        return self.states["x_t"]

    @property
    def t(self) -> Tensor:
        """The times of the latents, (b,) float32."""
        return self.states["t"]

    @property
    def s(self) -> Tensor:
        """The earlier times that an action goes to, (b,) float32."""
        return self.states["s"]

    @property
    def expert_action(self) -> Tensor:
        """The label: the latent at s that the expert's own steps from x_t lead to, (b, *sample_shape).

        It is as noisy as s says, and no estimate of x_0; that is `invert_ddim(schedule, x_t, t, expert_action, s).x_0`.
        """
        return self.states["x_s"]

    @property
    def c(self) -> Tensor | None:
        """Condition ids, (b,) int64; None where the expert is unconditional."""
        return self.states.get("c", None)

    @property
    def w(self) -> Tensor | None:
        """Guidance scales, (b,); None unless the config has a `guidance_range`."""
        return self.states.get("w", None)

    @property
    def source(self) -> Tensor:
        """Index into SOURCES (forward, teacher, student), (b,) uint8."""
        return self.states["source"]

    @property
    def generated(self) -> Tensor | None:
        """What an earlier gradient step of the same update generated from these states, if any, (b, *sample_shape), without gradient."""
        return self.states.get("generated", None)

    @generated.setter
    def generated(self, x: Tensor) -> None:
        self.states["generated"] = x.detach()
