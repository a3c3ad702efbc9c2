"""The coloured digits: captions and pictures, how they are read back, and a training that is cut short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.metrics.coloured_digits import ColouredDigitReader
from ddil_agents.evaluation.settings import Evaluation
from ddil_env import ExpertPolicy, StudentPolicy, TimeGrid, check_expert, load_expert, unroll
from ddil_env.experts import train_coloured_digits
from ddil_env.experts.coloured_digits import (
    COLOURS,
    ColouredDigits,
    captions,
    combinations,
    draw_pictures,
    held_out,
    palette,
    render,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def test_a_tenth_of_the_captions_is_held_out_and_all_their_pairs_are_seen() -> None:
    assert len(set(captions())) == len(combinations()) == 560
    assert int(held_out().sum()) == 56
    assert captions()[int((combinations() == torch.tensor([7, 2, 4])).all(1).nonzero())] == "a red seven on blue"
    seen, every = combinations()[~held_out()], combinations()
    for pair in ([0, 1], [0, 2], [1, 2]):
        assert len(seen[:, pair].unique(dim=0)) == len(every[:, pair].unique(dim=0))


def test_a_picture_is_its_ink_where_the_digit_is_and_its_ground_elsewhere() -> None:
    digit = torch.full((1, 1, 2, 2), -1.0)
    digit[0, 0, 0, 0], digit[0, 0, 1, 1] = 1.0, 0.0
    (picture,) = render(digit, torch.tensor([2]), torch.tensor([4]))
    red, blue = palette()[2], palette()[4]
    torch.testing.assert_close(picture[:, 0, 0], red)
    torch.testing.assert_close(picture[:, 0, 1], blue)
    torch.testing.assert_close(picture[:, 1, 1], (red + blue) / 2)


@pytest.mark.parametrize(("split", "unseen"), [("train", False), ("test", True)])
def test_real_pictures_are_read_as_their_captions(split: object, unseen: bool) -> None:
    pictures, c = draw_pictures(400, split, unseen, seeded())  # type: ignore[arg-type]
    assert bool((held_out()[c] == unseen).all())
    reader = ColouredDigitReader()
    _, ink, ground = reader.read(as_bytes(pictures))
    assert torch.equal(torch.stack([ink, ground], 1), combinations()[c][:, 1:])
    assert float((reader.classes(as_bytes(pictures)) == c).double().mean()) > 0.95
    assert reader.features(as_bytes(pictures)).shape == (400, 70)


def test_another_ink_is_another_caption() -> None:
    pictures, c = draw_pictures(50, "train", False, seeded())
    _, ink, ground = combinations()[c].T
    reader = ColouredDigitReader()
    covers, _, _ = reader.read(as_bytes(pictures))
    other = (ground + 1) % len(COLOURS)
    other = torch.where(other == ink, (ground + 2) % len(COLOURS), other)
    repainted = render(torch.nn.functional.interpolate(covers, scale_factor=2.0), other, ground)
    shown = combinations()[reader.classes(as_bytes(repainted))]
    assert torch.equal(shown[:, 1:], torch.stack([other, ground], 1))


@pytest.fixture(scope="module")
def barely_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline after two gradient steps."""
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_coloured_digits, "NUM_LATENTS", 16)
        return train_coloured_digits.train(tmp_path_factory.mktemp("coloured"), vae_updates=2, updates=2, batch_size=4)


def test_every_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = train_coloured_digits.write_tokenizer(tmp_path)
    lengths = {len(ids) for ids in tokenizer(captions()).input_ids}
    assert lengths == {7}  # five words, start and end


def test_what_training_writes_is_an_expert(barely_trained: Path) -> None:
    expert = ColouredDigits(str(barely_trained))
    check_expert(expert)
    assert sum(path.stat().st_size for path in barely_trained.rglob("*") if path.is_file()) < 10e6
    x_0, c = expert.sample_data(6, seeded())
    again, c_again = expert.sample_data(6, seeded())
    assert torch.equal(x_0, again)
    assert torch.equal(c, c_again)
    assert x_0.shape == (6, 4, 8, 8)
    assert not held_out()[c].any()
    assert not held_out()[expert.sample_condition(200, seeded())].any()
    unseen = ColouredDigits(str(barely_trained), unseen=True)
    assert held_out()[unseen.sample_condition(200, seeded())].all()
    assert held_out()[unseen.reference_data(6)[1]].all()
    assert expert.captions(c) == [captions()[i] for i in c]


def test_caption_agreement_is_the_judges_accuracy(barely_trained: Path) -> None:
    expert = ColouredDigits(str(barely_trained))
    evaluator = Evaluator(ExpertPolicy(expert), TimeGrid(expert.schedule, 2), Evaluation(n=12, n_paths=4, n_action=2))
    assert evaluator.describe()["extractor"] == "fd_coloured_digits"
    assert 0 <= evaluator.score_expert()["accuracy"] < 0.5  # untrained


def test_the_shipped_model_draws_held_out_captions() -> None:
    expert = load_expert("coloured_digits", unseen=True)
    c = held_out().nonzero()[:, 0]
    x_T = torch.randn(len(c), *expert.sample_shape, generator=seeded())
    (x_0,) = unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, 8), x_T, c)[:, -1:].unbind(1)
    pictures = expert.decode(x_0)
    assert pictures is not None
    assert float((ColouredDigitReader().classes(pictures) == c).double().mean()) >= 0.95
    folder = Path(expert.model)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10e6


def test_the_shipped_model_and_a_student_of_it_run_as_their_cards_say(tmp_path: Path) -> None:
    expert = load_expert("coloured_digits")
    shipped = DiffusionPipeline.from_pretrained(expert.model, use_safetensors=True)
    assert shipped("a red seven on blue", num_inference_steps=2, guidance_scale=3.0).images[0].size == (32, 32)
    assert (Path(expert.model) / "README.md").read_text() == train_coloured_digits.CARD

    student, grid = expert.make_student(), TimeGrid(expert.schedule, 4)
    expert.save_student(student, tmp_path, 4)
    c = torch.tensor([3, 200, 559])
    x_T = torch.randn(3, *expert.sample_shape, generator=seeded())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    theirs = pipeline(expert.captions(c), num_inference_steps=4, guidance_scale=1.0, latents=x_T, output_type="latent").images
    torch.testing.assert_close(theirs, unroll(StudentPolicy(student, expert), grid, x_T, c)[:, -1], atol=1e-4, rtol=0)
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "MNIST digits in two of 8 colours, with 504 captions" in card
