"""Live pages get what metrics.jsonl gets, under either tracker's interface."""

import json
import sys
import types
from pathlib import Path

import pytest

from ddil_agents import bc, ppo
from ddil_agents.training.metrics import flatten
from ddil_agents.training.tracking import Tracker, start_tracker

FLAGS = ["--env", "gaussian_mixture", "--num_updates", "20", "--batch_size", "8", "--collect_size", "16", "--evaluate.n", "20"]


class Page:
    """Keeps what it is sent, with the interface that trackio and wandb share."""

    def __init__(self) -> None:
        self.told: dict = {}
        self.lines: list[tuple[int, dict]] = []
        self.finished = False

    def init(self, **told):
        self.told = told
        return self

    def log(self, metrics, step):
        self.lines.append((step, metrics))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_live_page_gets_every_line_of_the_metrics(tracker: str, tmp_path: Path, monkeypatch) -> None:
    page = Page()
    monkeypatch.setitem(sys.modules, tracker, types.SimpleNamespace(init=page.init))
    bc.main([*FLAGS, "--track", tracker, "--out", str(tmp_path / "mine")])
    rows = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert page.lines == [(row.pop("step"), flatten(row)) for row in rows]  # trackio keeps the name `step` to itself
    assert [step for step, _ in page.lines] == [10, 20]
    assert page.finished
    assert page.told.keys() - {"id"} == {"project", "name", "config", "resume"}
    assert (page.told["project"], page.told["resume"], page.told["config"]["num_updates"]) == ("ddil", "allow", 20)


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_run_is_known_by_its_directory_wherever_it_lies_and_by_no_other(tracker: Tracker, tmp_path: Path, monkeypatch) -> None:
    page = Page()
    monkeypatch.setitem(sys.modules, tracker, types.SimpleNamespace(init=page.init))

    def known(out: Path) -> tuple[str, str | None]:
        out.mkdir(parents=True, exist_ok=True)
        start_tracker(tracker, out, {})
        return page.told["name"], page.told.get("id")

    name, key = known(tmp_path / "budget_1" / "bc-s0")
    assert name == f"bc-s0-{(tmp_path / 'budget_1' / 'bc-s0' / 'tracking_id').read_text()}"
    assert key == (name.removeprefix("bc-s0-") if tracker == "wandb" else None)  # trackio has no id to give
    assert known(tmp_path / "budget_2" / "bc-s0")[0] != name
    (tmp_path / "budget_1").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert known(Path("bc-s0")) == (name, key)


def test_a_run_without_a_tracker_keeps_no_id(tmp_path: Path) -> None:
    assert start_tracker("none", tmp_path, {}) is None
    assert not any(tmp_path.iterdir())


def test_ppo_sends_its_lines_too(tmp_path: Path, monkeypatch) -> None:
    page = Page()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=page.init))
    flags = ["--num_updates", "8", "--num_envs", "10", "--batch_size", "20", "--epochs", "2", "--evaluate.n", "20", "--track", "wandb"]
    ppo.main(["--env", "gaussian_mixture", *flags, "--out", str(tmp_path / "mine")])
    assert [(step, line["timesteps"]) for step, line in page.lines] == [(4, 40), (8, 80)]
    assert page.finished


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        bc.main([*FLAGS, "--track", "wandb", "--out", str(tmp_path / "mine")])
    assert "track=wandb" in (said := capsys.readouterr().err)
    assert "pip install wandb" in said
    assert not (tmp_path / "mine").exists()
