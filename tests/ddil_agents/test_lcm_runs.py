"""The command of latent consistency distillation."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import ENV, Killed
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from ddil_agents import lcm
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_generator")

SMALL = shlex.split(
    "--num_updates 12 --teacher_steps 8 --batch_size 16 --collect_size 60 --updates_per_collect 5 --log_every 5 --checkpoint_every 7 "
    "--beta.forward .4 --beta.student .6 --evaluate.n 20 --evaluate.n_action 5"
)
MIXTURE = ENV + "guidance_scale: 2.0\n"


def run(argv: list[str]) -> None:
    with contextlib.redirect_stdout(None), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        lcm.main(argv)


def test_a_run_of_the_command_says_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(["--env", "digits8", *SMALL, "--evaluate.also_steps", "[1, 2]", "--out", "run"])
    contents = {path.name for path in Path("run").iterdir()}
    assert contents == {"config.yaml", "metrics.jsonl", "result.json", "student", "samples.png", "checkpoints", "tensorboard"}
    result = json.loads(Path("run/result.json").read_text())
    assert (result["agent"], result["env"], result["student"], result["num_updates"]) == ("lcm", "digits8", "lcm@4", 12)
    assert result["times"] == [999, 759, 499, 259, 0]
    models = result["models"]
    latest = models.pop("lcm@4, last weights")
    assert latest["frechet"] != models["lcm@4"]["frechet"]
    assert set(models) == {"teacher@8", "teacher@4", "teacher@2", "teacher@1", "lcm@4", "lcm@2", "lcm@1"}
    assert {name: model["nfe_per_sample"] for name, model in models.items()} == {name: int(name[-1]) for name in models}
    assert all(model["frechet"] > 0 for model in models.values())
    assert models["lcm@4"]["teacher_nfe"] == result["teacher_nfe"] == read_metrics(Path("run/metrics.jsonl"))[-1]["teacher_nfe"]
    assert result["teacher_nfe"] == 3 * 60  # one forward a state, 3 collections of 60
    steps = result["student_nfe"] - 2 * 12 * 16  # to 36 states a collection: 1 on average where there are 3 times, 2 where 5
    assert 3 * 36 <= steps <= 3 * (2 * 36 + 2)  # 36 is 7 a time of 5, and one more
    assert all(len(models["lcm@4"][key]) == 4 for key in ("action_mse_own", "action_mse_expert", "shift"))
    assert "shift" not in models["lcm@1"]
    saved = load_file("run/student/student.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_run_cut_short_and_resumed_ends_in_the_weights_of_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("env.yaml").write_text(MIXTURE)
    argv = ["--env", "env.yaml", *SMALL, *shlex.split("--beta.teacher .5 --collect_size 170 --prioritised true --student '{width: 16}'")]
    run([*argv, "--out", "whole"])
    update = Trainer.update

    def fatal(self: Trainer, batch: TensorDict) -> dict[str, Tensor]:
        if self.algorithm.step == 9:
            raise Killed
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", fatal)
        with pytest.raises(Killed):
            run([*argv, "--out", "broken"])
    assert not Path("broken/result.json").exists()
    assert [path.name for path in Path("broken/checkpoints").iterdir()] == ["step_00000007"]
    run(["--resume", "broken"])
    whole, broken = (load_file(f"{name}/student/student.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    rows, again = (
        [{k: v for k, v in row.items() if k not in ("seconds", "nfe_per_second")} for row in read_metrics(Path(name, "metrics.jsonl"))]
        for name in ("whole", "broken")
    )
    assert rows == again
    assert [row["step"] for row in rows] == [5, 7, 10, 12]
    assert all(rows[-1]["held"].values())


def test_the_command_takes_a_guidance_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("env.yaml").write_text(MIXTURE)
    run(["--env", "env.yaml", *SMALL, "--guidance_range", "[1, 4]", "--student", "{width: 16}", "--out", "run"])
    assert any(name.endswith("cond_proj.weight") for name in load_file("run/student/student.safetensors"))


def test_the_command_refuses_a_mixed_rollout(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        lcm.main(["--env", "gaussian_mixture", "--p_expert", "0.5", "--out", "run"])
    assert stop.value.code == 2
    assert re.search("p_expert=0.5: the expert takes no consistency steps", capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
