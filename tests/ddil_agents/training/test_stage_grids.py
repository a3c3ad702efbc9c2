"""A student that teaches the next stage is asked at the times that it was trained on, and at no other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import corners
from torch import Tensor

from ddil_agents import BCConfig, BehaviourCloning, Dagger, DaggerConfig, SafeDagger, SafeDaggerConfig, bc
from ddil_agents.training.stages import iter_learners, plan_stages
from ddil_env import ExpertPolicy, NoiseSchedule, TimeGrid, unroll
from ddil_env.experts.distilled import Distilled
from ddil_env.time_grid import substep_times

SMALL: dict[str, Any] = {
    "num_updates": 4,
    "batch_size": 8,
    "collect_size": 64,
    "updates_per_collect": 2,
    "capacity": 256,
    "student": {"width": 8, "depth": 1},
}


def asked_of_students(agent: Any, config: Any) -> list[tuple[set[float], set[float]]]:
    """Trains a chain; of each stage whose teacher is a student, the times that this was trained on, and those it is asked at."""
    found, trained = [], set[float]()
    for stage, learner in iter_learners(agent, corners(), plan_stages(config)):
        asked: set[float] = set()
        if isinstance(learner.expert, Distilled):
            learner.expert.student.register_forward_pre_hook(lambda module, args, asked=asked: asked.update(args[1].tolist()))
        learner.learn(progress=False)
        x_T = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
        unroll(learner.teacher_policy, learner.grid, x_T)  # its own rollout
        if stage.teacher == "last":
            found.append((trained, asked))
        trained = set(learner.grid.times[:-1].tolist())
    return found


def stages(*num_steps: int, **settings: Any) -> dict[str, Any]:
    return {**SMALL, "teacher_steps": num_steps[0], "stages": tuple({"num_steps": n} for n in num_steps), **settings}


@pytest.mark.parametrize(
    ("num_steps", "grid"),
    [((8, 4, 2, 1), "linspace"), ((16, 8), "linspace"), ((16, 4), "linspace"), ((16, 8), "trailing"), ((4, 2, 1), "dmd2")],
)
def test_a_student_that_teaches_is_asked_at_all_times_of_its_own_grid_and_no_other(num_steps: tuple[int, ...], grid: Any) -> None:
    found = asked_of_students(Dagger, DaggerConfig(**stages(*num_steps, grid=grid)))
    assert len(found) == len(num_steps) - 1
    for trained, asked in found:
        assert asked == trained


def test_a_check_of_fewer_steps_is_at_times_of_that_grid_too() -> None:
    beta = {"forward": 0.5, "student": 0.5, "teacher": 0.0}
    first, second = {"num_steps": 6, "gate": 1.0}, {"num_steps": 2, "check_substeps": 2, "gate": 0.5, "beta": beta}
    config = SafeDaggerConfig(**{**SMALL, "num_steps": 2, "gate": 1.0, "teacher_steps": 6, "stages": (first, second)})
    ((trained, asked),) = asked_of_students(SafeDagger, config)
    assert asked == trained


def test_a_label_is_the_students_own_steps_bit_for_bit() -> None:
    chain = iter_learners(BehaviourCloning, corners(), plan_stages(BCConfig(**stages(8, 4))))
    (_, first), (_, second) = chain
    assert isinstance(second.expert, Distilled)
    x_T = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    eight = unroll(ExpertPolicy(second.expert), first.grid, x_T)
    assert torch.equal(unroll(second.expert_policy, second.grid, x_T), eight[:, ::2])
    for i, (t, s) in enumerate(pairwise(second.grid.times)):
        assert torch.equal(second.expert_policy.act(eight[:, 2 * i], t.expand(5), s.expand(5)), eight[:, 2 * i + 2])


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule(), NoiseSchedule(num_train_steps=4000), NoiseSchedule("flow")], ids=["1000", "4000", "flow"]
)
@pytest.mark.parametrize("most", range(1, 65))
def test_linspace_grids_nest(most: int, schedule: NoiseSchedule) -> None:
    fine = TimeGrid(schedule, most).times
    for n in range(1, most + 1):
        if most % n == 0:
            assert torch.equal(TimeGrid(schedule, n).times, fine[:: most // n])


def test_times_that_the_teacher_was_not_trained_on_are_refused_before_any_training() -> None:
    for settings, message in (
        (
            stages(16, 8, grid="dmd2"),
            r"stage 2 of 2: grid=dmd2, num_steps=8: t = 874 is not among the 16 times .* set grid to linspace or trailing",
        ),
        ({**SMALL, "teacher_steps": 8, "stages": ({"num_steps": 8}, {"num_steps": 4, "grid": "trailing"})}, "t = 499 is not among the 8"),
    ):
        with pytest.raises(ValueError, match=message):
            next(iter_learners(BehaviourCloning, corners(), plan_stages(BCConfig(**settings))))
    other = {**SMALL, "teacher_steps": 16, "grid": "dmd2", "stages": ({"num_steps": 16}, {"num_steps": 8, "expert": "original"})}
    next(iter_learners(BehaviourCloning, corners(), plan_stages(BCConfig(**other))))  # which knows all times


def test_the_command_refuses_such_stages_in_one_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--env", "gaussian_mixture", "--grid", "dmd2", "--teacher_steps", "16", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        bc.main([*argv, "--stages", "[{num_steps: 16}, {num_steps: 8}]"])
    assert "t = 874 is not among the 16 times" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_the_original_expert_steps_in_equal_strides_as_ever(k: int) -> None:
    expert = corners()
    x_t, t, s = torch.randn(4, 2), torch.tensor([999.0, 749, 500, 250]), torch.tensor([749.0, 500, 250, 0])

    def strides(x: Tensor) -> Tensor:
        for now, then in pairwise(substep_times(expert.schedule, t, s, k)):
            x = expert.predict(x, now).latent(then)
        return x

    assert torch.equal(ExpertPolicy(expert, k).act(x_t, t, s), strides(x_t))


def test_a_student_whose_grid_nobody_names_steps_in_equal_strides() -> None:
    expert, t, s = corners(), torch.tensor([999.0, 749, 500, 250]), torch.tensor([749.0, 500, 250, 0])
    assert torch.equal(Distilled(expert, expert.make_student()).substep_times(t, s, 3), substep_times(expert.schedule, t, s, 3))
