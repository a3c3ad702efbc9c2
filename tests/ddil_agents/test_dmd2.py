"""Distribution matching: its gradient against closed forms, its states by hand, its two time scales, and what it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALL, FORWARD, MEANS, STUDENT, TEACHER, Dataless, critic, guided, learn, matching, space, stream, weights
from tensordict import TensorDict
from torch import Tensor, nn

from ddil_agents import DMD2, Beta, DMD2Config
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.states.batch import Batch
from ddil_agents.states.collect import stream_seed
from ddil_env import Expert, GaussianMixtureExpert, NetworkDenoiser, NoDataError, TimeGrid, load_expert, unroll

pytestmark = pytest.mark.usefixtures("own_generator")


# The gradient, in closed form
# The states
# What learns, and when


@pytest.mark.parametrize("gan_weight", [0.0, 0.5])
def test_gradient_flows_through_the_last_step_alone(gan_weight: float) -> None:
    learner = matching(noise_level=249.0, gan_weight=gan_weight)
    batch = learner.trainer.collect()
    student = learner.student
    given: dict[str, Tensor] = {}
    generate = learner.generate

    def kept(batch: TensorDict) -> Tensor:
        given["x"] = generate(batch)
        given["x"].retain_grad()
        return given["x"]

    learner.generate = kept  # type: ignore[method-assign]
    learner.loss(Batch(batch)).mean().backward()
    assert given["x"].grad is not None
    x = student.predict(batch["x_t"].detach(), batch["t"]).x_0  # one step, from the state as a constant
    expected = torch.autograd.grad(x, list(student.parameters()), given["x"].grad)
    for p, gradient in zip(student.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient)
    assert not batch["generated"].requires_grad


@pytest.mark.parametrize("gan_weight", [0.0, 0.5])
@pytest.mark.parametrize("parts", [1, 2])
def test_neither_network_gets_a_gradient_in_the_others_turn(gan_weight: float, parts: int) -> None:
    learner = matching(gan_weight=gan_weight, gradient_accumulation=parts, critic_updates=1, beta=ALL)
    own, its = list(learner.student.parameters()), list(critic(learner).parameters())
    seen: dict[str, list[bool]] = {"student": [], "critic": []}
    for name, mine, others in (("student", own, its), ("critic", its, own)):
        optimizer = learner.trainer.trainables[name].optimizer
        original = optimizer.step

        def step(original: Any = original, name: str = name, mine: list[nn.Parameter] = mine, others: list[nn.Parameter] = others) -> None:
            seen[name].append(any(p.grad is not None and bool(p.grad.any()) for p in mine))
            assert all(p.grad is None for p in others)
            original()

        optimizer.step = step
    learner.trainer.collect()
    learner.trainer.update(learner.draw())
    learner.trainer.collect()
    learner.trainer.update(learner.draw())  # the first gradient of an untrained twin of a shared start may be 0
    assert len(seen["student"]) == len(seen["critic"]) == 2
    assert all(seen["critic"])
    assert seen["student"][1]
    assert all(p.requires_grad for p in [*own, *its])


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_student_steps_in_every_rth_update_and_the_critic_in_all(ratio: int) -> None:
    learner = matching(critic_updates=ratio, num_updates=7, learning_rate=1e-2, ema=0.5)
    due = [i % ratio == 0 for i in range(7)]
    for turn in due:
        before = [weights(network).clone() for network in (learner.student, critic(learner), learner.ema_student)]
        learner.trainer.collect()
        measured = learner.trainer.update(learner.draw())
        moved = [
            not torch.equal(weights(n), b) for n, b in zip((learner.student, critic(learner), learner.ema_student), before, strict=True)
        ]
        assert moved == [turn, True, turn]
        assert ("loss" in measured, "grad_norm" in measured) == (turn, turn)
        assert measured["critic_loss"].shape == (8,)
    assert learner.step == 7


def test_the_students_rate_runs_its_course_over_its_own_steps() -> None:
    learner = matching(
        critic_updates=3, num_updates=8, warmup_updates=0, lr_scheduler="linear", learning_rate=3e-3, critic_learning_rate=8e-3
    )
    student, other = learner.trainer.trainables["student"], learner.trainer.trainables["critic"]
    assert (student.total_steps, other.total_steps) == (3, 8)  # ⌈8/3⌉
    rates = []
    for _ in range(8):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
        rates.append((student.last_learning_rate, other.last_learning_rate))
    assert [a for a, _ in rates] == pytest.approx([3e-3] * 3 + [2e-3] * 3 + [1e-3] * 2)
    assert [b for _, b in rates] == pytest.approx([1e-3 * n for n in range(8, 0, -1)])
    learner.learn(4, progress=False)
    assert (student.total_steps, other.total_steps) == (4, 12)


def test_the_average_moves_with_the_students_steps_alone() -> None:
    learner = matching(critic_updates=2, ema=0.2, learning_rate=1e-2)
    expected = None
    for i in range(8):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
        if i % 2 == 0:
            now, d = weights(learner.student), min(0.2, (1 + i // 2) / (10 + i // 2))
            expected = now if expected is None else d * expected + (1 - d) * now
        torch.testing.assert_close(weights(learner.ema_student), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_give_the_weights_of_the_whole_batch(parts: int) -> None:
    learner, twin = matching(beta=ALL), matching(beta=ALL, gradient_accumulation=parts)
    for each in (learner, twin):  # both networks draw their own τ and ε a part: give every part the same
        each.draw_noise = lambda x, low, high: (torch.full((len(x),), 400.0), torch.zeros_like(x))  # type: ignore[method-assign]
        learn(each)
    torch.testing.assert_close(weights(twin.student), weights(learner.student), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(critic(twin)), weights(critic(learner)), atol=1e-5, rtol=0)


# What it costs


@pytest.mark.parametrize(("make", "pair"), [(space, 1), (guided, 2)])
@pytest.mark.parametrize(("beta", "steps"), [(FORWARD, 0), (STUDENT, 0), (TEACHER, 4)], ids=["forward", "student", "teacher"])
def test_the_teacher_is_asked_for_real_scores_and_for_its_own_rollouts(
    make: Callable[[], Expert], pair: int, beta: Beta, steps: int
) -> None:
    learner = learn(matching(make(), beta=beta, noise_level=499.0, num_updates=7, critic_updates=3))  # 2 steps of 2 substeps
    assert learner.teacher_nfe == learner.expert.nfe == (3 * 8 + 7 * 8 * steps) * pair
    # 2 steps of a rollout, and the last; of the critic, one in each update and one in each of the student's 3 turns
    assert learner.student_nfe == 7 * 8 * (3 if beta.student else 1) + (7 + 3) * 8
    assert (learner.draw()["nfe"] == steps * pair).all()  # of its rollout: there is no label


class Hidden(GaussianMixtureExpert):
    """Data that no one may ask for."""

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("data were asked for")


@pytest.mark.parametrize("on_policy", [True, False])
def test_a_data_free_run_never_asks_for_data(on_policy: bool) -> None:
    learner = learn(matching(Hidden(MEANS, 0.2), beta=Beta(0, 0.5, 0.5), p_expert=0.5, on_policy=on_policy))
    assert learner.step == 6
    with pytest.raises(AssertionError, match="data were asked for"):
        learn(matching(Hidden(MEANS, 0.2), beta=ALL))


# Vanilla DMD2


def vanilla(expert: Expert, updates: int, ratio: int, b: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """DMD2 on diffused data in plain lines: the weights of student, average and critic."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(0, "weights"))
        student = expert.make_student(width=16, depth=2)
    fake, average = copy.deepcopy(student), copy.deepcopy(student)
    optimizers = [torch.optim.AdamW(n.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=0.0, fused=True) for n in (student, fake)]
    data, noise, time, loss_stream = (stream(name) for name in ("data", "noise", "time", "loss"))
    schedule, times = expert.schedule, TimeGrid(expert.schedule, 4, "dmd2").times

    def diffuse(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        tau = torch.randint(low, high + 1, (b,), generator=loss_stream).float()
        eps = torch.randn(x.shape, generator=loss_stream)
        alpha, sigma = (a.float()[:, None] for a in schedule.coefficients(tau))
        return alpha * x + sigma * eps, tau, eps

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, done: int, warmup: int) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * min((done + 1) / (warmup + 1), 1.0)
        optimizer.step()
        for net in (student, fake):
            net.zero_grad()

    for i in range(updates):
        j = int(torch.randint(4, (1,), generator=time))
        x_0, _ = expert.sample_data(b, data)
        x_t, t = torch.randn(x_0.shape, generator=noise), times[j].expand(b)
        if j > 0:
            alpha, sigma = (a.float()[:, None] for a in schedule.coefficients(t))
            x_t = alpha * x_0 + sigma * x_t
        x = student(x_t, t).x_0
        if i % ratio == 0:
            x_tau, tau, _ = diffuse(x.detach(), 20, 980)
            with torch.no_grad():
                x_real, x_fake = expert.predict(x_tau, tau).x_0, fake(x_tau, tau).x_0
                g = (x_fake - x_real) / ((x - x_real).abs().mean(1, keepdim=True) + 1e-6)
            loss = (0.5 * (x - (x - g).detach()).square().mean(1)).mean()
            step(student, optimizers[0], loss, 1e-2, i // ratio, -(-3 // ratio))
            n = i // ratio
            for mean, p in zip(average.parameters(), student.parameters(), strict=True):
                mean.data.copy_(p.data if n == 0 else torch.lerp(mean.data, p.data, 1 - min(0.9, (1 + n) / (10 + n))))
        x_tau, tau, eps = diffuse(x.detach(), 1, 999)
        alpha, sigma = (a.float()[:, None] for a in schedule.coefficients(tau))
        predicted = fake(x_tau, tau)
        v = alpha * predicted.eps - sigma * predicted.x_0
        loss = (v - (alpha * eps - sigma * x.detach())).square().mean(1).mean()
        step(fake, optimizers[1], loss, 1e-2, i, 3)
    return weights(student), weights(average), weights(fake)


def test_forward_states_alone_are_vanilla_dmd2_bit_for_bit() -> None:
    student, average, fake = vanilla(space(), updates=9, ratio=2)
    learner = matching(beta=FORWARD, num_updates=9, learning_rate=1e-2, critic_learning_rate=1e-2, ema=0.9)
    start = weights(learner.student)
    rollout = learner.collector.streams["rollout"].get_state()
    learn(learner)
    assert torch.equal(weights(learner.student), student)
    assert torch.equal(weights(critic(learner)), fake)
    assert torch.equal(weights(learner.ema_student), average)
    assert torch.equal(learner.collector.streams["rollout"].get_state(), rollout)
    assert float((weights(learner.student) - start).abs().max()) > 1e-3


# Every prediction type


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [("scaled_linear", "eps"), ("cosine", "v"), ("linear", "x_0"), ("flow", "flow"), ("flow", "x_0")],
)
def test_every_prediction_type_runs_and_its_critic_learns(schedule: Any, kind: Any) -> None:
    expert = GaussianMixtureExpert(MEANS, 0.2, schedule=schedule)
    learner = matching(
        expert,
        num_updates=60,
        batch_size=64,
        beta=ALL,
        critic_updates=5,
        learning_rate=1e-4,
        critic_learning_rate=2e-2,
        student={"width": 32, "depth": 2, "prediction_type": kind},
    )
    stranger = matching(expert, beta=ALL, batch_size=1024, noise_level=500.0, student=learner.config.student, seed=1)
    batch = stranger.collect()

    def error() -> float:
        """On the same samples, times and noise at every call."""
        learner.draw_noise = lambda x, low, high: stranger_diffusion  # type: ignore[method-assign]
        with torch.no_grad():
            loss = learner.critic_loss(Batch(batch))
        del learner.draw_noise
        return float(loss.mean())

    with torch.no_grad():
        batch["generated"] = stranger.generate(Batch(batch))
    stranger_diffusion = stranger.draw_noise(batch["generated"], 1, int(expert.schedule.t_max))
    before = error()
    learn(learner)
    assert torch.isfinite(weights(learner.student)).all()
    assert learner.student.prediction_type == critic(learner).denoiser.prediction_type == kind
    assert error() < 0.95 * before  # .20 to .91 of it over four seeds


@pytest.mark.parametrize(("schedule", "kind"), [("scaled_linear", "eps"), ("cosine", "v"), ("linear", "x_0"), ("flow", "flow")])
def test_the_critics_loss_is_the_plain_error_of_its_own_prediction_type(schedule: Any, kind: Any) -> None:
    expert = GaussianMixtureExpert(MEANS, 0.2, schedule=schedule)
    learner = matching(expert, student={"width": 16, "depth": 2, "prediction_type": kind})
    x = torch.randn(5, 3)
    loss = learner.critic_loss(Batch(TensorDict({"generated": x, "t": torch.zeros(5)}, [5])))
    generator = stream("loss")
    u = torch.randint(1, 1000, (5,), generator=generator) if expert.schedule.discrete else torch.rand(5, generator=generator)
    tau = u.float() if expert.schedule.discrete else 1 + 999 * u
    eps = torch.randn(5, 3, generator=generator)
    alpha, sigma = (a.float()[:, None] for a in expert.schedule.coefficients(tau))
    truth = {"eps": eps, "v": alpha * eps - sigma * x, "x_0": x, "flow": eps - x}[kind]
    output = critic(learner).denoiser.network(alpha * x + sigma * eps, tau, None)
    torch.testing.assert_close(loss, (output - truth).square().mean(1), rtol=1e-4, atol=1e-4)


# The discriminator
# What it learns


def test_a_2_step_student_that_starts_elsewhere_comes_to_the_data() -> None:
    # Sliced W2 to the data from .75, .74, .94, .84 to .115, .163, .108, .188 with seeds 0 to 3; a point at the data's mean is at .4.
    expert = GaussianMixtureExpert([[1.0, -0.5]], 0.4)
    fast = {"batch_size": 64, "collect_size": 64, "warmup_updates": 10, "ema": 0.9, "student": {"width": 32, "depth": 2}}
    rates = {"learning_rate": 4e-3, "critic_learning_rate": 1e-2}
    learner = matching(expert, **fast, **rates, num_updates=300, num_steps=2, beta=STUDENT)
    x_T = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    data, _ = expert.sample_data(2000, torch.Generator().manual_seed(1))

    def distance() -> float:
        path = unroll(learner.student_policy, learner.grid, x_T, kernel="renoise", generator=torch.Generator().manual_seed(1))
        return sliced_wasserstein(path[:, -1], data)

    assert distance() > 0.7
    learn(learner)
    assert distance() < 0.25


# Reproducible and resumable
# What is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"critic_updates": 0}, "critic_updates=0: need at least 1"),
        ({"gan_weight": -0.1}, "gan_weight=-0.1: need at least 0"),
        ({"gan_weight": math.inf}, "gan_weight=inf: need at least 0"),
        ({"discriminator_weight": -1.0}, "discriminator_weight=-1.0: need at least 0"),
        ({"discriminator_weight": math.nan}, "discriminator_weight=nan: need at least 0"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate=0.0: need a positive, finite number"),
        ({"critic_learning_rate": math.inf}, "critic_learning_rate=inf: need a positive, finite number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: need a positive, finite number"),
        (
            {"guidance_range": (1.0, 3.0)},
            r"guidance_range=\(1.0, 3.0\): DMD2 matches one distribution; leave it null",
        ),
        ({"prioritised": True}, "prioritised=true: DMD2's loss measures the size of a step"),
        ({"states_per_rollout": "all"}, "states_per_rollout=all: DMD2's backward simulation ends in one state; leave it at 1"),
        ({"batch_size": 9, "gradient_accumulation": 2}, "batch_size=9 does not divide into gradient_accumulation=2 parts"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matching(**changed)


@pytest.mark.parametrize("level", [math.nan, math.inf, -50.0])
def test_a_noise_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="noise_level"):
        matching(noise_level=level)


def test_a_discriminator_without_data_is_refused() -> None:
    with pytest.raises(NoDataError, match="Dataless brings no data"):
        matching(Dataless(MEANS, 0.2), gan_weight=0.1)
    assert learn(matching(Dataless(MEANS, 0.2))).step == 6


def test_a_discriminator_on_an_expert_that_names_no_layer_is_refused_by_name() -> None:
    class Layerless(GaussianMixtureExpert):
        def critic_features(self, student: NetworkDenoiser) -> nn.Module:
            return Expert.critic_features(self, student)

    with pytest.raises(ValueError, match=r"Layerless names no layer for a discriminator \(critic_features\); train without the GAN loss"):
        matching(Layerless(MEANS, 0.2), gan_weight=0.1)


def test_a_role_that_dmd2_has_not_is_refused() -> None:
    from ddil_env.support import Thresholding

    with pytest.raises(ValueError, match=r"thresholding.roles=.*dmd2 has no target; it has teacher, student, critic"):
        matching(thresholding=Thresholding(roles=("teacher", "target")))


def test_guidance_that_the_expert_cannot_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="has no null condition to guide against"):
        matching(guidance_scale=3.0)


def test_a_noise_level_beyond_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_level=5000 lies beyond the teacher's chain of 1000 steps"):
        matching(space(), noise_level=5000.0)


def test_on_policy_states_are_not_kept() -> None:
    learner = learn(matching(space(), num_updates=4))
    assert len(learner.buffer) == 0


def test_a_student_can_start_from_another_runs_and_the_critic_from_the_expert(tmp_path: Path) -> None:
    expert = load_expert("digits8")
    other = expert.make_student()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    (tmp_path / "student").mkdir()
    expert.save_student(other, tmp_path / "student", 4)
    learner = DMD2(expert, DMD2Config(init=str(tmp_path)))
    assert torch.equal(weights(learner.student), weights(other))
    assert torch.equal(weights(learner.ema_student), weights(other))
    assert torch.equal(weights(learner.networks["critic"]), weights(expert.make_student()))
    with pytest.raises(ValueError, match="student"):
        DMD2(expert, DMD2Config(init=str(tmp_path / "nowhere")))
