"""The evaluator: batches, their store, trajectories step by step, pictures and captions."""

import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import make_evaluator
from line_world import Steersman
from PIL import Image

from ddil_agents.evaluation import provenance, quality, samples
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.metrics.distances import mmd2, split_half
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_agents.evaluation.metrics.pictures import folder_digest
from ddil_agents.evaluation.metrics.precision_recall import precision_recall_density_coverage
from ddil_agents.evaluation.results import describe_measurement, table
from ddil_agents.evaluation.settings import Evaluation, extractor_for
from ddil_agents.evaluation.shift import kernel_bandwidth
from ddil_env import DdimPolicy, ExpertPolicy, GaussianMixtureExpert, NoDataError, TimeGrid, load_expert, unroll
from ddil_env.corrections import ScaledEpsilon
from ddil_env.data import hashes


def mixture():
    means = torch.tensor([[-0.7, 0.2], [0.6, -0.4], [0.1, 0.8]])
    return GaussianMixtureExpert(means=means, stds=torch.tensor([0.1, 0.2, 0.15]), weights=torch.tensor([0.3, 0.3, 0.4]))


class Biased(DdimPolicy):
    """The expert, off by b in every entry of its action at one time."""

    def __init__(self, policy, at, b):
        super().__init__(policy.predict, policy.schedule, substeps=policy.substeps, support=policy.support, conditional=False)
        self.at, self.b = at, b

    def act(self, x_t, t, s, c=None, w=None):
        return super().act(x_t, t, s, c, w) + self.b * (t == self.at)[:, None]


def test_batches_are_evaluated_as_one_set():
    evaluator = make_evaluator(mixture())
    noise = torch.cat([evaluator.noise(k) for k in range(3)])
    assert [len(evaluator.noise(k)) for k in range(3)] == [25, 25, 10]
    assert len(noise.unique(dim=0)) == 60
    drawn = evaluator._draw(evaluator.few_step_expert, evaluator.grid, "ddim")
    x = noise
    for t, s in zip(evaluator.grid.times[:-1], evaluator.grid.times[1:], strict=True):
        x = evaluator.few_step_expert.act(x, t.expand(60), s.expand(60))
    assert torch.allclose(drawn.features.values, x, atol=1e-6)
    assert drawn.path.shape == (20, 5, 2)
    assert torch.allclose(drawn.path[:, -1], x[:20], atol=1e-6)


def test_the_noise_on_the_way_is_not_what_another_seed_or_batch_starts_from(monkeypatch):
    evaluators, on_the_way = [make_evaluator(mixture(), seed=seed) for seed in (0, 1, 1_000_003)], []

    def noting(*args, generator, **kwargs):
        on_the_way.append(torch.Generator().manual_seed(generator.initial_seed()))
        return unroll(*args, generator=generator, **kwargs)

    monkeypatch.setattr(samples, "unroll", noting)
    for evaluator in evaluators:
        evaluator._draw(evaluator.few_step_expert, evaluator.grid, "renoise")
    starts = [evaluator.noise(batch) for evaluator in evaluators for batch in range(3)]
    noise = [*starts, *(torch.randn(25, 2, generator=generator) for generator in on_the_way)]
    assert len(on_the_way) == 9
    assert len({tuple(x[0].tolist()) for x in noise}) == len(noise)


def test_a_store_spares_what_is_in_it_and_changes_no_number(tmp_path: Path):
    expert = mixture()
    first = make_evaluator(expert, tmp_path)
    scores = first.evaluate(first.few_step_expert, name="few")
    whole = expert.nfe
    (last,) = tmp_path.glob("few-*-00002.safetensors")
    last.unlink()  # as if a kill had come before the last batch
    expert.nfe = 0
    again = make_evaluator(expert, tmp_path)
    del scores["seconds"]
    assert {k: v for k, v in again.evaluate(again.few_step_expert, name="few").items() if k != "seconds"} == scores
    # All of the expert's 8 steps, two batches of 25 in 4, and its actions on data, of 2 forwards each.
    assert expert.nfe == whole - 60 * 8 - 50 * 4 - 15 * 4 * 2


def test_evaluations_share_the_experts_samples_and_no_others(tmp_path: Path):
    expert = mixture()
    rows = [make_evaluator(expert, store=str(tmp_path)).evaluate_baselines()]
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert {name.split("-")[0] for name in files} == {"teacher@8", "teacher@4"}
    expert.nfe = 0
    again = make_evaluator(expert, store=str(tmp_path))
    assert expert.nfe == 0
    rows.append(again.evaluate_baselines())
    assert rows[0] == rows[1]
    assert len(again._forward_actions) == 4
    assert expert.nfe == 0  # the row of 4 steps is there, and so are the expert's actions on data
    again.evaluate(Biased(again.expert_policy, again.grid.times[0], 0.1), name="student")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
    assert make_evaluator(expert, store=str(tmp_path), seed=1).evaluate_baselines() != rows[0]
    (row,) = (tmp_path / "seed0").glob("teacher@4-beside-teacher@8-*.json")
    row.write_text(row.read_text()[:50])
    with pytest.raises(ValueError, match=r"teacher@4-beside-.* is damaged .*; remove it, and it is computed again"):
        again.evaluate_baselines()


def test_a_store_of_other_settings_is_refused(tmp_path: Path):
    make_evaluator(mixture(), tmp_path)
    with pytest.raises(ValueError, match="holds an evaluation of other settings"):
        make_evaluator(mixture(), tmp_path, seed=1)


def test_a_store_gives_no_model_the_samples_of_another_of_its_name(tmp_path: Path):
    first, other = mixture(), mixture()
    other.means += 0.3
    for folder in ({}, {"store": str(tmp_path / "shared")}):
        alone = make_evaluator(other).evaluate_baselines()["teacher@4"]
        make_evaluator(first, tmp_path / "own", **folder).evaluate_baselines()
        beside = make_evaluator(other, tmp_path / "own", **folder).evaluate_baselines()["teacher@4"]
        assert {**beside, "seconds": 0} == {**alone, "seconds": 0}
    student, evaluator = mixture(), make_evaluator(first, tmp_path / "students")
    policies = [DdimPolicy(ExpertPolicy(model).predict, model.schedule, conditional=False) for model in (student, other)]
    rows = [evaluator.evaluate(policy, name="student@4") for policy in policies]
    assert {**evaluator.evaluate(policies[1]), "seconds": 0} == {**rows[1], "seconds": 0} != {**rows[0], "seconds": 0}


def test_the_experts_own_policy_has_no_error_anywhere():
    evaluator = make_evaluator(mixture())
    row = evaluator.evaluate(evaluator.expert_policy)
    assert row["path_rmse"] == row["action_mse_own"] == row["action_mse_forward"] == [0.0] * 4
    assert row["action_ratio"] == [None] * 4
    for name in ("shift", "mmd_shift", "gaussian_shift"):
        assert row[f"{name}_to_expert"] == evaluator.score_expert()[f"{name}_to_expert"]
    assert row["shift_to_expert"] == row["mmd_shift_to_expert"] == [0.0] * 4
    assert row["gaussian_shift_to_expert"] == pytest.approx([0.0] * 4, abs=1e-6)
    assert row["frechet_to_expert"] == pytest.approx(0, abs=1e-9)
    assert len(row["diversity"]) == 5
    assert row["diversity"][0] > row["diversity"][-1]


def test_samples_that_draw_noise_on_the_way_are_not_held_against_the_experts_one_by_one():
    evaluator = make_evaluator(mixture())
    row = evaluator.evaluate(evaluator.few_step_expert, kernel="renoise")
    assert row["endpoint_rmse"] is row["path_rmse"] is None
    assert row["frechet_to_expert"] > 0
    one = evaluator.evaluate(evaluator.few_step_expert, TimeGrid(evaluator.expert.schedule, 1), "renoise")
    assert one["endpoint_rmse"] > 0


def test_a_planted_bias_shows_at_its_step_and_after():
    evaluator = make_evaluator(mixture())
    at = evaluator.grid.times[2]
    row = evaluator.evaluate(Biased(evaluator.expert_policy, at, 0.05))
    assert row["path_rmse"][:2] == [0.0, 0.0]
    assert row["path_rmse"][2] == pytest.approx(0.05, rel=1e-5)
    assert row["path_rmse"][3] == pytest.approx(row["endpoint_rmse"])
    for states in ("own", "expert", "forward"):
        assert row[f"action_mse_{states}"] == pytest.approx([0, 0, 0.0025, 0], rel=1e-4, abs=1e-12)
    assert row["action_ratio"][2] == pytest.approx(1, rel=1e-4)
    assert row["shift_to_expert"][2] == 0.0  # the state before the biased action
    assert row["shift_to_expert"][3] > 0


def test_a_shift_is_measured_to_be_what_was_planted():
    evaluator = make_evaluator(mixture(), n=800, n_paths=800, batch_size=800)
    b, floor = 0.5, evaluator.floors()["training_data"]
    halves, their_halves = evaluator.floors()["real_halves"], evaluator.floors()["teacher_halves"]
    unbiased, row = (
        evaluator.evaluate(evaluator.expert_policy),
        evaluator.evaluate(Biased(evaluator.expert_policy, evaluator.grid.times[0], b)),
    )
    # All states after the first step are moved by b in each entry. Sliced W2 is per √d: b. Gaussian W2: ‖(b, b)‖ = b √2.
    for name, moved in (("shift", b), ("gaussian_shift", b * 2**0.5)):
        assert row[name][0] == unbiased[name][0]
        assert row[name + "_to_expert"][0] == unbiased[name + "_to_expert"][0]
        assert abs(row[name][1] - moved) <= unbiased[name][1] * 1.02  # the triangle inequality
        assert row[name + "_to_expert"][1] == pytest.approx(moved, rel=0.02)  # of random directions
        assert row[name][1] > 3 * floor[name][1]
        assert row[name][1] > 3 * halves[name][1] > 0
        assert row[name + "_to_expert"][1] > 3 * their_halves[name + "_to_expert"][1] > 0
    assert row["mmd_shift"][1] > 3 * abs(floor["mmd_shift"][1])
    assert row["mmd_shift_to_expert"][1] > 3 * abs(their_halves["mmd_shift_to_expert"][1])
    assert halves["n_paths"] == their_halves["n_paths"] == 400
    assert all(len(halves[name]) == 4 for name in ("shift", "mmd_shift", "gaussian_shift"))


def test_only_states_of_one_noise_are_compared_in_pairs():
    evaluator = make_evaluator(mixture())
    row, states = evaluator.evaluate(evaluator.few_step_expert), evaluator.expert_path[:, :4].transpose(0, 1)
    halves = evaluator.floors()["teacher_halves"]["mmd_shift_to_expert"]
    for i, (x, width) in enumerate(zip(states, map(kernel_bandwidth, states), strict=True)):
        assert halves[i] == split_half(lambda a, b, h=width: mmd2(a, b, h), x)
        if i > 0:  # at the first, two of one index are the same
            assert row["mmd_shift_to_expert"][i] != 0
    for i, x in enumerate(evaluator.real_noised):
        states = evaluator._draw(evaluator.few_step_expert, evaluator.grid, "ddim").path[:, i]
        assert row["mmd_shift"][i] == mmd2(states, x, kernel_bandwidth(x), paired=True)


@pytest.mark.parametrize(("k", "labels"), [(1, None), (3, [0, 1, 2])])
def test_a_perfect_sampler_with_noise_of_its_own_is_half_as_far_as_the_teachers_halves(k, labels):
    means = torch.randn(k, 24, generator=torch.Generator().manual_seed(0))
    expert = GaussianMixtureExpert(means=means, stds=torch.full((k,), 0.3), weights=torch.ones(k) / k, labels=labels)
    evaluators = [make_evaluator(expert, n=401, n_paths=4, n_action=1, batch_size=401, seed=seed) for seed in range(6)]
    nfe, floors = expert.nfe, [evaluator.floors()["teacher_halves"] for evaluator in evaluators]
    assert expert.nfe == nfe
    apart = [frechet_distance(a.expert_samples.features, b.expert_samples.features) for a, b in pairwise(evaluators)]
    assert sum(floor["frechet_to_expert"] for floor in floors) / 6 == pytest.approx(2 * sum(apart) / 5, rel=0.15)
    order = torch.arange(401) if labels is None else evaluators[0].c.argsort(stable=True)
    a, b = (evaluators[0].expert_samples.features[order[first:400:2]] for first in (0, 1))
    assert floors[0]["frechet_to_expert"] == frechet_distance(a, b)
    assert floors[0]["n"] == 200


class Memory(DdimPolicy):
    """A student that gives back what the teacher was trained on."""

    def __init__(self, expert, n):
        super().__init__(ExpertPolicy(expert).predict, expert.schedule)
        self.pictures = expert.reference_data(n)[0]

    def act(self, x_t, t, s, c=None, w=None):
        return self.pictures[: len(x_t)]


def test_a_student_that_memorises_is_held_against_data_that_it_has_not_seen():
    expert = load_expert("digits8")
    evaluator = make_evaluator(expert, n=500, n_paths=10, n_action=5, batch_size=500)
    row, (training, c), (held_out, _) = (
        evaluator.evaluate(Memory(expert, 500), evaluator.grid),
        expert.reference_data(500),
        expert.reference_data(500, True),
    )
    assert (len(training), len(held_out)) == (500, 440)
    assert {key: evaluator.describe()[key] for key in ("n", "reference", "n_reference")} == {
        "n": 500,
        "reference": "held_out",
        "n_reference": 440,
    }
    assert torch.equal(evaluator.c, c)  # samples have the classes of the training data, 50 of each
    features, seen = evaluator.extract_features(held_out)[0], evaluator.extract_features(training)[0]
    assert row["frechet"] == frechet_distance(features, seen) > 0.1
    matched = precision_recall_density_coverage(features, seen[:440])  # 44 of each class on both sides
    assert {name: row[name] for name in ("precision", "recall", "density", "coverage")} == dataclasses.asdict(matched)
    assert row["recall"] < 1 > row["coverage"]
    assert row["frechet_train"] == pytest.approx(0, abs=1e-6)
    assert row["recall_train"] == row["coverage_train"] == 1
    floor = evaluator.floors()["training_data"]  # what such a student is
    assert {key: floor[key] for key in floor.keys() & row.keys() - {"shift"}} == {
        key: row[key] for key in floor.keys() & row.keys() - {"shift"}
    }
    shown = table({"settings": evaluator.describe(), "floors": {}, "models": {"memory@4": row}, **provenance.provenance(expert.device)})
    assert "n = 500, evaluation seed 0, against 440 held-out data, features" in shown
    assert "coverage of training data ↑" in shown


def test_without_held_out_data_the_training_data_are_the_reference_and_the_result_says_so(monkeypatch):
    expert = mixture()
    draw = expert.reference_data

    def all_trained_on(n, held_out=False):
        if held_out:
            raise NoDataError("none")
        return draw(n)

    monkeypatch.setattr(expert, "reference_data", all_trained_on)
    evaluator = make_evaluator(expert)
    assert (evaluator.describe()["reference"], evaluator.describe()["n_reference"]) == ("training", 60)
    assert torch.equal(evaluator.real, draw(60)[0])
    row = evaluator.evaluate(evaluator.few_step_expert)
    assert row["frechet"] > 0
    assert not [key for key in row if key.endswith("_train")]
    assert evaluator.floors().keys() == {"real_halves", "teacher_halves"}


@pytest.mark.parametrize("n_held_out", [8, 90])
def test_forward_states_are_of_held_out_data_under_their_own_conditions(monkeypatch, n_held_out):
    expert = GaussianMixtureExpert(means=[[-0.7, 0.2], [0.6, -0.4], [0.1, 0.8]], stds=0.1, weights=[1, 1, 1], labels=[0, 1, 2])
    draw, calls = expert.reference_data, []
    monkeypatch.setattr(expert, "reference_data", lambda n, held_out=False: draw(n_held_out if held_out else n, held_out))
    evaluator = make_evaluator(expert, n_action=15)
    held_out, c = draw(n_held_out, held_out=True)
    m = min(15, n_held_out)
    assert not torch.equal(c[:m], evaluator.c[:m])

    class Noting(DdimPolicy):
        def act(self, x_t, t, s, c=None, w=None):
            calls.append((x_t, t, c))
            return super().act(x_t, t, s, c, w)

    row = evaluator.evaluate(Noting(evaluator.few_step_expert.predict, expert.schedule))
    forward = [(x_t, t, of) for x_t, t, of in calls if x_t.shape == (m, 2) and torch.equal(of, c[:m])]
    assert len(row["action_mse_forward"]) == len(forward) == 4
    for (x_t, t, _), noised in zip(forward, evaluator.real_noised, strict=True):
        assert torch.equal(x_t, noised[:m])
        alpha, sigma = expert.schedule(t, x_t)
        assert ((x_t - alpha * held_out[:m]) / sigma).abs().max() < 4  # the noise that was added to them
    assert torch.equal(make_evaluator(expert, n_action=15).real_noised, evaluator.real_noised)
    assert not torch.equal(make_evaluator(expert, n_action=15, seed=1).real_noised, evaluator.real_noised)


def test_every_floor_says_of_how_many_samples_it_is(monkeypatch):
    floors = make_evaluator(mixture()).floors()
    assert {name: row["n"] for name, row in floors.items()} == {"real_halves": 10, "teacher_halves": 30, "training_data": 60}
    expert = mixture()
    draw = expert.reference_data

    def three(n, held_out=False):
        if held_out:
            raise NoDataError("none")
        return draw(3)

    monkeypatch.setattr(expert, "reference_data", three)
    assert {name: row["n"] for name, row in make_evaluator(expert).floors().items()} == {"teacher_halves": 30}  # three data have no halves


def test_data_free_conditions_come_in_turn(monkeypatch):
    def no_data(*args, **kwargs):
        raise NoDataError("none")

    expert = load_expert("digits8")
    monkeypatch.setattr(expert, "reference_data", no_data)
    evaluator = make_evaluator(expert, n=25, n_paths=5)
    assert evaluator.c.tolist() == [i % 10 for i in range(25)]
    row = evaluator.evaluate(evaluator.few_step_expert)
    assert "frechet" not in row
    assert row["action_mse_forward"] is row["shift"] is None
    assert row["action_ratio"] == pytest.approx([a / b for a, b in zip(row["action_mse_own"], row["action_mse_expert"], strict=True)])


def test_pictures_are_compared_with_a_folder(tmp_path: Path, colour):
    pictures = torch.randint(0, 255, (40, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{i:03d}.png")
    expert = load_expert("digits8")
    evaluator = make_evaluator(expert, n=20, n_paths=10, batch_size=10, extractor="colour", images=str(tmp_path))
    assert evaluator.real_features.values.shape == (40, 6)
    assert evaluator.describe() | {"resize": "centre_crop_lanczos_256", "distance": "Fréchet distance (colour)"} == evaluator.describe()
    assert evaluator.describe()["images"].startswith("40 pictures, ")
    assert evaluator.floors().keys() == {"real_halves", "teacher_halves"}
    assert evaluator.evaluate(evaluator.few_step_expert)["frechet"] > 100 * evaluator.floors()["real_halves"]["frechet"] > 0


def test_cached_features_of_one_folder_are_not_read_for_another(tmp_path: Path, colour, monkeypatch):
    monkeypatch.setattr(quality, "PICTURES_PER_FILE", 16)
    for name, low in (("a", 0), ("b", 128)):
        (tmp_path / name).mkdir()
        pictures = torch.randint(low, 255, (40, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.numpy()).save(tmp_path / name / f"{i:03d}.png")
    expert, settings = load_expert("digits8"), {"n": 20, "n_paths": 10, "batch_size": 10, "extractor": "colour"}
    alone, *rows = (
        make_evaluator(expert, **settings, images=str(tmp_path / name), **store).evaluate_baselines()["teacher@4"]["frechet"]
        for name, store in (("b", {}), ("a", {"store": str(tmp_path / "store")}), ("b", {"store": str(tmp_path / "store")}))
    )
    assert rows[1] == alone != rows[0]


def test_a_picture_edited_to_the_same_size_and_time_makes_another_folder(tmp_path: Path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(pictures / f"{i}.bmp")
    alone, kept = folder_digest(pictures), folder_digest(pictures, tmp_path / "store")
    assert alone == kept == folder_digest(Path(pictures.rename(tmp_path / "moved")))
    pictures = tmp_path / "moved"
    monkeypatch.setattr(hashes, "SETTLED", -1.0)  # what was written just now is remembered
    assert folder_digest(pictures, tmp_path / "store") == kept
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "hash_picture", lambda pair: pytest.fail("read again"))
        assert folder_digest(pictures, tmp_path / "store") == kept
    before = (pictures / "1.bmp").stat()
    Image.new("RGB", (4, 4), (9, 0, 0)).save(pictures / "1.bmp")
    os.utime(pictures / "1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (pictures / "1.bmp").stat().st_size == before.st_size
    assert folder_digest(pictures, tmp_path / "store") == folder_digest(pictures) != kept


def test_reading_a_folder_of_pictures_goes_on_where_it_was_killed(tmp_path: Path, colour, monkeypatch):
    monkeypatch.setattr(quality, "PICTURES_PER_FILE", 16)
    for i, picture in enumerate(torch.randint(0, 255, (40, 20, 30, 3), dtype=torch.uint8)):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{i:03d}.png")
    expert, settings = load_expert("digits8"), {"n": 20, "n_paths": 10, "extractor": "colour", "images": str(tmp_path)}
    read, load = [], quality.load_pictures

    def killed(paths):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(len(paths))
        return load(paths)

    monkeypatch.setattr(quality, "load_pictures", killed)
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(expert, **settings, store=str(tmp_path / "store"))
    monkeypatch.setattr(quality, "load_pictures", lambda paths: read.append(len(paths)) or load(paths))
    again = make_evaluator(expert, **settings, store=str(tmp_path / "store"))
    assert read == [16, 16, 8]
    assert torch.equal(again.real_features.values, make_evaluator(expert, **settings).real_features.values)


@pytest.mark.gpu
def test_pictures_of_an_expert_on_the_gpu_are_evaluated(colour):
    evaluator = make_evaluator(load_expert("digits8", device="cuda"), n=20, n_paths=10, batch_size=8, extractor="colour")
    row = evaluator.evaluate_baselines()["teacher@4"]
    assert row["frechet"] > 0
    assert evaluator.floors()["training_data"]["frechet"] > 0


def test_what_an_expert_lacks_is_refused_before_anything_is_drawn(tmp_path: Path, colour):
    line = GaussianMixtureExpert(means=torch.zeros(1, 3), stds=torch.ones(1), weights=torch.ones(1))
    for settings, message in (
        ({"extractor": "colour"}, "decodes no pictures"),
        ({"lpips": True}, "decodes no pictures"),
        ({"images": str(tmp_path)}, "does not read pictures; choose extractor=inception_v3_2015"),
        ({"extractor": "inception"}, "unknown extractor 'inception'; choose one of: .*inception_v3_2015"),
    ):
        with pytest.raises(ValueError, match=message):
            extractor_for(line, Evaluation(**settings))
    with pytest.raises(ValueError, match="Digits is not conditioned on text"):
        extractor_for(load_expert("digits8"), Evaluation(scores=("clip_score",)))
    with pytest.raises(ValueError, match="images=nowhere: no such folder"):
        Evaluation(images="nowhere")
    with pytest.raises(ValueError, match="unknown score 'clip'"):
        Evaluation(scores=("clip",))


class Digit:
    name = "digit_of_the_caption"
    weights = "of one"

    def score(self, pictures, captions):
        return torch.tensor([float(caption) for caption in captions])


class Difference:
    weights = "of one"

    def __call__(self, a, b):
        return (a.float() - b.float()).abs().flatten(1).mean(1) / 255


def test_scores_of_captions_and_lpips_reach_the_result(monkeypatch, tmp_path: Path):
    expert = load_expert("digits8")
    monkeypatch.setattr(type(expert), "captions", lambda self, c: [str(int(i)) for i in c], raising=False)
    monkeypatch.setattr(Evaluator, "scorers", {"clip_score": Digit()})
    monkeypatch.setattr(samples, "lpips_distance", lambda weights, device: Difference())
    evaluator = make_evaluator(expert, tmp_path, n=20, n_paths=5, batch_size=8, scores=("clip_score",), lpips=True)
    row = evaluator.evaluate(evaluator.few_step_expert, evaluator.grid, name="few")
    assert row["clip_score"] == pytest.approx(float(evaluator.c.double().mean()))
    # Ten pictures of each condition, from one noise in all conditions: 45 pairs each.
    x_T = torch.randn(10, *expert.sample_shape, generator=evaluator._generator("lpips x_T"))
    means = []
    for c in range(10):
        x = x_T
        for t, s in zip(evaluator.grid.times[:-1], evaluator.grid.times[1:], strict=True):
            x = evaluator.few_step_expert.act(x, t.expand(10), s.expand(10), torch.full((10,), c))
        pictures = evaluator.pictures(x).double() / 255
        pairs = [float((pictures[i] - pictures[j]).abs().mean()) for i in range(10) for j in range(i)]
        assert len(pairs) == 45
        means.append(sum(pairs) / 45)
    assert row["lpips"] == pytest.approx(sum(means) / 10, rel=1e-4)
    described = evaluator.describe()
    assert described["scores"] == {"clip_score": "digit_of_the_caption"}
    assert described["lpips"] == "lpips_0.1_alex"
    assert len(described["captions"]) == 12
    next(tmp_path.glob("few-*-lpips-of one-003.json")).unlink()  # as if a kill had come before it
    drawn, draw = [], samples.group_diversity
    monkeypatch.setattr(samples, "group_diversity", lambda groups, distance: drawn.append(len(groups)) or draw(groups, distance))
    for _ in range(2):
        assert evaluator.evaluate(evaluator.few_step_expert, evaluator.grid, name="few") == row
    assert drawn == [1]


def test_a_score_that_a_store_lacks_is_drawn_for_and_one_that_it_has_is_no_burden(monkeypatch, tmp_path: Path):
    expert = load_expert("digits8")
    monkeypatch.setattr(type(expert), "captions", lambda self, c: [str(int(i)) for i in c], raising=False)
    monkeypatch.setattr(Evaluator, "scorers", {})
    assert "clip_score" not in make_evaluator(expert, tmp_path, n=20, n_paths=5).evaluate_baselines()["teacher@4"]
    monkeypatch.setattr(Evaluator, "scorers", {"clip_score": Digit()})
    scored = make_evaluator(expert, tmp_path, n=20, n_paths=5, scores=("clip_score",)).evaluate_baselines()
    assert scored["teacher@4"]["clip_score"] == scored["teacher@8"]["clip_score"] == pytest.approx(4.5, abs=2)
    monkeypatch.setattr(Evaluator, "scorers", {})
    expert.nfe = 0
    plain = make_evaluator(expert, tmp_path, n=20, n_paths=5).evaluate_baselines()
    assert expert.nfe == 0
    assert not any("clip_score" in row for row in plain.values())


def test_what_was_computed_with_other_weights_is_computed_again(monkeypatch, tmp_path: Path):
    expert = load_expert("digits8")
    monkeypatch.setattr(type(expert), "captions", lambda self, c: [str(int(i)) for i in c], raising=False)
    scorer = Digit()
    monkeypatch.setattr(Evaluator, "scorers", {"clip_score": scorer})
    scores = []
    for weights, offset in (("of one", 0), ("of another", 100), ("of one", 50)):
        monkeypatch.setattr(scorer, "weights", weights, raising=False)
        monkeypatch.setattr(
            scorer, "score", lambda pictures, captions, offset=offset: torch.tensor([float(x) + offset for x in captions]), raising=False
        )
        evaluator = make_evaluator(expert, tmp_path, n=20, n_paths=5, scores=("clip_score",))
        scores.append(evaluator.evaluate_baselines()["teacher@4"]["clip_score"])
        assert evaluator.describe()["weights"] == {"clip_score": weights}
    assert scores[1] == pytest.approx(scores[0] + 100)
    assert scores[2] == scores[0]  # read, not scored again
    monkeypatch.setattr(type(evaluator.extractor), "weights", "of others")
    with pytest.raises(ValueError, match="holds an evaluation of other settings"):
        make_evaluator(expert, tmp_path, n=20, n_paths=5)


def test_a_policy_with_an_act_of_its_own_is_not_cached(tmp_path: Path):
    expert = mixture()
    evaluator = make_evaluator(expert, tmp_path)
    for b in (0.1, 0.5):
        row = evaluator.evaluate(Biased(evaluator.expert_policy, evaluator.grid.times[3], b), name="student")
        assert row["endpoint_rmse"] == pytest.approx(b, rel=1e-4)
    scaled = [evaluator.evaluate(ScaledEpsilon(evaluator.few_step_expert, scale), name="scaled")["endpoint_rmse"] for scale in (1.01, 1.5)]
    assert scaled[1] > 2 * scaled[0]


def test_a_world_adds_what_episodes_earn() -> None:
    expert = Steersman()
    evaluator = Evaluator(ExpertPolicy(expert, 2), TimeGrid(expert.schedule, 2), Evaluation(n=20, n_episodes=6))
    rows = evaluator.evaluate_baselines()
    assert set(rows) == {"teacher@4", "teacher@2"}
    assert all(row["success"] == 1 and row["length"] == 6 and -3 < row["return"] < 0 for row in rows.values())
    assert rows["teacher@2"]["error_ratio"] > 0
    assert {key for floor in evaluator.floors().values() for key in floor} >= {"condition_shift", "condition_shift_to_expert"}
    assert evaluator.describe()["n_episodes"] == 6
    settings = evaluator.describe()
    assert "20, 6 episodes, " in describe_measurement(settings, {"hardware": "a CPU", "torch": "2", "date": "today"})
    assert "n_episodes" not in make_evaluator(mixture(), n=20).describe()
