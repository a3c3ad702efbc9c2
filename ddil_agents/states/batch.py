"""The batch that a loss receives."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor


class Batch:
    """The states of one gradient step, with their labels: b states, on the expert's device.

    Args:
        states: TensorDict (b,) with the keys that `Collector.collect` lists.
    """

    def __init__(self, states: TensorDict) -> None:
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    @property
    def x_t(self) -> Tensor:
        """Noisy latents, (b, *sample_shape)."""
        return self.states["x_t"]

    @property
    def t(self) -> Tensor:
        """Times (noise levels) of the latents, (b,) float32."""
        return self.states["t"]

    @property
    def s(self) -> Tensor:
        """Times that the action leads to, (b,) float32, s < t."""
        return self.states["s"]

    @property
    def expert_action(self) -> Tensor:
        """The label: the latent at s that the expert reaches from x_t, (b, *sample_shape).

        It has the noise level of s. The estimate of x_0 that it implies is `invert_ddim(schedule, x_t, t, expert_action, s).x_0`.
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
        """Samples that an earlier gradient step of the same update generated from these states, (b, *sample_shape), detached; else None."""
        return self.states.get("generated", None)

    @generated.setter
    def generated(self, x: Tensor) -> None:
        self.states["generated"] = x.detach()
