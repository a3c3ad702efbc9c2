"""What the learners learn, and what a learner promises: reproducible, resumable, and stopped where the numbers stop meaning anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CORNERS, MIXTURE, bc, corners, dagger, labelled, learn, settings, weights
from tensordict import TensorDict
from torch import Tensor, nn

from ddil_agents import Algorithm, BCConfig, BehaviourCloning, Beta, Dagger
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.states.batch import Batch
from ddil_agents.training.checkpoint import checkpoints
from ddil_agents.training.metrics import read_metrics
from ddil_env import DdimPolicy, ExpertPolicy, GaussianMixtureExpert, NetworkDenoiser, Prediction, TimeGrid, invert_ddim, unroll

pytestmark = pytest.mark.usefixtures("own_generator")


# What is learned


@pytest.mark.parametrize(("agent", "beta"), [(BehaviourCloning, Beta()), (Dagger, MIXTURE), (Dagger, Beta(0, 0, 1))])
def test_a_4_step_student_comes_within_a_tenth_of_the_32_step_teacher(agent: type[Algorithm], beta: Beta) -> None:
    fast = {"batch_size": 256, "collect_size": 1024, "updates_per_collect": 16, "capacity": 4096, "warmup_updates": 50}
    config = settings(**fast, num_updates=400, teacher_steps=32, learning_rate=1e-2, ema=0.97, beta=beta, student={"width": 64})
    learner = agent(corners(), agent.Config(**config))
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    teacher = unroll(learner.expert_policy, learner.grid, x_T)[:, -1]

    def distance(policy: DdimPolicy) -> float:
        return sliced_wasserstein(unroll(policy, learner.grid, x_T)[:, -1], teacher)

    assert distance(ExpertPolicy(learner.expert, 1)) > 0.2  # the teacher's own 4 steps
    assert distance(learner.student_policy) > 0.3  # untrained
    learn(learner)
    assert distance(learner.student_policy) < 0.1


def test_behaviour_cloning_is_dagger_with_forward_states_alone() -> None:
    cloned, dagged = learn(bc()), learn(dagger(beta=Beta(1, 0, 0)))
    assert torch.equal(weights(cloned.student), weights(dagged.student))
    assert torch.equal(weights(cloned.ema_student), weights(dagged.ema_student))


def test_dagger_trains_on_all_three_sources(tmp_path: Path) -> None:
    learner = learn(dagger(num_updates=50), out=tmp_path / "run")
    counts = [row["source_counts"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    total = {name: sum(row[name] for row in counts) for name in ("forward", "teacher", "student")}
    assert sum(total.values()) == 50 * 16
    for name, share in (("forward", 0.5), ("teacher", 0.1), ("student", 0.4)):
        assert abs(total[name] - 800 * share) < 4 * (800 * share * (1 - share)) ** 0.5
    assert all(learner.buffer.counts.values())


# The loss


class PlusOffset(nn.Module):
    """x̂_0 of a closed form, plus an offset that is trained."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.closed_form = corners()
        self.offset = nn.Parameter(torch.full((2,), offset))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        return self.closed_form.predict(x_t, t, c).x_0 + self.offset


class WithExactStudent(GaussianMixtureExpert):
    def __init__(self) -> None:
        super().__init__(CORNERS, 0.25, [1, 2, 3, 4])

    def make_student(self, *, offset: float) -> NetworkDenoiser:
        return NetworkDenoiser(PlusOffset(offset), self.schedule, "x_0")


def collected(learner: Algorithm) -> TensorDict:
    """16 labelled states of each source."""
    return learner.collector.collect(48, (1 / 3, 1 / 3, 1 / 3), 0)


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one", "velocity"])
def test_the_loss_and_its_gradient_vanish_where_the_student_is_the_target(weighting: Any) -> None:
    values = {}
    for offset in (0.0, 0.1):
        config = BCConfig(**settings(teacher_steps=4, weighting=weighting, student={"offset": offset}))  # one expert step a student step
        learner = BehaviourCloning(WithExactStudent(), config)
        loss = learner.loss(Batch(collected(learner))).mean()
        loss.backward()
        values[offset] = loss.item(), float(learner.student.network.offset.grad.norm())
    assert values[0.0] == pytest.approx((0, 0), abs=1e-5)
    assert values[0.1][0] > 0.01
    assert values[0.1][1] > 0.1


def target(learner: Algorithm, batch: TensorDict) -> Tensor:
    """Progressive distillation's x_tgt, (b, *sample_shape)."""
    return invert_ddim(learner.expert.schedule, batch["x_t"], batch["t"], batch["x_s"], batch["s"]).x_0


@pytest.mark.parametrize("n", [2, 16])  # as many states as the latent is wide, and more
def test_the_loss_is_one_number_a_state(n: int) -> None:
    learner = bc()
    batch = collected(learner)[:n]
    loss = learner.loss(Batch(batch))
    x_0 = learner.student(batch["x_t"], batch["t"], None).x_0
    assert loss.shape == (n,)
    for i in range(n):
        error = (x_0[i] - target(learner, batch)[i]).square().mean()
        torch.testing.assert_close(loss[i], error * learner.weight(batch["t"][i : i + 1])[0].float())


def test_snr_plus_one_is_the_plain_error_in_v() -> None:
    learner = bc(weighting="snr_plus_one")
    batch = collected(learner)
    batch["x_t"], batch["x_s"] = batch["x_t"].double(), batch["x_s"].double()
    x_t, t, x_tgt = batch["x_t"], batch["t"], target(learner, batch)
    learner.student.double()
    alpha, sigma = learner.expert.schedule(t, x_t)
    v_tgt = alpha * (x_t - alpha * x_tgt) / sigma - sigma * x_tgt
    with torch.no_grad():
        plain = (learner.student.network(x_t, t.double(), None) - v_tgt).square().mean(1)  # this student predicts v
        loss = learner.loss(Batch(batch.set("t", t.double()).set("s", batch["s"].double())))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("schedule", "kind", "snr_plus_one_too"), [("cosine", "v", True), ("scaled_linear", "v", True), ("flow", "flow", False)]
)
def test_the_velocity_weighting_is_the_plain_error_in_v_or_u(schedule: Any, kind: Any, snr_plus_one_too: bool) -> None:
    # Of two estimates x̂_0 at one x_t: Δε = −(α/σ) Δx_0, so Δv = −(σ + α²/σ) Δx_0 and Δu = −(1 + α/σ) Δx_0.
    expert = GaussianMixtureExpert(CORNERS, 0.25, [1, 2, 3, 4], schedule=schedule)
    t = TimeGrid(expert.schedule, 8).times[:-1].double()
    x_t, x_0, other = torch.randn(3, len(t), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity, velocity_of_other = (expert.schedule.prediction(x, x_t, t, "x_0").output(kind) for x in (x_0, other))
    plain, in_x_0 = (velocity - velocity_of_other).square().mean(1), (x_0 - other).square().mean(1)
    weight = {name: BehaviourCloning(expert, BCConfig(**settings(weighting=name))).weight(t) for name in ("velocity", "snr_plus_one")}
    torch.testing.assert_close(weight["velocity"].double() * in_x_0, plain, rtol=1e-5, atol=0)
    assert torch.allclose(weight["snr_plus_one"].double() * in_x_0, plain, rtol=1e-5) == snr_plus_one_too


def test_truncated_snr_is_the_snr_but_at_least_1() -> None:
    learner = bc()
    t = TimeGrid(learner.expert.schedule, 100).times[:-1]
    alpha, sigma = learner.expert.schedule.coefficients(t)
    snr = alpha**2 / sigma**2
    assert (snr < 1).any()
    assert (snr > 1).any()
    torch.testing.assert_close(learner.weight(t), torch.maximum(snr, torch.ones_like(snr)))


# The machinery


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulated_gradients_give_the_weights_of_the_whole_batch(parts: int) -> None:
    whole, accumulated = learn(dagger()), learn(dagger(gradient_accumulation=parts))
    torch.testing.assert_close(weights(accumulated.student), weights(whole.student), atol=1e-5, rtol=0)
    assert accumulated.step == whole.step == 20


def test_two_learners_of_one_process_keep_their_own_accumulation() -> None:
    alone = weights(learn(dagger(gradient_accumulation=4)).student)
    first, second = dagger(gradient_accumulation=4), dagger(gradient_accumulation=1)
    assert torch.equal(weights(learn(first).student), alone)
    learn(second)


def test_twice_the_updates_per_collection_halve_the_teachers_cost() -> None:
    once, twice = (learn(bc(updates_per_collect=k)) for k in (2, 4))
    assert once.teacher_nfe == 2 * twice.teacher_nfe == 10 * 32 * 2  # 10 collections of 32 states of 2 expert steps
    assert once.expert.nfe == once.teacher_nfe


@pytest.mark.parametrize(("guidance_scale", "pair"), [(1.0, 1), (3.0, 2)])
def test_guidance_doubles_the_teachers_cost(guidance_scale: float, pair: int) -> None:
    learner = learn(BehaviourCloning(labelled(), BCConfig(**settings(guidance_scale=guidance_scale))))
    assert learner.teacher_nfe == 5 * 32 * 2 * pair


def test_priorities_are_the_last_losses() -> None:
    learner = dagger(prioritised=True, num_updates=9)
    losses = []
    update = learner.trainer.update

    def recorded(batch: TensorDict) -> dict[str, Tensor]:
        measured = update(batch)
        losses.append((batch["index"], measured["loss"]))
        return measured

    learner.trainer.update = recorded  # type: ignore[method-assign]
    learn(learner)
    index, loss = losses[-1]
    last = {i: max(float(x) for j, x in zip(index.tolist(), loss.tolist(), strict=True) if j == i) for i in index.tolist()}
    for i, value in last.items():
        assert float(learner.buffer._sampler.priorities[i]) == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert len(set(last.values())) > 1


def test_without_a_capacity_every_state_is_kept() -> None:
    learner = learn(dagger(capacity=None, num_updates=40))
    assert len(learner.buffer) == 10 * 32
    versions = learner.buffer.sample(2000, (1, 0, 1))["version"]
    assert versions.unique().tolist() == list(range(0, 40, 4))
    assert len(learn(dagger(capacity=16, num_updates=40)).buffer) == 3 * 16


@pytest.mark.parametrize("states_per_rollout", [1, "all"])
def test_of_the_students_own_states_those_of_the_newest_collections_are_held(states_per_rollout: Any) -> None:
    # 16 of 32 states of a collection are the student's; 4 a rollout where all are taken.
    settings = {"beta": Beta(0.5, 0, 0.5), "num_updates": 40, "capacity": 1000, "states_per_rollout": states_per_rollout}
    learner = learn(dagger(**settings, student_collections=3))
    states = learner.buffer.replay[:]
    held = states[states["x_t"].abs().sum(1) > 0]
    by_source = [held["version"][held["source"] == i].unique().tolist() for i in (0, 2)]
    assert by_source[1] == [28, 32, 36]  # of ten collections, one every 4 updates
    assert by_source[0] == list(range(0, 40, 4))  # labels of data do not age
    assert learner.buffer.counts == {"forward": 160, "teacher": 0, "student": 48}
    everything = learn(dagger(**settings, student_collections=None))
    assert everything.buffer.counts == {"forward": 160, "teacher": 0, "student": 160}
    aggregate = learn(dagger(**settings | {"capacity": None}, student_collections=3))  # DAgger's aggregate forgets nothing
    assert aggregate.buffer.counts["student"] == 160


def test_without_a_capacity_more_updates_than_the_config_has_are_refused() -> None:
    learner = learn(dagger(capacity=None))
    with pytest.raises(ValueError, match=r"20 \+ 5 gradient steps: capacity=null"):
        learn(learner, 5)


def test_learning_twice_goes_on_from_where_it_was(tmp_path: Path) -> None:
    learner = learn(dagger(), 10, out=tmp_path / "first")
    before, nfe = weights(learner.student), learner.teacher_nfe
    learn(learner, 15, out=tmp_path / "second")
    assert (learner.step, learner.total_updates) == (25, 25)
    assert not torch.equal(weights(learner.student), before)
    assert learner.teacher_nfe > nfe
    steps = [[row["step"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("first", "second")]
    assert steps == [[10], [20, 25]]


def test_learn_refuses_a_directory_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        learn(bc(), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_learn_refuses_no_updates() -> None:
    with pytest.raises(ValueError, match="num_updates=0: need a whole number of at least 1"):
        learn(bc(), 0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_average_is_exponential(decay: float) -> None:
    learner = bc(ema=decay)
    expected = None
    for n in range(12):
        learner.trainer.collect()
        learner.trainer.update(learner.buffer.sample(16, (1, 0, 0)))
        now, d = weights(learner.student), min(decay, (1 + n) / (10 + n))  # .5 from n = 8 on
        expected = now if expected is None else d * expected + (1 - d) * now
        torch.testing.assert_close(weights(learner.ema_student), expected, atol=1e-6, rtol=0)


def test_the_rate_warms_up_and_falls_to_0() -> None:
    learner = bc(num_updates=10, warmup_updates=3, learning_rate=1.0)
    rates = [learner.trainer.trainables["student"]._lr_factor(step) for step in range(11)]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert rates[3:] == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    one, again, other = (learn(dagger(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(weights(one.student), weights(again.student))
    assert not torch.allclose(weights(one.student), weights(other.student), atol=1e-2)
    assert not torch.equal(weights(dagger(seed=0).student), weights(dagger(seed=1).student))


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    learner = dagger()
    assert torch.equal(torch.get_rng_state(), before)
    learn(learner)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_generator_changes_nothing() -> None:
    torch.manual_seed(1)
    one = learn(dagger())
    torch.manual_seed(2)
    torch.randn(17)
    assert torch.equal(weights(learn(dagger()).student), weights(one.student))


def test_learners_of_different_precision_live_in_one_process() -> None:
    alone = {precision: weights(learn(dagger(mixed_precision=precision)).student) for precision in ("no", "bf16")}
    full, half = dagger(mixed_precision="no"), dagger(mixed_precision="bf16")
    assert torch.equal(weights(learn(full).student), alone["no"])
    assert torch.equal(weights(learn(half).student), alone["bf16"])
    assert not torch.equal(alone["no"], alone["bf16"])
    torch.testing.assert_close(alone["bf16"], alone["no"], atol=0.02, rtol=0)
    assert alone["bf16"].dtype == torch.float32


# Numbers that mean nothing


class PoisonedFrom(GaussianMixtureExpert):
    """NaN labels from a given number of forwards on."""

    def __init__(self, nfe: int) -> None:
        super().__init__(CORNERS, 0.25, [1, 2, 3, 4])
        self.poisoned_from = nfe

    def identity(self) -> dict[str, Any]:
        """As the healthy one, for which its checkpoints are."""
        return corners().identity()

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        pred = super().predict(x_t, t, c)
        return pred if self.nfe <= self.poisoned_from else dataclasses.replace(pred, x_0=pred.x_0 * torch.nan)


def test_poisoned_labels_stop_the_run_with_step_and_source(tmp_path: Path) -> None:
    # 32 states of 2 forwards a collection: the third one, before step 9, is poisoned, and all held states are replaced by it
    learner = BehaviourCloning(PoisonedFrom(2 * 64), BCConfig(**settings(capacity=32)))
    with pytest.raises(FloatingPointError, match=r"not finite at step 9, on states of: forward \(16 states\)\. "):
        learner.train(tmp_path, progress=False, checkpoint_every=4, log_every=100)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step_00000004", "step_00000008"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8]
    restored = BehaviourCloning(corners(), learner.config).load(tmp_path / "checkpoints")
    assert torch.isfinite(weights(restored.student)).all()


def test_a_poisoned_student_stops_the_run_at_its_first_step(tmp_path: Path) -> None:
    learner = dagger(beta=Beta(0, 0, 1))
    with torch.no_grad():
        next(learner.student.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"step 1, on states of: student \(16 states\)\. "):
        learn(learner, out=tmp_path / "run")
    assert checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_single_poisoned_source_is_named_alone() -> None:
    learner = dagger()
    learner.trainer.collect()
    states = collected(learner)
    states["x_s"][states["source"] == 1] = torch.inf
    learner.buffer.extend(states)
    learner.collect = lambda: None  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError) as caught:
        learn(learner)
    assert "teacher" in str(caught.value)
    assert "forward" not in str(caught.value)


# Saving and loading
# Configs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_updates": 0}, "num_updates=0: need at least 1"),
        ({"num_steps": 0}, "num_steps=0: need at least 1"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"updates_per_collect": 0}, "updates_per_collect=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: need a positive, finite number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"p_expert": 1.5}, r"p_expert=1.5: need a number in \[0, 1\]"),
        ({"ema": -0.1}, "ema=-0.1"),
        ({"warmup_updates": -1}, "warmup_updates=-1: need 0 or more"),
        ({"capacity": 0}, "capacity=0: need at least 1, or null"),
        ({"student_collections": 0}, "student_collections=0: need at least 1, or null to hold as many as capacity"),
        ({"teacher_steps": 30}, "teacher_steps=30 is not a multiple of num_steps=4"),
        ({"gradient_accumulation": 3}, "batch_size=16 does not divide into gradient_accumulation=3 parts"),
        ({"mixed_precision": "fp8"}, "unknown mixed_precision 'fp8'; choose one of: no, fp16, bf16"),
        ({"weighting": "snr"}, "unknown weighting 'snr'; choose one of: truncated_snr, snr_plus_one, velocity"),
        (
            {"collect_size": 3, "beta": Beta(0, 0, 1), "states_per_rollout": "all"},
            "collect_size=3 is too small: .* no source gets a full rollout of 4 states; raise collect_size, or set states_per_rollout to 1",
        ),
        (
            {"collect_size": 1, "beta": Beta(0.5, 0.5, 0)},
            "collect_size=1 is too small: .* no source gets a full state; raise collect_size$",
        ),
        ({"states_per_rollout": 2}, "states_per_rollout=2: need 1 or all"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BCConfig(**settings(**changed))


def test_guidance_that_the_expert_cannot_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="has no null condition to guide against"):
        bc(guidance_scale=3.0)


def test_more_steps_than_the_chain_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_steps=1000: need a whole number from 1 to 999"):
        bc(num_steps=1000, teacher_steps=1000, collect_size=2000)


def test_behaviour_cloning_refuses_student_states() -> None:
    with pytest.raises(ValueError, match=r"beta.student=0.4: .*use ddil_agents.dagger"):
        bc(beta=Beta(0.6, 0, 0.4))


def test_the_first_step_of_a_second_learn_has_a_learning_rate() -> None:
    agent = dagger(num_updates=6, warmup_updates=0)
    agent.learn(progress=False)
    agent.learn(6, progress=False)
    before = agent.step
    agent.learn(1, progress=False)
    assert agent.step == before + 1
    assert agent.trainer.trainables["student"].last_learning_rate > 0


def test_the_averaged_student_is_in_eval_mode() -> None:
    assert not any(module.training for module in dagger().ema_student.modules())


def test_every_state_says_what_its_label_cost() -> None:
    agent = dagger()
    agent.collect()
    assert (agent.buffer.replay.storage[:1]["nfe"] == agent.expert_policy.nfe_per_action).all()
