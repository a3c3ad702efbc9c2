"""What a user may get wrong on a command line, in a config, or by editing a run's files: each error says what, where and the cure."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import refused

from ddil_agents import bc, compare, dagger, dmd2, evaluate, report

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = shlex.split(
    "--env gaussian_mixture --num_updates 6 --teacher_steps 4 --num_steps 2 --batch_size 16 --collect_size 32 --checkpoint_every 3 "
    "--log_every 2 --student '{width: 8}' --evaluate.n 20 --evaluate.n_action 4 --evaluate_every 3 --validation.n 20"
)
Main = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "bc"
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
        bc.main([*SMALL, "--out", str(out)])
    return out


@pytest.fixture
def copy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, as the only one of a comparison, and outside of the working directory."""
    return Path(shutil.copytree(run, tmp_path_factory.mktemp("comparison") / "runs" / "updates" / "bc-s0"))


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (bc, "--critic_updates 3", "--help lists them all; it is a setting of dmd2"),
        (bc, "--stages '[{critic_updates: 3}]'", "stage 1 of 1: unknown setting critic_updates; .*it is a setting of dmd2"),
        (bc, "--env.model x", "unknown flag --env.model; .*it is an argument of the experts of .*sd15"),
        (bc, "--config imagine_flash", "unknown bc 'imagine_flash'; .*'imagine_flash' is a preset of dagger"),
        (bc, "--agent dmd2", r"agent=dmd2: need one of bc, whose command this is; for dmd2 run python -m ddil_agents\.dmd2"),
        (dmd2, "--lora {rnk: 3}", r"--lora takes one value, and 2 follow it: \{rnk: 3\}; put a value with spaces in quotes"),
        (dmd2, "--seed 1 stray", "--seed takes one value, and 2 follow it: 1 stray"),
        (dagger, "--callbacks nosuch.Mine", r"need a list of class paths of subclasses of Callback.* \(nosuch.Mine: No module named"),
        (dagger, "--callbacks [os.path]", r"such as \[my_pkg.MyCallback\] \(os.path is none\)"),
        (dagger, "--out ''", "out='': need the name of a directory"),
        (evaluate, "--checkpoint 3", "--checkpoint 3: it is a run's; name the run as --run DIR"),
        (evaluate, "--seeds 1 1", "--seeds 1 1: each may stand once"),
        (evaluate, "--steps 4 4", "--steps 4 4: each may stand once"),
        (compare, "--agents bc", "--out is missing: directory of the comparison"),
        (compare, "--agents bc bc --out o", "--agents bc bc: each may stand once"),
        (compare, "--agents bc --out o --report_only", "no comparison in o to report"),
    ],
)
def test_a_command_line_that_means_another_is_told_which(main: Main, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(main.main, ["--env", "gaussian_mixture", *shlex.split(flags)], capsys)  # type: ignore[attr-defined]
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


def test_a_null_character_in_a_path_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [("--out", bc), ("--init", bc), ("--evaluate.store", bc), ("--captions", evaluate), ("--images", evaluate)]
    for flag, main in flags:
        error = refused(main.main, ["--env", "gaussian_mixture", flag, "a\0b"], capsys)
        assert r"'a\x00b' holds a null character, which no path or setting may; remove it" in error
    Path("null.yaml").write_text('init: "a\\0b"\n')
    assert "null.yaml: 'a\\x00b' holds a null character" in refused(bc.main, ["--env", "digits8", "--config", "null.yaml"], capsys)
    assert "a path holds a null character" in refused(report.main, [str(run), "--out", "a\0b"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("evaluate: 3", "evaluate=3: need a mapping of n, seed, "),
        ("validation: null", "validation=null: need a mapping of n, metrics"),
        ("thresholding: [1]", r"thresholding=\[1\]: need a mapping of kind, roles"),
        ("seed: null", "seed=None: need a whole number"),
        ("track: null", "track=None: need one of none, trackio, wandb"),
        ("init: 3", r"init=3: need a text or null \(in quotes, where YAML would read a number\)"),
        ("env: {device: 3}", r"env.device=3: need a device or a text \(in quotes"),
        ("stages: [{init: {a: 1}}]", r"stage 1 of 1: init=\{'a': 1\}: need a text or null"),
        ("stages: [{1: 2}]", "stage 1 of 1: unknown setting 1;"),
        ("help: 1", "help=1: it is a flag of the command line, not a setting; remove it from the file"),
    ],
)
def test_a_config_with_a_value_that_would_be_ignored_or_crash_is_refused(
    content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text(content + "\n")
    error = refused(dagger.main, ["--env", "gaussian_mixture", "--config", "config.yaml"], capsys)
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("{1: {agent: bc}}", "arm 1: YAML reads this name as int; put it in quotes"),
        ("{true: {agent: bc}}", "arm True: YAML reads this name as bool; put it in quotes"),
        ("{a: {agent: bc, evaluate: 3}}", "arm a: evaluate=3: need a mapping of an evaluation's settings"),
        ("{a: {agent: bc, critic_updates: 3}}", "arm a: unknown setting critic_updates; .*it is a setting of dmd2"),
        ("{bc: {agent: bc}}", "--agents bc: --config has an arm of this name already"),
    ],
)
def test_an_arm_that_is_none_is_refused(arms: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("arms.yaml").write_text(f"env: gaussian_mixture\narms: {arms}\n")
    more = ["--agents", "bc"] if "already" in message else []
    assert re.search(message, refused(compare.main, ["--config", "arms.yaml", "--out", "o", *more], capsys))


def test_a_config_of_evaluate_or_compare_that_is_no_mapping_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.yaml").write_text("- a\n")
    for main, flags in ((evaluate.main, []), (compare.main, ["--out", "o"])):
        assert "list.yaml holds list, but a config is a mapping" in refused(main, ["--config", "list.yaml", *flags], capsys)


def edit_line(path: Path, line: str) -> None:
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]) + "\n")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[1]", r"\[1\] is no object"),
        ('{"step": "x", "seconds": 1}', "step is 'x', not a number"),
        ('{"step": 2.5, "seconds": 1, "loss": 1, "teacher_nfe": 1, "best": true}', "step is 2.5, not a whole number"),
        ('{"step": 2, "seconds": null}', "seconds is None, not a number"),
        ('{"step": 2, "seconds": 1, "loss": "low"}', "loss is 'low', not a number"),
        ('{"step": 2, "seconds": 1, "beta": {"forward": [1]}}', r"in beta, forward is \[1\], not a number"),
    ],
)
def test_a_line_of_metrics_of_wrong_types_is_named(
    line: str, fault: str, run: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        edit_line(copy / name, line)
        commands = [(report.main, [str(copy), "--out", "o"]), (bc.main, ["--resume", str(copy)])]
        for main, argv in commands if line == "[1]" else commands[:1]:
            error = refused(main, argv, capsys)
            assert re.search(rf"line 1 of {re.escape(str(copy / name))} is damaged \({fault}\); remove that line", error)
        shutil.copy(run / name, copy / name)


def test_a_line_without_what_the_report_draws_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_line(copy / "metrics.jsonl", '{"step": 2, "seconds": 1}')
    assert "is damaged (it has no loss, teacher_nfe)" in refused(report.main, [str(copy), "--out", "o"], capsys)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ([], "not a run's result"),
        ({"models": []}, r"models is \[\], need dict"),
        ({"student": "nobody"}, "student is 'nobody', which is none of its models"),
        ({"num_updates": "6"}, "num_updates is '6', need int"),
        ({"models": {"bc@2": {"frechet": "low"}}}, "frechet of bc@2 is 'low', need numbers"),
        ({"models": {"bc@2": {"shift": [1, "x"]}}}, r"shift of bc@2 is \[1, 'x'\], need numbers"),
        ({"models": {"bc@2": 3}}, "bc@2 is 3, need its metrics by name"),
    ],
)
def test_a_result_of_wrong_types_is_named(change: object, fault: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | change if isinstance(change, dict) else change))
    again = re.escape(f"; remove it, and write it again with --resume {copy}")
    flags = ["--env", "gaussian_mixture", "--agents", "bc", "--seeds", "1", "--report_only", "--out", str(copy.parents[2])]
    for main, argv in ((report.main, [str(copy), "--out", "o"]), (compare.main, flags)):
        assert re.search(rf"cannot read {re.escape(str(copy))}/result.json \({fault}\){again}", refused(main, argv, capsys))


def test_other_files_of_a_comparison_of_wrong_types_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--env", "gaussian_mixture", "--agents", "bc", "--seeds", "1", "--report_only", "--out", str(copy.parents[2])]
    (copy / "untrained.json").write_text('{"frechet": "low"}')
    assert "untrained.json is damaged (not numbers by name); remove it" in refused(compare.main, flags, capsys)
    (copy.parents[2] / "matched.json").write_text('{"nfe": []}')
    assert "matched.json is damaged" in refused(compare.main, [*flags, "--equal", "[updates, nfe]"], capsys)
