"""`--evaluate_every`, `--callbacks`, and what is loaded of a run: its last student, its best one, or a checkpoint."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from helpers import refused

from ddil_agents import dagger, evaluate, load, ppo
from ddil_agents.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = shlex.split(
    "--env gaussian_mixture --num_updates 12 --num_steps 2 --teacher_steps 4 --batch_size 16 --collect_size 32 --checkpoint_every 4 "
    "--student '{width: 16}' --evaluate.n 30 --evaluate.n_action 10 --evaluate_every 6 --validation.n 16"
)
COUNTER = """
from pathlib import Path
from ddil_agents import Callback

class CountUpdates(Callback):
    def __init__(self, path: str, limit: int = 100):
        self.path, self.limit = Path(path), limit

    def on_update(self, agent, batch, measured):
        self.path.write_text(str(agent.step))
        return agent.step < self.limit
"""


def test_a_run_evaluates_and_its_best_last_and_older_students_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    dagger.main([*SMALL, "--out", "run"])
    rows = read_metrics(Path("run/eval.jsonl"))
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert rows[0].keys() == {"step", "frechet_to_expert", "action_mse_own", "best", "seconds"}
    assert "dagger, update 6: frechet_to_expert" in capsys.readouterr().err
    best = json.loads(Path("run/best/evaluation.json").read_text())
    assert best == min(rows, key=lambda row: row["frechet_to_expert"])
    last, checkpoint = load("run"), load("run", checkpoint=8)
    assert checkpoint.step == 8
    weights = {
        name: torch.cat([p.flatten() for p in agent.ema_student.parameters()]) for name, agent in (("last", last), ("8", checkpoint))
    }
    assert not torch.equal(weights["last"], weights["8"])
    with pytest.raises(ValueError, match="has no checkpoint of step 7; it has those of 8, 12"):
        load("run", checkpoint=7)
    for name in ("best", "last", "8"):
        evaluate.main(["--run", "run", "--checkpoint", name, "--n", "20", "--out", f"{name}.json"])
    scores = {name: json.loads(Path(f"{name}.json").read_text())[0]["models"]["dagger@2"]["frechet"] for name in ("best", "last", "8")}
    assert scores["8"] != scores["last"]
    (Path("run") / "result.json").unlink()  # as a run that has not finished
    evaluate.main(["--run", "run", "--n", "20", "--out", "unfinished.json"])
    assert json.loads(Path("unfinished.json").read_text())[0]["models"]["dagger@2"]["frechet"] == scores["last"]


def test_callbacks_of_ones_own_are_named_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_callbacks.py").write_text(COUNTER)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    settings = {"callbacks": [{"class_path": "my_callbacks.CountUpdates", "init_args": {"path": "count.txt", "limit": 9}}]}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    dagger.main([*SMALL, "--config", "mine.yaml", "--out", "run"])
    assert Path("count.txt").read_text() == "9"
    assert json.loads(Path("run/result.json").read_text())["num_updates"] == 9
    dagger.main(["--config", "run/config.yaml", "--out", "again"])  # the config reruns as it is
    assert read_metrics(Path("again/metrics.jsonl"))[-1]["step"] == 9


def test_what_cannot_be_evaluated_while_it_trains_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    dagger.main([*SMALL[:-4], "--out", "plain"])
    with pytest.raises(ValueError, match="has no best student; a run has one if it was trained with --evaluate_every"):
        load("plain", checkpoint="best")
    assert "validation.metrics=['fid']: unknown metric 'fid'" in refused(dagger.main, [*SMALL, "--validation.metrics", "[fid]"], capsys)
    message = refused(ppo.main, ["--env", "gaussian_mixture", "--evaluate_every", "5", "--out", "ppo"], capsys)
    assert "ppo is trained by stable-baselines3 and does not support callbacks; leave --callbacks and --evaluate_every out" in message
