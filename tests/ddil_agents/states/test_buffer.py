from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import ReplayBuffer

from ddil_agents.states.beta import SOURCES
from ddil_agents.states.buffer import SourceBuffer

WIDTH = 6
BATCH_SIZES = [WIDTH, 1, 4, 64]  # equal to the latent's width, and not


def states(source: int | list[int], n: int | None = None, first: int = 0, **fields: Tensor) -> TensorDict:
    """States numbered from `first`: the number is in `id` and fills x_t."""
    sources = source if isinstance(source, list) else [source] * (n or 1)
    number = torch.arange(first, first + len(sources))
    x_t = number.float()[:, None, None].expand(-1, WIDTH, WIDTH).clone()
    source_column = torch.tensor(sources, dtype=torch.uint8)
    return TensorDict({"source": source_column, "id": number, "x_t": x_t, "t": number.float(), **fields}, batch_size=[len(sources)])


def filled(prioritised: bool = False, seed: int = 0, capacity: Any = 50) -> SourceBuffer:
    """20 forward states (ids 0 …), 10 of the teacher (100 …), 5 of the student (200 …)."""
    buffer = SourceBuffer(capacity, prioritised=prioritised, seed=seed)
    for i, n in enumerate((20, 10, 5)):
        buffer.extend(states(i, n, first=100 * i))
    return buffer


def chi_square(observed: Tensor, share: Tensor) -> float:
    """Σ (O − E)²/E in units of its own spread: (χ² − dof)/√(2 dof), near 0 ± 1 when the shares are right."""
    expected = share / share.sum() * observed.sum()
    dof = len(share) - 1
    return (float(((observed - expected) ** 2 / expected).sum()) - dof) / math.sqrt(2 * dof)


def test_it_is_a_torchrl_replay_buffer() -> None:
    assert isinstance(filled().replay, ReplayBuffer)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("prioritised", [False, True])
def test_a_batch_holds_whole_states(batch_size: int, prioritised: bool) -> None:
    batch = filled(prioritised).sample(batch_size, (1, 1, 1))
    assert batch.batch_size == (batch_size,)
    assert batch["x_t"].shape == (batch_size, WIDTH, WIDTH)
    assert batch["index"].shape == (batch_size,)
    assert (batch["x_t"] == batch["id"][:, None, None]).all()
    assert (batch["t"] == batch["id"]).all()
    assert (batch["source"] == batch["id"] // 100).all()


def test_index_is_where_the_state_lies() -> None:
    buffer = filled()
    batch = buffer.sample(64, (1, 1, 1))
    assert (buffer.replay.storage[batch["index"]]["id"] == batch["id"]).all()


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("source", range(3))
def test_one_hot_beta_draws_one_source(source: int, prioritised: bool) -> None:
    beta = [0.0] * 3
    beta[source] = 0.3  # no need to sum to 1
    assert (filled(prioritised).sample(5000, beta)["source"] == source).all()


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("as_type", [tuple, torch.tensor])
def test_sources_are_drawn_with_beta(as_type: Any, prioritised: bool) -> None:
    beta = (0.5, 0.1, 0.4)
    source = filled(prioritised).sample(50_000, as_type(beta))["source"]
    assert chi_square(torch.bincount(source, minlength=3), torch.tensor(beta)) < 4


def test_every_sample_draws_its_own_source() -> None:
    buffer = filled()  # batches in fixed shares, as TorchRL's ensemble draws them, would have no variance
    counts = torch.tensor([(buffer.sample(8, (0.5, 0.5, 0))["source"] == 0).sum() for _ in range(2000)], dtype=torch.float64)
    assert counts.mean().item() == pytest.approx(8 * 0.5, abs=0.15)
    assert counts.var().item() == pytest.approx(8 * 0.25, rel=0.1)  # binomial


def test_beta_may_change_at_every_draw() -> None:
    buffer = filled()
    for source in (0, 2, 1, 0, 1, 2):
        assert (buffer.sample(16, torch.eye(3)[source])["source"] == source).all()


def test_beta_is_renormalised_over_the_sources_that_hold_states() -> None:
    buffer = SourceBuffer(50)
    buffer.extend(states([0, 0, 2, 2, 2]))
    source = buffer.sample(20_000, (0.3, 0.5, 0.2))["source"]
    assert (source != 1).all()
    assert chi_square(torch.bincount(source, minlength=3)[[0, 2]], torch.tensor([0.3, 0.2])) < 4


def test_uniform_draws_are_uniform_within_a_source() -> None:
    buffer = filled()
    number = buffer.sample(50_000, (1, 1, 1))["id"]
    for i, n in enumerate((20, 10, 5)):
        assert chi_square(torch.bincount(number[number // 100 == i] - 100 * i, minlength=n), torch.ones(n)) < 4


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_priorities_are_respected(exponent: float) -> None:
    buffer = SourceBuffer(50, prioritised=True, priority_exponent=exponent)
    buffer.extend(states([0] * 4 + [1] * 5 + [2] * 6))
    slot = buffer.sample(2000, (1, 1, 1))["index"].unique()  # all 15, in order of source
    priority = torch.arange(1.0, 16.0)
    priority[:4] *= 1e-9  # a source's scale is its own
    buffer.update_priority(slot, priority)
    number = buffer.sample(50_000, (0.5, 0.2, 0.3))["id"]
    share = (priority.double() + 1e-8) ** exponent
    share = torch.cat([b * s / s.sum() for b, s in zip((0.5, 0.2, 0.3), share.split([4, 5, 6]), strict=True)])
    assert chi_square(torch.bincount(number, minlength=15), share) < 4


def test_a_new_state_is_as_likely_as_the_likeliest_of_its_source() -> None:
    buffer = SourceBuffer(10, prioritised=True)
    buffer.extend(states([0, 0, 1]))
    slot = buffer.sample(100, (1, 0, 0))["index"].unique()
    buffer.update_priority(slot, torch.tensor([3.0, 1.0]))
    buffer.extend(states([0], first=3))
    number = buffer.sample(50_000, (1, 0, 0))["id"]
    assert chi_square(torch.bincount(number, minlength=4)[[0, 1, 3]], torch.tensor([3.0, 1.0, 3.0])) < 4


def test_a_new_state_does_not_take_over_the_priority_of_another_source() -> None:
    buffer = SourceBuffer((10, 2, 10), prioritised=True)
    buffer.extend(states([0, 1, 1]))
    buffer.update_priority(buffer.sample(100, (1, 1, 0))["index"].unique(), torch.tensor([7.0, 3.0, 1.0]))
    buffer.extend(states([1], first=3))  # into the first slot of its ring, next to source 0's last
    number = buffer.sample(50_000, (0, 1, 0))["id"]
    assert chi_square(torch.bincount(number, minlength=4)[[2, 3]], torch.tensor([1.0, 3.0])) < 4


def test_a_priority_of_zero_still_leaves_the_state_in_the_buffer() -> None:
    buffer = SourceBuffer(10, prioritised=True)
    buffer.extend(states([0, 0, 0]))
    slot = buffer.sample(100, (1, 0, 0))["index"].unique()
    buffer.update_priority(slot, torch.zeros(3))
    assert len(buffer.sample(100, (1, 0, 0))["id"].unique()) == 3


def test_of_a_state_drawn_twice_the_higher_priority_counts() -> None:
    buffer = SourceBuffer(10, prioritised=True)
    buffer.extend(states([0, 0]))
    slot = buffer.sample(100, (1, 0, 0))["index"].unique()
    buffer.update_priority(slot[[0, 1, 0, 0]], torch.tensor([1.0, 3.0, 9.0, 2.0]))
    assert chi_square(torch.bincount(buffer.sample(20_000, (1, 0, 0))["id"]), torch.tensor([9.0, 3.0])) < 4


def test_ring_keeps_the_newest() -> None:
    buffer = SourceBuffer({"forward": 4, "teacher": 3, "student": 5})
    for first in range(0, 33, 3):  # sources in turn, ids 0 … 32
        buffer.extend(states([0, 1, 2], first=first))
    assert buffer.counts == {"forward": 4, "teacher": 3, "student": 5}
    assert len(buffer) == 12
    number = buffer.sample(2000, (1, 1, 1))["id"].unique().tolist()
    assert number == sorted([21, 24, 27, 30, 25, 28, 31, 20, 23, 26, 29, 32])


def test_a_call_longer_than_the_ring_keeps_its_newest() -> None:
    buffer = SourceBuffer((4, 3, 5))
    buffer.extend(states([0] * 2))
    buffer.extend(states([0] * 11 + [1], first=2))
    assert buffer.counts == {"forward": 4, "teacher": 1, "student": 0}
    assert buffer.sample(500, (1, 1, 0))["id"].unique().tolist() == [9, 10, 11, 12, 13]
    buffer.extend(states([0], first=99))  # over the oldest, 9
    assert buffer.sample(500, (1, 0, 0))["id"].unique().tolist() == [10, 11, 12, 99]


def test_one_source_filling_up_leaves_the_others_alone() -> None:
    buffer = filled(capacity=20)
    buffer.extend(states(0, 200, first=1000))
    number = buffer.sample(2000, (0, 1, 1))["id"].unique().tolist()
    assert number == list(range(100, 110)) + list(range(200, 205))


def test_stored_states_are_detached_copies_and_the_callers_are_untouched() -> None:
    given = states(0, 4)
    given["x_t"].requires_grad_()
    buffer = SourceBuffer(4)
    buffer.extend(given)
    with torch.no_grad():
        given["x_t"].fill_(-1)
    batch = buffer.sample(8, (1, 0, 0))
    assert not batch["x_t"].requires_grad
    assert (batch["x_t"] >= 0).all()
    assert "index" not in given
    batch["x_t"].fill_(-1)
    assert (buffer.sample(8, (1, 0, 0))["x_t"] >= 0).all()


def test_a_drawn_batch_can_be_stored_again() -> None:
    buffer = filled()
    buffer.extend(buffer.sample(7, (0, 1, 0)))
    assert buffer.counts == {"forward": 20, "teacher": 17, "student": 5}


def test_the_seed_decides_the_draws_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    first = filled(seed=3).sample(64, (1, 1, 1))["id"]
    torch.manual_seed(2)
    assert (filled(seed=3).sample(64, (1, 1, 1))["id"] == first).all()
    assert (filled(seed=4).sample(64, (1, 1, 1))["id"] != first).any()


def identical(one: SourceBuffer, other: SourceBuffer, beta: tuple[float, ...]) -> bool:
    return all(bool((one.sample(n, beta) == other.sample(n, beta)).all()) for n in BATCH_SIZES)


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("capacity", [50, (8, 4, 5)])  # rings half full, and wrapped
def test_restored_buffer_draws_identical_samples(tmp_path: Path, capacity: Any, prioritised: bool) -> None:
    buffer = filled(prioritised, seed=7, capacity=capacity)
    if prioritised:
        index = buffer.sample(30, (1, 1, 1))["index"].unique()
        buffer.update_priority(index, torch.rand(len(index)))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    restored = SourceBuffer(capacity, prioritised=prioritised, seed=1)
    restored.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert restored.counts == buffer.counts
    assert identical(buffer, restored, (0.2, 0.5, 0.3))
    for copy in (buffer, restored):  # and goes on alike
        copy.extend(states([0, 1, 2, 2], first=900))
    assert identical(buffer, restored, (0.2, 0.5, 0.3))


def test_a_restore_replaces_what_the_buffer_held() -> None:
    saved, used = filled(), filled(seed=1)
    used.extend(states(0, 30, first=500))
    used.load_state_dict(saved.state_dict())
    assert used.counts == saved.counts
    assert identical(saved, used, (1, 1, 1))


def test_a_buffer_saved_empty_restores() -> None:
    saved, restored = SourceBuffer(50, seed=5), filled(seed=1)
    restored.load_state_dict(saved.state_dict())
    assert len(restored) == 0
    with pytest.raises(ValueError, match="nothing to draw"):
        restored.sample(1, (1, 1, 1))
    for buffer in (saved, restored):
        buffer.extend(states([0, 1, 2]))
    assert identical(saved, restored, (1, 2, 3))


def test_a_saved_state_does_not_follow_the_live_buffer() -> None:
    buffer = filled(prioritised=True)
    state = buffer.state_dict()
    expected = buffer.sample(64, (1, 1, 1))["id"]
    buffer.update_priority(buffer.sample(8, (1, 0, 0))["index"], torch.full((8,), 100.0))
    buffer.extend(states([0, 1, 2] * 60, first=700))
    assert state["writer"] == {"cursors": [20, 10, 5], "counts": [20, 10, 5]}
    restored = SourceBuffer(50, prioritised=True)
    restored.load_state_dict(state)
    assert (restored.sample(64, (1, 1, 1))["id"] == expected).all()


def test_torchrl_dumps_and_loads_restore_it_too(tmp_path: Path) -> None:
    buffer, restored = filled(prioritised=True, seed=7), SourceBuffer(50, prioritised=True)
    buffer.replay.dumps(tmp_path)
    restored.replay.loads(tmp_path)
    assert identical(buffer, restored, (1, 1, 1))


def test_clear_forgets_every_state() -> None:
    buffer = filled(prioritised=True)
    buffer.clear()
    assert len(buffer) == 0
    buffer.extend(states(2, 3, first=40))
    assert buffer.counts == {"forward": 0, "teacher": 0, "student": 3}
    assert buffer.sample(100, (1, 1, 1))["id"].unique().tolist() == [40, 41, 42]
    assert len(buffer.state_dict()["states"]["id"]) == 3


def test_an_empty_extend_stores_nothing() -> None:
    buffer = SourceBuffer(5)
    buffer.extend(states(0, 4)[:0])
    assert len(buffer) == 0


@pytest.mark.parametrize(
    "beta",
    [(0.5, -0.1, 0.6), (0, 0, 0), (1, math.nan, 0), (1, math.inf, 0), (0.5, 0.5), (0.25,) * 4, torch.tensor([0.0, 0.0, -1.0])],
)
def test_a_beta_that_is_no_distribution_is_refused(beta: Any) -> None:
    with pytest.raises(ValueError, match=r"beta=.*need a finite share ≥ 0 for each of forward, teacher, student"):
        filled().sample(4, beta)


def test_drawing_from_an_empty_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to draw .*'forward': 0.*first collect"):
        SourceBuffer(5).sample(4, (1, 1, 1))


def test_beta_on_empty_sources_alone_is_refused() -> None:
    buffer = SourceBuffer(5)
    buffer.extend(states([0, 0]))
    with pytest.raises(ValueError, match=r"nothing to draw .*'forward': 2, 'teacher': 0"):
        buffer.sample(4, (0, 0.5, 0.5))


@pytest.mark.parametrize("capacity", [0, -1, 2.5, (5, 0, 5), (5, 5), {"forward": 5}, {"forward": 5, "teacher": 5, "learner": 5}])
def test_a_capacity_without_room_for_each_source_is_refused(capacity: Any) -> None:
    with pytest.raises(ValueError, match=r"capacity=.*whole number ≥ 1"):
        SourceBuffer(capacity)


@pytest.mark.parametrize("exponent", [-1.0, math.nan, math.inf])
def test_a_priority_exponent_that_is_no_exponent_is_refused(exponent: float) -> None:
    with pytest.raises(ValueError, match="priority_exponent="):
        SourceBuffer(5, prioritised=True, priority_exponent=exponent)


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        filled().sample(0, (1, 1, 1))


@pytest.mark.parametrize("source", [3, -1])
def test_a_source_that_does_not_exist_is_refused(source: int) -> None:
    wrong = states([0, 1])
    wrong["source"] = torch.tensor([0, source])
    with pytest.raises(ValueError, match=f"source {source} does not exist; 0 … {len(SOURCES) - 1} are forward, teacher, student"):
        SourceBuffer(5).extend(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        states([0]).exclude("source"),
        states([0, 1]).set("source", torch.zeros(2)),
        states([0, 1]).set("source", torch.zeros(2, 1, dtype=torch.int64)),
        states([0, 1])[0],
    ],
)
def test_states_without_a_source_each_are_refused(wrong: TensorDict) -> None:
    with pytest.raises(ValueError, match="source"):
        SourceBuffer(5).extend(wrong)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("x_t", states([0]).set("x_t", torch.zeros(1, WIDTH, WIDTH + 1))),
        ("t", states([0]).set("t", torch.zeros(1, dtype=torch.float64))),
        ("source", states([0]).set("source", torch.zeros(1, dtype=torch.int64))),
        ("loss", states([0], loss=torch.zeros(1))),
        ("id", states([0]).exclude("id")),
    ],
)
def test_fields_unlike_the_first_are_refused_and_nothing_is_stored(key: str, wrong: TensorDict) -> None:
    buffer = filled()
    with pytest.raises(ValueError, match=f"'{key}' was .* at the first extend"):
        buffer.extend(wrong)
    assert len(buffer) == 35


@pytest.mark.parametrize("priority", [math.nan, math.inf, -1.0])
def test_a_priority_that_is_no_weight_is_refused(priority: float) -> None:
    buffer = filled(prioritised=True)
    index = buffer.sample(2, (1, 1, 1))["index"]
    with pytest.raises(ValueError, match=rf"priority {priority} for index {index[1]}"):
        buffer.update_priority(index, torch.tensor([1.0, priority]))


@pytest.mark.parametrize("index", [-1, 49, 150])  # before the first slot, free, after the last
def test_a_priority_for_no_state_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"for index {index}: "):
        filled(prioritised=True).update_priority(torch.tensor([index]), torch.ones(1))


def test_index_and_priority_of_different_shapes_are_refused() -> None:
    buffer = filled(prioritised=True)
    with pytest.raises(ValueError, match=r"index \(4,\) and priority \(4, 1\)"):
        buffer.update_priority(buffer.sample(4, (1, 1, 1))["index"], torch.ones(4, 1))


def test_priorities_of_a_uniform_buffer_are_refused() -> None:
    buffer = filled()
    with pytest.raises(ValueError, match="prioritised=True"):
        buffer.update_priority(buffer.sample(4, (1, 1, 1))["index"], torch.ones(4))


@pytest.mark.parametrize("other", [SourceBuffer(10), SourceBuffer(50, prioritised=True), SourceBuffer(50, priority_exponent=2.0)])
def test_the_state_of_a_buffer_built_otherwise_is_refused(other: SourceBuffer) -> None:
    with pytest.raises(ValueError, match=r"does not fit one with .*; build it as it was saved"):
        other.load_state_dict(filled().state_dict())


def test_counts_that_do_not_fit_the_states_are_refused() -> None:
    buffer = SourceBuffer(50)
    with pytest.raises(ValueError, match=r"counts=\[2, 0, 0\]: need one for each of forward, teacher, student, which sum to the 3 states"):
        buffer.extend(states([0, 0, 1]), [2, 0, 0])
    assert len(buffer) == 0


def test_states_with_their_counts_are_stored_as_without() -> None:
    """More of a source than its ring holds, and several times around it."""
    told, counted = SourceBuffer(5), SourceBuffer(5)
    for first in (0, 100, 200):
        given = states([0] * 3 + [1] * 7 + [2] * 4, first=first)
        told.extend(given, [3, 7, 4])
        counted.extend(given[torch.arange(14).roll(3)])
    assert told.counts == counted.counts == {"forward": 5, "teacher": 5, "student": 5}
    for buffer in (told, counted):
        assert set(buffer.sample(500, (1, 0, 0))["id"].tolist()) == {101, 102, 200, 201, 202}
        assert set(buffer.sample(500, (0, 1, 0))["id"].tolist()) == set(range(205, 210))


def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda:99' is not to be had"):
        SourceBuffer(5, device="cuda:99")


@pytest.mark.gpu
def test_it_works_on_a_gpu() -> None:
    buffer = SourceBuffer(50, device="cuda", prioritised=True)
    buffer.extend(states([0, 1, 2] * 20))  # from the CPU
    batch = buffer.sample(64, (0.5, 0.5, 0))
    assert batch["x_t"].is_cuda
    assert (batch["source"] < 2).all()
    buffer.update_priority(batch["index"], torch.rand(64, device="cuda"))
    restored = SourceBuffer(50, device="cuda", prioritised=True)
    restored.load_state_dict(buffer.state_dict())
    assert identical(buffer, restored, (1, 1, 1))
