"""Denoisers: what estimates the clean sample from a noisy one, and the trainable kind, a network read by its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from torch import Tensor, nn

from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import NoiseSchedule

Network = TypeVar("Network", bound=nn.Module)
Predict = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Prediction]  # (x_t, t, c, w); w None: the denoiser's own scale


class Denoiser(Protocol):
    """Anything that estimates the clean sample from a noisy latent: an expert, a student, a critic.

    `predict(x_t, t, c)` estimates the clean sample and the noise at x_t (b, *sample_shape), t (b,), for condition ids c, (b,) int64 or
    None. A denoiser with a guidance embedding takes the guidance scales w (b,) as the fourth argument. `nfe` counts its forwards,
    one for each sample.
    """

    nfe: int

    @property
    def predict(self) -> Callable[..., Prediction]: ...


class NetworkDenoiser(nn.Module):
    """A trainable denoiser: a network and the schedule by which its output is read. Every student and critic is one.

    Args:
        network: Maps (x_t, t, c), or (x_t, t, c, w) with a guidance embedding, to an output of x_t's shape.
        schedule: The schedule that t refers to.
        prediction_type: What the output means.
        guidance_embedding: Whether the network takes the guidance scale w (b,) as an input (Meng et al. 2023, §3.1).

    Raises:
        ValueError: a prediction type that the schedule does not support; when called, w missing or not expected.
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, prediction_type: PredictionType, guidance_embedding: bool = False
    ) -> None:
        super().__init__()
        schedule.check_prediction_type(prediction_type)
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.guidance_embedding = guidance_embedding
        self.nfe = 0

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        if (w is None) == self.guidance_embedding:
            cure = "pass w (b,)" if self.guidance_embedding else "leave w out, or build it with guidance_embedding=True"
            raise ValueError(f"this denoiser has {'a' if self.guidance_embedding else 'no'} guidance embedding; {cure}")
        self.nfe += x_t.shape[0]
        inputs = (x_t, t, c) if w is None else (x_t, t, c, w)
        return self.schedule.prediction(self.network(*inputs), x_t, t, self.prediction_type)

    def network_as(self, kind: type[Network], purpose: str = "take features of a {}") -> Network:
        """The network, if it is of this kind.

        Args:
            kind: The class of the networks of an expert's students.
            purpose: What it is for, with {} for the network's class.

        Raises:
            ValueError: it is another's.
        """
        if not isinstance(self.network, kind):
            raise ValueError(
                f"cannot {purpose.format(type(self.network).__name__)}; a student of this expert is a {kind.__name__}; make one with "
                "make_student()"
            )
        return self.network

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        return cast(Prediction, self(x_t, t, c, w))
