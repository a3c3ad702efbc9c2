"""An autoregressive diffusion surrogate of the Kuramoto–Sivashinsky equation, and the equation's solver as an expert.

    python -m ddil_agents.dagger --env kuramoto --config kuramoto
    python -m ddil_env.experts.train_kuramoto --out kuramoto.safetensors      # trains it again

A condition is the last frame, a sample the increment to the next one, time .5 later; the world is the model's own history. Other times
between frames, and samples that are the next frame itself, are those of other files of weights.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_env.conv1d import TimeConditionedConv1d, last_features
from ddil_env.denoiser import NetworkDenoiser
from ddil_env.expert import Expert
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import NoiseSchedule
from ddil_env.weights import read_tensors
from ddil_env.worlds.kuramoto import POINTS, KuramotoSivashinsky, KuramotoWorld

CHANNELS, DEPTH, PATCH = 64, 5, 2
NUM_TRAIN_STEPS = 100


def surrogate(channels: int = CHANNELS, depth: int = DEPTH, prediction_type: PredictionType = "v") -> NetworkDenoiser:
    """An untrained surrogate on the cosine schedule of 100 steps."""
    schedule = NoiseSchedule("cosine", num_train_steps=NUM_TRAIN_STEPS)
    network = TimeConditionedConv1d((1, POINTS), schedule.t_max, channels, depth, condition_shape=(1, 1, POINTS), patch=PATCH)
    return NetworkDenoiser(network, schedule, prediction_type)


class KuramotoSolver(Expert):
    """The solver as an expert: whatever x_t is, its estimate of x_0 is what the equation makes of the history.

    Args:
        num_sequences: Recorded solutions that forward states come from, of 40; the others are held out.
        weights: A safetensors file of another training; default: the shipped one.
        device: Where it computes.

    Attributes:
        dt, std: Time between frames, and the standard deviation of the attractor, by which frames are divided.
        increment: A sample times this is added to the last frame; None: a sample is the next frame.

    Raises:
        ValueError: a file that is absent, damaged or of another network; more sequences than there are.
    """

    def __init__(self, num_sequences: int = 32, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        schedule = NoiseSchedule("cosine", num_train_steps=NUM_TRAIN_STEPS)
        super().__init__(schedule, (1, POINTS), condition_shape=(1, 1, POINTS), device=device)
        shipped = Path(str(files("ddil_env") / "experts" / "weights" / "kuramoto.safetensors"))
        self.stored = read_tensors(Path(weights) if weights else shipped, "train it again")
        self.dt, self.std = (float(self.stored[name]) for name in ("dt", "std"))
        self.increment = float(self.stored["increment"]) if "increment" in self.stored else None
        self.equation = KuramotoSivashinsky(device=self.device)
        frames = self.stored["frames"].to(self.device)  # (sequences, frames, points), divided by std
        if not 1 <= num_sequences < len(frames):
            raise ValueError(
                f"num_sequences={num_sequences}: there are {len(frames)}, and one at least is held out; need 1 to {len(frames) - 1}"
            )
        self.sequences = {False: frames[:num_sequences], True: frames[num_sequences:]}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"dt": self.dt, "std": self.std, "increment": self.increment}

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        if c is None:
            raise ValueError(f"c=None: the solver needs a history; pass c (b, *{self.condition_shape})")
        frame = c[:, -1].double()
        x_0 = self.sample_of(frame, self.equation.solve(frame * self.std, self.dt) / self.std)
        return self.schedule.prediction(x_0.float(), x_t, t, "x_0")

    def sample_of(self, frame: Tensor, following: Tensor) -> Tensor:
        """The sample x_0 that leads from a frame to the following one, of their shape."""
        return following if self.increment is None else (following - frame) / self.increment

    def make_world(self, num_worlds: int, **options: Any) -> KuramotoWorld:
        return KuramotoWorld(num_worlds, self.equation, self.std, self.increment, self.dt, device=self.device, **options)

    def pairs(self, held_out: bool) -> tuple[Tensor, Tensor]:
        """All samples (n, 1, points) of recorded sequences, and the frames before them, (n, 1, 1, points)."""
        frames = self.sequences[held_out]
        x_0 = self.sample_of(frames[:, :-1], frames[:, 1:])
        return x_0.flatten(0, 1)[:, None], frames[:, :-1].flatten(0, 1)[:, None, None]

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n recorded histories, (n, 1, 1, points)."""
        return self.sample_data(n, generator)[1]

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x_0, c = self.pairs(held_out=False)
        rows = torch.randint(len(x_0), (n,), generator=generator, device=self.device)
        return x_0[rows], c[rows]

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        x_0, c = self.pairs(held_out)
        rows = torch.linspace(0, len(x_0) - 1, min(n, len(x_0))).round().long().to(self.device)  # evenly over the sequences
        return x_0[rows], c[rows]

    def make_student(
        self, *, channels: int | None = None, depth: int | None = None, prediction_type: PredictionType | None = None
    ) -> NetworkDenoiser:
        """Makes a convolutional network with random weights.

        Args:
            channels, depth: Its size; default: that of the shipped surrogate.
            prediction_type: What its output means; default: v.

        Raises:
            ValueError: a size below 1, or a prediction type that the schedule does not support.
        """
        student = surrogate(CHANNELS if channels is None else channels, DEPTH if depth is None else depth, prediction_type or "v")
        return student.to(self.device)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The last activation, whose output is (b, channels, points / 2)."""
        return last_features(student)


class Kuramoto(KuramotoSolver):
    """The teacher: a residual convolutional network of 64 channels, trained on noised histories, so that it leads back to the attractor.

    Args:
        num_sequences: Recorded solutions that forward states come from, of 40; the others are held out.
        weights: A safetensors file of another training; default: the shipped one.
        device: Where it computes.
    """

    def __init__(self, num_sequences: int = 32, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(num_sequences, weights, device)
        self.teacher = surrogate()
        network = {name.removeprefix("network."): value for name, value in self.stored.items() if name.startswith("network.")}
        self.teacher.network.load_state_dict(network)
        self.teacher.to(self.device).eval()

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        return self.teacher.predict(x_t, t, c)

    def make_student(
        self, *, channels: int | None = None, depth: int | None = None, prediction_type: PredictionType | None = None
    ) -> NetworkDenoiser:
        """Makes a convolutional network that starts from the teacher's weights, or with another size or output from random ones.

        Args:
            channels, depth: Its size; default: the teacher's.
            prediction_type: What its output means; default: v, as the teacher's.

        Raises:
            ValueError: a size below 1, or a prediction type that the schedule does not support.
        """
        student = super().make_student(channels=channels, depth=depth, prediction_type=prediction_type)
        if (channels or CHANNELS, depth or DEPTH, student.prediction_type) == (CHANNELS, DEPTH, "v"):
            student.network.load_state_dict(self.teacher.network.state_dict())
        return student
