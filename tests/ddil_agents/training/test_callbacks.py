"""Callbacks: when they are called, what they see, and that a run ends in the same weights with and without them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_agents import Beta, Callback, Dagger, DaggerConfig, LCMConfig
from ddil_agents.algorithm import Algorithm
from ddil_agents.dmd2 import DMD2, DMD2Config
from ddil_agents.evaluation.callback import EvalCallback
from ddil_agents.evaluation.settings import Validation
from ddil_agents.lcm import LCM
from ddil_agents.training.callbacks import describe_duration
from ddil_agents.training.metrics import read_metrics
from ddil_env import GaussianMixtureExpert

SMALL: dict[str, Any] = {
    "num_updates": 12,
    "num_steps": 2,
    "teacher_steps": 4,
    "batch_size": 8,
    "collect_size": 16,
    "updates_per_collect": 4,
    "warmup_updates": 2,
    "student": {"width": 8, "depth": 2},
}
AGENTS: dict[str, tuple[type[Algorithm], Any]] = {
    "dagger": (Dagger, DaggerConfig(**SMALL)),
    "lcm": (LCM, LCMConfig(**SMALL, beta=Beta(0.5, 0.0, 0.5), inference_steps=(2,))),
    "dmd2": (DMD2, DMD2Config(**SMALL, critic_updates=2)),
}


def make(name: str = "dagger", **changed: Any) -> Algorithm:
    agent, config = AGENTS[name]
    expert = GaussianMixtureExpert([[-0.8, -0.8], [0.8, 0.8]], 0.25)
    return agent(expert, type(config)(**{**vars(config), **changed}))


def state(learner: Algorithm) -> dict[str, Any]:
    return {key: value for key, value in learner.trainer.state_dict().items() if key != "callbacks"}


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


class Record(Callback):
    """Writes down every call; ends the training after `stop_after` updates of its own, if that is given."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[str] = []
        self.seen, self.stop_after = 0, stop_after

    def on_start(self, agent: Any, out: Any) -> None:
        self.calls.append(f"start {agent.step}")

    def on_collect(self, agent: Any, states: Any) -> None:
        assert len(states) > 0
        self.calls.append("collect")

    def on_update(self, agent: Any, batch: Any, measured: Any) -> bool | None:
        assert len(batch.x_t) == len(measured["loss"]) == agent.config.batch_size
        self.seen += 1
        self.calls.append(f"update {agent.step}")
        return self.stop_after is None or self.seen < self.stop_after

    def on_log(self, agent: Any, row: Any) -> None:
        self.calls.append(f"log {row['step']}")

    def on_checkpoint(self, agent: Any, path: Path) -> None:
        self.calls.append(path.name)

    def on_end(self, agent: Any) -> None:
        self.calls.append("end")

    def close(self) -> None:
        self.calls.append("close")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_callbacks_are_called_in_the_order_of_the_training(tmp_path: Path) -> None:
    record = Record()
    make(num_updates=5).train(tmp_path, progress=False, checkpoint_every=3, log_every=2, callbacks=[record])
    assert record.calls == [
        *("start 0", "collect", "update 1", "log 2", "update 2", "update 3", "log 3", "step_00000003"),
        *("log 4", "update 4", "collect", "log 5", "update 5", "step_00000005", "end", "close"),
    ]


def test_callbacks_are_closed_after_an_error_which_is_the_one_that_is_told() -> None:
    class Broken(Record):
        def on_update(self, *_: Any) -> bool | None:
            raise RuntimeError("mine")

        def close(self) -> None:
            super().close()
            raise OSError("in closing")

    broken, record = Broken(), Record()
    with pytest.raises(RuntimeError, match="mine"):
        make().learn(progress=False, callbacks=[broken, record])
    assert broken.calls[-1] == record.calls[-1] == "close"
    assert "end" not in broken.calls + record.calls


def test_a_callback_ends_the_training_and_a_resumed_run_ends_there_too(tmp_path: Path) -> None:
    stopped = make()
    stopped.train(tmp_path, progress=False, checkpoint_every=4, callbacks=[Record(stop_after=6)])
    assert stopped.step == stopped.total_updates == 6
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4, 6]
    resumed = make().load(tmp_path / "checkpoints" / "step_00000004")
    resumed.train(tmp_path, progress=False, checkpoint_every=4, callbacks=[Record(stop_after=6)])  # its count is in the checkpoint
    assert_same(state(resumed), state(stopped))
    ended = make().load(tmp_path / "checkpoints")
    ended.train(tmp_path, progress=False, callbacks=[record := Record(stop_after=6)])
    assert record.calls == ["start 6", "end", "close"]


@pytest.mark.parametrize("name", AGENTS)
def test_evaluation_changes_nothing_of_the_training(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = make(name)
        plain.train(tmp_path / "plain", progress=False, checkpoint_every=5)
        after = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        evaluated = make(name)
        settings = Validation(n=16, metrics=("frechet_to_expert", "action_mse_own"))
        evaluated.train(tmp_path / "evaluated", progress=False, checkpoint_every=5, callbacks=[EvalCallback(4, settings)])
        assert torch.equal(torch.get_rng_state(), after)
    assert_same(state(evaluated), state(plain))  # the teacher's and the student's forwards are counted alike, too
    timed = ("seconds", "nfe_per_second")
    lines = [
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("plain", "evaluated")
    ]
    assert lines[0] == lines[1]
    rows = read_metrics(tmp_path / "evaluated" / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert rows[0]["best"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        resumed = make(name).load(tmp_path / "evaluated" / "checkpoints" / "step_00000010")
        resumed.train(tmp_path / "evaluated", progress=False, checkpoint_every=5, callbacks=[EvalCallback(4, settings)])
    again = read_metrics(tmp_path / "evaluated" / "eval.jsonl")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]


def test_the_best_student_is_the_one_that_scored_best(tmp_path: Path) -> None:
    learner = make(num_updates=30, learning_rate=1e-2)
    kept: dict[int, dict[str, Tensor]] = {}

    class Keep(Callback):
        def on_update(self, agent: Any, *_: Any) -> None:
            kept[agent.step] = {key: value.clone() for key, value in agent.ema_student.state_dict().items()}

    learner.train(tmp_path, progress=False, callbacks=[Keep(), EvalCallback(10, Validation(n=32))])
    rows = read_metrics(tmp_path / "eval.jsonl")
    best = min(rows, key=lambda row: row["frechet_to_expert"])
    assert best["step"] > 0  # it learns
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text()) == best
    assert [row["best"] for row in rows] == [
        all(row["frechet_to_expert"] < r["frechet_to_expert"] for r in rows[:i]) for i, row in enumerate(rows)
    ]
    loaded = learner.expert.load_student(tmp_path / "best" / "student", **learner.student_options).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in kept[best["step"]].items())


def test_patience_ends_a_training_that_no_longer_improves(tmp_path: Path) -> None:
    class Worse(EvalCallback):
        def _measure(self, agent: Any) -> dict[str, Any]:
            row = {"step": agent.step, "frechet_to_expert": float(agent.step != 4), "seconds": 0.0}
            return row | {"best": self._is_better(row)}

    learner = make()
    learner.train(None, progress=False, callbacks=[Worse(2, Validation(patience=3))])
    assert learner.step == 10  # the best at 4; none at 6, 8 and 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ()}, r"validation.metrics=\[\]: choose from .*frechet, "),
        ({"metrics": ("fid",)}, r"validation.metrics=\['fid'\]: unknown metric 'fid'; choose from .*frechet, "),
        ({"patience": 0}, "validation.patience=0: need at least 1, or null to train to the end"),
        ({"n": 5}, "validation.n=5: the metrics need at least 10 samples"),
    ],
)
def test_bad_settings_of_the_evaluation_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Validation(**settings)


def test_a_metric_that_is_not_measured_here_is_refused_before_the_first_update() -> None:
    learner = make("lcm")  # `renoise` draws noise on the way, so that no sample belongs to the teacher's of its index
    with pytest.raises(ValueError, match=r"validation\.metrics: endpoint_rmse is not measured here; choose from .*frechet, "):
        learner.train(None, progress=False, callbacks=[EvalCallback(4, Validation(n=16, metrics=("endpoint_rmse",)))])
    assert learner.step == 0


@pytest.mark.parametrize(("updates", "said"), [(100_000, "s an update; about .* left, and the evaluation"), (30, "")])
def test_a_long_run_says_after_20_updates_how_long_it_will_take(
    updates: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10**9, 2))
    monkeypatch.setattr("ddil_agents.training.callbacks.time.monotonic", lambda: float(next(now)))
    make(num_updates=updates, updates_per_collect=100).train(None, log_every=1000, callbacks=[Record(stop_after=25)])
    found = [line for line in capsys.readouterr().err.splitlines() if "s an update" in line]
    assert (re.search(said, found[0]) is not None) if said else found == []


def test_durations_are_in_hours_and_minutes() -> None:
    assert [describe_duration(x) for x in (400, 3600, 7530)] == ["7 min", "1 h 0 min", "2 h 6 min"]
