"""The gradient of distribution matching, in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import STUDENT, critic, flow, matching, stream
from torch import Tensor, nn

from ddil_agents import DMD2
from ddil_agents.states.batch import Batch
from ddil_env import GaussianMixtureExpert, NetworkDenoiser

pytestmark = pytest.mark.usefixtures("own_generator")


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


def with_exact_critic(shift: float, scale: float, **changed: Any) -> DMD2:
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


def loss_and_gradient(learner: DMD2) -> tuple[Tensor, Tensor, Tensor]:
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
    tau, eps = learner.draw_noise(torch.zeros(20000, 3), 20, 980)
    assert (tau.min(), tau.max()) == (20, 980)
    assert torch.equal(tau, tau.round())
    assert float(tau.mean()) == pytest.approx(500, abs=4 * 277 / math.sqrt(20000))
    assert eps.shape == (20000, 3)
    tau, _ = learner.draw_noise(torch.zeros(20000, 3), 1, 999)
    assert (tau.min(), tau.max()) == (1, 999)
    tau, _ = matching(flow()).draw_noise(torch.zeros(20000, 3), 1, 1000)
    assert 1 <= tau.min() < 1.5
    assert 999 < tau.max() <= 1000
