"""Facts about examples/: an expert in a package of its own is found by its entry point and by its class path, and trains."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT

from ddil_agents import (
    DMD2,
    LCM,
    Algorithm,
    Dagger,
    Gail,
    algorithm,
    check_agent,
    compare,
    evaluate,
    load,
    report,
)
from ddil_agents import __main__ as command_line
from ddil_agents.commands.agents import find_agent, identify

EXAMPLES = ROOT / "examples"
SMALL = ["--num_updates", "3", "--batch_size", "8", "--collect_size", "16", "--evaluate.n", "16", "--evaluate.n_paths", "4"]


def run(arguments: list[str], cwd: Path, path: Path) -> str:
    found = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's package, installed beside nothing else and without a network."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLES / "my_expert", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(folder / "site"), str(source)], check=True, capture_output=True)
    return folder / "site"


def test_an_installed_expert_trains_by_its_entry_point(installed: Path, tmp_path: Path) -> None:
    command = ["-m", "ddil_agents.dagger", "--env.expert", "smooth_signals", "--env.length", "32", *SMALL, "--out", "run"]
    run(command, tmp_path, installed)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["env_config"] == {"expert": "smooth_signals", "length": 32, "smoothness": 6.0}
    assert result["num_updates"] == 3
    assert (tmp_path / "run" / "samples.png").is_file()


def test_a_yaml_names_the_entry_point(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "signals.yaml").write_text("expert: smooth_signals\nlength: 16\n")
    code = "import ddil_env; e = ddil_env.load_expert('signals.yaml'); ddil_env.check_expert(e); print(type(e).__module__, e.sample_shape)"
    assert run(["-c", code], tmp_path, installed) == "my_expert (1, 16)\n"


def test_a_module_on_the_path_trains_by_its_class_path(tmp_path: Path) -> None:
    command = ["-m", "ddil_agents.bc", "--env.expert", "my_expert.SmoothSignals", "--env.length", "16", *SMALL, "--out", "run"]
    run(command, tmp_path, EXAMPLES / "my_expert")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["env_config"]["length"] == 16
    run([str(EXAMPLES / "my_expert" / "my_expert.py")], tmp_path, tmp_path)


def test_the_examples_denoiser_is_the_posterior_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "my_expert"))
    from my_expert import SmoothSignals

    expert = SmoothSignals(length=16)
    generator = torch.Generator().manual_seed(0)
    x_0, _ = expert.sample_data(100_000, generator)
    t = torch.full((len(x_0),), 600.0)
    x_t = expert.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t)
    error = x_0 - expert.predict(x_t, t).x_0
    assert float((error * x_t).mean(0).abs().max()) < 0.02  # what is left is uncorrelated with what was seen


def test_the_readme_shows_what_the_package_says() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for toml, package in zip(re.findall(r"```toml\n(.*?)```", readme, re.S), ("my_expert", "my_agent"), strict=True):
        assert toml in (EXAMPLES / package / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def huber(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the example's learner, by its class path."""
    folder = tmp_path_factory.mktemp("huber")
    words = ["-m", "ddil_agents", "my_agent.HuberDagger", "--env", "gaussian_mixture", "--huber_h", ".2", *SMALL, "--out", "run"]
    run(words, folder, EXAMPLES / "my_agent")
    return folder


def test_a_learner_of_ones_own_trains_and_is_recorded_by_its_class_path(huber: Path) -> None:
    config = yaml.safe_load((huber / "run" / "config.yaml").read_text())
    assert (config["agent"], config["huber_h"]) == ("my_agent.HuberDagger", 0.2)
    result = json.loads((huber / "run" / "result.json").read_text())
    assert (result["agent"], result["student"], result["num_updates"]) == ("huber_dagger", "huber_dagger@4", 3)


def test_it_resumes_is_evaluated_compared_and_reported(huber: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "my_agent"))
    monkeypatch.chdir(huber)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(EXAMPLES / "my_agent"), os.environ.get("PYTHONPATH")])))
    before = (huber / "run" / "student" / "student.safetensors").read_bytes()
    command_line.main(["my_agent.HuberDagger", "--resume", "run"])
    assert (huber / "run" / "student" / "student.safetensors").read_bytes() == before
    evaluate.main(["--run", "run", "--n", "16", "--n_paths", "4", "--out", "scores.json"])
    assert "huber_dagger@4" in json.loads(Path("scores.json").read_text())[0]["models"]
    report.main(["run", "--out", "page"])
    assert "huber_dagger@4" in Path("page/report.md").read_text()
    settings = {"num_updates": 2, "batch_size": 8, "collect_size": 16, "evaluate": {"n": 16, "n_paths": 4}}
    arms = {name: {"agent": name} for name in ("dagger", "my_agent.HuberDagger")}
    Path("two.yaml").write_text(yaml.safe_dump({"env": "gaussian_mixture", "arms": arms, "shared": settings, "seeds": 1}))
    compare.main(["--config", "two.yaml", "--out", "two", "--jobs", "1"])
    runs = json.loads(Path("two/comparison.json").read_text())["budgets"]["updates"]["runs"]
    assert [(run["arm"], run["done"]) for run in runs] == [("dagger", True), ("my_agent.HuberDagger", True)]


def test_an_agent_is_found_by_name_class_path_and_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "my_agent"))
    from my_agent import HuberDagger

    entered = EntryPoint(name="huber_dagger", value="my_agent:HuberDagger", group="ddil.agents")
    monkeypatch.setattr("ddil_agents.commands.agents.entry_points", lambda group: [entered] if group == "ddil.agents" else [])
    assert find_agent("dagger") is Dagger
    assert find_agent("my_agent.HuberDagger") is find_agent("huber_dagger") is HuberDagger
    assert (identify(Dagger), identify(HuberDagger)) == ("dagger", "my_agent.HuberDagger")
    for unknown in ("nobody", "my_agent.Nobody", "nowhere.Agent", "my_agent.Tensor"):
        with pytest.raises(
            ValueError, match=f"unknown agent '{unknown}': choose one of aggrevate, bc, dagger, .*, huber_dagger, or the class"
        ):
            find_agent(unknown)


def test_the_smallest_algorithm_in_the_docstring_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = textwrap.dedent("\n".join(line for line in str(algorithm.__doc__).splitlines() if line.startswith("    ") or not line))
    assert len(code.strip().splitlines()) <= 40
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    huber = importlib.import_module("my_module").Huber
    check_agent(huber)
    out = tmp_path / "run"
    command_line.main(["my_module.Huber", "--env", "digits8", *SMALL, "--huber_h", ".2", "--out", str(out)])
    assert load(out).config.huber_h == 0.2


class OneNumber(Dagger):
    """A loss that is a mean already."""

    name = "one_number"

    def loss(self, batch):
        return super().loss(batch).mean()


class Global(Dagger):
    """Noise from torch's own generator."""

    name = "global"

    def loss(self, batch):
        return super().loss(batch) + 1e-9 * torch.randn(len(batch))


class Deaf(Dagger):
    """Learns nothing."""

    name = "deaf"

    def loss(self, batch):
        return 0 * super().loss(batch)


class Uncounted(Dagger):
    """Asks the teacher beside its collections and updates, and does not say so."""

    name = "uncounted"

    def draw(self):
        batch = super().draw()
        self.expert.predict(batch["x_t"], batch["t"])
        return batch


class Forgetful(Dagger):
    """Has a state of its own that no checkpoint holds."""

    name = "forgetful"

    calls = 0

    def loss(self, batch):
        self.calls += 1
        return super().loss(batch) * (1 + self.calls)


@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        (Dagger, {}),
        (LCM, {}),
        (Gail, {}),
        (DMD2, {"num_updates": 600, "learning_rate": 1e-3, "critic_learning_rate": 1e-2}),
    ],
)
def test_our_own_learners_conform(agent: type[Algorithm], settings: dict[str, float]) -> None:
    check_agent(agent, **settings)


def test_the_examples_learner_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "my_agent"))
    from my_agent import HuberDagger

    check_agent(HuberDagger)
    assert len((EXAMPLES / "my_agent" / "my_agent.py").read_text().splitlines()) <= 50


@pytest.mark.parametrize(
    ("agent", "told"),
    [
        (OneNumber, r"loss returns \(\) for a batch of 64 states; need \(64,\), the loss of each"),
        (Global, "draws from torch's global generator"),
        (Deaf, "after 150 updates its samples are .* from the teacher's"),
        (Uncounted, "counted .* forwards of the teacher where it ran"),
        (Forgetful, "resumed ended in other weights"),
        (int, "is not a subclass of ddil_agents.Algorithm"),
        (type("Nameless", (Dagger,), {}), "has no name of its own, by which results identify it"),
    ],
)
def test_what_breaks_the_contract_is_named(agent: type[Algorithm], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_agent(agent)
