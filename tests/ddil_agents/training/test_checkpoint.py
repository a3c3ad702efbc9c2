"""Checkpoints: a learner goes on from one exactly, and refuses what is not its own or is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bc, dagger, learn, same, weights

from ddil_agents import Algorithm, Beta, Dagger, DaggerConfig
from ddil_agents.training.checkpoint import checkpoints
from ddil_env import GaussianMixtureExpert
from ddil_env.experts.digits import Digits

pytestmark = pytest.mark.usefixtures("own_generator")


def halfway(directory: Path, make: Any, **changed: Any) -> tuple[Algorithm, Algorithm]:
    """A learner that learned without a break, and another that took up its checkpoint of step 11 of 20."""
    whole = make(**changed)
    whole.train(directory, progress=False, checkpoint_every=11)
    (resumed := make(**changed).load(directory / "checkpoints" / "step_00000011")).train(progress=False)
    return whole, resumed


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"prioritised": True, "p_expert": 0.5, "updates_per_collect": 3},
        {"capacity": None, "gradient_accumulation": 4},
        {"mixed_precision": "bf16", "beta": Beta(0.3, 0, 0.7, schedule="linear")},
        {"collect_size": 7},
    ],
    ids=["plain", "prioritised", "aggregate", "bf16", "remainders"],
)
def test_a_resumed_learner_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path: Path, changed: dict[str, Any]) -> None:
    whole, resumed = halfway(tmp_path, dagger, **changed)
    a, b = whole.trainer.state_dict(), resumed.trainer.state_dict()
    for key in a.keys() | b.keys():
        assert same(a[key], b[key]), key
    assert whole.step == 20


def test_a_saved_learner_holds_its_step_and_its_average(tmp_path: Path) -> None:
    learner = learn(dagger())
    path = learner.save(tmp_path)
    restored = dagger().load(tmp_path)
    assert path == tmp_path / "step_00000020"
    assert torch.equal(weights(restored.ema_student), weights(learner.ema_student))
    assert same(restored.buffer.state_dict(), learner.buffer.state_dict())
    assert (restored.step, restored.teacher_nfe, restored.student_nfe) == (20, learner.teacher_nfe, learner.student_nfe)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    learner = learn(bc())
    learner.save(tmp_path)
    with torch.no_grad():
        next(learner.student.parameters()).zero_()
    learner.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]
    assert not next(bc().load(tmp_path).student.parameters()).any()


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    bc().train(tmp_path, progress=False, checkpoint_every=3)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step_00000018", "step_00000020"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """checkpoints of steps 18 and 20."""
    dagger().train(tmp_path, progress=False, checkpoint_every=18)
    return tmp_path / "checkpoints"


def test_load_refuses_another_config_and_names_what_differs(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"differs in: batch_size, learning_rate\. Load it into an agent built with the same config"):
        dagger(batch_size=8, learning_rate=1.0).load(saved)


def test_load_refuses_another_agent(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"is of dagger with another config; it differs in: beta"):
        bc().load(saved)


def test_load_refuses_a_flipped_byte(saved: Path) -> None:
    state = saved / "step_00000020" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    learner = dagger()
    before = weights(learner.student)
    with pytest.raises(ValueError, match=r"state.pt is damaged: its SHA-256.*remove .*step_00000020 to resume from the one before it"):
        learner.load(saved)
    assert torch.equal(weights(learner.student), before)
    assert learner.load(saved / "step_00000018").step == 18


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}"], ids=["empty", "cut", "binary", "list", "bare"])
def test_load_refuses_a_damaged_manifest(saved: Path, content: bytes) -> None:
    (saved / "step_00000020" / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="step_00000020 is damaged"):
        dagger().load(saved)


def test_load_refuses_a_checkpoint_without_its_state(saved: Path) -> None:
    (saved / "step_00000020" / "state.pt").unlink()
    with pytest.raises(ValueError, match="step_00000020 is damaged"):
        dagger().load(saved)


def test_a_checkpoint_that_lost_its_manifest_is_refused(saved: Path) -> None:
    (saved / "step_00000020" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step_00000020 is damaged .*remove .*step_00000020 to resume from the one before it"):
        dagger().load(saved)
    with pytest.raises(ValueError, match=r"no checkpoint in .*step_00000020"):
        dagger().load(saved / "step_00000020")


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_load_refuses_a_directory_without_checkpoints(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"no checkpoint in .*{name}"):
        dagger().load(tmp_path / name)


def test_a_manifest_says_what_was_saved(saved: Path) -> None:
    manifest = json.loads((saved / "step_00000018" / "manifest.json").read_text())
    assert (manifest["step"], manifest["agent"], manifest["config"]["batch_size"]) == (18, "dagger", 16)


def test_a_checkpoint_of_another_expert_is_refused(tmp_path: Path) -> None:
    def make(w: float = 2.0, std: float = 0.25) -> Dagger:
        expert = GaussianMixtureExpert([[-0.8, 0.0], [0.8, 0.0]], std, labels=[0, 1], guidance_scale=w)
        return Dagger(expert, DaggerConfig(num_updates=1, batch_size=4, collect_size=8, student={"width": 8, "depth": 1}))

    make().train(tmp_path, progress=False)
    make().load(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"was trained on another expert: its guidance_scale is 2.0, here 3.0; .*restore the run's env"):
        make(w=3.0).load(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="was trained on another expert: its mixture is "):
        make(std=0.3).load(tmp_path / "checkpoints")


def test_an_experts_identity_holds_its_weights() -> None:
    one, same, other = (Digits("digits8") for _ in range(3))
    with torch.no_grad():
        next(other.network.parameters())[0].add_(1e-3)
    assert one.identity() == same.identity() != other.identity()
