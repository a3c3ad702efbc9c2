"""What check_expert accepts and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SHAPES, Scaled, preset, random_mixture
from torch import Tensor, nn

from ddil_env import Expert, GaussianMixtureExpert, NetworkDenoiser, NoiseSchedule, Prediction, check_expert


@pytest.mark.parametrize("name", ["gaussian_mixture", "digits", "digits8"])
def test_every_shipped_expert_conforms(name: str) -> None:
    check_expert(preset(name))


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine", "flow"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (8,)], ids=[*SHAPES, "as wide as the largest batch"])
def test_mixtures_of_every_shape_and_schedule_conform(shape: tuple[int, ...], schedule: Any) -> None:
    check_expert(random_mixture(shape, schedule=schedule))
    check_expert(random_mixture(shape, schedule=schedule, labels=[0, 1, 1, 0]))


def test_a_short_chain_conforms() -> None:
    check_expert(random_mixture(schedule=NoiseSchedule(num_train_steps=3)))


def bent(x_0: Callable[[Tensor], Tensor] = lambda v: v, eps: Callable[[Tensor], Tensor] = lambda v: v) -> Scaled:
    return Scaled(lambda pred: Prediction(x_0(pred.x_0), eps(pred.eps), pred.t, pred.schedule))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (bent(x_0=lambda v: v[:, :1]), r"Scaled: predict on a batch of 1 gave x_0 of shape \(1, 1\); need x_t's, \(1, 3\)"),
        (bent(eps=lambda v: v.sum(1)), r"gave eps of shape \(1,\)"),
        (bent(x_0=lambda v: v * math.nan), "gave NaN or infinite x_0"),
        (bent(eps=lambda v: v / 0), "gave NaN or infinite eps"),
        (bent(x_0=lambda v: v.bfloat16()), "gave x_0 as torch.bfloat16; need float32 or wider"),
        (bent(eps=lambda v: v.half()), "gave eps as torch.float16"),
        (bent(x_0=lambda v: v + 0.1), r"breaks α_t x_0 \+ σ_t eps = x_t by .*build it with schedule.prediction"),
        (bent(eps=lambda v: v.flip(0)), r"on a batch of 3 breaks α_t x_0 \+ σ_t eps"),  # right for one sample, wrong for more
        (bent(x_0=lambda v: v.clone().requires_grad_()), "gave x_0 with a gradient; an expert is fixed"),
        (Scaled(lambda pred: pred.x_0), "predict on a batch of 1 returned Tensor; return a ddil_env.Prediction"),
    ],
)
def test_check_expert_refuses_a_bad_prediction(expert: Scaled, message: str) -> None:
    check_expert(Scaled())  # it is the bend that is refused
    with pytest.raises(ValueError, match=message):
        check_expert(expert)


def test_check_expert_refuses_a_prediction_that_changes() -> None:
    noise = torch.Generator().manual_seed(0)

    def jitter(pred: Prediction) -> Prediction:
        drift = 1e-3 * torch.randn(pred.x_0.shape, generator=noise)
        return Prediction(pred.x_0 + drift, pred.eps, pred.t, pred.schedule)

    with pytest.raises(ValueError, match="predict is not deterministic; put networks in eval mode"):
        check_expert(Scaled(jitter))


def test_check_expert_refuses_what_is_no_expert() -> None:
    with pytest.raises(TypeError, match=r"got Linear; an expert subclasses ddil_env.Expert"):
        check_expert(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_check_expert_refuses_an_expert_that_is_not_set_up() -> None:
    class Bare(Scaled):
        def __init__(self) -> None:
            pass

    with pytest.raises(ValueError, match=r"Bare: no `schedule`; call super\(\).__init__"):
        check_expert(Bare())

    class OwnSchedule(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = "cosine"  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"`schedule` must be a ddil_env.NoiseSchedule"):
        check_expert(OwnSchedule())


def test_check_expert_refuses_bad_conditions_pictures_supports_and_students() -> None:
    class Floats(Scaled):
        def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.rand(n)

    with pytest.raises(ValueError, match=r"sample_condition gave c as torch.float32 \(1,\); need int64 \(1,\)"):
        check_expert(Floats(num_conditions=3))
    with pytest.raises(ValueError, match="sample_condition must give None for c exactly if the expert is unconditional"):
        check_expert(Floats())

    class Beyond(Scaled):
        def sample_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.full((n,), 3)

    with pytest.raises(ValueError, match="condition ids must be 0 … 2"):
        check_expert(Beyond(num_conditions=3))

    class Floating(Scaled):
        def decode(self, x_0: Tensor) -> Tensor:
            return torch.zeros(len(x_0), 8, 8, 3)

    with pytest.raises(ValueError, match=r"decode gave torch.float32 \(3, 8, 8, 3\); need uint8 \(3, height, width, 3\) or None"):
        check_expert(Floating())

    class Shrinking:
        def project(self, x_0: Tensor) -> Tensor:
            return x_0 / 2

    with pytest.raises(ValueError, match=r"support.project must leave what it has projected"):
        check_expert(Scaled(support=Shrinking()))

    class Frozen(Scaled):
        def make_student(self, *args: Any, **overrides: Any) -> NetworkDenoiser:
            network = nn.Identity()
            return NetworkDenoiser(type("Net", (nn.Module,), {"forward": lambda self, x, t, c: network(x)})(), self.schedule, "v")

    with pytest.raises(ValueError, match="the student has no gradient"):
        check_expert(Frozen())


def test_an_expert_without_axes_is_refused() -> None:
    class Flat(Scaled):
        def __init__(self, shape: tuple[int, ...]) -> None:
            Expert.__init__(self, NoiseSchedule(), shape)

    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="need a tuple of at least one axis, each of length 1 or more"):
            Flat(shape)


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (torch.full((3, 2), torch.nan), "NaN or infinite data"),
        (torch.zeros(3, 3), r"x_0 of shape \(3, 3\); need \(3, 2\)"),
        (torch.zeros(3, 2, dtype=torch.float64), "float64; need float32"),
        (torch.zeros(1, 2), r"x_0 of shape \(1, 2\); need \(3, 2\)"),
    ],
)
def test_check_expert_refuses_bad_data(x_0, message):
    class BadData(GaussianMixtureExpert):
        def sample_data(self, n, generator=None):
            return (x_0 if n == 3 else torch.zeros(n, 2)), None

    with pytest.raises(ValueError, match=message):
        check_expert(BadData([[0.0, 1.0]], 0.1))
