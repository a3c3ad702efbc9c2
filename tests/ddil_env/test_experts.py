"""Facts about experts: the closed form, the contract and its checker, counting, weights files, presets, policies."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from helpers import Scaled, latents, preset, random_mixture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ddil_env.presets
from ddil_env import (
    DenoisingEnv,
    Expert,
    ExpertPolicy,
    GaussianMixtureExpert,
    NoiseSchedule,
    Prediction,
    TimeGrid,
    check_expert,
    load_expert,
    unroll,
)
from ddil_env.data.tensors import TensorData
from ddil_env.experts.digits import Digits, load_digits
from ddil_env.weights import load_weights, read_tensors

# The closed form
# The checker
# Counting


def test_nfe_counts_samples_and_a_guided_pair_counts_two() -> None:
    expert = random_mixture(labels=[0, 1, 1, 2])
    x_t, t, c = latents(5, 2), torch.full((5,), 400.0), torch.tensor([0, 1, 2, 0, 1])
    for call, forwards in (
        (lambda: expert.predict(x_t, t, c), 5),
        (lambda: expert.guided(x_t, t, c, 1.0), 5),
        (lambda: expert.guided(x_t, t, c, 3.0), 10),
        (lambda: expert.guided(x_t, t, c, torch.full((5,), 3.0)), 10),
        (lambda: ExpertPolicy(expert, substeps=4, guidance_scale=3.0).act(x_t, t, torch.zeros(5), c), 40),
        (lambda: unroll(ExpertPolicy(expert, substeps=2), TimeGrid(expert.schedule, 3), x_t, c), 30),
    ):
        expert.nfe = 0
        call()
        assert expert.nfe == forwards


def test_a_chain_of_super_predict_counts_once_and_two_forwards_count_twice() -> None:
    class Derived(Scaled):
        def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
            return super().predict(x_t, t, c)

    class Further(Derived):
        def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
            return super().predict(x_t, t, c)

    class Inherits(Further):
        pass

    class Twice(Scaled):
        def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
            super().predict(x_t, t, c)
            return super().predict(x_t, t, c)

    for cls, forwards in ((Scaled, 4), (Derived, 4), (Further, 4), (Inherits, 4), (Twice, 8)):
        expert = cls()
        expert.predict(latents(4, 3), torch.full((4,), 400.0))
        assert expert.nfe == forwards, cls


def test_a_student_counts_its_own_forwards() -> None:
    expert = random_mixture()
    student = expert.make_student()
    student.predict(latents(5, 2), torch.full((5,), 400.0))
    assert (student.nfe, expert.nfe) == (5, 0)


def test_an_expert_runs_without_gradient() -> None:
    x_t = latents(2, 2).requires_grad_()
    assert not random_mixture().predict(x_t, torch.full((2,), 400.0)).x_0.requires_grad


# Students


@pytest.mark.parametrize(
    ("name", "options"), [("gaussian_mixture", {"width": 32, "depth": 2}), ("digits8", {}), ("digits8", {"channels": (8, 16)})]
)
def test_a_student_saves_and_loads_to_the_same_predictions(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expert = preset(name)
    student = expert.make_student(**options)
    expert.save_student(student, tmp_path, num_steps=4)
    again = expert.load_student(tmp_path, **options)
    x_t, c = latents(2, *expert.sample_shape), torch.tensor([1, 2])
    assert torch.equal(student.predict(x_t, torch.full((2,), 500.0), c).x_0, again.predict(x_t, torch.full((2,), 500.0), c).x_0)
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights at .*student.safetensors"):
        expert.load_student(tmp_path, **options)


def test_a_digits_student_starts_as_the_teacher() -> None:
    expert = preset("digits8")
    x_t, t, c = latents(2, 1, 8, 8), torch.full((2,), 500.0), torch.tensor([1, 2])
    with torch.no_grad():
        torch.testing.assert_close(expert.make_student().predict(x_t, t, c).x_0, expert.predict(x_t, t, c).x_0)


def test_an_expert_without_data_or_student_says_so() -> None:
    with pytest.raises(ValueError, match="Scaled brings no data"):
        Scaled().sample_data(3)
    with pytest.raises(ValueError, match=r"Scaled does not implement make_student\(\)"):
        Scaled().make_student()


# Digits


@pytest.mark.parametrize(("name", "size", "counts"), [("digits", 16, (3500, 800, 700)), ("digits8", 8, (900, 400, 497))])
def test_digits_splits_are_disjoint_and_cover_the_data(name: str, size: int, counts: tuple[int, ...]) -> None:
    splits = {split: load_digits(name, split) for split in ("train", "fit", "test")}  # type: ignore[arg-type]
    assert tuple(len(pictures) for pictures, _ in splits.values()) == counts
    for pictures, labels in splits.values():
        assert pictures.shape[1:] == (1, size, size)
        assert pictures.min() >= -1
        assert pictures.max() <= 1
        assert sorted(set(labels.tolist())) == list(range(10))
    rows = torch.cat([pictures.flatten(1) for pictures, _ in splits.values()])
    assert len(rows.unique(dim=0)) >= len(rows) - 5  # no picture is in two splits (MNIST holds a few twins of its own)


def test_reference_data_is_class_balanced() -> None:
    for held_out in (False, True):
        x_0, c = preset("digits8").reference_data(200, held_out)
        assert x_0.shape == (200, 1, 8, 8)
        assert c is not None
        assert c.bincount().tolist() == [20] * 10


def test_unknown_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown digits data set 'cifar'; choose one of: digits, digits8"):
        Digits("cifar")
    with pytest.raises(ValueError, match="unknown split 'valid'; choose one of: train, fit, test"):
        load_digits("digits8", "valid")  # type: ignore[arg-type]


# Weights files


def weights_of(name: str = "digits8") -> Path:
    return Path(ddil_env.presets.__file__).parent / "experts" / "weights" / f"{name}.safetensors"


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_weights_cut_short_are_refused_by_name(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(weights_of().read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path} is damaged or not a safetensors file .*fetch or train it again"):
        Digits("digits8", weights=str(path))


def test_a_pickle_is_refused_under_either_name(tmp_path: Path) -> None:
    for name, message in (
        ("mine.pt", "refusing to read weights from .*mine.pt: only .safetensors is read"),
        ("mine.safetensors", "is damaged"),
    ):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(ValueError, match=message):
            Digits("digits8", weights=str(tmp_path / name))


def test_absent_foreign_or_non_finite_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    with pytest.raises(ValueError, match=f"no weights at {path}"):
        Digits("digits8", weights=str(path))
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path} does not fit DigitsUNet"):
        Digits("digits8", weights=str(path))
    tensors = load_file(weights_of())
    tensors["unet.conv_in.bias"][0] = math.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{path} holds non-finite values in 'unet.conv_in.bias'"):
        Digits("digits8", weights=str(path))


def test_weights_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    save_file(source.state_dict(), path)
    load_weights(target, path)
    assert torch.equal(source.weight, target.weight)
    assert set(read_tensors(path)) == {"weight", "bias"}


# Data in memory


def test_bad_data_are_refused() -> None:
    x_0 = torch.zeros(4, 2)
    x_0[2, 1], x_0[3, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 4 samples hold NaN or infinite values, the first at 2; remove them"):
        TensorData(x_0)
    with pytest.raises(ValueError, match="the data set is empty"):
        TensorData(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="4 samples but 3 conditions"):
        TensorData(torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64))


def test_draws_keep_pairs_together() -> None:
    data = TensorData(torch.arange(6.0)[:, None], torch.arange(6))
    x_0, c = data.draw(50, torch.Generator().manual_seed(0))
    assert c is not None
    assert torch.equal(x_0[:, 0].long(), c)
    assert set(c.tolist()) == set(range(6))


# Policies


@pytest.mark.parametrize("substeps", [0, -1])
def test_an_action_needs_a_step(substeps: int) -> None:
    with pytest.raises(ValueError, match=f"substeps={substeps}: need a whole number from 1"):
        ExpertPolicy(random_mixture(), substeps=substeps)


def test_guidance_needs_a_null_condition() -> None:
    with pytest.raises(
        ValueError, match=r"guidance_scale=2.0: GaussianMixtureExpert has no null condition to guide against; use guidance_scale=1"
    ):
        ExpertPolicy(random_mixture(), guidance_scale=2.0)


def test_k_substeps_on_n_steps_are_the_experts_own_nk_step_sampler() -> None:
    expert = random_mixture(schedule="flow")  # whose grid is real, so that 4 × 3 and 12 steps share every time
    x_T = latents(5, 2)
    coarse = unroll(ExpertPolicy(expert, substeps=3), TimeGrid(expert.schedule, 4), x_T)
    fine = unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, 12), x_T)
    torch.testing.assert_close(coarse[:, 1:], fine[:, 3::3], atol=1e-5, rtol=1e-5)


def test_projection_of_the_policy_can_be_switched_off() -> None:
    expert = preset("digits8")
    x_t, t, s, c = 3 * latents(2, 1, 8, 8), torch.full((2,), 999.0), torch.zeros(2), torch.tensor([1, 2])
    inside, anywhere = (ExpertPolicy(expert, guidance_scale=9.0, project=project).act(x_t, t, s, c) for project in (True, False))
    assert inside.abs().max() <= 1
    assert anywhere.abs().max() > 1


# Finding experts


class Shrink(Expert):
    """A third party's expert: data N(0, scale²) in two dimensions."""

    def __init__(self, scale: float = 1.0, device: str = "cpu") -> None:
        super().__init__(NoiseSchedule("cosine"), (2,), device=device)
        self.scale = scale

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, sigma = self.schedule(t, x_t)
        x_0 = alpha * self.scale**2 / (alpha**2 * self.scale**2 + sigma**2) * x_t
        return self.schedule.prediction(x_0, x_t, t, "x_0")


@pytest.fixture
def shrink_yaml(tmp_path: Path) -> str:
    (tmp_path / "shrink.yaml").write_text(f"expert: {__name__}.Shrink\nscale: 0.5\n")
    return str(tmp_path / "shrink.yaml")


def test_a_third_partys_expert_needs_one_class_and_a_yaml_file(shrink_yaml: str) -> None:
    expert = load_expert(shrink_yaml)
    assert isinstance(expert, Shrink)
    assert (expert.scale, load_expert(shrink_yaml, scale=0.1).scale) == (0.5, 0.1)  # type: ignore[attr-defined]
    check_expert(expert)
    env = DenoisingEnv(shrink_yaml, num_steps=8, batch_size=[512])
    env.set_seed(0)
    rollout = env.rollout(8, ExpertPolicy(env.expert, substeps=4))
    assert float(rollout["next", "x_t"][:, -1].std()) == pytest.approx(0.5, abs=0.05)
    single = gymnasium.make("ddil/GaussianMixture-v0", expert=shrink_yaml, num_steps=2)
    observation, _ = single.reset(seed=0)
    assert set(observation) == {"x_t", "t", "s"}
    assert single.step(single.action_space.sample())[0]["t"] == 500
    batch = gymnasium.make_vec("ddil/GaussianMixture-v0", num_envs=3, expert=shrink_yaml)
    assert batch.reset(seed=0)[0]["x_t"].shape == (3, 2)


def test_an_installed_packages_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "shrink"

        def load(self) -> type[Expert]:
            return Shrink

    def entry_points(*, group: str) -> list[Point]:
        return [Point()] if group == "ddil.experts" else []

    monkeypatch.setattr(ddil_env.presets, "entry_points", entry_points)
    (tmp_path / "mine.yml").write_text("expert: shrink\nscale: 2\n")
    assert isinstance(load_expert(str(tmp_path / "mine.yml")), Shrink)
    (tmp_path / "mine.yml").write_text("expert: shrunk\n")
    with pytest.raises(ValueError, match=r"cannot find expert 'shrunk'; .* the entry point of a package that is installed: shrink"):
        load_expert(str(tmp_path / "mine.yml"))


def test_an_expert_passes_through_load_expert_as_it_is() -> None:
    expert = random_mixture()
    assert load_expert(expert) is expert
    with pytest.raises(ValueError, match=r"overrides \['device'\] cannot change an expert that exists already"):
        load_expert(expert, device="cpu")


def test_an_unknown_preset_lists_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # presets are found from any directory
    assert isinstance(load_expert("gaussian_mixture"), GaussianMixtureExpert)
    with pytest.raises(
        ValueError,
        match=r"unknown env 'sd51'; presets: .*digits, digits8, dit, fork, gaussian_mixture, kuramoto, .*sd15.*Or pass a YAML path",
    ):
        load_expert("sd51")
    with pytest.raises(ValueError, match=r"no file 'absent.yaml'"):
        load_expert("absent.yaml")
    with pytest.raises(ValueError, match=r"unknown env '../env/digits'"):
        load_expert("../env/digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert: [", "is not valid YAML"),
        ("- a\n- b\n", "holds list, but a config is a mapping"),
        ("", "holds NoneType, but a config is a mapping"),
        ("scale: 2\n", "names no expert: it needs a line `expert: package.module.ClassName`"),
        ("expert: 3\n", "names no expert"),
        ("expert: nowhere.Mine\n", r"cannot find expert 'nowhere.Mine' \(No module named 'nowhere'\); pass a dotted path"),
        ("expert: ddil_env.Nope\n", "cannot find expert 'ddil_env.Nope'"),
        ("expert: Mine\n", "cannot find expert 'Mine'"),
        ("expert: torch.nn.Linear\n", "'torch.nn.Linear' is not a subclass of ddil_env.Expert"),
        (f"expert: {__name__}.Shrink\nsize: 3\n", r"Shrink: got an unexpected keyword argument 'size'; it takes scale, device"),
    ],
)
def test_bad_presets_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_expert(str(tmp_path / "mine.yaml"))


def test_a_preset_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine.yaml is not valid YAML"):
        load_expert(str(tmp_path / "mine.yaml"))


def test_a_network_whose_output_would_broadcast_is_refused():
    schedule = NoiseSchedule("cosine")
    with pytest.raises(ValueError, match=r"output has shape \(4, 1\); need x_t's, \(4, 2\)"):
        schedule.prediction(torch.zeros(4, 1), torch.zeros(4, 2), torch.full((4,), 500.0), "v")
