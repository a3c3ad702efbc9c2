"""Stages: how a chain of runs is planned, what each student starts from and learns from, and that a killed chain ends the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import CORNERS, corners, learn, weights
from torch import Tensor

from ddil_agents import DMD2, Algorithm, BCConfig, BehaviourCloning, Dagger, DaggerConfig, DMD2Config
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.states.batch import Batch
from ddil_agents.training.stages import Stage, better_weights, evaluation_config, iter_learners, plan_stages
from ddil_env import DdimPolicy, Expert, ExpertPolicy, GaussianMixtureExpert, NoDataError, TimeGrid, invert_ddim, unroll
from ddil_env.experts.digits import Digits
from ddil_env.experts.distilled import Distilled
from ddil_env.support import Thresholding

pytestmark = pytest.mark.usefixtures("own_generator")

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


def labelled(std: float = 0.25) -> GaussianMixtureExpert:
    return GaussianMixtureExpert(CORNERS, std, [1, 2, 3, 4], labels=[0, 0, 1, 1])


def cloning(*stages: dict[str, Any], **changed: Any) -> BCConfig:
    return BCConfig(**{**SMALL, **changed}, stages=stages)


def chain(expert: Expert, config: BCConfig) -> Iterator[tuple[Stage, Algorithm]]:
    return iter_learners(BehaviourCloning, expert, plan_stages(config))


# The plan


def test_without_stages_there_is_one_whose_teacher_is_the_original() -> None:
    config = cloning(num_steps=2)
    assert plan_stages(config) == [Stage(config, "original", ".")]


def test_teacher_steps_are_by_default_those_of_the_teacher() -> None:
    stages = plan_stages(
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
    told = "stage 2 of 2: teacher_steps=16: its teacher is a student of 8 steps, trained at their times only; leave it out, or choose"
    with pytest.raises(ValueError, match=told):
        plan_stages(cloning({"num_steps": 8}, {"num_steps": 4, "teacher_steps": 16}, teacher_steps=32))


def test_a_stage_changes_what_it_names_and_keeps_the_rest() -> None:
    base = DaggerConfig(**SMALL, learning_rate=3e-3, thresholding=Thresholding(kind="static", bound=2.0))
    changes = {"num_steps": 4, "beta": {"student": 0.8}, "thresholding": {"roles": ["student", "teacher"]}, "weighting": "snr_plus_one"}
    first, second = plan_stages(DaggerConfig(**{**vars(base), "stages": ({"num_steps": 8}, changes)}))
    assert (first.config.beta.forward, first.config.beta.teacher, first.config.beta.student) == (0.5, 0.1, 0.4)
    assert second.config.beta.shares == pytest.approx((0.5 / 1.4, 0.1 / 1.4, 0.8 / 1.4))
    assert second.config.thresholding == Thresholding(kind="static", bound=2.0, roles=("student", "teacher"))
    assert isinstance(second.config, DaggerConfig)
    assert isinstance(first.config, DaggerConfig)
    assert (first.config.weighting, second.config.weighting) == ("truncated_snr", "snr_plus_one")
    changed = {name for name, value in vars(second.config).items() if value != getattr(base, name)}
    assert changed == {"beta", "thresholding", "weighting", "seed"}  # num_steps is 4 in both, 8 teacher steps too


def test_values_are_read_as_in_a_yaml_file() -> None:
    (stage,) = plan_stages(cloning({"learning_rate": "3e-3", "guidance_range": [1, 4], "adam_betas": [0.5, 0.9], "student": {"width": 32}}))
    assert (stage.config.learning_rate, stage.config.guidance_range, stage.config.adam_betas) == (3e-3, (1.0, 4.0), (0.5, 0.9))
    assert stage.config.student == {"width": 32}


def test_every_stage_has_a_seed_of_its_own_unless_it_names_one() -> None:
    stages = plan_stages(cloning({}, {}, {"seed": 5}, {}, seed=1))
    other = plan_stages(cloning({}, {}, {"seed": 5}, {}, seed=2))
    assert stages[2].config.seed == other[2].config.seed == 5
    assert len({stage.config.seed for stage in [*stages, *other]}) == 7
    assert [stage.config.seed for stage in plan_stages(cloning({}, {}, {"seed": 5}, {}, seed=1))] == [stage.config.seed for stage in stages]


def test_guidance_is_absorbed_by_a_student_that_is_not_told() -> None:
    def guidance(*stages: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(stage.config.guidance_scale, stage.config.guidance_range) for stage in plan_stages(cloning(*stages, guidance_scale=3.0))]

    none, told = (None, None), (3.0, (1.0, 4.0))
    ranged = {"guidance_range": [1.0, 4.0]}
    assert guidance({}, {}, {"expert": "same"}, {"expert": "original"}) == [(3.0, None), none, none, (3.0, None)]
    assert guidance({}, {"expert": "same"}, {}) == [(3.0, None), (3.0, None), none]
    assert guidance({}, {**ranged, "expert": "original"}, ranged, {**ranged, "expert": "same"}) == [(3.0, None), told, told, told]


@pytest.mark.parametrize("changes", [{"guidance_scale": 2.0}, {"guidance_range": [1.0, 4.0]}])
def test_guidance_of_a_stage_whose_teacher_has_it_built_in_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stage 2 of 2: .*guidance"):
        plan_stages(cloning({}, changes, guidance_scale=3.0))


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
        (({"num_steps": 4}, {"num_steps": 3}), "stage 2 of 2: teacher_steps=4 is not a multiple of num_steps=3"),
        (({"num_steps": 2}, {"num_steps": 4}), "stage 2 of 2: teacher_steps=2 is not a multiple of num_steps=4"),
        (({"weighting": "snr"},), r"stage 1 of 1: .*weighting"),
    ],
)
def test_a_wrong_stage_is_refused_by_its_number(stages: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(cloning(*stages))


@pytest.mark.parametrize(("num_steps", "steps"), [(8, 32), (4, 32), (3, 3), (1, 32)])
def test_a_student_is_judged_against_the_original_teacher_in_the_runs_own_steps(num_steps: int, steps: int) -> None:
    config = cloning({"num_steps": num_steps, "teacher_steps": num_steps}, teacher_steps=32, guidance_scale=2.0)
    against = evaluation_config(config, plan_stages(config)[0].config)
    assert (against.num_steps, against.teacher_steps, against.guidance_scale) == (num_steps, steps, 2.0)


def test_a_stage_with_guidance_of_its_own_can_be_judged() -> None:
    config = cloning({"guidance_range": [2.0, 14.0], "guidance_scale": 5.0}, guidance_scale=1.5)
    evaluation_config(config, plan_stages(config)[0].config)


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
    other = learner.ema_student if better == "last" else learner.networks["student"]
    with torch.no_grad():
        for p in other.parameters():
            p += 0.3
    errors, network = better_weights(learner)
    assert network is {"average": learner.ema_student, "last": learner.networks["student"]}[better]
    assert errors[better] == min(errors.values()) < max(errors.values())
    assert better_weights(learner)[0] == errors  # the same states each time


def test_each_student_starts_from_the_lasts_better_weights_bit_for_bit() -> None:
    last: Algorithm | None = None
    for stage, learner in chain(corners(), cloning({"num_steps": 8}, {"num_steps": 4}, {"num_steps": 4, "expert": "original"}, ema=0.9)):
        if last is not None:
            better = weights(better_weights(last)[1])
            assert torch.equal(weights(learner.student), better)
            assert torch.equal(weights(learner.ema_student), better)
            assert not torch.equal(weights(last.ema_student), weights(last.student))
        before = weights(learner.student)
        last = learn(learner)
        assert not torch.equal(weights(learner.student), before)
        assert learner.step == stage.config.num_updates


def test_the_teacher_is_the_last_student_the_last_teacher_or_the_original() -> None:
    expert = corners()
    names = ["original", "last", "same", "original", "same", "last"]
    stages = chain(expert, cloning(*({"num_steps": 2, "teacher_steps": 2, "expert": name} for name in names)))
    x_t, t = torch.randn(5, 2), torch.full((5,), 600.0)
    passed: list[Algorithm] = []
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
        student, rates = learner.trainer.trainables["student"], []
        for _ in range(5):
            learner.trainer.collect()
            learner.trainer.update(learner.draw())
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
    for _, learner in iter_learners(DMD2, corners(), plan_stages(config)):
        assert torch.equal(weights(learner.networks["critic"]), weights(learner.student))
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
            return learner.loss(Batch(batch))

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


def told(learner: Algorithm, batch: Any, w: float) -> Tensor:
    """The averaged student's x̂_0 when told w."""
    with torch.no_grad():
        return learner.ema_student.predict(batch["x_t"], batch["t"], batch["c"], torch.full_like(batch["t"], w)).x_0


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
    assert torch.equal(weights(second.student), weights(first.ema_student))
    assert second.student.guidance_embedding
    assert second.expert.guidance_scale == second.teacher_policy.guidance_scale == 2.0
    batch = second.collector.collect(32, (1, 0, 0), 0)
    x_t, t, c, w, s = (batch[key] for key in ("x_t", "t", "c", "w", "s"))
    middle = first.grid.previous(t)  # 749, where half of the way is 750
    x_m = first.ema_student.predict(x_t, t, c, w).latent(middle)
    x_s = first.ema_student.predict(x_m, middle, c, w).latent(s)
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

# What a fresh pair of eyes broke


def test_guidance_of_the_whole_run_is_not_dropped_for_a_student_teacher() -> None:
    config = BCConfig(guidance_range=(1.0, 4.0), stages=({"num_steps": 8, "guidance_range": None}, {"num_steps": 4}))
    with pytest.raises(ValueError, match=r"stage 2 of 2: .*one guidance built in"):
        plan_stages(config)


def test_a_learner_by_itself_refuses_stages() -> None:
    with pytest.raises(ValueError, match="an agent trains one stage"):
        Dagger("digits8", DaggerConfig(stages=({"num_steps": 4},)))


def test_a_few_step_student_is_no_score_for_dmd2() -> None:
    with pytest.raises(ValueError, match="stage 2 of 2: expert='last': choose one of original, same"):
        plan_stages(DMD2Config(stages=({"num_steps": 4}, {"num_steps": 2, "expert": "last"})))


@pytest.mark.parametrize("beta", [3, None])
def test_a_nested_setting_that_is_no_mapping_is_refused(beta: object) -> None:
    with pytest.raises(ValueError, match=r"stage 1 of 1: beta=.*need a mapping of forward, teacher, student"):
        plan_stages(BCConfig(stages=({"num_steps": 4, "beta": beta},)))


def test_precision_is_the_whole_runs() -> None:
    with pytest.raises(ValueError, match="stage 1 of 1: mixed_precision cannot be set for one stage"):
        plan_stages(BCConfig(stages=({"num_steps": 4, "mixed_precision": "bf16"},)))


def test_a_student_is_judged_without_the_run_that_it_started_from() -> None:
    config = BCConfig(init="long/gone")
    assert evaluation_config(config, plan_stages(config)[0].config).init is None
