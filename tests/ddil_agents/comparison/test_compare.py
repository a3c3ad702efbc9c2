"""Comparisons: arms and budgets, refusals, and one whole comparison, resumed, with an arm that diverges."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from threading import Event, Lock

import ablations
import pytest
import torch
import yaml
from helpers import comparison

from ddil_agents import compare
from ddil_agents.commands.load import load_run
from ddil_agents.comparison import runs as runner
from ddil_agents.comparison import tables, untrained
from ddil_agents.comparison.arms import Comparison, Run, arm_settings, make_arms, merge_settings
from ddil_agents.comparison.runs import recorded_updates
from ddil_agents.comparison.untrained import weights_digest
from ddil_agents.evaluation.trajectories import Trajectories
from ddil_env.presets import config_dir, preset_names, read_yaml

TINY = {
    "num_updates": 12,
    "num_steps": 2,
    "teacher_steps": 4,
    "batch_size": 8,
    "collect_size": 16,
    "updates_per_collect": 4,
    "evaluate": {"n": 20, "n_paths": 10, "n_action": 5},
}


def test_later_settings_override_earlier_ones():
    assert merge_settings({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"d": 3}}, {"a": {"e": 4}}) == {"a": {"e": 4}, "b": {"c": 1, "d": 3}}
    arms = {"one": {"agent": "dagger", "config": "demo", "num_steps": 2, "beta": {"student": 1.0}}}
    agent, settings = arm_settings(comparison(arms=arms, shared={"num_steps": 8, "num_updates": 7}), "one")
    assert agent == "dagger"
    assert settings == {"num_updates": 7, "num_steps": 2, "updates_per_collect": 32, "checkpoint_every": 200, "beta": {"student": 1.0}}


def test_agents_times_priors_are_arms():
    assert make_arms(["bc", "lcm"], ["own"]) == {"bc": {"agent": "bc"}, "lcm": {"agent": "lcm"}}
    arms = make_arms(["dagger"], ["own", "ddil"])
    assert arms["dagger ddil"] == {"agent": "dagger", "beta": {"forward": 0.5, "teacher": 0.1, "student": 0.4}}
    with pytest.raises(ValueError, match="unknown β 'mine'; choose from own, forward"):
        make_arms(["bc"], ["mine"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": {}}, "nothing to compare"),
        ({"arms": {"a": {"num_updates": 3}}}, "an arm is a mapping with an `agent`"),
        ({"arms": {"a/b": {"agent": "bc"}}}, "leave out slashes"),
        ({"arms": {"teacher": {"agent": "bc"}}}, "must differ from the teacher's"),
        ({"seeds": 0}, "need at least 1"),
        ({"baseline": "lcm"}, "unknown arm; choose one of bc, dagger"),
        ({"primary": "fid"}, "choose one of: .*frechet"),
        ({"equal": ("seconds",)}, "`updates` comes first"),
        ({"level": 95.0}, "need a number from 0.5"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        comparison(**settings)


def test_seeds_that_are_added_are_matched_as_the_others_were(tmp_path: Path):
    given = comparison(equal=("updates", "teacher_nfe"))
    assert recorded_updates(given, "teacher_nfe", tmp_path) == {}
    fixed = {"teacher_nfe": compare.matched_entry(given, {"bc": 100, "dagger": 63})}
    (tmp_path / "matched.json").write_text(json.dumps(fixed))
    assert recorded_updates(given, "teacher_nfe", tmp_path) == {"bc": 100, "dagger": 63}
    assert recorded_updates(given, "seconds", tmp_path) == {}
    other_arm = comparison(arms={"bc": {"agent": "bc"}, "dagger": {"agent": "dagger", "updates_per_collect": 2}, "lcm": {"agent": "lcm"}})
    assert recorded_updates(other_arm, "teacher_nfe", tmp_path) == {"bc": 100}
    for other in ({"baseline": "dagger"}, {"shared": {"num_updates": 7}}):
        now = comparison(equal=("updates", "teacher_nfe"), **other)
        with pytest.raises(ValueError, match=r"were matched to the cost of bc, and the baseline is now .*, or has other settings"):
            compare.check_comparison(now, tmp_path)


def test_a_run_gets_a_gpu_that_is_free_of_those_that_are_visible(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc,-1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used, lock, others = {}, Lock(), Event()

    def ran(command, env, **_):
        with lock:
            used[Path(command[command.index("--out") + 1]).name] = env["CUDA_VISIBLE_DEVICES"]
            if len(used) == 4:
                others.set()
        if command[-3].endswith("bc-s0"):
            assert others.wait(10)  # the longest run
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", ran)
    runs = [Run("updates", "bc", seed, tmp_path / f"bc-s{seed}") for seed in range(4)]
    compare.train(runs, comparison(), tmp_path, None, jobs=2)
    assert used.keys() == {run.directory.name for run in runs}
    assert {used["bc-s0"], used["bc-s1"]} == {"3", "GPU-abc"}
    assert used["bc-s1"] == used["bc-s2"] == used["bc-s3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runner.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runner.visible_gpus() == []


def test_arms_with_dots_in_their_names_have_files_of_their_own(monkeypatch, tmp_path: Path):
    given = {}

    def ran(command, **_):
        path = Path(command[command.index("--config") + 1])
        given[path.name] = read_yaml(path)["beta"]["teacher"]
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", ran)
    shares = {"teacher .1": 0.1, "teacher .25": 0.25, "teacher .5, quantile 0.9": 0.5, "teacher .5, quantile 0.99": 0.45}
    arms = {name: {"agent": "dagger", "beta": {"forward": 1 - x, "teacher": x, "student": 0.0}} for name, x in shares.items()}
    runs = [Run("updates", arm, seed, tmp_path / f"{arm}-s{seed}") for seed in (0, 1) for arm in arms]
    compare.train(runs, comparison(arms=arms), tmp_path, None, jobs=1)
    assert given == {f"{arm}-s{seed}.yaml": x for arm, x in shares.items() for seed in (0, 1)}
    assert {path.name for path in tmp_path.glob("*.log")} == {f"{arm}-s{seed}.log" for arm in arms for seed in (0, 1)}


def config(folder: Path, settings) -> Path:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """Two seeds of three arms, one on other times and one that diverges, at two budgets."""
    out = tmp_path_factory.mktemp("comparison")
    dagger = {"agent": "dagger", "updates_per_collect": 2, "grid": "trailing"}
    arms = {"bc": {"agent": "bc"}, "dagger": dagger, "hot": {"agent": "bc", "learning_rate": 1e30}}
    settings = {"env": "gaussian_mixture", "arms": arms, "shared": TINY, "seeds": 2, "equal": ["updates", "teacher_nfe"]}
    compare.main(["--config", str(config(out, settings)), "--out", str(out / "out"), "--jobs", "2"])
    return out, json.loads((out / "out" / "comparison.json").read_text())


def test_a_comparison_runs_whole_and_a_diverged_arm_is_a_result(whole):
    out, found = whole
    assert {(r["arm"], r["seed"], r["done"]) for r in found["budgets"]["updates"]["runs"]} == {
        (arm, seed, arm != "hot") for arm in ("bc", "dagger", "hot") for seed in (0, 1)
    }
    assert any("hot-s0" in flag and "not finite" in flag for flag in found["flags"])
    matched = {r["arm"]: r for r in found["budgets"]["teacher_nfe"]["runs"]}
    assert matched.keys() == {"bc", "dagger"}
    assert matched["bc"]["directory"] == "runs/updates/bc-s1"  # the budget is its own
    assert matched["dagger"]["num_updates"] < 12
    assert matched["dagger"]["teacher_nfe"] == pytest.approx(matched["bc"]["teacher_nfe"], rel=0.35)
    assert found["initial"]["bc"].keys() == {"0", "1"}
    assert found["initial"]["bc"]["0"]["endpoint_rmse"] > 0.3  # a random network
    assert found["provenance"].keys() >= {"date", "hardware", "torch"}
    names = [name.partition(",")[0] for name in found["references"]]
    assert names == ["real halves", "teacher halves", "training data", "teacher@4", "teacher@2"]
    assert all(re.search(r", n = \d+$", name) for name in list(found["references"])[:3])
    names = [line[0].partition(",")[0] for line in tables.table_rows(found, "updates")]
    assert names == [
        "model",
        "teacher halves",
        "training data",
        "teacher@4",
        "teacher@2",
        "bc",
        "dagger",
        "hot",
    ]  # halves of the data are of steps alone
    assert len(found["references"]["teacher@4"]) == 2
    lines = list(csv.DictReader(io.StringIO((out / "out" / "table.csv").read_text())))
    assert len(lines) == 6 + 4
    assert lines[0]["arm"] == "bc"
    assert float(lines[0]["frechet"]) > 0
    assert (out / "out" / "table.tex").read_text().count(r"\begin{tabular}") == 2
    assert "teacher, times of dagger" in (out / "out" / "report.html").read_text()


def test_arms_of_a_seed_share_noise_data_and_initial_weights(whole):
    out, _ = whole
    runs = out / "out" / "runs" / "updates"
    shown = {p.parent.name.removesuffix("-s0"): Trajectories.load(p) for p in runs.glob("*/trajectories.safetensors")}
    teacher = Trajectories.load(runs / "bc-s0" / "teacher.safetensors")
    assert shown.keys() == {"bc", "dagger"}
    finished = [load_run(runs / f"{arm}-s0") for arm in shown]
    one, other = (type(learner)(learner.expert, learner.config, learner.support) for learner in finished)
    assert weights_digest(one.student) == weights_digest(other.student) == weights_digest(other.ema_student)
    assert weights_digest(one.student) != weights_digest(finished[0].ema_student)
    (x, c), (theirs, their_c) = (learner.expert.sample_data(16, learner.collector.streams["data"]) for learner in (one, other))
    assert torch.equal(x, theirs)
    assert torch.equal(c, their_c)
    assert torch.equal(shown["bc"].x_t[:, 0], shown["dagger"].x_t[:, 0])
    assert torch.equal(shown["bc"].x_t[:, 0], teacher.x_t[:, 0])
    assert torch.equal(teacher.error, torch.zeros(10, 2))
    assert torch.equal(teacher.by_expert, torch.ones(10, 2, dtype=torch.bool))
    assert not shown["bc"].by_expert.any()
    assert (shown["bc"].error > 0).all()
    assert torch.equal(shown["bc"].x_0[:, -1], shown["bc"].x_t[:, -1])


def test_arms_that_start_from_one_student_share_its_evaluation(whole, monkeypatch, tmp_path: Path):
    out, found = whole
    evaluated, evaluate = [], untrained.Evaluator.evaluate
    monkeypatch.setattr(untrained.Evaluator, "evaluate", lambda *args, **kwargs: evaluated.append(args) or evaluate(*args, **kwargs))
    runs = [Run("updates", arm, 1, tmp_path / arm) for arm in ("bc", "again")]
    for run in runs:
        shutil.copytree(out / "out" / "runs" / "updates" / "bc-s1", run.directory)
        (run.directory / "untrained.json").unlink()
    comparison = Comparison(**yaml.safe_load((out / "given.yaml").read_text()))
    rows = untrained.evaluate_untrained(comparison, runs)
    assert len(evaluated) == 1
    assert rows["bc"][1] == rows["again"][1]
    assert rows["bc"][1]["endpoint_rmse"] == found["initial"]["bc"]["1"]["endpoint_rmse"]


def test_an_untrained_student_is_what_training_started_from(whole, tmp_path: Path):
    out, found = whole
    trained = out / "out" / "runs" / "updates" / "bc-s1"
    run = Run("updates", "bc", 1, tmp_path / "bc")
    shutil.copytree(trained, run.directory)
    (run.directory / "untrained.json").unlink()
    started = read_yaml(run.directory / "config.yaml") | {"init": str(trained)}
    (run.directory / "config.yaml").write_text(yaml.safe_dump(started))
    given = Comparison(**yaml.safe_load((out / "given.yaml").read_text()))
    (own,) = (r for r in found["budgets"]["updates"]["runs"] if (r["arm"], r["seed"]) == ("bc", 1))
    assert untrained.evaluate_untrained(given, [run])["bc"][1]["endpoint_rmse"] == pytest.approx(own["endpoint_rmse"], rel=1e-5)


def test_an_arm_that_is_left_out_keeps_its_matched_steps(whole, tmp_path: Path, monkeypatch):
    out, _ = whole
    shutil.copytree(out / "out", tmp_path / "out")
    given = yaml.safe_load((out / "given.yaml").read_text())
    fixed = compare.read_matched(tmp_path / "out")["teacher_nfe"]
    trained = []
    monkeypatch.setattr(compare, "train", lambda runs, *_: trained.extend(run.directory for run in runs))
    fewer = given | {"arms": {name: given["arms"][name] for name in ("bc", "hot")}}
    compare.main(["--config", str(config(tmp_path, fewer)), "--out", str(tmp_path / "out")])
    assert compare.read_matched(tmp_path / "out")["teacher_nfe"] == fixed
    assert "dagger" in fixed["updates"]
    # bc's runs at equal teacher_nfe are those at equal updates, and are those of that tier to train.
    assert len(trained) == len(set(trained)) == 4


def test_the_teacher_in_all_its_steps_is_not_one_in_more(whole, tmp_path: Path):
    out, found = whole
    shutil.copytree(out / "out", tmp_path / "out")
    for path in tmp_path.glob("out/runs/*/*/result.json"):
        result = json.loads(path.read_text())
        result["models"]["teacher@64"] = result["models"]["teacher@2"]
        path.write_text(json.dumps(result))
    compare.main(["--config", str(out / "given.yaml"), "--out", str(tmp_path / "out"), "--report_only"])
    again = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "teacher@64" in again["references"]
    for metric, own in found["budgets"]["updates"]["statistics"].items():
        assert again["budgets"]["updates"]["statistics"][metric]["arms"] == own["arms"]


def test_a_baseline_that_diverged_leaves_what_was_trained_to_be_shown(whole, tmp_path: Path):
    out, _ = whole
    shutil.copytree(out / "out", tmp_path / "out")
    (tmp_path / "out" / "matched.json").unlink()
    given = ["--config", str(out / "given.yaml"), "--out", str(tmp_path / "out"), "--baseline", "hot"]
    compare.main([*given, "--report_only"])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["budgets"].keys() == {"updates"}
    assert "equal teacher_nfe: not run, because the budget is what hot costs, which has no finished run" in found["flags"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_ablations_table_has_each_arm_in_per_cent_of_its_baseline(whole):
    _, found = whole
    rows = ablations.summary(found)["budgets"]["updates"]
    assert rows.keys() == {"bc", "dagger"}  # the third diverged
    a, b = ([run["endpoint_rmse"] for run in found["budgets"]["updates"]["runs"] if run["arm"] == arm and run["done"]] for arm in rows)
    difference = 100 * (sum(b) - sum(a)) / sum(a)
    assert rows["dagger"]["endpoint_rmse"]["difference"]["mean"] == pytest.approx(difference)
    lines = ablations.markdown("a title", ablations.summary(found)).splitlines()
    assert sum(line.startswith("| dagger | 2 | 12 |") and f", {difference:+.1f} [" in line for line in lines) == 1
    assert any(line.startswith("- ! hot, seed 0") or "hot-s0" in line for line in lines)


def test_interactions_are_what_one_factor_changes_of_the_other():
    y = {"a, none": 10.0, "a, tight": 8.0, "b, none": 11.0, "b, tight": 6.0}
    rows = {arm: {"recall": {"by_seed": {seed: value + seed for seed in range(4)}}} for arm, value in y.items()}
    del rows["b, tight"]["recall"]["by_seed"][2]
    found = ablations.interactions(rows)
    assert found.keys() == {"b, tight"}
    base = (10 + 11 + 13) / 3
    assert found["b, tight"]["recall"] == pytest.approx(dict.fromkeys(("mean", "low", "high"), 100 * ((6 - 11) - (8 - 10)) / base))
    for other in ({}, {"forward": {}, "student": {}}, {"a, x": {}, "b, y": {}}, {arm: {} for arm in ("a, x", "a, y", "b, x", "c, y")}):
        assert ablations.interactions(other) == {}


def test_ablations_that_are_run_later_leave_earlier_tables(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "compare", lambda *_: whole[1])
    monkeypatch.setattr(ablations, "write_page", lambda *_: None)
    out = tmp_path / "ablations.json"
    for name in ("replay", "priors", "replay"):
        monkeypatch.setattr("sys.argv", ["ablations.py", "--names", name, "--envs", "digits8", "--out", str(out)])
        ablations.main()
    assert list(json.loads(out.read_text())) == ["priors, digits8", "replay, digits8"]
    assert out.with_suffix(".md").read_text().count("\n## ") == 2


def test_a_second_run_trains_nothing_and_says_the_same(whole, monkeypatch):
    out, before = whole
    monkeypatch.setattr(runner, "subprocess", None)
    done = out / "out" / "runs" / "updates"
    compare.main(["--config", str(out / "given.yaml"), "--out", str(out / "out"), "--report_only", "true"])
    after = json.loads((out / "out" / "comparison.json").read_text())
    assert after["budgets"] == before["budgets"]
    assert len(list(done.glob("*/result.json"))) == 4


def test_a_comparison_goes_on_from_another_working_directory(whole, monkeypatch):
    out, _ = whole
    monkeypatch.chdir(out)
    monkeypatch.setattr(runner, "subprocess", None)
    compare.main(["--config", "given.yaml", "--out", "out", "--report_only", "true"])
    stored = {path.name.rpartition("-")[0][:9] for path in (out / "out" / "expert" / "seed0").glob("*.safetensors")}
    assert stored == {"teacher@4", "teacher@2"}


def test_other_settings_in_the_same_directory_are_refused(whole, capsys):
    out, _ = whole
    with pytest.raises(SystemExit):
        compare.main(["--config", str(out / "given.yaml"), "--out", str(out / "out"), "--num_updates", "13"])
    error = capsys.readouterr().err
    assert "holds other settings than arm bc has now" in error
    assert f"remove its runs, {out / 'out' / 'runs' / '*' / 'bc-s*'}" in error


def test_other_settings_of_runs_at_another_budget_are_refused(whole, tmp_path: Path):
    out, _ = whole
    given = Comparison(**yaml.safe_load((out / "given.yaml").read_text()))
    left = tmp_path / "runs" / "teacher_nfe" / "dagger-s0.yaml"
    left.parent.mkdir(parents=True)
    shutil.copy(out / "out" / "runs" / "teacher_nfe" / left.name, left)
    compare.check_comparison(given, tmp_path)  # of another number of steps alone, which the budget sets
    left.write_text(left.read_text().replace("updates_per_collect: 2", "updates_per_collect: 3"))
    with pytest.raises(ValueError, match=r"dagger-s0\.yaml holds other settings than arm dagger has now"):
        compare.check_comparison(given, tmp_path)


def test_what_is_kept_of_an_arm_goes_with_its_runs(whole, tmp_path: Path):
    out, before = whole
    settings = {"env": "gaussian_mixture", "arms": {"bc": {"agent": "bc", "teacher_steps": 2}}, "shared": TINY, "seeds": 1}
    shutil.copytree(out / "out", tmp_path / "out")
    (tmp_path / "out" / "initial.json").write_text(json.dumps({"bc": {"0": {"endpoint_rmse": 99.0}}}))  # of an earlier version
    for path in (tmp_path / "out" / "runs").glob("*/bc-s*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    compare.main(["--config", str(config(tmp_path, settings)), "--out", str(tmp_path / "out"), "--jobs", "1"])
    after = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert after["initial"]["bc"]["0"]["endpoint_rmse"] not in (99.0, before["initial"]["bc"]["0"]["endpoint_rmse"])
    assert Trajectories.load(tmp_path / "out" / "runs" / "updates" / "bc-s0" / "teacher.safetensors").error.max() == 0


def test_arms_that_would_be_evaluated_differently_are_refused(tmp_path: Path):
    base = {"agent": "bc", **TINY}
    for other, message in (
        ({"evaluate": {"n": 30}}, "n is 20 and 30"),
        ({"teacher_steps": 8}, "teacher_steps is 4 and 8"),
        ({"guidance_scale": 3.0}, "guidance_scale is 1.0 and 3.0"),
    ):
        arms = {"a": base, "b": merge_settings(base, other)}
        with pytest.raises(ValueError, match=f"arms a and b would be evaluated differently: {message}"):
            compare.check_comparison(comparison(env="digits8", arms=arms), tmp_path)
    arms = {"a": base, "b": merge_settings(base, {"guidance_scale": 1.0, "evaluate": {"also_steps": [1]}})}  # 1 is the expert's own
    compare.check_comparison(comparison(env="digits8", arms=arms), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": {"guidance_scale": 3.0}}, r"arm bc: env=\{'guidance_scale': 3.0\}: all arms use the comparison's env"),
        ({"env": "digits"}, "arm bc: env=digits: all arms use the comparison's env"),
        ({"evaluate": {"seed": 0}}, r"arm bc: evaluate.seed=0: the noise of an evaluation comes from the seed of its run; leave it out"),
    ],
)
def test_what_is_the_comparisons_own_is_not_set_for_arms(tmp_path: Path, settings, message):
    for given in (comparison(shared=settings), comparison(arms={"bc": {"agent": "bc", **settings}, "dagger": {"agent": "dagger"}})):
        with pytest.raises(ValueError, match=message):
            compare.check_comparison(given, tmp_path)
    compare.check_comparison(comparison(shared={"env": "gaussian_mixture"}), tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--agents", "bcc"], "unknown agent 'bcc'"),
        (["--agents", "bc", "--betas", "student"], "behaviour cloning sees no student states"),
        (["--agents", "bc", "--env", "sd51"], "unknown env 'sd51'"),
        (["--agents", "bc", "--num_updates", "0"], "num_updates"),
        ([], "nothing to compare"),
    ],
)
def test_what_an_agent_refuses_is_refused_before_any_run(tmp_path: Path, capsys, flags, message):
    with pytest.raises(SystemExit):
        compare.main([*flags, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", preset_names("ablations"))
def test_the_ablations_are_accepted_by_their_agents(name: str, tmp_path: Path):
    settings = read_yaml(config_dir() / "ablations" / f"{name}.yaml")
    found = Comparison(**{key: tuple(value) if key == "equal" else value for key, value in settings.items()})
    assert found.seeds >= 6 or name == "four_agents"
    assert len(found.arms) >= 2
    compare.check_comparison(found, tmp_path)
