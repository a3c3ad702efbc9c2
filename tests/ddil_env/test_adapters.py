"""Facts about LoRA students: they start as their teacher, own none of its weights, and leave as pipelines and as a file of adapters."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import assert_same_samples
from safetensors.torch import load_file
from tiny_pipelines import WRITERS
from tiny_sd import WORDS, write_tiny_sd
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ddil_agents import (
    DMD2,
    LCM,
    Algorithm,
    BCConfig,
    BehaviourCloning,
    Beta,
    Dagger,
    DaggerConfig,
    DMD2Config,
    dagger,
)
from ddil_agents.commands.load import load_run
from ddil_agents.devices import sharding
from ddil_agents.training.stages import iter_learners, plan_stages
from ddil_env import GaussianMixtureExpert, NetworkDenoiser, check_expert, load_expert
from ddil_env.adapters import LORA_FILE, LoRA, SharedWeight, adapter_layers, add_adapters, merge_adapters
from ddil_env.policy import StudentPolicy
from ddil_env.rollout import unroll
from ddil_env.time_grid import TimeGrid

WRITE = {"sd15": write_tiny_sd, **WRITERS}
FAMILIES = tuple(WRITE)
RANK_4 = LoRA(rank=4)
SMALL: dict[str, Any] = {
    "num_updates": 4,
    "num_steps": 2,
    "teacher_steps": 4,
    "batch_size": 4,
    "collect_size": 8,
    "updates_per_collect": 2,
    "warmup_updates": 0,
    "learning_rate": 1e-2,
    "ema": 0.5,
    "lora": RANK_4,
}
OWN = Beta(0, 0, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITE.items()}


def opened(folders: dict[str, Path], family: str, **given: Any) -> Any:
    prompts = {} if family in ("dit", "ddpm") else {"prompts": WORDS}
    return load_expert(family, model=str(folders[family]), **prompts, **given)


@pytest.fixture(scope="module")
def experts(folders: dict[str, Path]) -> dict[str, Any]:
    return {family: opened(folders, family) for family in FAMILIES} | {"digits8": load_expert("digits8")}


@pytest.fixture
def sd(experts: dict[str, Any]) -> Any:
    return experts["sd15"]


def states(expert: Any, n: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    x_t = torch.randn(n, *expert.sample_shape, generator=torch.Generator().manual_seed(1))
    return x_t, torch.full((n,), 500.0), torch.arange(n) % expert.num_conditions if expert.num_conditions else None


def moved(student: NetworkDenoiser, scale: float = 0.05) -> NetworkDenoiser:
    """A student that has left its teacher."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return student


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)


# One backbone


@pytest.mark.parametrize("family", [*FAMILIES, "digits8"])
def test_a_student_starts_as_its_teacher_bit_for_bit_and_owns_adapters_alone(family: str, experts: dict[str, Any]) -> None:
    expert = experts[family]
    student = expert.make_student(lora=RANK_4)
    x_t, t, c = states(expert)
    pred, teacher = student.predict(x_t, t, c), expert.predict(x_t, t, c)
    assert torch.equal(pred.x_0, teacher.x_0)
    assert torch.equal(pred.eps, teacher.eps)
    assert set(student.state_dict()) == {name for name, _ in student.named_parameters()}
    assert all(".lora_" in name for name in student.state_dict())
    layers = [m for m in expert.network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(adapter_layers(student.network)) == len(layers)
    check_expert(expert, student=student)


def test_copies_read_the_teachers_memory(sd: Any) -> None:
    theirs = {weight.data_ptr() for weight in (*sd.network.parameters(), *sd.network.buffers())}
    student = sd.make_student(lora=RANK_4)
    for each in (student, copy.deepcopy(student), copy.deepcopy(copy.deepcopy(student).eval().requires_grad_(False))):
        shared = [value for module in each.modules() for value in vars(module).values() if isinstance(value, SharedWeight)]
        assert {weight.data_ptr() for weight in shared} == theirs
        assert not theirs & {p.data_ptr() for p in each.parameters()}
    assert not any(isinstance(value, SharedWeight) for module in sd.network.modules() for value in vars(module).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_backbone_stays_and_its_adapters_are_in_float32(dtype: str, folders: dict[str, Path]) -> None:
    half = opened(folders, "sd15", dtype=dtype)
    student = half.make_student(lora=RANK_4)
    x_t, t, c = states(half)
    assert torch.equal(student.predict(x_t, t, c).x_0, half.predict(x_t, t, c).x_0)
    assert {p.dtype for p in half.network.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        (Dagger, {"beta": OWN}),
        (LCM, {"beta": OWN, "inference_steps": (2,), "collect_size": 8}),
        (DMD2, {"beta": OWN, "critic_updates": 2}),
        (Dagger, {"beta": OWN, "mixed_precision": "bf16", "gradient_accumulation": 2, "student": {"gradient_checkpointing": True}}),
    ],
)
def test_training_moves_every_role_but_the_teacher(agent: type[Algorithm], settings: dict[str, Any], sd: Any) -> None:
    before = weights_of(sd.network)
    learner = agent(sd, agent.Config(**{**SMALL, **settings}))
    start = {name: weights_of(network) for name, network in learner.networks.items()} | {"average": weights_of(learner.ema_student)}
    learner.learn(progress=False)
    after = {name: weights_of(network) for name, network in learner.networks.items()} | {"average": weights_of(learner.ema_student)}
    for role, weights in start.items():
        moved = [not torch.equal(weights[name], after[role][name]) for name in weights]
        assert sum(moved) > 0.9 * len(moved), role  # B in the first step, A from the second on
    assert_same(weights_of(sd.network), before)


def test_beta_1_0_0_is_behaviour_cloning_bit_for_bit() -> None:
    found = []
    for agent, config in ((BehaviourCloning, BCConfig), (Dagger, DaggerConfig)):
        learner = agent(load_expert("digits8"), config(**SMALL, beta=Beta(1, 0, 0))).learn(progress=False)
        found.append(learner.ema_student.state_dict())
    assert_same(*found)


def test_a_gan_loss_reaches_a_lora_student_through_a_lora_critic_that_stays() -> None:
    expert = load_expert("digits8")
    learner = DMD2(expert, DMD2Config(**SMALL, beta=OWN, gan_weight=1.0))
    critic = learner.networks["critic"]
    assert {name.split(".")[0] for name, _ in critic.named_parameters()} == {"head", "denoiser"}
    before = weights_of(critic)
    learner.trainer.collect()
    with learner.trainer.trainables["critic"].frozen():
        learner.trainer.trainables["student"].accumulate(learner.loss, learner.trainer.split_batch(learner.draw()))
    gradients = [p.grad for name, p in learner.networks["student"].named_parameters() if "lora_B" in name]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert all(p.grad is None for p in critic.parameters())
    assert_same(weights_of(critic), before)


# Runs


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_checkpoint_holds_adapters_alone_and_resumes_exactly(optimizer: str, tmp_path: Path) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = {**SMALL, "num_updates": 4, "batch_size": 2, "lora": LoRA(16), "optimizer": optimizer}
    config = DMD2Config(**settings, beta=OWN, gan_weight=0.5, critic_updates=2)
    whole = DMD2(load_expert("digits8"), config).learn(progress=False)
    learner = DMD2(load_expert("digits8"), config)
    for _ in range(2):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
    path = learner.save(tmp_path)
    state = torch.load(path / "state.pt", weights_only=True)
    assert all(".lora_" in name for name in state["trainables"]["student"]["network"])
    assert all(".lora_" in name for name in state["ema"] if name != "n_averaged")
    assert all(".lora_" in name or name.startswith("head.") for name in state["trainables"]["critic"]["network"])
    momenta = [value.dtype for value in tree_iter(state["trainables"]["student"]["optimizer"]["state"]) if isinstance(value, Tensor)]
    assert (torch.uint8 in momenta) == (optimizer == "adamw8bit")
    resumed = DMD2(load_expert("digits8"), config).load(tmp_path)
    resumed.train(progress=False)
    for name, trainable in whole.trainer.trainables.items():
        assert_same(trainable.unwrapped.state_dict(), resumed.networks[name].state_dict())
    assert_same(whole.ema_student.state_dict(), resumed.ema_student.state_dict())


def test_checkpointing_and_accumulation_change_memory_and_not_the_gradient(sd: Any) -> None:
    found = []
    for checkpointing, parts, lora in itertools.product((False, True), (1, 2), (None, RANK_4)):
        given = {"gradient_accumulation": parts, "student": {"gradient_checkpointing": checkpointing}, "lora": lora, "learning_rate": 1e-3}
        learner = Dagger(sd, DaggerConfig(**{**SMALL, **given}, beta=OWN))
        learner.trainer.collect()
        learner.trainer.trainables["student"].accumulate(learner.loss, learner.trainer.split_batch(learner.draw()))
        found.append((lora, [p.grad for p in learner.networks["student"].parameters()]))
    for lora in (None, RANK_4):
        first, *others = [gradient for of, gradient in found if of == lora]
        for other in others:
            for ours, theirs in zip(first, other, strict=True):
                assert (ours - theirs).norm() <= 1e-4 * ours.norm()


def test_stages_go_on_from_adapters_with_adapters_as_the_teacher() -> None:
    expert = load_expert("digits8")
    before = weights_of(expert.network)
    stages = ({"num_steps": 2}, {"num_steps": 1, "updates_per_collect": 4})
    config = DaggerConfig(**SMALL, beta=OWN, stages=stages)
    found = []
    for _, learner in iter_learners(Dagger, expert, plan_stages(config)):
        if found:
            assert_same(learner.networks["student"].state_dict(), found[0])
            x_t, t, c = states(expert)
            assert not torch.equal(learner.expert.predict(x_t, t, c).x_0, expert.predict(x_t, t, c).x_0)
        learner.train(progress=False)
        found.append(weights_of(learner.ema_student))
    assert len(found) == 2
    assert_same(weights_of(expert.network), before)


def test_a_command_trains_resumes_and_starts_from_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    env = {"expert": "ddil_env.experts.stable_diffusion.StableDiffusion", "model": str(folders["sd15"]), "prompts": WORDS}
    plain = {name: value for name, value in SMALL.items() if name != "lora"}
    config = plain | {"env": env | {"guidance_scale": 1.0}, "beta": {"forward": 0, "student": 1}, "evaluate": {"n": 10, "n_action": 4}}
    (tmp_path / "plain.yaml").write_text(json.dumps(config))
    argv = ["--config", str(tmp_path / "plain.yaml"), "--lora.rank", "4"]
    dagger.main([*argv, "--out", str(tmp_path / "first")])
    first = load_run(tmp_path / "first")
    assert first.config.lora == RANK_4
    assert adapter_layers(first.ema_student.network)
    assert (tmp_path / "first" / "student" / LORA_FILE).is_file()
    given = {**SMALL, "init": str(tmp_path / "first")}
    second = Dagger(opened(folders, "sd15"), DaggerConfig(**given, beta=OWN))
    assert_same(second.ema_student.state_dict(), first.ema_student.state_dict())
    full = Dagger(opened(folders, "sd15"), DaggerConfig(**{**given, "lora": None}, beta=OWN))  # any student is read whole
    x_t, t, c = states(full.expert)
    torch.testing.assert_close(full.ema_student.predict(x_t, t, c).x_0, first.ema_student.predict(x_t, t, c).x_0, atol=1e-4, rtol=1e-4)


# Export


def subject(family: str) -> dict[str, Any]:
    return {"class_labels": [0, 1, 2]} if family == "dit" else {"batch_size": 3} if family == "ddpm" else {"prompt": WORDS}


def ends(pipeline: Any, family: str, **arguments: Any) -> Tensor:
    """The latents that a pipeline's scheduler ends with, from the noise of seed 7."""
    kept: list[Tensor] = []
    step = pipeline.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        kept.append(output[0])
        return output

    pipeline.scheduler.step = recorded
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    pipeline(**subject(family), output_type="pt", **arguments)
    pipeline.scheduler.step = step
    return kept[-1][:3]


def ours(expert: Any, student: NetworkDenoiser, w: float | None = None) -> Tensor:
    x_T = torch.randn(3, *expert.sample_shape, generator=torch.Generator().manual_seed(7))
    return unroll(StudentPolicy(student, expert, guidance_scale=w), TimeGrid(expert.schedule, 2), x_T, states(expert)[2])[:, -1]


def call(expert: Any, family: str) -> dict[str, Any]:
    steps = {"sigmas": [1.0, 0.5]} if family == "sd3" else {"num_inference_steps": 2}
    return steps | ({} if family == "ddpm" else {"guidance_scale": 1.0})


def absent(family: str) -> dict[str, Any]:
    return {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}


@pytest.mark.parametrize("lora", [RANK_4, LoRA(rank=3, alpha=1.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_is_a_pipeline_and_its_file_makes_one_of_the_teachers(
    family: str, lora: LoRA, experts: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    expert = experts[family]
    before = weights_of(expert.network)
    student = moved(expert.make_student(lora=lora))
    expert.save_student(student, tmp_path, num_steps=2)
    samples = ours(expert, student)
    whole = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True, **absent(family))
    assert_same_samples(samples, ends(whole, family, **call(expert, family)))
    teacher = DiffusionPipeline.from_pretrained(folders[family], use_safetensors=True, **absent(family))
    teacher.scheduler = whole.scheduler
    assert (samples - ends(teacher, family, **call(expert, family))).abs().max() > 1e-2  # it has left its teacher
    if hasattr(teacher, "load_lora_weights"):
        teacher.load_lora_weights(tmp_path)
        assert_same_samples(samples, ends(teacher, family, **call(expert, family)))
    again = expert.load_student(tmp_path, lora=lora)
    assert_same(again.state_dict(), student.state_dict())
    assert_same(weights_of(expert.network), before)


@pytest.mark.parametrize("family", ["sd15", "ssd1b"])
def test_a_guidance_embedding_is_learned_whole_and_no_lora_file_passes_without_it(
    family: str, experts: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    expert = experts[family]
    student = moved(expert.make_student(lora=RANK_4, guidance_embedding=True))
    assert [name for name in student.state_dict() if ".lora_" not in name] == ["network.unet.time_embedding.cond_proj.weight"]
    expert.save_student(student, tmp_path, num_steps=2)
    whole = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    theirs = [ends(whole, family, num_inference_steps=2, guidance_scale=w) for w in (1.0, 3.0)]
    for w, samples in zip((1.0, 3.0), theirs, strict=True):
        assert_same_samples(ours(expert, student, w), samples)
    assert not torch.allclose(*theirs, atol=1e-3)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        DiffusionPipeline.from_pretrained(folders[family]).load_lora_weights(tmp_path)
    assert f"`{LORA_FILE}` holds the guidance embedding too" in (tmp_path / "README.md").read_text()
    assert_same(expert.load_student(tmp_path, lora=RANK_4, guidance_embedding=True).state_dict(), student.state_dict())


def test_embedded_experts_save_what_was_learned(tmp_path: Path) -> None:
    expert = load_expert("digits8")
    student = moved(expert.make_student(lora=RANK_4, guidance_embedding=True))
    expert.save_student(student, tmp_path, num_steps=2)
    assert set(load_file(tmp_path / "student.safetensors")) == set(student.state_dict())
    assert_same(expert.load_student(tmp_path, lora=RANK_4, guidance_embedding=True).state_dict(), student.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        expert.load_student(tmp_path)


def test_merged_weights_are_w_plus_alpha_over_r_b_a() -> None:
    teacher = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3, bias=False)).requires_grad_(False)
    network = add_adapters(teacher, LoRA(rank=2, alpha=6.0))
    with torch.no_grad():
        for p in network.parameters():
            p.normal_()
    plain = copy.deepcopy(teacher)
    merge_adapters(network, plain)
    for name, layer in adapter_layers(network).items():
        low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(plain.get_submodule(name).weight, teacher.get_submodule(name).weight + 3 * high @ low)
    x = torch.randn(4, 5)
    torch.testing.assert_close(network(x), plain(x))


# What is refused


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(rank=2), r"other adapters: 'unet.*' is \(4, 4, 3, 3\) there, \(2, 4, 3, 3\) here"),
        (LoRA(rank=4, alpha=8.0), r"lora\.alpha=4, not 8"),
        (LoRA(rank=4, target_modules=("to_q",)), "absent here; pass the lora"),
    ],
)
def test_adapters_of_another_kind_are_refused(lora: LoRA, message: str, sd: Any, tmp_path: Path) -> None:
    sd.save_student(moved(sd.make_student(lora=RANK_4)), tmp_path, num_steps=2)
    with pytest.raises(ValueError, match=message):
        sd.load_student(tmp_path, lora=lora)


def test_a_full_student_and_adapters_of_another_teacher_are_refused(sd: Any, tmp_path: Path) -> None:
    sd.save_student(sd.make_student(), tmp_path / "full", num_steps=2)
    with pytest.raises(ValueError, match=f"no weights at .*{LORA_FILE}"):
        sd.load_student(tmp_path / "full", lora=RANK_4)
    other = load_expert("sd15", model=str(write_tiny_sd(tmp_path / "other", seed=1)), prompts=WORDS)
    other.save_student(moved(other.make_student(lora=RANK_4)), tmp_path / "theirs", num_steps=2)
    with pytest.raises(ValueError, match="trained over other weights; pass the model"):
        sd.load_student(tmp_path / "theirs", lora=RANK_4)
    assert not adapter_layers(sd.load_student(tmp_path / "theirs").network)


def test_settings_are_refused_by_name(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lora\.rank=0: need at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match=r"lora\.alpha=0: need a positive"):
        LoRA(alpha=0)
    with pytest.raises(ValueError, match=r"lora\.target_modules=\('to_x',\).*null adapts every"):
        sd.make_student(lora=LoRA(target_modules=("to_x",)))
    with pytest.raises(ValueError, match=r"channels=\[8, 8\].*leave channels out, or lora"):
        load_expert("digits8").make_student(channels=[8, 8], lora=RANK_4)
    mixture = GaussianMixtureExpert([[-0.8, 0.2], [0.8, -0.4]], 0.2)
    with pytest.raises(ValueError, match=r"student=\{'lora': LoRA\(rank=4.*students take .*width.*; leave out the rest"):
        Dagger(mixture, DaggerConfig(**SMALL, beta=OWN))
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; choose one of: adamw, adamw8bit"):
        DaggerConfig(optimizer="sgd")  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'ddil\[lora\]', or set lora to null"):
            Dagger(sd, DaggerConfig(**SMALL, beta=OWN))
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match=r"pip install 'ddil\[8bit\]', or set it to adamw"):
            Dagger(sd, DaggerConfig(**{**SMALL, "lora": None}, beta=OWN, optimizer="adamw8bit"))
        patch.setattr(sharding, "is_requested", lambda: True)
        for changed in ({}, {"lora": None, "optimizer": "adamw8bit"}):
            with pytest.raises(ValueError, match="set lora to null and optimizer to adamw, or do not shard"):
                Dagger(sd, DaggerConfig(**{**SMALL, **changed}, beta=OWN))


def test_a_config_of_plain_values_is_one_of_adapters() -> None:
    stages = ({"lora": {"rank": 8, "alpha": 2.0}}, {"lora": {"rank": 8, "target_modules": ["to_q"]}})
    found = [stage.config.lora for stage in plan_stages(DaggerConfig(beta=OWN, num_steps=2, teacher_steps=2, stages=stages))]
    assert found == [LoRA(8, 2.0), LoRA(8, None, ("to_q",))]
    assert dataclasses.asdict(DaggerConfig(lora=RANK_4, beta=OWN))["lora"] == {"rank": 4, "alpha": None, "target_modules": None}
