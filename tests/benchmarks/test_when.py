"""The map of when DDIL helps: its chains of runs, the pairing by seed, and the tests that were fixed before the runs."""

import concurrent.futures
import json
import math

import numpy as np
import pytest
import when
import when_report
from records import collect_records, restore_records
from safetensors.torch import load_file
from scipy import stats
from when_adaptive import adaptive_claims, adaptive_table

from ddil_agents import Beta
from ddil_agents.comparison.statistics import holm, sign_flip_test

SEEDS = range(400, 416)
FACTORS = {"w 3, 4 steps": 0.9, "w 7, 16 steps": 0.6}  # planted: the second arm's score beside the first's


def noise(name, seed):
    return np.random.default_rng([seed, sum(map(ord, name))]).normal(0, 0.05)


def record(cell, arm, seed, score):
    row = dict.fromkeys(when_report.METRICS, score) | {"error_own": [0.5 * score, 1.5 * score]}
    row["endpoint_rmse"] = None if cell.name.startswith("LCM") else score
    about = {"init": str(seed), "floor": 1.0, "teacher_nfe": 100, "student_nfe": 200}
    made = {"date": "2026-11-28", "hardware": "a CPU", "torch": "2"}
    return {"cell": cell.name, "arm": arm, "seed": seed, "average": row, "raw": {**row, "recall": 2 * score}, **about, **made}


@pytest.fixture
def records():
    """Of every cell and arm: scores that differ by seed, the second arm's by its factor (0.8 where none is named) and a little noise."""
    found = {}
    for cell in when.cells():
        for arm in ("start", *cell.arms):
            for seed in SEEDS:
                score = 2 + 0.1 * (seed % 7)
                if arm == list(cell.arms)[1]:
                    score *= FACTORS.get(cell.name, 0.8) * math.exp(noise(cell.name, seed))
                found[cell.name, arm, seed] = record(cell, arm, seed, score)
    return found


def planted(name):
    return [math.log(FACTORS.get(name, 0.8)) + noise(name, seed) for seed in SEEDS]


def test_an_effect_is_the_mean_log_ratio_with_students_interval(records):
    own = when_report.effects(records, when.cells(), "average")["w 3, 4 steps"]["student"]
    ratios = planted("w 3, 4 steps")
    mean, half = np.mean(ratios), stats.t.ppf(0.975, 15) * np.std(ratios, ddof=1) / 4
    expected = [100 * math.expm1(x) for x in (mean, mean - half, mean + half)]
    for metric in ("frechet_to_expert", "error_own"):  # errors come by step: their mean
        assert [own[metric][key] for key in ("mean", "low", "high")] == pytest.approx(expected)
    assert own["recall"]["seeds"] == 16
    assert own["recall"]["p"] == pytest.approx(sign_flip_test(ratios))


def test_the_contrast_is_each_seeds_mean_over_the_six_guided_cells(records):
    found = when_report.contrasts(records, "average")
    means = np.mean([planted(name) for name in when_report.GUIDED], axis=0)
    pooled = found["student, over the guided cells"]
    assert pooled["mean"] == pytest.approx(100 * math.expm1(means.mean()))
    assert pooled["p"] == pytest.approx(sign_flip_test(means))
    logs = {name: np.mean(planted(name)) for name in when_report.GUIDED}
    by_w = {w: np.mean([logs[f"w {w}, {n} steps"] for n in (4, 8, 16)]) for w in (3, 7)}
    assert found["from w 3 to w 7"]["mean"] == pytest.approx(100 * math.expm1(by_w[7] - by_w[3]))
    by_n = [np.mean([logs[f"w {w}, {n} steps"] for w in (3, 7)]) for n in (4, 8, 16)]
    slope = np.polyfit([2, 3, 4], by_n, 1)[0]
    assert found["for each doubling of N, guided"]["mean"] == pytest.approx(100 * math.expm1(slope))
    del records["w 7, 16 steps", "student", 403]
    assert when_report.contrasts(records, "average")["student, over the guided cells"]["seeds"] == 15  # a seed counts where it has all six


def test_pairs_that_forked_from_other_weights_are_no_pairs(records):
    records["w 7, 4 steps", "student", 405]["init"] = "another machine's"
    assert when_report.effects(records, when.cells(), "average")["w 7, 4 steps"]["student"]["recall"]["seeds"] == 15


def test_eight_comparisons_are_corrected_once_all_their_runs_are_there(records, tmp_path):
    cells = when.cells()
    when_report.write_report(records, cells, tmp_path / "when.json")
    told = json.loads((tmp_path / "when.json").read_text())
    seconds = {cell.name: list(cell.arms)[1] for cell in cells if cell.name in when_report.FAMILY}
    tested = [told["cells"]["average"][name][arm]["frechet_to_expert"] for name, arm in seconds.items()]
    assert told["complete"]
    assert (tmp_path / "when.png").is_file()
    assert len(tested) == 8
    assert [e["p_holm"] for e in tested] == pytest.approx(holm([e["p"] for e in tested]))
    assert "p_holm" not in told["cells"]["average"]["w 1, 4 steps"]["student"]["frechet_to_expert"]
    assert "p_holm" not in told["cells"]["raw"]["w 3, 4 steps"]["student"]["frechet_to_expert"]
    del records["DMD2, w 3, 4 steps", "own", 415]
    when_report.write_report(records, cells, tmp_path / "interim.json")
    assert "p_holm" not in (tmp_path / "interim.json").read_text()
    assert "**Interim**" in (tmp_path / "interim.md").read_text()
    assert not (tmp_path / "interim.png").exists()


def test_a_threshold_is_crossed_with_its_own_baseline(records):
    for seed in SEEDS:
        records["w 7, 8 steps", "student, no threshold", seed]["average"]["frechet_to_expert"] *= 0.5
    found = when_report.contrasts(records, "average")["no threshold: what it adds to the student's states"]
    assert found["mean"] == pytest.approx(100 * math.expm1(math.log(0.5) - np.mean(planted("w 7, 8 steps"))))
    own = when_report.effects(records, when.cells(), "average")["w 7, 8 steps"]
    assert own["student, no threshold"]["frechet_to_expert"]["mean"] == pytest.approx(-50)
    assert own["forward, no threshold"]["frechet_to_expert"]["mean"] == pytest.approx(0)


def test_runs_that_are_lost_are_named_and_leave_with_their_partner(records, tmp_path):
    key = ("LCM, w 3, 4 steps", "half", 401)
    records[key] = {k: records[key][k] for k in ("cell", "arm", "seed", "date", "hardware", "torch")} | {"lost": "the loss is not finite"}
    when_report.write_report(records, when.cells(), tmp_path / "when.json")
    told = json.loads((tmp_path / "when.json").read_text())
    assert told["lost"] == ["LCM, w 3, 4 steps, half, seed 401: the loss is not finite"]
    assert told["cells"]["average"]["LCM, w 3, 4 steps"]["half"]["recall"]["seeds"] == 15
    assert "endpoint_rmse" not in told["cells"]["average"]["LCM, w 3, 4 steps"]["half"]  # fresh noise: x_T names no sample
    assert "- ! LCM, w 3, 4 steps, half, seed 401" in (tmp_path / "when.md").read_text()


def test_the_cells_are_those_that_were_written_down():
    names = [cell.name for cell in when.cells()]
    assert len(set(names)) == len(names) == 16
    assert set(when_report.FAMILY) | set(when_report.UNGUIDED) <= set(names)
    for cell in when.cells():
        first, second = list(cell.arms.values())[:2]
        assert first.settings["beta"] == Beta(1, 0, 0)
        assert second.settings["beta"].student > 0
        assert sum(part.settings["num_updates"] for part in (*cell.before, cell.last)) >= 1000
        assert len({when.given(cell, arm) for arm in ("start", *cell.arms)}) == len(cell.arms) + 1
        for name, arm in cell.arms.items():
            assert arm.against in cell.arms
            config = when.config_of(cell.chain(name)[-1], 0, None)
            if name == "adaptive":  # room for the largest share that it may come to
                assert config.capacity == round(8 * 128 * 0.95)
                continue
            forward, _, student = config.beta(0)  # the newest 8 collections of each
            assert forward == 0 or config.capacity == 8 * 128 * forward or student == 1
            assert student == 0 or min(config.capacity, config.student_collections * 128 * student) == pytest.approx(8 * 128 * student)


@pytest.mark.parametrize(("far", "not_worse"), [(1.0, True), (1.3, False)])
def test_the_claims_about_adaptive_shares(far, not_worse):
    distance = {"forward": 2.0, "teacher too": 1.5, "student 1": 1.0, "adaptive": far}
    runs = {
        (cell, arm, seed): {"average": {"frechet_to_expert": d * (1 + 0.01 * (seed % 3))}}
        for cell in ("a", "b")
        for arm, d in distance.items()
        for seed in range(8)
    }
    claims = adaptive_claims(runs, ["a", "b"], range(8))
    assert claims["not_worse"] is claims["cells"]["a"]["not_worse"] is not_worse
    assert claims["cells"]["a"]["best"] == "student 1"
    assert claims["cells"]["a"]["mean"] == pytest.approx(100 * (far - 1))
    assert claims["better_than_paper"] == 2
    assert ("**does not hold**" in adaptive_table(claims)) is not not_worse
    del runs["b", "adaptive", 0]
    assert set(adaptive_claims(runs, ["a", "b"], range(8))) == {"cells"}


def small_cells():
    chain = tuple(when.Part(name, when.Dagger, {"beta": Beta(1, 0, 0)}) for name in ("guidance", "steps"))
    last = when.Part("second", when.Dagger, {"num_steps": 2})
    return [when.Cell("w 3, 4 steps", chain, last, when.TWO, seeds=2)]


@pytest.fixture
def small(monkeypatch):
    settings = {"num_updates": 2, "teacher_steps": 4, "num_steps": 2, "batch_size": 4, "collect_size": 8}
    monkeypatch.setattr(when, "BASE", settings)
    monkeypatch.setattr(when, "JUDGED", {"n": 12, "n_paths": 8, "n_action": 2})
    monkeypatch.setattr(when, "cells", small_cells)
    when.make_evaluator.cache_clear()
    yield
    when.make_evaluator.cache_clear()


def test_a_seeds_arms_fork_from_one_student_and_no_run_is_made_twice(small, tmp_path, monkeypatch):
    when.run(task := when.Task("w 3, 4 steps", 400, tmp_path))
    found = {arm: json.loads(task.place(arm).read_text()) for arm in ("start", "forward", "student")}
    assert found["start"]["teacher_nfe"] == 0
    assert found["forward"]["teacher_nfe"] == found["student"]["teacher_nfe"] == 8 * 2  # states, k: equal labels
    assert found["student"]["student_nfe"] > found["forward"]["student_nfe"]
    assert len({record["init"] for record in found.values()}) == 1
    for arm in ("forward", "student"):
        assert found[arm]["average"]["frechet_to_expert"] != found["start"]["average"]["frechet_to_expert"]
        assert len(found[arm]["average"]["error_own"]) == 2
    assert found["start"]["raw"].items() <= found["start"]["average"].items()  # before the first step they are the same weights

    shared = {path: load_file(path / "student" / "student.safetensors") for path in (tmp_path / "shared").iterdir() if path.is_dir()}
    assert len(shared) == 2
    monkeypatch.setattr(when.Dagger, "learn", lambda *_, **__: pytest.fail("trained again"))
    task.place("start").unlink()
    when.run(task)  # judged again, from the same weights
    assert json.loads(task.place("start").read_text())["average"] == found["start"]["average"]

    kept = tmp_path / "when_runs.jsonl"
    records = collect_records(tmp_path, kept, when.check)
    assert set(records) == {("w 3, 4 steps", arm, 400) for arm in found}
    for arm in found:
        task.place(arm).unlink()
    assert collect_records(tmp_path, kept, when.check) == records  # the lines stand by themselves
    assert restore_records(records, [task]) == 3
    when.run(task)  # nothing left to do
    when.check(records)
    records["w 3, 4 steps", "student", 400]["given"] = "other"
    with pytest.raises(ValueError, match="had other settings than they have now; remove them"):
        when.check(records)


def test_records_that_fork_from_other_weights_are_made_again(small, tmp_path):
    when.run(task := when.Task("w 3, 4 steps", 400, tmp_path))
    found = {arm: json.loads(task.place(arm).read_text()) for arm in ("start", "forward", "student")}
    task.place("forward").write_text(json.dumps(found["forward"] | {"init": "another machine's"}))
    task.place("student").unlink()
    when.run(task)
    again = {arm: json.loads(task.place(arm).read_text()) for arm in found}
    assert {arm: record["init"] for arm, record in again.items()} == {arm: record["init"] for arm, record in found.items()}
    assert again["student"]["average"] == found["student"]["average"]


def test_a_loss_that_is_not_finite_is_told_and_the_other_arms_go_on(small, tmp_path, monkeypatch):
    learn = when.Dagger.learn

    def diverge(learner, *args, **kwargs):
        if learner.config.beta.student:
            raise FloatingPointError("the loss is not finite at step 1")
        return learn(learner, *args, **kwargs)

    monkeypatch.setattr(when.Dagger, "learn", diverge)
    when.run(task := when.Task("w 3, 4 steps", 400, tmp_path))
    assert json.loads(task.place("student").read_text())["lost"] == "the loss is not finite at step 1"
    assert "lost" not in json.loads(task.place("forward").read_text())


def test_the_command_goes_on_and_reports(small, tmp_path, monkeypatch, capsys):
    argv = ["when.py", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "when.json")]
    monkeypatch.setattr("sys.argv", [*argv, "--report_only"])
    with pytest.raises(SystemExit):
        when.main()
    assert "nothing has run there" in capsys.readouterr().err
    cell, lines = small_cells()[0], []
    for arm in ("start", *cell.arms):
        for seed in (400, 401):
            lines.append(record(cell, arm, seed, 1.0 + seed % 3 + len(arm)) | {"given": when.given(cell, arm)})
    (tmp_path / "when_runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("records.ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr("sys.argv", argv)
    when.main()  # every run has its line: nothing is trained
    assert "6 records restored" in capsys.readouterr().out
    told = json.loads((tmp_path / "when.json").read_text())
    assert told["cells"]["average"]["w 3, 4 steps"]["student"]["frechet_to_expert"]["seeds"] == 2


class InThisProcess:
    """An executor that runs at once."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, task):
        future = concurrent.futures.Future()
        future.set_result(work(task))
        return future
