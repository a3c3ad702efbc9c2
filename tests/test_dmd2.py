"""Distribution matching: its gradient against closed forms, its states by hand, its two time scales, and what it learns."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_agents import Beta, DistributionMatching, DMD2Config, dmd2
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.states.batch import Batch
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.critic import Critic
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.trainer import Trainer
from ddil_env import Expert, GaussianMixtureExpert, NetworkDenoiser, NoDataError, TimeGrid, load_expert, unroll
from ddil_env.experts.digits import Digits

FORWARD, TEACHER, STUDENT = Beta(1, 0, 0), Beta(0, 1, 0), Beta(0, 0, 1)
ALL = Beta(0.5, 0.2, 0.3)
MEANS = [[-1.0, 0.3, 0.0], [0.8, -0.5, 0.2], [0.1, 0.9, -0.7]]
SMALL: dict[str, Any] = {
    "num_updates": 6,
    "teacher_steps": 8,
    "batch_size": 8,
    "collect_size": 16,
    "updates_per_collect": 2,
    "capacity": 64,
    "warmup_updates": 3,
    "critic_updates": 2,
    "student": {"width": 16, "depth": 2},
}


@pytest.fixture(autouse=True)
def _callers_generator() -> Iterator[None]:
    """Loading sets torch's own generator; no test sees another's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Dataless(GaussianMixtureExpert):
    """An expert that brings no data."""

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        return Expert.sample_data(self, n, generator)


def space() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, [1, 2, 3])


def labelled() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, [1, 2, 3], labels=[0, 1, 1], guidance_scale=2.0)


def video() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 0.2, schedule="cosine")


def flow() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(MEANS, 0.2, schedule="flow")


everywhere = pytest.mark.parametrize("make", [space, labelled, video, flow])


def matching(expert: Expert | None = None, **changed: Any) -> DistributionMatching:
    return DistributionMatching(expert or space(), DMD2Config(**{**SMALL, **changed}))


def learn(learner: DistributionMatching) -> DistributionMatching:
    return learner.learn(progress=False)


def critic(learner: DistributionMatching) -> Critic:
    found: Critic = learner.networks["critic"]
    return found


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def stream(name: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, name))


# The gradient, in closed form


class Affine(nn.Module):
    """x̂_0 = shift + scale · x_t: of pure noise, N(shift, scale²)."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.tensor(number)) for number in (shift, scale))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        return self.shift + self.scale * x_t


class PosteriorMean(nn.Module):
    """x̂_0 of N(mean, std²) in closed form: the critic that training would converge to."""

    def __init__(self, mean: float, std: float, d: int) -> None:
        super().__init__()
        self.exact = GaussianMixtureExpert([[mean] * d], std)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        return self.exact.predict(x_t, t).x_0 + 0 * self.unused


class Gaussian(GaussianMixtureExpert):
    """N(mean, std²) in d dimensions, with affine students."""

    def __init__(self, mean: float = 0.6, std: float = 0.4, d: int = 4) -> None:
        super().__init__([[mean] * d], std)

    def make_student(self, *, shift: float, scale: float) -> NetworkDenoiser:  # type: ignore[override]
        return NetworkDenoiser(Affine(shift, scale), self.schedule, "x_0")


def with_exact_critic(shift: float, scale: float, **changed: Any) -> DistributionMatching:
    """A student of N(shift, scale²) at its first step, and the critic of just that distribution."""
    learner = matching(Gaussian(), student={"shift": shift, "scale": scale}, beta=STUDENT, noise_level=999.0, **changed)
    critic(learner).denoiser = NetworkDenoiser(PosteriorMean(shift, scale, 4), learner.expert.schedule, "x_0")
    return learner


def diffusion(schedule: Any, b: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """τ ~ U{20, …, 980} and ε as the stream gives them, and α_τ, σ_τ (b, 1) in float64."""
    generator = stream("loss")
    tau = torch.randint(20, 981, (b,), generator=generator).float()
    eps = torch.randn(b, d, generator=generator).double()
    alpha, sigma = schedule.coefficients(tau)
    return tau, eps, alpha[:, None], sigma[:, None]


def loss_and_gradient(learner: DistributionMatching) -> tuple[Tensor, Tensor, Tensor]:
    """x, the loss of each state (b,), and its gradient in x (b, d)."""
    batch = learner.trainer.collect()
    x = learner.generate(Batch(batch)).detach().requires_grad_()
    learner.generate = lambda batch: x  # type: ignore[method-assign]
    loss = learner.loss(Batch(batch))
    return x.detach().double(), loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.6, 0.9), (-0.8, 0.4), (0.6, 0.1), (1.5, 0.7)], ids=["wider", "shifted", "narrower", "both"]
)
@pytest.mark.parametrize("batch_size", [4, 16])  # as many states as the latent is wide, and more
def test_the_gradient_is_the_difference_of_the_scores_over_the_mean_distance(shift: float, scale: float, batch_size: int) -> None:
    learner = with_exact_critic(shift, scale, batch_size=batch_size)
    x, loss, gradient = loss_and_gradient(learner)
    _, eps, alpha, sigma = diffusion(learner.expert.schedule, batch_size, 4)
    x_tau = alpha * x + sigma * eps
    score_fake = -(x_tau - alpha * shift) / (alpha**2 * scale**2 + sigma**2)
    score_real = -(x_tau - alpha * 0.6) / (alpha**2 * 0.4**2 + sigma**2)
    x_real = (x_tau + sigma**2 * score_real) / alpha
    g = sigma**2 / alpha * (score_fake - score_real) / ((x - x_real).abs().mean(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(gradient, g / 4, rtol=1e-4, atol=1e-5)  # of the mean over 4 entries
    torch.testing.assert_close(loss, 0.5 * g.square().mean(1), rtol=1e-3, atol=1e-6)


def test_descent_moves_the_student_toward_the_teacher() -> None:
    for shift, scale in ((-0.8, 0.4), (1.5, 0.4), (0.6, 0.9), (0.6, 0.1)):  # the teacher's are 0.6 and 0.4
        learner = with_exact_critic(shift, scale, batch_size=512)
        learner.loss(Batch(learner.trainer.collect())).mean().backward()
        network = learner.student.network
        assert isinstance(network, Affine)
        for gradient, error in ((network.shift.grad, shift - 0.6), (network.scale.grad, scale - 0.4)):
            if error:
                assert gradient is not None
                assert float(gradient) * error > 0.01 * abs(error)


def test_loss_and_gradient_are_0_where_the_student_is_the_teachers_distribution() -> None:
    _, loss, gradient = loss_and_gradient(with_exact_critic(0.6, 0.4))
    assert not loss.any()
    assert not gradient.any()
    _, loss, gradient = loss_and_gradient(with_exact_critic(0.7, 0.4))
    assert loss.all()
    assert gradient.any(1).all()


def test_guidance_steers_the_real_score_and_its_normaliser() -> None:
    expert = GaussianMixtureExpert([[0.5, -0.2], [-0.7, 0.4]], [0.3, 0.5], [1, 3], labels=[0, 1])
    learner = matching(expert, guidance_scale=3.5, beta=STUDENT, noise_level=999.0)
    before = expert.nfe
    batch = learner.trainer.collect()
    c = batch["c"]
    critic(learner).denoiser = NetworkDenoiser(PosteriorMean(0.1, 0.6, 2), expert.schedule, "x_0")
    x = learner.generate(Batch(batch)).detach().requires_grad_()
    learner.generate = lambda batch: x  # type: ignore[method-assign]
    gradient = torch.autograd.grad(learner.loss(Batch(batch)).sum(), x)[0].double()
    assert expert.nfe - before == 2 * len(x)

    _, eps, alpha, sigma = diffusion(expert.schedule, len(x), 2)
    at = x.detach().double()
    x_tau = alpha * at + sigma * eps
    means, stds = torch.tensor([[0.5, -0.2], [-0.7, 0.4]]).double(), torch.tensor([0.3, 0.5]).double()
    variance = alpha**2 * stds**2 + sigma**2  # (b, 2)
    difference = x_tau[:, None] - alpha[..., None] * means  # (b, component, 2)
    posterior = means + (alpha * stds**2 / variance)[..., None] * difference
    density = torch.tensor([0.25, 0.75]).double() * (-0.5 * difference.square().sum(-1) / variance).exp() / variance
    uncond = ((density / density.sum(1, keepdim=True))[..., None] * posterior).sum(1)
    x_real = uncond + 3.5 * (posterior[torch.arange(len(c)), c] - uncond)
    x_fake = 0.1 + alpha * 0.36 / (alpha**2 * 0.36 + sigma**2) * (x_tau - alpha * 0.1)
    g = (x_fake - x_real) / ((at - x_real).abs().mean(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(gradient, g / 2, rtol=1e-3, atol=1e-5)


def test_times_of_the_loss_are_whole_inside_the_chain_and_as_wide_as_asked() -> None:
    learner = matching()
    tau, eps = learner.diffusion(torch.zeros(20000, 3), 20, 980)
    assert (tau.min(), tau.max()) == (20, 980)
    assert torch.equal(tau, tau.round())
    assert float(tau.mean()) == pytest.approx(500, abs=4 * 277 / math.sqrt(20000))
    assert eps.shape == (20000, 3)
    tau, _ = learner.diffusion(torch.zeros(20000, 3), 1, 999)
    assert (tau.min(), tau.max()) == (1, 999)
    tau, _ = matching(flow()).diffusion(torch.zeros(20000, 3), 1, 1000)
    assert 1 <= tau.min() < 1.5
    assert 999 < tau.max() <= 1000


# The states


@everywhere
@pytest.mark.parametrize("beta", [FORWARD, TEACHER, STUDENT], ids=["forward", "teacher", "student"])
def test_the_first_steps_state_is_pure_noise_whatever_the_source(make: Callable[[], Expert], beta: Beta) -> None:
    learner = matching(make(), beta=beta, noise_level=1000.0, batch_size=5)
    states = learner.trainer.collect()
    drawn = torch.randn(5, *learner.expert.sample_shape, generator=stream("noise" if beta.forward else "rollout"))
    assert torch.equal(states["x_t"], drawn)
    assert (states["t"] == learner.expert.schedule.t_max).all()
    assert not states["actors"].any()


def test_forward_states_are_independent_of_the_data_at_the_first_step_alone() -> None:
    class Elsewhere(GaussianMixtureExpert):
        def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
            x_0, c = super().sample_data(n, generator)
            return x_0 + 7, c

    for level, equal in ((999.0, True), (500.0, False)):
        here, there = (matching(cls(MEANS, 0.2), beta=FORWARD, noise_level=level).collect() for cls in (GaussianMixtureExpert, Elsewhere))
        assert torch.equal(here["x_t"], there["x_t"]) == equal


@everywhere
@pytest.mark.parametrize("n", [4, 7])  # as many as the latent is wide, and not
def test_forward_states_are_data_diffused_to_the_step(make: Callable[[], Expert], n: int) -> None:
    learner = matching(make(), beta=FORWARD, noise_level=500.0, batch_size=n)
    expert, states = learner.expert, learner.trainer.collect()
    x_0, c = expert.sample_data(n, stream("data"))
    eps = torch.randn(x_0.shape, generator=stream("noise"))
    assert torch.equal(states["x_t"], expert.schedule.add_noise(x_0, eps, states["t"]))
    assert c is None or torch.equal(states["c"], c)


def by_hand(learner: DistributionMatching, n: int, j: int, p_expert: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """x_{t_j}, c and who acted: the student renoises its x̂_0 at every step, the expert takes its DDIM steps."""
    expert, generator, k = learner.expert, stream("rollout"), learner.config.substeps
    x = torch.randn(n, *expert.sample_shape, generator=generator)
    c = expert.sample_condition(n, generator)
    by_expert = torch.rand(n, j, generator=stream("path")) < p_expert
    broadcast = (-1, *(1,) * len(expert.sample_shape))
    for i, (t, s) in enumerate(pairwise(learner.grid.times.tolist()[: j + 1])):
        theirs, strides = x, [t + (s - t) * m / k for m in range(k + 1)]
        for now, then in pairwise([math.ceil(u) if expert.schedule.discrete else u for u in strides]):
            theirs = expert.guided(theirs, torch.full((n,), now), c).latent(torch.full((n,), then))
        if not by_expert[:, i].all():
            with torch.no_grad():
                x_0 = learner.student.predict(x, torch.full((n,), t), c).x_0
            noise = torch.zeros(x.shape)  # drawn where the student acts alone
            noise[~by_expert[:, i]] = torch.randn(int((~by_expert[:, i]).sum()), *expert.sample_shape, generator=generator)
            own = expert.schedule.add_noise(x_0, noise, torch.full((n,), s))
            theirs = torch.where(by_expert[:, i].reshape(broadcast), theirs, own)
        x = theirs
    return x, c, by_expert


@everywhere
@pytest.mark.parametrize("n", [4, 7])
@pytest.mark.parametrize("j", [1, 3])
@pytest.mark.parametrize(("beta", "p_expert"), [(STUDENT, 0.0), (STUDENT, 0.5), (TEACHER, 0.0)], ids=["student", "mixed", "teacher"])
def test_backward_simulation_by_hand(make: Callable[[], Expert], n: int, j: int, beta: Beta, p_expert: float) -> None:
    learner = matching(make(), beta=beta, p_expert=p_expert, noise_level=999 - 250.0 * j, batch_size=n)
    states, spent = learner.trainer.collect(), learner.expert.nfe
    x, c, by_expert = by_hand(learner, n, j, 1.0 if beta.teacher else p_expert)
    torch.testing.assert_close(states["x_t"], x, atol=2e-4, rtol=1e-4)  # the student's x̂_0 is read back from its action
    assert torch.equal(states["t"], learner.grid.times[j].expand(n))
    assert torch.equal(states["s"], learner.grid.times[j + 1].expand(n))
    assert torch.equal(states["actors"][:, :j], by_expert)
    assert not states["actors"][:, j:].any()
    assert spent == int(states["nfe"].sum()) == int(by_expert.sum()) * learner.expert_policy.nfe_per_action
    assert c is None or torch.equal(states["c"], c)
    assert not any(value.requires_grad for value in states.values())


@pytest.mark.parametrize(("level", "time"), [(1000, 999), (900, 999), (800, 749), (500, 499), (499, 499), (380, 499), (370, 249), (0, 249)])
def test_a_noise_level_is_the_grids_nearest_time_in_every_collection(level: float, time: float) -> None:
    learner = matching(noise_level=float(level), beta=ALL)
    for _ in range(3):
        assert (learner.trainer.collect()["t"] == time).all()


def test_one_step_is_drawn_for_each_collection_and_all_are_as_likely() -> None:
    learner = matching(beta=ALL, batch_size=4, student={"width": 4, "depth": 1}, teacher_steps=4)
    generator, counts = stream("time"), [0, 0, 0, 0]
    for _ in range(200):
        t = learner.collector.collect(4, learner.beta(), 0)["t"]
        j = int(torch.randint(4, (1,), generator=generator))
        assert (t == learner.grid.times[j]).all()
        counts[j] += 1
    assert max(abs(count - 50) for count in counts) < 4 * math.sqrt(200 * 0.25 * 0.75)


def test_each_collection_is_one_batch_and_its_shares_are_those_of_beta() -> None:
    learner = matching(beta=ALL, batch_size=10, noise_level=999.0)
    counts = torch.zeros(3)
    for _ in range(100):
        states = learner.trainer.collect()
        assert len(states) == 10
        counts += torch.bincount(states["source"].long(), minlength=3)
        assert torch.equal(learner.draw()["x_t"], states["x_t"])
    for count, share in zip(counts.tolist(), learner.beta(), strict=True):
        assert abs(count - 1000 * share) < 4 * math.sqrt(1000 * share * (1 - share))
    assert len({tuple(learner.collector.counts(10, (0.5, 0.2, 0.3))) for _ in range(20)}) > 3


@pytest.mark.parametrize("on_policy", [True, False])
def test_states_are_replayed_unless_on_policy(on_policy: bool) -> None:
    learner = matching(on_policy=on_policy, beta=ALL, num_updates=8)
    versions: list[set[int]] = []
    update = learner.trainer.update

    def seen(batch: TensorDict) -> dict[str, Tensor]:
        assert len(batch) == 8
        versions.append(set(batch["version"].tolist()))
        return update(batch)

    learner.trainer.update = seen  # type: ignore[method-assign]
    learn(learner)
    if on_policy:
        assert versions == [{i} for i in range(8)]
    else:
        assert set.union(*versions) == {0, 2, 4, 6}  # 16 states after each second update
        assert max(map(len, versions)) > 1


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
        before = [weights(network).clone() for network in (learner.student, critic(learner), learner.average)]
        learner.trainer.collect()
        measured = learner.trainer.update(learner.draw())
        moved = [not torch.equal(weights(n), b) for n, b in zip((learner.student, critic(learner), learner.average), before, strict=True)]
        assert moved == [turn, True, turn]
        assert ("loss" in measured, "grad_norm" in measured) == (turn, turn)
        assert measured["critic_loss"].shape == (8,)
    assert learner.step == 7


def test_the_students_rate_runs_its_course_over_its_own_steps() -> None:
    learner = matching(
        critic_updates=3, num_updates=8, warmup_updates=0, lr_scheduler="linear", learning_rate=3e-3, critic_learning_rate=8e-3
    )
    student, other = learner.trainer.trainables["student"], learner.trainer.trainables["critic"]
    assert (student.horizon, other.horizon) == (3, 8)  # ⌈8/3⌉
    rates = []
    for _ in range(8):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
        rates.append((student.last_learning_rate, other.last_learning_rate))
    assert [a for a, _ in rates] == pytest.approx([3e-3] * 3 + [2e-3] * 3 + [1e-3] * 2)
    assert [b for _, b in rates] == pytest.approx([1e-3 * n for n in range(8, 0, -1)])
    learner.learn(4, progress=False)
    assert (student.horizon, other.horizon) == (4, 12)


def test_the_average_moves_with_the_students_steps_alone() -> None:
    learner = matching(critic_updates=2, ema=0.2, learning_rate=1e-2)
    expected = None
    for i in range(8):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
        if i % 2 == 0:
            now, d = weights(learner.student), min(0.2, (1 + i // 2) / (10 + i // 2))
            expected = now if expected is None else d * expected + (1 - d) * now
        torch.testing.assert_close(weights(learner.average), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_give_the_weights_of_the_whole_batch(parts: int) -> None:
    learner, twin = matching(beta=ALL), matching(beta=ALL, gradient_accumulation=parts)
    for each in (learner, twin):  # both networks draw their own τ and ε a part: give every part the same
        each.diffusion = lambda x, low, high: (torch.full((len(x),), 400.0), torch.zeros_like(x))  # type: ignore[method-assign]
        learn(each)
    torch.testing.assert_close(weights(twin.student), weights(learner.student), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(critic(twin)), weights(critic(learner)), atol=1e-5, rtol=0)


# What it costs


@pytest.mark.parametrize(("make", "pair"), [(space, 1), (labelled, 2)])
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
    assert torch.equal(weights(learner.average), average)
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
        learner.diffusion = lambda x, low, high: stranger_diffusion  # type: ignore[method-assign]
        with torch.no_grad():
            loss = learner.critic_loss(Batch(batch))
        del learner.diffusion
        return float(loss.mean())

    with torch.no_grad():
        batch["generated"] = stranger.generate(Batch(batch))
    stranger_diffusion = stranger.diffusion(batch["generated"], 1, int(expert.schedule.t_max))
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


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 24, 3, padding=1), nn.Conv1d(24, 2, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        output: Tensor = self.last(self.first(x_t))
        return output


class Series(GaussianMixtureExpert):
    """Two channels over eight points in time, with a convolutional student."""

    def __init__(self) -> None:
        super().__init__(torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)), 0.3)

    def make_student(self) -> NetworkDenoiser:  # type: ignore[override]
        return NetworkDenoiser(Conv(), self.schedule, "v")

    def critic_features(self, student: NetworkDenoiser) -> nn.Module:
        assert isinstance(student.network, Conv)
        return student.network.first


@pytest.mark.parametrize(
    ("make", "student", "convolution", "channels"),
    [
        (space, {"width": 24}, nn.Conv1d, 24),
        (Series, {}, nn.Conv1d, 24),
        (lambda: Digits("digits8"), {"channels": [8, 16]}, nn.Conv2d, 16),
    ],
    ids=["vector", "1-D", "2-D"],
)
def test_a_head_tells_each_input_by_its_own_features(
    make: Callable[[], Expert], student: dict[str, Any], convolution: type[nn.Module], channels: int
) -> None:
    expert = make()
    learner = matching(expert, gan_weight=0.1, student=student, batch_size=4, num_updates=2, critic_updates=1)
    network = critic(learner)
    assert isinstance(network.head, nn.Sequential)
    convolutions = [layer for layer in network.head if isinstance(layer, nn.Conv1d | nn.Conv2d)]
    assert [(type(layer), layer.in_channels, layer.out_channels) for layer in convolutions] == [
        (convolution, channels, channels),
        (convolution, channels, 1),
    ]
    for b in (1, 5, channels):
        x_t, t, c = torch.randn(b, *expert.sample_shape), torch.full((b,), 300.0), expert.sample_condition(b)
        pred, realness = network(x_t, t, c)
        assert pred.x_0.shape == x_t.shape
        assert realness.shape == (b,)
        alone = torch.cat([network(x_t[i : i + 1], t[:1], None if c is None else c[i : i + 1])[1] for i in range(b)])
        torch.testing.assert_close(realness, alone, atol=1e-5, rtol=1e-4)
        assert b == 1 or float(realness.detach().std()) > 1e-3
    before = weights(network.head)
    learn(learner)
    assert not torch.equal(weights(network.head), before)
    assert torch.isfinite(weights(learner.student)).all()


def test_a_head_on_few_features_can_tell_inputs_apart() -> None:
    network = critic(matching(gan_weight=0.1, student={"width": 8, "depth": 2}))
    realness = network(torch.randn(16, 3), torch.full((16,), 300.0), None)[1]
    assert float(realness.detach().std()) > 1e-3


def test_without_a_weight_there_is_no_discriminator() -> None:
    network = critic(matching())
    assert network.head is None
    assert not network(torch.randn(5, 3), torch.full((5,), 300.0), None)[1].any()
    assert sum(p.numel() for p in network.parameters()) == weights(matching().student).numel()


def adversaries(num_updates: int, **changed: Any) -> DistributionMatching:
    """Data at (2, 2); a student that stays where it starts, around 0, while the discriminator learns."""
    fast = {"batch_size": 64, "student": {"width": 64, "depth": 2}, "learning_rate": 1e-12, "critic_learning_rate": 1e-2}
    learner = matching(
        GaussianMixtureExpert([[2.0, 2.0]], 0.3),
        **{**fast, "num_updates": num_updates, "gan_weight": 1.0, "discriminator_weight": 1.0, **changed},
    )
    return learn(learner) if num_updates > 1 else learner


def test_the_discriminator_tells_data_from_samples_and_its_gradient_points_to_the_data() -> None:
    learner = adversaries(150, seed=1)
    network, schedule = critic(learner), learner.expert.schedule
    learner.trainer.collect()
    fake = learner.generate(Batch(learner.draw())).detach()
    real, _ = learner.expert.sample_data(64, stream("other"))
    assert float((fake - real).norm(dim=1).min()) > 0.5
    t = torch.full((64,), 200.0)
    noise = torch.randn(64, 2)
    with torch.no_grad():
        of_fake, of_real = (network(schedule.add_noise(x, noise, t), t, None)[1] for x in (fake, real))
    assert float((of_fake < 0).float().mean()) > 0.85  # .95 both at least, over five seeds
    assert float((of_real > 0).float().mean()) > 0.85

    # The student's loss where critic and teacher agree is the adversarial one alone.
    learner.expert.guided = lambda x_t, t, c, w: network.denoiser(x_t, t, c)  # type: ignore
    learner.generate = lambda batch: x  # type: ignore[method-assign]
    learner.diffusion = lambda x, low, high: (t, noise)  # type: ignore[method-assign]
    x = fake.clone().requires_grad_()
    loss = learner.loss(Batch(learner.draw()))
    torch.testing.assert_close(loss.detach(), softplus(-of_fake))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    toward = torch.tensor([2.0, 2.0]) - fake
    cosine = nn.functional.cosine_similarity(-gradient, toward)
    assert float((gradient.norm(dim=1) > 0).float().mean()) == 1
    assert float((cosine > 0).float().mean()) > 0.8  # seeds 0 … 4: .77, .89, .86, .61, 1.00; the samples of 3 and 4 are of t_j = 999


def test_the_discriminators_loss_joins_the_critics() -> None:
    plain, weighted = adversaries(1, discriminator_weight=0.0), adversaries(1, discriminator_weight=0.25)
    critic(weighted).load_state_dict(critic(plain).state_dict())
    x = torch.randn(6, 2)
    losses = [learner.critic_loss(Batch(TensorDict({"generated": x, "t": torch.zeros(6)}, [6]))).detach() for learner in (plain, weighted)]
    network, schedule, generator, of_real = critic(plain), plain.expert.schedule, stream("loss"), stream("real")
    torch.randint(1, 1000, (6,), generator=generator), torch.randn(6, 2, generator=generator)  # the denoising loss's own
    real, _ = plain.expert.sample_data(6, of_real)
    draws = [(torch.randint(1000, (6,), generator=generator).float(), torch.randn(6, 2, generator=generator)) for _ in range(2)]
    with torch.no_grad():
        scores = [network(schedule.add_noise(each, eps, tau), tau, None)[1] for each, (tau, eps) in zip((x, real), draws, strict=True)]
    torch.testing.assert_close(losses[1] - losses[0], 0.25 * (softplus(scores[0]) + softplus(-scores[1])), rtol=1e-4, atol=1e-4)


def test_a_labelled_discriminator_sees_the_datas_own_classes() -> None:
    learner = matching(labelled(), gan_weight=0.1, beta=ALL)
    seen: list[Tensor] = []
    critic(learner).register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    states = learner.trainer.collect()
    batch = TensorDict({"generated": torch.randn(8, 3), "c": states["c"], "t": states["t"]}, [8])
    learner.critic_loss(Batch(batch))
    _, c_real = learner.expert.sample_data(8, stream("real"))
    assert c_real is not None
    assert torch.equal(seen[0], torch.cat([states["c"], states["c"], c_real]))


def test_a_discriminators_weights_follow_the_runs_seed_and_leave_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    one = weights(critic(matching(gan_weight=0.1)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(weights(critic(matching(gan_weight=0.1))), one)


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


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    one, again, other = (learn(matching(beta=ALL, p_expert=0.5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(weights(one.student), weights(again.student))
    assert torch.equal(weights(critic(one)), weights(critic(again)))
    assert not torch.allclose(weights(one.student), weights(other.student), atol=1e-2)


@pytest.mark.parametrize(
    "changed",
    [
        {"beta": ALL, "p_expert": 0.3},
        {"gan_weight": 0.1, "gradient_accumulation": 2},
        {"on_policy": False, "beta": ALL},
        {"mixed_precision": "bf16", "gan_weight": 0.1, "critic_updates": 3},
    ],
    ids=["mixed", "gan", "replayed", "bf16"],
)
def test_a_resumed_learner_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path: Path, changed: dict[str, Any]) -> None:
    whole = matching(**changed, num_updates=8)
    whole.train(tmp_path, progress=False, checkpoint_every=5)
    resumed = matching(**changed, num_updates=8).load(tmp_path / "checkpoints" / "step_00000005")
    resumed.train(progress=False)
    ours, theirs = resumed.trainer.state_dict(), whole.trainer.state_dict()
    for name in ("student", "critic"):
        a, b = (state["trainables"][name]["network"] for state in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(weights(resumed.average), weights(whole.average))
    assert ours["nfe"] == theirs["nfe"]
    assert weights(critic(whole)).isfinite().all()


@pytest.mark.parametrize("network", ["student", "critic"])
def test_a_poisoned_network_stops_the_run_at_its_step(network: str) -> None:
    learner = matching()
    with torch.no_grad():
        next(learner.networks[network].parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 1, on states of: student \(8 states\)"):
        learn(learner)


CLI = shlex.split(
    "--env digits8 --num_updates 7 --num_steps 2 --teacher_steps 4 --batch_size 4 --collect_size 8 --critic_updates 3 "
    "--beta.forward 0.3 --beta.student 0.7 --log_every 2 --checkpoint_every 3 --evaluate.n 12 --evaluate.n_action 4"
)


class Killed(BaseException):
    """As a kill: nothing of the program catches it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of the command."""
    out = tmp_path_factory.mktemp("dmd2") / "run"
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")), torch.random.fork_rng():
        dmd2.main([*CLI, "--out", str(out)])
    return out


def test_the_command_leaves_a_result_and_the_critics_curves(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert (result["agent"], result["env"], result["student"], result["num_updates"]) == ("dmd2", "digits8", "dmd2@2", 7)
    assert result["times"] == [999, 499, 0]
    assert set(result["models"]) == {"teacher@4", "teacher@2", "dmd2@2", "dmd2@2, last weights"}
    own = result["models"]["dmd2@2"]
    assert own["nfe_per_sample"] == 2
    assert all(math.isfinite(own[key]) for key in ("frechet", "coverage", "accuracy", "frechet_to_expert"))
    assert own["endpoint_rmse"] is own["path_rmse"] is None  # fresh noise on the way
    assert result["teacher_nfe"] == own["teacher_nfe"] == 3 * 4  # updates 1, 4 and 7
    assert result["models"]["teacher@2"]["endpoint_rmse"] > 0
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 7]
    assert all(row["critic_loss"] > 0 and row["critic_grad_norm_max"] >= row["critic_grad_norm"] > 0 for row in rows)
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False]  # lines of the critic's steps alone
    assert ["grad_norm" in row for row in rows] == [row["loss"] is not None for row in rows]
    assert sum(row["source_counts"]["forward"] for row in rows) > 0
    assert sum(sum(row["source_counts"].values()) for row in rows) == 7 * 4


def test_a_command_killed_halfway_resumes_to_the_same_student_and_critic(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    update = Trainer.update

    def killed_at_5(trainer: Trainer, batch: TensorDict) -> dict[str, Tensor]:
        if trainer.algorithm.step == 5:
            raise Killed
        return update(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killed_at_5)
        with pytest.raises(Killed):
            dmd2.main(["--config", str(run / "config.yaml"), "--out", "run"])
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_00000003"]
    dmd2.main(["--resume", "run"])
    assert "resuming run at step 3 of 7" in capsys.readouterr().err
    ours, theirs = (load_file(each / "student" / "student.safetensors") for each in (Path("run"), run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    states = [torch.load(each / "checkpoints/step_00000007/state.pt", weights_only=True)["trainables"] for each in (Path("run"), run)]
    networks = [state[name]["network"] for state in states for name in ("student", "critic")]
    for mine, other in zip(networks[:2], networks[2:], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in other)
    clock = ("seconds", "nfe_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(each / "metrics.jsonl")] for each in (Path("run"), run)
    ]
    assert rows[0] == rows[1]


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
        ({"guidance_range": (1.0, 3.0)}, r"guidance_range=\(1.0, 3.0\): DMD2 matches one distribution; set guidance_scale"),
        ({"prioritised": True}, "prioritised=true: DMD2's loss says how large a step is"),
        ({"states_per_rollout": "all"}, "states_per_rollout=all: DMD2's backward simulation ends in one state; leave it at 1"),
        ({"batch_size": 9, "gradient_accumulation": 2}, "batch_size=9 does not divide into gradient_accumulation=2 parts"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMD2Config(**{**SMALL, **changed})


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
    learner = DistributionMatching(expert, DMD2Config(init=str(tmp_path)))
    assert torch.equal(weights(learner.student), weights(other))
    assert torch.equal(weights(learner.average), weights(other))
    assert torch.equal(weights(learner.networks["critic"]), weights(expert.make_student()))
    with pytest.raises(ValueError, match="student"):
        DistributionMatching(expert, DMD2Config(init=str(tmp_path / "nowhere")))
