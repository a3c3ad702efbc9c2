"""Diffusion policies (Chi et al. 2023): a sample is an action, a condition an observation, and the world is a simulator."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_env.denoiser import NetworkDenoiser
from ddil_env.expert import Expert
from ddil_env.mlp import TimeConditionedMLP, last_activation
from ddil_env.prediction import Prediction, PredictionType
from ddil_env.schedule import NoiseSchedule
from ddil_env.weights import read_tensors
from ddil_env.worlds.world import World

NUM_TRAIN_STEPS = 100  # of the noise schedule, as in Chi et al. 2023
CLIP = 5.0  # standard deviations within which normalised observations are kept


def policy_network(sample_shape: tuple[int, ...], condition_shape: tuple[int, ...], width: int, depth: int) -> NetworkDenoiser:
    """An untrained policy in v, on the cosine schedule of 100 steps."""
    schedule = NoiseSchedule("cosine", num_train_steps=NUM_TRAIN_STEPS)
    network = TimeConditionedMLP(sample_shape, 0, schedule.t_max, width, depth, condition_shape=condition_shape)
    return NetworkDenoiser(network, schedule, "v")


class DiffusionPolicy(Expert):
    """A teacher in a world, with the demonstrations that it was trained beside.

    Args:
        file: A safetensors file: the network's weights (`network.…`), `mean` and `std` of the observations where they are normalised, and
            the demonstrations, `c` (m, *condition_shape), `x_0` (m, *sample_shape) and `episode` (m,).
        width, depth: Of its MLP.
        num_demos: Demonstrations, whole episodes, that forward states come from; the others are held out.
        device: Where it computes.
        demonstrations: Observations (m, observation), actions (m, *sample_shape) in [−1, 1] and episodes (m,) in the place of the file's.

    Raises:
        ValueError: a file that is absent, damaged or of another network; more demonstrations than there are.
    """

    def __init__(
        self,
        file: Path,
        width: int,
        depth: int,
        num_demos: int,
        device: torch.device | str = "cpu",
        demonstrations: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        stored = read_tensors(file, "train it again")
        c, x_0 = stored["c"], stored["x_0"]
        self.teacher = policy_network(tuple(x_0.shape[1:]), tuple(c.shape[1:]), width, depth)
        super().__init__(self.teacher.schedule, tuple(x_0.shape[1:]), condition_shape=tuple(c.shape[1:]), device=device)
        weights = {name.removeprefix("network."): value for name, value in stored.items() if name.startswith("network.")}
        self.teacher.network.load_state_dict(weights)
        self.teacher.to(self.device).eval()
        self.width, self.depth = width, depth
        self.mean, self.std = stored.get("mean"), stored.get("std")
        episode, self.brought = stored["episode"], demonstrations is not None
        if demonstrations is not None:
            observations, x_0, episode = demonstrations
            c = observations if self.mean is None or self.std is None else ((observations - self.mean) / self.std).clamp(-CLIP, CLIP)
        episodes = int(episode.max()) + 1
        if not 1 <= num_demos < episodes:
            raise ValueError(f"num_demos={num_demos}: there are {episodes}, and one at least is held out; need 1 to {episodes - 1}")
        first = episode < num_demos
        self.demos = {held_out: (x_0[at].to(self.device), c[at].to(self.device)) for held_out, at in ((False, first), (True, ~first))}

    def identity(self) -> dict[str, Any]:
        if not self.brought:
            return super().identity()
        digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for pair in self.demos.values() for x in pair))
        return super().identity() | {"demonstrations": digest.hexdigest()[:16]}

    @abstractmethod
    def make_world(self, num_worlds: int, **options: object) -> World:
        """Worlds that the policy acts in."""

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        return self.teacher.predict(x_t, t, c)

    def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n observations of the demonstrations, (n, *condition_shape)."""
        return self.sample_data(n, generator)[1]

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x_0, c = self.demos[False]
        rows = torch.randint(len(x_0), (n,), generator=generator, device=self.device)
        return x_0[rows], c[rows]

    def reference_data(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        x_0, c = self.demos[held_out]
        rows = torch.linspace(0, len(x_0) - 1, min(n, len(x_0))).round().long().to(self.device)  # evenly over the episodes
        return x_0[rows], c[rows]

    def make_student(
        self, *, width: int | None = None, depth: int | None = None, prediction_type: PredictionType | None = None
    ) -> NetworkDenoiser:
        """Makes an MLP that starts from the teacher's weights.

        Args:
            width, depth: Its size; default: the teacher's. With another the student starts from random weights.
            prediction_type: What its output means; default: v, as the teacher's.

        Raises:
            ValueError: a size below 1, or a prediction type that the schedule does not support.
        """
        w, d = width or self.width, depth or self.depth
        if min(w, d) < 1:
            raise ValueError(f"width={width}, depth={depth}: a student has at least one hidden layer of at least one unit")
        kind = prediction_type or "v"
        self.schedule.check_prediction_type(kind)
        network = TimeConditionedMLP(self.sample_shape, 0, self.schedule.t_max, w, d, condition_shape=self.condition_shape)
        if (w, d, kind) == (self.width, self.depth, "v"):
            network.load_state_dict(self.teacher.network.state_dict())
        return NetworkDenoiser(network.to(self.device), self.schedule, kind)

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        """The last activation, whose output is (b, width)."""
        return last_activation(student)
