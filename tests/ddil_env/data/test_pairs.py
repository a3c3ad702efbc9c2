"""Sources of pictures with captions, and their cache of latents and embeddings, with arithmetic in the place of networks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import die
from pictures import jpeg, write_coco, write_folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ddil_agents.evaluation.metrics.pictures import resize
from ddil_env.data.cache import cache_pairs
from ddil_env.data.hashes import hash_picture
from ddil_env.data.pairs import Pairs
from ddil_env.data.pictures import load_picture
from ddil_env.data.sources import read_pairs

SIZES = {"height": 12, "width": 8}
SETTINGS = {"model": "fake-1", "batch_size": 2, "shard_size": 4, "workers": 0, **SIZES}
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["ddil_env.data.cache", "ddil_agents.evaluation.metrics.pictures", "pytest"])


def encode(pictures):
    assert pictures.dtype == torch.uint8
    assert pictures.shape[1:] == (12, 8, 3)
    return pictures.permute(0, 3, 1, 2)[:, :, ::4, ::4].float().half() / 127.5 - 1  # (b, 12, 8, 3) → (b, 3, 3, 2)


def embed(captions):
    text = torch.tensor([[len(caption), sum(caption.encode())] for caption in captions], dtype=torch.bfloat16)
    return {"text": text[:, None].repeat(1, 5, 1), "pooled": text.float()}  # (b, 5, 2), (b, 2)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def cache(source, out, **changes):
    return cache_pairs(read_pairs(source), out, encode, embed, **{**SETTINGS, **changes})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "stamps.json"}  # it holds times


# Pictures


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (33, 33)])
def test_a_square_is_cut_and_resized_as_those_that_samples_are_judged_by(size):
    content = jpeg(size=size, format="PNG")
    expected = resize(torch.from_numpy(np.array(Image.open(BytesIO(content))))[None], 16)[0]
    assert torch.equal(load_picture(content, 16, 16), expected)


def test_a_picture_is_cut_to_the_middle_box_of_the_shape_asked_for():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 5:25] = 200  # the middle 20 × 10 of 30 × 10
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    picture = load_picture(content.getvalue(), 5, 10)
    assert picture.shape == (5, 10, 3)
    assert (picture == 200).all()


def test_a_picture_is_turned_as_its_exif_says():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half white
    for orientation, bright in {1: np.s_[:, :4], 3: np.s_[:, 4:], 6: np.s_[:4], 8: np.s_[4:]}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = BytesIO()
        Image.fromarray(pixels).save(content, "PNG", exif=exif)
        expected = torch.zeros(8, 8, 3, dtype=torch.uint8)
        expected[bright] = 255
        assert torch.equal(load_picture(content.getvalue(), 8, 8), expected), orientation


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_mode_of_8_bits_becomes_rgb(mode):
    content = BytesIO()
    Image.new(mode, (9, 9)).save(content, "JPEG" if mode == "CMYK" else "PNG")
    assert load_picture(content.getvalue(), 4, 4).shape == (4, 4, 3)


def bomb():
    """A PNG whose header says 20000 × 20000."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + jpeg(format="PNG")[33:]


def deep():
    content = BytesIO()
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(content, "PNG")
    return content.getvalue()


BROKEN = {
    "truncated": (jpeg()[:-60], "truncated"),
    "text": (b"<html>404</html>", "no picture"),
    "empty": (b"", "no picture"),
    "bomb": (bomb(), "DecompressionBomb"),
    "deep": (deep(), "more than 8 bits"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no picture"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_left_out_counted_and_named(tmp_path, folder, workers):
    for name, (content, _) in BROKEN.items():
        (folder / f"{name}.jpg").write_bytes(content)
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "uncaptioned.jpg").write_bytes(jpeg())
    (folder / "latin.jpg").write_bytes(jpeg())
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"11 pairs kept, 8 left out, 6 for broken pictures.*latin\.jpg.*skipped\.txt"):
        pairs = Pairs(cache(folder, tmp_path / "cache", workers=workers, max_broken=0.5))
    assert len(pairs) == 11
    assert all(text.startswith("picture number") for text in pairs.captions(torch.arange(11)))
    skipped = dict(line.split("\t") for line in (pairs.folder / "skipped.txt").read_text().splitlines())
    assert {name: why in skipped[f"{name}.jpg"] for name, (_, why) in BROKEN.items()} == dict.fromkeys(BROKEN, True)
    assert all("no caption" in skipped[name] for name in ("uncaptioned.jpg", "latin.jpg"))


def test_too_many_broken_pictures_are_an_error_with_their_names(tmp_path, folder):
    for path in sorted(folder.rglob("*.jpg"))[:2]:
        path.write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"of 11 pictures 2 so far cannot be read, more than max_broken=0\.1.*part0/000\.jpg"):
        cache(folder, tmp_path / "cache")
    assert "part0/002.jpg" in (tmp_path / "cache" / "skipped.txt").read_text()
    with pytest.warns(UserWarning, match="9 pairs kept, 2 left out"):
        assert len(Pairs(cache(folder, tmp_path / "cache", max_broken=0.2))) == 9


def test_a_stretch_of_broken_pictures_alone_is_a_shard_of_none(tmp_path, folder):
    for path in sorted(folder.rglob("*.jpg"))[4:8]:
        path.write_bytes(b"gone")
    with pytest.warns(UserWarning, match="7 pairs kept"):
        pairs = Pairs(cache(folder, tmp_path / "cache", max_broken=0.5))
    assert pairs.captions(torch.tensor([3, 4, 7])) == ["picture number 6, é", "picture number 5, é", ""]
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"gone")
    with pytest.raises(ValueError, match="of 11 pictures 11 so far"):
        cache(folder, tmp_path / "none", max_broken=1)


# Sources
def test_a_picture_that_coco_names_and_is_not_there_is_left_out(tmp_path):
    write_coco(tmp_path / "coco")
    (tmp_path / "coco" / "train2017" / "000005.jpg").unlink()
    with pytest.warns(UserWarning, match=r"2 pairs kept, 1 left out.*000005\.jpg \(FileNotFoundError"):
        cache(tmp_path / "coco", tmp_path / "cache", max_broken=0.5)


# The cache


def test_a_cache_holds_what_encode_and_embed_gave_in_the_order_of_the_source(tmp_path, folder):
    source = read_pairs(folder)
    pairs = Pairs(cache(folder, tmp_path / "cache"), "fake-1")
    assert len(pairs) == 11
    assert pairs.sample_shape == (3, 3, 2)
    assert pairs.tables == ["pooled", "text"]
    expected = encode(torch.stack([load_picture(pair.read(), **SIZES) for pair in source.pairs]))
    ids = torch.tensor([10, 0, 4, 3, 4])
    assert torch.equal(pairs.latents(ids), expected[ids])
    assert pairs.latents(ids).dtype == torch.float16
    captions = [source.pairs[i].caption for i in ids]
    assert pairs.captions(ids) == captions
    for name, table in embed(captions).items():
        assert torch.equal(pairs.embeddings(ids)[name], table)


def test_the_id_after_the_last_is_the_null_condition(tmp_path, folder):
    pairs = Pairs(cache(folder, tmp_path / "cache"))
    null = torch.tensor([len(pairs)])
    assert pairs.captions(null) == [""]
    assert torch.equal(pairs.embeddings(null)["text"], embed([""])["text"])
    for read, ids in ((pairs.latents, null), (pairs.embeddings, null + 1), (pairs.captions, torch.tensor([0, -1]))):
        with pytest.raises(ValueError, match=r"ids from -?\d+ to \d+: .* has 0 to 1\d here"):
            read(ids)


def test_any_number_of_workers_and_a_second_run_make_the_same_bytes(tmp_path, folder):
    one = contents(cache(folder, tmp_path / "1" / "cache"))
    assert sorted(one) == ["null.safetensors", *(f"pairs-0000{k}.safetensors" for k in range(3)), "pairs.json", "skipped.txt"]
    for workers in (1, 2):
        assert contents(cache(folder, tmp_path / str(workers) / "x", workers=workers)) == one


def test_a_finished_cache_is_not_touched_and_may_be_read_only(tmp_path, folder, monkeypatch):
    cache(folder, tmp_path / "cache")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("written"))
    cache_pairs(read_pairs(folder), tmp_path / "cache", lambda _: pytest.fail("encoded"), lambda _: pytest.fail("embedded"), **SETTINGS)


def test_a_moved_source_is_the_same_and_a_changed_one_is_another(tmp_path, folder):
    cache(folder, tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    cache(moved, tmp_path / "cache")
    (moved / "part0" / "000.txt").write_text("another caption")
    with pytest.warns(UserWarning, match=r"the data changed since they were cached; 0 pictures and 1 captions were encoded anew"):
        cache(moved, tmp_path / "cache")
    assert Pairs(tmp_path / "cache", held_out=0).captions(torch.tensor([0])) == ["another caption"]


@pytest.mark.parametrize("change", [{"model": "fake-2"}, {"height": 24}, {"width": 4}, {"shard_size": 8}])
def test_a_cache_of_another_model_or_size_is_refused_with_both_named(tmp_path, folder, change):
    cache(folder, tmp_path / "cache")
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"another {key}: {SETTINGS[key]!r}, here {value!r}.*pass another folder"):
        cache(folder, tmp_path / "cache", **change)
    with pytest.raises(ValueError, match=r"of the model 'fake-1', here 'fake-2'"):
        Pairs(tmp_path / "cache", "fake-2")


def test_a_folder_with_something_else_is_not_written_into(tmp_path, folder):
    with pytest.raises(ValueError, match=r"holds 'part0' and no pairs\.json"):
        cache(folder, folder)
    with pytest.raises(ValueError, match=r"is no cache of pairs"):
        Pairs(folder)


@pytest.mark.parametrize(
    ("owner", "fault", "message"),
    [
        ("encode", lambda x: encode(x)[:1], r"1 rows of latents for 2 pairs"),
        ("encode", lambda x: encode(x) / 0, r"NaN or infinite latents of 2 pairs, the first 'part0/000\.jpg'; compute in float32"),
        ("embed", lambda x: {"text": torch.ones(len(x), 3).double()}, r"embeddings\.text is torch\.float64; a cache keeps F32, F16"),
        ("embed", lambda x: {"text": torch.full((len(x), 3), torch.nan)}, r"NaN or infinite embeddings\.text of 2 pairs"),
    ],
)
def test_a_missing_row_an_unknown_dtype_or_a_nan_is_never_kept(tmp_path, folder, owner, fault, message):
    with pytest.raises(ValueError, match=message):
        cache_pairs(read_pairs(folder), tmp_path / "cache", **{"encode": encode, "embed": embed, owner: fault}, **SETTINGS)
    with pytest.raises(ValueError, match=r"is not finished .*11 pairs.*run its caching again"):
        Pairs(tmp_path / "cache")


# Faults


def killed(moment, source, out, workers):
    """Caches, and is killed at a moment of the second shard."""
    calls = {"encode": 0, "shards": 0}

    def counted_encode(pictures):
        calls["encode"] += 1
        if moment == "middle of a shard" and calls["encode"] == 4:
            die()
        return encode(pictures)

    def counted_replace(partial, path, replace=os.replace):
        second = Path(path).name == "pairs-00001.safetensors"
        if second and moment == "half-written":
            os.truncate(partial, os.path.getsize(partial) // 2)
        if second and moment in ("half-written", "before renaming"):
            die()
        if moment == "finishing" and Path(path).name == "pairs.json" and (Path(out) / "skipped.txt").exists():
            die()
        replace(partial, path)
        if second and moment == "between shards":
            die()

    os.replace = counted_replace
    cache_pairs(read_pairs(source), out, counted_encode, embed, **{**SETTINGS, "workers": workers})


MOMENTS = ["middle of a shard", "half-written", "before renaming", "between shards", "finishing"]


@pytest.mark.parametrize(("moment", "workers"), [*((moment, 0) for moment in MOMENTS), ("middle of a shard", 2)])
def test_caching_that_is_killed_goes_on_to_the_same_bytes(tmp_path, folder, moment, workers):
    (folder / "part1" / "005.jpg").write_bytes(b"broken")
    out = tmp_path / "cache"
    process = SPAWN.Process(target=killed, args=(moment, folder, out, workers))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not finished"):
        Pairs(out)
    before = contents(out)
    encoded = []

    def counted(pictures):
        encoded.append(len(pictures))
        return encode(pictures)

    with pytest.warns(UserWarning, match="10 pairs kept"):
        cache_pairs(read_pairs(folder), out, counted, embed, **SETTINGS)
    assert sum(encoded) == {"between shards": 2, "finishing": 0}.get(moment, 6)
    with pytest.warns(UserWarning, match="1 left out"):
        whole = contents(cache(folder, tmp_path / "whole"))
    assert contents(out) == whole
    assert {name: content for name, content in before.items() if name.startswith("pairs-")}.items() <= whole.items()


@pytest.mark.parametrize("how", ["cut", "longer", "header", "shape", "zeros", "pickle", "empty", "lost", "another's"])
@pytest.mark.parametrize("name", ["pairs-00001.safetensors", "null.safetensors"])
def test_a_corrupt_shard_is_named_and_deleting_it_mends_the_cache(tmp_path, folder, how, name):
    out = cache(folder, tmp_path / "cache")
    whole = contents(out)
    damage = {
        "cut": whole[name][:-1],
        "header": whole[name][:12] + b"\xff" + whole[name][13:],
        "longer": whole[name] + b"x",
        "shape": whole[name].replace(b'"shape":[', b'"shape":[9', 1)[: len(whole[name])],
        "empty": b"",
        "zeros": bytes(len(whole[name])),
        "pickle": b"\x80\x04cposix\nsystem\n.",
        "another's": whole["pairs-00002.safetensors"],
    }
    (out / name).unlink() if how == "lost" else (out / name).write_bytes(damage[how])
    with pytest.raises(ValueError, match=rf"{name} .*delete it and cache again"):
        Pairs(out)
    if how not in ("lost", "another's") and name != "null.safetensors":
        with pytest.raises(ValueError, match=rf"{name} .*delete it and cache again"):
            cache(folder, out)
    (out / name).unlink(missing_ok=True)
    assert contents(cache(folder, out)) == whole


@pytest.mark.parametrize("content", ["", "[]", '{"identity": 3, "source": ""}', '{"source": "x"}'])
def test_a_damaged_manifest_is_named(tmp_path, folder, content):
    out = cache(folder, tmp_path / "cache")
    (out / "pairs.json").write_text(content)
    for read in (Pairs, lambda out: cache(folder, out)):
        with pytest.raises(ValueError, match=r"pairs\.json is damaged .*delete"):
            read(out)


def test_a_full_disk_leaves_whole_shards_and_says_how_to_go_on(tmp_path, folder, monkeypatch):
    out, fsync, full = tmp_path / "cache", os.fsync, []

    def no_space(descriptor):
        full.append(descriptor)
        if len(full) == 3:  # the manifest, the first shard, the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=r"cannot write .*pairs-00001\.safetensors: No space left on device\. Make room") as error:
            cache(folder, out)
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in out.iterdir()) == ["pairs-00000.safetensors", "pairs.json"]
    cache(folder, out)
    assert contents(out) == contents(cache(folder, tmp_path / "whole"))


def test_no_file_of_a_cache_is_a_pickle(tmp_path, folder):
    for path in cache(folder, tmp_path / "cache").iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"skipped": "[]"}
        else:
            assert path.suffix in (".json", ".txt")
            path.read_text(encoding="utf-8")


def test_a_cache_made_elsewhere_with_the_documented_files_opens(tmp_path):
    def tensors(n, captions):
        texts = [caption.encode() for caption in captions]
        ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        return {
            "embeddings.text": torch.rand(n, 2, 3),
            "captions": torch.frombuffer(bytearray(b"".join(texts) or b" "), dtype=torch.uint8),
        } | {"captions.ends": ends}

    shard = {"latents": torch.rand(3, 4, 2, 2), "pictures": torch.arange(3, dtype=torch.uint8)[:, None], **tensors(3, ["a", "bé", "c d"])}
    save_file(shard, tmp_path / "pairs-00000.safetensors", {"skipped": "[]"})
    save_file(tensors(1, [""]), tmp_path / "null.safetensors", {"skipped": "[]"})
    (tmp_path / "pairs.json").write_text(json.dumps({"identity": {"model": "theirs"}, "source": "elsewhere", "counts": [3]}))
    pairs = Pairs(tmp_path, "theirs", held_out=0.4)
    assert pairs.captions(torch.arange(4)) == ["a", "bé", "c d", ""]
    assert torch.equal(pairs.latents(torch.arange(3)), shard["latents"])


# Draws


def test_a_generators_state_is_the_position(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    pairs, generator = Pairs(out), torch.Generator().manual_seed(3)
    pairs.draw(5, generator)
    state = generator.get_state()
    x_0, c = pairs.draw(7, generator)
    again = Pairs(out).draw(7, torch.Generator().set_state(state))
    assert x_0.dtype == torch.float32
    assert c.dtype == torch.int64
    assert torch.equal(x_0, again[0])
    assert torch.equal(c, again[1])
    assert torch.equal(x_0, pairs.latents(c).float())


def test_held_out_pairs_are_fixed_by_the_seed_and_never_drawn(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    pairs = Pairs(out, held_out=0.3, seed=1)
    held_out = set(pairs.reference(100, held_out=True)[1].tolist())
    training = set(pairs.reference(100)[1].tolist())
    assert (len(held_out), len(training)) == (3, 8)
    assert held_out | training == set(range(11))
    assert set(pairs.draw(500, torch.Generator().manual_seed(0))[1].tolist()) == training
    assert set(Pairs(out, held_out=0.3, seed=1).reference(100, held_out=True)[1].tolist()) == held_out
    assert set(Pairs(out, held_out=0.3, seed=2).reference(100, held_out=True)[1].tolist()) != held_out
    assert len(pairs.reference(2)[0]) == 2


def test_a_share_that_leaves_none_is_refused(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no pair of .* is held out"):
        Pairs(out, held_out=0).reference(3, held_out=True)
    for share in (1.0, 0.99, -0.1):
        with pytest.raises(ValueError, match=r"held_out=0.99 of 11 pairs leaves none" if share == 0.99 else "need a share of the pairs"):
            Pairs(out, held_out=share)


def write_large(out, shards=50, size=2000, tokens=77, channels=768):
    """A finished cache of zeros that takes no room on the disk: each file is a header and a hole."""
    rows = {
        "captions.ends": ("I64", 8, ()),
        "embeddings.text": ("F16", 2, (tokens, channels)),
        "latents": ("F16", 2, (4, 64, 64)),
        "pictures": ("U8", 1, (32,)),
        "captions": ("U8", 1, ()),
    }
    out.mkdir()
    for k in range(shards + 1):
        n, end, header = size if k < shards else 1, 0, {"__metadata__": {"skipped": "[]"}}
        for name, (dtype, width, shape) in rows.items():
            start, end = end, end + n * width * int(np.prod(shape))
            header[name] = {"dtype": dtype, "shape": [n, *shape], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (out / (f"pairs-{k:05d}.safetensors" if k < shards else "null.safetensors")).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
            file.seek(8 + len(text) + header["pictures"]["data_offsets"][0])
            file.write(b"".join((k * size + i).to_bytes(32) for i in range(n)))
    identity = {"pairs_sha256": "", "model": "fake-1"}
    (out / "pairs.json").write_text(json.dumps({"identity": identity, "source": "zeros", "counts": [size] * shards}))
    return out


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_large(out, queue):
    before = resident()
    pairs = Pairs(out)
    opened = resident() - before
    for seed in range(4):
        _, c = pairs.draw(16, torch.Generator().manual_seed(seed))
        pairs.embeddings(c)
    queue.put((len(pairs), opened, resident() - before))


def test_100_000_pairs_of_stable_diffusions_size_open_without_being_read(tmp_path):
    out = write_large(tmp_path / "cache")
    size = sum(path.stat().st_size for path in out.iterdir())
    assert size > 15e9
    queue = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=open_large, args=(out, queue))
    process.start()
    n, opened, drawn = queue.get()
    process.join(60)
    assert n == 100_000
    assert opened <= drawn < 0.01 * size  # 64 pairs are 10 MB; how much a page fault maps around itself is the kernel's choice


def test_settings_out_of_range_are_refused(tmp_path, folder):
    for change in ({"height": 0}, {"batch_size": 0}, {"workers": -1}, {"max_broken": 1.5}):
        with pytest.raises(ValueError, match=r"sizes are 1 or more"):
            cache(folder, tmp_path / "cache", **change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache(folder, tmp_path / "cache")


# Transparency and content


def encoded(pixels, kind, **options):
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options) if isinstance(pixels, np.ndarray) else pixels.save(content, kind, **options)
    return content.getvalue()


def half_clear():
    """Red of which the right half is transparent, and green under it."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = 255, 0, 0, 255
    pixels[:, 4:] = 0, 255, 0, 0
    return pixels


def palette():
    picture = Image.fromarray(np.repeat(np.array([[0] * 4 + [1] * 4], np.uint8), 8, 0), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0])
    return picture


@pytest.mark.parametrize(
    "content",
    [
        encoded(half_clear(), "PNG"),
        encoded(half_clear(), "TIFF"),
        encoded(half_clear(), "WEBP", lossless=True, exact=True),
        encoded(palette(), "PNG", transparency=1),
        encoded(palette(), "GIF", transparency=1),
        encoded(half_clear()[..., :3], "PNG", transparency=(0, 255, 0)),
    ],
    ids=["rgba", "tiff", "webp", "palette", "gif", "one colour"],
)
def test_what_is_transparent_shows_white(content):
    picture = load_picture(content, 8, 8)
    assert (picture[:, :4] == torch.tensor([255, 0, 0])).all()
    assert (picture[:, 4:] == 255).all()


def test_half_transparent_grey_is_half_white():
    grey = np.full((4, 4, 2), (100, 51), np.uint8)  # a fifth of it covers
    picture = load_picture(encoded(Image.fromarray(grey, "LA"), "PNG"), 4, 4)
    assert (picture == round(0.2 * 100 + 0.8 * 255)).all()


@pytest.fixture
def thirty(tmp_path):
    """Pictures in three files and two formats each, two of the files with two captions."""
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        for name, kind in ((f"{i}.png", "PNG"), (f"copy{i}.png", "PNG"), (f"{i}.bmp", "BMP")):
            (data / name).write_bytes(encoded(pixels, kind))
            texts = ["a", "b"] if kind == "PNG" else ["c"]
            rows += [{"file_name": name, "text": f"{i} {text}"} for text in texts]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data


def parts(pairs):
    """The pictures of the captions of the held-out and of the training pairs."""
    ids = [pairs.reference(1000, held_out)[1] for held_out in (True, False)]
    assert len(torch.cat(ids).unique()) == len(pairs) == sum(map(len, ids))
    return [{caption.split()[0] for caption in pairs.captions(each)} for each in ids]


def test_pairs_of_one_picture_are_held_out_together(tmp_path, thirty):
    pairs = Pairs(cache(thirty, tmp_path / "cache"), held_out=0.3)
    held_out, training = parts(pairs)
    assert (len(held_out), len(training), held_out & training) == (3, 7, set())
    first = pairs.captions(pairs.reference(7)[1])
    assert len({caption.split()[0] for caption in first}) == 7  # each picture once before any comes twice
    larger = Pairs(cache(thirty, tmp_path / "larger", shard_size=7), held_out=0.3)
    assert parts(larger) == [held_out, training]


def test_a_few_pictures_more_leave_the_rest_where_it_was(tmp_path):
    before = [held_out_of(tmp_path / f"{n}", n) for n in (100, 110, 200)]
    for fewer, more, n in zip(before, before[1:], (100, 110), strict=False):
        changed = {i for i in range(n) if (i in fewer) != (i in more)}
        assert len(changed) < 0.05 * n


def held_out_of(root, n):
    """The numbers of the pictures that are held out of n."""
    root.mkdir()
    for i in range(n):
        (root / f"{i}.png").write_bytes(jpeg(i, format="PNG", size=(3, 3)))
        (root / f"{i}.txt").write_text(f"{i}")
    pairs = Pairs(cache(root, root.with_name(f"{n}.pairs"), batch_size=50, shard_size=1000), held_out=0.2)
    return set(map(int, pairs.captions(pairs.reference(n, held_out=True)[1])))


@pytest.mark.parametrize(("n", "expected"), [(39, 0), (40, 10), (60, 10), (199, 10), (260, 13)])
def test_a_small_set_holds_out_ten_by_default_or_none_with_a_warning(tmp_path, n, expected):
    shard = {"latents": torch.zeros(n, 1), "pictures": torch.arange(2 * n).to(torch.int16).view(torch.uint8).view(n, 4)}
    texts = {"captions": torch.zeros(1, dtype=torch.uint8), "captions.ends": torch.zeros(n, dtype=torch.int64)}
    save_file({**shard, **texts}, tmp_path / "pairs-00000.safetensors", {"skipped": "[]"})
    save_file({"captions.ends": torch.zeros(1, dtype=torch.int64)}, tmp_path / "null.safetensors", {"skipped": "[]"})
    (tmp_path / "pairs.json").write_text(json.dumps({"identity": {}, "source": "here", "counts": [n]}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = Pairs(tmp_path)
    assert len(pairs._held_out) == expected
    assert ["none of its 39 pictures is held out" in str(each.message) for each in caught] == ([] if expected else [True])
    assert len(Pairs(tmp_path, held_out=0.001)._held_out) == 1


# Changes of the source


class Counted:
    """`encode` and `embed`, with what they were asked for."""

    def __init__(self):
        self.pictures, self.captions = 0, []

    def encode(self, pictures):
        self.pictures += len(pictures)
        return encode(pictures)

    def embed(self, captions):
        self.captions += captions
        return embed(captions)


def update(source, out, **changes):
    """Caches, and says how many pictures and which captions were encoded."""
    counted = Counted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_pairs(read_pairs(source), out, counted.encode, counted.embed, **{**SETTINGS, **changes})
    return counted.pictures, counted.captions


def test_what_changed_is_encoded_and_the_rest_is_kept(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    assert update(folder, out) == (0, [])
    (folder / "part0" / "000.txt").write_text("another caption")
    assert update(folder, out) == (0, ["another caption"])
    (folder / "part0" / "0.jpg").write_bytes(jpeg(50))
    (folder / "part0" / "0.txt").write_text("a first one")  # every later pair moves to another place
    assert update(folder, out) == (1, ["a first one"])
    (folder / "part1" / "005.jpg").rename(folder / "part1" / "5.jpg")
    (folder / "part1" / "005.txt").rename(folder / "part1" / "5.txt")
    assert update(folder, out) == (0, [])
    (folder / "part0" / "0.jpg").unlink()
    assert update(folder, out) == (0, [])
    assert contents(out) == contents(cache(folder, tmp_path / "whole"))


def test_a_picture_edited_to_the_same_size_and_time_is_seen(tmp_path, folder):
    path = folder / "part0" / "004.bmp"
    pixels = np.zeros((9, 9, 3), np.uint8)
    path.write_bytes(encoded(pixels, "BMP"))
    path.with_suffix(".txt").write_text("a caption")
    out = cache(folder, tmp_path / "cache")
    before = path.stat()
    path.write_bytes(encoded(pixels + 9, "BMP"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert update(folder, out) == (1, [])
    assert contents(out) == contents(cache(folder, tmp_path / "whole"))


def test_files_that_did_not_change_are_not_read_again(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("ddil_env.data.hashes.SETTLED", -100)  # as if the files were older
    out = cache(folder, tmp_path / "cache")
    read = []
    monkeypatch.setattr("ddil_env.data.hashes.hash_picture", lambda pair: read.append(pair.name) or hash_picture(pair))
    assert update(folder, out) == (0, [])
    assert read == []
    content = (folder / "part0" / "000.jpg").read_bytes()
    (folder / "part0" / "000.jpg").write_bytes(content)
    (out / "stamps.json").write_text((out / "stamps.json").read_text().replace("part1/001", "part1/gone"))
    assert update(folder, out) == (0, [])
    assert read == ["part0/000.jpg", "part1/001.jpg"]
    (out / "stamps.json").write_text("damaged")
    assert update(folder, out) == (0, [])
    assert len(read) == 13


def test_an_update_that_was_cut_short_loses_nothing(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    (folder / "part0" / "0.jpg").write_bytes(jpeg(50))
    (folder / "part0" / "0.txt").write_text("a first one")
    (folder / "part1" / "011.jpg").write_bytes(jpeg(51))
    (folder / "part1" / "011.txt").write_text("a last one")

    def cut(captions):
        if "a last one" in captions:
            raise KeyboardInterrupt
        return embed(captions)

    with pytest.raises(KeyboardInterrupt):
        cache_pairs(read_pairs(folder), out, encode, cut, **SETTINGS)
    with pytest.raises(ValueError, match="is not finished"):
        Pairs(out)
    assert update(folder, out) == (1, ["a last one"])
    assert contents(out) == contents(cache(folder, tmp_path / "whole"))


def test_a_cache_of_other_pictures_is_not_replaced(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    before = contents(out)
    for path in sorted(folder.rglob("*.jpg"))[2:]:
        path.write_bytes(jpeg(100 + int(path.stem)))
    with pytest.raises(ValueError, match=r"is the cache of other pictures: of its 11 \(folder .*\) 2 are here .*pass another folder"):
        cache(folder, out)
    assert contents(out) == before


def test_a_picture_that_changes_while_it_is_cached_is_never_kept_as_what_it_was(tmp_path, folder):
    def change(captions):
        (folder / "part1" / "009.jpg").write_bytes(jpeg(50))
        return embed(captions)

    with pytest.raises(ValueError, match=r"009\.jpg changed while it was being cached; leave the data alone and run it again"):
        cache_pairs(read_pairs(folder), tmp_path / "cache", encode, change, **SETTINGS)


def test_a_cache_of_an_earlier_version_is_refused_with_its_cure(tmp_path, folder):
    out = cache(folder, tmp_path / "cache")
    manifest = json.loads((out / "pairs.json").read_text())
    (out / "pairs.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "stretches"}))
    with pytest.raises(ValueError, match=r"was made by an earlier version of ddil or elsewhere .*delete it to cache again"):
        cache(folder, out)
    for path in out.glob("pairs-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys() if name != "pictures"}, file.metadata()  # noqa: SIM118
        save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"pairs-00000\.safetensors holds no `pictures`, .*earlier version.*cache the pictures again"):
        Pairs(out)


def test_what_is_left_out_later_is_told_though_the_cache_is_whole(tmp_path, folder, monkeypatch):
    out = cache(folder, tmp_path / "cache")
    (folder / "new.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"11 pairs kept, 1 left out, 0 for broken pictures; the first: new\.heic"):
        cache(folder, out)
    assert (out / "skipped.txt").read_text().startswith("new.heic\t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache(folder, out)

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (folder / "another.heic").write_bytes(b"x")
    monkeypatch.setattr(os, "replace", read_only)
    with pytest.warns(UserWarning, match=r"2 left out, the first: another\.heic"):
        cache(folder, out)


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path, folder):
    path = os.path.join(os.fsencode(folder), b"bad\xff.jpg")
    for name, content in ((path, b"broken"), (path[:-3] + b"txt", b"a caption")):
        with open(name, "wb") as file:
            file.write(content)
    with pytest.warns(UserWarning, match="11 pairs kept, 1 left out, 1 for broken"):
        out = cache(folder, tmp_path / "cache")
    assert (out / "skipped.txt").read_text() == "bad\\udcff.jpg\tno picture of a format that Pillow reads here\n"


def test_a_place_that_cannot_be_written_is_named_with_the_cure(tmp_path, folder, monkeypatch):
    (tmp_path / "file").touch()
    cure = r"cannot write the cache .* and the lock beside it: .*; name a folder that can be written, --env\.data_cache DIR"
    with pytest.raises(OSError, match=cure):
        cache(folder, tmp_path / "file" / "cache")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "data/.cache.lock")

    monkeypatch.setattr("ddil_env.data.cache.FileLock.acquire", read_only)
    with pytest.raises(OSError, match=cure.replace("it: .*", "it: Read-only file system")):
        cache(folder, tmp_path / "cache")
