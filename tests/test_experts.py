"""Facts about experts: the closed form, the contract and its checker, counting, weights files, presets, policies."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ddil_env.presets
from ddil_env import (
    DenoisingEnv,
    Expert,
    ExpertPolicy,
    GaussianMixtureExpert,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    TimeGrid,
    check_expert,
    load_expert,
    unroll,
)
from ddil_env.data.tensors import TensorData
from ddil_env.experts.digits import Digits, load_digits
from ddil_env.weights import load_weights, read_tensors

SHAPES: dict[str, tuple[int, ...]] = {"1-D": (1,), "2-D": (2,), "picture": (1, 4, 4), "video": (2, 3, 4, 4)}


def mixture(shape: tuple[int, ...] = (2,), k: int = 4, **options: Any) -> GaussianMixtureExpert:
    """k random components of unequal weights and widths."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(k, *shape, generator=generator, dtype=torch.float64)
    stds, weights = 0.1 + torch.rand(k, generator=generator), 0.2 + torch.rand(k, generator=generator)
    return GaussianMixtureExpert(means, stds, weights, **options)


@cache
def preset(name: str) -> Expert:
    return load_expert(name)


def latents(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The closed form


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mixture_score_is_the_gradient_of_its_log_density(shape: tuple[int, ...], schedule: Any) -> None:
    for labels in (None, [0, 1, 1, 2]):
        expert = mixture(shape, schedule=schedule, labels=labels)
        t = torch.tensor([1.0, 20, 300, 700, expert.schedule.t_max])
        c = None if labels is None else torch.tensor([0, 1, 2, 3, 1])  # 3 is "no class"
        alpha, sigma = expert.schedule(t, torch.zeros(5, *shape, dtype=torch.float64))
        x_t = (alpha * expert.sample_data(5, torch.Generator().manual_seed(2))[0] + sigma * latents(5, *shape)).requires_grad_()
        (score,) = torch.autograd.grad(expert.log_prob(x_t, t, c).sum(), x_t)
        pred = expert.predict(x_t.detach(), t, c)
        torch.testing.assert_close(-sigma * score, pred.eps, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(alpha * pred.x_0 + sigma * pred.eps, x_t.detach(), atol=1e-9, rtol=1e-9)


def test_mixture_log_density_equals_torch_distributions() -> None:
    expert = mixture((2,))
    t, x_t = torch.full((6,), 300.0), latents(6, 2, dtype=torch.float64)
    alpha, sigma = (float(a) for a in expert.schedule.coefficients(torch.tensor(300)))
    std = ((alpha * expert.stds) ** 2 + sigma**2).sqrt()
    components = torch.distributions.Independent(torch.distributions.Normal(alpha * expert.means, std[:, None]), 1)
    theirs = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=expert.log_weights), components)
    torch.testing.assert_close(expert.log_prob(x_t, t), theirs.log_prob(x_t))


def test_mixture_far_from_every_mode_is_finite() -> None:
    expert = GaussianMixtureExpert([[-1.0, 0.0], [1.0, 0.0]], 0.01)
    pred = expert.predict(torch.tensor([[1e4, -1e4], [-30.0, 0.0]]), torch.tensor([1.0, 1.0]))
    assert torch.isfinite(pred.x_0).all()
    assert pred.x_0[1, 0] < -1  # drawn to the near mode, beyond it


def test_a_class_predicts_its_own_components_alone() -> None:
    means, stds, labels = [[-2.0, 0.0], [2.0, 0.0], [2.5, 1.0], [0.0, 3.0]], [0.1, 0.2, 0.3, 0.4], [0, 1, 1, 2]
    whole = GaussianMixtureExpert(means, stds, [1, 2, 3, 4], labels=labels)
    x_t, t = latents(7, 2), torch.full((7,), 600.0)
    for k, members in ((0, [0]), (1, [1, 2]), (2, [3])):
        alone = GaussianMixtureExpert([means[i] for i in members], [stds[i] for i in members], [[1, 2, 3, 4][i] for i in members])
        c = torch.full((7,), k)
        torch.testing.assert_close(whole.predict(x_t, t, c).x_0, alone.predict(x_t, t).x_0)
        torch.testing.assert_close(whole.log_prob(x_t, t, c), alone.log_prob(x_t, t))
    mixed = whole.predict(x_t, t, torch.tensor([0, 1, 2, 0, 1, 2, 0])).x_0  # each row follows its own class
    torch.testing.assert_close(mixed[1], whole.predict(x_t[1:2], t[:1], torch.tensor([1])).x_0[0])


def test_no_condition_is_the_whole_mixture() -> None:
    labelled, plain = mixture(labels=[0, 1, 1, 2]), mixture()
    x_t, t = latents(5, 2), torch.full((5,), 400.0)
    null = torch.full((5,), 3)
    assert labelled.null_condition == 3
    assert torch.equal(labelled.predict(x_t, t).x_0, plain.predict(x_t, t).x_0)
    assert torch.equal(labelled.predict(x_t, t, null).x_0, plain.predict(x_t, t).x_0)


def test_mixture_samples_have_its_moments_and_classes() -> None:
    expert = GaussianMixtureExpert([[-2.0, 1.0], [3.0, 0.0], [0.0, 5.0]], [0.1, 0.5, 1.0], [1, 2, 5], labels=[0, 1, 1])
    n = 40_000
    x_0, c = expert.sample_data(n, torch.Generator().manual_seed(0))
    assert x_0.shape == (n, 2)
    assert x_0.dtype == torch.float32
    assert c is not None
    assert abs(float((c == 0).float().mean()) - 1 / 8) < 0.01
    ones = x_0[c == 0].double()  # class 0 is one Gaussian
    torch.testing.assert_close(ones.mean(0), torch.tensor([-2.0, 1.0], dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(ones.std(0), torch.full((2,), 0.1, dtype=torch.float64), atol=0.005, rtol=0)
    weights = torch.tensor([1, 2, 5], dtype=torch.float64) / 8
    mean = weights @ expert.means
    spread = weights @ (expert.means**2 + expert.stds[:, None] ** 2) - mean**2
    torch.testing.assert_close(x_0.double().mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(x_0.double().var(0), spread, atol=0.1, rtol=0)
    again, c_again = expert.sample_data(n, torch.Generator().manual_seed(0))
    assert torch.equal(again, x_0)
    assert c_again is not None
    assert torch.equal(c_again, c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[math.nan, 0.0]], 0.1), r"means of shape \(1, 2\): need finite numbers"),
        (([1.0, 2.0], 0.1), r"means of shape \(2,\): need finite numbers of shape \(k, d\) or \(k, \*sample_shape\)"),
        (([[0.0], [1.0]], [0.1]), r"stds=\[0.1\]: need 2 positive numbers, one a component"),
        (([[0.0], [1.0]], [0.1, -0.1]), r"stds=\[0.1, -0.1\]: need 2 positive numbers"),
        (([[0.0], [1.0]], 0.0), r"stds=\[0.0, 0.0\]: need 2 positive numbers"),
        (([[0.0], [1.0]], math.nan), r"stds=\[nan, nan\]: need 2 positive numbers"),
        (([[0.0], [1.0]], 0.1, [1.0, 0.0]), r"weights=\[1.0, 0.0\]: need 2 positive numbers"),
        (([[0.0], [1.0]], 0.1, [1.0]), r"weights=\[1.0\]: need 2 positive numbers"),
        (([[0.0], [1.0]], 0.1, None, "sigmoid"), "unknown schedule kind 'sigmoid'"),
        (
            ([[0.0], [1.0]], 0.1, None, "flow", [0, 2]),
            r"labels=\[0, 2\]: need 2 whole numbers, one a component, that use every class from 0",
        ),
        (([[0.0], [1.0]], 0.1, None, "flow", [0]), r"labels=\[0\]: need 2 whole numbers"),
        (([[0.0], [1.0]], 0.1, None, "flow", [-1, 0]), r"labels=\[-1, 0\]"),
        (
            ([[0.0], [1.0]], 0.1, None, "flow", None, 3.0),
            "guidance_scale=3.0: GaussianMixtureExpert has no null condition to guide against",
        ),
        (([[0.0], [1.0]], 0.1, None, "flow", None, 1.0, "cuda:99"), "device 'cuda:99' is not to be had: .*Available here: cpu"),
        (([[0.0], [1.0]], 0.1, None, "flow", None, 1.0, "gpu"), "device 'gpu' is not to be had"),
    ],
)
def test_bad_mixtures_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixtureExpert(*arguments)


def test_guidance_sharpens_a_class_against_the_whole() -> None:
    expert = GaussianMixtureExpert([[-1.0], [1.0]], 0.1, labels=[0, 1])
    x_t, t, c = torch.zeros(2, 1), torch.full((2,), 700.0), torch.tensor([0, 1])
    cond, null = expert.predict(x_t, t, c).x_0, expert.predict(x_t, t).x_0
    torch.testing.assert_close(expert.guided(x_t, t, c, 3.0).x_0, null + 3 * (cond - null))
    torch.testing.assert_close(expert.guided(x_t, t, c, torch.tensor([1.0, 3.0])).x_0[0], cond[0])
    with pytest.raises(ValueError, match="guidance needs a condition, and GaussianMixtureExpert was given none"):
        expert.guided(x_t, t, None, 3.0)


# The checker


@pytest.mark.parametrize("name", ["gaussian_mixture", "digits", "digits8"])
def test_every_shipped_expert_conforms(name: str) -> None:
    check_expert(preset(name))


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine", "flow"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (8,)], ids=[*SHAPES, "as wide as the largest batch"])
def test_mixtures_of_every_shape_and_schedule_conform(shape: tuple[int, ...], schedule: Any) -> None:
    check_expert(mixture(shape, schedule=schedule))
    check_expert(mixture(shape, schedule=schedule, labels=[0, 1, 1, 0]))


def test_a_short_chain_conforms() -> None:
    check_expert(mixture(schedule=NoiseSchedule(num_train_steps=3)))


class Scaled(Expert):
    """A conforming expert whose prediction a test may bend: posterior mean of N(0, I)."""

    def __init__(self, bend: Callable[[Prediction], Any] = lambda pred: pred, **options: Any) -> None:
        super().__init__(NoiseSchedule("cosine"), (3,), **options)
        self.bend = bend

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, _ = self.schedule(t, x_t)
        bent: Prediction = self.bend(self.schedule.prediction(alpha * x_t, x_t, t, "x_0"))
        return bent


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
    with pytest.raises(ValueError, match="sample_condition must give None for c exactly if num_conditions is 0"):
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


# Counting


def test_nfe_counts_samples_and_a_guided_pair_counts_two() -> None:
    expert = mixture(labels=[0, 1, 1, 2])
    x_t, t, c = latents(5, 2), torch.full((5,), 400.0), torch.tensor([0, 1, 2, 0, 1])
    for call, forwards in (
        (lambda: expert.predict(x_t, t, c), 5),
        (lambda: expert.guided(x_t, t, c, 1.0), 5),
        (lambda: expert.guided(x_t, t, c, 3.0), 10),
        (lambda: expert.guided(x_t, t, c, torch.full((5,), 3.0)), 10),
        (lambda: ExpertPolicy(expert, substeps=4, guidance_scale=3.0).act(x_t, t, torch.zeros(5), c), 40),
        (lambda: unroll(ExpertPolicy(expert, substeps=2), TimeGrid(expert.schedule, 3), x_t, c), 30),
    ):
        expert.nfe = 0
        call()
        assert expert.nfe == forwards


def test_a_chain_of_super_predict_counts_once_and_two_forwards_count_twice() -> None:
    class Derived(Scaled):
        def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
            return super().predict(x_t, t, c)

    class Further(Derived):
        def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
            return super().predict(x_t, t, c)

    class Inherits(Further):
        pass

    class Twice(Scaled):
        def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
            super().predict(x_t, t, c)
            return super().predict(x_t, t, c)

    for cls, forwards in ((Scaled, 4), (Derived, 4), (Further, 4), (Inherits, 4), (Twice, 8)):
        expert = cls()
        expert.predict(latents(4, 3), torch.full((4,), 400.0))
        assert expert.nfe == forwards, cls


def test_a_student_counts_its_own_forwards() -> None:
    expert = mixture()
    student = expert.make_student()
    student.predict(latents(5, 2), torch.full((5,), 400.0))
    assert (student.nfe, expert.nfe) == (5, 0)


def test_an_expert_runs_without_gradient() -> None:
    x_t = latents(2, 2).requires_grad_()
    assert not mixture().predict(x_t, torch.full((2,), 400.0)).x_0.requires_grad


# Students


@pytest.mark.parametrize(
    ("name", "options"), [("gaussian_mixture", {"width": 32, "depth": 2}), ("digits8", {}), ("digits8", {"channels": (8, 16)})]
)
def test_a_student_saves_and_loads_to_the_same_predictions(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expert = preset(name)
    student = expert.make_student(**options)
    expert.save_student(student, tmp_path, num_steps=4)
    again = expert.load_student(tmp_path, **options)
    x_t, c = latents(2, *expert.sample_shape), torch.tensor([1, 2])
    assert torch.equal(student.predict(x_t, torch.full((2,), 500.0), c).x_0, again.predict(x_t, torch.full((2,), 500.0), c).x_0)
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights at .*student.safetensors"):
        expert.load_student(tmp_path, **options)


def test_a_digits_student_starts_as_the_teacher() -> None:
    expert = preset("digits8")
    x_t, t, c = latents(2, 1, 8, 8), torch.full((2,), 500.0), torch.tensor([1, 2])
    with torch.no_grad():
        torch.testing.assert_close(expert.make_student().predict(x_t, t, c).x_0, expert.predict(x_t, t, c).x_0)


def test_an_expert_without_data_or_student_says_so() -> None:
    with pytest.raises(ValueError, match="Scaled brings no data"):
        Scaled().sample_data(3)
    with pytest.raises(ValueError, match=r"Scaled does not implement make_student\(\)"):
        Scaled().make_student()


# Digits


@pytest.mark.parametrize(("name", "size", "counts"), [("digits", 16, (3500, 800, 700)), ("digits8", 8, (900, 400, 497))])
def test_digits_splits_are_disjoint_and_cover_the_data(name: str, size: int, counts: tuple[int, ...]) -> None:
    splits = {split: load_digits(name, split) for split in ("train", "fit", "test")}  # type: ignore[arg-type]
    assert tuple(len(pictures) for pictures, _ in splits.values()) == counts
    for pictures, labels in splits.values():
        assert pictures.shape[1:] == (1, size, size)
        assert pictures.min() >= -1
        assert pictures.max() <= 1
        assert sorted(set(labels.tolist())) == list(range(10))
    rows = torch.cat([pictures.flatten(1) for pictures, _ in splits.values()])
    assert len(rows.unique(dim=0)) >= len(rows) - 5  # no picture is in two splits (MNIST holds a few twins of its own)


def test_reference_data_is_class_balanced() -> None:
    for held_out in (False, True):
        x_0, c = preset("digits8").reference_data(200, held_out)
        assert x_0.shape == (200, 1, 8, 8)
        assert c is not None
        assert c.bincount().tolist() == [20] * 10


def test_unknown_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown digits data set 'cifar'; choose one of: digits, digits8"):
        Digits("cifar")
    with pytest.raises(ValueError, match="unknown split 'valid'; choose one of: train, fit, test"):
        load_digits("digits8", "valid")  # type: ignore[arg-type]


# Weights files


def weights_of(name: str = "digits8") -> Path:
    return Path(ddil_env.presets.__file__).parent / "experts" / "weights" / f"{name}.safetensors"


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_weights_cut_short_are_refused_by_name(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(weights_of().read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path} is damaged or not a safetensors file .*fetch or train it again"):
        Digits("digits8", weights=str(path))


def test_a_pickle_is_refused_under_either_name(tmp_path: Path) -> None:
    for name, message in (
        ("mine.pt", "refusing to read weights from .*mine.pt: only .safetensors is read"),
        ("mine.safetensors", "is damaged"),
    ):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(ValueError, match=message):
            Digits("digits8", weights=str(tmp_path / name))


def test_absent_foreign_or_non_finite_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    with pytest.raises(ValueError, match=f"no weights at {path}"):
        Digits("digits8", weights=str(path))
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path} does not fit DigitsUNet"):
        Digits("digits8", weights=str(path))
    tensors = load_file(weights_of())
    tensors["unet.conv_in.bias"][0] = math.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{path} holds non-finite values in 'unet.conv_in.bias'"):
        Digits("digits8", weights=str(path))


def test_weights_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    save_file(source.state_dict(), path)
    load_weights(target, path)
    assert torch.equal(source.weight, target.weight)
    assert set(read_tensors(path)) == {"weight", "bias"}


# Data in memory


def test_bad_data_are_refused() -> None:
    x_0 = torch.zeros(4, 2)
    x_0[2, 1], x_0[3, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 4 samples hold NaN or infinite values, the first at 2; remove them"):
        TensorData(x_0)
    with pytest.raises(ValueError, match="the data set is empty"):
        TensorData(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="4 samples but 3 conditions"):
        TensorData(torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64))


def test_draws_keep_pairs_together() -> None:
    data = TensorData(torch.arange(6.0)[:, None], torch.arange(6))
    x_0, c = data.draw(50, torch.Generator().manual_seed(0))
    assert c is not None
    assert torch.equal(x_0[:, 0].long(), c)
    assert set(c.tolist()) == set(range(6))


# Policies


@pytest.mark.parametrize("substeps", [0, -1])
def test_an_action_needs_a_step(substeps: int) -> None:
    with pytest.raises(ValueError, match=f"substeps={substeps}: an action takes at least one step"):
        ExpertPolicy(mixture(), substeps=substeps)


def test_guidance_needs_a_null_condition() -> None:
    with pytest.raises(
        ValueError, match=r"guidance_scale=2.0: GaussianMixtureExpert has no null condition to guide against; use guidance_scale=1"
    ):
        ExpertPolicy(mixture(), guidance_scale=2.0)


def test_k_substeps_on_n_steps_are_the_experts_own_nk_step_sampler() -> None:
    expert = mixture(schedule="flow")  # whose grid is real, so that 4 × 3 and 12 steps share every time
    x_T = latents(5, 2)
    coarse = unroll(ExpertPolicy(expert, substeps=3), TimeGrid(expert.schedule, 4), x_T)
    fine = unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, 12), x_T)
    torch.testing.assert_close(coarse[:, 1:], fine[:, 3::3], atol=1e-5, rtol=1e-5)


def test_projection_of_the_policy_can_be_switched_off() -> None:
    expert = preset("digits8")
    x_t, t, s, c = 3 * latents(2, 1, 8, 8), torch.full((2,), 999.0), torch.zeros(2), torch.tensor([1, 2])
    inside, anywhere = (ExpertPolicy(expert, guidance_scale=9.0, project=project).act(x_t, t, s, c) for project in (True, False))
    assert inside.abs().max() <= 1
    assert anywhere.abs().max() > 1


# Finding experts


class Shrink(Expert):
    """A third party's expert: data N(0, scale²) in two dimensions."""

    def __init__(self, scale: float = 1.0, device: str = "cpu") -> None:
        super().__init__(NoiseSchedule("cosine"), (2,), device=device)
        self.scale = scale

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, sigma = self.schedule(t, x_t)
        x_0 = alpha * self.scale**2 / (alpha**2 * self.scale**2 + sigma**2) * x_t
        return self.schedule.prediction(x_0, x_t, t, "x_0")


@pytest.fixture
def shrink_yaml(tmp_path: Path) -> str:
    (tmp_path / "shrink.yaml").write_text(f"expert: {__name__}.Shrink\nscale: 0.5\n")
    return str(tmp_path / "shrink.yaml")


def test_a_third_partys_expert_needs_one_class_and_a_yaml_file(shrink_yaml: str) -> None:
    expert = load_expert(shrink_yaml)
    assert isinstance(expert, Shrink)
    assert (expert.scale, load_expert(shrink_yaml, scale=0.1).scale) == (0.5, 0.1)  # type: ignore[attr-defined]
    check_expert(expert)
    env = DenoisingEnv(shrink_yaml, num_steps=8, batch_size=[512])
    env.set_seed(0)
    rollout = env.rollout(8, ExpertPolicy(env.expert, substeps=4))
    assert float(rollout["next", "x_t"][:, -1].std()) == pytest.approx(0.5, abs=0.05)
    single = gymnasium.make("ddil/GaussianMixture-v0", expert=shrink_yaml, num_steps=2)
    observation, _ = single.reset(seed=0)
    assert set(observation) == {"x_t", "t", "s"}
    assert single.step(single.action_space.sample())[0]["t"] == 500
    batch = gymnasium.make_vec("ddil/GaussianMixture-v0", num_envs=3, expert=shrink_yaml)
    assert batch.reset(seed=0)[0]["x_t"].shape == (3, 2)


def test_an_installed_packages_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "shrink"

        def load(self) -> type[Expert]:
            return Shrink

    def entry_points(*, group: str) -> list[Point]:
        return [Point()] if group == "ddil.experts" else []

    monkeypatch.setattr(ddil_env.presets, "entry_points", entry_points)
    (tmp_path / "mine.yml").write_text("expert: shrink\nscale: 2\n")
    assert isinstance(load_expert(str(tmp_path / "mine.yml")), Shrink)
    (tmp_path / "mine.yml").write_text("expert: shrunk\n")
    with pytest.raises(ValueError, match=r"cannot find expert 'shrunk'; .* the entry point of a package that is installed: shrink"):
        load_expert(str(tmp_path / "mine.yml"))


def test_an_expert_passes_through_load_expert_as_it_is() -> None:
    expert = mixture()
    assert load_expert(expert) is expert
    with pytest.raises(ValueError, match=r"overrides \['device'\] cannot change an expert that exists already"):
        load_expert(expert, device="cpu")


def test_an_unknown_preset_lists_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # presets are found from any directory
    assert isinstance(load_expert("gaussian_mixture"), GaussianMixtureExpert)
    with pytest.raises(
        ValueError, match=r"unknown env 'sd51'; presets: .*digits, digits8, dit, gaussian_mixture, sd15.*Or pass a YAML path"
    ):
        load_expert("sd51")
    with pytest.raises(ValueError, match=r"no file 'absent.yaml'"):
        load_expert("absent.yaml")
    with pytest.raises(ValueError, match=r"unknown env '../env/digits'"):
        load_expert("../env/digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert: [", "is not valid YAML"),
        ("- a\n- b\n", "holds list, but a config is a mapping"),
        ("", "holds NoneType, but a config is a mapping"),
        ("scale: 2\n", "names no expert: it needs a line `expert: package.module.ClassName`"),
        ("expert: 3\n", "names no expert"),
        ("expert: nowhere.Mine\n", r"cannot find expert 'nowhere.Mine' \(No module named 'nowhere'\); pass a dotted path"),
        ("expert: ddil_env.Nope\n", "cannot find expert 'ddil_env.Nope'"),
        ("expert: Mine\n", "cannot find expert 'Mine'"),
        ("expert: torch.nn.Linear\n", "'torch.nn.Linear' is not a subclass of ddil_env.Expert"),
        (f"expert: {__name__}.Shrink\nsize: 3\n", r"Shrink: got an unexpected keyword argument 'size'; it takes scale, device"),
    ],
)
def test_bad_presets_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_expert(str(tmp_path / "mine.yaml"))


def test_a_preset_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine.yaml is not valid YAML"):
        load_expert(str(tmp_path / "mine.yaml"))


def test_an_expert_without_axes_is_refused() -> None:
    class Flat(Scaled):
        def __init__(self, shape: tuple[int, ...]) -> None:
            Expert.__init__(self, NoiseSchedule(), shape)

    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="need at least one axis, each of length 1 or more"):
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


def test_a_network_whose_output_would_broadcast_is_refused():
    schedule = NoiseSchedule("cosine")
    with pytest.raises(ValueError, match=r"output has shape \(4, 1\); need x_t's, \(4, 2\)"):
        schedule.prediction(torch.zeros(4, 1), torch.zeros(4, 2), torch.full((4,), 500.0), "v")


def test_the_mixtures_student_takes_every_condition_of_its_env():
    expert = load_expert("gaussian_mixture")
    student = expert.make_student(width=8, depth=1)
    x_t, t = torch.randn(2, 2), torch.full((2,), 500.0)
    null = torch.full((2,), expert.null_condition)
    assert torch.equal(student.predict(x_t, t, None).x_0, student.predict(x_t, t, null).x_0)
