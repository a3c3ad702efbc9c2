"""Pipelines' schedulers: the noise schedule that a scheduler describes, and the scheduler that samples as this library does.

    kernel    variance preserving                          zero terminal SNR    flow matching
    ddim      DPMSolverMultistepScheduler, first order     DDIMScheduler        FlowMatchEulerDiscreteScheduler
    renoise   LCMScheduler                                 LCMScheduler         FlowMatchEulerDiscreteScheduler, stochastic_sampling

First-order DPM-Solver++ that ends at σ = 0 is DDIM; diffusers' DDIMScheduler takes no times but its own. Where the schedule ends at
α = 0, DPM-Solver++ puts 2⁻¹² for α, and DDIMScheduler 0. LCMScheduler's
c_skip x_t + c_out x̂_0 equals x̂_0 except for c_skip = 0.25/(0.25 + (10 t)²), which is 7e-6 at t = 19. Euler's step along u is DDIM's
too: x_s = x_t + (σ_s − σ_t) u = (1 − σ_s) x̂_0 + σ_s ε̂.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import diffusers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)

from ddil_env.errors import check_choice
from ddil_env.mdp import Kernel
from ddil_env.pipelines.find import INDEX, read_json
from ddil_env.pipelines.folder import PipelineFolder
from ddil_env.pipelines.supported_config import check_scheduler
from ddil_env.prediction import PredictionType
from ddil_env.schedule import Kind, NoiseSchedule
from ddil_env.support import Box, Support, Unbounded
from ddil_env.time_grid import LCM_SOLVER_STEPS, TimeGrid

KINDS: dict[str, Kind] = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PROJECTION = ("clip_sample", "clip_sample_range", "thresholding", "sample_max_value")
PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


class Sampler(NamedTuple):
    """A scheduler, and the arguments of a pipeline's call with which it steps over a grid's times."""

    scheduler: Any
    arguments: dict[str, Any]


class Noise(Protocol):
    """The noise of a family of pipelines."""

    @classmethod
    def read(cls, files: PipelineFolder) -> Self:
        """Reads it from the scheduler of a folder."""

    @property
    def prediction_type(self) -> PredictionType:
        """What the network's output means."""

    def schedule(self) -> NoiseSchedule:
        """The schedule of α_t and σ_t."""

    def check_student(self, prediction_type: PredictionType) -> None:
        """Refuses a prediction type for which diffusers has no scheduler over this noise."""

    def sampler(self, prediction_type: PredictionType, grid: TimeGrid, kernel: str) -> Sampler:
        """The scheduler that samples over the grid as this library does."""


def _read_noise(
    files: PipelineFolder, noise: dict[str, tuple[Any, ...] | None], classes: tuple[str, ...] = (), **defaults: Any
) -> tuple[Path, dict[str, Any]]:
    """Reads what a folder says of the noise: the scheduler's file, and the entries that are asked for.

    Args:
        files: The folder. Its model_index.json names the scheduler's class as the scheduler's own file does, and diffusers goes by it.
        noise: The entries, with the values that each may have, as in `check_scheduler`.
        classes: The classes that are supported; empty for all.
        defaults: Entries for a file that leaves them out.

    Raises:
        ValueError: an unreadable file, a scheduler that diffusers does not have, what `check_scheduler` refuses, or that the two files
            name two classes that read other noise.
    """
    path = files.part("scheduler", "scheduler_config.json") / "scheduler_config.json"
    config = read_json(path)
    own = str(config.get("_class_name"))
    (_, named) = files.index.get("scheduler") or (None, own)
    found = []
    for class_name in (own, named):
        scheduler_class = getattr(diffusers, class_name, None)
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
            version = diffusers.__version__
            raise ValueError(f"{path} names the scheduler {class_name!r}, which diffusers {version} does not have; update diffusers")
        if classes and class_name not in classes:
            raise ValueError(f"{path}: {class_name} is not supported; supported: {', '.join(classes)}")
        found.append(check_scheduler(path, class_name, {**defaults, **config}, noise))
    if len({tuple(value or None for value in each.values()) for each in found}) > 1:
        raise ValueError(f"{path} is of a {own} and {INDEX} names a {named}, which reads it as other noise; write one class into both")
    return path, found[0]


def read_support(files: PipelineFolder) -> Support:
    """The support onto which a folder's scheduler projects its estimates of x_0, by clip_sample or thresholding.

    Raises:
        ValueError: thresholding to more than [−1, 1].
    """
    path = files.part("scheduler", "scheduler_config.json") / "scheduler_config.json"
    config = read_json(path)
    (_, name) = files.index.get("scheduler") or (None, config["_class_name"])
    known = inspect.signature(getattr(diffusers, name)).parameters
    found = {key: config.get(key, known[key].default) for key in PROJECTION if key in known}
    if files.pipeline is StableDiffusionPipeline:
        found["clip_sample"] = False  # the pipeline sets it so
    if found.get("thresholding") and found.get("sample_max_value") != 1:
        raise ValueError(f"{path}: {name} with sample_max_value={found.get('sample_max_value')} is not supported; supported: 1")
    if found.get("thresholding"):  # a sample's scale is then 1, whatever its quantile
        return Box(1.0)
    return Box(found.get("clip_sample_range", 1.0)) if found.get("clip_sample") else Unbounded()


@dataclass(frozen=True)
class DiffusionNoise:
    """Variance-preserving noise over discrete times, of any diffusers scheduler with betas.

    Args:
        options: beta_schedule, beta_start, beta_end, num_train_timesteps, prediction_type and rescale_betas_zero_snr, with diffusers'
            values.
    """

    options: dict[str, Any]

    @classmethod
    def read(cls, files: PipelineFolder) -> Self:
        """Reads it from the scheduler of a folder.

        Raises:
            ValueError: an unknown scheduler, or noise that `NoiseSchedule` does not describe.
        """
        supported: dict[str, tuple[Any, ...] | None] = {
            "beta_schedule": tuple(KINDS),
            "prediction_type": tuple(PREDICTION_TYPES),
            "trained_betas": (None,),
            "rescale_betas_zero_snr": (False, True, None),
            "predict_epsilon": (None, True),  # the prediction type's name of old
            **dict.fromkeys(("beta_start", "beta_end", "num_train_timesteps")),
        }
        path, found = _read_noise(files, supported, prediction_type="epsilon")
        del found["trained_betas"], found["predict_epsilon"]
        noise = cls(found | {"rescale_betas_zero_snr": bool(found["rescale_betas_zero_snr"])})
        try:
            noise.schedule().check_prediction_type(noise.prediction_type)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}; see that its entries are the model's") from error
        return noise

    @property
    def prediction_type(self) -> PredictionType:
        return PREDICTION_TYPES[self.options["prediction_type"]]

    def schedule(self) -> NoiseSchedule:
        options = self.options
        return NoiseSchedule(
            KINDS[options["beta_schedule"]],
            options["beta_start"],
            options["beta_end"],
            options["num_train_timesteps"],
            zero_terminal_snr=options["rescale_betas_zero_snr"],
        )

    def check_student(self, prediction_type: PredictionType) -> None:
        self.schedule().check_prediction_type(prediction_type)

    def sampler(self, prediction_type: PredictionType, grid: TimeGrid, kernel: str) -> Sampler:
        """Passes a number of steps if the scheduler's own times for it are the grid's, `timesteps` otherwise.

        Raises:
            ValueError: an unknown kernel, or, with zero terminal SNR and the ddim kernel, times that are not DDIMScheduler's own.
        """
        check_choice("kernel", kernel, Kernel)
        diffusers_names = {kind: name for name, kind in PREDICTION_TYPES.items()}
        options: dict[str, Any] = {**self.options, "prediction_type": diffusers_names[prediction_type]}
        options["steps_offset"] = 1  # unused by these two; another value makes a pipeline warn
        times, n = grid.times[:-1].long().tolist(), grid.num_steps
        candidates: list[Any]
        if kernel == "ddim" and options["rescale_betas_zero_snr"]:
            T = options["num_train_timesteps"]
            scheduler = DDIMScheduler(**options, timestep_spacing="trailing", clip_sample=False)
            scheduler.set_timesteps(n)
            if T % n or scheduler.timesteps.tolist() != times:  # its steps are T // n long, whatever its times
                raise ValueError(
                    f"grid={grid.kind!r} in {n} steps with zero terminal SNR: DDIMScheduler, the one deterministic scheduler whose "
                    f"noise ends at α = 0, takes other steps; choose grid trailing and a number of steps that divides {T}"
                )
            return Sampler(scheduler, {"num_inference_steps": n})
        if kernel == "ddim":
            spacing = "linspace" if grid.kind == "linspace" else "trailing"
            ddim = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "timestep_spacing": spacing}
            candidates = [DPMSolverMultistepScheduler(**options, **ddim)]
        else:  # LCMScheduler selects its times, evenly, from `original_inference_steps` strides: try 50, then the number of steps
            solver_steps = min(max(LCM_SOLVER_STEPS, n), options["num_train_timesteps"])
            candidates = [LCMScheduler(**options, original_inference_steps=k) for k in (solver_steps, n)]
        for scheduler in candidates:
            scheduler.set_timesteps(n)
            if scheduler.timesteps.tolist() == times:
                return Sampler(scheduler, {"num_inference_steps": n})
        return Sampler(candidates[0], {"timesteps": times})


@dataclass(frozen=True)
class FlowNoise:
    """The shifted rectified flow of diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        options: num_train_timesteps and shift, with diffusers' values.
    """

    options: dict[str, Any]

    @classmethod
    def read(cls, files: PipelineFolder) -> Self:
        """Reads it from the scheduler of a folder.

        Raises:
            ValueError: another scheduler, or a shift that is not one number.
        """
        off = ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        read = ("num_train_timesteps", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        supported = {**dict.fromkeys(off, (False, None)), "shift_terminal": (None,), **dict.fromkeys(read)}
        path, found = _read_noise(files, supported, ("FlowMatchEulerDiscreteScheduler",))
        noise = cls({key: found[key] for key in ("num_train_timesteps", "shift")})  # the others belong to use_dynamic_shifting
        try:
            noise.schedule()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}; see that its entries are the model's") from error
        return noise

    @property
    def prediction_type(self) -> PredictionType:
        return "flow"

    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule("flow", num_train_steps=self.options["num_train_timesteps"], shift=self.options["shift"])

    def check_student(self, prediction_type: PredictionType) -> None:
        self.schedule().check_prediction_type(prediction_type)
        if prediction_type != "flow":
            raise ValueError(
                f"prediction type {prediction_type!r}: FlowMatchEulerDiscreteScheduler reads velocities alone, "
                "and the student could not be written as a pipeline; leave prediction_type out, or pass 'flow'"
            )

    def sampler(self, prediction_type: PredictionType, grid: TimeGrid, kernel: str) -> Sampler:
        """Passes `sigmas`, before their shift: the scheduler's own end at the last training step's sigma, not at the grid's last.

        Raises:
            ValueError: an unknown kernel, or a prediction type other than `flow`.
        """
        check_choice("kernel", kernel, Kernel)
        self.check_student(prediction_type)
        scheduler = FlowMatchEulerDiscreteScheduler(**self.options, stochastic_sampling=kernel == "renoise")
        return Sampler(scheduler, {"sigmas": (grid.times[:-1].double() / self.options["num_train_timesteps"]).tolist()})
