"""DMD2's times and rates against its published code, github.com/tianweiy/DMD2: main/sd_guidance.py and main/train_sd.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from ddil_agents import DMD2, BCConfig, DMD2Config
from ddil_agents.commands.parse import parse
from ddil_env import GaussianMixtureExpert

SMALL: dict[str, Any] = {
    "num_updates": 6,
    "num_steps": 2,
    "teacher_steps": 2,
    "batch_size": 4000,
    "critic_updates": 1,
    "student": {"width": 4, "depth": 1},
}


def matching(**changed: Any) -> DMD2:
    expert = GaussianMixtureExpert([[0.6, -0.2], [-0.7, 0.1]], 0.3)
    return DMD2(expert, DMD2Config(**{**SMALL, **changed}))


def asked(learner: DMD2) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """One update; the inputs and times of the critic, forward by forward, and of the teacher."""
    critic: list[tuple[Tensor, Tensor]] = []
    teacher: list[tuple[Tensor, Tensor]] = []
    network = learner.networks["critic"]
    hook = network.register_forward_pre_hook(lambda module, args: critic.append((args[0].detach(), args[1])))
    guided = learner.expert.guided

    def spy(x_t: Tensor, t: Tensor, *args: Any) -> Any:
        teacher.append((x_t, t))
        return guided(x_t, t, *args)

    learner.expert.guided = spy  # type: ignore[method-assign]
    learner.trainer.collect()
    learner.trainer.update(learner.draw())
    hook.remove()
    learner.expert.guided = guided  # type: ignore[method-assign]
    return critic, teacher


def assert_uniform(times: list[Tensor], low: int, high: int) -> None:
    """Every whole number from low to high, each as often, by χ² within five standard deviations."""
    counts = torch.bincount(torch.cat(times).long(), minlength=high + 1)
    assert int(counts[:low].sum()) == 0
    assert len(counts) == high + 1
    expected = int(counts.sum()) / (high + 1 - low)
    assert counts[low:].all()
    degrees = high - low
    assert abs(float((counts[low:] - expected).square().sum() / expected) - degrees) < 5 * math.sqrt(2 * degrees)


def test_matching_times_are_uniform_over_20_to_980_both_included() -> None:
    learner, times = matching(), []
    for _ in range(5):
        (_, t), *_ = asked(learner)[1]
        times.append(t)
    assert_uniform(times, 20, 980)


def test_the_critics_times_are_uniform_over_all_that_have_noise() -> None:
    learner = matching()
    assert_uniform([asked(learner)[0][-1][1] for _ in range(5)], 1, 999)


def test_the_students_adversarial_term_has_a_time_and_noise_of_its_own() -> None:
    learner, times, samples = matching(gan_weight=0.1), [], []
    generate = learner.generate

    def kept(batch: TensorDict) -> Tensor:
        samples.append(generate(batch))
        return samples[-1]

    def noise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = learner.expert.schedule(t, x_t)
        return (x_t - alpha * samples[-1].detach()) / sigma

    learner.generate = kept  # type: ignore[method-assign]
    for _ in range(5):
        critic, teacher = asked(learner)
        assert len(critic) == 3  # the student's two, and the critic's own
        (x_tau, tau), (x_judged, judged) = critic[:2]
        assert torch.equal(tau, teacher[0][1])  # the two scores are compared at one state
        assert torch.equal(x_tau, teacher[0][0])
        noisy = judged > 100
        both = torch.stack([noise(x_tau, tau)[noisy, 0], noise(x_judged, judged)[noisy, 0], tau[noisy], judged[noisy]])
        assert float((torch.corrcoef(both) - torch.eye(4)).abs().max()) < 0.1
        times.append(judged)
    assert_uniform(times, 0, 999)


def test_the_critics_three_terms_have_times_of_their_own() -> None:
    learner = matching(gan_weight=0.1)
    parts: list[list[Tensor]] = [[], [], []]
    for _ in range(5):
        critic, _ = asked(learner)
        assert len(critic) == 3  # the student's two, and one for all three terms
        for part, t in zip(parts, critic[2][1].chunk(3), strict=True):
            part.append(t)
    for part, low in zip(parts, (1, 0, 0), strict=True):
        assert_uniform(part, low, 999)
    correlation = torch.corrcoef(torch.stack([torch.cat(part) for part in parts]))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.05


def test_without_the_gan_loss_the_critic_is_asked_once_a_step() -> None:
    critic, teacher = asked(matching())
    assert (len(critic), len(teacher)) == (2, 1)


@pytest.mark.parametrize("kind", ["v", "eps", "x_0"])
def test_a_clean_sample_can_be_judged(kind: str) -> None:
    learner = matching(gan_weight=1.0, batch_size=8, student={"width": 4, "depth": 1, "prediction_type": kind})
    diffusion = learner.draw_noise
    learner.draw_noise = lambda x, low, high: diffusion(x, low, high if low else 0)  # type: ignore[method-assign]  # all at 0
    learner.learn(progress=False)
    for trainable in learner.trainer.trainables.values():
        assert all(p.isfinite().all() for p in trainable.weights)


def rates(learner: DMD2, updates: int) -> tuple[list[float], list[float]]:
    """Of the student and of the critic, step by step of each."""
    found: tuple[list[float], list[float]] = [], []
    for i in range(updates):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
        if i % learner.config.critic_updates == 0:
            found[0].append(learner.trainer.trainables["student"].last_learning_rate)
        found[1].append(learner.trainer.trainables["critic"].last_learning_rate)
    return found


def test_rates_stay_after_a_warm_up_that_counts_updates() -> None:
    course = {"critic_updates": 3, "warmup_updates": 7, "num_updates": 24, "learning_rate": 4e-3, "critic_learning_rate": 8e-3}
    learner = matching(batch_size=2, **course)
    student, critic = rates(learner, 24)
    assert student == pytest.approx([1e-3, 2e-3, 3e-3] + [4e-3] * 5)  # 3 of its steps are in the first 7 updates
    assert critic == pytest.approx([1e-3 * n for n in range(1, 8)] + [8e-3] * 17)


@pytest.mark.parametrize("flags", ["", "--config demo", "--critic_updates 5 --num_updates 500"], ids=["defaults", "demo", "benchmark"])
def test_a_short_run_spends_less_than_a_quarter_of_the_students_steps_below_its_rate(flags: str) -> None:
    _, given = parse(DMD2, ["--env", "gaussian_mixture", *flags.split()])
    learner = matching(batch_size=2, **{name: given[name] for name in ("num_updates", "critic_updates", "warmup_updates")})
    student, _ = rates(learner, given["num_updates"])
    below = sum(rate < learner.config.learning_rate for rate in student)
    assert 0 < below < 0.25 * len(student)


def test_a_linear_rate_is_still_to_be_had_and_an_unknown_one_refused() -> None:
    student, _ = rates(matching(batch_size=2, lr_scheduler="linear", warmup_updates=0, num_updates=4, learning_rate=4e-3), 4)
    assert student == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert BCConfig().lr_scheduler == "linear"
    with pytest.raises(ValueError, match="unknown lr_scheduler 'cosine'; choose one of: linear, constant"):
        replace(BCConfig(), lr_scheduler="cosine")
