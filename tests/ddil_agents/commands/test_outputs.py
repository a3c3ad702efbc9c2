"""What commands write to: nothing of others is replaced, and no two runs share a directory."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import refused, same_students
from torch import nn

from ddil_agents import Beta, bc, compare, dagger, evaluate
from ddil_agents.evaluation.settings import Evaluation
from ddil_agents.training.checkpoint import is_regular, write_atomically
from ddil_env import Expert, GaussianMixtureExpert, NetworkDenoiser, NoiseSchedule
from ddil_env.presets import read_yaml

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = shlex.split(
    "--num_updates 6 --teacher_steps 4 --num_steps 2 --batch_size 16 --collect_size 32 --updates_per_collect 3 --checkpoint_every 3 "
    "--student '{width: 8}' --evaluate.n 20 --evaluate.n_action 4"
)


def test_links_are_followed_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_atomically(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"]
    assert (tmp_path / "pipe").is_fifo()


def test_the_output_of_a_process_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    read, write = os.pipe()
    write_atomically(Path(f"/dev/fd/{write}"), "through")
    assert os.read(read, 100) == b"through"
    with (tmp_path / "printed").open("w") as file:
        file.write("a table\n")
        file.flush()
        write_atomically(Path(f"/dev/fd/{file.fileno()}"), "results")
    assert (tmp_path / "printed").read_text() == "a table\nresults"
    assert not is_regular(Path("/dev/stdout"))
    for descriptor in (read, write):
        os.close(descriptor)


def test_files_are_read_as_utf8_whatever_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("evaluate: {images: é€}\n", encoding="utf-8")
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "ddil_agents.bc", "--env", "digits", "--config", str(tmp_path / "mine.yaml"), "--print_config"]
    found = subprocess.run(command, env=os.environ | locale, capture_output=True)
    assert "é€" in found.stdout.decode(), found.stderr.decode()


def test_an_error_of_several_lines_is_printed_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        ("seed: 1\nseed: 2\n", "'seed' stands twice; remove one of them"),
        (f"x: {'[' * 5000}", "is not valid YAML"),
    ):
        (tmp_path / "mine.yaml").write_text(content)
        error = refused(dagger.main, ["--env", "digits8", "--config", str(tmp_path / "mine.yaml")], capsys)
        assert message in error
        assert error.count("\n") == 1


def test_an_evaluation_replaces_its_own_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    argv = ["--env", "gaussian_mixture", "--steps", "1", "--n", "20", "--n_action", "4"]
    error = refused(evaluate.main, [*argv, "--out", str(tmp_path / "config.yaml")], capsys)
    assert "holds something else than results of an evaluation; name another file" in error
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"
    for _ in range(2):
        evaluate.main([*argv, "--out", str(tmp_path / "results.json")])
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "results.json"}
    with pytest.raises(ValueError, match=r"store=.*config.yaml: it is a file; name a folder"):
        Evaluation(store=str(tmp_path / "config.yaml"))


def test_a_run_directory_that_another_process_trains_in_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    argv = ["--env", "gaussian_mixture", *SMALL, "--out", str(out)]
    out.mkdir()
    with FileLock(out / ".lock"):
        assert "is in use by another process, which trains there" in refused(bc.main, argv, capsys)
        assert {path.name for path in out.iterdir()} == {".lock"}
    bc.main(argv)
    with FileLock(out / ".lock"):
        assert "is in use by another process" in refused(bc.main, ["--resume", str(out)], capsys)
    bc.main(["--resume", str(out)])


class Dropping(GaussianMixtureExpert):
    """Its students have dropout, which draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__([[0.0, 1.0], [1.0, 0.0]], 0.2)

    def make_student(self, **options: Any) -> NetworkDenoiser:
        student = super().make_student(**options)
        student.network.layers[1] = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
        return student


def test_a_run_with_dropout_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "dropping.yaml").write_text(f"expert: {__name__}.Dropping\n")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)  # what ran before
        dagger.main(["--env", str(tmp_path / "dropping.yaml"), *SMALL, "--out", str(tmp_path / name)])
    assert same_students(tmp_path / "one", tmp_path / "two")


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("seed: 1\nbeta: {forward: 1.0, forward: 0.5}\n")
    with pytest.raises(ValueError, match=r"'forward' stands twice; remove one of them\n.*line 2"):
        read_yaml(tmp_path / "twice.yaml")
    arms = {"one": {"agent": "bc", "seed": 3}, "two": {"agent": "dagger"}}
    comparison = compare.Comparison(env="gaussian_mixture", arms=arms)
    staged = compare.Comparison(env="digits8", arms={"one": {"agent": "dagger", "config": "staged"}}, shared={"num_updates": 7})
    with pytest.raises(ValueError, match="num_updates=7 would not hold: the stages of config staged set it themselves; add stages: null"):
        compare.check_comparison(staged, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ValueError, match="run: it is a run; name a new folder"):
        compare.check_comparison(comparison, tmp_path / "run")
    with pytest.raises(ValueError, match="arm 'one' sets seed: each arm runs with the comparison's seeds"):
        compare.check_comparison(comparison, tmp_path)
    with pytest.raises(ValueError, match="need finite shares ≥ 0 that do not sum to 0 or to infinity"):
        Beta(1e308, 0, 1e308)


def test_a_legacy_code_page_costs_characters_and_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddil_agents.evaluate", "--env", "gaussian_mixture", "--steps", "1", "--n", "20", "--n_action", "4"]
    for arguments in ([*command[3:], "--out", str(tmp_path / "out.json")], ["--help"]):
        found = subprocess.run([*command[:3], *arguments], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
        assert found.returncode == 0, found.stderr.decode()
        assert b"?" in found.stdout
    assert (tmp_path / "out.json").is_file()


def test_a_flag_that_stages_or_an_agents_own_guidance_would_override_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--env", "digits8", "--config", "staged"]
    for flag, value in (("num_updates", "7"), ("num_steps", "2"), ("beta.student", "1")):
        error = refused(dagger.main, [*argv, f"--{flag}", value], capsys)
        assert f"--{flag.split('.')[0]} would not hold: the 8 stages of this config set it themselves; pass --stages null" in error
    error = refused(dagger.main, ["--env", "digits8", "--env.guidance_scale", "3", "--config", str(write_guidance())], capsys)
    assert "--env.guidance_scale 3 would not hold: training uses guidance_scale=2; pass --guidance_scale 3" in error


def write_guidance() -> Path:
    Path("guided.yaml").write_text("guidance_scale: 2.0\n")
    return Path("guided.yaml")


class Plain(GaussianMixtureExpert):
    """A plug-in with one mistake, by name."""

    def __init__(self, mistake: str = "") -> None:
        if mistake == "no super":
            return
        super().__init__([[0.0, 1.0], [1.0, 0.0]], 0.2)
        self.mistake = mistake
        if mistake == "support":
            self.support = 3  # type: ignore[assignment]
        if mistake == "max_batch":
            self.max_batch = 0
        if mistake in ("schedule", "sample_shape"):
            given = {"schedule": NoiseSchedule("linear"), "sample_shape": (2,)} | {mistake: None if mistake == "schedule" else 2}
            Expert.__init__(self, **given)  # type: ignore[arg-type]

    def make_student(self, **options: Any) -> Any:
        return nn.Linear(2, 2) if self.mistake == "student" else super().make_student(**options)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no super", "does not call super().__init__(schedule, sample_shape, …): add it as its first line"),
        ("schedule", "schedule=None: need a ddil_env.NoiseSchedule"),
        ("sample_shape", "sample_shape=2: need a tuple of at least one axis"),
        ("support", "is a int; need one of ddil_env.support"),
        ("max_batch", "=0: need a whole number of at least 1"),
        ("student", "Plain.make_student() returned Linear; return a ddil_env.NetworkDenoiser"),
    ],
)
def test_a_plug_ins_mistakes_are_named_before_training(mistake: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--env.expert", f"{__name__}.Plain", "--env.mistake", mistake, *SMALL[:-6], "--out", "run"]
    assert message in refused(dagger.main, argv, capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("env: {expert: ''}", "cannot find expert ''; pass a dotted path such as my_pkg.MyExpert"),
        ("env: {expert: 5}", "env.expert=5 in config.yaml: need the class path of an expert, such as my_pkg.MyExpert"),
        ("beta: 0.5", "beta=0.5: need a mapping of shares"),
        ("beta: [1, 0, 0]", "beta=[1, 0, 0]: need a mapping of shares"),
        ("beta: null", "beta=None: need a mapping of shares"),
        ("batch_size: null", "batch_size=None: need a whole number"),
        ("env: 5", "env=5 in config.yaml: need a preset's name, or a mapping"),
        (
            "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefgh")).join(["a: &a [1, 1]\n", ""]),
            "unfolds to more",
        ),
        ("a: &a [*a]", "unfolds to more than 100,000 values"),
        ("guidance_scale: 1.0e+39", "guidance_scale=1e+39: need a finite number up to 1e+06"),
    ],
)
def test_values_of_another_type_in_a_config_are_named(content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(content + "\n")
    argv = ["--env", "gaussian_mixture", "--config", "config.yaml", *SMALL, "--out", "run"]
    argv = argv[2:] if content.startswith("env") else argv
    if content.startswith("batch_size"):
        argv = [word for i, word in enumerate(argv) if word != "--batch_size" and argv[i - 1] != "--batch_size"]
    assert message in refused(dagger.main, argv, capsys)
