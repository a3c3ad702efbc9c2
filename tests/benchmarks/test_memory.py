"""The account of memory counts what a real update allocates, and what pictures and texts need goes when training begins."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import AutoencoderKL
from memory import Meter, Setting, account, momenta
from tiny_sd import WORDS, write_tiny_sd
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import functional as F
from transformers import CLIPTextModel

from ddil_agents import DMD2, Beta, Dagger, DaggerConfig, DMD2Config
from ddil_agents.training.callbacks import Callback
from ddil_env import check_expert, load_expert
from ddil_env.adapters import LoRA

SMALL: dict[str, Any] = {"num_updates": 4, "num_steps": 2, "teacher_steps": 2, "learning_rate": 1e-3, "beta": Beta(0, 0, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd"))


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """What a CPU computes attention by."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoRA(8)])
def test_the_account_is_what_a_learners_update_allocates(lora: LoRA | None, checkpointing: bool, folder: Path) -> None:
    expert = load_expert("sd15", model=str(folder), prompts=WORDS, guidance_scale=3.0)
    student = {"gradient_checkpointing": checkpointing}
    config = DMD2Config(**{**SMALL, "batch_size": 16, "critic_updates": 1}, lora=lora, student=student)
    learner = DMD2(expert, config)
    for _ in range(2):  # the first makes the momenta
        learner.trainer.collect()
        batch = learner.draw()
        meter = Meter()
        with meter:
            learner.trainer.update(batch)
    core = expert.network.core

    def inputs(n: int, dtype: torch.dtype) -> dict[str, Any]:
        meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
        return {
            "sample": torch.empty(n, 4, 8, 8, **meta),
            "timestep": torch.empty(n, device="meta"),
            "encoder_hidden_states": torch.empty(n, 16, 16, **meta),
        }

    def make() -> Any:
        with torch.device("meta"):
            return type(core).from_config(core.config)

    counted = account(make, inputs, 16, Setting(lora, checkpointing=checkpointing), attention)
    bare = [learner.networks[name] for name in ("student", "critic")]
    owned = [sum(p.nbytes for p in network.parameters()) for network in (core, *bare, learner.ema_student)]
    assert [counted[role] for role in ("teacher", "student", "critic", "average")] == owned
    states = [trainable.optimizer.state for trainable in learner.trainer.trainables.values()]
    assert counted["momenta"] == sum(v.nbytes for state in states for each in state.values() for k, v in each.items() if k != "step")
    held = sum(counted[part] for part in ("teacher", "student", "critic", "average", "momenta"))
    latent = 16 * 4 * 8 * 8 * 4  # of which a loss holds a few dozen, which the account leaves out: here they are large beside the network
    assert -0.05 <= (meter.peak - (counted["peak"] - held)) / (counted["peak"] - held) <= 0.05 + 48 * latent / (counted["peak"] - held)


def test_the_meter_sees_what_autograd_saves() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    meter = Meter()
    with meter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = F.silu(F.silu(x) @ torch.ones(32, 48)).square().sum()
    saved.pop(x.untyped_storage().data_ptr())
    assert meter.live == sum(saved.values()) + y.nbytes
    assert meter.peak >= meter.live
    del y
    assert meter.live == 0


def test_8_bit_momenta_take_what_is_counted() -> None:
    pytest.importorskip("bitsandbytes")
    config = DaggerConfig(**SMALL, batch_size=2, collect_size=4, optimizer="adamw8bit")
    learner = Dagger(load_expert("digits8"), config)
    learner.trainer.collect()
    learner.trainer.update(learner.draw())
    trainable = learner.trainer.trainables["student"]
    codes = ("qmap1", "qmap2")  # one table for all weights
    kept = sum(v.nbytes for each in trainable.optimizer.state.values() for k, v in each.items() if isinstance(v, Tensor) and k not in codes)
    assert kept == pytest.approx(momenta(list(trainable.unwrapped.parameters()), "adamw8bit"), rel=0.01)
    assert kept < 0.4 * momenta(list(trainable.unwrapped.parameters()), "adamw")


def test_vae_and_text_encoder_are_gone_while_students_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: dict[type, list[weakref.ref[Any]]] = {AutoencoderKL: [], CLIPTextModel: []}
    for cls, found in alive.items():
        load = cls.from_pretrained.__func__  # type: ignore[attr-defined]

        def recorded(owner: Any, *args: Any, load: Any = load, found: Any = found, **given: Any) -> Any:
            result = load(owner, *args, **given)
            found.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        monkeypatch.setattr(cls, "from_pretrained", classmethod(recorded))

    def there() -> dict[str, int]:
        gc.collect()
        return {cls.__name__: sum(ref() is not None for ref in found) for cls, found in alive.items()}

    expert = load_expert("sd15", model=str(folder), prompts=WORDS)
    assert there() == {"AutoencoderKL": 0, "CLIPTextModel": 0}
    assert len(alive[CLIPTextModel]) == 1
    check_expert(expert)
    assert there() == {"AutoencoderKL": 1, "CLIPTextModel": 0}
    seen: list[dict[str, int]] = []

    class Watch(Callback):
        def on_update(self, *_: Any) -> None:
            seen.append(there())

    Dagger(expert, DaggerConfig(**SMALL, batch_size=2, collect_size=4)).learn(1, progress=False, callbacks=[Watch()])
    assert seen == [{"AutoencoderKL": 0, "CLIPTextModel": 0}]
    assert expert.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 16, 16, 3)


def test_scaled_losses_of_two_networks_step_as_unscaled_ones() -> None:
    """fp16's GradScaler, here on a CPU in float32, where a scale that is a power of two changes no bit."""
    found = []
    for scaled in (False, True):
        settings = {**SMALL, "batch_size": 4, "gradient_accumulation": 2, "critic_updates": 2}
        learner = DMD2(load_expert("digits8"), DMD2Config(**settings, lora=LoRA(4)))
        if scaled:
            scaler = GradScaler("cpu", init_scale=2.0**10)
            learner.trainer.accelerator.scaler, learner.trainer.accelerator.native_amp = scaler, True
            learner.trainer.accelerator.state._mixed_precision = "fp16"  # clipping unscales then; the networks are wrapped in no autocast
            for trainable in learner.trainer.trainables.values():
                trainable.optimizer = AcceleratedOptimizer(trainable.optimizer.optimizer, device_placement=False, scaler=scaler)
            learner.trainer.accelerator._optimizers = [trainable.optimizer for trainable in learner.trainer.trainables.values()]
        for _ in range(3):
            learner.trainer.collect()
            learner.trainer.update(learner.draw())
        found.append({name: trainable.unwrapped.state_dict() for name, trainable in learner.trainer.trainables.items()})
    for name, weights in found[0].items():
        for key, value in weights.items():
            torch.testing.assert_close(value, found[1][name][key], rtol=1e-6, atol=1e-8)
