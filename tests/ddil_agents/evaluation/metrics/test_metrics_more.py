"""Kernel distances, Gaussian W2, noise floors, Vendi score and diversity against closed forms and naive sums."""

import math
from itertools import combinations

import pytest
import torch
from helpers import normal

from ddil_agents.evaluation.metrics import distances, diversity
from ddil_agents.evaluation.metrics.distances import mmd2, sliced_wasserstein, split_half
from ddil_agents.evaluation.metrics.diversity import group_diversity, pairwise_distance
from ddil_agents.evaluation.metrics.features import Features, check_same_extractor
from ddil_agents.evaluation.metrics.frechet import frechet_distance, frechet_name, gaussian_w2
from ddil_agents.evaluation.metrics.kid import kernel_distance
from ddil_agents.evaluation.metrics.precision_recall import precision_recall_density_coverage
from ddil_agents.evaluation.metrics.vendi import vendi_score


def naive_mmd2(a, b, k):
    """Unbiased MMD², pair by pair."""
    n, m = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return float(within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m))


# Kernel distance


def test_kernel_distance_is_the_naive_double_sum():
    a, b = normal(12, 5, 0), normal(12, 5, 1) + 0.5
    mean, std = kernel_distance(a, b, subsets=3, subset_size=12)  # each subset is the whole set
    assert mean == pytest.approx(naive_mmd2(a, b, lambda x, y: (x @ y / 5 + 1) ** 3), rel=1e-9)
    assert std == pytest.approx(0, abs=1e-12)
    assert kernel_distance(a, b, subsets=1, subset_size=12)[1] == 0


def test_kernel_distance_is_torchmetrics_kid():
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = normal(60, 16, 0), normal(60, 16, 1) * 1.3
    assert kernel_distance(a, b, subsets=1, subset_size=60)[0] == pytest.approx(float(kid.poly_mmd(a, b)), rel=1e-9)


def test_kernel_distance_has_the_mean_and_deviation_of_random_subsets():
    a, b = normal(80, 4, 0), normal(90, 4, 1) + 0.3
    mean, std = kernel_distance(a, b, subsets=4000, subset_size=10)
    whole = naive_mmd2(a, b, lambda x, y: (x @ y / 4 + 1) ** 3)  # a random subset has the whole's expectation
    assert mean == pytest.approx(whole, abs=4 * std / 4000**0.5)
    draw = torch.Generator().manual_seed(7)
    own = [
        kernel_distance(a[torch.randperm(80, generator=draw)[:10]], b[torch.randperm(90, generator=draw)[:10]], 1, 10)[0]
        for _ in range(2000)
    ]
    assert std == pytest.approx(float(torch.tensor(own).std()), rel=0.08)


def test_kernel_distance_between_draws_of_one_distribution_has_mean_zero():
    values = torch.tensor([kernel_distance(normal(20, 3, 2 * i), normal(20, 3, 2 * i + 1), 1, 20)[0] for i in range(800)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 800**0.5


def test_kernel_distance_repeats_and_follows_its_generator():
    a, b = normal(30, 3, 0), normal(30, 3, 1)
    assert kernel_distance(a, b, 5, 10) == kernel_distance(a, b, 5, 10, torch.Generator().manual_seed(0))
    assert kernel_distance(a, b, 5, 10) != kernel_distance(a, b, 5, 10, torch.Generator().manual_seed(1))


# Maximum mean discrepancy


def test_mmd2_is_the_naive_double_sum_also_in_chunks(monkeypatch):
    a, b = normal(14, 6, 0).view(14, 2, 3), normal(9, 6, 1).view(9, 2, 3) + 1
    expected = naive_mmd2(a.flatten(1), b.flatten(1), lambda x, y: torch.exp(-(x - y).square().sum() / (2 * 1.7**2)))
    assert mmd2(a, b, bandwidth=1.7) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "CHUNK", 40)  # 2 to 4 rows at once
    assert mmd2(a, b, bandwidth=1.7) == pytest.approx(expected, rel=1e-9)


def test_paired_mmd2_is_the_u_statistic_of_pairs_also_in_chunks(monkeypatch):
    a, b = normal(11, 3, 0), normal(11, 3, 1) + 0.5

    def k(x, y):
        return float(torch.exp(-(x - y).square().sum() / (2 * 1.3**2)))

    terms = [k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i in range(11) for j in range(11) if i != j]
    assert mmd2(a, b, 1.3, paired=True) == pytest.approx(sum(terms) / 110, rel=1e-9)
    monkeypatch.setattr(distances, "CHUNK", 40)
    assert mmd2(a, b, 1.3, paired=True) == pytest.approx(sum(terms) / 110, rel=1e-9)


@pytest.mark.parametrize("n", [7, 90])  # cdist multiplies matrices from 26 samples on
def test_paired_mmd2_of_a_set_and_itself_is_0_and_the_other_form_is_not(n):
    a = normal(n, 4, 0) + 5
    assert mmd2(a, a.clone(), 2.0, paired=True) == 0
    away = float(torch.exp(-torch.pdist(a).square() / 8).mean())
    assert mmd2(a, a, 2.0) == pytest.approx(-2 / n * (1 - away), rel=1e-6)


@pytest.mark.parametrize("shared", [0.0, 0.9, 1.0])
def test_paired_mmd2_between_draws_of_one_distribution_has_mean_0_whatever_they_share(shared):
    values = []
    for i in range(300):
        a, fresh = normal(20, 3, 2 * i), normal(20, 3, 2 * i + 1)
        values.append(mmd2(a, shared * a + (1 - shared**2) ** 0.5 * fresh, 1.5, paired=True))
    values = torch.tensor(values)
    assert abs(float(values.mean())) <= 4 * float(values.std()) / 300**0.5


def test_of_sets_with_the_same_conditions_the_paired_mmd2_alone_has_mean_0():
    means = 3 * normal(5, 3, 0)[torch.arange(20) % 5]  # (20, 3), of sample i's class in either set
    pairs = [(means + normal(20, 3, 2 * i + 1), means + normal(20, 3, 2 * i + 2)) for i in range(200)]
    for paired in (True, False):
        values = torch.tensor([mmd2(a, b, 1.5, paired=paired) for a, b in pairs])
        away = float(values.mean() / values.std()) * 200**0.5
        assert abs(away) <= 4 if paired else away < -8


def test_mmd2_of_gaussians_is_the_closed_form():
    d, h, s_a, s_b, shift = 3, 1.5, 1.0, 1.4, torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64)

    def mean_kernel(variance, delta2):  # E k(x, y) where x − y ~ N(δ, v I)
        return (h**2 / (h**2 + variance)) ** (d / 2) * math.exp(-delta2 / (2 * (h**2 + variance)))

    expected = mean_kernel(2 * s_a**2, 0) + mean_kernel(2 * s_b**2, 0) - 2 * mean_kernel(s_a**2 + s_b**2, float(shift.square().sum()))
    draws = [mmd2(s_a * normal(500, d, 2 * i), s_b * normal(600, d, 2 * i + 1) + shift, h) for i in range(40)]
    error = float(torch.tensor(draws).std()) / 40**0.5
    assert sum(draws) / 40 == pytest.approx(expected, abs=4 * error)
    assert 4 * error < 0.1 * expected


def test_mmd2_takes_the_median_distance_of_the_pooled_samples():
    a, b = normal(11, 4, 0), normal(13, 4, 1) * 2
    pooled = torch.cat([a, b])
    median = torch.tensor([float((x - y).norm()) for x, y in combinations(pooled, 2)]).median()
    assert mmd2(a, b) == pytest.approx(mmd2(a, b, float(median)), rel=1e-6)


def test_median_of_many_samples_looks_at_an_even_part_of_them(monkeypatch):
    x = normal(5000, 3, 0)
    assert distances._median_distance(x) == pytest.approx(float(torch.pdist(x).median()), rel=0.02)
    monkeypatch.setattr(distances, "MAX_MEDIAN_SAMPLES", 2)
    assert distances._median_distance(torch.tensor([[0.0], [9.0], [9.0], [4.0], [9.0], [9.0]])) == 4


def test_mmd2_does_not_move_with_the_origin_or_the_scale():
    a, b = normal(40, 3, 0), normal(50, 3, 1) + 0.4
    assert mmd2(a + 1e6, b + 1e6) == pytest.approx(mmd2(a, b), rel=1e-6)
    assert mmd2(9 * a, 9 * b) == pytest.approx(mmd2(a, b), rel=1e-9)


def test_mmd2_of_5000_against_5000_samples_runs():
    assert abs(mmd2(normal(5000, 8, 0), normal(5000, 8, 1))) < 1e-3


# Gaussian W2, noise floors


def test_gaussian_w2_of_a_shifted_scaled_set_is_the_closed_form():
    a = normal(60, 4, 0).view(60, 2, 2)
    assert gaussian_w2(a, a + 3) == pytest.approx(6, rel=1e-6)  # ‖(3, 3, 3, 3)‖
    variance = float(torch.cov(a.flatten(1).T).trace())
    centred = a - a.mean(0)
    assert gaussian_w2(centred, 3 * centred) == pytest.approx(2 * variance**0.5, rel=1e-6)


def test_split_half_compares_two_disjoint_random_halves():
    a, b = split_half(lambda a, b: (a, b), torch.arange(11.0)[:, None])
    assert len(a) == len(b) == 5
    assert len(set(a.flatten().tolist()) | set(b.flatten().tolist())) == 10
    assert a.flatten().tolist() != sorted(a.flatten().tolist())
    again, _ = split_half(lambda a, b: (a, b), torch.arange(11.0)[:, None], torch.Generator().manual_seed(1))
    assert not torch.equal(a, again)


def test_split_half_is_the_floor_between_two_draws():
    floor = split_half(gaussian_w2, normal(2000, 3, 0))
    assert floor == pytest.approx(gaussian_w2(normal(1000, 3, 1), normal(1000, 3, 2)), rel=0.7)
    assert split_half(precision_recall_density_coverage, normal(200, 2, 0)).precision > 0.8


# Vendi score


@pytest.mark.parametrize(("n", "d"), [(6, 9), (6, 6), (40, 3)])  # fewer samples than features, as many, more
def test_vendi_score_of_equal_features_is_one(n, d):
    assert vendi_score(normal(1, d, 0) * torch.arange(1, n + 1)[:, None]) == pytest.approx(1)  # a cosine sees no length


def test_vendi_score_of_n_orthogonal_features_is_n():
    assert vendi_score(torch.eye(7, 11)) == pytest.approx(7)
    assert vendi_score(torch.eye(7).repeat(5, 1)) == pytest.approx(7)  # copies add nothing


def test_vendi_score_of_two_features_is_the_closed_form():
    x = torch.tensor([[1.0, 0.0], [math.cos(0.8), math.sin(0.8)]], dtype=torch.float64)  # λ = (1 ± cos .8)/2
    p = (1 + math.cos(0.8)) / 2
    assert vendi_score(x) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)), rel=1e-9)


def test_vendi_score_is_the_same_from_either_gram_matrix():
    x = normal(30, 8, 0)
    kernel = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    values = torch.linalg.eigvalsh(kernel / 30).clamp(min=1e-300)
    assert vendi_score(x) == pytest.approx(float((-(values * values.log()).sum()).exp()), rel=1e-9)


# Diversity


def test_pairwise_distance_is_the_mean_over_pairs_per_entry(monkeypatch):
    x = normal(30, 6, 0).view(30, 2, 3) + 1e6  # cdist multiplies matrices from 26 samples on
    expected = sum(float((a - b).square().mean().sqrt()) for a, b in combinations(x, 2)) / 435
    assert pairwise_distance(x) == pytest.approx(expected, rel=1e-7)
    monkeypatch.setattr(diversity, "CHUNK", 840)  # 28 rows at once
    assert pairwise_distance(x) == pytest.approx(expected, rel=1e-7)


def test_pairwise_distance_of_a_gaussian_is_the_closed_form_and_of_one_point_zero():
    d, s = 5, 0.7
    expected = 2 * s * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2)) / d**0.5  # s √2 · E‖N(0, I)‖/√d
    assert pairwise_distance(s * normal(2000, d, 0)) == pytest.approx(expected, rel=0.02)
    assert pairwise_distance(torch.full((5, 3), 0.1)) == 0


def test_group_diversity_averages_within_groups_and_then_over_them():
    def distance(a, b):
        return (a - b).abs().sum(1)

    groups = [torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [10.0]])]  # 1, 3, 2 and 10
    assert group_diversity(iter(groups), distance) == pytest.approx((2 + 10) / 2)


def test_group_of_ten_has_45_pairs():
    seen = []
    group_diversity([torch.arange(10.0)[:, None]] * 2, lambda a, b: seen.append((a, b)) or (a - b).abs().squeeze(1))
    assert [len({(float(x), float(y)) for x, y in zip(*pairs, strict=True)}) for pairs in seen] == [45, 45]
    assert all((a < b).all() for a, b in seen)


# Features of one extractor


@pytest.mark.parametrize("metric", [frechet_distance, gaussian_w2, mmd2, sliced_wasserstein, lambda a, b: kernel_distance(a, b, 2, 10)])
def test_metrics_take_features_as_they_take_tensors(metric):
    a, b = normal(30, 3, 0), normal(30, 3, 1)
    assert metric(Features("x", a), Features("x", b)) == metric(a, b)
    assert vendi_score(Features("x", a)) == vendi_score(a)
    assert split_half(metric, Features("x", a)) == split_half(metric, a)


@pytest.mark.parametrize(
    "metric", [frechet_distance, mmd2, sliced_wasserstein, kernel_distance, precision_recall_density_coverage, check_same_extractor]
)
def test_features_of_two_extractors_are_refused(metric):
    with pytest.raises(ValueError, match="features of 'identity' against features of 'inception_v3_2015'"):
        metric(Features("identity", normal(30, 3, 0)), Features("inception_v3_2015", normal(30, 3, 1)))


@pytest.mark.parametrize("swap", [False, True])
def test_features_against_a_bare_tensor_are_refused(swap):
    pair = (Features("identity", normal(30, 3, 0)), normal(30, 3, 1))
    with pytest.raises(ValueError, match="features of 'identity' against a bare tensor"):
        frechet_distance(*(pair[::-1] if swap else pair))


def test_only_inception_features_give_fid():
    assert frechet_name("inception_v3_2015") == "FID"
    assert frechet_name("fd_mnist16_clf") == "Fréchet distance (fd_mnist16_clf)"


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(normal(9, 3, 0), normal(8, 3, 0)), "subset_size=1000 from 9 and 8 samples"),
        (lambda: kernel_distance(normal(9, 3, 0), normal(8, 3, 0), subsets=0, subset_size=5), "subsets=0"),
        (lambda: kernel_distance(normal(9, 3, 0), normal(8, 3, 0), subset_size=1), "subset_size=1 "),
        (lambda: mmd2(normal(1, 3, 0), normal(8, 3, 0)), "1 and 8 samples"),
        (lambda: mmd2(normal(9, 3, 0), normal(8, 3, 0), bandwidth=0), "bandwidth=0: need a finite bandwidth above 0"),
        (lambda: mmd2(torch.ones(9, 3), torch.ones(8, 3)), r"bandwidth=0\.0: most samples are equal, so pass a bandwidth"),
        (lambda: mmd2(normal(9, 3, 0), normal(8, 3, 0) / 0), "8 of 8 samples of the second set"),
        (lambda: mmd2(normal(9, 3, 0), normal(8, 3, 0), paired=True), "9 samples against 8"),
        (lambda: gaussian_w2(normal(1, 3, 0), normal(9, 3, 0)), "1 and 9 samples"),
        (lambda: split_half(mmd2, normal(1, 3, 0)), "1 samples have no two halves"),
        (lambda: vendi_score(torch.zeros(4, 3)), "4 of 4 features are all 0"),
        (lambda: vendi_score(torch.zeros(0, 3)), "0 samples"),
        (lambda: vendi_score(torch.zeros(4)), r"samples of shape \(4,\)"),
        (lambda: vendi_score(torch.full((4, 3), torch.nan)), "4 of 4 samples of the only set"),
        (lambda: pairwise_distance(torch.zeros(1, 3)), "1 samples make no pair"),
        (lambda: group_diversity([], torch.dist), "no groups"),
        (lambda: group_diversity([torch.zeros(3, 1), torch.zeros(1, 1)], lambda a, b: a[:, 0]), "group 1 has 1 samples"),
        (lambda: group_diversity([torch.zeros(3, 2)], lambda a, b: a - b), r"group 0 needs 3 finite distances; got shape \(3, 2\)"),
        (lambda: group_diversity([torch.zeros(3, 2)], lambda a, b: a[:, 0] / 0), "3 of them not finite"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
