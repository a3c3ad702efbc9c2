"""A pipeline's scheduler, read as the noise that its network was trained on, and written as the sampler of a student.

    kernel    variance preserving                          flow matching
    ddim      DPMSolverMultistepScheduler, first order     FlowMatchEulerDiscreteScheduler
    renoise   LCMScheduler                                 FlowMatchEulerDiscreteScheduler, stochastic_sampling

First-order DPM-Solver++ that ends at σ = 0 is DDIM; diffusers' DDIMScheduler does not take these times. LCMScheduler's
c_skip x_t + c_out x̂_0 is x̂_0 but for c_skip = 0.25/(0.25 + (10 t)²), 7e-6 at t = 19. Euler's step along u is DDIM's too:
x_s = x_t + (σ_s − σ_t) u = (1 − σ_s) x̂_0 + σ_s ε̂.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, get_args

import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin

from ddil_env.mdp import Kernel
from ddil_env.pipelines.folder import PipelineFolder, read_json
from ddil_env.prediction import PredictionType
from ddil_env.schedule import Kind, NoiseSchedule
from ddil_env.time_grid import LCM_SOLVER_STEPS, TimeGrid

KINDS: dict[str, Kind] = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


class Sampler(NamedTuple):
    """A scheduler, and the arguments of a pipeline's call under which it steps over a grid's times."""

    scheduler: Any
    arguments: dict[str, Any]


class Noise(Protocol):
    """The noise of a family of pipelines."""

    @classmethod
    def read(cls, files: PipelineFolder) -> Self:
        """From the scheduler of a folder."""

    @property
    def prediction_type(self) -> PredictionType:
        """What the network's output means."""

    def schedule(self) -> NoiseSchedule:
        """α_t and σ_t."""

    def check_student(self, prediction_type: PredictionType) -> None:
        """Refuses a prediction type that no scheduler of diffusers reads over this noise."""

    def sampler(self, prediction_type: PredictionType, grid: TimeGrid, kernel: str) -> Sampler:
        """The scheduler that samples over the grid as this library does."""


def check_kernel(kernel: str) -> None:
    """The kernels that have a scheduler.

    Raises:
        ValueError: another.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"unknown kernel {kernel!r}; choose one of: {', '.join(get_args(Kernel))}")


def _read_config(files: PipelineFolder) -> tuple[Path, str, dict[str, Any]]:
    """A scheduler's file, its class's name, and its configuration with the defaults of that class.

    Raises:
        ValueError: an unreadable file, or a scheduler that diffusers does not have.
    """
    path = files.part("scheduler", "scheduler_config.json") / "scheduler_config.json"
    config = read_json(path)
    class_name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, class_name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"{path} names the scheduler {class_name!r}, which diffusers {diffusers.__version__} does not have")
    defaults = {name: parameter.default for name, parameter in inspect.signature(scheduler_class).parameters.items()}
    return path, class_name, {**defaults, **config}


def _check_supported(path: Path, class_name: str, config: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    for key, values in supported.items():
        if config[key] not in values:
            raise ValueError(f"{path}: {class_name} with {key}={config[key]!r} is not supported; supported: {', '.join(map(str, values))}")


@dataclass(frozen=True)
class DiffusionNoise:
    """Variance-preserving noise over discrete times: every scheduler of betas.

    Args:
        options: beta_schedule, beta_start, beta_end, num_train_timesteps and prediction_type, as diffusers has them.
    """

    options: dict[str, Any]

    @classmethod
    def read(cls, files: PipelineFolder) -> Self:
        """From the scheduler of a folder.

        Raises:
            ValueError: an unknown scheduler, or noise that `NoiseSchedule` does not describe.
        """
        path, class_name, config = _read_config(files)
        supported: dict[str, tuple[Any, ...]] = {
            "beta_schedule": tuple(KINDS),
            "prediction_type": tuple(PREDICTION_TYPES),
            "trained_betas": (None,),
            "rescale_betas_zero_snr": (False, None),
        }
        config = {**dict.fromkeys(supported), "prediction_type": "epsilon", **config}
        _check_supported(path, class_name, config, supported)
        return cls({key: config[key] for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")})

    @property
    def prediction_type(self) -> PredictionType:
        return PREDICTION_TYPES[self.options["prediction_type"]]

    def schedule(self) -> NoiseSchedule:
        options = self.options
        return NoiseSchedule(KINDS[options["beta_schedule"]], options["beta_start"], options["beta_end"], options["num_train_timesteps"])

    def check_student(self, prediction_type: PredictionType) -> None:
        self.schedule().check_prediction_type(prediction_type)

    def sampler(self, prediction_type: PredictionType, grid: TimeGrid, kernel: str) -> Sampler:
        """By number of steps where the scheduler's own times are the grid's, by `timesteps` otherwise.

        Raises:
            ValueError: an unknown kernel.
        """
        check_kernel(kernel)
        names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
        options: dict[str, Any] = {**self.options, "prediction_type": names[prediction_type]}
        options["steps_offset"] = 1  # unused by these two; another value makes a pipeline warn
        times, n = grid.times[:-1].long().tolist(), grid.num_steps
        candidates: list[Any]
        if kernel == "ddim":
            spacing = "linspace" if grid.kind == "linspace" else "trailing"
            ddim = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "timestep_spacing": spacing}
            candidates = [DPMSolverMultistepScheduler(**options, **ddim)]
        else:  # its times are every so many-th of `original_inference_steps` strides: of 50, or of as many as there are steps
            most = min(max(LCM_SOLVER_STEPS, n), options["num_train_timesteps"])
            candidates = [LCMScheduler(**options, original_inference_steps=k) for k in (most, n)]
        for scheduler in candidates:
            scheduler.set_timesteps(n)
            if scheduler.timesteps.tolist() == times:
                return Sampler(scheduler, {"num_inference_steps": n})
        return Sampler(candidates[0], {"timesteps": times})


@dataclass(frozen=True)
class FlowNoise:
    """Rectified flow, shifted: FlowMatchEulerDiscreteScheduler.

    Args:
        options: num_train_timesteps and shift.
    """

    options: dict[str, Any]

    @classmethod
    def read(cls, files: PipelineFolder) -> Self:
        """From the scheduler of a folder.

        Raises:
            ValueError: another scheduler, or a shift that is not one number.
        """
        path, class_name, config = _read_config(files)
        if class_name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"{path}: {class_name} is not supported; supported: FlowMatchEulerDiscreteScheduler")
        off = ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        _check_supported(path, class_name, config, {**dict.fromkeys(off, (False, None)), "shift_terminal": (None,)})
        return cls({key: config[key] for key in ("num_train_timesteps", "shift")})

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
        """By `sigmas`, before their shift: the scheduler's own end one step away from where the network was trained.

        Raises:
            ValueError: an unknown kernel, or a prediction type other than `flow`.
        """
        check_kernel(kernel)
        self.check_student(prediction_type)
        scheduler = FlowMatchEulerDiscreteScheduler(**self.options, stochastic_sampling=kernel == "renoise")
        return Sampler(scheduler, {"sigmas": (grid.times[:-1].double() / self.options["num_train_timesteps"]).tolist()})
