"""Runs of distribution matching are reproducible, go on after a kill and stop where a number is not finite."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALL, Killed, critic, learn, matching, weights
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from ddil_agents import dmd2
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_generator")


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    one, again, other = (learn(matching(beta=ALL, p_expert=0.5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(weights(one.student), weights(again.student))
    assert torch.equal(weights(critic(one)), weights(critic(again)))
    assert not torch.allclose(weights(one.student), weights(other.student), atol=1e-2)


@pytest.mark.parametrize(
    "changed",
    [
        {"beta": ALL, "p_expert": 0.3},
        {"gan_weight": 0.1, "gradient_accumulation": 2},
        {"on_policy": False, "beta": ALL},
        {"mixed_precision": "bf16", "gan_weight": 0.1, "critic_updates": 3},
    ],
    ids=["mixed", "gan", "replayed", "bf16"],
)
def test_a_resumed_learner_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path: Path, changed: dict[str, Any]) -> None:
    whole = matching(**changed, num_updates=8)
    whole.train(tmp_path, progress=False, checkpoint_every=5)
    resumed = matching(**changed, num_updates=8).load(tmp_path / "checkpoints" / "step_00000005")
    resumed.train(progress=False)
    ours, theirs = resumed.trainer.state_dict(), whole.trainer.state_dict()
    for name in ("student", "critic"):
        a, b = (state["trainables"][name]["network"] for state in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(weights(resumed.ema_student), weights(whole.ema_student))
    assert ours["nfe"] == theirs["nfe"]
    assert weights(critic(whole)).isfinite().all()


@pytest.mark.parametrize("network", ["student", "critic"])
def test_a_poisoned_network_stops_the_run_at_its_step(network: str) -> None:
    learner = matching()
    with torch.no_grad():
        next(learner.networks[network].parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 1, on states of: student \(8 states\)"):
        learn(learner)


CLI = shlex.split(
    "--env digits8 --num_updates 7 --num_steps 2 --teacher_steps 4 --batch_size 4 --collect_size 8 --critic_updates 3 "
    "--beta.forward 0.3 --beta.student 0.7 --log_every 2 --checkpoint_every 3 --evaluate.n 12 --evaluate.n_action 4"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of the command."""
    out = tmp_path_factory.mktemp("dmd2") / "run"
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")), torch.random.fork_rng():
        dmd2.main([*CLI, "--out", str(out)])
    return out


def test_the_command_leaves_a_result_and_the_critics_curves(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert (result["agent"], result["env"], result["student"], result["num_updates"]) == ("dmd2", "digits8", "dmd2@2", 7)
    assert result["times"] == [999, 499, 0]
    assert set(result["models"]) == {"teacher@4", "teacher@2", "dmd2@2", "dmd2@2, last weights"}
    own = result["models"]["dmd2@2"]
    assert own["nfe_per_sample"] == 2
    assert all(math.isfinite(own[key]) for key in ("frechet", "coverage", "accuracy", "frechet_to_expert"))
    assert own["endpoint_rmse"] is own["path_rmse"] is None  # fresh noise on the way
    assert result["teacher_nfe"] == own["teacher_nfe"] == 3 * 4  # updates 1, 4 and 7
    assert result["models"]["teacher@2"]["endpoint_rmse"] > 0
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 7]
    assert all(row["critic_loss"] > 0 and row["critic_grad_norm_max"] >= row["critic_grad_norm"] > 0 for row in rows)
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False]  # lines of the critic's steps alone
    assert ["grad_norm" in row for row in rows] == [row["loss"] is not None for row in rows]
    assert sum(row["source_counts"]["forward"] for row in rows) > 0
    assert sum(sum(row["source_counts"].values()) for row in rows) == 7 * 4


def test_a_command_killed_halfway_resumes_to_the_same_student_and_critic(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    update = Trainer.update

    def killed_at_5(trainer: Trainer, batch: TensorDict) -> dict[str, Tensor]:
        if trainer.algorithm.step == 5:
            raise Killed
        return update(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killed_at_5)
        with pytest.raises(Killed):
            dmd2.main(["--config", str(run / "config.yaml"), "--out", "run"])
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_00000003"]
    dmd2.main(["--resume", "run"])
    assert "resuming run at step 3 of 7" in capsys.readouterr().err
    ours, theirs = (load_file(each / "student" / "student.safetensors") for each in (Path("run"), run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    states = [torch.load(each / "checkpoints/step_00000007/state.pt", weights_only=True)["trainables"] for each in (Path("run"), run)]
    networks = [state[name]["network"] for state in states for name in ("student", "critic")]
    for mine, other in zip(networks[:2], networks[2:], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in other)
    clock = ("seconds", "nfe_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(each / "metrics.jsonl")] for each in (Path("run"), run)
    ]
    assert rows[0] == rows[1]
