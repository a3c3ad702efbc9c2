"""Facts about projections onto the data's support, their meter, their calibration and their record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import Dataless
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddil_env import Box, GaussianMixtureExpert, NoDataError, NoiseSchedule, Prediction, Support, Unbounded
from ddil_env.schedule import Kind
from ddil_env.support import (
    ChannelQuantiles,
    CountingSupport,
    DynamicPercentile,
    Folded,
    Role,
    SupportKind,
    Thresholding,
    build_support,
    support_from_dict,
    support_to_dict,
)

SHAPES = [(2,), (1, 8, 8), (4, 6, 6), (3, 10)]
BATCHES = [1, 2, 3, 4, 6, 8]  # equal to a width of some shape and to none of another's: a wrong broadcast hides where they agree
KINDS = get_args(Kind)


def latents(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channel_box(shape: tuple[int, ...]) -> ChannelQuantiles:
    """A different, lopsided interval for each channel, all within ±1.3."""
    c = torch.arange(shape[0], dtype=torch.float64)
    return ChannelQuantiles(-0.3 - 1 / (c + 1), 0.2 + 0.1 * c)


BOUNDED: dict[str, Callable[[tuple[int, ...]], Support]] = {
    "box": lambda shape: Box(0.7),
    "dynamic": lambda shape: DynamicPercentile(0.9, 0.7),
    "dynamic of the largest": lambda shape: DynamicPercentile(1.0, 1.3),
    "channels": channel_box,
    "folded": lambda shape: Folded(0.7),
    "metered": lambda shape: CountingSupport(Folded(1.1)),
}


def limits(support: Support, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every entry, in x_0's precision."""
    inner: Any = support.support if isinstance(support, CountingSupport) else support
    if isinstance(inner, ChannelQuantiles):
        sides = torch.tensor([inner.low, inner.high], dtype=torch.float64).to(x_0.dtype)
        low, high = sides.reshape(2, -1, *(1,) * (x_0.ndim - 2))
    else:
        low, high = torch.tensor([-inner.bound, inner.bound], dtype=torch.float64).to(x_0.dtype)
    return low.expand_as(x_0), high.expand_as(x_0)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def prediction(kind: Kind, shape: tuple[int, ...], b: int, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> Prediction:
    """A belief at random times, both ends of the chain among them."""
    schedule = NoiseSchedule(kind)
    t = torch.randint(1, int(schedule.t_max) + 1, (b,), generator=torch.Generator().manual_seed(b)).float()
    t[0], t[-1] = 1.0, schedule.t_max
    return schedule.prediction(scale * latents(b, *shape, dtype=dtype), latents(b, *shape, seed=3, dtype=dtype), t, "x_0")


# What every projection does


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_a_sample_inside_stays_bit_for_bit(name: str, shape: tuple[int, ...], b: int, dtype: torch.dtype) -> None:
    support = BOUNDED[name](shape)
    u = torch.rand(b, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    low, high = limits(support, u)
    inside = low + u * (high - low)
    inside = torch.where(u < 0.1, low, torch.where(u > 0.9, high, inside)).clamp(low, high)  # on the walls too
    inside[u.sub(0.5).abs() < 0.05] = -0.0
    assert torch.equal(bits(support.project(inside)), bits(inside))
    for kind in KINDS:
        pred = prediction(kind, shape, b, dtype)
        pred = pred.schedule.prediction(inside, latents(b, *shape, seed=3, dtype=dtype), pred.t, "x_0")
        for straight_through in (False, True):
            projected = pred.projected(support, straight_through)
            assert torch.equal(projected.x_0, inside)
            assert torch.equal(projected.eps, pred.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_a_projection_lands_inside_and_stays_there(name: str, shape: tuple[int, ...], b: int, dtype: torch.dtype) -> None:
    support = BOUNDED[name](shape)
    for seed in range(10):
        x_0 = 10.0 ** (seed % 4 - 1) * latents(b, *shape, seed=seed, dtype=dtype)
        projected = support.project(x_0)
        low, high = limits(support, x_0)
        assert projected.shape == x_0.shape
        assert projected.dtype == x_0.dtype
        assert (projected >= low).all()
        assert (projected <= high).all()
        assert torch.equal(bits(support.project(projected)), bits(projected))


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_samples_are_projected_one_by_one(name: str, shape: tuple[int, ...], b: int) -> None:
    support, x_0 = BOUNDED[name](shape), 2 * latents(b, *shape) * torch.arange(1, b + 1).reshape(-1, *(1,) * len(shape))
    alone = torch.cat([support.project(x_0[i : i + 1]) for i in range(b)])
    assert torch.equal(support.project(x_0), alone)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b", [2, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_a_projected_belief_still_adds_up_to_x_t(name: str, shape: tuple[int, ...], b: int, kind: Kind, straight_through: bool) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        pred = prediction(kind, shape, b, dtype)
        projected = pred.projected(BOUNDED[name](shape), straight_through)
        assert not torch.equal(projected.x_0, pred.x_0)
        alpha, sigma = pred.schedule(pred.t, pred.x_0)
        x_t = latents(b, *shape, seed=3, dtype=dtype)
        torch.testing.assert_close(alpha * projected.x_0 + sigma * projected.eps, x_t, atol=tolerance, rtol=tolerance)


def test_all_of_space_returns_the_belief_itself() -> None:
    pred = prediction("cosine", (2,), 3)
    for support in (Unbounded(), CountingSupport(Unbounded())):
        assert pred.projected(support) is pred
        assert pred.projected(support, straight_through=True) is pred


@pytest.mark.parametrize("name", BOUNDED)
def test_no_projection_waits_for_the_device(name: str) -> None:
    x_0 = torch.empty(3, 4, 6, 6, device="meta")  # without values: to read one raises
    support = BOUNDED[name]((4, 6, 6))
    assert support.project(x_0).device.type == "meta"
    if isinstance(support, CountingSupport):
        assert support.pop_fraction().device.type == "meta"


# Gradients


def gradient(of: Tensor, to: Tensor) -> Tensor:
    return torch.autograd.grad(of.sum(), to, retain_graph=True)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["box", "channels"])
def test_a_clamp_has_no_gradient_outside(name: str, shape: tuple[int, ...]) -> None:
    pred = prediction("scaled_linear", shape, 5)
    x_0 = pred.x_0.requires_grad_()
    support = BOUNDED[name](shape)
    low, high = limits(support, x_0)
    assert torch.equal(gradient(pred.projected(support).x_0, x_0), ((x_0 >= low) & (x_0 <= high)).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUNDED)
def test_straight_through_has_the_projections_values_and_the_identitys_gradients(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    pred = prediction(kind, shape, 5)
    output = pred.x_0.clone().requires_grad_()
    x_t = latents(5, *shape, seed=3)
    belief = pred.schedule.prediction(output, x_t, pred.t, "x_0")
    support = BOUNDED[name](shape)
    plain, through = belief.projected(support), belief.projected(support, straight_through=True)
    assert torch.equal(through.x_0, plain.x_0)
    assert torch.equal(through.x_0, support.project(output))
    assert torch.equal(through.eps, plain.eps)
    assert torch.equal(gradient(through.x_0, output), torch.ones_like(output))
    torch.testing.assert_close(gradient(through.eps, output), gradient(belief.eps, output))  # −α/σ
    alpha, sigma = pred.schedule(pred.t, x_t)
    both = gradient(alpha * through.x_0 + sigma * through.eps, output)  # x_t does not move with the output
    torch.testing.assert_close(both, torch.zeros_like(both), atol=1e-6, rtol=0)


# Each kind


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", [*SHAPES, (1,)])
def test_dynamic_percentile_equals_imagens(shape: tuple[int, ...], b: int, quantile: float) -> None:
    for bound in (0.7, 1.0, 2.5):
        x_0 = latents(b, *shape, dtype=torch.float64) * torch.linspace(0.2, 6, b, dtype=torch.float64).reshape(-1, *(1,) * len(shape))
        rows = x_0.flatten(1).numpy()
        s = np.maximum(np.quantile(np.abs(rows), quantile, axis=1, keepdims=True), bound)
        theirs = torch.from_numpy(np.clip(rows, -s, s) * bound / s).reshape(x_0.shape)
        torch.testing.assert_close(DynamicPercentile(quantile, bound).project(x_0), theirs, atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(DynamicPercentile(quantile, bound).project(x_0.float()), theirs.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dynamic_percentile_divides_by_its_bound_exactly(dtype: torch.dtype) -> None:
    for bound in range(1, 200):  # bound · (1/bound) is not 1 for 41 in float32, nor for 49 in float64
        x_0 = bound * torch.linspace(-1, 1, 50, dtype=dtype)[None]
        assert torch.equal(DynamicPercentile(bound=float(bound)).project(x_0), x_0)


def test_dynamic_percentile_leaves_the_faultless_samples_of_a_batch() -> None:
    x_0 = torch.stack([torch.linspace(-1, 1, 10), torch.linspace(-4, 4, 10)])
    projected = DynamicPercentile(1.0).project(x_0)
    assert torch.equal(projected[0], x_0[0])
    torch.testing.assert_close(projected[1], x_0[1] / 4)


@pytest.mark.parametrize(
    ("x", "folded"),
    [
        (1.2, 0.8),
        (3.0, -1.0),
        (-1.5, -0.5),
        (5.0, 1.0),
        (-3.0, 1.0),
        (-5.0, -1.0),
        (1.0, 1.0),
        (-1.0, -1.0),
        (2.0, 0.0),
        (0.3, 0.3),
        (6.5, -0.5),
    ],
)
def test_reflection_by_hand(x: float, folded: float) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        for bound in (1.0, 2.5):
            ours = Folded(bound).project(torch.tensor([[bound * x]], dtype=dtype))
            assert float(ours) == pytest.approx(bound * folded, abs=bound * tolerance)


def test_reflection_bounces_until_it_is_inside() -> None:
    x_0, bound = 5 * latents(4, 7, dtype=torch.float64), 0.7
    bounced = x_0.clone()
    for _ in range(50):
        bounced = torch.where(bounced > bound, 2 * bound - bounced, bounced)
        bounced = torch.where(bounced < -bound, -2 * bound - bounced, bounced)
    torch.testing.assert_close(Folded(bound).project(x_0), bounced, atol=1e-13, rtol=0)


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_quantiles_clamp_the_axis_after_the_batch(shape: tuple[int, ...], b: int) -> None:
    support, x_0 = channel_box(shape), 2 * latents(b, *shape)
    theirs = np.stack([np.clip(x_0[:, c].numpy(), *np.float32([support.low[c], support.high[c]])) for c in range(shape[0])], axis=1)
    assert torch.equal(support.project(x_0), torch.from_numpy(theirs))
    assert ChannelQuantiles(torch.tensor(support.low), torch.tensor(support.high)).project(x_0).shape == x_0.shape


def test_channel_quantiles_are_uploaded_once_for_each_device_and_precision() -> None:
    support, x_0 = ChannelQuantiles((-1.0, -0.5), (1.0, 0.5)), latents(3, 2)

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    for like in (x_0, x_0.half(), x_0.to("meta")):
        with Copies() as copies:
            for _ in range(3):
                support.project(like)
        assert copies.count == 1


# Data inside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_leaves_the_exact_posterior_mean_of_data_inside(shape: tuple[int, ...], kind: Kind) -> None:
    means = torch.stack([torch.full(shape, 0.5), torch.full(shape, -0.5)])
    expert = GaussianMixtureExpert(means, 0.05, schedule=kind)
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(1, expert.schedule.t_max, 64).round()
    x_0, _ = expert.sample_data(64, generator)
    pred = expert.predict(expert.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t), t)
    wall = torch.ones(shape[0])
    for support in (Box(1.0), DynamicPercentile(), Folded(1.0), ChannelQuantiles(-wall, wall)):
        projected = pred.projected(support)
        assert torch.equal(projected.x_0, pred.x_0)
        assert torch.equal(projected.eps, pred.eps)
    meter = CountingSupport(Box(1.0))
    pred.projected(meter)
    assert float(meter.pop_fraction()) == 0


# The meter


@pytest.mark.parametrize("name", ["box", "dynamic", "channels", "folded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_meter_projects_as_its_support_and_tells_the_share_moved(shape: tuple[int, ...], name: str) -> None:
    support = BOUNDED[name](shape)
    meter = CountingSupport(support)
    assert math.isnan(float(meter.pop_fraction()))
    moved = seen = 0
    for b in BATCHES:
        x_0 = latents(b, *shape, seed=b)
        projected = meter.project(x_0)
        assert torch.equal(projected, support.project(x_0))
        moved += int((projected != x_0).sum())
        seen += x_0.numel()
    share = meter.pop_fraction()
    assert share.shape == ()
    assert 0 < moved < seen or name == "dynamic"
    assert float(share) == pytest.approx(moved / seen)
    assert math.isnan(float(meter.pop_fraction()))


def test_a_meter_counts_entries_across_batches_of_different_size() -> None:
    meter = CountingSupport(Box(1.0))
    meter.project(torch.tensor([[2.0, 0.0]]))
    meter.project(torch.zeros(3, 2))
    assert float(meter.pop_fraction()) == 1 / 8
    meter.project(torch.tensor([[-3.0, 1.0]]))
    assert float(meter.pop_fraction()) == 1 / 2


def test_a_meter_around_all_of_space_sees_and_moves_nothing() -> None:
    meter = CountingSupport(Unbounded())
    meter.project(10 * latents(3, 2))
    assert float(meter.pop_fraction()) == 0


# The config and what it builds


def corners(shape: tuple[int, ...]) -> GaussianMixtureExpert:
    return GaussianMixtureExpert(torch.stack([torch.full(shape, 0.5), torch.full(shape, -0.25)]), [0.05, 0.2], [1.0, 3.0])


def test_each_kind_builds_its_support() -> None:
    expert = corners((2,))
    expert.support = Box(3.0)
    built = {kind: build_support(Thresholding(kind=kind, bound=2.0, quantile=0.9), expert) for kind in get_args(SupportKind)}
    channels = built.pop("quantile")
    assert built == {
        "expert": expert.support,
        "none": Unbounded(),
        "static": Box(2.0),
        "dynamic": DynamicPercentile(0.9, 2.0),
        "reflection": Folded(2.0),
    }
    assert isinstance(channels, ChannelQuantiles)


@pytest.mark.parametrize("quantile", [0.6, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_calibrated_on_data_are_numpys(shape: tuple[int, ...], quantile: float) -> None:
    expert, config = corners(shape), Thresholding(kind="quantile", quantile=quantile, samples=77)
    support = build_support(config, expert, seed=5)
    assert isinstance(support, ChannelQuantiles)
    x_0 = expert.sample_data(77, torch.Generator().manual_seed(5))[0].numpy()
    for c in range(shape[0]):
        assert support.high[c] == pytest.approx(np.quantile(x_0[:, c], quantile), abs=1e-6)
        assert support.low[c] == pytest.approx(np.quantile(x_0[:, c], 1 - quantile), abs=1e-6)
    assert support == build_support(config, expert, seed=5)
    assert quantile == 1.0 or support != build_support(config, expert, seed=6)


def test_quantiles_calibrated_on_the_teacher_are_those_of_its_samples() -> None:
    asked = []

    def sample(n: int) -> Tensor:
        asked.append(n)
        return torch.arange(n * 3.0).reshape(n, 3)

    support = build_support(
        Thresholding(kind="quantile", quantile=1.0, calibrate_on="teacher", samples=5), Dataless([[0.0] * 3], 1.0), sample
    )
    assert asked == [5]
    assert support == ChannelQuantiles((0.0, 1.0, 2.0), (12.0, 13.0, 14.0))


def test_quantiles_of_constant_channels_hold_them_there() -> None:
    data = torch.tensor([[1.0, 0.1]]).expand(9, 2)
    support = ChannelQuantiles.calibrated(data, 0.995)
    assert torch.equal(support.project(data), data)
    assert torch.equal(support.project(data + 1), data)


def test_the_ablation_is_one_list_of_roles() -> None:
    for roles in ((), ("teacher",), ("student",), ("teacher", "student"), get_args(Role)):
        assert Thresholding(roles=roles).roles == roles


# The record


@pytest.mark.parametrize(
    "support",
    [
        Unbounded(),
        Box(0.1),
        DynamicPercentile(0.9973, 1 / 3),
        ChannelQuantiles(torch.tensor([-0.1, -1 / 3]), (0.1, math.pi)),
        Folded(0.7),
    ],
    ids=lambda support: type(support).__name__,
)
def test_a_support_survives_json_number_for_number(support: Support) -> None:
    again = support_from_dict(json.loads(json.dumps(support_to_dict(support))))
    assert again == support
    x_0 = 3 * latents(5, 2)
    assert torch.equal(again.project(x_0), support.project(x_0))
    assert support_to_dict(CountingSupport(CountingSupport(support))) == support_to_dict(support)


def test_the_record_names_the_kinds_of_the_config() -> None:
    supports = (Unbounded(), Box(), DynamicPercentile(), ChannelQuantiles((0.0,), (1.0,)), Folded())
    assert {"expert", *(support_to_dict(support)["kind"] for support in supports)} == set(get_args(SupportKind))


def test_a_support_of_another_class_is_not_stored() -> None:
    class Ball:
        def project(self, x_0: Tensor) -> Tensor:
            return x_0 / x_0.flatten(1).norm(dim=1).clamp(min=1)[:, None]

    with pytest.raises(ValueError, match="Ball cannot be stored; supports that can: Unbounded, Box, DynamicPercentile"):
        support_to_dict(CountingSupport(Ball()))


@pytest.mark.parametrize("stored", [{"kind": "ball"}, {"kind": "expert"}, {"kind": ["static"]}, {"bound": 1.0}, {}, None, [1]])
def test_a_record_of_unknown_kind_is_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown kind of support .*; choose one of: none, static, dynamic, quantile, reflection"):
        support_from_dict(stored)


@pytest.mark.parametrize(
    "stored",
    [
        {"kind": "static", "bound": "wide"},
        {"kind": "static", "bound": None},
        {"kind": "static", "bound": -1.0},
        {"kind": "static", "radius": 1.0},
        {"kind": "reflection", "bound": math.nan},
        {"kind": "dynamic", "quantile": 2.0},
        {"kind": "quantile", "low": [0.0]},
        {"kind": "quantile", "low": [0.0], "high": None},
        {"kind": "quantile", "low": [0.0], "high": ["one"]},
        {"kind": "quantile", "low": [0.0], "high": [[1.0], [2.0, 3.0]]},
        {"kind": "quantile", "low": [0.0], "high": [1.0, 2.0]},
        {"kind": "quantile", "low": [2.0], "high": [1.0]},
        {"kind": "none", "bound": 1.0},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"damaged support \{'kind': "):
        support_from_dict(stored)


# Refusals


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bounds_that_are_not_positive_and_finite_are_refused(bound: float) -> None:
    for make in (Folded, lambda bound: DynamicPercentile(bound=bound), lambda bound: Thresholding(bound=bound)):
        with pytest.raises(ValueError, match=r"bound=.*: need a positive, finite half-width"):
            make(bound)


@pytest.mark.parametrize("quantile", [0.0, -0.5, 1.1, math.nan])
def test_quantiles_that_are_none_are_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"quantile=.*: need 0 < quantile ≤ 1"):
        DynamicPercentile(quantile)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ((0.0,), (1.0, 2.0), r"low of shape \(1,\), high of shape \(2,\): need one number a channel in each"),
        ((), (), "need one number a channel in each"),
        (0.0, 1.0, "need one number a channel in each"),
        (torch.zeros(2, 2), torch.ones(2, 2), "need one number a channel in each"),
        ((0.0, 1.0), (1.0, 0.5), r"channel 1: low=1.0, high=0.5; need finite numbers with low ≤ high"),
        ((0.0, math.nan), (1.0, 1.0), "channel 1: low=nan"),
        ((-math.inf,), (1.0,), "channel 0: low=-inf"),
        ((0.0,), (math.inf,), "channel 0: low=0.0, high=inf"),
    ],
)
def test_channel_intervals_that_are_none_are_refused(low: Any, high: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelQuantiles(low, high)


def test_samples_of_another_number_of_channels_are_refused() -> None:
    for support in (ChannelQuantiles((0.0,), (1.0,)), ChannelQuantiles((0.0,) * 3, (1.0,) * 3)):
        with pytest.raises(ValueError, match=r"x_0 of shape \(3, 2, 8\): this support was made for \d channels, the axis after the batch"):
            support.project(torch.zeros(3, 2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clip"}, r"unknown thresholding.kind 'clip'; choose one of: expert, none, static, dynamic, quantile, reflection"),
        ({"roles": ("teacher", "expert")}, r"unknown thresholding.roles 'expert'; choose one of: teacher, target, student, critic"),
        ({"roles": ("teacher", "teacher")}, r"thresholding.roles=\['teacher', 'teacher'\]: name each role once"),
        ({"calibrate_on": "student"}, r"unknown thresholding.calibrate_on 'student'; choose one of: data, teacher"),
        ({"bound": 0.0}, r"thresholding.bound=0.0: need a positive, finite half-width"),
        ({"quantile": 0.5}, r"thresholding.quantile=0.5: need 0.5 < quantile ≤ 1"),
        ({"quantile": 1.01}, r"thresholding.quantile=1.01: need 0.5 < quantile ≤ 1"),
        ({"quantile": math.nan}, r"thresholding.quantile=nan: need 0.5 < quantile ≤ 1"),
        ({"samples": 1}, r"thresholding.samples=1: need 2 … 1,000,000"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Thresholding(**options)


def test_calibration_without_data_names_the_cure() -> None:
    expert = Dataless([[0.0, 0.0]], 1.0)
    with pytest.raises(NoDataError, match=r"Dataless brings none; calibrate on the teacher's samples: --thresholding.calibrate_on teacher"):
        build_support(Thresholding(kind="quantile"), expert)
    for kind in set(get_args(SupportKind)) - {"quantile"}:  # no other kind asks for data
        build_support(Thresholding(kind=kind), expert)


def test_calibration_on_a_teacher_that_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate_on='teacher' needs the teacher's samples; pass sample="):
        build_support(Thresholding(kind="quantile", calibrate_on="teacher"), corners((2,)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_calibration_on_samples_that_are_not_finite_is_refused(value: float) -> None:
    data = latents(1000, 2)
    data[3, 1] = value  # one in a thousand, which the quantiles alone would pass over
    with pytest.raises(ValueError, match="the samples to calibrate the support on are not all finite"):
        build_support(Thresholding(kind="quantile", calibrate_on="teacher"), corners((2,)), lambda n: data)
