"""What the environment asks of a diffusion model: the `Denoiser` protocol and the `Expert` base class.

A new diffusion model is one subclass in one file:

    class MyExpert(Expert):
        def __init__(self, device="cpu"):
            super().__init__(NoiseSchedule("cosine"), sample_shape=(3, 8, 8), device=device)
            self.network = ...

        def predict(self, x_t, t, c=None):
            return self.schedule.prediction(self.network(x_t, t), x_t, t, "eps")

and `check_expert(MyExpert())` proves that it conforms.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ddil_env.errors import NoDataError
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import NoiseSchedule
from ddil_env.support import Support, Unbounded
from ddil_env.time_grid import TimeGrid, substep_times

__all__ = ["Denoiser", "Expert", "NetworkDenoiser", "NoDataError", "check_device"]

Predict = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Prediction]  # (x_t, t, c, w), w None for the denoiser's own


def check_device(device: torch.device | str) -> torch.device:
    """The device, once a tensor has been put on it.

    Raises:
        ValueError: the device does not exist here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device {str(device)!r} is not to be had: {error}. Available here: {', '.join(available)}") from error


class Denoiser(Protocol):
    """Anything that reads a noisy latent: an expert, a student, a critic.

    `predict(x_t, t, c)` gives clean sample and noise at (x_t, t) for condition ids c: (b, *sample_shape), (b,), (b,) int64 or
    None. A denoiser with a guidance embedding takes the scales w (b,) as the fourth argument.
    """

    nfe: int

    @property
    def predict(self) -> Callable[..., Prediction]: ...


class NetworkDenoiser(nn.Module):
    """A trainable denoiser: a network read through a schedule. Every student and critic is one.

    Args:
        network: Maps (x_t, t, c), or (x_t, t, c, w) with a guidance embedding, to an output of x_t's shape.
        schedule: Reads t.
        prediction_type: What the output means.
        guidance_embedding: Whether the network is told the guidance scale w (b,) that it shall answer for (Meng et al. 2023, §3.1).
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
        given = (x_t, t, c) if w is None else (x_t, t, c, w)
        return self.schedule.prediction(self.network(*given), x_t, t, self.prediction_type)

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, w: Tensor | None = None) -> Prediction:
        return cast(Prediction, self(x_t, t, c, w))


def _counted(predict: Callable[..., Prediction]) -> Callable[..., Prediction]:
    """Adds the batch to `self.nfe`, once, however deep the chain of super().predict() calls."""

    @functools.wraps(predict)
    def wrapper(self: Expert, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        before = self.nfe
        with torch.no_grad():  # an expert is fixed
            prediction = predict(self, x_t, t, c)
        self.nfe = max(self.nfe, before + x_t.shape[0])
        return prediction

    return wrapper


class Expert(ABC):
    """A pretrained diffusion model that the learner imitates.

    Subclasses implement `predict`, and what of the rest they have. Each call of `predict` is counted in `nfe`, in
    forward evaluations of one sample (a guided pair counts 2), and runs without gradient.

    Args:
        schedule: The noise schedule that the model was trained on.
        sample_shape: Shape of one latent, any number of axes.
        num_conditions: Condition ids are 0 … num_conditions − 1; 0 means unconditional, and c is None everywhere.
        null_condition: The id that stands for "no condition" in classifier-free guidance; None if there is none.
        guidance_scale: The guidance this expert is normally used with; 1 is none.
        support: Where clean samples lie.
        device: Where the expert computes.

    Attributes:
        extractor: Name of the feature extractor that judges its samples (ddil_agents.evaluation.metrics.extractors).
        max_batch: Samples that its policies, and its students', put through the network at once; None is no limit.
        guided_nfe: Forwards that `guided` takes a sample where w is not 1.

    Raises:
        ValueError: an absent device, an empty shape, guidance without a null condition.
    """

    extractor: str = "identity"
    max_batch: int | None = None
    guided_nfe: int = 2

    def __init__(
        self,
        schedule: NoiseSchedule,
        sample_shape: tuple[int, ...],
        *,
        num_conditions: int = 0,
        null_condition: int | None = None,
        guidance_scale: float = 1.0,
        support: Support | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not sample_shape or min(sample_shape) < 1:
            raise ValueError(f"sample_shape={sample_shape}: need at least one axis, each of length 1 or more")
        self.schedule = schedule
        self.sample_shape = tuple(sample_shape)
        self.num_conditions = num_conditions
        self.null_condition = null_condition
        self._guided: tuple[Tensor, int, Tensor] | None = None  # conditions, their version, and both halves' of a guided pair
        self.support: Support = support if support is not None else Unbounded()
        self.device = check_device(device)
        self.guidance_scale = self.check_guidance(guidance_scale)
        self.nfe = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "predict" in cls.__dict__:  # counted here, so that no expert can forget to
            cls.predict = _counted(cls.__dict__["predict"])  # type: ignore[method-assign]

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        """Clean sample and noise at (x_t, t), one forward a sample.

        Args:
            x_t: Noisy latents, (b, *sample_shape).
            t: Times, (b,) float32.
            c: Condition ids, (b,) int64, or None.
        """

    def check_guidance(self, guidance_scale: float) -> float:
        """The scale, if this expert can follow it.

        Raises:
            ValueError: not a finite number, or guidance is asked of an expert that has no null condition.
        """
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale}: need a finite number; 1 is no guidance")
        if guidance_scale != 1 and self.null_condition is None:
            raise ValueError(
                f"guidance_scale={guidance_scale}: {type(self).__name__} has no null condition to guide against; use guidance_scale=1"
            )
        return guidance_scale

    def guided(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, guidance_scale: Tensor | float | None = None) -> Prediction:
        """Classifier-free guidance, uncond + w (cond − uncond), the pair in one batched forward.

        Args:
            x_t, t, c: As in `predict`.
            guidance_scale: w, a number or (b,) tensor; 1 runs the conditional half alone. Default: the expert's own.
        """
        w = self.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(w, Tensor) and w == 1:
            return self.predict(x_t, t, c)
        if c is None or self.null_condition is None:
            raise ValueError(f"guidance_scale={w}: guidance needs a condition, and {type(self).__name__} was given none")
        pair = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), self._with_null(c, self.null_condition))
        (x_0, x_0_null), (eps, eps_null) = pair.x_0.chunk(2), pair.eps.chunk(2)
        return Prediction(x_0, eps, t, self.schedule).guided_by(Prediction(x_0_null, eps_null, t, self.schedule), w)

    def times_between(self, t: Tensor, s: Tensor, k: int) -> Tensor:
        """k + 1 times from t to s, each (b,), that its policy steps over: in equal strides, (k + 1, b)."""
        return substep_times(self.schedule, t, s, k)

    def _with_null(self, c: Tensor, null: int) -> Tensor:
        """c and as many null conditions, (2b,): of one c the same tensor, so that embeddings are looked up once for a label's steps."""
        if self._guided is not None and self._guided[0] is c and self._guided[1] == c._version:
            return self._guided[2]
        both = torch.cat([c, torch.full_like(c, null)])
        if not c.is_inference():  # such a tensor does not tell whether it was changed since
            self._guided = c, c._version, both
        return both

    def compile(self) -> None:
        """Lets torch.compile make its networks faster, at their next call; in place."""
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                getattr(part, "network", part).compile()  # of a denoiser, which counts its forwards, the network alone

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """n condition ids, uniform, (n,) int64 on the expert's device; None if the expert is unconditional."""
        if not self.num_conditions:
            return None
        return torch.randint(self.num_conditions, (n,), generator=generator, device=self.device)

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """n pairs of the training data: x_0 (n, *sample_shape) and c (n,) or None.

        Raises:
            NoDataError: this expert brings no data.
        """
        raise NoDataError(f"{type(self).__name__} brings no data; train data-free (--beta.forward 0) or give it data")

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor | None]:
        """n fixed pairs to judge samples against: of the training data, or of data that the expert has not seen.

        Returns:
            x_0 (m, *sample_shape) and c (m,) or None, classes balanced, m ≤ n where the data are few.

        Raises:
            NoDataError: this expert brings no data.
        """
        return self.sample_data(n, torch.Generator(self.device).manual_seed(1 if held_out else 0))

    def make_student(self, *args: Any, **overrides: Any) -> NetworkDenoiser:
        """A trainable denoiser of the same shape, initialised from the expert's weights where it has any.

        Raises:
            ValueError: this expert has no student to offer.
        """
        raise ValueError(f"{type(self).__name__} does not implement make_student(); environments and evaluation work without it")

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The layer of a student's network whose output, (b, channels, *any), a discriminator reads (DMD2's GAN head).

        Raises:
            ValueError: this expert names none.
        """
        raise ValueError(f"{type(self).__name__} names no layer for a discriminator (critic_features); train without the GAN loss")

    def save_student(self, student: NetworkDenoiser, directory: Path, num_steps: int, grid: str = "linspace", kernel: str = "ddim") -> None:
        """Writes what the student has learned as `student.safetensors` into the directory, which exists: its weights, or its adapters.

        Args:
            student: One of `make_student`.
            directory: Where.
            num_steps, grid, kernel: How it samples, for formats that hold a sampler too.
        """
        from safetensors.torch import save_model

        save_model(student, str(directory / "student.safetensors"))

    def check_export(
        self, num_steps: int, grid: str = "linspace", kernel: str = "ddim", prediction_type: PredictionType | None = None
    ) -> None:
        """Refuses, before any training, a student that `save_student` would refuse after it.

        Args:
            num_steps, grid, kernel: As in `save_student`.
            prediction_type: The student's; default: what `make_student` gives.

        Raises:
            ValueError: an impossible grid, or a way to sample that the format of this expert's students has no place for.
        """
        TimeGrid(self.schedule, num_steps, grid)  # type: ignore[arg-type]  # checked there

    def load_student(self, directory: Path, *args: Any, **overrides: Any) -> NetworkDenoiser:
        """Reads what `save_student` wrote, into `make_student` with the same options.

        Raises:
            ValueError: the file is absent, damaged, or of another architecture.
        """
        from ddil_env.weights import load_weights

        student = self.make_student(*args, **overrides)
        load_weights(student, directory / "student.safetensors")
        return student

    def captions(self, c: Tensor) -> list[str]:
        """The texts of condition ids (n,).

        Raises:
            ValueError: this expert's conditions are no texts.
        """
        raise ValueError(f"{type(self).__name__}'s conditions are no texts; leave out the scores of pictures and captions")

    def release(self) -> None:
        """Lets go of what `encode` and `decode` alone need, until they are called again; training begins with it."""
        return

    def encode(self, samples: Tensor) -> Tensor:
        """Samples as the user sees them → latents; the identity where the model works on the data itself."""
        return samples

    def decode(self, x_0: Tensor) -> Tensor | None:
        """Latents (b, *sample_shape) → uint8 pictures (b, height, width, 3) on the CPU, or None where there is nothing to see."""
        return None
