"""Facts about latent consistency distillation: its function, its solver, its states, its target, and what it learns."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from helpers import CORNERS, corners, labelled, only, weights
from tensordict import TensorDict
from torch import Tensor, nn

from ddil_agents import LCM, Beta, LCMConfig, SourceBuffer
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.lcm import ConsistencyDenoiser, LCMCollector
from ddil_agents.states.batch import Batch
from ddil_agents.states.collect import STREAMS, stream_seed
from ddil_agents.training.metrics import clipped_shares
from ddil_env import ExpertPolicy, GaussianMixtureExpert, NetworkDenoiser, NoiseSchedule, TimeGrid, unroll
from ddil_env.prediction import PredictionType
from ddil_env.support import Thresholding

pytestmark = pytest.mark.usefixtures("own_generator")

SOLVER = [*range(999, 0, -20), 0]  # 999, 979, …, 19 and the end


def agent(expert: GaussianMixtureExpert | None = None, **changed: Any) -> LCM:
    """A run of a tenth of a second."""
    small = {"num_updates": 12, "batch_size": 16, "collect_size": 32, "updates_per_collect": 4, "capacity": 64, "warmup_updates": 3}
    return LCM(expert or corners(), LCMConfig(**{**small, "student": {"width": 16, "depth": 2}, **changed}))


def collector(learner: LCM) -> LCMCollector:
    assert isinstance(learner.collector, LCMCollector)
    return learner.collector


def latents(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


# The consistency function


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(vp, kind) for vp in ("scaled_linear", "linear", "cosine") for kind in ("eps", "v", "x_0")] + [("flow", "flow"), ("flow", "x_0")],
)
def test_at_time_0_it_is_the_identity(schedule: Any, kind: PredictionType) -> None:
    student = agent(corners(schedule=schedule), student={"width": 8, "prediction_type": kind}).student
    x = latents(5)
    assert torch.equal(student(x, torch.zeros(5)).x_0, x)
    assert not torch.allclose(student(x, torch.ones(5)).x_0, x, atol=1e-4)


class Constant(nn.Module):
    """An x̂_0 of 3 everywhere."""

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        return torch.full_like(x_t, 3.0)


@pytest.mark.parametrize(
    ("t", "c_skip", "c_out"),
    [(1, 0.25 / 100.25, 10 / 100.25**0.5), (19, 0.25 / 36100.25, 190 / 36100.25**0.5), (999, 0.25 / 99800100.25, 9990 / 99800100.25**0.5)],
)
def test_the_coefficients_at_some_times(t: int, c_skip: float, c_out: float) -> None:
    student = ConsistencyDenoiser(Constant(), NoiseSchedule(), "x_0")
    for x, own in ((torch.zeros(1, 2), 0.0), (torch.full((1, 2), 1000.0), 1000 * c_skip)):
        f = student(x.double(), torch.tensor([float(t)])).x_0
        torch.testing.assert_close(f, torch.full_like(f, own + 3 * c_out), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
def test_the_noise_goes_with_the_clean_sample(kind: PredictionType) -> None:
    student = agent(student={"width": 8, "prediction_type": kind}).student.double()
    x, t = latents(3).double(), torch.tensor([1.0, 19.0, 999.0])
    torch.testing.assert_close(student(x, t.double()).latent(t), x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x_0", "sample")])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_student_samples_as_diffusers_scheduler_does(kind: PredictionType, theirs: str, n: int) -> None:
    learner = agent(student={"width": 8, "prediction_type": kind})
    scheduler = LCMScheduler(prediction_type=theirs)
    scheduler.set_timesteps(n)
    x_T = latents(6)
    path = unroll(
        learner.student_policy,
        TimeGrid(learner.expert.schedule, n, "lcm"),
        x_T,
        kernel="renoise",
        generator=torch.Generator().manual_seed(3),
    )
    generator, x = torch.Generator().manual_seed(3), x_T
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = learner.ema_student.network(x, t.float().expand(6), None)
            denoised = learner.ema_student(x, t.float().expand(6)).x_0
        step = scheduler.step(output, t, x, generator=generator)
        torch.testing.assert_close(denoised, step.denoised, atol=1e-4, rtol=1e-4)
        x = step.prev_sample
        torch.testing.assert_close(path[:, i + 1], x, atol=1e-3, rtol=1e-3)


# The solver, and the times


def test_the_solvers_times_are_20_apart_and_end_at_0() -> None:
    learner = agent(beta=Beta(1, 1, 0), collect_size=4000, capacity=4000)
    assert collector(learner).grid.times.tolist() == SOLVER
    states = learner.trainer.collect()
    assert torch.equal(states["s"], (states["t"] - 20).clamp(min=0))
    for source in (0, 1):
        assert states["t"][states["source"] == source].unique().tolist() == SOLVER[-2::-1]
    counts = torch.stack([(states["t"][states["source"] == 0] == t).sum() for t in SOLVER[:-1]])  # 2000 states, 40 a time
    assert (counts - 40).abs().max() < 5 * 40**0.5


def test_other_solvers_are_to_be_had() -> None:
    assert collector(agent(solver_steps=10, grid="trailing")).grid.times.tolist() == [*range(999, 0, -100), 0]


@pytest.mark.parametrize("n", range(1, 51))
def test_the_inference_times_are_diffusers(n: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(n)
    assert TimeGrid(NoiseSchedule(), n, "lcm").times.tolist() == [*scheduler.timesteps.tolist(), 0]


def test_it_is_judged_at_the_times_of_inference() -> None:
    assert agent().grid.times.tolist() == [999, 759, 499, 259, 0]


@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_label_is_one_step_of_the_teacher_that_ends_at_level_alpha_0(source: int) -> None:
    learner = agent(collect_size=400)
    states = collector(learner).collect(400, only(source), 0)
    alpha, sigma = (a[:, None] for a in learner.expert.schedule.coefficients(states["s"]))
    alpha_0, sigma_0 = (float(a) for a in NoiseSchedule(set_alpha_to_one=False).coefficients(torch.zeros(1)))
    assert alpha_0 == pytest.approx((1 - 0.00085) ** 0.5)
    last = (states["s"] == 0)[:, None]
    pred = learner.expert.predict(states["x_t"], states["t"])
    expected = torch.where(last, alpha_0, alpha) * pred.x_0 + torch.where(last, sigma_0, sigma) * pred.eps
    torch.testing.assert_close(states["x_s"].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(states["nfe"], 1 + states["actors"].sum(1))  # a forward for the label, and one a step of the teacher's to it
    assert source == 1 or not states["actors"].any()
    if source < 2:  # a student meets t = 19 in no few-step rollout
        assert (states["x_s"] - pred.x_0)[last[:, 0]].abs().max() > 0.01


def test_teacher_states_are_the_solvers_whole_trajectory() -> None:
    learner = agent(collect_size=150, states_per_rollout="all")
    states = collector(learner).collect(150, only(1), 0)
    x, t, x_s = (states[key].unflatten(0, (3, 50)) for key in ("x_t", "t", "x_s"))
    assert (t == torch.tensor(SOLVER[:-1])).all()
    assert torch.equal(x_s[:, :-1], x[:, 1:])
    path = unroll(learner.expert_policy, collector(learner).grid, x[:, 0])
    assert torch.equal(x, path[:, :-1])
    assert torch.equal(x_s[:, -1], path[:, -1])  # at level ᾱ_0
    actors = states["actors"].unflatten(0, (3, 50))
    assert torch.equal(actors, torch.ones(50, 50, dtype=torch.bool).tril(-1).expand(3, 50, 50))


INFERENCE = {2: [999, 499], 3: [999, 679, 339], 4: [999, 759, 499, 259], 5: [999, 799, 599, 399, 199]}


@pytest.mark.parametrize("steps", [(3, 4, 5), (2, 4)])
def test_a_student_rollout_takes_one_of_the_numbers_of_inference_steps(steps: tuple[int, ...]) -> None:
    learner = agent(inference_steps=steps, beta=Beta(0, 0, 1))
    taken = []
    for _ in range(60):
        states = collector(learner).collect(12, only(2), 0)
        times, counts = states["t"].unique(return_counts=True)
        n = len(times)
        assert times.tolist() == INFERENCE[n][::-1]
        assert counts.sum() == 12
        assert counts.max() - counts.min() <= 1
        assert not states["actors"].any()
        taken.append(n)
    assert {n: taken.count(n) >= 60 / len(steps) / 2 for n in taken} == dict.fromkeys(steps, True)


@pytest.mark.parametrize("n", [3, 5])
def test_student_states_are_noised_anew_from_the_consistency_function(n: int) -> None:
    learner = agent(inference_steps=(n,), states_per_rollout="all")
    states = collector(learner).collect(4 * n, only(2), 0)
    x, t = (states[key].unflatten(0, (4, n)) for key in ("x_t", "t"))
    stream = torch.Generator().manual_seed(stream_seed(0, "rollout"))
    torch.randint(1, (1,), generator=stream)  # the number of steps
    assert torch.equal(x[:, 0], torch.randn(4, 2, generator=stream))
    for i in range(n - 1):
        with torch.no_grad():
            f = learner.student(x[:, i], t[:, i]).x_0
        expected = learner.expert.schedule.add_noise(f, torch.randn(4, 2, generator=stream), t[:, i + 1])
        torch.testing.assert_close(x[:, i + 1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [3, 5])
def test_a_state_of_a_student_is_where_its_noised_rollout_stops(n: int) -> None:
    learner = agent(inference_steps=(n,))
    states = collector(learner).collect(7, only(2), 0)
    nfe = learner.student_nfe, learner.expert.nfe
    stream, path = (torch.Generator().manual_seed(stream_seed(0, name)) for name in ("rollout", "path"))
    torch.randint(1, (1,), generator=stream)  # the number of steps
    x = torch.randn(7, 2, generator=stream)
    torch.rand(7, n, generator=path)  # the actors
    v = float(torch.rand(1, generator=path, dtype=torch.float64))
    stops = [int((i + v) * n / 7) for i in reversed(range(7))]
    for i, (t, u) in enumerate(pairwise(INFERENCE[n])):
        on = sum(j > i for j in stops)  # the first of them
        with torch.no_grad():
            f = learner.student(x[:on], torch.full((on,), float(t))).x_0
        x[:on] = learner.expert.schedule.add_noise(f, torch.randn(on, 2, generator=stream), torch.full((on,), float(u)))
    order = torch.rand(7, generator=stream).argsort()
    torch.testing.assert_close(states["x_t"], x[order], atol=1e-4, rtol=1e-4)
    assert torch.equal(states["t"], torch.tensor([float(INFERENCE[n][j]) for j in stops])[order])
    assert nfe == (sum(stops), 7)


# β = (1, 0, 0) is vanilla LCM


def vanilla(expert: GaussianMixtureExpert, config: LCMConfig) -> tuple[nn.Module, nn.Module]:
    """Luo et al. 2023, Alg. 1, in plain lines: a v-predicting student and its average, after config.num_updates."""
    data, noise, time = (torch.Generator().manual_seed(stream_seed(config.seed, name)) for name in ("data", "noise", "time"))
    torch.manual_seed(stream_seed(config.seed, "weights"))
    network = expert.make_student(**config.student).network
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), betas=config.adam_betas, weight_decay=config.weight_decay, fused=True)
    buffer = SourceBuffer([config.capacity or 0, 1, 1], seed=stream_seed(config.seed, "source"))
    alpha, sigma = (a.float()[:, None] for a in expert.schedule.coefficients(torch.arange(1000)))
    end = [a.float().item() for a in NoiseSchedule(set_alpha_to_one=False).coefficients(torch.tensor(0))]

    def f(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        s = 10 * t.double()[:, None]
        x_0 = alpha[t.long()] * x - sigma[t.long()] * net(x, t, None)
        return (0.25 / (s**2 + 0.25)).float() * x + (s / (s**2 + 0.25).sqrt()).float() * x_0

    for step in range(config.num_updates):
        if step % config.updates_per_collect == 0:
            x_0, _ = expert.sample_data(n := config.collect_size, data)
            eps = torch.randn(x_0.shape, generator=noise)
            t = 999.0 - 20 * torch.randint(50, (n,), generator=time)
            s = (t - 20).clamp(min=0)
            pred = expert.predict(x_t := alpha[t.long()] * x_0 + sigma[t.long()] * eps, t)
            at = [torch.where(s[:, None] == 0, last, table[s.long()]) for last, table in zip(end, (alpha, sigma), strict=True)]
            states = {"x_t": x_t, "t": t, "s": s, "x_s": at[0] * pred.x_0 + at[1] * pred.eps}
            buffer.extend(TensorDict({**states, "source": torch.zeros(n, dtype=torch.uint8)}, batch_size=[n]))
        batch = buffer.sample(config.batch_size, (1, 0, 0))
        with torch.no_grad():
            target = f(average, batch["x_s"], batch["s"])
        squared = (f(network, batch["x_t"], batch["t"]) - target).square()
        (squared / ((squared + config.huber_h**2).sqrt() + config.huber_h)).mean(1).mean().backward()  # √(e² + h²) − h
        nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        rising, falling = (step + 1) / (config.warmup_updates + 1), (config.num_updates - step) / config.num_updates
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(rising, falling)
        optimizer.step()
        optimizer.zero_grad()
        for mean, p in zip(average.parameters(), network.parameters(), strict=True):
            mean.data.lerp_(p.data, 1 - config.ema if step else 1.0)  # the average begins at the first step's weights
    return network, average


def test_the_target_is_computed_in_the_students_precision() -> None:
    learner = agent(mixed_precision="bf16", num_updates=1)
    seen = []
    for denoiser in (learner.student, learner.ema_student):
        last = [layer for layer in denoiser.modules() if isinstance(layer, nn.Linear)][-1]
        last.register_forward_hook(lambda layer, given, output: seen.append(output.dtype))
    learner.trainer.collect()
    learner.trainer.update(learner.draw())
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("seed", [0, 1])
def test_forward_states_alone_are_vanilla_lcm_bit_for_bit(seed: int) -> None:
    learner = agent(num_updates=30, warmup_updates=7, learning_rate=1e-2, weight_decay=0.01, seed=seed)
    start = weights(learner.student)
    network, average = vanilla(corners(), learner.config)
    learner.learn(progress=False)
    assert torch.equal(weights(learner.student), weights(network))
    assert torch.equal(weights(learner.ema_student), weights(average))
    assert not torch.allclose(weights(learner.student), start, atol=1e-2)


def test_vanilla_lcm_spends_nothing_on_rollouts() -> None:
    learner = agent(num_updates=30).learn(progress=False)
    assert learner.student_nfe == 2 * 30 * 16  # the student's and the target's
    assert learner.teacher_nfe == learner.expert.nfe == 8 * 32  # 8 collections
    assert learner.buffer.counts == {"forward": 64, "teacher": 0, "student": 0}
    fresh = {name: torch.Generator().manual_seed(stream_seed(0, name)) for name in STREAMS}
    now = {name: stream.get_state() for name, stream in collector(learner).streams.items()}
    assert {name for name in STREAMS if not torch.equal(now[name], fresh[name].get_state())} == {"data", "noise", "time"}


def test_student_states_change_what_is_learned() -> None:
    one, other = (agent(beta=beta).learn(progress=False) for beta in (Beta(1, 0, 0), Beta(0.5, 0, 0.5)))
    assert not torch.allclose(weights(one.student), weights(other.student), atol=1e-3)
    assert other.buffer.counts["student"] > 0
    assert other.student_nfe > 2 * 12 * 16


# The target


def test_the_average_decays_by_95_per_cent_a_step() -> None:
    learner = agent(learning_rate=0.1, warmup_updates=0)
    assert LCMConfig().ema == 0.95
    for step in range(6):
        before = weights(learner.ema_student)
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
        if step:  # the first step's average is its student
            torch.testing.assert_close(weights(learner.ema_student), 0.95 * before + 0.05 * weights(learner.student), atol=1e-6, rtol=0)
            assert not torch.allclose(weights(learner.ema_student), weights(learner.student), atol=1e-3)


def shaken(learner: LCM) -> LCM:
    """The same learner, with a student that has left its average."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.student.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return learner


@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("n", [2, 16])  # as many states as the latent is wide, and more
def test_the_loss_is_the_distance_to_what_the_average_says_one_step_on(distance: Any, n: int) -> None:
    learner = shaken(agent(distance=distance, huber_h=0.01))
    batch = learner.trainer.collect()[:n]
    loss = learner.loss(Batch(batch))
    assert loss.shape == (n,)
    for i in range(n):
        state = batch[i : i + 1]
        error = learner.student(state["x_t"], state["t"]).x_0 - learner.ema_student(state["x_s"], state["s"]).x_0
        expected = error.square() if distance == "l2" else (error.square() + 1e-4).sqrt() - 0.01
        torch.testing.assert_close(loss[i], expected.mean(), atol=1e-6, rtol=1e-5)
    assert loss.mean() > 1e-3


def test_no_gradient_reaches_the_average() -> None:
    learner = shaken(agent())
    learner.loss(Batch(learner.trainer.collect())).mean().backward()
    assert all(p.grad is None for p in learner.ema_student.parameters())
    assert all(p.grad is not None for p in learner.student.parameters())
    assert not learner.ema_student.training


def test_a_thresholded_target_lies_in_the_box() -> None:
    learner = shaken(agent(distance="l2", thresholding=Thresholding(kind="static", bound=0.3, roles=("target",))))
    batch = learner.trainer.collect()
    with torch.no_grad():
        x_0, target = learner.student(batch["x_t"], batch["t"]).x_0, learner.ema_student(batch["x_s"], batch["s"]).x_0
    assert (target.abs() > 0.3).any()
    torch.testing.assert_close(learner.loss(Batch(batch)), (x_0 - target.clamp(-0.3, 0.3)).square().mean(1))
    assert not torch.allclose(learner.loss(Batch(batch)), (x_0 - target).square().mean(1), atol=1e-2)
    assert 0 < float(clipped_shares(learner)["target"]) < 1


def test_a_thresholded_student_feels_a_gradient_outside_the_box() -> None:
    learner = agent(distance="l2", thresholding=Thresholding(kind="static", bound=0.3, roles=("student",)))
    *_, (_, bias) = learner.student.named_parameters()  # of the output, v
    with torch.no_grad():
        bias.fill_(-50.0)  # so that every x̂_0 is far above
    batch = collector(learner).collect(64, only(0), 0)
    batch = batch[batch["t"] > 300]
    with torch.no_grad():
        x_0, target = learner.student(batch["x_t"], batch["t"]).x_0, learner.ema_student(batch["x_s"], batch["s"]).x_0
    assert x_0.min() > 1
    loss = learner.loss(Batch(batch))
    torch.testing.assert_close(loss, (0.3 - target).square().mean(1))  # the values are those of the projection
    loss.mean().backward()
    sigma = learner.expert.schedule.coefficients(batch["t"])[1][:, None].float()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, (-sigma * (0.3 - target)).mean(0), atol=1e-4, rtol=1e-4)  # ∂f/∂v = −c_out σ, c_out ≈ 1
    assert bias.grad.abs().max() > 0.05


# Guidance


class Overheard:
    """Notes which scales a network is told."""

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        self.told: list[Tensor] = []
        denoiser.network.register_forward_pre_hook(lambda _, args: self.told.append(args[3]))


def test_with_a_guidance_range_each_state_has_its_scale_and_both_networks_are_told_it() -> None:
    learner = agent(labelled(), guidance_range=(1.0, 5.0), beta=Beta(0.4, 0.3, 0.3), collect_size=200, batch_size=64)
    student, average = Overheard(learner.student), Overheard(learner.ema_student)
    states = learner.trainer.collect()
    w = states["w"]
    assert 1 <= float(w.min()) < 1.5
    assert 4.5 < float(w.max()) <= 5
    own, times = states[states["source"] == 2], INFERENCE[collector(learner).num_steps]
    assert len(student.told) == len(times) - 1
    for told, t in zip(student.told, times, strict=False):  # in each step, the scales of the states that lie beyond it
        assert torch.equal(told.sort().values, own["w"][own["t"] < t].sort().values)
    student.told.clear()
    batch = learner.draw()
    learner.loss(Batch(batch))
    assert [torch.equal(told, batch["w"]) for told in (*student.told, *average.told)] == [True, True]


def test_labels_use_the_scale_of_their_state() -> None:
    learner = agent(labelled(), guidance_range=(1.0, 5.0), beta=Beta(0.4, 0.3, 0.3), collect_size=200)
    states = learner.trainer.collect()
    x_t, t, s, c, w = (states[key] for key in ("x_t", "t", "s", "c", "w"))
    cond, uncond = learner.expert.predict(x_t, t, c), learner.expert.predict(x_t, t, torch.full_like(c, 2))
    alpha, sigma = (a[:, None].float() for a in learner.expert.schedule.ending_at_alpha_0().coefficients(s))
    x_0, eps = (null + w[:, None] * (own - null) for own, null in ((cond.x_0, uncond.x_0), (cond.eps, uncond.eps)))
    torch.testing.assert_close(states["x_s"], alpha * x_0 + sigma * eps, atol=1e-4, rtol=1e-4)
    assert torch.equal(states["nfe"], 2 * (1 + states["actors"].sum(1)))


def test_it_is_judged_at_the_experts_scale() -> None:
    learner = agent(labelled(), guidance_range=(1.0, 5.0))
    average = Overheard(learner.ema_student)
    learner.student_policy.act(latents(3), torch.full((3,), 999.0), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    assert [told.tolist() for told in average.told] == [[2.0] * 3]


# Data-free


class NoData(GaussianMixtureExpert):
    def sample_data(self, n: int, generator: torch.Generator | None = None) -> Any:
        raise AssertionError("data were asked for")


@pytest.mark.parametrize("beta", [Beta(0, 1, 0), Beta(0, 0.5, 0.5)])
def test_without_a_forward_share_no_data_are_asked_for(beta: Beta) -> None:
    learner = agent(NoData(CORNERS, 0.25), beta=beta, collect_size=200)
    start = weights(learner.student)
    learner.learn(progress=False)
    assert learner.buffer.counts["teacher"] > 0
    assert (learner.buffer.counts["student"] > 0) == (beta.student > 0)
    assert not torch.equal(weights(learner.student), start)


def test_with_a_forward_share_they_are() -> None:
    with pytest.raises(AssertionError, match="data were asked for"):
        agent(NoData(CORNERS, 0.25), beta=Beta(0.1, 0, 0.9)).learn(progress=False)


# Refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"p_expert": 0.3}, r"p_expert=0.3: the expert takes no consistency steps, .*use 0"),
        ({"inference_steps": ()}, r"inference_steps=\(\): need whole numbers from 1 to solver_steps=50"),
        ({"inference_steps": (0, 4)}, r"inference_steps=\(0, 4\): need whole numbers from 1 to solver_steps=50"),
        ({"inference_steps": (4, 51)}, r"inference_steps=\(4, 51\): need whole numbers from 1 to solver_steps=50"),
        (
            {"inference_steps": (4,), "solver_steps": 3, "grid": "trailing"},
            r"inference_steps=\(4,\): need whole numbers from 1 to solver_steps=3",
        ),
        ({"solver_steps": 25}, r"solver_steps=25: the grid lcm picks from 50 times"),
        ({"distance": "l1"}, r"unknown distance 'l1'; choose one of: huber, l2"),
        ({"huber_h": 0.0}, r"huber_h=0.0: need a positive number"),
        ({"huber_h": -1.0}, r"huber_h=-1.0: need a positive number"),
        ({"huber_h": float("nan")}, r"huber_h=nan: need a positive number"),
        ({"ema": 1.0}, r"ema=1.0: need a number in \[0, "),
        (
            {"collect_size": 49, "beta": Beta(0, 1, 0), "states_per_rollout": "all"},
            r"collect_size=49 is too small: .* no source gets a full rollout of 50 states",
        ),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LCMConfig(**changed)


def test_thresholding_a_critic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"thresholding.roles=\('critic',\): lcm has no critic; it has teacher, target, student"):
        agent(thresholding=Thresholding(roles=("critic",)))


# What is learned


class Corrected(nn.Module):
    """The teacher's v, plus a small network that starts at zero: as students of real models start."""

    def __init__(self, teacher: GaussianMixtureExpert, network: Any) -> None:
        super().__init__()
        self.teacher, self.network = teacher, network
        for p in network.layers[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        correction: Tensor = self.network(x_t, t, c)
        return self.teacher.predict(x_t, t, c).v + correction


class WithTeachersWeights(GaussianMixtureExpert):
    def make_student(self, **options: Any) -> NetworkDenoiser:
        student = super().make_student(**options)
        student.network = Corrected(GaussianMixtureExpert(CORNERS, 0.4), student.network)
        return student


@pytest.mark.parametrize("beta", [Beta(1, 0, 0), Beta(0.5, 0, 0.5)])
def test_it_learns_to_sample_in_1_and_in_4_steps(beta: Beta) -> None:
    config = LCMConfig(
        num_updates=400,
        solver_steps=20,
        grid="trailing",
        ema=0.9,
        learning_rate=1e-2,
        warmup_updates=20,
        batch_size=128,
        collect_size=512,
        updates_per_collect=8,
        beta=beta,
        student={"width": 64},
    )
    learner = LCM(WithTeachersWeights(CORNERS, 0.4), config)
    x_T = latents(2000)
    teacher = unroll(ExpertPolicy(learner.expert), collector(learner).grid, x_T)[:, -1]

    def distance(n: int) -> float:
        grid, generator = TimeGrid(learner.expert.schedule, n, "lcm"), torch.Generator().manual_seed(0)
        return sliced_wasserstein(unroll(learner.student_policy, grid, x_T, kernel="renoise", generator=generator)[:, -1], teacher)

    assert distance(1) > 0.7
    assert distance(4) > 0.25
    learner.learn(progress=False)
    # Seeds 0 … 3, in 1 and in 4 steps: .058 – .063 and .059 – .074 on forward states, .065 – .084 and .062 – .101 with student states.
    assert distance(1) < 0.15
    assert distance(4) < 0.15


# The command line
