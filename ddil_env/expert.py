"""The interface of a diffusion model: the `Expert` base class.

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
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from ddil_env.denoiser import NetworkDenoiser
from ddil_env.device import check_device
from ddil_env.errors import NoDataError, check_whole
from ddil_env.guidance import GuidanceConditioning, no_guidance_below_1
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import NoiseSchedule
from ddil_env.support import Support, Unbounded
from ddil_env.time_grid import TimeGrid, substep_times
from ddil_env.weights import load_weights

if TYPE_CHECKING:
    from ddil_env.worlds.world import World

__all__ = ["Expert", "NoDataError", "check_device"]


def _count_forwards(predict: Callable[..., Prediction]) -> Callable[..., Prediction]:
    """Wraps a `predict` so that it runs without gradient and adds the batch to `self.nfe`, once however many super().predict() it calls."""

    @functools.wraps(predict)
    def wrapper(self: Expert, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        before = self.nfe
        with torch.no_grad():  # an expert is not trained
            prediction = predict(self, x_t, t, c)
        self.nfe = max(self.nfe, before + x_t.shape[0])
        return prediction

    return wrapper


class Expert(ABC):
    """A pretrained diffusion model that the learner imitates.

    Subclasses implement `predict`, and whichever other methods they support. Each call of `predict` runs without gradient and is
    counted in `nfe`, one forward for each sample (a guided pair counts 2).

    Args:
        schedule: The noise schedule that the model was trained on.
        sample_shape: Shape of one latent, any number of axes.
        num_conditions: Condition ids are 0 … num_conditions − 1; 0 means unconditional, and c is None everywhere.
        condition_shape: Shape of a condition that is a float32 tensor instead of an id, as an observation is; None: conditions are ids.
        null_condition: The id that stands for "no condition" in classifier-free guidance; None if there is none.
        guidance_scale: The guidance scale that the expert uses by default; 1 or less is no guidance.
        support: Where clean samples lie; default: unbounded.
        device: Where the expert computes.

    Attributes:
        extractor: Name of the feature extractor by which its samples are evaluated (ddil_agents.evaluation.metrics.extractors).
        max_batch: Largest batch that its policies, and its students', put through the network at once; None is no limit.
        guided_nfe: Forwards that `guided` takes for each sample where w is not 1.
        nfe: Forwards so far.

    Raises:
        ValueError: an unavailable device, an empty shape, or guidance without a null condition.
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
        condition_shape: tuple[int, ...] | None = None,
        null_condition: int | None = None,
        guidance_scale: float = 1.0,
        support: Support | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(f"schedule={schedule!r}: need a ddil_env.NoiseSchedule")
        if not isinstance(sample_shape, Sequence) or not sample_shape or min(sample_shape) < 1:
            raise ValueError(f"sample_shape={sample_shape!r}: need a tuple of at least one axis, each of length 1 or more")
        check_whole("num_conditions", num_conditions, 0)
        self.schedule = schedule
        self.sample_shape = tuple(sample_shape)
        self.num_conditions = num_conditions
        self.condition_shape = None if condition_shape is None else tuple(condition_shape)
        self.null_condition = null_condition
        self._null_pair: tuple[Tensor, int, Tensor] | None = None  # the last conditions, their version, and [conditions, null]
        self.support: Support = support if support is not None else Unbounded()
        self.device = check_device(device)
        self.guidance_scale = self.check_guidance(guidance_scale)
        self.nfe = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "predict" in cls.__dict__:  # counted here, so that no expert can forget to
            cls.predict = _count_forwards(cls.__dict__["predict"])  # type: ignore[method-assign]

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        """Estimates the clean sample and the noise at (x_t, t), in one forward for each sample.

        Args:
            x_t: Noisy latents, (b, *sample_shape).
            t: Times, (b,) float32.
            c: Condition ids, (b,) int64; None is no condition.
        """

    def identity(self) -> dict[str, Any]:
        """What the labels depend on, in plain values: a run resumes only on an expert of the same identity."""
        return {
            "expert": f"{type(self).__module__}.{type(self).__qualname__}",
            "sample_shape": list(self.sample_shape),
            "conditions": self.num_conditions if self.condition_shape is None else list(self.condition_shape),
            "guidance_scale": self.guidance_scale,
            "schedule": self.schedule.settings,
            "weights": self.weights_digest,
        }

    @functools.cached_property
    def weights_digest(self) -> str | None:
        """A digest of the weights of its networks, which are fixed; None if it has none."""
        digest, modules = hashlib.sha256(), {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}
        for name, module in sorted(modules.items()):
            for key, value in module.state_dict().items():
                digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16] if modules else None

    @property
    def conditional(self) -> bool:
        """Whether it takes a condition c."""
        return self.num_conditions > 0 or self.condition_shape is not None

    def make_world(self, num_worlds: int, **options: Any) -> World | None:
        """Worlds in which its samples decide the next conditions (ddil_env.worlds); None: a sample is the end of an episode."""
        return None

    def check_guidance(self, guidance_scale: float) -> float:
        """Returns the guidance scale if this expert supports it, and 1 for any scale below: both are no guidance.

        So diffusers' pipelines read the scale: they guide where it is above 1, and model cards that say 0 mean the condition alone.

        Raises:
            ValueError: a scale that is not finite, or that is above 1 for an expert without a null condition.
        """
        guidance_scale = no_guidance_below_1(guidance_scale)
        if guidance_scale != 1 and self.null_condition is None:
            raise ValueError(
                f"guidance_scale={guidance_scale}: {type(self).__name__} has no null condition to guide against; use guidance_scale=1"
            )
        return guidance_scale

    def guided(self, x_t: Tensor, t: Tensor, c: Tensor | None = None, guidance_scale: Tensor | float | None = None) -> Prediction:
        """Predicts with classifier-free guidance, uncond + w (cond − uncond), both halves in one batched forward.

        Args:
            x_t, t, c: As in `predict`.
            guidance_scale: w, a number or (b,) tensor, of which 1 or less is no guidance; as a number, it runs the conditional half alone.
                Default: the expert's own.

        Raises:
            ValueError: a number that is not finite, or guidance without a condition or without a null condition.
        """
        w = self.guidance_scale if guidance_scale is None else guidance_scale
        w = w.clamp(min=1) if isinstance(w, Tensor) else no_guidance_below_1(w)
        if not isinstance(w, Tensor) and w == 1:
            return self.predict(x_t, t, c)
        if c is None or self.null_condition is None:
            raise ValueError(
                f"guidance_scale={w}: guidance needs a condition, and {type(self).__name__} was given none; pass c, or use guidance_scale=1"
            )
        pair = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), self._append_null(c, self.null_condition))
        (x_0, x_0_null), (eps, eps_null) = pair.x_0.chunk(2), pair.eps.chunk(2)
        return Prediction(x_0, eps, t, self.schedule).guided_by(Prediction(x_0_null, eps_null, t, self.schedule), w)

    def substep_times(self, t: Tensor, s: Tensor, k: int) -> Tensor:
        """The times (k + 1, b) that the expert's policy steps over from t (b,) to s (b,): here in equal strides."""
        return substep_times(self.schedule, t, s, k)

    def _append_null(self, c: Tensor, null: int) -> Tensor:
        """c and as many null conditions, (2b,). The same c gives the same tensor, so that its embeddings are looked up once."""
        if self._null_pair is not None and self._null_pair[0] is c and self._null_pair[1] == c._version:
            return self._null_pair[2]
        pair = torch.cat([c, torch.full_like(c, null)])
        if not c.is_inference():  # an inference tensor has no version that shows whether it was changed
            self._null_pair = c, c._version, pair
        return pair

    def compile(self) -> None:
        """Compiles the expert's networks with torch.compile, in place; the compilation runs at their next call."""
        for module in vars(self).values():
            if isinstance(module, nn.Module):
                getattr(module, "network", module).compile()  # a denoiser counts its forwards: compile its network alone

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Draws n condition ids uniformly, (n,) int64 on the expert's device; None if the expert is unconditional."""
        if not self.num_conditions:
            return None
        return torch.randint(self.num_conditions, (n,), generator=generator, device=self.device)

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draws n pairs of the training data: x_0 (n, *sample_shape) and c (n,) or None.

        Raises:
            NoDataError: this expert has no data.
        """
        raise NoDataError(f"{type(self).__name__} brings no data; train data-free (--beta.forward 0) or give it data")

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor | None]:
        """Returns n fixed pairs to evaluate samples against.

        Args:
            n: How many.
            held_out: Whether they are of data that the expert was not trained on, instead of the training data.

        Returns:
            x_0 (m, *sample_shape) and c (m,) or None, with balanced classes; m ≤ n if there are fewer data.

        Raises:
            NoDataError: this expert has no data.
        """
        return self.sample_data(n, torch.Generator(self.device).manual_seed(1 if held_out else 0))

    def make_student(self, *args: Any, **overrides: Any) -> NetworkDenoiser:
        """Makes a trainable denoiser of the same sample shape, initialised from the expert's weights if it has any.

        Raises:
            ValueError: this expert does not make students.
        """
        raise ValueError(f"{type(self).__name__} does not implement make_student(); only training needs it")

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The layer of a student's network whose output, (b, channels, *any), a discriminator reads (DMD2's GAN head).

        Raises:
            ValueError: this expert names no layer.
        """
        raise ValueError(f"{type(self).__name__} names no layer for a discriminator (critic_features); train without the GAN loss")

    def save_student(
        self,
        student: NetworkDenoiser,
        directory: Path,
        num_steps: int,
        grid: str = "linspace",
        kernel: str = "ddim",
        guidance: GuidanceConditioning | None = None,
    ) -> None:
        """Writes what the student has learned, its weights or its adapters, as `student.safetensors` into a directory.

        Args:
            student: A student that `make_student` made.
            directory: An existing directory.
            num_steps, grid, kernel: How it samples, for formats that hold a sampler too.
            guidance: The guidance of a student with a guidance embedding, likewise; passed for such students alone.
        """
        save_model(student, str(directory / "student.safetensors"))

    def check_export(
        self, num_steps: int, grid: str = "linspace", kernel: str = "ddim", prediction_type: PredictionType | None = None
    ) -> None:
        """Refuses, before any training, a student that `save_student` would refuse after it.

        Args:
            num_steps, grid, kernel: As in `save_student`.
            prediction_type: The student's; default: that of `make_student`.

        Raises:
            ValueError: an impossible grid, or a way to sample that the format of this expert's students cannot hold.
        """
        TimeGrid(self.schedule, num_steps, grid)  # type: ignore[arg-type]  # checked there

    def sampling_support(self, support: Support) -> Support | None:
        """The support onto which a saved student's estimates are projected when it samples, if training projects them onto this one.

        None where the format of this expert's students holds no projection: they are then sampled and evaluated without.
        """
        return support

    def load_student(self, directory: Path, *args: Any, **overrides: Any) -> NetworkDenoiser:
        """Makes a student by `make_student` with these options, and loads the weights that `save_student` wrote.

        Raises:
            ValueError: the file is absent, damaged, or of another architecture.
        """
        student = self.make_student(*args, **overrides)
        load_weights(student, directory / "student.safetensors")
        return student

    @contextmanager
    def prompted(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        """Context manager that registers prompts as conditions of the expert and its students; yields their ids, (len(prompts),).

        Raises:
            ValueError: this expert is not conditioned on text.
        """
        raise ValueError(f"{type(self).__name__} is not conditioned on text; pass condition ids, c, in the place of prompts")
        yield

    def captions(self, c: Tensor) -> list[str]:
        """The texts of condition ids (n,).

        Raises:
            ValueError: this expert is not conditioned on text.
        """
        raise ValueError(f"{type(self).__name__} is not conditioned on text; leave out the scores of pictures and captions")

    def release(self) -> None:
        """Frees what only `encode` and `decode` need; their next call loads it again. Training calls this first."""
        return

    def encode(self, samples: Tensor) -> Tensor:
        """Encodes samples as the user sees them to latents; the identity for a model that works on the data itself."""
        return samples

    def decode(self, x_0: Tensor) -> Tensor | None:
        """Decodes latents (b, *sample_shape) to uint8 pictures (b, height, width, 3) on the CPU; None if there are no pictures."""
        return None
