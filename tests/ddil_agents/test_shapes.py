"""Facts about experts of sequences and videos: nothing between the environment and the judge takes a sample for a picture.

`audio` is (channels, length), `video` (channels, frames, height, width); the students are convolutions over those axes.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor, nn
from torchrl.envs import check_env_specs

from ddil_agents import (
    DMD2,
    LCM,
    Algorithm,
    BCConfig,
    BehaviourCloning,
    Beta,
    Dagger,
    DaggerConfig,
    DMD2Config,
    Gail,
    GailConfig,
    LCMConfig,
)
from ddil_agents.commands.load import make_evaluator
from ddil_agents.evaluation.evaluator import evaluate_expert, evaluate_run
from ddil_agents.evaluation.metrics.extractors import load_extractor
from ddil_agents.evaluation.settings import Evaluation
from ddil_env import DenoisingEnv, ExpertPolicy, GaussianMixtureExpert, NetworkDenoiser, StudentPolicy, check_expert, unroll
from ddil_env.gym_env import DenoisingGymEnv
from ddil_env.schedule import Kind
from ddil_env.support import Thresholding
from ddil_env.vector_env import DenoisingVectorEnv

SHAPES: dict[str, tuple[int, ...]] = {"audio": (2, 24), "video": (2, 3, 4, 5)}
pytestmark = pytest.mark.filterwarnings("ignore:.*more features than samples.*")


class Convolutions(nn.Module):
    """(x_t, t, c) → an output of x_t's shape, by two convolutions over its axes, told t and c."""

    def __init__(self, sample_shape: tuple[int, ...], num_ids: int, t_max: float, width: int = 16) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sample_shape) - 2]
        self.t_max = t_max
        self.first = conv(sample_shape[0], width, 3, padding=1)
        self.time, self.condition = nn.Linear(2, width), nn.Embedding(num_ids, width)
        self.middle, self.last = nn.SiLU(), conv(width, sample_shape[0], 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        u = (t / self.t_max)[:, None]
        told = self.time(torch.cat([u, (torch.pi * u).cos()], 1)) + self.condition(torch.zeros_like(t).long() if c is None else c)
        return self.last(self.middle(self.first(x_t) + told.reshape(*told.shape, *(1,) * (x_t.ndim - 2))))


class Smooth(GaussianMixtureExpert):
    """Two classes of smooth samples of any shape, and students that are convolutions."""

    def __init__(self, shape: tuple[int, ...], schedule: Kind = "cosine") -> None:
        grid = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, side) for side in shape), indexing="ij")).sum(0)
        means = torch.stack([torch.sin(4 * grid), torch.cos(3 * grid), -torch.sin(4 * grid), -torch.cos(3 * grid)])
        super().__init__(means, 0.2, schedule=schedule, labels=[0, 0, 1, 1])

    def make_student(self, **options: Any) -> NetworkDenoiser:
        kind = "v" if self.schedule.discrete else "flow"
        return NetworkDenoiser(Convolutions(self.sample_shape, 3, self.schedule.t_max), self.schedule, kind, **options)  # type: ignore[arg-type]

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        assert isinstance(student.network, Convolutions)
        return student.network.middle


@pytest.fixture(params=SHAPES)
def expert(request: pytest.FixtureRequest) -> Smooth:
    return Smooth(SHAPES[request.param])


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_contract_holds_in_any_shape(shape: tuple[int, ...], schedule: Kind) -> None:
    expert = Smooth(shape, schedule)
    check_expert(expert)
    assert expert.decode(torch.zeros(1, *shape)) is None


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_environments_take_any_shape(expert: Smooth, kernel: Any) -> None:
    env = DenoisingEnv(expert, num_steps=3, batch_size=[4], kernel=kernel)
    check_env_specs(env)
    trajectory = env.rollout(3, ExpertPolicy(expert, substeps=4))
    assert trajectory["next", "x_t"].shape == (4, 3, *expert.sample_shape)
    assert bool(trajectory["next", "done"][:, -1].all())
    single = DenoisingGymEnv(expert, 2, kernel=kernel, reward="expert_l2")
    check_env(single, skip_render_check=True)
    assert single.observation_space["x_t"].shape == expert.sample_shape
    vector = DenoisingVectorEnv(expert, 3, 2, output="torch")
    observation, _ = vector.reset(seed=0)
    assert observation["x_t"].shape == (3, *expert.sample_shape)
    assert vector.step(vector.expert_action())[0]["x_t"].shape == (3, *expert.sample_shape)
    with pytest.raises(ValueError, match="it has no pictures"):
        DenoisingGymEnv(expert, 2, render_mode="rgb_array")


def test_a_yaml_of_the_class_makes_a_gym_environment(tmp_path: Any) -> None:
    preset = tmp_path / "audio.yaml"
    preset.write_text(f"expert: {__name__}.Smooth\nshape: [2, 24]\n")
    env = gymnasium.make("ddil/Digits-v0", expert=str(preset), num_steps=2)
    assert env.reset(seed=0)[0]["x_t"].shape == (2, 24)


LEARNERS: list[tuple[type[Algorithm], type[Any], dict[str, Any]]] = [
    (BehaviourCloning, BCConfig, {}),
    (Dagger, DaggerConfig, {"beta": Beta(forward=0.4, teacher=0.2, student=0.4), "p_expert": 0.3, "prioritised": True}),
    (LCM, LCMConfig, {"beta": Beta(forward=0.5, student=0.5), "collect_size": 64}),
    (DMD2, DMD2Config, {"beta": Beta(forward=0.0, teacher=0.5, student=0.5), "gan_weight": 1e-3, "critic_updates": 2}),
    (Gail, GailConfig, {}),
]


@pytest.mark.parametrize(("agent", "config", "options"), LEARNERS, ids=[agent.name for agent, _, _ in LEARNERS])
def test_every_learner_and_the_judge_take_any_shape(
    agent: type[Algorithm], config: type[Any], options: dict[str, Any], expert: Smooth
) -> None:
    thresholding = Thresholding("quantile", roles=("teacher", "student"), samples=64)
    sizes = {
        "batch_size": 16,
        "collect_size": 64,
        "num_steps": 2,
        "teacher_steps": 8,
        "num_updates": 100,
        "warmup_updates": 5,
        "learning_rate": 1e-2,
    }
    learner = agent(expert, config(**{**sizes, "thresholding": thresholding, **options}))
    settings = Evaluation(n=32, n_paths=16, n_action=8)
    untrained = evaluate_run(learner, settings)["models"]
    learner.learn(100, progress=False)
    models = evaluate_run(learner, settings)["models"]
    name = f"{agent.name}@2"
    assert {"teacher@8", "teacher@2", name} == set(models)
    assert models[name]["frechet"] > 0
    if agent.name in ("bc", "dagger"):  # the others need more than 100 updates
        assert models[name]["endpoint_rmse"] < 0.9 * untrained[name]["endpoint_rmse"]
    samples = make_evaluator(learner, n=32).sample(learner.student_policy, learner.grid, learner.kernel)
    assert samples.shape == (32, *expert.sample_shape)
    assert torch.isfinite(samples).all()


def test_experts_are_judged_in_any_shape(expert: Smooth) -> None:
    models = evaluate_expert(expert, [8, 1], Evaluation(n=64, n_paths=16, n_action=8))["models"]
    assert models["teacher@8"]["frechet"] < models["teacher@1"]["frechet"]


@pytest.mark.parametrize("shape", [(2, 3200), (2, 16, 20, 20)], ids=["audio", "video"])
def test_long_samples_are_judged_by_the_averages_over_64_cells(shape: tuple[int, ...]) -> None:
    samples = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="too long to be their own features"):
        load_extractor("identity").features(samples)
    features = load_extractor("latent_pool8").features(samples)
    assert features.shape == (3, 2 * 64)
    torch.testing.assert_close(features.mean(1), samples.flatten(1).mean(1), atol=1e-5, rtol=1e-4)


def test_a_student_saves_and_loads_in_any_shape(expert: Smooth, tmp_path: Any) -> None:
    agent = BehaviourCloning(expert, BCConfig(num_steps=2, teacher_steps=4))
    agent.save_student(tmp_path / "student")
    loaded = StudentPolicy(expert.load_student(tmp_path / "student"), expert)
    x_T, c = torch.randn(3, *expert.sample_shape), torch.zeros(3).long()
    assert torch.equal(unroll(agent.student_policy, agent.grid, x_T, c), unroll(loaded, agent.grid, x_T, c))
    with pytest.raises(ValueError, match="student exists and is not empty; choose another"):
        agent.save_student(tmp_path / "student")
