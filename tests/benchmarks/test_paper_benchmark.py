"""The benchmark of the paper's methods: the teacher's stochastic sampler, and what its runs are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paper import Stochastic, plan, summary

from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.checks import check_command_line
from ddil_agents.commands.parse import build_config as settings_of
from ddil_agents.commands.parse import parse
from ddil_agents.training.stages import plan_stages as stages_of
from ddil_env import ExpertPolicy, GaussianMixtureExpert, TimeGrid
from ddil_env.support import Box


def test_stochastic_steps_of_a_point_mass_keep_the_forward_marginals() -> None:
    x_0 = torch.tensor([[0.7, -0.3]])
    expert = GaussianMixtureExpert(means=x_0, stds=torch.tensor([1e-6]), weights=torch.ones(1))
    grid, n, policy = TimeGrid(expert.schedule, 4), 20_000, Stochastic(expert, 1)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    for t, s in zip(grid.times[:-1], grid.times[1:], strict=True):
        before, x = x, policy.act(x, t.expand(n), s.expand(n))
        alpha, sigma = expert.schedule(s[None], x)
        torch.testing.assert_close(x.mean(0), alpha[0] * x_0[0], atol=0.03, rtol=0)  # four standard errors
        torch.testing.assert_close(x.std(0), sigma[0].expand(2), atol=0.02, rtol=0)
        if s > 0:  # DDIM would keep the noise: correlation 1
            assert abs(float(torch.corrcoef(torch.stack([before[:, 0], x[:, 0]]))[0, 1])) < 0.9
        else:
            torch.testing.assert_close(x, ExpertPolicy(expert).act(before, t.expand(n), s.expand(n)))


def test_stochastic_steps_start_from_estimates_inside_the_support() -> None:
    x_0 = torch.tensor([[1.7, -0.3]])
    expert = GaussianMixtureExpert(means=x_0, stds=torch.tensor([1e-6]), weights=torch.ones(1))
    expert.support = Box(1.0)
    grid, n = TimeGrid(expert.schedule, 4), 20_000
    x_T, (t, s) = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), (time.expand(n) for time in grid.times[:2])
    x = Stochastic(expert, 1).act(x_T, t, s)
    alpha, sigma = expert.schedule(grid.times[:2, None], x)  # (2, 1): at t and at s
    within = torch.tensor([1.0, -0.3])
    # ε̂ is what x_t leaves beside the projected x̂_0: its mean is −(α_t/σ_t) x̂_0, since x_T has mean 0.
    eta = sigma[1] / sigma[0] * (1 - (alpha[0] / alpha[1]) ** 2).sqrt()
    mean = alpha[1] * within - (sigma[1] ** 2 - eta**2).sqrt() * alpha[0] / sigma[0] * within
    torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)  # four standard errors
    last, end = (time.expand(n) for time in grid.times[-2:])
    torch.testing.assert_close(Stochastic(expert, 1).act(x_T, last, end), within.expand(n, 2))


def test_every_method_has_its_baseline_and_both_variants_in_every_seed() -> None:
    runs = plan(["pd", "lcm", "dmd2", "small"], [0, 1])
    assert len({run.folder for run in runs}) == len(runs) == 2 * (3 + 3 + 12 + 3 + 3)
    for method in ("pd", "lcm", "dmd2"):
        assert {run.variant for run in runs if run.method == method} >= {"baseline", "+ DDIL", "+ Reflected + DDIL"}


def test_both_have_two_parts_and_ddil_comes_in_the_second(tmp_path: Path) -> None:
    for run in (run for run in plan(["pd", "lcm"], [0]) if run.variant in ("baseline", "+ DDIL")):
        _, _, module, *arguments = run.command(tmp_path / run.folder)
        agent = find_agent(module.rpartition(".")[2])
        check_command_line(agent, arguments)  # builds every stage
        parser, cfg = parse(agent, arguments)
        stages = [stage.config for stage in stages_of(settings_of(agent, parser, cfg))]
        firsts, seconds = stages[::2], stages[1::2]
        assert [stage.num_steps for stage in firsts] == [stage.num_steps for stage in seconds]
        assert all(stage.beta.student == 0 for stage in firsts)
        assert all(stage.beta.student == (0.5 if "DDIL" in run.variant else 0) for stage in seconds)
        assert all(stage.p_expert == (0.5 if run.method == "pd" and "DDIL" in run.variant else 0) for stage in seconds)
        assert stages[0].guidance_scale == 3.0


def test_differences_are_paired_by_seed() -> None:
    found = summary({s: {"pd baseline @4": {"frechet": 2.0 + s}, "pd + DDIL @4": {"frechet": 1.5 + s}} for s in (0, 1, 2)})
    mean, half, values = found["paired"]["pd + DDIL @4 − baseline"]["frechet"]
    assert (mean, half) == (pytest.approx(-0.5), pytest.approx(0))
    assert values == [-0.5] * 3
