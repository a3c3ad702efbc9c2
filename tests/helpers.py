"""What several test files share: small experts and learners, shares of states, and whether two students are one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn

from ddil_agents import (
    DMD2,
    Algorithm,
    BCConfig,
    BehaviourCloning,
    Beta,
    Dagger,
    DaggerConfig,
    DMD2Config,
    Evaluation,
    Evaluator,
)
from ddil_agents.comparison.arms import Comparison
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.critic import Critic
from ddil_env import (
    DenoisingVectorEnv,
    Expert,
    ExpertPolicy,
    GaussianMixtureExpert,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    TimeGrid,
    load_expert,
)

if TYPE_CHECKING:
    from ddil_env.sb3 import SB3VecEnv

ROOT = Path(__file__).parents[1]  # of the repository

# Experts

CORNERS = [[-0.8, -0.8], [-0.8, 0.8], [0.8, -0.8], [0.8, 0.8]]
SHAPES: dict[str, tuple[int, ...]] = {"1-D": (1,), "2-D": (2,), "picture": (1, 4, 4), "video": (2, 3, 4, 4)}
MEANS = [[-1.0, 0.3, 0.0], [0.8, -0.5, 0.2], [0.1, 0.9, -0.7]]
ENV = """\
expert: ddil_env.GaussianMixtureExpert
means: [[-0.8, 0.0, 0.3], [0.8, 0.2, 0.0], [0.0, -0.7, 0.5]]
stds: 0.2
labels: [0, 1, 1]
"""  # no picture to draw, which is half of a short run


def corners(**options: Any) -> GaussianMixtureExpert:
    return GaussianMixtureExpert(CORNERS, 0.25, [1, 2, 3, 4], **options)


def labelled() -> GaussianMixtureExpert:
    return corners(labels=[0, 0, 1, 1], guidance_scale=2.0)


def space() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, [1, 2, 3])


def guided(**options: Any) -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, [1, 2, 3], labels=[0, 1, 1], guidance_scale=2.0, **options)


def video() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 0.2, schedule="cosine")


def flow() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, schedule="flow")


@cache
def mixture(shape: tuple[int, ...] = (2,), labelled: bool = True, schedule: Any = "scaled_linear") -> GaussianMixtureExpert:
    """Four modes, in two classes if labelled; it has no pictures unless in the plane."""
    means = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixtureExpert(means, [0.1, 0.2, 0.3, 0.4], schedule=schedule, labels=[0, 0, 1, 1] if labelled else None)


@cache
def preset(name: str, **options: Any) -> Expert:
    return load_expert(name, **options)


def random_mixture(shape: tuple[int, ...] = (2,), k: int = 4, **options: Any) -> GaussianMixtureExpert:
    """k random components of unequal weights and widths."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(k, *shape, generator=generator, dtype=torch.float64)
    stds, weights = 0.1 + torch.rand(k, generator=generator), 0.2 + torch.rand(k, generator=generator)
    return GaussianMixtureExpert(means, stds, weights, **options)


class Dataless(GaussianMixtureExpert):
    """An expert that brings no data."""

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        return Expert.sample_data(self, n, generator)


class Scaled(Expert):
    """A conforming expert whose prediction a test may bend: posterior mean of N(0, I)."""

    def __init__(self, bend: Callable[[Prediction], Any] = lambda pred: pred, **options: Any) -> None:
        super().__init__(NoiseSchedule("cosine"), (3,), **options)
        self.bend = bend

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, _ = self.schedule(t, x_t)
        bent: Prediction = self.bend(self.schedule.prediction(alpha * x_t, x_t, t, "x_0"))
        return bent


def make_evaluator(expert: Expert, folder: Path | None = None, **settings: Any) -> Evaluator:
    """Of samples in 4 steps, 60 unless told otherwise."""
    grid = TimeGrid(expert.schedule, 4).to(expert.device)
    return Evaluator(
        ExpertPolicy(expert, 2), grid, Evaluation(**{"n": 60, "n_paths": 20, "n_action": 15, "batch_size": 25, **settings}), folder
    )


def batched(expert: Expert | None = None, n: int = 5, num_steps: int = 3, **options: Any) -> SB3VecEnv:
    """Our environments as stable-baselines3's, with the action box and the reward that PPO needs."""
    from ddil_env.sb3 import SB3VecEnv

    given: dict[str, Any] = {"reward": "expert_l2", "action_bound": 5.0, "autoreset_mode": "SameStep", **options}
    return SB3VecEnv(DenoisingVectorEnv(expert or mixture(), n, num_steps, **given))


def expert_action(env: Any) -> np.ndarray:
    """The expert's action at a single env's present state."""
    action: Tensor = env.unwrapped.mdp.expert_action(env.unwrapped._state)[0]
    return action.cpu().numpy()


# Learners

N, K = 4, 2  # student steps; expert steps in each
FORWARD, TEACHER, STUDENT = Beta(1, 0, 0), Beta(0, 1, 0), Beta(0, 0, 1)
ALL = Beta(0.5, 0.2, 0.3)
MIXTURE = Beta(0.5, 0.1, 0.4)


def only(source: int) -> Any:
    """β of one source."""
    return tuple(float(i == source) for i in range(3))


def settings(**changed: Any) -> dict[str, Any]:
    """A run of a tenth of a second."""
    small = {"num_updates": 20, "teacher_steps": N * K, "batch_size": 16, "collect_size": 32, "updates_per_collect": 4, "capacity": 64}
    return {**small, "warmup_updates": 3, "student": {"width": 16, "depth": 2}, **changed}


def make(agent: type[Algorithm], expert: Expert | None = None, **changed: Any) -> Any:
    return agent(expert or corners(), agent.Config(**settings(**changed)))


def bc(**changed: Any) -> BehaviourCloning:
    return BehaviourCloning(corners(), BCConfig(**settings(**changed)))


def dagger(**changed: Any) -> Dagger:
    return Dagger(corners(), DaggerConfig(**settings(**{"beta": MIXTURE, **changed})))


def matching(expert: Expert | None = None, **changed: Any) -> DMD2:
    small = {"num_updates": 6, "batch_size": 8, "collect_size": 16, "updates_per_collect": 2, "critic_updates": 2}
    return DMD2(expert or space(), DMD2Config(**settings(**{**small, **changed})))


def learn(learner: Any, num_updates: int | None = None, **where: Any) -> Any:
    return learner.learn(num_updates, progress=False, **where)


def critic(learner: DMD2) -> Critic:
    found: Critic = learner.networks["critic"]
    return found


def trained(expert: Any, **options: Any) -> NetworkDenoiser:
    """A student that has left its teacher."""
    student: NetworkDenoiser = expert.make_student(**options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return student


# States and weights


def fields(states: TensorDict) -> tuple[Any, ...]:
    return tuple(states.get(key, None) for key in ("x_t", "t", "s", "c", "w", "x_s"))


def stream(name: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, name))


def latents(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal down to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_samples(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-4 in units of the latents' spread: a random ε-network's have spread 16, where float32 resolves 1e-5."""
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(ours.std()))


# Commands


def comparison(**settings: Any) -> Comparison:
    return Comparison(**{"env": "gaussian_mixture", "arms": {"bc": {"agent": "bc"}, "dagger": {"agent": "dagger"}}, **settings})


class Killed(BaseException):
    """As a kill: nothing of the program catches it."""


def student(run: Path) -> dict[str, Tensor]:
    return load_file(run / "student" / "student.safetensors")


def same_students(a: Path, b: Path) -> bool:
    ours, theirs = student(a), student(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refused(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that ends in exit status 2 and leaves nothing behind in the working directory."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert sorted(Path.cwd().rglob("*")) == before
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err
