"""Stages: how a chain of runs is planned, what each student starts from and learns from, and that a killed chain ends the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from ddil_agents import BCConfig, BehaviourCloning, Dagger, DaggerConfig, DistributionMatching, DMD2Config, Learner, bc, dagger, report
from ddil_agents.commands.load import load_run
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.training.checkpoint import read_support
from ddil_agents.training.loop import read_metrics
from ddil_agents.training.stages import Stage, better_weights, judged, learners, plan
from ddil_env import DdimPolicy, Expert, ExpertPolicy, GaussianMixtureExpert, NoDataError, TimeGrid, invert_ddim, unroll
from ddil_env.experts.digits import Digits
from ddil_env.experts.distilled import Distilled
from ddil_env.support import Thresholding

CORNERS = [[-0.8, -0.8], [-0.8, 0.8], [0.8, -0.8], [0.8, 0.8]]
SMALL: dict[str, Any] = {
    "num_updates": 5,
    "teacher_steps": 8,
    "batch_size": 16,
    "collect_size": 32,
    "updates_per_collect": 4,
    "capacity": 64,
    "warmup_updates": 3,
    "student": {"width": 16, "depth": 2},
}


@pytest.fixture(autouse=True)
def _callers_generator() -> Iterator[None]:
    """Loading sets torch's own generator; no test sees another's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def corners() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(CORNERS, 0.25, [1, 2, 3, 4])


def labelled(std: float = 0.25) -> GaussianMixtureExpert:
    return GaussianMixtureExpert(CORNERS, std, [1, 2, 3, 4], labels=[0, 0, 1, 1])


def cloning(*stages: dict[str, Any], **changed: Any) -> BCConfig:
    return BCConfig(**{**SMALL, **changed}, stages=stages)


def chain(expert: Expert, config: BCConfig) -> Iterator[tuple[Stage, Learner]]:
    return learners(BehaviourCloning, expert, plan(config))


def learn(learner: Learner) -> Learner:
    return learner.learn(progress=False)


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# The plan


def test_without_stages_there_is_one_whose_teacher_is_the_original() -> None:
    config = cloning(num_steps=2)
    assert plan(config) == [Stage(config, "original", ".")]


def test_teacher_steps_are_by_default_those_of_the_teacher() -> None:
    stages = plan(
        cloning(
            {"num_steps": 16},
            {"num_steps": 8},
            {"num_steps": 8, "expert": "same"},
            {"num_steps": 8, "expert": "original"},
            {"num_steps": 4, "expert": "same"},
            {"num_steps": 2},
            {"num_steps": 1, "expert": "last"},
            {"num_steps": 1, "expert": "same", "teacher_steps": 1},
            teacher_steps=32,
        )
    )
    assert [stage.teacher for stage in stages] == ["original", "last", "same", "original", "same", "last", "last", "same"]
    assert [stage.config.teacher_steps for stage in stages] == [32, 16, 16, 32, 32, 4, 2, 1]
    assert [stage.config.num_steps for stage in stages] == [16, 8, 8, 8, 4, 2, 1, 1]
    assert [stage.directory for stage in stages] == [f"stage_{n}" for n in range(1, 9)]
    assert all(stage.config.stages == () for stage in stages)


def test_a_student_that_teaches_has_no_more_steps_than_its_own() -> None:
    told = "stage 2 of 2: teacher_steps=16: its teacher is a student of 8 steps, which it was trained on alone; leave it out, or choose"
    with pytest.raises(ValueError, match=told):
        plan(cloning({"num_steps": 8}, {"num_steps": 4, "teacher_steps": 16}, teacher_steps=32))


def test_a_stage_changes_what_it_names_and_keeps_the_rest() -> None:
    base = DaggerConfig(**SMALL, learning_rate=3e-3, thresholding=Thresholding(kind="static", bound=2.0))
    changes = {"num_steps": 4, "beta": {"student": 0.8}, "thresholding": {"roles": ["student", "teacher"]}, "weighting": "snr_plus_one"}
    first, second = plan(DaggerConfig(**{**vars(base), "stages": ({"num_steps": 8}, changes)}))
    assert (first.config.beta.forward, first.config.beta.teacher, first.config.beta.student) == (0.5, 0.1, 0.4)
    assert second.config.beta.shares == pytest.approx((0.5 / 1.4, 0.1 / 1.4, 0.8 / 1.4))
    assert second.config.thresholding == Thresholding(kind="static", bound=2.0, roles=("student", "teacher"))
    assert isinstance(second.config, DaggerConfig)
    assert isinstance(first.config, DaggerConfig)
    assert (first.config.weighting, second.config.weighting) == ("truncated_snr", "snr_plus_one")
    changed = {name for name, value in vars(second.config).items() if value != getattr(base, name)}
    assert changed == {"beta", "thresholding", "weighting", "seed"}  # num_steps is 4 in both, 8 teacher steps too


def test_values_are_read_as_in_a_yaml_file() -> None:
    (stage,) = plan(cloning({"learning_rate": "3e-3", "guidance_range": [1, 4], "adam_betas": [0.5, 0.9], "student": {"width": 32}}))
    assert (stage.config.learning_rate, stage.config.guidance_range, stage.config.adam_betas) == (3e-3, (1.0, 4.0), (0.5, 0.9))
    assert stage.config.student == {"width": 32}


def test_every_stage_has_a_seed_of_its_own_unless_it_names_one() -> None:
    stages = plan(cloning({}, {}, {"seed": 5}, {}, seed=1))
    other = plan(cloning({}, {}, {"seed": 5}, {}, seed=2))
    assert stages[2].config.seed == other[2].config.seed == 5
    assert len({stage.config.seed for stage in [*stages, *other]}) == 7
    assert [stage.config.seed for stage in plan(cloning({}, {}, {"seed": 5}, {}, seed=1))] == [stage.config.seed for stage in stages]


def test_guidance_is_absorbed_by_a_student_that_is_not_told() -> None:
    def guidance(*stages: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(stage.config.guidance_scale, stage.config.guidance_range) for stage in plan(cloning(*stages, guidance_scale=3.0))]

    none, told = (None, None), (3.0, (1.0, 4.0))
    ranged = {"guidance_range": [1.0, 4.0]}
    assert guidance({}, {}, {"expert": "same"}, {"expert": "original"}) == [(3.0, None), none, none, (3.0, None)]
    assert guidance({}, {"expert": "same"}, {}) == [(3.0, None), (3.0, None), none]
    assert guidance({}, {**ranged, "expert": "original"}, ranged, {**ranged, "expert": "same"}) == [(3.0, None), told, told, told]


@pytest.mark.parametrize("changes", [{"guidance_scale": 2.0}, {"guidance_range": [1.0, 4.0]}])
def test_guidance_of_a_stage_whose_teacher_has_it_built_in_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stage 2 of 2: .*guidance"):
        plan(cloning({}, changes, guidance_scale=3.0))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (({}, {"bath_size": 3}), r"stage 2 of 2: .*bath_size"),
        (({"batch_size": "many"},), r"stage 1 of 1: .*batch_size"),
        (({}, {}, {"batch_size": 0}), "stage 3 of 3: batch_size=0: need at least 1"),
        (({"beta": {"studnet": 0.3}},), r"stage 1 of 1: .*studnet"),
        (({"beta": {"forward": -1.0}},), r"stage 1 of 1: .*beta=.*need finite shares"),
        (({"thresholding": {"roles": ["judge"]}},), r"(?s)stage 1 of 1: .*judge"),
        (({"grid": "karras"},), r"stage 1 of 1: .*grid"),
        (({}, {"expert": "first"}), "stage 2 of 2: expert='first': choose one of last, same, original"),
        (({"expert": "last"},), "stage 1 of 1: expert='last': .*the first stage's is the original"),
        (({"expert": "same"},), "stage 1 of 1: expert='same': .*the first stage's is the original"),
        (({}, {"stages": []}), "stage 2 of 2: stages cannot be set for one stage"),
        (({"num_steps": 4}, {"num_steps": 3}), "stage 2 of 2: teacher_steps=4 is no multiple of num_steps=3"),
        (({"num_steps": 2}, {"num_steps": 4}), "stage 2 of 2: teacher_steps=2 is no multiple of num_steps=4"),
        (({"weighting": "snr"},), r"stage 1 of 1: .*weighting"),
    ],
)
def test_a_wrong_stage_is_refused_by_its_number(stages: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(cloning(*stages))


@pytest.mark.parametrize(("num_steps", "steps"), [(8, 32), (4, 32), (3, 3), (1, 32)])
def test_a_student_is_judged_against_the_original_teacher_in_the_runs_own_steps(num_steps: int, steps: int) -> None:
    config = cloning({"num_steps": num_steps, "teacher_steps": num_steps}, teacher_steps=32, guidance_scale=2.0)
    against = judged(config, plan(config)[0].config)
    assert (against.num_steps, against.teacher_steps, against.guidance_scale) == (num_steps, steps, 2.0)


def test_a_stage_with_guidance_of_its_own_can_be_judged() -> None:
    config = cloning({"guidance_range": [2.0, 14.0], "guidance_scale": 5.0}, guidance_scale=1.5)
    judged(config, plan(config)[0].config)


# What a student starts from and learns from


@pytest.mark.parametrize("better", ["average", "last"])
@pytest.mark.parametrize("data_free", [False, True])
def test_the_weights_that_err_less_on_held_out_states_go_on(data_free: bool, better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise NoDataError("none")

    expert = corners()
    if data_free:
        monkeypatch.setattr(expert, "reference_data", none)
    ((_, learner),) = chain(expert, cloning({"num_steps": 4}))
    other = learner.average if better == "last" else learner.trainables["student"].bare
    with torch.no_grad():
        for p in other.parameters():
            p += 0.3
    errors, network = better_weights(learner)
    assert network is {"average": learner.average, "last": learner.trainables["student"].bare}[better]
    assert errors[better] == min(errors.values()) < max(errors.values())
    assert better_weights(learner)[0] == errors  # the same states each time


def test_each_student_starts_from_the_lasts_better_weights_bit_for_bit() -> None:
    last: Learner | None = None
    for stage, learner in chain(corners(), cloning({"num_steps": 8}, {"num_steps": 4}, {"num_steps": 4, "expert": "original"}, ema=0.9)):
        if last is not None:
            better = weights(better_weights(last)[1])
            assert torch.equal(weights(learner.student), better)
            assert torch.equal(weights(learner.average), better)
            assert not torch.equal(weights(last.average), weights(last.student))
        before = weights(learner.student)
        last = learn(learner)
        assert not torch.equal(weights(learner.student), before)
        assert learner.step == stage.config.num_updates


def test_the_teacher_is_the_last_student_the_last_teacher_or_the_original() -> None:
    expert = corners()
    names = ["original", "last", "same", "original", "same", "last"]
    stages = chain(expert, cloning(*({"num_steps": 2, "teacher_steps": 2, "expert": name} for name in names)))
    x_t, t = torch.randn(5, 2), torch.full((5,), 600.0)
    passed: list[Learner] = []
    for name, (_, learner) in zip(names, stages, strict=True):
        if name == "last":
            assert isinstance(learner.expert, Distilled)
            assert torch.equal(weights(learner.expert.student), weights(better_weights(passed[-1])[1]))
        else:
            assert learner.expert is (expert if name == "original" else passed[-1].expert)
        before = learner.expert.predict(x_t, t).x_0
        passed.append(learn(learner))
        assert torch.equal(learner.expert.predict(x_t, t).x_0, before)  # a teacher stands still while its student learns


def test_a_stage_costs_as_many_forwards_as_its_own_teacher_takes() -> None:
    costs = []
    for _, learner in chain(corners(), cloning({"num_steps": 4}, {"num_steps": 2}, {"num_steps": 2, "expert": "original"})):
        costs.append(learn(learner).teacher_nfe)
    assert costs == [2 * 32 * k for k in (2, 2, 4)]  # two collections


def test_stages_that_threshold_alike_calibrate_once() -> None:
    calibrated = {"kind": "quantile", "calibrate_on": "teacher", "samples": 20}
    stages = chain(corners(), cloning({"thresholding": calibrated}, {"thresholding": calibrated}, {"thresholding": {"kind": "quantile"}}))
    (_, first), (_, second), (_, third) = stages
    assert first.teacher_nfe == 20 * 8
    assert second.support is first.support
    assert second.teacher_nfe == 0
    assert third.support != first.support


def test_a_second_part_warms_up_again() -> None:
    courses = []
    for _, learner in chain(corners(), cloning({"num_steps": 4}, {"num_steps": 2}, {"num_steps": 2, "expert": "same"}, learning_rate=4e-3)):
        student, rates = learner.trainables["student"], []
        for _ in range(5):
            learner.collect()
            learner.update(learner.draw())
            rates.append(student.last_learning_rate)
        courses.append(rates)
        assert student.optimizer.state_dict()["state"][0]["step"] == 5  # momenta begin anew
    assert courses[0] == pytest.approx([1e-3, 2e-3, 2.4e-3, 1.6e-3, 0.8e-3])
    assert courses[1] == courses[2] == courses[0]


def test_a_student_of_another_architecture_is_refused() -> None:
    for second in ({"student": {"width": 8, "depth": 2}}, {"student": {"width": 16, "depth": 3}}):
        stages = chain(corners(), cloning({"num_steps": 4}, second))
        with pytest.raises(ValueError, match="stage 2 of 2: the student cannot start from the last one's weights"):
            next(stages)  # before the first is trained


def test_a_critic_starts_as_the_students_twin_in_every_stage() -> None:
    config = DMD2Config(**SMALL, critic_updates=2, stages=({"num_steps": 4}, {"num_steps": 4}))
    for _, learner in learners(DistributionMatching, corners(), plan(config)):
        assert torch.equal(weights(learner.trainables["critic"].bare), weights(learner.student))
        learn(learner)


# Conversion


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits("digits8")


@pytest.mark.parametrize("kind", ["eps", "x_0"])
def test_conversion_learns_the_teachers_own_prediction(kind: str, digits: Digits) -> None:
    changed = {"batch_size": 8, "collect_size": 48, "updates_per_collect": 12, "num_updates": 12, "teacher_steps": 4, "ema": 0.8}
    stage = {"num_steps": 4, "student": {"prediction_type": kind}, "learning_rate": 3e-3, "thresholding": {"roles": []}}
    ((_, learner),) = chain(digits, cloning(stage, **{**changed, "student": {}}))
    batch = learner.collector.collect(32, (1, 0, 0), 0)
    x_t, t, s, x_s, c = (batch[key] for key in ("x_t", "t", "s", "x_s", "c"))
    believed = digits.predict(x_t, t, c)
    torch.testing.assert_close(invert_ddim(digits.schedule, x_t, t, x_s, s).x_0, believed.x_0, atol=1e-5, rtol=1e-5)
    assert learner.student.prediction_type == kind

    def losses() -> Tensor:
        with torch.no_grad():
            return learner.loss(batch)

    before = losses()
    with torch.no_grad():
        error = (learner.student(x_t, t, c).x_0 - believed.x_0).square().flatten(1).mean(1)
    torch.testing.assert_close(before, learner.weight(t).float() * error, rtol=1e-3, atol=1e-4)  # type: ignore[attr-defined]
    learn(learner)
    # ε on the cosine schedule: x̂_0 = (x − σ ε̂)/α and α_999 = 5e-5, so that the first step holds all of the loss.
    after = losses()
    assert float(after.mean()) < 0.2 * float(before.mean())
    if kind == "x_0":
        for time in t.unique():
            assert float(after[t == time].mean()) < 0.5 * float(before[t == time].mean())


# Guidance conditioning


def told(learner: Learner, batch: Any, w: float) -> Tensor:
    """The averaged student's x̂_0 when told w."""
    with torch.no_grad():
        return learner.average.predict(batch["x_t"], batch["t"], batch["c"], torch.full_like(batch["t"], w)).x_0


def test_guidance_conditioning_starts_from_the_last_student_and_learns_to_answer_for_w() -> None:
    expert = labelled(0.4)
    fast = {"batch_size": 128, "collect_size": 512, "updates_per_collect": 8, "capacity": 4096, "warmup_updates": 10, "ema": 0.95}
    config = cloning(
        {"num_updates": 100},
        {"num_updates": 200, "expert": "original", "guidance_range": [1, 4], "guidance_scale": 2.0},
        **{**fast, "num_steps": 4, "teacher_steps": 4, "learning_rate": 1e-2, "student": {"width": 64, "depth": 2}},
    )
    stages = chain(expert, config)
    first = learn(next(stages)[1])
    assert not first.student.guidance_embedding
    second = next(stages)[1]
    assert second.student.guidance_embedding
    batch = second.collector.collect(256, (1, 0, 0), 0)
    assert 1 <= batch["w"].min() < 1.5
    assert 3.5 < batch["w"].max() <= 4
    with torch.no_grad():
        as_it_was = better_weights(first)[1].predict(batch["x_t"], batch["t"], batch["c"]).x_0
    for w in (1.0, 2.5, 4.0):
        assert torch.equal(told(second, batch, w), as_it_was)
    learn(second)
    for w, other in ((1.0, 4.0), (4.0, 1.0)):
        own, theirs = (
            float((told(second, batch, w) - expert.guided(batch["x_t"], batch["t"], batch["c"], v).x_0).square().mean()) for v in (w, other)
        )
        assert own < 0.1  # .005 to .028 over two seeds
        assert theirs > 1.0


def test_a_told_student_stays_told_and_teaches_what_it_is_told() -> None:
    config = cloning({"num_steps": 4}, {"num_steps": 2}, guidance_range=(1.0, 4.0), guidance_scale=2.0)
    stages = chain(labelled(), config)
    first = learn(next(stages)[1])
    second = next(stages)[1]
    assert torch.equal(weights(second.student), weights(first.average))
    assert second.student.guidance_embedding
    assert second.expert.guidance_scale == second.reference.guidance_scale == 2.0
    batch = second.collector.collect(32, (1, 0, 0), 0)
    x_t, t, c, w, s = (batch[key] for key in ("x_t", "t", "c", "w", "s"))
    middle = first.grid.previous(t)  # 749, where half of the way is 750
    x_m = first.average.predict(x_t, t, c, w).latent(middle)
    x_s = first.average.predict(x_m, middle, c, w).latent(s)
    torch.testing.assert_close(batch["x_s"], x_s.detach(), atol=1e-5, rtol=1e-5)
    assert (batch["nfe"] == 2).all()  # one forward a step, where the original takes a pair


def test_a_told_student_cannot_become_one_that_is_not() -> None:
    stages = chain(labelled(), cloning({"num_steps": 4, "guidance_range": [1.0, 4.0]}, {"num_steps": 2}))
    with pytest.raises(ValueError, match=r"stage 2 of 2: the student cannot start from the last one's weights: .*cond_proj"):
        next(stages)


# Progressive distillation


def test_progressive_distillation_in_stages_brings_one_step_near_the_teachers_eight() -> None:
    # Sliced W2 to the teacher's 8 steps: .039, .073, .130 after 4, 2, 1 steps with seed 0; .032, .064, .101 with 1; .052, .076, .115
    # with 2. The teacher's own 4, 2 and 1 steps are at .144, .385 and .664.
    expert = corners()
    stages = {"num_steps": 4, "num_updates": 400, "learning_rate": 1e-2}, {"num_steps": 2}, {"num_steps": 1}
    fast = {"batch_size": 256, "collect_size": 512, "updates_per_collect": 8, "capacity": 2048, "warmup_updates": 20, "ema": 0.97}
    config = cloning(*stages, **fast, num_updates=100, learning_rate=5e-3, student={"width": 64, "depth": 2})
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    eight = unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, 8), x_T)[:, -1]

    def distance(policy: DdimPolicy, grid: TimeGrid) -> float:
        return sliced_wasserstein(unroll(policy, grid, x_T)[:, -1], eight)

    for bound, (_, learner) in zip((0.1, 0.13, 0.2), chain(expert, config), strict=True):
        assert distance(ExpertPolicy(expert), learner.grid) > 1.3 * bound
        learn(learner)
        assert distance(learner.student_policy, learner.grid) < bound


# The command


DIGITS = """\
num_updates: 4
teacher_steps: 4
batch_size: 4
collect_size: 8
updates_per_collect: 2
log_every: 2
checkpoint_every: 3
evaluate: {n: 12, n_action: 4}
stages:
  - {num_steps: 4, beta: {student: 0.0}}
  - {num_steps: 2}
  - {num_steps: 2, expert: same, num_updates: 5, beta: {forward: 0.2}}
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of three stages on digits8."""
    root = tmp_path_factory.mktemp("staged")
    (root / "stages.yaml").write_text(DIGITS)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")), torch.random.fork_rng():
        dagger.main(["--env", "digits8", "--config", str(root / "stages.yaml"), "--out", str(root / "run")])
    return root / "run"


def test_a_staged_run_holds_each_stage_and_the_last_ones_student(staged: Path) -> None:
    contents = {path.name for path in staged.iterdir()}
    assert contents == {"config.yaml", "metrics.jsonl", "result.json", "student", "samples.png", "stage_1", "stage_2", "stage_3"}
    for number in (1, 2, 3):
        inside = {path.name for path in (staged / f"stage_{number}").iterdir()}
        assert inside == {"metrics.jsonl", "result.json", "student", "samples.png", "checkpoints", "tensorboard"}
    last, first = (load_file(staged / stage / "student" / "student.safetensors") for stage in ("stage_3", "stage_1"))
    ours = load_file(staged / "student" / "student.safetensors")
    assert all(torch.equal(ours[key], last[key]) for key in last)
    assert not all(torch.equal(ours[key], first[key]) for key in first)
    assert (staged / "samples.png").read_bytes() == (staged / "stage_3" / "samples.png").read_bytes()
    assert len(yaml.safe_load((staged / "config.yaml").read_text())["stages"]) == 3


def test_a_staged_result_has_every_stages_models_and_the_totals(staged: Path) -> None:
    result = json.loads((staged / "result.json").read_text())
    parts = [json.loads((staged / f"stage_{number}" / "result.json").read_text()) for number in (1, 2, 3)]
    assert (result["agent"], result["student"], result["num_updates"]) == ("dagger", "dagger@2", 13)
    students = {"dagger@4", "dagger@4, last weights", "dagger@2", "dagger@2, last weights"}
    assert set(result["models"]) == students | {"teacher@4", "teacher@2"}
    for part in parts:
        average, latest = (part["models"][f"{part['student']}{which}"] for which in ("", ", last weights"))
        assert average["endpoint_rmse"] != latest["endpoint_rmse"]
        assert part["error_of_weights"].keys() == {"average", "last"}
    assert [part["student"] for part in parts] == ["dagger@4", "dagger@2", "dagger@2"]
    assert result["models"]["dagger@4"] == parts[0]["models"]["dagger@4"]
    for key in ("frechet", "endpoint_rmse", "action_mse_own"):  # of two with as many steps, the later
        assert result["models"]["dagger@2"][key] == parts[2]["models"]["dagger@2"][key]
    assert parts[1]["models"]["dagger@2"]["endpoint_rmse"] != parts[2]["models"]["dagger@2"]["endpoint_rmse"]
    assert result["teacher_nfe"] == sum(part["teacher_nfe"] for part in parts) == result["models"]["dagger@2"]["teacher_nfe"]
    assert result["student_nfe"] == sum(part["student_nfe"] for part in parts)
    assert result["models"]["dagger@2"]["train_seconds"] == pytest.approx(sum(p["models"][p["student"]]["train_seconds"] for p in parts))
    for part in parts:  # every student is judged beside the original teacher in the run's own steps
        assert part["models"]["teacher@4"]["endpoint_rmse"] == 0
    assert parts[1]["times"] == parts[2]["times"] == [999, 500, 0]


def test_the_last_model_of_a_staged_result_counts_the_students_forwards_of_the_whole_run(staged: Path) -> None:
    result = json.loads((staged / "result.json").read_text())
    assert result["models"]["dagger@2"]["student_nfe"] == result["student_nfe"]


def test_staged_metrics_count_on_over_the_stages(staged: Path) -> None:
    rows = read_metrics(staged / "metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [
        *[(2, 1), (3, 1), (4, 1)],
        *[(6, 2), (7, 2), (8, 2)],
        *[(10, 3), (11, 3), (12, 3), (13, 3)],
    ]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    for number in (1, 2, 3):
        own = read_metrics(staged / f"stage_{number}" / "metrics.jsonl")
        assert [row["loss"] for row in own] == [row["loss"] for row in rows if row["stage"] == number]
    assert all(row["beta"]["student"] == 0 for row in rows[:3])
    assert rows[-1]["beta"]["forward"] == pytest.approx(0.2 / 0.7)


@pytest.mark.parametrize("key", ["teacher_nfe", "student_nfe"])
def test_staged_metrics_count_the_forwards_of_the_whole_run(key: str, staged: Path) -> None:
    counts = [row[key] for row in read_metrics(staged / "metrics.jsonl")]
    assert counts == sorted(counts)
    assert counts[-1] == json.loads((staged / "result.json").read_text())[key]


def test_a_staged_run_loads_and_is_reported(staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learner = load_run(staged)
    saved = load_file(staged / "student" / "student.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in learner.average.state_dict().items())
    assert (learner.config.num_steps, learner.config.teacher_steps, learner.config.beta.forward) == (2, 4, 0.2)
    assert isinstance(learner.expert, Digits)
    report.main([str(staged), "--out", str(tmp_path / "page")])
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.md", "curves.png", "samples.png"}
    (head,) = [line.split("|")[2:-1] for line in (tmp_path / "page" / "report.md").read_text().splitlines() if "teacher halves" in line]
    head = [name for name in head if "last weights" not in name]
    assert [name.strip().partition(",")[0] for name in head] == [
        "teacher halves",
        "training data",
        "teacher@4",
        "dagger@4",
        "teacher@2",
        "dagger@2",
    ]
    assert "dagger@2" in capsys.readouterr().out


def test_resuming_a_finished_staged_run_trains_nothing(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {
        path: path.read_bytes() for path in staged.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors")
    }
    assert len(before) > 12
    monkeypatch.setattr(Dagger, "update", None)  # a call would raise
    monkeypatch.setattr(Dagger, "collect", None)
    dagger.main(["--resume", str(staged)])
    assert {path: path.read_bytes() for path in before} == before


ENV = """\
expert: ddil_env.GaussianMixtureExpert
means: [[-0.8, 0.0, 0.3], [0.8, 0.2, 0.0], [0.0, -0.7, 0.5]]
stds: 0.2
labels: [0, 1, 1]
"""  # no picture to draw
MIXTURE = """\
num_updates: 8
teacher_steps: 8
batch_size: 16
collect_size: 30
updates_per_collect: 3
log_every: 3
checkpoint_every: 3
p_expert: 0.3
student: {width: 16}
thresholding: {kind: quantile, samples: 64, roles: [teacher, student]}
evaluate: {n: 20, n_action: 4}
stages:
  - {num_steps: 4}
  - {num_steps: 2}
  - {num_steps: 1, num_updates: 4}
"""


class Killed(BaseException):
    """As a kill: nothing of the program catches it."""


def command(directory: Path, argv: list[str]) -> Path:
    """The command in its own directory; the run's."""
    (directory / "env.yaml").write_text(ENV)
    (directory / "stages.yaml").write_text(MIXTURE)
    dagger.main(argv)
    return directory / "run"


START = ["--env", "env.yaml", "--config", "stages.yaml", "--out", "run"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None), torch.random.fork_rng():
        patch.chdir(root)
        return command(root, START)


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that does not depend on the clock."""
    clock = ("seconds", "nfe_per_second", "train_seconds")
    result = json.loads((run / "result.json").read_text())
    stages = sorted(path.name for path in run.glob("stage_*"))
    return {
        "rows": [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(run / "metrics.jsonl")],
        "models": {name: {k: v for k, v in model.items() if k not in clock} for name, model in result["models"].items()},
        "nfe": (result["teacher_nfe"], result["student_nfe"]),
        "config": (run / "config.yaml").read_text(),
        "students": {
            name: {key: value.tolist() for key, value in load_file(run / name / "student" / "student.safetensors").items()}
            for name in (".", *stages)
        },
        "supports": [(run / name / "support.json").read_text() for name in (".", *stages)],
    }


def at_step(stage: int, step: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A kill before that gradient step of that stage."""
    num_steps = {1: 4, 2: 2, 3: 1}[stage]

    def arrange(patch: pytest.MonkeyPatch) -> None:
        update = Learner.update

        def killing(learner: Learner, batch: Any) -> Any:
            if (learner.config.num_steps, learner.step + 1) == (num_steps, step):
                raise Killed
            return update(learner, batch)

        patch.setattr(Learner, "update", killing)

    return arrange


def at_finish(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A kill when the n-th stage has been trained and not yet judged."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        from ddil_agents.commands import run as command

        finish, calls = command.finish, [0]

        def killing(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == number:
                raise Killed
            finish(*args)

        patch.setattr(command, "finish", killing)

    return arrange


@pytest.mark.parametrize(
    ("kill", "finished"),
    [(at_step(2, 2), 1), (at_step(2, 5), 1), (at_finish(2), 1)],
    ids=["stage 2 before its first checkpoint", "stage 2 after it", "stage 2 not yet judged"],
)
def test_a_staged_run_killed_at(
    kill: Callable[[pytest.MonkeyPatch], None], finished: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            command(tmp_path, START)
    assert sum((tmp_path / "run" / f"stage_{number}" / "result.json").is_file() for number in (1, 2, 3)) == finished
    assert not (tmp_path / "run" / "result.json").exists()
    trained: set[int] = set()
    update = Learner.update

    def recorded(learner: Learner, batch: Any) -> Any:
        trained.add(learner.config.num_steps)
        return update(learner, batch)

    monkeypatch.setattr(Learner, "update", recorded)
    run = command(tmp_path, ["--resume", "run"])
    assert trained <= set([4, 2, 1][finished:])  # no finished stage again
    assert outcome(run) == outcome(unbroken)


def test_stages_calibrate_their_support_once(unbroken: Path) -> None:
    facts = outcome(unbroken)
    assert len(set(facts["supports"])) == 1
    assert json.loads(facts["supports"][0])["kind"] == "quantile"
    assert load_run(unbroken).support == read_support(unbroken)[0]


# What is refused before anything is made


def refused(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that ends in exit status 2 and leaves nothing behind."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert not Path("run").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{}, {bath_size: 3}]", r"stage 2 of 2: .*bath_size"),
        ("[{num_steps: 4}, {num_steps: 2, expert: first}]", "stage 2 of 2: expert='first'"),
        ("[{num_steps: 3}]", "stage 1 of 1: teacher_steps=32 is no multiple of num_steps=3"),
        ("[4, 2]", "stages"),
    ],
)
def test_a_wrong_chain_is_refused_before_anything_is_made(
    stages: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(bc.main, ["--env", "gaussian_mixture", "--stages", stages, "--out", "run"], capsys), re.DOTALL)


TINY = ["--num_updates", "1", "--batch_size", "4", "--collect_size", "8", "--teacher_steps", "4", "--evaluate.n", "20", "--out", "run"]


@pytest.mark.parametrize(
    "stages",
    ["[{}, {student: {widht: 3}}]", "[{}, {beta: {student: 0.5}}]"],
    ids=["an option", "a source"],
)
def test_what_a_later_stages_learner_refuses_is_said_before_the_first_is_trained(
    stages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.yaml").write_text(ENV)
    refused(bc.main, ["--env", "env.yaml", "--stages", stages, *TINY], capsys)


def test_a_run_with_a_guidance_range_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env.yaml").write_text(ENV)
    try:
        bc.main(["--env", "env.yaml", "--guidance_range", "[1, 3]", *TINY])
    except SystemExit as stop:
        raise AssertionError("refused") from stop
    assert Path("run/result.json").is_file()
    load_run(Path("run"))


# What a fresh pair of eyes broke


def test_a_chain_of_one_stage_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--num_updates", "2", "--batch_size", "8", "--collect_size", "32", "--evaluate.n", "10", "--evaluate.n_action", "2"]
    dagger.main(["--env", "digits8", *small, "--out", "run", "--stages", "[{num_steps: 4}]"])
    assert load_run(tmp_path / "run").config.num_steps == 4
    assert (tmp_path / "run" / "stage_1" / "result.json").is_file()
    with pytest.raises(ValueError, match="a stage of a run is loaded through the run's own directory"):
        load_run(tmp_path / "run" / "stage_1")


def test_guidance_of_the_whole_run_is_not_dropped_for_a_student_teacher() -> None:
    config = BCConfig(guidance_range=(1.0, 4.0), stages=({"num_steps": 8, "guidance_range": None}, {"num_steps": 4}))
    with pytest.raises(ValueError, match=r"stage 2 of 2: .*one guidance built in"):
        plan(config)


def test_a_learner_by_itself_refuses_stages() -> None:
    with pytest.raises(ValueError, match="a learner trains one stage"):
        Dagger("digits8", DaggerConfig(stages=({"num_steps": 4},)))


def test_a_few_step_student_is_no_score_for_dmd2() -> None:
    with pytest.raises(ValueError, match="stage 2 of 2: expert='last': choose one of original, same"):
        plan(DMD2Config(stages=({"num_steps": 4}, {"num_steps": 2, "expert": "last"})))


@pytest.mark.parametrize("beta", [3, None])
def test_a_nested_setting_that_is_no_mapping_is_refused(beta: object) -> None:
    with pytest.raises(ValueError, match=r"stage 1 of 1: beta=.*need a mapping of forward, teacher, student"):
        plan(BCConfig(stages=({"num_steps": 4, "beta": beta},)))


def test_precision_is_the_whole_runs() -> None:
    with pytest.raises(ValueError, match="stage 1 of 1: mixed_precision cannot be set for one stage"):
        plan(BCConfig(stages=({"num_steps": 4, "mixed_precision": "bf16"},)))


def test_the_costs_of_a_gathered_run_rise_from_stage_to_stage(unbroken: Path) -> None:
    result = json.loads((unbroken / "result.json").read_text())
    own = [model["teacher_nfe"] for name, model in result["models"].items() if name.startswith("dagger@")]
    assert own == sorted(own)
    assert own[-1] == result["teacher_nfe"]
    assert result["training_seed"] == 0


def test_a_student_is_judged_without_the_run_that_it_started_from() -> None:
    config = BCConfig(init="long/gone")
    assert judged(config, plan(config)[0].config).init is None
