"""Numbers of a comparison: matched updates, statistics over paired seeds, warnings and tables."""

import csv
import io
from pathlib import Path

import pytest
from helpers import comparison

from ddil_agents import compare
from ddil_agents.comparison.arms import Run
from ddil_agents.comparison.page.tables import better_arms
from ddil_agents.comparison.results import check_same_evaluation, compute_statistics, warn_of_identical_arms, warn_of_run
from ddil_agents.comparison.runs import matched_updates
from ddil_agents.evaluation.results import METRICS, metric_heading, table


def results(costs, num_updates=100):
    """Results of an arm whose seeds cost so many teacher forwards."""
    row = {"train_seconds": 10.0, "student_nfe": 50}
    return [{"student": "a@4", "num_updates": num_updates, "models": {"a@4": {**row, "teacher_nfe": cost}}} for cost in costs]


def test_matched_updates_cost_what_the_baselines_do():
    found = {"bc": results([800, 1200]), "dagger": results([2000, 2000], num_updates=50)}
    assert matched_updates(comparison(), "teacher_nfe", found) == {"bc": 100, "dagger": 25}  # 1000 in all; 40 a step
    assert matched_updates(comparison(baseline="dagger"), "teacher_nfe", found) == {"bc": 200, "dagger": 50}
    assert matched_updates(comparison(), "nfe", found) == {"bc": 100, "dagger": round(1050 / 41)}
    assert matched_updates(comparison(), "seconds", found) == {"bc": 100, "dagger": 50}
    with pytest.raises(ValueError, match="equal=teacher_nfe: dagger has no such cost"):
        matched_updates(comparison(), "teacher_nfe", {**found, "dagger": results([0])})
    staged = comparison(arms={"bc": {"agent": "bc"}, "dagger": {"agent": "dagger", "stages": [{"num_steps": 2}]}})
    with pytest.raises(ValueError, match="dagger trains in stages"):
        matched_updates(staged, "nfe", found)


def test_runs_that_were_measured_in_two_ways_are_not_compared():
    one = {"env_config": {"dataset": "digits"}, "settings": {"extractor": "identity", "n": 20, "seed": 0}}
    check_same_evaluation({Path("a"): one, Path("b"): {**one, "settings": {**one["settings"], "seed": 1}}})
    with pytest.raises(ValueError, match=r"a has settings .*identity.*, b .*latent_pool8.*; compare runs of one expert"):
        check_same_evaluation({Path("a"): one, Path("b"): {**one, "settings": {**one["settings"], "extractor": "latent_pool8"}}})


def by_seed(metric, values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


def test_statistics_are_of_paired_seeds():
    rows = {"bc": by_seed("frechet", (2.0, 4.0, 3.0, 5.0, 3.5, 6.0)), "dagger": by_seed("frechet", (1.0, 3.0, 2.0, 4.0, 2.5, 5.0))}
    rows["bc"][0]["coverage"] = 0.5
    initial, teacher = {"bc": by_seed("frechet", (10.0, 20.0, 10.0, 10.0, 10.0, 10.0))}, by_seed("frechet", (0.0, 0.0, 0.0, 0.0, 0.0, 5.0))
    found = compute_statistics(comparison(seeds=6), rows, initial, teacher)
    pair = found["frechet"]["pairs"]["dagger"]
    assert (pair["mean"], pair["n"], pair["p"]) == (-1.0, 6, 2 / 64)
    assert pair["p_holm"] == pair["p"]
    assert pair["conclusion"] == "dagger is lower than bc at 5 %"
    wins = sum((b > d) + 0.5 * (b == d) for b in (2, 4, 3, 5, 3.5, 6) for d in (1, 3, 2, 4, 2.5, 5)) / 36
    assert pair["probability_of_improvement"] == pytest.approx(wins)
    assert found["frechet"]["arms"]["bc"]["normalised"] == pytest.approx([0.8, 0.8, 0.7, 0.5, 0.65, 0.8])
    assert "normalised" not in found["frechet"]["arms"]["dagger"]
    assert found["frechet"]["arms"]["bc"]["low"] <= found["frechet"]["arms"]["bc"]["iqm"] <= found["frechet"]["arms"]["bc"]["high"]
    assert found["coverage"]["pairs"] == {}
    assert "recall" not in found


def test_a_lost_run_leaves_the_other_seeds_paired():
    rows = {"bc": by_seed("frechet", (2.0, 4.0, 3.0, 9.0)), "dagger": by_seed("frechet", (1.0, 3.0, 2.0, 4.0))}
    del rows["bc"][3], rows["dagger"][0]
    pair = compute_statistics(comparison(), rows, {}, {})["frechet"]["pairs"]["dagger"]
    assert (pair["n"], pair["mean"]) == (2, -1.0)


def test_conclusions_are_after_holms_correction():
    arms = {name: {"agent": "bc"} for name in ("base", "a", "b")}
    base = [float(i) for i in range(7)]
    rows = {
        "base": by_seed("frechet", base),
        "a": by_seed("frechet", [x - 1 for x in base]),
        "b": by_seed("frechet", [x - 1 for x in base[:-1]] + [base[-1] + 0.1]),
    }
    pairs = compute_statistics(comparison(arms=arms, seeds=7), rows, {}, {})["frechet"]["pairs"]
    assert (pairs["a"]["p_holm"], pairs["b"]["p_holm"]) == (4 / 128, 4 / 128)  # of b itself p = 4/128: Holm's second step, undivided
    assert [pairs[arm]["conclusion"] for arm in "ab"] == [f"{arm} is lower than base at 5 % over 2 comparisons" for arm in "ab"]


def test_what_is_bold_is_what_its_sentence_says_after_lost_runs():
    arms = {name: {"agent": "bc"} for name in ("base", "a", "b")}
    base = [float(i) for i in range(7)]
    rows = {"base": by_seed("frechet", base)} | {arm: by_seed("frechet", [x - 1 for x in base]) for arm in "ab"}
    del rows["b"][6]
    given = comparison(arms=arms, seeds=7)
    statistics = compute_statistics(given, rows, {}, {})
    pairs = statistics["frechet"]["pairs"]
    assert [(pair["n"], pair["p_holm"]) for pair in pairs.values()] == [(7, 4 / 128), (6, 4 / 128)]
    assert pairs["b"]["conclusion"] == "b is lower than base at 5 % over 2 comparisons"
    result = {"comparison": {"baseline": "base"}, "budgets": {"updates": {"statistics": statistics}}, "arms": arms}
    assert better_arms(result, "updates", "frechet") == {"a", "b"}
    for seed in (4, 5):
        del rows["b"][seed]
    statistics["frechet"] = compute_statistics(given, rows, {}, {})["frechet"]
    assert "4 seeds cannot show" in statistics["frechet"]["pairs"]["b"]["conclusion"]
    assert better_arms(result, "updates", "frechet") == {"a"}


def test_too_few_seeds_are_said_to_be_too_few():
    rows = {"bc": by_seed("frechet", (2.0, 3.0, 4.0)), "dagger": by_seed("frechet", (1.0, 1.5, 2.0))}
    assert "3 seeds cannot show" in compute_statistics(comparison(), rows, {}, {})["frechet"]["pairs"]["dagger"]["conclusion"]


def test_an_arm_that_is_the_baseline_bit_for_bit_is_flagged():
    rows = {
        "bc": {0: {"frechet": 1.0, "recall": 0.5}, 1: {"frechet": 2.0}},
        "dagger": {0: {"frechet": 1.0, "recall": 0.5}, 1: {"frechet": 2.0}},
    }
    (flag,) = warn_of_identical_arms(comparison(), rows)
    assert flag.startswith("dagger: each run equals that of bc, bit for bit")
    for other in ({0: {"frechet": 1.0, "recall": 0.5}, 1: {"frechet": 2.5}}, {0: {"frechet": 1.0, "recall": 0.5}}, {}):
        assert warn_of_identical_arms(comparison(), rows | {"dagger": other}) == []


CALM = [{"grad_norm": 1.0, "grad_norm_max": 1.0, "critic_grad_norm": 2.0, "critic_grad_norm_max": 2.0}] * 20


def flagged(row=None, training=CALM, initial=None, teacher=None, primary="frechet"):
    return warn_of_run(Run("updates", "a", 3, Path("a-s3")), row or {}, training, initial or {}, teacher or {}, primary)


def test_flags_name_modes_that_the_untrained_student_or_the_teacher_has():
    assert flagged({"coverage": 0.9}, initial={"coverage": 0.95}, teacher={"coverage": 1.0}) == []
    (flag,) = flagged({"coverage": 0.5}, initial={"coverage": 0.95}, teacher={"coverage": 1.0})
    assert flag == "a, seed 3: coverage is 0.500, against 0.950 untrained: modes are missed (equal updates)"
    (flag,) = flagged({"coverage": 0.4}, initial={"coverage": 0.1}, teacher={"coverage": 0.9})
    assert "coverage is 0.400, against 0.900 of the teacher" in flag
    (flag,) = flagged({"vendi": 3.0}, teacher={"vendi": 8.0})  # without data there is no coverage
    assert "vendi is 3.000, against 8.000 of the teacher" in flag
    assert flagged({"coverage": 0.4}) == flagged({"coverage": None}, initial={"coverage": 0.9}, teacher={"coverage": 0.9}) == []


@pytest.mark.parametrize(
    ("spike", "message"),
    [
        ({"grad_norm": 6.9, "grad_norm_max": 60.0}, "a gradient norm of 60, 60 times the median"),
        ({"grad_norm": 50.0}, "a gradient norm of 50, 50 times the median"),  # a run of before there were largest ones
        ({"critic_grad_norm": 2e4, "critic_grad_norm_max": 2e4}, "a critic gradient norm of 2e+04, 10000 times the median"),
    ],
)
def test_flags_name_any_networks_gradients_that_blow_up(spike, message):
    (flag,) = flagged(training=[*CALM, spike])
    assert message in flag
    assert flagged(training=[spike, *CALM]) == []  # in the warm-up
    assert flagged(training=[*CALM, {**CALM[0], "grad_norm_max": float("inf")}]) == []  # a step that fp16's scaler skips


def test_flags_name_a_student_that_training_made_worse():
    (flag,) = flagged({"frechet": 9.0}, initial={"frechet": 8.5})
    assert flag == "a, seed 3: Fréchet is 9, and was 8.5 untrained: training made it worse (equal updates)"
    (flag,) = flagged({"recall": 0.2}, initial={"recall": 0.3}, primary="recall")
    assert "recall is 0.2, and was 0.3 untrained" in flag
    for row, initial in (({"frechet": 8.0}, {"frechet": 8.5}), ({"frechet": None}, {"frechet": 8.5}), ({"frechet": 9.0}, {})):
        assert flagged(row, initial=initial) == []


def test_arms_without_the_teachers_noise_are_not_held_against_those_with_it():
    rows = {
        arm: {seed: {"frechet": 3.0 + seed, "frechet_to_expert": far + seed, "endpoint_rmse": rmse} for seed in range(7)}
        for arm, far, rmse in (("bc", 0.3, 0.1), ("dagger", 0.2, 0.1), ("lcm", 5.0, None), ("dmd2", 6.0, None))
    }
    arms = {arm: {"agent": arm} for arm in rows}
    found = compute_statistics(comparison(arms=arms), rows, {}, {})
    assert found["frechet"]["pairs"].keys() == {"dagger", "lcm", "dmd2"}
    assert found["frechet_to_expert"]["arms"].keys() == set(arms)
    assert found["frechet_to_expert"]["pairs"].keys() == {"dagger"}
    found = compute_statistics(comparison(arms=arms, baseline="lcm"), rows, {}, {})
    assert found["frechet_to_expert"]["pairs"].keys() == {"dmd2"}
    initial = {arm: by_seed("frechet_to_expert", [9.0] * 7) for arm in rows}
    found = compute_statistics(comparison(arms=arms), rows, initial, by_seed("frechet_to_expert", [0.0] * 7))["frechet_to_expert"]
    assert {arm for arm, own in found["arms"].items() if "normalised" in own} == {"bc", "dagger"}


def test_every_score_of_a_row_is_in_every_table():
    scores = ["frechet", "kid", "precision", "recall", "density", "coverage", "accuracy", "vendi", "lpips", "clip_score", "hpsv2"]
    assert {*scores} < METRICS.keys()
    settings = {"n": 20, "seed": 0, "extractor": "inception_v3_2015", "guidance_scale": 1.0}
    made = {"hardware": "a CPU", "torch": "2", "date": "today"}
    result = {"settings": settings, **made, "floors": {"training_data": {"recall": 0.9, "n": 11}}}
    lines = table({**result, "models": {"dagger@4": dict.fromkeys(scores, 0.25)}}).splitlines()
    assert "training data, n = 11" in lines[0]
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[2:] == [metric_heading(score, result) for score in scores]
    assert names[2:4] == ["FID ↓", "KID ↓"]
    assert metric_heading("frechet", {"settings": {"extractor": "identity"}}) == "Fréchet ↓"
    assert max(map(len, lines)) <= 100
    rows = {arm: {seed: dict.fromkeys(scores, 0.1 * seed) for seed in range(3)} for arm in ("bc", "dagger")}
    found = {
        "title": "t",
        "provenance": made,
        "comparison": {"level": 0.95, "primary": "clip_score", "baseline": "bc"},
        "settings": {key: value for key, value in settings.items() if key != "seed"},
        "references": {"teacher@4": [{"clip_score": 0.3}]},
        "arms": dict.fromkeys(rows),
        "budgets": {
            "updates": {
                "runs": [{"arm": arm, "seed": seed, **row} for arm, own in rows.items() for seed, row in own.items()],
                "statistics": compute_statistics(comparison(primary="clip_score"), rows, {}, {}),
            }
        },
        "flags": [],
    }
    note = "KID: an unbiased estimate, which may be negative; compare it with real data's, not with 0."
    assert note in lines
    for text in (compare.latex_table(found), compare.markdown(found)):
        assert note in text
        assert all(name in text for name in ("FID", "KID", "LPIPS diversity", "CLIP score", "HPSv2", "precision", "density", "Vendi"))
        assert "n = 20, features of inception_v3_2015, guidance 1; a CPU, torch 2, today" in text
    assert "dagger − bc: +0 [+0, +0]; 3 seeds cannot show" in compare.markdown(found)
    line = list(csv.DictReader(io.StringIO(compare.csv_table(found))))[1]
    assert all(line[score] == "0.1" for score in scores)
    assert (line["extractor"], line["n"]) == ("inception_v3_2015", "20")
    found["arms"] = {"a_b^2 ~ {1 < $2} \\": None}
    assert r"a\_b\^{}2 \~{} \{1 $<$ \$2\} \textbackslash{} & 0" in compare.latex_table(found)
