"""The metrics against closed forms, other packages and hand-counted cases."""

from types import SimpleNamespace

import pytest
import torch
from helpers import normal

from ddil_agents.evaluation.metrics import precision_recall
from ddil_agents.evaluation.metrics.digits_classifier import CLASSIFIERS, main
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.evaluation.metrics.extractors import EXTRACTORS, default_extractor, load_extractor
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_agents.evaluation.metrics.precision_recall import PRDC, precision_recall_density_coverage
from ddil_env.experts.digits import load_digits, spec_of


def whitened(n, d, seed):
    """Samples whose mean is exactly 0 and whose covariance is exactly I."""
    x = normal(n, d, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


# Fréchet distance


def test_frechet_of_isotropic_gaussians_is_the_closed_form():
    mu = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    a, b = 0.7 * whitened(200, 5, 0), mu + 1.6 * whitened(300, 5, 1)
    assert frechet_distance(a, b) == pytest.approx(float(mu.square().sum()) + 5 * (1.6 - 0.7) ** 2, rel=1e-9)


def test_frechet_in_one_dimension_is_the_closed_form():
    assert frechet_distance(2 * whitened(50, 1, 0), 3 + whitened(70, 1, 1)) == pytest.approx(9 + 1, rel=1e-9)


def test_frechet_with_full_covariances_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(100, 8, 0) @ normal(8, 8, 1), normal(120, 8, 2) @ normal(8, 8, 3) + 1
    root = linalg.sqrtm((torch.cov(a.T) @ torch.cov(b.T)).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("n", [10, 64, 500])  # fewer samples than features, as many, more
def test_frechet_of_a_set_with_itself_is_zero(n):
    x = normal(n, 64, 0)
    assert frechet_distance(x, x.flip(0)) < 1e-5


def test_frechet_is_symmetric_and_computes_in_float64():
    a, b = normal(90, 6, 0) + 1000, normal(80, 6, 1) * 2 + 1000  # float32 sums would lose the spread
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-3)


# Precision, recall, density, coverage


def test_prdc_of_a_hand_counted_case():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # balls for k = 1: [-1, 1], [0, 2], [1, 5], [3, 11]
    fake = torch.tensor([[0.5], [1.5], [20.0], [21.0]])  # balls: [-.5, 1.5], [.5, 2.5], [19, 21], [20, 22]
    # 0.5 lies in two real balls, 1.5 in two, the others in none; real 0 and 1 lie in fake balls; balls 1, 2, 3 hold a fake.
    assert precision_recall_density_coverage(real, fake, k=1) == PRDC(precision=0.5, recall=0.5, density=1.0, coverage=0.75)


def test_a_sample_on_the_sphere_lies_in_the_ball():
    real, fake = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [9.0]])  # 2 is on the edge of [0, 2]
    assert precision_recall_density_coverage(real, fake, k=1).precision == 0.5


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_prdc_is_the_reference_packages(k, shift, monkeypatch):
    prdc = pytest.importorskip("prdc")
    monkeypatch.setattr(precision_recall, "CHUNK", 1000)  # several chunks, the last one short
    real, fake = normal(157, 7, 0), normal(157, 7, 1) * 0.8 + shift
    ours = precision_recall_density_coverage(real, fake, k)
    assert vars(ours) == pytest.approx(prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k))


def test_collapse_keeps_precision_and_loses_recall_and_coverage():
    real = torch.cat([normal(100, 2, 0), normal(100, 2, 1) + 20])
    collapsed = torch.cat([normal(100, 2, 2), normal(100, 2, 3)])
    result = precision_recall_density_coverage(real, collapsed)
    assert result.precision > 0.9
    assert result.recall <= 0.5
    assert result.coverage <= 0.5


# Sliced Wasserstein


@pytest.mark.parametrize("shape", [(1,), (2,), (4, 4)])
def test_sliced_wasserstein_of_a_shifted_set_is_the_shift_over_root_d(shape):
    a = torch.randn(50, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = float(delta.square().mean().sqrt())  # ‖δ‖/√d
    assert sliced_wasserstein(a, (a + delta).flip(0), num_projections=20_000) == pytest.approx(expected, rel=0.03)


def test_sliced_wasserstein_in_one_dimension_is_the_gap_of_the_sorted_samples():
    a, b = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0], [5.0]])
    assert sliced_wasserstein(a, b) == pytest.approx(((1 + 4) / 2) ** 0.5)


def test_sliced_wasserstein_repeats_and_follows_its_generator():
    a, b = normal(30, 3, 0), normal(30, 3, 1)
    assert sliced_wasserstein(a, a.flip(0)) < 1e-12
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a, b) != sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(1))


# Extractors


@pytest.mark.parametrize(("dataset", "accuracy"), [("digits", 0.97), ("digits8", 0.96)])
def test_classifier_reaches_its_accuracy_on_pictures_it_has_not_seen(dataset, accuracy):
    pictures, labels = load_digits(dataset, "test")
    classes = load_extractor(CLASSIFIERS[dataset]).classes(pictures)
    assert (classes == labels).double().mean() >= accuracy


@pytest.mark.parametrize("dataset", CLASSIFIERS)
def test_classifier_features_have_width_64_and_ignore_what_a_picture_cannot_show(dataset):
    extractor, size = load_extractor(CLASSIFIERS[dataset]), spec_of(dataset).size
    pictures = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2
    features = extractor.features(pictures.requires_grad_())
    assert features.shape == (3, 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(features, extractor.features(pictures.clamp(-1, 1)))


def test_features_do_not_depend_on_the_batch():
    extractor, pictures = load_extractor("fd_digits8_clf"), torch.randn(1030, 1, 8, 8)
    torch.testing.assert_close(extractor.features(pictures)[-3:], extractor.features(pictures[-3:]))


def test_frechet_grows_with_damage_in_the_classifiers_features():
    extractor, (pictures, _) = load_extractor("fd_digits8_clf"), load_digits("digits8", "train")
    real = extractor.features(pictures)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet_distance(extractor.features(pictures + level * noise), real) for level in (0.1, 0.3, 0.6)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_identity_features_are_the_flattened_samples_without_a_class():
    samples = torch.arange(12.0).view(2, 3, 2)
    identity = load_extractor("identity")
    assert torch.equal(identity.features(samples), samples.view(2, 6))
    assert identity.classes(samples) is None


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractor_carries_the_name_it_is_loaded_by(name):
    assert load_extractor(name).name == name


def test_default_extractor_is_what_the_expert_asks_for_else_identity():
    assert default_extractor(SimpleNamespace(extractor="fd_mnist16_clf")) == "fd_mnist16_clf"
    assert default_extractor(SimpleNamespace()) == "identity"


def test_fitting_is_one_command(tmp_path, capsys):
    main(["--fit", "digits8", "--out", str(tmp_path), "--updates", "3"])
    assert (tmp_path / "fd_digits8_clf.safetensors").stat().st_size < 700_000
    assert "held-out" in capsys.readouterr().out


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(normal(1, 3, 0), normal(9, 3, 0)), "1 and 9 samples"),
        (lambda: frechet_distance(normal(9, 3, 0), normal(9, 4, 0)), r"\(9, 3\) and \(9, 4\)"),
        (lambda: frechet_distance(normal(9, 3, 0), normal(9, 3, 0) / 0), "9 of 9 samples of the second set"),
        (lambda: frechet_distance(torch.zeros(9), torch.zeros(9)), "must be"),
        (lambda: precision_recall_density_coverage(normal(9, 3, 0), normal(8, 3, 0)), "9 samples against 8"),
        (lambda: precision_recall_density_coverage(normal(5, 3, 0), normal(5, 3, 0), k=5), "k=5 with 5 samples"),
        (lambda: precision_recall_density_coverage(normal(5, 3, 0), normal(5, 3, 0), k=0), "k=0"),
        (lambda: sliced_wasserstein(normal(9, 3, 0), normal(8, 3, 0)), "9 samples against 8"),
        (lambda: sliced_wasserstein(normal(9, 3, 0), normal(9, 3, 0), num_projections=0), "num_projections=0"),
        (lambda: sliced_wasserstein(normal(9, 3, 0), normal(9, 3, 0).log()), "NaN or infinite"),
        (lambda: load_extractor("fid"), "unknown extractor 'fid'; choose one of: identity, latent_pool8, fd_coloured"),
        (lambda: load_extractor("fd_digits8_clf").features(torch.zeros(2, 1, 16, 16)), r"\(n, 1, 8, 8\)"),
        (lambda: load_extractor("fd_digits8_clf").features(torch.zeros(0, 1, 8, 8)), "n ≥ 1"),
        (lambda: load_extractor("fd_digits8_clf").features(torch.full((2, 1, 8, 8), torch.inf)), "2 of 2 samples"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_latent_pool_averages_over_an_8_by_8_grid():
    latents = torch.randn(3, 4, 16, 24)
    features = load_extractor("latent_pool8").features(latents)
    assert features.shape == (3, 256)
    assert torch.allclose(features[1, 64 + 9], latents[1, 1, 2:4, 3:6].mean())  # channel 1, row 1, column 1


def test_identity_refuses_samples_that_are_too_long_to_be_features():
    with pytest.raises(ValueError, match="name another extractor"):
        load_extractor("identity").features(torch.zeros(2, 4, 64, 64))
