"""Facts about guidance: students that are told the scale, what they start as, what they are read as, and experts made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LatentConsistencyModelPipeline, StableDiffusionPipeline
from helpers import assert_same_samples
from tiny_sd import write_tiny_sd
from torch import Tensor, nn

from ddil_agents import BCConfig
from ddil_env import Expert, ExpertPolicy, GaussianMixtureExpert, NetworkDenoiser, StudentPolicy, TimeGrid, check_expert, unroll
from ddil_env.experts.digits import Digits
from ddil_env.experts.distilled import Distilled
from ddil_env.experts.gaussian_mixture import Grid25
from ddil_env.experts.stable_diffusion import StableDiffusion
from ddil_env.guidance import GUIDANCE_FEATURES, guidance_features, zero_projection

FAMILIES = ("mixture", "digits8", "sd")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expert]:
    folder = write_tiny_sd(tmp_path_factory.mktemp("sd"), "v_prediction")
    return {
        "mixture": Grid25(guidance_scale=2.0),
        "digits8": Digits("digits8", guidance_scale=2.0),
        "sd": StableDiffusion(str(folder), ["a red bee", "two seas", "an elk"]),
    }


@pytest.fixture(params=FAMILIES)
def expert(request: pytest.FixtureRequest, experts: dict[str, Expert]) -> Expert:
    return experts[request.param]


def states(expert: Expert, n: int = 5, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x_t, t, c and guidance scales w ∈ [1, 15)."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, *expert.sample_shape, generator=generator)
    t = torch.randint(1, 1000, (n,), generator=generator).float()
    return x_t, t, expert.sample_condition(n, generator), 1 + 14 * torch.rand(n, generator=generator)


def seeded(expert: Expert, **options: Any) -> NetworkDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return expert.make_student(**options)


def trained(expert: Expert, **options: Any) -> NetworkDenoiser:
    """A student that has left its start, its guidance embedding too."""
    student = seeded(expert, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return student


def projection_of(student: NetworkDenoiser) -> nn.Parameter:
    ((_, weight),) = [(name, p) for name, p in student.named_parameters() if name.endswith("cond_proj.weight")]
    return weight


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    return torch.equal(a.x_0, b.x_0) and torch.equal(a.eps, b.eps)


# The features of w


@pytest.mark.parametrize("pipeline", [LatentConsistencyModelPipeline, StableDiffusionPipeline])
def test_features_are_those_of_diffusers_pipelines(pipeline: Any) -> None:
    w = torch.tensor([1.0, 2.0, 7.5, 8.25, 15.0])
    theirs = pipeline.get_guidance_scale_embedding(None, w - 1, GUIDANCE_FEATURES)
    torch.testing.assert_close(guidance_features(w), theirs, atol=1e-6, rtol=0)


def test_no_guidance_is_the_zero_phase() -> None:
    assert torch.equal(guidance_features(torch.ones(2)), torch.cat([torch.zeros(2, 128), torch.ones(2, 128)], dim=1))


def test_the_projection_starts_at_zero_and_can_leave_it() -> None:
    projection = zero_projection(7)
    assert projection.bias is None
    output = projection(guidance_features(torch.tensor([3.0])))
    assert torch.equal(output, torch.zeros(1, 7))
    output.sum().backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.abs().min() > 0


# Students that are told w


@pytest.mark.parametrize("name", ["digits8", "sd"])
def test_a_told_student_starts_as_its_teacher_for_every_scale(name: str, experts: dict[str, Expert]) -> None:
    expert = experts[name]
    student = expert.make_student(guidance_embedding=True).eval()
    x_t, t, c, w = states(expert)
    with torch.no_grad():
        assert equal(student.predict(x_t, t, c, w), expert.predict(x_t, t, c))
        assert equal(student.predict(x_t, t, c, torch.ones_like(t)), expert.predict(x_t, t, c))


def test_a_told_student_starts_as_one_that_is_not_told(expert: Expert) -> None:
    plain, told = seeded(expert), seeded(expert, guidance_embedding=True)
    assert (plain.guidance_embedding, told.guidance_embedding) == (False, True)
    x_t, t, c, w = states(expert)
    assert equal(told.predict(x_t, t, c, w), plain.predict(x_t, t, c))
    assert set(told.state_dict()) - set(plain.state_dict()) == {n for n in told.state_dict() if n.endswith("cond_proj.weight")}


def test_one_optimiser_step_teaches_a_student_its_scale(expert: Expert) -> None:
    student = seeded(expert, guidance_embedding=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    x_t, t, c, w = states(expert)
    student.predict(x_t, t, c, w).x_0.square().mean().backward()
    gradient = projection_of(student).grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    optimizer.step()
    with torch.no_grad():
        low, high = (student.predict(x_t, t, c, torch.full_like(t, scale)).x_0 for scale in (2.0, 9.0))
    assert ((low - high).flatten(1).abs().amax(1) > 0).all()


def test_each_sample_is_told_its_own_scale(expert: Expert) -> None:
    student = trained(expert, guidance_embedding=True).eval()
    x_t, t, c, w = states(expert)
    with torch.no_grad():
        together = student.predict(x_t, t, c, w).x_0
        for i in range(len(w)):
            alone = student.predict(x_t[i : i + 1], t[i : i + 1], None if c is None else c[i : i + 1], w[i : i + 1]).x_0
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-3, rtol=1e-4)


def test_one_call_leaves_nothing_for_the_next(experts: dict[str, Expert]) -> None:
    student = trained(experts["digits8"], guidance_embedding=True).eval()
    x_t, t, c, w = states(experts["digits8"])
    with torch.no_grad():
        first = student.predict(x_t, t, c, w)
        with pytest.raises(RuntimeError):
            student.predict(x_t, t, c, w[:2])  # a batch that does not fit fails inside the network
        assert not equal(student.predict(x_t, t, c, w + 1), first)
        assert equal(student.predict(x_t, t, c, w), first)


def test_a_copy_of_a_told_student_is_told_too(expert: Expert) -> None:
    student = trained(expert, guidance_embedding=True).eval()
    twin = copy.deepcopy(student)
    x_t, t, c, w = states(expert)
    with torch.no_grad():
        assert equal(twin.predict(x_t, t, c, w), student.predict(x_t, t, c, w))
        projection_of(student).zero_()
        assert not equal(twin.predict(x_t, t, c, w), student.predict(x_t, t, c, w))


def test_a_told_student_saves_and_loads_bit_for_bit(expert: Expert, tmp_path: Path) -> None:
    student = trained(expert, guidance_embedding=True, prediction_type="eps")
    expert.save_student(student, tmp_path, num_steps=4)
    again = expert.load_student(tmp_path, guidance_embedding=True, prediction_type="eps")
    assert (again.guidance_embedding, again.prediction_type) == (True, "eps")
    x_t, t, c, w = states(expert)
    with torch.no_grad():
        assert equal(again.eval().predict(x_t, t, c, w), student.eval().predict(x_t, t, c, w))
    with pytest.raises(ValueError, match=r"cond_proj|guidance_embedding=True, not False"):
        expert.load_student(tmp_path, prediction_type="eps")


def test_a_told_digits_student_may_have_other_channels(experts: dict[str, Expert]) -> None:
    student = experts["digits8"].make_student(channels=(8, 16), guidance_embedding=True)
    x_t, t, c, w = states(experts["digits8"])
    assert student.predict(x_t, t, c, w).x_0.shape == x_t.shape
    assert projection_of(student).shape == (8, GUIDANCE_FEATURES)


def test_a_scale_that_is_missing_or_not_asked_for_is_refused(expert: Expert) -> None:
    x_t, t, c, w = states(expert)
    with pytest.raises(ValueError, match=r"has a guidance embedding; pass w"):
        expert.make_student(guidance_embedding=True).predict(x_t, t, c)
    with pytest.raises(ValueError, match="has no guidance embedding; leave w out, or build it with guidance_embedding=True"):
        expert.make_student().predict(x_t, t, c, w)


# What a student's output is read as


@pytest.mark.parametrize("name", ["digits8", "sd"])
@pytest.mark.parametrize("kind", ["eps", "x_0"])
def test_the_output_of_a_v_teachers_weights_is_read_as_asked(name: str, kind: Any, experts: dict[str, Expert]) -> None:
    expert = experts[name]
    student = expert.make_student(prediction_type=kind).eval()
    x_t, t, c, _ = states(expert)
    with torch.no_grad():
        assert torch.equal(student.predict(x_t, t, c).output(kind), student.network(x_t, t, c))
        torch.testing.assert_close(student.network(x_t, t, c), expert.predict(x_t, t, c).v, atol=1e-4, rtol=1e-4)
    assert expert.make_student().prediction_type == "v"


def test_a_type_that_the_schedule_does_not_hold_for_is_refused_before_building(expert: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "deepcopy", None)  # a call would raise
    for kind, message in (("flow", "'flow' does not go with"), ("score", "unknown prediction type 'score'")):
        with pytest.raises(ValueError, match=message):
            expert.make_student(prediction_type=kind)
    flow = GaussianMixtureExpert([[0.0, 1.0], [1.0, 0.0]], 0.1, schedule="flow")
    with pytest.raises(ValueError, match="'v' does not go with the 'flow' schedule"):
        flow.make_student(prediction_type="v")


@pytest.mark.parametrize("options", [{"depth": 0}, {"width": 0}])
def test_a_mixtures_student_without_hidden_layers_is_refused(options: dict[str, int], experts: dict[str, Expert]) -> None:
    with pytest.raises(ValueError, match="at least one hidden layer"):
        experts["mixture"].make_student(**options)


# What a discriminator reads


@pytest.mark.parametrize(("name", "shape"), [("mixture", (5, 32)), ("digits8", (5, 64, 4, 4)), ("sd", (5, 32, 4, 4))])
def test_critic_features_are_a_layer_of_the_students_network(name: str, shape: tuple[int, ...], experts: dict[str, Expert]) -> None:
    expert, seen = experts[name], []
    student = expert.make_student(**({"width": 32} if name == "mixture" else {}))
    expert.critic_features(student).register_forward_hook(lambda module, args, output: seen.append(output))
    x_t, t, c, _ = states(expert)
    student.predict(x_t, t, c)
    ((features,),) = [seen]
    assert features.shape == shape
    features.sum().backward()
    assert any(p.grad is not None for p in student.parameters())


def test_critic_features_of_a_strange_network_are_refused(expert: Expert) -> None:
    student = expert.make_student()
    student.network = nn.Identity()
    with pytest.raises(ValueError, match=r"cannot take features of a Identity; a student of .* is a"):
        expert.critic_features(student)


# A student as the next expert


@pytest.mark.parametrize("told", [False, True])
def test_a_distilled_expert_conforms(expert: Expert, told: bool) -> None:
    check_expert(Distilled(expert, trained(expert, guidance_embedding=told)))


def test_a_distilled_expert_predicts_as_its_student(expert: Expert) -> None:
    student = trained(expert).eval()
    distilled = Distilled(expert, student)
    x_t, t, c, _ = states(expert)
    with torch.no_grad():
        assert equal(distilled.predict(x_t, t, c), student.predict(x_t, t, c))
    assert equal(distilled.guided(x_t, t, c), distilled.predict(x_t, t, c))
    assert distilled.guidance_scale == 1


def test_a_told_distilled_expert_tells_its_scale(expert: Expert) -> None:
    student = trained(expert, guidance_embedding=True).eval()
    x_t, t, c, w = states(expert)
    own, other = Distilled(expert, student), Distilled(expert, student, guidance_scale=5.0)
    assert (own.guidance_scale, other.guidance_scale) == (expert.guidance_scale, 5.0)
    with torch.no_grad():
        for distilled, scale in ((own, expert.guidance_scale), (other, 5.0)):
            expected = student.predict(x_t, t, c, torch.full_like(t, scale))
            assert equal(distilled.predict(x_t, t, c), expected)
            assert equal(distilled.guided(x_t, t, c), expected)
        assert equal(own.guided(x_t, t, c, 3.0), student.predict(x_t, t, c, torch.full_like(t, 3.0)))
        assert equal(own.guided(x_t, t, c, w), student.predict(x_t, t, c, w))
        assert equal(own.guided(x_t, t, c, 1.0), student.predict(x_t, t, c, torch.ones_like(t)))


@pytest.mark.parametrize("told", [False, True])
def test_a_distilled_expert_takes_one_forward_a_sample(expert: Expert, told: bool) -> None:
    distilled = Distilled(expert, expert.make_student(guidance_embedding=told))
    x_t, t, c, w = states(expert)
    calls: list[Callable[[], Any]] = [lambda: distilled.predict(x_t, t, c), lambda: distilled.guided(x_t, t, c, 1.0)]
    if told:
        calls += [lambda: distilled.guided(x_t, t, c, 3.0), lambda: distilled.guided(x_t, t, c, w)]
    before = expert.nfe
    for call in calls:
        distilled.nfe = distilled.student.nfe = 0
        assert not call().x_0.requires_grad
        assert (distilled.nfe, distilled.student.nfe) == (len(x_t), len(x_t))
    assert expert.nfe == before
    assert ExpertPolicy(distilled, substeps=3, guidance_scale=4.0 if told else None).nfe_per_action == 3


def test_a_student_that_is_not_told_refuses_other_scales(expert: Expert) -> None:
    distilled = Distilled(expert, expert.make_student())
    x_t, t, c, w = states(expert)
    built_in = "guidance_scale=.*this student has its teacher's guidance built in; use guidance_scale=1"
    refused: list[Callable[[], object]] = [
        lambda: distilled.guided(x_t, t, c, 2.0),
        lambda: distilled.guided(x_t, t, c, w),
        lambda: distilled.check_guidance(2.0),
        lambda: ExpertPolicy(distilled, guidance_scale=2.0),
        lambda: Distilled(expert, expert.make_student(), guidance_scale=2.0),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=built_in):
            call()
    assert distilled.nfe == 0
    assert equal(distilled.guided(x_t, t, c, torch.ones_like(w)), distilled.predict(x_t, t, c))
    with pytest.raises(ValueError, match="need a finite number"):
        Distilled(expert, expert.make_student(guidance_embedding=True), guidance_scale=float("nan"))


def test_a_distilled_expert_stands_still_while_its_student_learns(expert: Expert) -> None:
    student = expert.make_student()
    distilled = Distilled(expert, student)
    x_t, t, c, _ = states(expert)
    before = distilled.predict(x_t, t, c)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    assert equal(distilled.predict(x_t, t, c), before)
    assert not any(p.requires_grad for p in distilled.student.parameters())
    assert not distilled.student.training
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("told", [False, True])
def test_two_substeps_of_a_distilled_expert_are_two_steps_of_its_student(expert: Expert, told: bool) -> None:
    student = trained(expert, guidance_embedding=told).eval()
    policy = StudentPolicy(student, expert, expert.support, expert.guidance_scale if told else None)
    x_t, _, c, _ = states(expert)
    t, m, s = (torch.full((5,), time) for time in (999.0, 749.0, 499.0))
    x_s = policy.act(policy.act(x_t, t, m, c), m, s, c)
    assert torch.equal(ExpertPolicy(Distilled(expert, student), substeps=2).act(x_t, t, s, c), x_s)


def test_the_rest_of_a_distilled_expert_is_its_origins(expert: Expert, tmp_path: Path) -> None:
    distilled = Distilled(expert, expert.make_student())
    for field in ("schedule", "sample_shape", "num_conditions", "support", "device", "extractor", "max_batch"):
        assert getattr(distilled, field) is getattr(expert, field) or getattr(distilled, field) == getattr(expert, field), field
    assert distilled.null_condition is None
    student = seeded(distilled, guidance_embedding=True)
    assert distilled.critic_features(student) is expert.critic_features(student)
    distilled.save_student(student, tmp_path, 4, "dmd2", "renoise")
    again = distilled.load_student(tmp_path, guidance_embedding=True)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in student.state_dict().items())


def test_a_distilled_expert_can_be_distilled_again(experts: dict[str, Expert]) -> None:
    expert = experts["mixture"]
    first = Distilled(expert, trained(expert, guidance_embedding=True))
    second = Distilled(first, trained(first, guidance_embedding=True))
    assert second.guidance_scale == expert.guidance_scale
    x_T, _, c, _ = states(expert)
    grid = TimeGrid(expert.schedule, 4)
    ours, theirs = (unroll(ExpertPolicy(each), grid, x_T, c) for each in (first, second))
    assert torch.equal(ours, theirs)


# What values of w mean


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -3.0])
def test_a_scale_of_1_or_less_is_no_guidance_wherever_it_is_given(scale: float, experts: dict[str, Expert]) -> None:
    for name in ("digits8", "sd"):
        expert = experts[name]
        x_t, t, c, _ = states(expert)
        plain = expert.predict(x_t, t, c)
        expert.nfe = 0
        assert equal(expert.guided(x_t, t, c, scale), plain)
        assert expert.nfe == len(x_t)  # and costs no second forward
        mixed = expert.guided(x_t, t, c, torch.tensor([scale, 4.0, scale, 1.0, 4.0]))
        torch.testing.assert_close(mixed.x_0[[0, 2, 3]], plain.x_0[[0, 2, 3]], atol=1e-4, rtol=1e-4)
        assert expert.check_guidance(scale) == 1
        policy = ExpertPolicy(expert, guidance_scale=scale)
        assert (policy.guidance_scale, policy.nfe_per_action) == (1, 1)
    assert Digits("digits8", guidance_scale=scale).guidance_scale == 1
    assert Distilled(experts["sd"], experts["sd"].make_student(), guidance_scale=scale).guidance_scale == 1
    plain_expert = GaussianMixtureExpert([[0.0, 1.0], [1.0, 0.0]], 0.1)
    assert plain_expert.check_guidance(scale) == 1  # no null condition is needed


def test_a_scale_of_0_is_what_diffusers_pipeline_draws(experts: dict[str, Expert]) -> None:
    expert: Any = experts["sd"]
    pipeline = StableDiffusionPipeline.from_pretrained(expert.folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(3, *expert.sample_shape, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(list(expert.prompts), latents=x_T, num_inference_steps=4, guidance_scale=0.0, output_type="latent").images
    ours = unroll(ExpertPolicy(expert, guidance_scale=0.0), TimeGrid(expert.schedule, 4), x_T, torch.arange(3))[:, -1]
    assert_same_samples(ours, theirs)


def test_a_range_that_no_guidance_is_part_of_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_range=\(0.0, 4.0\): need two different, finite numbers from 1 on, the lower first"):
        BCConfig(guidance_range=(0.0, 4.0))
