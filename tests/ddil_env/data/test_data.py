"""Training on one's own pictures, on pipelines of random weights: sources become caches, and caches all that the learners read."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import write_tiny_ddpm, write_tiny_dit, write_tiny_sd3, write_tiny_sdxl
from tiny_sd import write_tiny_sd

from ddil_agents import dagger
from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.checks import check_command_line
from ddil_agents.commands.parse import parse
from ddil_agents.training.metrics import read_metrics
from ddil_env import NoDataError, check_expert, load_expert
from ddil_env.data.pairs import Pairs
from ddil_env.data.pictures import load_picture
from ddil_env.data.sources import read_pairs
from ddil_env.data.webdataset import expand
from ddil_env.experts.ddpm import DDPM
from ddil_env.experts.dit import ClassConditionalDiT
from ddil_env.experts.stable_diffusion import StableDiffusion
from ddil_env.experts.stable_diffusion_3 import StableDiffusion3
from ddil_env.experts.stable_diffusion_xl import StableDiffusionXL
from ddil_env.pipelines.prompts import Embeddings, MappedEmbeddings
from ddil_env.presets import config_dir

WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["ddil_agents.dagger", "ddil_env.experts.stable_diffusion", "pytest"])

FAMILIES: dict[str, tuple[Callable[..., Path], Callable[..., Any]]] = {
    "sd15": (write_tiny_sd, StableDiffusion),
    "sdxl": (write_tiny_sdxl, StableDiffusionXL),
    "sd3": (partial(write_tiny_sd3, t5=True), StableDiffusion3),
}


SD = ["--env.expert", "ddil_env.experts.stable_diffusion.StableDiffusion"]


def picture(seed: int, size: tuple[int, int] = (20, 18)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_coco(root: Path, n: int = 30) -> Path:
    """COCO's folders, with n pictures."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for i in range(n):
        (root / "train2017" / f"{i:06d}.png").write_bytes(picture(i))
    content = {
        "images": [{"id": i, "file_name": f"{i:06d}.png"} for i in range(n)],
        "annotations": [{"id": 9 * i, "image_id": i, "caption": f"bee number {i}"} for i in range(n)],
    }
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family)) for family, (write, _) in FAMILIES.items()}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and in turn the caches that the tests make of them."""
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def expert(family: str, folders: dict[str, Path], coco: Path, **options: Any) -> Any:
    options = {"data": str(coco), "data_cache": str(coco.parent / f"{family}.pairs"), "held_out": 0.4, "workers": 0, **options}
    return FAMILIES[family][1](str(folders[family]), **options)


def sizes(held_out: float = 0.4) -> list[str]:
    learner = "--num_updates 2 --batch_size 4 --num_steps 2 --teacher_steps 4 --mixed_precision no --collect_size 8 --updates_per_collect 1"
    evaluator = "--evaluate.n 10 --evaluate.n_paths 4 --evaluate.n_action 2 --thresholding.kind expert --guidance_scale 2"
    return f"{learner} {evaluator} --env.held_out {held_out} --env.workers 0".split()


def expert_path(family: str) -> str:
    """The expert without the settings that presets of its env's name have."""
    cls = FAMILIES[family][1]
    return f"{cls.__module__}.{cls.__qualname__}"


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        dagger.main(argv)
    assert error.value.code == 2
    return capsys.readouterr().err


# What an expert makes of data


def test_an_expert_with_data_conforms(family: str, folders: dict[str, Path], coco: Path) -> None:
    check_expert(expert(family, folders, coco))


def test_cached_latents_are_the_encoded_pictures(family: str, folders: dict[str, Path], coco: Path) -> None:
    teacher = expert(family, folders, coco)
    source = read_pairs(coco)
    assert teacher.num_conditions == teacher.null_condition == len(source.pairs) == 30
    expected = teacher.encode(torch.stack([load_picture(pair.read(), 16, 16) for pair in source.pairs]))
    torch.testing.assert_close(teacher.pairs.latents(torch.arange(30)), expected)
    x_0, c = teacher.sample_data(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x_0, expected[c])
    assert teacher.captions(c) == [source.pairs[i].caption for i in c]


def test_cached_embeddings_are_the_embedders_and_the_last_row_is_the_null_conditions(
    family: str, folders: dict[str, Path], coco: Path
) -> None:
    teacher = expert(family, folders, coco)
    expected = teacher.embedder()([*teacher.captions(torch.arange(30)), ""])
    ids = torch.tensor([3, 30, 3, 0])
    for rows in (teacher.embeddings.rows(ids, 4), MappedEmbeddings(teacher.pairs, teacher.device).rows(ids, 4)):
        assert rows.keys() == expected.keys()
        for name, table in expected.items():
            torch.testing.assert_close(rows[name], table[ids])
    for name, row in teacher.embeddings.rows(None, 2).items():
        torch.testing.assert_close(row, expected[name][[30, 30]])


def test_embeddings_on_the_disk_give_the_same_predictions_bit_for_bit(
    family: str, folders: dict[str, Path], coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = expert(family, folders, coco)
    monkeypatch.setattr(FAMILIES[family][1], "embeddings_on_device", 0)
    on_disk = expert(family, folders, coco)
    assert (type(on_device.embeddings), type(on_disk.embeddings)) == (Embeddings, MappedEmbeddings)
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 999.0])
    for c in (torch.tensor([4, 4, 0]), torch.tensor([29, 1, 4]), None):
        ours, theirs = on_disk.predict(x_t, t, c), on_device.predict(x_t, t, c)
        assert torch.equal(ours.x_0, theirs.x_0)
        if c is not None:
            assert torch.equal(on_disk.guided(x_t, t, c, 3.0).eps, on_device.guided(x_t, t, c, 3.0).eps)


def test_a_batch_is_looked_up_once_for_all_who_ask_and_anew_when_it_was_changed(
    folders: dict[str, Path], coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "embeddings_on_device", 0)
    teacher = expert("sd15", folders, coco)
    student = teacher.make_student()
    assert student.network.embeddings is teacher.embeddings
    reads = []
    read = Pairs.embeddings
    monkeypatch.setattr(Pairs, "embeddings", lambda self, ids: reads.append(ids.tolist()) or read(self, ids))
    x_t, t, c = torch.randn(3, 4, 8, 8), torch.full((3,), 500.0), torch.tensor([4, 2, 4])
    teacher.predict(x_t, t, c)
    student.predict(x_t, t, c)
    assert reads == [[2, 4]]
    c += 1
    student.predict(x_t, t, c)
    assert reads == [[2, 4], [3, 5]]
    for _ in range(3):  # the steps of a guided label, with the null condition
        teacher.guided(x_t, t, c, 3.0)
    assert reads == [[2, 4], [3, 5], [3, 5, len(teacher.pairs)]]
    c += 1
    teacher.guided(x_t, t, c, 3.0)
    assert reads[-1] == [4, 6, len(teacher.pairs)]


def test_held_out_pairs_are_never_drawn_and_their_captions_neither(folders: dict[str, Path], coco: Path) -> None:
    teacher = expert("sd15", folders, coco)
    generator = torch.Generator().manual_seed(0)
    held_out = set(teacher.reference_data(100, held_out=True)[1].tolist())
    training = set(teacher.reference_data(100)[1].tolist())
    assert (len(held_out), len(training), held_out & training) == (12, 18, set())
    assert set(teacher.sample_data(400, generator)[1].tolist()) == training
    assert set(teacher.sample_condition(400, generator).tolist()) == training


def test_another_share_that_is_held_out_is_another_expert(folders: dict[str, Path], coco: Path) -> None:
    one, other = (expert("sd15", folders, coco, held_out=share).identity() for share in (0.2, 0.4))
    assert {name for name in one if one[name] != other[name]} == {"held_out"}
    assert one["held_out"] == 6


def test_without_held_out_pairs_there_is_nothing_to_judge_them_by(folders: dict[str, Path], coco: Path) -> None:
    with pytest.raises(NoDataError, match="is held out"):
        expert("sd15", folders, coco, held_out=0.0).reference_data(3, held_out=True)


def test_without_data_an_expert_has_none(folders: dict[str, Path]) -> None:
    teacher = StableDiffusion(str(folders["sd15"]), ["a bee"])
    for ask in (teacher.sample_data, teacher.reference_data):
        with pytest.raises(NoDataError):
            ask(1)


# Memory


def test_the_vae_and_the_text_encoders_are_gone_once_the_cache_is_made(
    family: str, folders: dict[str, Path], coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddil_env.pipelines.folder import PipelineFolder

    alive: dict[str, Any] = {}
    load = PipelineFolder.load

    def watched(self: PipelineFolder, name: str, *dtype: torch.dtype) -> Any:
        model = load(self, name, *dtype)
        alive[name] = weakref.ref(model)
        return model

    monkeypatch.setattr(PipelineFolder, "load", watched)
    teacher = expert(family, folders, coco, data_cache=str(tmp_path / "cache"))
    gc.collect()
    assert {"vae", "text_encoder"} <= alive.keys() == set(teacher.files.models)
    assert [name for name, model in alive.items() if model() is not None] == [teacher.denoiser]
    alive.clear()
    again = expert(family, folders, coco, data_cache=str(tmp_path / "cache"))
    assert set(alive) == {teacher.denoiser}
    again.decode(torch.zeros(1, 4, 8, 8))
    assert set(alive) == {teacher.denoiser, "vae"}


# Caches


def test_a_cache_is_data_without_its_pictures(folders: dict[str, Path], tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco", 6)
    one = expert("sd15", folders, coco, data_cache=None)
    assert one.pairs.folder == tmp_path / "coco.pairs"
    shutil.rmtree(coco)
    two = expert("sd15", folders, coco.with_name("coco.pairs"), data_cache=None)
    assert torch.equal(one.reference_data(9)[0], two.reference_data(9)[0])
    with pytest.raises(
        ValueError, match=r"data_cache='x': these belong to data of pictures, and data=.* is a cache of them; leave them out"
    ):
        expert("sd15", folders, coco.with_name("coco.pairs"), data_cache="x")


def test_a_cache_of_another_model_size_or_dtype_is_refused_with_both_named(folders: dict[str, Path], coco: Path, tmp_path: Path) -> None:
    cache = expert("sd15", folders, coco, data_cache=str(tmp_path / "cache")).pairs.folder
    other = write_tiny_sd(tmp_path / "other", seed=1)
    named = r"StableDiffusionPipeline 16x16 float32 [0-9a-f]{16}'.* here 'StableDiffusionPipeline "
    for options, ours in (
        ({"model": str(other)}, "16x16 float32"),
        ({"height": 24}, "24x16 float32"),
        ({"dtype": "bfloat16"}, "16x16 bfloat16"),
    ):
        given = {"model": str(folders["sd15"]), "held_out": 0.4, "workers": 0, **options}
        with pytest.raises(ValueError, match=rf"cache of another model: '{named}{ours}"):
            StableDiffusion(**given, data=str(coco), data_cache=str(cache))
        with pytest.raises(ValueError, match=rf"of the model '{named}{ours}"):
            StableDiffusion(**given, data=str(cache))


def test_fine_tunes_share_their_models_cache(folders: dict[str, Path], coco: Path, tmp_path: Path) -> None:
    teacher = expert("sd15", folders, coco)
    tuned = shutil.copytree(folders["sd15"], tmp_path / "tuned")
    other = write_tiny_sd(tmp_path / "other", seed=1)
    shutil.copytree(other / "unet", tuned / "unet", dirs_exist_ok=True)
    ours = StableDiffusion(str(tuned), data=str(teacher.pairs.folder))
    assert ours.fingerprint() == teacher.fingerprint()
    assert not torch.equal(ours.network.unet.conv_in.weight, teacher.network.unet.conv_in.weight)


def test_what_an_empty_prompt_becomes_is_part_of_sdxls_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    zeros = StableDiffusionXL(str(folders["sdxl"]), ["a bee"]).fingerprint()
    encoded = StableDiffusionXL(str(write_tiny_sdxl(tmp_path, force_zeros=False)), ["a bee"]).fingerprint()
    assert zeros == f"{encoded} zero null"


def test_half_precision_keeps_latents_in_float16_and_embeddings_in_its_own(folders: dict[str, Path], coco: Path, tmp_path: Path) -> None:
    teacher = expert("sd15", folders, coco, dtype="bfloat16", data_cache=str(tmp_path / "cache"))
    ids = torch.arange(3)
    assert teacher.pairs.latents(ids).dtype == torch.float16
    assert teacher.pairs.embeddings(ids)["text"].dtype == torch.bfloat16
    assert teacher.sample_data(2)[0].dtype == torch.float32


def test_broken_pictures_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco", 20)
    (coco / "train2017" / "000007.png").write_bytes(picture(7)[:-40])
    with pytest.warns(UserWarning, match=r"19 pairs kept, 1 left out, 1 for broken pictures.*000007\.png"):
        assert expert("sd15", folders, coco, data_cache=None).num_conditions == 19
    for path in sorted((coco / "train2017").iterdir())[:5]:
        path.write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"cannot be read.*000000\.png \(no picture"):
        expert("sd15", folders, coco, data_cache=str(tmp_path / "another"))


def test_flags_that_do_not_go_together_are_refused(folders: dict[str, Path], coco: Path) -> None:
    for options, message in (
        ({"prompts": "p.txt"}, r"data='.*coco' and prompts='p\.txt': the captions of the data are the prompts; leave one"),
        ({"prompts": ["a", "b"]}, r"prompts=a list of 2: the captions"),
        ({"data": None}, r"data_cache='.*': these belong to data of pictures, and data=None is not given"),
        ({"data": None, "data_cache": None, "images": "there"}, r"images='there': these belong"),
        ({"data": "x/{00..10}.tar", "data_cache": None}, r"matches several files; set --env.data_cache"),
        ({"data": "/nowhere/coco"}, r"'/nowhere/coco' is no source of pictures and captions"),
    ):
        with pytest.raises(ValueError, match=message):
            expert("sd15", folders, coco, **options)


def test_data_that_moved_are_told_with_where_their_new_path_belongs(folders: dict[str, Path], tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco", 6)
    expert("sd15", folders, coco, data_cache=None)
    coco.rename(tmp_path / "moved")
    rule = "write the new path as env.{} into the run's config.yaml, and resume it"
    with pytest.raises(ValueError, match=rf"coco' is no source.*Its cache is there: --data .*coco\.pairs\. If .*{rule.format('data')}"):
        expert("sd15", folders, coco, data_cache=None)
    (tmp_path / "moved" / "train2017").rename(tmp_path / "pictures")
    with pytest.raises(ValueError, match=rf"pass their folder as images\. If a run began before it was moved, {rule.format('images')}"):
        expert("sd15", folders, tmp_path / "moved", images=str(tmp_path / "gone"))


def test_a_folder_whose_name_has_the_marks_of_a_pattern_is_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "bees [16px]", 6)
    assert expert("sd15", folders, coco, data_cache=None).pairs.folder == tmp_path / "bees [16px].pairs"


def test_shards_in_a_folder_with_the_marks_of_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "shards [v1]"
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        (folder / name).touch()
    for pattern in ("*.tar", "{0..1}.tar", "[01].tar"):
        assert expand(str(folder / pattern)) == [folder / "0.tar", folder / "1.tar"]


def encode_in_a_process(model: Path, data: Path, workers: int, queue: Any) -> None:
    made = []
    encode = StableDiffusion.encode
    StableDiffusion.encode = lambda self, pictures: made.append(len(pictures)) or encode(self, pictures)  # type: ignore[method-assign]
    torch.set_num_threads(1)
    teacher = StableDiffusion(str(model), data=str(data), held_out=0.4, workers=workers)
    queue.put((sum(made), teacher.num_conditions))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_begin_together_make_one_cache(folders: dict[str, Path], tmp_path: Path, workers: int) -> None:
    coco, queue = write_coco(tmp_path / "coco", 40), WORKERS.Queue()
    processes = [WORKERS.Process(target=encode_in_a_process, args=(folders["sd15"], coco, workers, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(found) == [(0, 40), (0, 40), (40, 40)]


# Families without texts


def write_classes(root: Path, names: list[str], each: int = 3) -> Path:
    for k, name in enumerate(names):
        (root / name / "more").mkdir(parents=True)
        for i in range(each):
            (root / name / ("more" if i else ".") / f"{i}.png").write_bytes(picture(10 * k + i))
    return root


def test_a_dits_classes_are_the_folders_in_order_or_as_classes_json_says(tmp_path: Path) -> None:
    model = str(write_tiny_dit(tmp_path / "dit", classes=3))
    data = write_classes(tmp_path / "data", ["c", "a", "b"])
    teacher = ClassConditionalDiT(model, data=str(data), held_out=0.3, workers=0)
    check_expert(teacher)
    source = read_pairs_of(data)
    x_0, c = teacher.reference_data(9)
    expected = teacher.encode(torch.stack([load_picture(content, 16, 16) for _, content in source]))
    matches = [int((expected - x).flatten(1).norm(dim=1).argmin()) for x in x_0]
    assert [("a", "b", "c").index(source[i][0]) for i in matches] == c.tolist()
    assert teacher.null_condition == 3
    (data / "classes.json").write_text('{"a": 2, "b": 0, "c": 1}')
    with pytest.warns(UserWarning, match="the data changed since they were cached; 0 pictures and 0 captions were encoded anew"):
        again = ClassConditionalDiT(model, data=str(data), held_out=0.3, workers=0)
    assert again.reference_data(9)[1].tolist() == [(2, 0, 1)[i] for i in c]
    (data / "classes.json").write_text('{"a": 3, "b": 0, "c": 1}')
    with pytest.raises(ValueError, match=r"gives the folder 'a' the class 3; classes are 0 to 2"):
        ClassConditionalDiT(model, data=str(data), workers=0)
    (data / "classes.json").unlink()
    shutil.rmtree(data / "c")
    with pytest.raises(ValueError, match=r"pictures in 2 folders, and the model has 3 classes: say in .*classes\.json"):
        ClassConditionalDiT(model, data=str(data), workers=0)


def read_pairs_of(root: Path) -> list[tuple[str, bytes]]:
    return [(path.relative_to(root).parts[0], path.read_bytes()) for path in sorted(root.rglob("*.png"))]


def test_a_ddpms_data_are_pictures_in_pixels(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", ["x"], 8)
    teacher = DDPM(str(write_tiny_ddpm(tmp_path / "ddpm")), data=str(data), held_out=0.25, workers=0)
    check_expert(teacher)
    x_0, c = teacher.reference_data(9)
    assert (x_0.shape, c) == ((6, 3, 8, 8), None)
    pictures = [load_picture(content, 8, 8) for _, content in read_pairs_of(data)]
    assert all(any(torch.equal(seen, theirs) for theirs in pictures) for seen in teacher.decode(x_0))
    with pytest.raises(ValueError, match="with 3 channels, and this UNet has 1; leave data out"):
        DDPM(str(write_tiny_ddpm(tmp_path / "grey", in_channels=1, out_channels=1)), data=str(data))


# Commands


def test_the_command_trains_on_a_familys_own_data(
    family: str, folders: dict[str, Path], coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = coco.parent / f"{family}.pairs"
    env = ["--env.expert", expert_path(family), "--env.model", str(folders[family]), "--data", str(coco), "--env.data_cache", str(cache)]
    dagger.main([*env, *sizes(), "--beta.forward", ".5", "--beta.teacher", "0", "--beta.student", ".5", "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["env_config"]["data"] == str(coco)
    assert result["settings"]["extractor"] == "latent_pool8"
    assert result["floors"]["training_data"]["n"] == 10
    assert result["floors"]["training_data"]["frechet"] > 0
    assert result["models"]["dagger@2"]["frechet"] > 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 2
    assert "cache" not in capsys.readouterr().out


def test_data_are_an_expert_of_an_env_file(folders: dict[str, Path], coco: Path, tmp_path: Path) -> None:
    env = {"expert": "ddil_env.experts.stable_diffusion.StableDiffusion", "model": str(folders["sd15"]), "data": str(coco)}
    env |= {"data_cache": str(coco.parent / "sd15.pairs"), "held_out": 0.4}
    (tmp_path / "mine.yaml").write_text(json.dumps(env))
    assert load_expert(str(tmp_path / "mine.yaml")).num_conditions == 30
    made, _, _ = check_command_line(dagger.Dagger, ["--env", str(tmp_path / "mine.yaml"), *sizes()])  # as compare does
    assert made.num_conditions == 30


def test_data_is_a_flag_of_experts_that_take_some(
    folders: dict[str, Path], coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(["--env", "digits8", "--data", str(coco)], capsys)
    assert f"--data {coco}: ddil_env.experts.digits.Digits takes no data; leave it out" in error
    env = [*SD, "--env.model", str(folders["sd15"]), "--data"]
    assert "and prompts='p.txt'" in refused([*env, str(coco), "--env.prompts", "p.txt"], capsys)
    assert "--data is given more than once" in refused([*env, str(coco), "--data", "x"], capsys)
    out = tmp_path / "run"
    assert "'/nowhere' is no source" in refused([*env, "/nowhere", "--out", str(out)], capsys)
    assert "3 held-out samples to compare with; the metrics need 10" in refused([*env, str(coco), *sizes(0.1), "--out", str(out)], capsys)
    assert not out.exists()


def test_a_run_without_held_out_data_has_no_floor(folders: dict[str, Path], coco: Path, tmp_path: Path) -> None:
    env = [*SD, "--env.model", str(folders["sd15"]), "--data", str(coco), "--env.data_cache", str(coco.parent / "sd15.pairs")]
    dagger.main([*env, *sizes(0), "--beta.forward", "1", "--beta.teacher", "0", "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "training_data" not in result["floors"]
    assert result["models"]["dagger@2"]["frechet"] > 0


def command(argv: list[str], fatal_update: int | None) -> None:
    from ddil_agents.training.trainer import Trainer

    torch.set_num_threads(1)
    updates, update = [0], Trainer.update

    def counted(self: Any, *args: Any) -> Any:
        updates[0] += 1
        if updates[0] == fatal_update:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *args)

    Trainer.update = counted  # type: ignore[method-assign]
    with open(os.devnull, "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        dagger.main(argv)


def test_a_killed_run_on_data_goes_on_to_the_same_weights(folders: dict[str, Path], coco: Path, tmp_path: Path) -> None:
    env = [*SD, "--env.model", str(folders["sd15"]), "--data", str(coco), "--env.data_cache", str(coco.parent / "sd15.pairs")]
    flags = [*env, *sizes(), "--beta.forward", "1", "--beta.teacher", "0", "--num_updates", "4", "--checkpoint_every", "2"]
    runs = {"whole": (None, 0), "killed": (4, -signal.SIGKILL)}
    for name, (fatal, code) in runs.items():
        process = WORKERS.Process(target=command, args=([*flags, "--out", str(tmp_path / name)], fatal))
        process.start()
        process.join(200)
        assert process.exitcode == code
    assert not (tmp_path / "killed" / "result.json").exists()
    process = WORKERS.Process(target=command, args=(["--resume", str(tmp_path / "killed")], None))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    ours, theirs = (load_file(tmp_path / name / "student" / "unet" / "diffusion_pytorch_model.safetensors") for name in runs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_data_put_forward_states_into_the_papers_run(folders: dict[str, Path], coco: Path) -> None:
    env = ["--env", "sd15", "--env.model", str(folders["sd15"])]
    for given in (["--data", str(coco)], [f"--env.data={coco}"], ["--env.data", str(coco)]):
        _, cfg = parse(dagger.Dagger, [*env, "--config", "paper", *given])
        shares = [stage.get("beta", vars(cfg.beta))["forward"] for stage in cfg.stages]
        assert shares == [1, 1, 1, 1, 0.5, 1, 0.5, 1, 0.5]
        assert (cfg.thresholding.calibrate_on, cfg.thresholding.kind, cfg.batch_size) == ("data", "quantile", 224)
        _, cfg = parse(dagger.Dagger, [*env, *given])
        assert (cfg.beta.forward, cfg.beta.teacher, cfg.beta.student, cfg.thresholding.calibrate_on) == (0.5, 0.1, 0.4, "data")
    for config in ([], ["--config", "paper"]):
        _, cfg = parse(dagger.Dagger, [*env, *config])
        assert (cfg.beta.forward, cfg.thresholding.calibrate_on) == (0, "teacher")
    _, cfg = parse(dagger.Dagger, [*env, "--data", str(coco), "--beta.forward", ".7"])
    assert cfg.beta.forward == 0.7


@pytest.mark.parametrize("path", sorted(config_dir().glob("*/data/*.yaml")), ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_preset_for_data_differs_from_one_without(path: Path, folders: dict[str, Path], coco: Path) -> None:
    assert (path.parents[1] / path.name).is_file()
    agent = find_agent(path.parts[-3])
    env = "ssd1b" if path.stem.endswith("ssd1b") else "sd15"
    model = folders["sdxl" if env == "ssd1b" else env]
    argv = ["--env", env, "--env.model", str(model), "--data", str(coco), "--env.held_out", ".4"]
    argv += [] if path.stem == "text_to_image" else ["--config", path.stem]
    argv += ["--env.data_cache", str(coco.parent / f"{path.parts[-3]}-{path.stem}.pairs"), "--mixed_precision", "no"]
    teacher, _, _ = check_command_line(agent, [*argv, "--evaluate.n", "12", "--thresholding.samples", "8"])
    assert teacher.num_conditions == 30
