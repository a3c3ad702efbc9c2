"""Facts about the imitation-learning baselines: each one's formula, what it costs, what it equals at its ends, and that it learns."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddil_agents import BehaviourCloning, Beta, Dagger, Evaluation, Judge, Learner
from ddil_agents import aggrevate as aggrevate_module
from ddil_agents import dart as dart_module
from ddil_agents import gail as gail_module
from ddil_agents import safe_dagger as safe_dagger_module
from ddil_agents import scheduled_sampling as scheduled_sampling_module
from ddil_agents.aggrevate import Aggrevate, AggrevateConfig
from ddil_agents.commands.load import load_run
from ddil_agents.commands.parse import expert_and_config, parse
from ddil_agents.dart import Dart, DartConfig
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.evaluation.trajectories import Trajectories, record
from ddil_agents.gail import Discriminator, Gail, GailConfig
from ddil_agents.safe_dagger import GatedCollector, SafeDagger, SafeDaggerConfig
from ddil_agents.scheduled_sampling import ScheduledSampling, ScheduledSamplingConfig
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.loop import train
from ddil_env import (
    DdimPolicy,
    DenoisingEnv,
    ExpertPolicy,
    GaussianMixtureExpert,
    NoDataError,
    NoiseSchedule,
    Prediction,
    StudentPolicy,
    TimeGrid,
    invert_ddim,
    unroll,
)
from ddil_env.broadcast import broadcast
from ddil_env.corrections import Mixed, ScaledEpsilon, TimeShifted
from ddil_env.mdp import Kernel

MIXTURE = Beta(0.5, 0.1, 0.4)
CORNERS = [[-0.8, -0.8], [-0.8, 0.8], [0.8, -0.8], [0.8, 0.8]]
N, K = 4, 2  # student steps; expert steps in each


@pytest.fixture(autouse=True)
def _callers_generator() -> Iterator[None]:
    """`load` sets torch's own generator; no test sees another's."""
    with torch.random.fork_rng():
        yield


def corners() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(CORNERS, 0.25, [1, 2, 3, 4])


def labelled() -> GaussianMixtureExpert:
    return GaussianMixtureExpert(CORNERS, 0.25, [1, 2, 3, 4], labels=[0, 0, 1, 1], guidance_scale=2.0)


def gaussian(std: float = 1.0, d: int = 2) -> GaussianMixtureExpert:
    return GaussianMixtureExpert([[0.0] * d], std)


def settings(**changed: Any) -> dict[str, Any]:
    """A run of a tenth of a second."""
    small = {"num_updates": 20, "teacher_steps": N * K, "batch_size": 16, "collect_size": 32, "updates_per_collect": 4, "capacity": 64}
    return {**small, "warmup_updates": 3, "student": {"width": 16, "depth": 2}, **changed}


def make(agent: type[Learner], expert: GaussianMixtureExpert | None = None, **changed: Any) -> Any:
    return agent(expert or corners(), agent.Config(**settings(**changed)))


def learn(learner: Any) -> Any:
    return learner.learn(progress=False)


def weights(denoiser: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in denoiser.parameters()])


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal down to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def stream(name: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, name))


def only(source: int) -> Any:
    """β of one source."""
    return tuple(float(i == source) for i in range(3))


def fields(states: TensorDict) -> tuple[Any, ...]:
    return tuple(states.get(key, None) for key in ("x_t", "t", "s", "c", "w", "x_s"))


# What all of them promise

BASELINES: list[tuple[type[Learner], dict[str, Any]]] = [
    (ScheduledSampling, {}),
    (Dart, {"beta": Beta(0.6, 0.4, 0)}),
    (SafeDagger, {"gate": 0.3, "query_budget": 200, "beta": MIXTURE}),
    (Aggrevate, {"beta": MIXTURE}),
    (Gail, {}),
    (Gail, {"paired": False, "beta": Beta(0.2, 0.4, 0.4)}),
]
NAMES = ["scheduled_sampling", "dart", "safe_dagger", "aggrevate", "gail", "gail-unpaired"]
every = pytest.mark.parametrize(("agent", "changed"), BASELINES, ids=NAMES)


@every
def test_a_resumed_learner_ends_bit_for_bit_where_the_unbroken_one_does(
    tmp_path: Path, agent: type[Learner], changed: dict[str, Any]
) -> None:
    whole = make(agent, **changed)
    train(whole, tmp_path, progress=False, checkpoint_every=9)
    train(resumed := make(agent, **changed).load(tmp_path / "checkpoints" / "step_00000018"), progress=False)
    first = make(agent, **changed)
    train(first, tmp_path / "again", progress=False, checkpoint_every=11)
    train(early := make(agent, **changed).load(tmp_path / "again" / "checkpoints" / "step_00000011"), progress=False)
    a = whole.state_dict()
    for other in (resumed, early):
        b = other.state_dict()
        for key in a.keys() | b.keys():
            assert same(a[key], b[key]), key
    assert whole.step == 20


@every
def test_a_learner_that_has_trained_takes_over_the_counts_of_the_one_that_it_loads(
    tmp_path: Path, agent: type[Learner], changed: dict[str, Any]
) -> None:
    train(saved := make(agent, **changed), tmp_path, progress=False, checkpoint_every=20)
    trained = learn(make(agent, **changed)).load(tmp_path / "checkpoints" / "step_00000020")
    assert (trained.student_nfe, trained.teacher_nfe) == (saved.student_nfe, saved.teacher_nfe)


@every
def test_every_forward_of_the_teacher_is_counted(agent: type[Learner], changed: dict[str, Any]) -> None:
    for expert in (corners(), labelled()):
        learner = learn(make(agent, expert, **changed))
        assert learner.teacher_nfe == expert.nfe > 0


@every
def test_it_trains_on_conditions_and_on_any_shape(agent: type[Learner], changed: dict[str, Any]) -> None:
    video = GaussianMixtureExpert(torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 0.2, schedule="cosine")
    for expert in (labelled(), video, GaussianMixtureExpert(CORNERS, 0.25, schedule="flow")):
        learner = make(agent, expert, num_updates=6, **changed)
        before = weights(learner.average)
        learn(learner)
        assert torch.isfinite(weights(learner.average)).all()
        assert not torch.equal(weights(learner.average), before)


FAST = {"batch_size": 256, "collect_size": 1024, "updates_per_collect": 16, "capacity": 4096, "warmup_updates": 50, "teacher_steps": 32}
FAST |= {"num_updates": 400, "learning_rate": 1e-2, "ema": 0.97, "student": {"width": 64}}
ADVERSARIAL = {"learning_rate": 3e-3, "discriminator_learning_rate": 1e-2, "batch_size": 128, "num_updates": 600}
# Seeds 0 … 2 at equal updates: behaviour cloning .033 – .048, DAgger .033 – .049.
TOYS: list[tuple[type[Learner], dict[str, Any], float]] = [
    (Dagger, {"beta": Beta(0, 0, 1)}, 0.08),  # Imagine Flash's states: .032 – .034
    (ScheduledSampling, {}, 0.08),  # .032 – .034, as exponential and inverse_sigmoid
    (Dart, {}, 0.08),  # .034 – .048
    (Dart, {"beta": Beta(0, 1, 0)}, 0.08),  # .033 – .035
    (SafeDagger, {"gate": 0.25}, 0.1),  # .043 – .056, for 44 % of DAgger's forwards
    (SafeDagger, {"gate": 0.25, "query_budget": 30000}, 0.1),  # .047 – .060, for 14 %
    (Aggrevate, {}, 0.12),  # .083 – .084; the floor: two draws of 1000 by the teacher are .055 – .110 apart
    (Gail, ADVERSARIAL, 0.15),  # .086 – .092; .061 – .079 at a batch of 256
]


@pytest.mark.parametrize(("agent", "changed", "within"), TOYS)
def test_a_4_step_student_comes_near_the_32_step_teacher(agent: type[Learner], changed: dict[str, Any], within: float) -> None:
    learner = make(agent, **{**FAST, **changed})
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    teacher = unroll(ExpertPolicy(learner.expert, 8), learner.grid, x_T)[:, -1]

    def distance(policy: DdimPolicy, kernel: Kernel) -> float:
        samples = unroll(policy, learner.grid, x_T, kernel=kernel, generator=torch.Generator().manual_seed(1))[:, -1]
        return sliced_wasserstein(samples, teacher)

    assert distance(ExpertPolicy(learner.expert, 1), "ddim") > 0.2  # the teacher's own 4 steps
    assert distance(learner.student_policy, learner.kernel) > 0.3  # untrained
    learn(learner)
    assert distance(learner.student_policy, learner.kernel) < within


# Imagine Flash


class NoData(GaussianMixtureExpert):
    def sample_data(self, n: int, generator: torch.Generator | None = None) -> Any:
        raise NoDataError("none")


def test_imagine_flash_trains_on_the_students_states_alone_and_without_data() -> None:
    parser, cfg = parse(Dagger, ["--env", "gaussian_mixture", "--config", "imagine_flash"])
    _, config = expert_and_config(Dagger, parser, cfg)
    assert config.beta(0) == config.beta(1) == (0, 0, 1)
    assert (config.num_steps, config.substeps) == (3, 10)
    learner = learn(make(Dagger, NoData(CORNERS, 0.25), beta=config.beta))
    assert learner.buffer.counts == {"forward": 0, "teacher": 0, "student": 64}


# Scheduled sampling


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("constant", [0.05, 0.05, 0.05]),
        ("linear", [1, 0.5, 0.05]),
        ("exponential", [1, math.exp(-5), 0.05]),
        ("inverse_sigmoid", [math.exp(5) / (math.exp(5) + 1), 0.5, 0.05]),
    ],
)
def test_the_experts_share_of_the_steps_falls_to_its_floor(mixing: str, expected: list[float]) -> None:
    learner = make(ScheduledSampling, mixing=mixing, p_expert=0.05, num_updates=100)
    shares = []
    for step in (0, 50, 100):
        learner.step = step
        shares.append(learner.p_expert())
    assert shares == pytest.approx([max(p, 0.05) for p in expected])


def test_the_inverse_sigmoid_is_bengios() -> None:
    rate = 6.0
    k = math.exp(rate / 2)
    length = k * rate  # of the run in Bengio's iterations i, ε_i = k/(k + e^(i/k))
    learner = make(ScheduledSampling, mixing="inverse_sigmoid", mixing_rate=rate, num_updates=12)
    for step in range(13):
        learner.step = step
        i = length * step / 12
        assert learner.p_expert() == pytest.approx(k / (k + math.exp(i / k)))


def test_rollouts_begin_as_the_experts_and_end_as_the_students() -> None:
    learner = make(ScheduledSampling, num_updates=10, collect_size=400)
    shares = []
    for step in range(11):
        learner.step = step
        states = learner.fresh_states()
        steps = int((learner.grid.times > states["t"][:, None]).sum())
        assert steps == 400 * (N - 1) / 2
        shares.append(int(states["actors"].sum()) / steps)
    assert shares[0] == 1
    assert shares[-1] == 0
    for i, share in enumerate(shares):
        p = 1 - i / 10
        assert abs(share - p) <= 4 * (p * (1 - p) / 600) ** 0.5


@pytest.mark.parametrize("p_expert", [0.0, 0.3, 1.0])
def test_scheduled_sampling_at_a_constant_share_is_dagger(p_expert: float) -> None:
    scheduled, plain = (learn(make(agent, p_expert=p_expert, beta=MIXTURE, **own)) for agent, own in (
        (ScheduledSampling, {"mixing": "constant"}), (Dagger, {}),
    ))  # fmt: skip
    assert torch.equal(weights(scheduled.student), weights(plain.student))
    assert same(scheduled.buffer.state_dict(), plain.buffer.state_dict())


# DART


@pytest.mark.parametrize("beta", [Beta(), Beta(0.5, 0.5, 0)])
def test_dart_without_noise_is_behaviour_cloning(beta: Beta) -> None:
    disturbed, plain = learn(make(Dart, perturbation=0.0, beta=beta)), learn(make(BehaviourCloning, beta=beta))
    assert torch.equal(weights(disturbed.student), weights(plain.student))
    assert torch.equal(weights(disturbed.average), weights(plain.average))
    assert not torch.equal(weights(learn(make(Dart, beta=beta)).student), weights(plain.student))


@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("expert", [corners(), labelled(), GaussianMixtureExpert(CORNERS, 0.25, schedule="flow")])
def test_darts_forward_states_are_ning_et_als_and_its_labels_the_experts_there(expert: GaussianMixtureExpert, gamma: float) -> None:
    learner = make(Dart, expert, perturbation=gamma)
    x_t, t, s, c, _, x_s = fields(learner.collector.collect(30, only(0), 0))
    x_0, _ = expert.sample_data(30, stream("data"))
    eps, xi = torch.randn(30, 2, generator=stream("noise")), torch.randn(30, 2, generator=stream("disturbance"))
    alpha, sigma = expert.schedule(t, x_0)
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * (eps + gamma * xi))  # y = √ᾱ x_0 + √(1 − ᾱ) (ε + γ ξ)
    torch.testing.assert_close(x_s, ExpertPolicy(expert, K).act(x_t, t, s, c))


def test_darts_teacher_disturbs_what_it_does_and_labels_what_it_would_have_done() -> None:
    learner = make(Dart, perturbation=0.3, beta=Beta(0, 1, 0), states_per_rollout="all")
    states = learner.collector.collect(5 * N, only(1), 0)
    x, x_s, t = (states[key].unflatten(0, (5, N)) for key in ("x_t", "x_s", "t"))
    draws = stream("disturbance")
    for i in range(N - 1):
        _, sigma = learner.expert.schedule(t[:, i + 1], x[:, 0])
        torch.testing.assert_close(x[:, i + 1], x_s[:, i] + sigma * 0.3 * torch.randn(5, 2, generator=draws))
    torch.testing.assert_close(x_s.flatten(0, 1), ExpertPolicy(learner.expert, K).act(*fields(states)[:3]))
    assert torch.equal(x[:, 0], torch.randn(5, 2, generator=stream("rollout")))


def test_a_state_of_darts_teacher_is_where_its_disturbed_rollout_stops() -> None:
    learner = make(Dart, perturbation=0.3, beta=Beta(0, 1, 0))
    states = learner.collector.collect(2 * N, only(1), 0)
    rollouts, draws, times = stream("rollout"), stream("disturbance"), learner.grid.times
    x = torch.randn(2 * N, 2, generator=rollouts)
    for i in range(N - 1):  # two rollouts stop at each time
        on = 2 * (N - 1 - i)
        t, u = times[i].expand(on), times[i + 1].expand(on)
        _, sigma = learner.expert.schedule(u, x[:on])
        x[:on] = ExpertPolicy(learner.expert, K).act(x[:on], t, u) + sigma * 0.3 * torch.randn(on, 2, generator=draws)
    order = torch.rand(2 * N, generator=rollouts).argsort()
    torch.testing.assert_close(states["x_t"], x[order])
    assert torch.equal(states["t"], times[:-1].flip(0).repeat_interleave(2)[order])
    torch.testing.assert_close(states["x_s"], ExpertPolicy(learner.expert, K).act(*fields(states)[:3]))


def test_dart_sees_no_student_states() -> None:
    with pytest.raises(ValueError, match=r"beta.student=0.4: behaviour cloning sees no student states"):
        make(Dart, beta=MIXTURE)


# SafeDAgger


@pytest.mark.parametrize(
    "changed", [{"beta": MIXTURE}, {"beta": Beta(0, 0, 1), "p_expert": 0.3}, {"beta": Beta(0.3, 0, 0.7, schedule="linear")}]
)
def test_an_open_gate_without_a_budget_is_dagger(changed: dict[str, Any]) -> None:
    gated, plain = learn(make(SafeDagger, gate=1.0, **changed)), learn(make(Dagger, **changed))
    assert torch.equal(weights(gated.student), weights(plain.student))
    assert same(gated.buffer.state_dict(), plain.buffer.state_dict())
    assert (gated.teacher_nfe, gated.student_nfe) == (plain.teacher_nfe, plain.student_nfe)


@pytest.mark.parametrize("make_expert", [corners, labelled])
@pytest.mark.parametrize("source", [0, 2])
@pytest.mark.parametrize("glance", [1, 3])
def test_the_gate_opens_where_a_glance_finds_most(make_expert: Callable[[], GaussianMixtureExpert], source: int, glance: int) -> None:
    gated = make(SafeDagger, expert := make_expert(), gate=0.25, glance_substeps=glance, teacher_steps=16)
    everywhere = make(Dagger, make_expert(), teacher_steps=16).collector.collect(48, only(source), 0)
    x_t, t, s, c, *_ = fields(everywhere)
    own = gated.collector.student_policy.act(x_t, t, s, c)
    d = (own - ExpertPolicy(make_expert(), glance).act(x_t, t, s, c)).square().mean(1)
    relative = torch.stack([d[i] / d[t == t[i]].mean() for i in range(48)])
    most = sorted(relative.argsort(descending=True)[:12].tolist())
    states = gated.collector.collect(48, only(source), 0)
    for key in ("x_t", "t", "s", "x_s", "actors"):
        torch.testing.assert_close(states[key], everywhere[key][most], atol=1e-6, rtol=1e-5)
    pair = 1 if c is None else 2
    assert expert.nfe == pair * (48 * glance + 12 * 4)
    assert (states["nfe"] == pair * (glance + 4)).all()


def test_the_teachers_own_states_are_not_gated() -> None:
    gated, plain = make(SafeDagger, gate=0.1), make(Dagger)
    a, b = (learner.collector.collect(40, only(1), 0) for learner in (gated, plain))
    assert all(torch.equal(a[key], b[key]) for key in b.keys())  # noqa: SIM118
    assert gated.expert.nfe == int(a["nfe"].sum()) == 40 * K * (N + 1) / 2


@pytest.mark.parametrize(
    ("expert", "gate", "beta"),
    [(corners, 0.3, MIXTURE), (labelled, 0.3, Beta(0, 0, 1)), (corners, 1.0, Beta(0, 0, 1)), (labelled, 1.0, MIXTURE)],
)
def test_a_budget_is_spent_and_never_exceeded(expert: Callable[[], GaussianMixtureExpert], gate: float, beta: Beta) -> None:
    endless = learn(make(SafeDagger, expert(), gate=gate, beta=beta, num_updates=32))
    for share in (0.5, 1.0):
        budget = max(int(share * endless.teacher_nfe), 200)
        learner = learn(make(SafeDagger, expert(), gate=gate, beta=beta, num_updates=32, query_budget=budget))
        assert learner.step == 32
        assert learner.teacher_nfe == learner.expert.nfe <= budget
        collection = 32 * learner.expert_policy.nfe_per_action * 3 / 2
        assert learner.teacher_nfe > budget - collection
        if share == 1:
            assert torch.equal(weights(learner.student), weights(endless.student))


@pytest.mark.parametrize(
    "changed", [{"gate": 0.3}, {"gate": 1.0, "p_expert": 0.5}, {"gate": 0.3, "states_per_rollout": "all"}], ids=["gated", "mixed", "all"]
)
def test_the_price_of_a_collection_is_known_before_it_is_paid(changed: dict[str, Any]) -> None:
    learner = make(SafeDagger, labelled(), beta=MIXTURE, **changed)
    collector = learner.collector
    assert isinstance(collector, GatedCollector)
    told: list[int] = []
    price = collector.price
    collector.price = lambda counts: told.append(price(counts)) or told[-1]  # type: ignore[method-assign, func-returns-value]
    for _ in range(7):
        before = learner.expert.nfe
        learner.fresh_states()
        assert learner.expert.nfe - before == told[-1]


# Of 16, 3 and 12 states, by source; the teacher takes 4 steps to its 3, of the 0 to 9 that there can be.
@pytest.mark.parametrize(
    ("changed", "price"), [({"gate": 1.0}, 2 * (31 + 4)), ({"gate": 0.25, "beta": Beta(0, 0, 1)}, 32 + 16), ({}, 28 + 2 * (14 + 3 + 4))]
)
def test_a_budget_below_the_first_collection_is_refused(changed: dict[str, Any], price: int) -> None:
    told = f"query_budget={price - 1}: the first collection, of 32 states, takes {price} forwards of the teacher; raise it, or"
    with pytest.raises(ValueError, match=told):
        make(SafeDagger, query_budget=price - 1, **changed)
    assert learn(make(SafeDagger, query_budget=price, **changed)).teacher_nfe == price


def test_a_budget_holds_where_states_have_a_guidance_of_their_own() -> None:
    guided = {"guidance_range": (1.0, 4.0), "num_updates": 32}
    learner = learn(make(SafeDagger, labelled(), query_budget=300, **guided))
    assert 200 < learner.teacher_nfe == learner.expert.nfe <= 300
    completed = make(Aggrevate, labelled(), **guided)
    states = completed.collector.collect(40, only(2), 0)
    assert int(states["nfe"].sum()) == completed.expert.nfe > 0


def test_a_student_that_is_judged_asks_nothing() -> None:
    judged = SafeDaggerConfig(**settings(gate=0.3, query_budget=10)).to_judge()
    assert (judged.gate, judged.query_budget, judged.init) == (1.0, None, None)
    assert replace(judged, teacher_steps=judged.num_steps).substeps == 1  # as where stages end in steps that do not divide the teacher's


# AggreVaTe


@pytest.mark.parametrize("expert", [corners(), labelled()])
@pytest.mark.parametrize(("source", "states_per_rollout"), [(0, 1), (1, 1), (2, 1), (1, "all")])
def test_a_completion_is_where_the_teacher_ends(expert: GaussianMixtureExpert, source: int, states_per_rollout: Any) -> None:
    learner = make(Aggrevate, expert, beta=MIXTURE, states_per_rollout=states_per_rollout)
    before = expert.nfe
    states = learner.collector.collect(24, only(source), 0)
    spent, pair = expert.nfe - before, 1 if expert.guidance_scale == 1 else 2
    for state in states.split(1):
        x, t, _, c, _, end = fields(state)
        times = learner.grid.times[learner.grid.times <= t]
        for now, then in pairwise(times):
            x = ExpertPolicy(expert, K).act(x, now[None], then[None], c)
        torch.testing.assert_close(end, x, atol=1e-5, rtol=1e-5)
        own = 1 if states_per_rollout == "all" else N  # the teacher's own rollout ends there, and takes N steps in all
        assert state["nfe"] == (own if source == 1 else len(times) - 1) * K * pair
    assert not states["s"].any()
    assert spent == int(states["nfe"].sum())
    if source == 2:
        assert spent == 24 * K * pair * (N + 1) / 2


def test_aggrevates_loss_is_the_distance_to_the_completion() -> None:
    learner = make(Aggrevate, beta=MIXTURE)
    batch = learner.collect()
    x_hat = learner.student(batch["x_t"], batch["t"]).x_0
    expected = learner.weight(batch["t"]).float() * (x_hat - batch["x_s"]).square().mean(1)
    torch.testing.assert_close(learner.loss(batch), expected)


class EndOfTheOde(GaussianMixtureExpert):
    """N(0, std²): a denoiser that knows where the ODE ends, x̂_0 = (std/v_t) x_t."""

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, sigma = self.schedule(t, x_t.double())
        std = float(self.stds[0])
        return self.schedule.prediction(std / (alpha**2 * std**2 + sigma**2).sqrt() * x_t.double(), x_t.double(), t, "x_0")


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_a_student_that_names_the_end_samples_the_data_with_fresh_noise_and_not_by_ddim(std: float) -> None:
    expert = EndOfTheOde([[0.0] * 64], std)
    grid, generator = TimeGrid(expert.schedule, N), torch.Generator().manual_seed(0)
    x_T = torch.randn(2000, 64, generator=generator, dtype=torch.float64)
    anew, along = (unroll(ExpertPolicy(expert), grid, x_T, kernel=k, generator=generator) for k in ("renoise", "ddim"))  # type: ignore[arg-type]
    alpha, sigma = expert.schedule.coefficients(grid.times)
    true = (alpha**2 * std**2 + sigma**2).sqrt()
    torch.testing.assert_close(anew.std((0, 2)), true, rtol=0.02, atol=0)
    assert (along.std((0, 2)) / true)[1:-1].min() > 1.02  # wider: the chord leaves the ODE


def test_regressing_to_the_completion_of_ones_own_step_has_another_fixed_point() -> None:
    """The docstring's 1.9: g = (1/v_s) M(g) for N(0, 1), M(g) = (α_s − r α_t) g + r the gain of the student's own step."""
    schedule = NoiseSchedule()
    times = TimeGrid(schedule, N).times
    alpha, sigma = schedule.coefficients(times)
    width = torch.ones((), dtype=torch.float64)
    for i in range(N - 1):
        r = sigma[i + 1] / sigma[i]
        k = alpha[i + 1] - r * alpha[i]
        g = torch.zeros((), dtype=torch.float64)
        for _ in range(2000):  # v_s = 1 for unit variance
            g = k * g + r
        width = width * (k * g + r)
    assert float(width) == pytest.approx(1.9, abs=0.01)


def test_aggrevate_refuses_mixed_rollouts() -> None:
    with pytest.raises(ValueError, match=r"p_expert=0.5: .*AggreVaTe has no mixed rollouts; use 0"):
        AggrevateConfig(p_expert=0.5)


# GAIL


def played(**changed: Any) -> tuple[Any, TensorDict]:
    """A learner, and a batch whose student actions are known."""
    learner = make(Gail, labelled(), **changed)
    learner.collect()
    batch = learner.draw()
    return learner, batch


def test_gails_losses_are_softplus_of_what_the_discriminator_says() -> None:
    learner, batch = played(gradient_penalty=2.0)
    network = learner.trainables["discriminator"].bare
    loss = learner.loss(batch)
    x_t, t, s, c, _, x_s = fields(batch)
    alpha, sigma = (a[:, None].float() for a in learner.expert.schedule.coefficients(t))
    weight = (alpha / sigma).clamp(min=1)
    own = weight * learner.student(x_t, t, c).x_0.detach()
    torch.testing.assert_close(loss, softplus(-network(x_t, t, own, c)))
    expert = weight * invert_ddim(learner.expert.schedule, x_t, t, x_s, s).x_0
    of_discriminator = learner.discriminator_loss(batch)
    for i in range(len(batch)):
        row = slice(i, i + 1)
        a = expert[row].clone().requires_grad_()
        real = network(x_t[row], t[row], a, c[row])
        (slope,) = torch.autograd.grad(real, a)
        fake = network(x_t[row], t[row], own[row], c[row])
        expected = softplus(-real) + softplus(fake) + 2.0 * 2 / 2 * slope.square().sum()  # γ d/2 ‖∂D/∂a*‖²
        torch.testing.assert_close(of_discriminator[row], expected, atol=1e-5, rtol=1e-5)


def test_each_player_moves_only_itself_and_the_student_through_its_action() -> None:
    learner, batch = played()
    student, other = learner.trainables["student"].bare, learner.trainables["discriminator"].bare
    learner.loss(batch).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.network.layers.parameters())
    student.zero_grad(set_to_none=True)
    other.zero_grad(set_to_none=True)
    learner.discriminator_loss(batch).mean().backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in other.parameters())
    before = weights(other)
    learner.trainables["discriminator"].step = lambda: torch.zeros(())
    learner.update(batch)
    assert torch.equal(weights(other), before)


def test_unpaired_gail_asks_nothing_of_the_students_states() -> None:
    paired, unpaired = (make(Gail, paired=p, collect_size=64) for p in (True, False))
    led = 32 * (N - 1) // 2  # the teacher's steps to its own states
    for learner, price in ((paired, (64 + led) * K), (unpaired, (32 + led) * K)):
        states = learner.collect()
        assert learner.teacher_nfe == learner.expert.nfe == int(states["nfe"].sum()) == price
        asked = (states["source"] == 1) | (learner is paired)
        assert torch.equal(states["nfe"], K * (asked + states["actors"].sum(1)))
    batch = unpaired.draw()
    of_expert, of_student = unpaired.shares(batch)
    assert torch.equal(of_expert > 0, batch["source"] == 1)
    assert torch.equal(of_student > 0, batch["source"] == 2)
    assert (float(of_expert.mean()), float(of_student.mean())) == pytest.approx((1, 1))
    assert all(float(share.sum()) == 0 for share in (unpaired.shares(batch[batch["source"] == 1])[1],))


@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 8, 8), (2, 1, 4, 4)])
@pytest.mark.parametrize("n", [2, 5])
def test_the_discriminator_says_one_number_a_transition_of_any_shape(shape: tuple[int, ...], n: int) -> None:
    expert = GaussianMixtureExpert(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), 0.2, labels=[0, 1, 1])
    network = Discriminator(expert, 8)
    x, action = torch.randn(2, n, *shape, generator=torch.Generator().manual_seed(1))
    t, c = torch.linspace(1, 999, n), torch.arange(n) % 2
    together = network(x, t, action, c)
    assert together.shape == (n,)
    for i in range(n):
        row = slice(i, i + 1)
        torch.testing.assert_close(network(x[row], t[row], action[row], c[row]), together[row], atol=1e-5, rtol=1e-5)
    others = network(action, t, x, c), network(x, t - 1, action, c), network(x, t, action, 1 - c)
    assert all((other - together).abs().min() > 0 for other in others)


def test_gail_counts_its_discriminators_forwards() -> None:
    learner = learn(make(Gail, num_updates=4, collect_size=32, beta=Beta(0, 1, 0)))
    assert learner.student_nfe == 4 * 16 * (1 + 3)  # the student's, and D on a_θ twice, on a* once


def test_gails_accumulated_gradients_give_the_weights_of_the_whole_batch() -> None:
    whole, accumulated = (learn(make(Gail, gradient_accumulation=parts)) for parts in (1, 4))
    for name in ("student", "discriminator"):
        torch.testing.assert_close(weights(accumulated.trainables[name].bare), weights(whole.trainables[name].bare), atol=1e-4, rtol=0)


# Bad settings


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (ScheduledSamplingConfig, {"mixing": "cosine"}, "unknown mixing 'cosine'; choose one of: constant, linear, exponential, inverse_"),
        (ScheduledSamplingConfig, {"mixing_rate": 0.0}, "mixing_rate=0.0: need a positive number"),
        (ScheduledSamplingConfig, {"beta": Beta()}, "beta.student=0: .*give them a share"),
        (DartConfig, {"perturbation": -0.1}, "perturbation=-0.1: need a finite number ≥ 0"),
        (SafeDaggerConfig, {"gate": 0.0}, r"gate=0.0: need a fraction in \(0, 1\]"),
        (SafeDaggerConfig, {"gate": 1.5}, "gate=1.5"),
        (SafeDaggerConfig, {"p_expert": 0.2}, "p_expert=0.2 with gate=0.5: .*set p_expert to 0 or gate to 1"),
        (SafeDaggerConfig, {"glance_substeps": 2}, "glance_substeps=2: need at least 1 and fewer than the 2 of a label"),
        (SafeDaggerConfig, {"teacher_steps": 4}, "glance_substeps=1: need .* fewer than the 1 of a label"),
        (SafeDaggerConfig, {"beta": Beta(0, 1, 0)}, "gate=0.5: the teacher's own states are not gated"),
        (DartConfig, {"p_expert": 0.5}, "p_expert=0.5: the expert acts in student rollouts, and β has none"),
        (GailConfig, {"discriminator_learning_rate": 0.0}, "discriminator_learning_rate=0.0: need a positive"),
        (GailConfig, {"discriminator_width": 0}, "discriminator_width=0: need at least 1"),
        (GailConfig, {"gradient_penalty": -1.0}, "gradient_penalty=-1.0: need a finite number ≥ 0"),
        (GailConfig, {"paired": False, "beta": Beta(0, 0, 1)}, "paired=false .*give beta.student and beta.teacher a share each"),
        (GailConfig, {"paired": False, "p_expert": 0.5}, "p_expert=0.5 with paired=false"),
        (GailConfig, {"guidance_range": (1.0, 3.0)}, "guidance_range=.*the discriminator is not told w"),
        (GailConfig, {"prioritised": True}, "prioritised=true: GAIL's loss says"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(config: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings(**changed))


# Corrections at inference


def student_policy(expert: GaussianMixtureExpert, width: int = 16) -> StudentPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StudentPolicy(expert.make_student(width=width), expert)


def noise(n: int, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def at(policy: DdimPolicy, n: int, step: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A state of a 4-step denoising, in the middle."""
    times = TimeGrid(policy.schedule, N).times
    return noise(n, seed=1), times[step].expand(n), times[step + 1].expand(n)


@pytest.mark.parametrize("scale", [1.005, 0.9])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
def test_a_scaled_epsilon_moves_x_0_so_that_both_still_make_the_latent(scale: float, schedule: Any) -> None:
    expert = GaussianMixtureExpert(CORNERS, 0.25, schedule=schedule)
    scaled, plain = ScaledEpsilon(ExpertPolicy(expert), scale), ExpertPolicy(expert)
    x, t, s = at(plain, 7)
    pred = scaled.predict(x, t, None, None)
    torch.testing.assert_close(pred.eps, expert.predict(x, t).eps / scale)
    torch.testing.assert_close(pred.latent(t), x)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = expert.schedule(t, x), expert.schedule(s, x)
    expected = alpha_s / alpha_t * x + (sigma_s - alpha_s * sigma_t / alpha_t) * expert.predict(x, t).eps / scale  # x_s
    torch.testing.assert_close(scaled.act(x, t, s), expected)
    first = at(plain, 7, step=0)
    assert torch.equal(scaled.act(*first), plain.act(*first))
    assert ScaledEpsilon(ExpertPolicy(expert, 3), scale).nfe_per_action == 3


class Exaggerating(GaussianMixtureExpert):
    """A network that finds too much noise, by a factor, from its second step on."""

    factor = 1.05

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        pred = super().predict(x_t, t, c)
        off = broadcast((self.factor - 1) * (t < self.schedule.t_max), x_t) * pred.eps
        alpha, sigma = self.schedule(t, x_t)
        return Prediction(pred.x_0 - sigma / alpha * off, pred.eps + off, t, self.schedule)


def test_epsilon_scaling_mends_a_network_that_finds_too_much_noise() -> None:
    right, wrong = ExpertPolicy(corners()), ExpertPolicy(Exaggerating(CORNERS, 0.25, [1, 2, 3, 4]))
    grid = TimeGrid(right.schedule, 8)
    truth, off, mended = (unroll(p, grid, noise(50))[:, -1] for p in (right, wrong, ScaledEpsilon(wrong, 1.05)))
    torch.testing.assert_close(mended, truth, atol=1e-3, rtol=1e-3)
    assert (off - truth).abs().mean() > 0.03


@pytest.mark.parametrize("kernel", ["ddim", "renoise"])
def test_corrections_that_correct_nothing_change_nothing(kernel: Kernel) -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 3)
    c = torch.arange(20) % 2
    grid = TimeGrid(expert.schedule, N)

    def path(policy: DdimPolicy) -> Tensor:
        return unroll(policy, grid, noise(20), c, kernel=kernel, generator=torch.Generator().manual_seed(1))

    for policy in (ScaledEpsilon(student, 1), TimeShifted(student, 0, 0), TimeShifted(student, 100, 999), Mixed(teacher, student, 0)):
        assert torch.equal(path(policy), path(student))
    for policy in (ScaledEpsilon(teacher, 1), TimeShifted(teacher, 0, 0), Mixed(teacher, student, 1)):
        assert torch.equal(path(policy), path(teacher))


def noised(expert: GaussianMixtureExpert, t: Tensor) -> Tensor:
    """States of N(0, 0.5²) data at t (n,)."""
    x_0, eps = (noise(len(t), expert.sample_shape[0], seed) for seed in (1, 2))
    return expert.schedule.add_noise(0.5 * x_0, eps, t)


@pytest.mark.parametrize("wrong", [-40, -7, 0, 12, 40])
def test_the_time_shift_finds_the_time_whose_noise_a_state_holds(wrong: int) -> None:
    expert = gaussian(0.5, d=200_000)
    t = torch.full((4,), 300.0)
    x = noised(expert, t + wrong)
    policy = TimeShifted(ExpertPolicy(expert), 100, 200, data_variance=0.25)
    shifted = policy.shifted(x, t, t - 200)
    assert (shifted - (t + wrong)).abs().max() <= 5  # the variance of so many entries is known to 0.3 %, which is 1.3 steps
    assert torch.equal(shifted, shifted.round())


def test_the_time_shift_keeps_to_its_bounds() -> None:
    policy = ExpertPolicy(gaussian(0.5, d=100))
    t, first, x = torch.full((4,), 600.0), torch.full((4,), 999.0), noise(4, 100)
    assert torch.equal(TimeShifted(policy, 100, 600).shifted(0 * x, t, t - 300), t)  # the cutoff
    assert torch.equal(TimeShifted(policy, 7, 200).shifted(0 * x, t, t - 300), t - 3)  # the window
    assert torch.equal(TimeShifted(policy, 2000, 0).shifted(0 * x, t, t - 100), t - 99)  # later than s
    assert torch.equal(TimeShifted(policy, 2000, 0).shifted(9 * x, t, t - 100), first)  # within the chain
    assert torch.equal(TimeShifted(policy, 2000, 0).shifted(0 * x, first, t), first)  # pure noise


@pytest.mark.parametrize("wrong", [-60, 60])
def test_the_time_shift_mends_a_state_that_holds_too_much_noise_or_too_little(wrong: int) -> None:
    expert = gaussian(0.5, d=5000)
    t, s = torch.full((40,), 400.0), torch.full((40,), 200.0)
    x = noised(expert, t + wrong)
    plain = ExpertPolicy(expert, 50)
    alpha, sigma = expert.schedule.coefficients(s[:1])
    true = float((alpha**2 * 0.25 + sigma**2).sqrt())
    off = [abs(float(p.act(x, t, s).std()) / true - 1) for p in (plain, TimeShifted(plain, 200, 0, data_variance=0.25))]
    assert off[0] > 0.04
    assert off[1] < 0.01


def test_a_shifted_step_is_the_policys_own_from_the_other_time() -> None:
    expert = gaussian(0.5, d=500)
    t, s = torch.full((3,), 600.0), torch.full((3,), 300.0)
    x, fresh = 1.1 * noise(3, 500, seed=1), noise(3, 500, seed=2)
    inner = ExpertPolicy(expert, 2)
    policy = TimeShifted(inner, 200, 100)
    other = policy.shifted(x, t, s)
    assert (other > t).all()
    assert torch.equal(policy.act(x, t, s), inner.act(x, other, s))
    assert torch.equal(policy.jump(x, t, s, fresh), inner.jump(x, other, s, fresh))


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_in_turns_each_sample_is_acted_on_by_one_of_the_two(p: float) -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 3)
    x, t, s = at(teacher, 400)
    c = torch.arange(400) % 2
    theirs, own = teacher.act(x, t, s, c), student.act(x, t, s, c)
    expert.nfe = student.student.nfe = 0
    mixed = Mixed(teacher, student, p, seed=3)
    taken = mixed.act(x, t, s, c)
    by_teacher = torch.rand(400, generator=torch.Generator().manual_seed(3)) < p
    torch.testing.assert_close(taken, torch.where(by_teacher[:, None], theirs, own))
    assert expert.nfe == 6 * int(by_teacher.sum())
    assert student.student.nfe == int((~by_teacher).sum())
    assert mixed.nfe_per_action == pytest.approx(6 * p + 1 - p)
    assert not torch.equal(mixed.act(x, t, s, c), taken)  # the draws go on
    assert torch.equal(Mixed(teacher, student, p, seed=3).act(x, t, s, c), taken)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_recorded_denoising_says_who_acted_in_each_step(shifted: bool, tmp_path: Path) -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 3)
    grid, c = TimeGrid(expert.schedule, N), torch.arange(20) % 2
    mixed = Mixed(teacher, student, 0.5, seed=3)
    policy = TimeShifted(mixed, 0, 0) if shifted else mixed
    taken = record(policy, teacher, grid, noise(20), c)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([torch.rand(20, generator=generator) < 0.5 for _ in range(N)], 1)
    assert torch.equal(taken.by_expert, drawn)
    torch.testing.assert_close(taken.error[taken.by_expert], torch.zeros(int(drawn.sum())))
    assert (taken.error[~taken.by_expert] > 0).all()
    assert not record(student, teacher, grid, noise(20), c).by_expert.any()
    assert record(ScaledEpsilon(teacher, 1.01), teacher, grid, noise(20), c).by_expert.all()
    taken.save(tmp_path / "taken.safetensors")
    assert torch.equal(Trajectories.load(tmp_path / "taken.safetensors").by_expert, taken.by_expert)


def test_the_judge_and_the_environment_take_a_corrected_policy() -> None:
    expert = labelled()
    student, teacher = student_policy(expert), ExpertPolicy(expert, 4)
    judge = Judge(teacher, TimeGrid(expert.schedule, N), Evaluation(n=40, n_action=10))
    plain = judge.judge(student)
    for policy, nfe in (
        (ScaledEpsilon(student, 1.01), 4),
        (TimeShifted(ScaledEpsilon(student, 1.01), 60, 100), 4),
        (Mixed(teacher, TimeShifted(student, 60, 100), 0.5), 18),
    ):
        for kernel in ("ddim", "renoise"):
            result = judge.judge(policy, kernel=kernel)  # type: ignore[arg-type]
            assert result.keys() == plain.keys()
            assert result["nfe_per_sample"] == nfe
            assert result["frechet"] > 0
        path = DenoisingEnv(expert, num_steps=N, batch_size=[6]).rollout(N, policy)
        assert path["next", "x_t"].shape == (6, N, 2)
    assert judge.judge(Mixed(teacher, student, 0.8))["endpoint_rmse"] < plain["endpoint_rmse"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: ScaledEpsilon(p, 0.0), "scale=0.0: .*need a positive number near 1"),
        (lambda p: ScaledEpsilon(TimeShifted(p, 4, 0), 1.1), "a TimeShifted is made of other policies; scale those"),
        (lambda p: TimeShifted(p, -1, 0), "window=-1: need a number ≥ 0"),
        (lambda p: TimeShifted(p, 4, math.nan), "cutoff=nan"),
        (lambda p: Mixed(p, p, 1.2), r"p=1.2: need a probability in \[0, 1\]"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(build: Callable[[DdimPolicy], DdimPolicy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ExpertPolicy(corners()))


# The command lines

SMALL = shlex.split(
    "--num_updates 6 --teacher_steps 8 --batch_size 16 --collect_size 40 --updates_per_collect 3 --log_every 3 --checkpoint_every 5 "
    "--student '{width: 16}' --evaluate.n 20 --evaluate.n_action 5"
)
ENV = """\
expert: ddil_env.GaussianMixtureExpert
means: [[-0.8, 0.0, 0.3], [0.8, 0.2, 0.0], [0.0, -0.7, 0.5]]
stds: 0.2
labels: [0, 1, 1]
"""  # no picture to draw
COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str], int]] = {  # and the forwards of the teacher: 2 collections
    "scheduled_sampling": (
        scheduled_sampling_module.main,
        ["--mixing", "exponential"],
        (40 + 60 + 40 + 1) * 2,
    ),  # which takes all steps, then one of 60
    "dart": (dart_module.main, ["--perturbation", ".2"], 2 * 40 * 2),
    "safe_dagger": (
        safe_dagger_module.main,
        ["--gate", ".25", "--query_budget", "150", "--beta.forward", "0", "--beta.teacher", "0"],
        2 * (40 + 20),
    ),
    "aggrevate": (aggrevate_module.main, [], 2 * 40 * 5),
    "gail": (gail_module.main, ["--discriminator_width", "8"], 2 * (40 + 30) * 2),  # 30 steps to its own 20 states
}


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in an empty directory, and say nothing."""
    monkeypatch.chdir(tmp_path)
    Path("env.yaml").write_text(ENV)
    with contextlib.redirect_stdout(None), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_the_command_says_what_it_measured(name: str) -> None:
    main, argv, teacher_nfe = COMMANDS[name]
    main(["--env", "env.yaml", *SMALL, *argv, "--out", "run"])
    result = json.loads(Path("run/result.json").read_text())
    assert (result["agent"], result["student"], result["num_updates"]) == (name, f"{name}@4", 6)
    assert result["teacher_nfe"] == teacher_nfe
    own = result["models"][f"{name}@4"]
    assert own["nfe_per_sample"] == 4
    assert all(math.isfinite(own[key]) and own[key] > 0 for key in ("frechet", "frechet_to_expert"))
    saved = load_file("run/student/student.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    learner = load_run(Path("run"))
    assert learner.name == name
    assert all(torch.equal(value, saved[key]) for key, value in learner.average.state_dict().items())
    main(["--resume", "run"])
    assert json.loads(Path("run/result.json").read_text())["models"][f"{name}@4"]["frechet"] == own["frechet"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_method_is_and_what_its_settings_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, argv, _ = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        main(["--env", "gaussian_mixture", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"\w+ et al\. \d{4}|\(?\w+ & \w+ \d{4}", text)
    assert f"python -m ddil_agents.{name} --env digits" in text
    for flag in argv[::2]:
        assert re.search(rf"^  {re.escape(flag)} .*\n(?: +.*\n)*? *.*\w+", text, re.MULTILINE), flag
