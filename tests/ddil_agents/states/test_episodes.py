"""States that episodes in a world visit, and learners on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from line_world import GAIN, Steersman

from ddil_agents import DMD2, Beta, Dagger, DaggerConfig, DMD2Config
from ddil_agents.commands.agents import find_agent
from ddil_agents.dart import Dart, DartConfig
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_agents.ppo import PPOAgent, PPOConfig
from ddil_agents.safe_dagger import SafeDagger, SafeDaggerConfig
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.stages import iter_learners, plan_stages
from ddil_env import unroll

SMALL: dict[str, Any] = {
    "num_steps": 2,
    "teacher_steps": 4,
    "num_updates": 12,
    "batch_size": 16,
    "collect_size": 32,
    "updates_per_collect": 4,
    "num_worlds": 8,
    "warmup_updates": 2,
}


def dagger(beta: Beta = Beta(0.5, 0.1, 0.4), expert: Steersman | None = None, **changed: Any) -> Dagger:  # noqa: B008
    return Dagger(expert or Steersman(), DaggerConfig(**{**SMALL, "beta": beta, **changed}))


def test_labels_are_the_teachers_actions_under_the_conditions_that_were_visited() -> None:
    learner = dagger()
    states = learner.trainer.collect()
    assert states["c"].shape == (len(states), 2)
    expected = learner.expert_policy.act(states["x_t"], states["t"], states["s"], states["c"])
    torch.testing.assert_close(states["x_s"], expected)


def test_episodes_of_the_teacher_and_of_the_student_visit_their_own_conditions() -> None:
    """The teacher halves c in every frame; a student that does nothing leaves it where it was."""
    learner = dagger(Beta(0, 0.5, 0.5), num_worlds=64, collect_size=4000)
    idle = torch.zeros(1)
    learner.collector.student_policy.act = lambda x_t, t, s, c, w=None: x_t * (s > 0)[:, None] + idle  # type: ignore[method-assign]
    states = learner.trainer.collect()
    spread = {i: float(states["c"][states["source"] == i].std()) for i in (1, 2)}
    assert spread[2] == pytest.approx(1, abs=0.1)  # N(0, 1), six times
    frames = sum((1 + GAIN) ** (2 * k) for k in range(6)) / 6
    assert spread[1] == pytest.approx(frames**0.5, abs=0.1)
    times = states["t"][states["source"] == 2]
    assert float((times == 99).float().mean()) == pytest.approx(0.5, abs=0.05)  # uniform over the steps


def test_the_actor_is_drawn_for_each_denoising() -> None:
    states = dagger(Beta(0, 0, 1), p_expert=0.5, num_steps=4, teacher_steps=8, collect_size=400).trainer.collect()
    for t, actors in zip(states["t"].tolist(), states["actors"], strict=True):
        before = [99.0, 74.0, 50.0, 25.0].index(t)
        assert int(actors.sum()) in (0, before)
    second = states["actors"][states["t"] == 50][:, :2]
    assert 0.3 < float(second.all(1).float().mean()) < 0.7


def test_what_the_teachers_episodes_visit_is_labelled_before_more_are_run() -> None:
    learner = dagger(Beta(0, 1, 0), num_worlds=8, collect_size=20)
    first = learner.trainer.collect()
    assert learner.collector.world_steps == 48
    second = learner.trainer.collect()
    assert learner.collector.world_steps == 48
    assert not (first["x_t"][:, None] == second["x_t"]).all(-1).any()  # each state once
    learner.trainer.collect()
    assert learner.collector.world_steps == 2 * 48
    assert learner.teacher_nfe == 4 * 96 + 2 * 60  # 96 denoisings of 4 forwards, and 60 labels of 2


def test_dmd2_runs_episodes_now_and_then_and_unrolls_from_the_conditions_that_they_visited() -> None:
    config = DMD2Config(**{**SMALL, "beta": Beta(0, 0.5, 0.5), "episodes_every": 3, "num_updates": 7, "critic_updates": 2})
    learner = DMD2(Steersman(), config)
    collector = learner.collector
    learner.learn(progress=False)
    assert collector.world_steps == 3 * 2 * 8 * 6  # before updates 1, 4 and 7, of teacher and student, 8 worlds of 6 frames
    pools, states = collector.visited, collector.collect(64, (0.0, 0.5, 0.5), 7)
    for source, p_expert in ((1, 1.0), (2, 0.0)):
        c = states["c"][states["source"] == source]
        assert (c[:, None] == pools[p_expert]).all(-1).any(1).all()
    assert pools[1.0].shape == pools[0.0].shape == (48, 2)


def test_dart_disturbs_what_is_executed_and_the_conditions_of_demonstrations() -> None:
    """The teacher halves c in every frame, up to a spread of .05; noise of ν = 2 is added to its samples and to demonstrations."""
    config = DartConfig(
        **{**SMALL, "beta": Beta(0.5, 0.5, 0), "num_worlds": 64, "collect_size": 4000, "execution_noise": 2.0, "condition_noise": 2.0}
    )
    learner = Dart(Steersman(wall=100.0), config)
    states = learner.trainer.collect()
    spread = [float(states["c"][states["source"] == i].std()) for i in (0, 1)]
    assert spread[0] == pytest.approx((1 + 2**2) ** 0.5, abs=0.1)
    variance = [1.0]
    for _ in range(5):
        variance.append((1 + GAIN) ** 2 * variance[-1] + 2**2)
    assert spread[1] == pytest.approx((sum(variance) / 6) ** 0.5, abs=0.15)
    expected = learner.expert_policy.act(states["x_t"], states["t"], states["s"], states["c"])
    torch.testing.assert_close(states["x_s"], expected)  # the label is not disturbed


def test_costs_are_counted_in_forwards_and_in_steps_of_the_world() -> None:
    learner = dagger(Beta(0, 0, 1), num_worlds=8, collect_size=20)
    learner.trainer.collect()
    assert learner.collector.world_steps == 8 * 6  # one episode of six frames in each world
    assert learner.student_nfe == 8 * 6 * 2
    assert learner.teacher_nfe == 20 * 2  # a label takes two steps of the teacher


@pytest.mark.parametrize("name", ["dagger", "dmd2"])
def test_a_run_in_a_world_resumes_exactly(name: str, tmp_path: Path) -> None:
    def make() -> Any:
        if name == "dagger":
            return dagger(expert=Steersman(wall=1.5))  # ends are ragged
        return DMD2(Steersman(wall=1.5), DMD2Config(**{**SMALL, "beta": Beta(0, 0.5, 0.5), "critic_updates": 2}))

    whole = make()
    whole.train(tmp_path, progress=False, checkpoint_every=5)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["world_steps"] == whole.collector.world_steps
    resumed = make().load(tmp_path / "checkpoints" / "step_00000010")
    resumed.train(None, progress=False)
    for ours, theirs in zip(resumed.networks["student"].parameters(), whole.networks["student"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.collector.world_steps == whole.collector.world_steps > 0


def test_a_student_learns_to_steer() -> None:
    learner = dagger(Beta(0.5, 0, 0.5), num_updates=600, learning_rate=1e-2, batch_size=64, collect_size=128, updates_per_collect=8)
    evaluator = EpisodeEvaluator(learner.teacher_policy, learner.grid, n=32)
    before = evaluator.evaluate(learner.student_policy)
    learner.learn(progress=False)
    after, teacher = evaluator.evaluate(learner.student_policy), evaluator.evaluate(evaluator.expert_policy)
    assert after["error_data"] < 0.02 < before["error_data"]
    assert abs(after["return"] - teacher["return"]) < 0.3 < abs(before["return"] - teacher["return"])
    assert after["survival"] == [1.0] * 8
    assert after["length"] == 6
    floor = evaluator.floors()["teacher_halves"]["condition_shift_to_expert"]
    assert teacher["condition_shift_to_expert"] == floor > 0
    assert after["condition_shift_to_expert"] < 2 * floor < before["condition_shift_to_expert"]
    assert before["condition_shift"] > after["condition_shift"]
    c = torch.randn(200, 2)
    x_0 = unroll(learner.student_policy, learner.grid, torch.randn(200, 2), c)[:, -1]
    torch.testing.assert_close(x_0, GAIN * c, atol=0.5, rtol=0)


def test_all_states_of_a_rollout_are_refused_in_a_world() -> None:
    with pytest.raises(ValueError, match="states_per_rollout=all: in a world each denoising of an episode gives one state; use 1"):
        dagger(states_per_rollout="all")


WORLDLY = ("bc", "dagger", "dart", "lcm", "dmd2", "scheduled_sampling", "safe_dagger", "aggrevate", "gail")


@pytest.mark.parametrize("name", WORLDLY)
def test_every_learner_trains_and_samples_in_a_world(name: str) -> None:
    agent = find_agent(name)
    learner = agent(Steersman(), agent.Config(**{**SMALL, "num_updates": 4})).learn(progress=False)
    assert learner.sample(3).shape == (3, 2)
    assert (learner.collector.world_steps > 0) == (sum(learner.config.beta(0)[1:]) > 0)  # type: ignore[attr-defined]


def test_samples_are_drawn_under_conditions_of_ones_own() -> None:
    learner = dagger()
    assert learner.sample(3, c=torch.zeros(3, 2)).shape == (3, 2)
    assert torch.equal(learner.sample(3, c=[0.5, 1.0]), learner.sample(3, c=torch.tensor([[0.5, 1.0]] * 3)))
    with pytest.raises(ValueError, match=r"c of shape \(3, 5\): need finite conditions, \(3, 2\), or \(2,\) for all"):
        learner.sample(3, c=torch.zeros(3, 5))


def test_a_student_that_teaches_the_next_stage_keeps_the_world() -> None:
    config = DaggerConfig(**{**SMALL, "num_updates": 4, "stages": ({"num_steps": 2}, {"num_steps": 1})})
    steps = []
    for _, learner in iter_learners(Dagger, Steersman(), plan_stages(config)):
        learner.train(None, progress=False)
        steps.append(learner.collector.world_steps)  # type: ignore[attr-defined]
    assert len(steps) == 2
    assert min(steps) > 0


def test_what_a_world_does_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="ppo learns from episodes of num_steps=2 steps and condition ids, and Steersman has"):
        PPOAgent(Steersman(), PPOConfig(num_steps=2, teacher_steps=4))
    with pytest.raises(ValueError, match="query_budget=9999: in a world the teacher acts for as long as episodes last"):
        SafeDagger(Steersman(), SafeDaggerConfig(**{**SMALL, "query_budget": 9999}))
    config = SafeDaggerConfig(**{**SMALL, "query_budget": 100, "beta": Beta(0, 0, 1)})
    learner = SafeDagger(Steersman(), config).learn(progress=False)
    assert 0 < learner.teacher_nfe <= 100
