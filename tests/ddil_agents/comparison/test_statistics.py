"""The statistics against closed forms, scipy, brute force and hand-worked cases."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ddil_agents.comparison.statistics import (
    bootstrap_interval,
    holm,
    interquartile_mean,
    normalise,
    paired_comparison,
    performance_profile,
    probability_of_improvement,
    seeds_needed,
    sign_flip_test,
    smallest_p,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def brute_force_p(d):
    """The sign-flip test's p by its definition, flip by flip, in exact integers."""
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(s >= abs(sum(d)) for s in sums) / len(sums)


# Interquartile mean


def test_interquartile_mean_drops_a_quarter_of_the_runs_at_each_end():
    assert interquartile_mean([100, 2, 3, -50, 4, 5, 1, 6]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean([[100, 2, 3, -50], [4, 5, 1, 6]]) == pytest.approx((2 + 3 + 4 + 5) / 4)  # tasks pooled


def test_interquartile_mean_of_nine_runs_drops_two_at_each_end():
    assert interquartile_mean(np.arange(9) ** 2) == pytest.approx(np.mean([4, 9, 16, 25, 36]))


def test_interquartile_mean_of_three_runs_is_the_mean():
    assert interquartile_mean([0, 0, 9]) == 3


def test_interquartile_mean_along_an_axis_is_that_of_each_row():
    x = normal(5, 12)
    assert interquartile_mean(x, axis=-1) == pytest.approx([interquartile_mean(row) for row in x])


# Bootstrap


@pytest.mark.parametrize("statistic", [np.mean, interquartile_mean, np.median])
def test_bootstrap_interval_of_one_task_is_scipys(statistic):
    x = normal(25)
    ours = bootstrap_interval(x, statistic, level=0.9, resamples=20_000)
    scipys = stats.bootstrap((x,), statistic, confidence_level=0.9, n_resamples=20_000, method="percentile", random_state=0)
    assert ours == pytest.approx(tuple(scipys.confidence_interval), abs=0.03)


def test_bootstrap_interval_has_the_quantiles_of_all_stratified_resamples():
    x = np.array([[0.0, 10.0], [1.0, 14.0], [5.0, 11.0]])
    columns = [[np.mean(draw) for draw in itertools.product(task, repeat=3)] for task in x.T]  # 27 resamples a task
    means = [np.mean(pair) for pair in itertools.product(*columns)]
    for level in (0.5, 0.8, 0.95):
        expected = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        assert bootstrap_interval(x, np.mean, level, resamples=100_000) == pytest.approx(tuple(expected), abs=0.09)  # atoms are 1/6 apart


def test_bootstrap_never_mixes_tasks():
    x = np.column_stack([np.zeros(6), np.full(6, 1000.0)])
    assert bootstrap_interval(x, np.mean) == (500, 500)


def test_bootstrap_resamples_tasks_independently():
    z = normal(20)
    x = np.column_stack([z, -z])  # rows drawn together would always average to 0
    low, high = bootstrap_interval(x, np.mean)
    assert (high - low) / 2 == pytest.approx(1.96 * z.std() / math.sqrt(2 * 20), rel=0.05)


def test_bootstrap_repeats_with_its_seed():
    x = normal(7, 2)
    assert bootstrap_interval(x, np.mean, seed=3) == bootstrap_interval(x, np.mean, seed=3) != bootstrap_interval(x, np.mean, seed=4)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_bootstrap_intervals_of_few_seeds_cover_less_than_they_say(n):
    documented = {np.mean: {3: 0.74, 5: 0.84, 10: 0.90}, interquartile_mean: {3: 0.74, 5: 0.91, 10: 0.93}}
    for statistic, covered in documented.items():
        intervals = [bootstrap_interval(x, statistic, resamples=1000) for x in normal(3000, n, seed=n)]
        assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(covered[n], abs=0.025)  # three standard errors


# Sign-flip test


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12])
def test_sign_flip_test_is_the_brute_force_enumeration(n):
    d = np.random.default_rng(n).integers(-9, 10, n).tolist()  # ties and zeros too
    assert sign_flip_test(d) == brute_force_p(d)
    assert sign_flip_test([-x for x in d]) == sign_flip_test([x / 3 for x in d]) == brute_force_p(d)


@pytest.mark.parametrize("n", [4, 9, 13])
def test_sign_flip_test_is_scipys_paired_permutation_test(n):
    a, b = normal(n, seed=n) + 0.5, normal(n, seed=n + 100)
    oracle = stats.permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis), permutation_type="samples", n_resamples=2**n)
    assert sign_flip_test(a - b) == pytest.approx(oracle.pvalue, rel=1e-12)


@pytest.mark.parametrize("n", [6, 16, 17, 30])  # enumerated, and drawn
def test_sign_flip_test_of_equal_magnitudes_is_the_binomial_sign_test(n):
    for positive in (n // 2, n // 2 + 2, n // 2 + 3):
        d = [0.3] * positive + [-0.3] * (n - positive)
        assert sign_flip_test(d) == pytest.approx(stats.binomtest(positive, n).pvalue, abs=1e-12 if n <= 16 else 0.006)


def test_enumerated_and_drawn_flips_agree():
    d = normal(16, seed=5) + 0.4
    assert sign_flip_test([*d, 0.0]) == pytest.approx(sign_flip_test(d), abs=0.005)  # a zero more changes nothing but the method


def test_drawn_flips_never_give_p_0():
    assert 1 / 100_001 <= sign_flip_test(np.ones(40)) <= 3 / 100_001


@pytest.mark.parametrize("n", [1, 2, 5, 11, 16])
def test_differences_of_one_sign_reach_the_smallest_p(n):
    assert sign_flip_test(1 + abs(normal(n))) == smallest_p(n) == 2 / 2**n


def test_no_difference_has_p_1():
    assert sign_flip_test([0.0] * 5) == sign_flip_test([0.0] * 20) == 1


def test_ties_up_to_round_off_are_ties():
    assert 0.1 + 0.2 - 0.3 != 0
    assert sign_flip_test([0.1, 0.2, -0.3]) == 1
    for order in itertools.permutations([0.1, 0.2, 0.3, -0.4, 0.7, 1.1]):
        assert sign_flip_test(order) == brute_force_p([1, 2, 3, -4, 7, 11])


def test_tasks_of_a_seed_flip_as_one():
    d = 1 + abs(normal(5, 8))
    assert sign_flip_test(d) == sign_flip_test(d.mean(1)) == smallest_p(5)


def test_sign_flip_test_rejects_as_often_as_it_says():
    rejected = np.mean([sign_flip_test(d) <= 6 / 128 for d in normal(4000, 8)])
    assert rejected == pytest.approx(6 / 128, abs=0.01)  # three standard errors


# Numbers of seeds


def test_six_seeds_are_needed_for_one_comparison_at_5_percent():
    assert [smallest_p(n) for n in (1, 2, 3, 5, 6)] == [1, 0.5, 0.25, 0.0625, 0.03125]
    assert [seeds_needed(k) for k in (1, 2, 3, 4, 20)] == [6, 7, 7, 8, 10]
    assert seeds_needed(level=0.875) == 4  # 2/2⁴ is 0.125: enough
    assert seeds_needed(level=0.99) == 8


# Holm


def test_holm_of_a_hand_worked_example():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and the last may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1, 1])
    assert holm([0.02]) == pytest.approx([0.02])
    assert holm([]).shape == (0,)


def test_holm_is_the_closed_test_of_bonferroni():
    p = np.random.default_rng(0).uniform(size=6) ** 3
    subsets = [s for k in range(1, 7) for s in itertools.combinations(range(6), k)]
    expected = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(6)]
    assert holm(p) == pytest.approx(expected)


# Probability of improvement, performance profile, normalised scores


def test_probability_of_improvement_is_mann_whitneys_u():
    x, y = np.round(normal(7, 3), 1), np.round(normal(5, 3, seed=1) - 0.3, 1)  # rounded, so that some tie
    u = [stats.mannwhitneyu(x[:, m], y[:, m]).statistic / 35 for m in range(3)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u))
    assert probability_of_improvement(x, y, lower_is_better=True) == pytest.approx(1 - np.mean(u))
    assert probability_of_improvement(y, x) == pytest.approx(1 - np.mean(u))


def test_probability_of_improvement_counts_ties_half():
    assert probability_of_improvement([1, 2], [1, 1]) == 3 / 4
    assert probability_of_improvement([1, 2], [1, 1], lower_is_better=True) == 1 / 4
    assert probability_of_improvement([3, 3], [3, 3, 3]) == 1 / 2


def test_probability_of_improvement_compares_within_tasks():
    x = np.array([[1, 101], [2, 102]])
    assert probability_of_improvement(x, x - 10) == 1


def test_performance_profile_counts_runs_at_or_above_each_threshold():
    x = np.array([[0.0, 0.5], [0.5, 1.0]])
    assert performance_profile(x, [-1, 0, 0.5, 0.7, 1, 2]).tolist() == [1, 1, 3 / 4, 1 / 4, 1 / 4, 0]


def test_area_under_the_performance_profile_is_the_mean():
    x, midpoints = np.random.default_rng(0).uniform(size=(4, 3)), (np.arange(100_000) + 0.5) / 100_000
    assert performance_profile(x, midpoints).mean() == pytest.approx(x.mean(), abs=1e-5)


def test_normalised_is_0_at_init_and_1_at_the_teacher():
    assert normalise([10, 2, 6, 0], m_init=10, m_teacher=2) == pytest.approx([0, 1, 0.5, 1.25])  # lower is better
    assert normalise([[1, 10], [2, 30]], [1, 10], [3, 20]) == pytest.approx(np.array([[0, 0], [0.5, 2]]))  # a scale a task


def test_normalised_does_not_depend_on_the_unit():
    m = normal(6, 2)
    assert normalise(3 - 5 * m, 3 - 5 * 0.2, 3 - 5 * 1.7) == pytest.approx(normalise(m, 0.2, 1.7))


# Paired comparison


def test_interval_of_a_paired_comparison_is_scipys_t_interval():
    a, b = normal(5, 3), normal(5, 3, seed=1)
    paired = paired_comparison(a, b, level=0.9)
    expected = stats.ttest_rel(a.mean(1), b.mean(1)).confidence_interval(0.9)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert (paired.n, paired.mean, paired.p) == (5, pytest.approx((a - b).mean()), sign_flip_test((a - b).mean(1)))


@pytest.mark.parametrize("n", [3, 5])
def test_interval_of_a_paired_comparison_covers_the_true_difference_at_its_level(n):
    noise = normal(3000, n, seed=n)
    intervals = [paired_comparison(0.7 + d, np.zeros(n)) for d in noise]
    assert np.mean([p.low <= 0.7 <= p.high for p in intervals]) == pytest.approx(0.95, abs=0.012)  # three standard errors


def test_too_few_seeds_are_said_to_show_nothing_however_large_the_difference():
    paired = paired_comparison([101, 102, 103], [1, 2, 3.001])
    assert paired.low > 0  # the interval alone would tempt
    assert paired.p == paired.smallest_p == 0.25
    assert not paired.shown
    assert paired.conclusion == "3 seeds cannot show a difference at 5 %: need at least 6"
    assert paired_comparison(np.ones(5), np.zeros(5)).conclusion == "5 seeds cannot show a difference at 5 %: need at least 6"


def test_one_seed_has_no_interval():
    paired = paired_comparison([2], [1])
    assert math.isnan(paired.low)
    assert math.isnan(paired.high)
    assert (paired.mean, paired.p, paired.smallest_p) == (1, 1, 1)
    assert paired.conclusion == "1 seed cannot show a difference at 5 %: need at least 6"


def test_six_seeds_of_one_sign_show_which_is_higher():
    d = 1 + abs(normal(6))
    assert paired_comparison(d, np.zeros(6), names=("dagger", "bc")).conclusion == "dagger is higher than bc at 5 %"
    assert paired_comparison(-d, np.zeros(6), names=("dagger", "bc")).conclusion == "dagger is lower than bc at 5 %"
    assert paired_comparison(d, np.zeros(6)).shown


def test_differences_of_both_signs_show_nothing():
    paired = paired_comparison([1, -1, 2, -2, 1, 0], np.zeros(6))
    assert (paired.shown, paired.conclusion) == (False, "no difference shown at 5 %")


def test_more_comparisons_need_more_seeds_or_a_smaller_p():
    d = np.ones(6)
    expected = "6 seeds cannot show a difference at 5 % over 3 comparisons: need at least 7"
    assert paired_comparison(d, 0 * d, comparisons=3).conclusion == expected
    d = np.array([5, 4, 3, 3, 2, 2, -1.0])  # p = 4/128
    assert paired_comparison(d, 0 * d).conclusion == "a is higher than b at 5 %"
    assert paired_comparison(d, 0 * d, comparisons=3).conclusion == "no difference shown at 5 % over 3 comparisons"


def test_holms_later_steps_need_fewer_seeds_than_the_first():
    d = np.ones(6)  # p = 2/64, too large for the first of two comparisons
    paired = paired_comparison(d, 0 * d, comparisons=2, adjusted_p=2 / 64)
    assert (paired.shown, paired.conclusion) == (True, "a is higher than b at 5 % over 2 comparisons")
    paired = paired_comparison(d, 0 * d, comparisons=2, adjusted_p=4 / 64)
    assert (paired.shown, paired.conclusion) == (False, "6 seeds cannot show a difference at 5 % over 2 comparisons: need at least 7")


def test_pairing_removes_what_the_seeds_share():
    seeds = 100 * normal(8)
    assert paired_comparison(seeds + 1 + 0.1 * normal(8, seed=1), seeds).conclusion == "a is higher than b at 5 %"


# Errors name the value, the rule and the cure


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interquartile_mean([1, math.nan, 3]), "x: 1 of 3 values are not finite; leave the seed out of every agent"),
        (lambda: interquartile_mean([]), r"x has shape \(0,\): need at least one score"),
        (lambda: bootstrap_interval([1.0], np.mean), "x has 1 seed: a bootstrap over seeds needs at least 2"),
        (lambda: bootstrap_interval([1, 2], np.mean, resamples=0), "resamples=0: need at least 1"),
        (lambda: bootstrap_interval([1, 2], np.mean, level=95), "level=95: need 0 < level < 1, such as 0.95"),
        (lambda: bootstrap_interval([1, 2], lambda x, axis: x.mean()), r"statistic returned shape \(\), need \(10000,\): reduce `axis`"),
        (lambda: bootstrap_interval(np.ones((2, 2, 2)), np.mean), r"x has shape \(2, 2, 2\): need \(seeds,\) or \(seeds, tasks\)"),
        (lambda: sign_flip_test([]), r"differences has shape \(0,\): need \(seeds,\) or \(seeds, tasks\)"),
        (lambda: sign_flip_test([1, math.inf]), "differences: 1 of 2 values are not finite"),
        (lambda: smallest_p(0), "n=0: need at least 1 seed"),
        (lambda: seeds_needed(0), "comparisons=0: need at least 1"),
        (lambda: seeds_needed(level=1.0), "level=1.0: need 0 < level < 1"),
        (lambda: holm([0.1, 1.2]), r"pvalues=\[0.1, 1.2\]: need a list of numbers in \[0, 1\]"),
        (lambda: holm([0.1, math.nan]), r"pvalues=\[0.1, nan\]: need"),
        (lambda: holm(0.1), "pvalues=0.1: need a list"),
        (lambda: probability_of_improvement(np.ones((3, 2)), np.ones((3, 4))), "x has 2 tasks and y has 4: need the same tasks"),
        (lambda: performance_profile([1, math.nan], [0]), "x: 1 of 2 values are not finite"),
        (lambda: normalise([1, 2], 3.5, 3.5), "m_init = m_teacher = 3.5: a scale needs two ends"),
        (lambda: normalise([[1, 2]], [0, 4], [1, 4]), "m_init = m_teacher = 4: a scale needs two ends"),
        (lambda: normalise([1], 0, math.nan), "m_teacher: 1 of 1 values are not finite"),
        (lambda: paired_comparison([1, 2], [1, 2, 3], names=("bc", "lcm")), r"of bc are \(2, 1\) and of lcm \(3, 1\): pair the same seeds"),
        (lambda: paired_comparison([1, 2], [1, math.nan], names=("bc", "lcm")), "lcm: 1 of 2 values are not finite"),
        (lambda: paired_comparison([1, 2], [1, 2], comparisons=0), "comparisons=0: need at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
