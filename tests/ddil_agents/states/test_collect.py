"""Collected states: where each source's states come from, and that every label is the expert's action there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import K, N, flow, guided, space, stream, video
from tensordict import TensorDict
from torch import Tensor

from ddil_agents.states.collect import STREAMS, Collector, StatesPerRollout, stream_seed
from ddil_env import Expert, ExpertPolicy, Prediction, StudentPolicy, TimeGrid, invert_ddim, unroll

everywhere = pytest.mark.parametrize("make", [space, guided, video, flow])


class Twin:
    """A student that believes what the expert does, down to the last bit."""

    def __init__(self, expert: Expert) -> None:
        self.nfe = 0
        self.predict: Callable[..., Prediction] = expert.guided


def collector(
    expert: Expert,
    p_expert: float = 0.0,
    seed: int = 0,
    substeps: int = K,
    twin: bool = False,
    states: StatesPerRollout = 1,
    scales: tuple[float, float] | None = None,
) -> Collector:
    told: dict[str, Any] = {} if scales is None else {"guidance_embedding": True}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        student = Twin(expert) if twin else expert.make_student(width=8, depth=1, **told)
    policies = ExpertPolicy(expert, substeps), StudentPolicy(student, expert, guidance_scale=None if scales is None else 2.0)
    grid = TimeGrid(expert.schedule, N)
    return Collector(*policies, grid, seed, p_expert=p_expert, guidance_range=scales, states_per_rollout=states)


def trajectories(states: TensorDict, key: str) -> Tensor:
    """All states of the rollouts of one source, as (n, N, …)."""
    return states[key].unflatten(0, (-1, N))


def conditions(states: TensorDict) -> Tensor | None:
    return trajectories(states, "c")[:, 0] if "c" in states else None


@everywhere
@pytest.mark.parametrize("n", [3, 8])  # equal to the latent's width, and not
def test_forward_states_are_noised_data(make: Callable[[], Expert], n: int) -> None:
    expert = make()
    states = collector(expert).collect(n, (1, 0, 0), 0)
    x_0, c = expert.sample_data(n, stream("data"))
    eps = torch.randn(x_0.shape, generator=stream("noise"))
    assert torch.equal(states["x_t"], expert.schedule.add_noise(x_0, eps, states["t"]))
    if c is not None:
        assert torch.equal(states["c"], c)


def test_forward_times_are_uniform_over_the_grid() -> None:
    machine = collector(space())
    states = machine.collect(4000, (1, 0, 0), 0)
    counts = torch.stack([(states["t"] == t).sum() for t in machine.grid.times[:-1]])
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert torch.equal(states["s"], machine.grid.previous(states["t"]))


@everywhere
@pytest.mark.parametrize("n", [3, 5])
def test_teacher_states_are_the_experts_trajectory(make: Callable[[], Expert], n: int) -> None:
    expert = make()
    machine = collector(expert, states="all")
    states = machine.collect(n * N, (0, 1, 0), 0)
    x = trajectories(states, "x_t")
    path = unroll(ExpertPolicy(expert, K), machine.grid, x[:, 0], conditions(states))
    assert torch.equal(x, path[:, :-1])
    assert torch.equal(x[:, 0], torch.randn(x[:, 0].shape, generator=stream("rollout")))


@everywhere
def test_a_teacher_states_label_is_its_next_state(make: Callable[[], Expert]) -> None:
    expert = make()
    machine = collector(expert, states="all")
    states = machine.collect(3 * N, (0, 1, 0), 0)
    x, x_s = (trajectories(states, key) for key in ("x_t", "x_s"))
    assert torch.equal(x_s[:, :-1], x[:, 1:])
    sample = unroll(ExpertPolicy(expert, K), machine.grid, x[:, 0], conditions(states))[:, -1]
    assert torch.equal(x_s[:, -1], sample)


@everywhere
def test_student_states_are_the_students_trajectory(make: Callable[[], Expert]) -> None:
    expert = make()
    machine = collector(expert, states="all")
    states = machine.collect(3 * N, (0, 0, 1), 0)
    x = trajectories(states, "x_t")
    path = unroll(machine.student_policy, machine.grid, x[:, 0], conditions(states))
    assert torch.equal(x, path[:, :-1])
    assert not torch.allclose(x[:, 1:], unroll(machine.expert_policy, machine.grid, x[:, 0], conditions(states))[:, 1:-1], atol=1e-2)


def steps_before(states: TensorDict, grid: TimeGrid) -> Tensor:
    """j of each state, the steps that its rollout took, (m,)."""
    return (grid.times > states["t"][:, None]).sum(1)


@pytest.mark.parametrize(("beta", "n"), [((0, 0, 1), 1), ((0, 1, 0), 3), ((0, 0, 1), 10), ((0, 1, 0), 12)])  # N = 4 divides 12 alone
def test_a_rollout_stops_at_each_time_as_often(beta: tuple[int, int, int], n: int) -> None:
    machine, times, collections = collector(space(), substeps=1), torch.zeros(N), 50
    for _ in range(collections):
        states = machine.collect(n, beta, 0)
        counts = torch.bincount(steps_before(states, machine.grid), minlength=N)
        assert len(states) == n
        assert counts.max() - counts.min() <= 1
        times += counts
    remainder = n / N % 1  # a time gets one more than ⌊n/N⌋ with this probability
    assert (times - collections * n / N).abs().max() <= 4 * math.sqrt(collections * remainder * (1 - remainder))


def test_both_ways_of_rollouts_have_the_times_equally_often() -> None:
    for beta in ((0, 1, 0), (0, 0, 1)):
        one, every = (collector(space(), substeps=1, states=s).collect(3 * N, beta, 0)["t"].sort().values for s in (1, "all"))  # type: ignore[arg-type]
        assert torch.equal(one, every)


@pytest.mark.parametrize("make", [space, guided, flow])
@pytest.mark.parametrize(("beta", "p_expert"), [((0, 1, 0), 1.0), ((0, 0, 1), 0.0), ((0, 0, 1), 0.5)], ids=["teacher", "student", "mixed"])
def test_each_state_is_where_a_rollout_of_its_own_stops(make: Callable[[], Expert], beta: tuple[int, int, int], p_expert: float) -> None:
    expert, n, rollouts = make(), 10, stream("rollout")
    machine = collector(expert, p_expert)
    states = machine.collect(n, beta, 0)
    x_T, c = torch.randn(n, *expert.sample_shape, generator=rollouts), expert.sample_condition(n, rollouts)
    stops, of_rollout, acted = steps_before(states, machine.grid), [], 0
    for x_t, actors, j in zip(states["x_t"], states["actors"], stops.tolist(), strict=True):
        assert not actors[j:].any()  # nobody has acted yet
        x, acted = x_T, acted + int(actors.sum())
        for i in range(j):  # of all n starts, by the actors of this state
            t, s = (machine.grid.times[k].expand(n) for k in (i, i + 1))
            x = (machine.expert_policy if actors[i] else machine.student_policy).act(x, t, s, c)
        (found,) = torch.isclose(x, x_t, atol=1e-5).flatten(1).all(1).nonzero().tolist()
        of_rollout += found
    assert sorted(of_rollout) == list(range(n))
    assert c is None or torch.equal(states["c"], c[of_rollout])
    assert of_rollout != sorted(of_rollout)
    assert abs(acted - p_expert * int(stops.sum())) <= 4 * math.sqrt(int(stops.sum()) * p_expert * (1 - p_expert))


@pytest.mark.parametrize(("make", "pair", "scales"), [(space, 1, None), (guided, 2, None), (guided, 2, (1.0, 5.0))])
def test_a_state_costs_the_experts_steps_to_it_and_its_label(make: Callable[[], Expert], pair: int, scales: Any) -> None:
    for beta, p_expert in (((1, 0, 0), 0.0), ((0, 1, 0), 0.0), ((0, 0, 1), 0.0), ((0, 0, 1), 0.5), ((0.4, 0.2, 0.4), 0.5)):
        expert = make()
        machine = collector(expert, p_expert, scales=scales)
        states = machine.collect(10 * N, beta, 0)
        rollouts, acted = states[states["source"] > 0], states["actors"].sum(1)
        steps = int(steps_before(rollouts, machine.grid).sum())
        assert steps == len(rollouts) * (N - 1) / 2
        assert torch.equal(states["nfe"], K * pair * (1 + acted))
        assert expert.nfe == int(states["nfe"].sum())
        assert machine.student_policy.student.nfe == steps - int(acted.sum())
        if beta[1] == 1:
            assert expert.nfe == len(states) * K * pair * (N + 1) / 2


@everywhere
@pytest.mark.parametrize(("p_expert", "states_per_rollout"), [(0.0, "all"), (0.5, 1)])
def test_the_label_is_the_experts_action_recomputed(
    make: Callable[[], Expert], p_expert: float, states_per_rollout: StatesPerRollout
) -> None:
    expert = make()
    states = collector(expert, p_expert, states=states_per_rollout).collect(12 * N, (0.5, 0.25, 0.25), 0)
    x_t, t, s, x_s, c = (states.get(key, None) for key in ("x_t", "t", "s", "x_s", "c"))
    torch.testing.assert_close(x_s, ExpertPolicy(expert, K).act(x_t, t, s, c), atol=1e-5, rtol=1e-5)
    x_tgt = invert_ddim(expert.schedule, x_t, t, x_s, s).x_0  # one DDIM step with progressive distillation's target lands there
    torch.testing.assert_close(expert.schedule.prediction(x_tgt, x_t, t, "x_0").latent(s), x_s, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "pair"), [(space, 1), (guided, 2)])
@pytest.mark.parametrize(
    ("beta", "student_nfe"), [((1, 0, 0), 0), ((0, 1, 0), 0), ((0, 0, 1), 6 * (N - 1))], ids=["forward", "teacher", "student"]
)
def test_a_state_of_a_whole_rollout_costs_k_expert_forwards(
    make: Callable[[], Expert], pair: int, beta: tuple[int, int, int], student_nfe: int
) -> None:
    expert = make()
    machine = collector(expert, states="all")
    states = machine.collect(6 * N, beta, 0)
    assert expert.nfe == len(states) * K * pair == 6 * N * K * pair
    assert machine.student_policy.student.nfe == student_nfe


@pytest.mark.parametrize(("p_expert", "calls"), [(0.0, [12] * K), (0.5, [3] * N * K), (1.0, [3] * N * K)])
def test_states_that_the_expert_does_not_lead_to_are_labelled_at_once(p_expert: float, calls: list[int]) -> None:
    expert, sizes = space(), []
    predict = expert.predict
    expert.predict = lambda x_t, t, c=None: (sizes.append(len(x_t)), predict(x_t, t, c))[1]
    collector(expert, p_expert=p_expert, states="all").rollout(3, p_expert)
    assert sizes == calls


@pytest.mark.parametrize("make", [space, guided])
def test_mixing_two_actors_that_agree_changes_nothing(make: Callable[[], Expert]) -> None:
    expert = make()
    pure = collector(expert, substeps=1).collect(5 * N, (0, 1, 0), 0)
    for p_expert in (0.0, 0.5, 1.0):
        mixed = collector(expert, p_expert, substeps=1, twin=True).collect(5 * N, (0, 0, 1), 0)
        assert torch.equal(mixed["x_t"], pure["x_t"])
        assert torch.equal(mixed["x_s"], pure["x_s"])


@everywhere
def test_student_rollouts_where_the_expert_always_acts_are_the_teachers(make: Callable[[], Expert]) -> None:
    mixed = collector(make(), p_expert=1.0).collect(3 * N, (0, 0, 1), 0)
    teacher = collector(make()).collect(3 * N, (0, 1, 0), 0)
    for key in ("x_t", "x_s", "t", "s", "actors"):
        assert torch.equal(mixed[key], teacher[key])
    assert (mixed["source"] == 2).all()
    assert (teacher["source"] == 1).all()


@everywhere
def test_the_actor_mask_says_who_led_to_a_state(make: Callable[[], Expert]) -> None:
    expert = make()
    machine = collector(expert, p_expert=0.5, states="all")
    states = machine.collect(40 * N, (0, 0, 1), 0)
    x, t, s, actors = (trajectories(states, key) for key in ("x_t", "t", "s", "actors"))  # actors (n, N, N)
    c = conditions(states)
    by_expert, by_student = 0, 0
    for i in range(N):
        assert not actors[:, i, i:].any()  # nobody has acted yet
        assert torch.equal(actors[:, i, :i], actors[:, -1, :i])
    for j in range(N - 1):
        expert_acts = actors[:, -1, j].reshape(-1, *(1,) * (x.ndim - 2))
        theirs, own = (policy.act(x[:, j], t[:, j], s[:, j], c) for policy in (machine.expert_policy, machine.student_policy))
        assert torch.equal(x[:, j + 1], torch.where(expert_acts, theirs, own))
        by_expert, by_student = by_expert + int(expert_acts.sum()), by_student + int((~expert_acts).sum())
    assert by_expert + by_student == 120
    assert abs(by_expert - 60) < 4 * math.sqrt(120 * 0.25)


def test_actors_of_pure_sources() -> None:
    machine = collector(space(), states="all")
    forward, teacher, student = (trajectories(machine.collect(4 * N, beta, 0), "actors") for beta in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert not forward.any()
    assert not student.any()
    assert torch.equal(teacher, torch.ones(N, N, dtype=torch.bool).tril(-1).expand(4, N, N))


@pytest.mark.parametrize(
    ("beta", "states_per_rollout", "rollout"),
    [((0.5, 0.1, 0.4), "all", N), ((1 / 3, 1 / 3, 1 / 3), "all", N), ((0.2, 0.3, 0.5), 1, 1)],
)
def test_small_collections_add_up_to_the_shares_exactly(
    beta: tuple[float, float, float], states_per_rollout: StatesPerRollout, rollout: int
) -> None:
    machine = collector(space(), substeps=1, states=states_per_rollout)
    counts = torch.zeros(3, dtype=torch.int64)
    for step in range(1, 121):
        states = machine.collect(10, beta, 0)
        if len(states):
            counts += torch.bincount(states["source"].long(), minlength=3)
        owed = torch.tensor(beta, dtype=torch.float64) * 10 * step - counts
        assert (owed > -1e-6).all()
        assert (owed < torch.tensor([1, rollout, rollout]) + 1e-6).all()  # never a whole state, a whole rollout behind
    assert counts.tolist() == pytest.approx([1200 * share for share in beta])


def test_a_collection_too_small_for_a_rollout_is_empty_and_is_made_up_for() -> None:
    machine = collector(space(), states="all")
    sizes = [len(machine.collect(1, (0, 0, 1), 0)) for _ in range(2 * N)]
    assert sizes == [0, 0, 0, N] * 2
    assert machine.expert.nfe == 2 * N * K


def test_forward_collection_draws_nothing_for_rollouts() -> None:
    machine = collector(space())
    before = {name: generator.get_state() for name, generator in machine.streams.items()}
    machine.collect(64, (1, 0, 0), 0)
    for name in ("rollout", "path"):
        assert torch.equal(machine.streams[name].get_state(), before[name])
    for name in ("data", "noise", "time"):
        assert not torch.equal(machine.streams[name].get_state(), before[name])
    assert machine.student_policy.student.nfe == 0


def test_rollouts_draw_nothing_of_the_forward_streams() -> None:
    alone = collector(guided()).collect(10, (1, 0, 0), 0)
    mixed = collector(guided()).collect(20, (0.5, 0.1, 0.4), 0)
    assert torch.equal(mixed["x_t"][:10], alone["x_t"])
    assert torch.equal(mixed["x_s"][:10], alone["x_s"])


def first_draws(seed: int) -> Tensor:
    return torch.rand(4, generator=torch.Generator().manual_seed(seed))


def test_a_generator_on_the_cpu_keeps_32_bits_of_its_seed() -> None:
    assert torch.equal(first_draws(5), first_draws(5 + 2**32))
    assert not torch.equal(first_draws(5), first_draws(5 + 2**31))


def test_no_two_streams_of_all_seeds_are_one() -> None:
    learning = (*STREAMS, "weights", "source", "disturbance", "dropout", "head", "discriminator", "calibration", "ppo0")
    judging = [f"{name}, batch {batch}" for name in ("x_T", "steps", "forward", "lpips x_T", "lpips steps") for batch in (0, 1)]
    names = (*learning, *judging, "shown", "stage 1", "stage 2", "stage 3", "stage 4")
    seeds = [stream_seed(seed, name) for seed in range(1000) for name in names]
    assert 0 <= min(seeds) < max(seeds) < 2**32  # all of it is kept
    assert len(set(seeds)) == len(seeds)
    assert not torch.equal(first_draws(stream_seed(0, "data")), first_draws(stream_seed(2**32, "data")))


def test_no_gradient_flows_through_a_collection() -> None:
    machine = collector(space(), p_expert=0.5)
    states = machine.collect(8 * N, (0.5, 0.25, 0.25), 0)
    assert not any(value.requires_grad for value in states.values())
    assert next(machine.student_policy.student.parameters()).requires_grad
    assert machine.student_policy.student.nfe > 0


@everywhere
def test_the_same_seed_gives_the_same_states(make: Callable[[], Expert]) -> None:
    one, same, other = (collector(make(), p_expert=0.5, seed=seed).collect(8 * N, (0.5, 0.25, 0.25), 0) for seed in (0, 0, 1))
    for key in one.keys():  # noqa: SIM118
        assert torch.equal(one[key], same[key])
    assert not torch.equal(one["x_t"], other["x_t"])


def test_a_restored_collector_goes_on_with_the_same_states() -> None:
    machine, restored = (collector(guided(), p_expert=0.5, seed=seed) for seed in (0, 1))
    machine.collect(7, (0.5, 0.1, 0.4), 0)
    restored.load_state_dict(machine.state_dict())
    for _ in range(3):
        expected, states = (m.collect(7, (0.5, 0.1, 0.4), 0) for m in (machine, restored))
        assert expected.batch_size == states.batch_size
        for key in expected.keys():  # noqa: SIM118
            assert torch.equal(states[key], expected[key])


def test_source_and_version_are_recorded() -> None:
    states = collector(space()).collect(8 * N, (0.5, 0.25, 0.25), 17)
    assert states["source"].dtype == torch.uint8
    assert states["source"].tolist() == [0] * 16 + [1] * 8 + [2] * 8
    assert (states["version"] == 17).all()
