"""The Gaussian mixture, an expert in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import SHAPES, latents, random_mixture

from ddil_env import GaussianMixtureExpert, load_expert


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mixture_score_is_the_gradient_of_its_log_density(shape: tuple[int, ...], schedule: Any) -> None:
    for labels in (None, [0, 1, 1, 2]):
        expert = random_mixture(shape, schedule=schedule, labels=labels)
        t = torch.tensor([1.0, 20, 300, 700, expert.schedule.t_max])
        c = None if labels is None else torch.tensor([0, 1, 2, 3, 1])  # 3 is "no class"
        alpha, sigma = expert.schedule(t, torch.zeros(5, *shape, dtype=torch.float64))
        x_t = (alpha * expert.sample_data(5, torch.Generator().manual_seed(2))[0] + sigma * latents(5, *shape)).requires_grad_()
        (score,) = torch.autograd.grad(expert.log_prob(x_t, t, c).sum(), x_t)
        pred = expert.predict(x_t.detach(), t, c)
        torch.testing.assert_close(-sigma * score, pred.eps, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(alpha * pred.x_0 + sigma * pred.eps, x_t.detach(), atol=1e-9, rtol=1e-9)


def test_mixture_log_density_equals_torch_distributions() -> None:
    expert = random_mixture((2,))
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
    labelled, plain = random_mixture(labels=[0, 1, 1, 2]), random_mixture()
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


def test_the_mixtures_student_takes_every_condition_of_its_env():
    expert = load_expert("gaussian_mixture")
    student = expert.make_student(width=8, depth=1)
    x_t, t = torch.randn(2, 2), torch.full((2,), 500.0)
    null = torch.full((2,), expert.null_condition)
    assert torch.equal(student.predict(x_t, t, None).x_0, student.predict(x_t, t, null).x_0)
