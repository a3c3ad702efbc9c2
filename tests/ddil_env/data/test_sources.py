"""Sources of pictures with captions: what is read, in which order, and what is named."""

from __future__ import annotations

import json
import os
import tarfile

import pytest
from pictures import add, jpeg, write_coco, write_tar

from ddil_env.data.sources import read_pairs, read_pictures


def listed(path, **options):
    return [(pair.name, pair.caption) for pair in read_pairs(path, **options).pairs]


def test_a_folder_is_read_in_order_of_names_whatever_the_order_on_the_disk(tmp_path):
    for name in ("b/2.png", "a.JPG", "b/1.webp", "c.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeff{name}\n second  line", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    assert listed(tmp_path) == [(name, f"{name} second line") for name in ("a.JPG", "b/1.webp", "b/2.png", "c.jpeg")]


def test_metadata_jsonl_names_files_beside_it(tmp_path):
    for split in ("train", "more"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.jpg").write_bytes(jpeg())
        rows = [{"file_name": "x.jpg", "text": f"in {split}"}, {"file_name": "y.jpg", "text": None}]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert listed(tmp_path) == [("more/x.jpg", "in more"), ("train/x.jpg", "in train")]
    assert [name for name, _ in read_pairs(tmp_path).skipped] == ["more/y.jpg", "train/y.jpg"]
    assert listed(tmp_path / "train" / "metadata.jsonl") == [("x.jpg", "in train")]
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "x.jpg", "text": "a"}\n{"file": 1}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: KeyError.*a line is"):
        read_pairs(tmp_path)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "x.jpg", "text": "a", "text": "b"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: .*a key of file_name, text, text stands twice"):
        read_pairs(tmp_path)


def test_coco_gives_the_first_caption_of_each_picture_in_order_of_image_ids(tmp_path):
    path = write_coco(tmp_path / "coco")
    expected = [("000003.jpg", "first of 3"), ("000005.jpg", "five"), ("000007.jpg", "seven")]
    assert listed(tmp_path / "coco") == listed(path) == expected
    assert read_pairs(path).pairs[0].read() == jpeg(3)
    (tmp_path / "coco" / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"names pictures such as 000007\.jpg, and none of the first 100 is in.*pass their folder as images"
    ):
        read_pairs(path)
    assert listed(path, images=tmp_path / "elsewhere") == expected
    path.write_text('{"annotations": [{"image_id": 1}]}')
    with pytest.raises(ValueError, match=r"is no COCO captions file \(KeyError"):
        read_pairs(path)


def test_coco_is_its_training_captions_and_two_of_those_are_ambiguous(tmp_path):
    write_coco(tmp_path, "train2017")
    write_coco(tmp_path, "val2017")
    assert read_pairs(tmp_path).pairs[0].path.endswith("train2017/000003.jpg")
    write_coco(tmp_path, "train2014")
    with pytest.raises(ValueError, match=r"several captions files \(captions_train2014\.json, captions_train2017\.json\)"):
        read_pairs(tmp_path)


def test_webdataset_shards_are_read_in_place_by_range_by_glob_and_by_folder(tmp_path):
    write_tar(tmp_path / "s-08.tar", ["3", "1"])
    write_tar(tmp_path / "s-09.tar", ["2"], lambda key: {"json": json.dumps({"caption": f"of {key}", "url": "x"}).encode()})
    write_tar(tmp_path / "s-10.tar", ["4", "5"], lambda key: {} if key == "4" else {"json": b'{"caption": null}'})
    (tmp_path / "00000_stats.json").write_text("{}")
    expected = [("s-08.tar/3", "caption of 3"), ("s-08.tar/1", "caption of 1"), ("s-09.tar/2", "of 2")]
    for path in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{08..10}.tar"):
        assert listed(path) == expected
        assert [name for name, _ in read_pairs(path).skipped] == ["s-10.tar/4", "s-10.tar/5"]
    assert [pair.read() for pair in read_pairs(tmp_path).pairs] == [jpeg(3), jpeg(1), jpeg(2)]
    with pytest.raises(ValueError, match=r"cannot read the shard .*s-11\.tar .*No such file"):
        read_pairs(tmp_path / "s-{08..11}.tar")


@pytest.mark.parametrize("damage", ["cut", "header", "compressed", "empty"])
def test_a_damaged_webdataset_shard_is_named_and_never_taken_for_a_short_one(tmp_path, damage):
    path = write_tar(tmp_path / "s.tar", ["1", "2", "3"])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        second, last = (tar.getmember(f"{key}.txt").offset for key in (2, 3))
    if damage == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "1.jpg", jpeg())
    else:
        path.write_bytes(
            {"cut": content[: last + 515], "header": content[:second] + b"x" * 512 + content[second + 512 :], "empty": b""}[damage]
        )
    with pytest.raises(ValueError, match=r"cannot read the shard .*s\.tar .*uncompressed"):
        read_pairs(path)


def test_a_path_that_is_no_source_is_named_with_what_would_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is no source of pictures and captions.*pass a folder"):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no pair of a picture.*read as folder; put each caption"):
        read_pairs(tmp_path)
    (tmp_path / "a.png").write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"left out: 1, the first a\.png \(no caption"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="no pair of a picture"):
        read_pairs(tmp_path / "*.tar")


# Nothing is passed over


def write_captioned(folder, name, caption="a caption", content=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if content is None else content)
    path.with_suffix(".txt").write_text(caption)


def test_whatever_lies_in_a_folder_is_a_pair_or_is_named(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    kept = ["a.jpg", "b.c.PNG", "c.tif", "d.bmp", "e.gif", "f.jfif", "deep/er/g.webp", "link/h.jpg"]
    for name in kept[:-1]:
        write_captioned(data, name)
    write_captioned(elsewhere, "h.jpg")
    (data / "link").symlink_to(elsewhere)
    (data / "deep" / "loop").symlink_to(data)
    (data / "itself").symlink_to(data / "itself")
    (data / "listed").mkdir()
    (data / "listed" / "i.jpg").write_bytes(jpeg())
    (data / "listed" / "metadata.jsonl").write_text('{"file_name": "i.jpg", "text": "listed"}')
    write_captioned(data, "j.heic")
    write_captioned(data, "listed/k.jpg", caption="")
    left = ["README.md", "orphan.txt", "alone.jpg", "metadata.csv", "notes/1.md", "notes/more/2.md", ".git/config", "._a.jpg"]
    for name in left:
        (data / name).parent.mkdir(exist_ok=True, parents=True)
        (data / name).write_text("x")
    os.mkfifo(data / "pipe.jpg")
    (data / "pipe.txt").write_text("reading this picture would wait for ever")
    source = read_pairs(data)
    assert (source.kind, [pair.name for pair in source.pairs]) == ("metadata.jsonl and folder", ["listed/i.jpg", *sorted(kept)])
    named = dict(source.skipped)
    expected = {"j.heic": "Pillow", "j.txt": "without a picture", "listed/k.jpg": "no caption: listed/k.txt: the text is empty"}
    expected |= {"README.md": "neither", "alone.jpg": "no caption", "metadata.csv": "neither", "notes/": "a folder of 2 files"}
    expected |= {".git": "hidden", "._a.jpg": "hidden", "deep/loop/": "a link to a folder that it lies in", "itself": "neither"}
    expected |= {"pipe.jpg": "no regular file", "orphan.txt": "a text without a picture"}
    assert named.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in named.items())


@pytest.mark.parametrize("other", ["tar", "coco"])
def test_a_folder_of_which_it_is_not_clear_what_the_data_are_is_refused(tmp_path, other):
    write_captioned(tmp_path, "a.jpg")
    write_tar(tmp_path / "backup.tar", ["1"]) if other == "tar" else write_coco(tmp_path)
    named = {"tar": r"shards \(backup\.tar\)", "coco": r"COCO's captions \(annotations/captions_train2017\.json\)"}[other]
    with pytest.raises(ValueError, match=rf"{named} and pictures with a \.txt beside them \(a\.jpg\), and it is not clear .*pass the path"):
        read_pairs(tmp_path)


def test_what_coco_and_shards_do_not_use_is_named(tmp_path):
    write_coco(tmp_path / "coco")
    (tmp_path / "coco" / "train2017" / "new.jpg").write_bytes(jpeg())
    (tmp_path / "coco" / "val2017").mkdir()
    (tmp_path / "coco" / "val2017" / "1.jpg").write_bytes(jpeg())
    assert [name for name, _ in read_pairs(tmp_path / "coco").skipped] == ["train2017/new.jpg", "val2017/"]
    shard = tmp_path / "shards" / "s.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for name in ("1.jpg", "1.txt", "1.png", "2.jpg", "2.jpg", "2.txt", "3.heic", "3.txt", "._4.jpg"):
            add(tar, name, b"a caption" if name.endswith(".txt") else jpeg())
        link = tarfile.TarInfo("5.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
    (shard.parent / "preview.jpg").write_bytes(jpeg())
    source = read_pairs(shard.parent)
    assert [pair.name for pair in source.pairs] == ["s.tar/1", "s.tar/2"]
    assert [name for name, _ in source.skipped] == ["s.tar/2.jpg", "s.tar/._4.jpg", "s.tar/5.jpg", "s.tar/1.png", "s.tar/3", "preview.jpg"]
    assert ".heic" in dict(source.skipped)["s.tar/3"]


def test_what_lies_among_pictures_without_captions_is_named(tmp_path):
    for name in ("a/1.jpg", "b/2.tif"):
        write_captioned(tmp_path, name)
    write_captioned(tmp_path, "b/3.heic")
    write_captioned(tmp_path, os.fsdecode(b"c\xff/4.jpg"))
    (tmp_path / "classes.json").write_text("{}")
    source = read_pictures(tmp_path, ("classes.json",))
    assert [(pair.name, pair.caption) for pair in source.pairs] == [("a/1.jpg", "a"), ("b/2.tif", "b"), (r"c\udcff/4.jpg", r"c\udcff")]
    assert [name for name, _ in source.skipped] == ["b/3.heic", "b/3.txt"]


# Captions

CAPTIONS = [
    (["", "first", "second"], "first"),
    (" two\n words\u2028here ", "two words here"),
    (float("nan"), "nan is not a string"),
    ({"en": "a cat"}, "{'en': 'a cat'} is not a string"),
    (True, "True is not a string"),
    (3, "3 is not a string"),
    (None, "None is not a string"),
    ([["a"]], r"[['a']] is not a string"),
    ([], "the text is empty"),
    ("None", "the text 'None' is a missing-value placeholder"),
    ("half \ud83d", r"the text 'half \ud83d' contains an unpaired surrogate"),
]


@pytest.mark.parametrize("kind", ["metadata.jsonl", "webdataset", "COCO"])
def test_a_json_value_that_is_no_text_is_never_a_caption(tmp_path, kind):
    for k, (value, expected) in enumerate(CAPTIONS):
        root = tmp_path / str(k)
        root.mkdir()
        names = ["a.jpg", "b.jpg"]
        for name in names:
            (root / name).write_bytes(jpeg())
        if kind == "metadata.jsonl":
            rows = [{"file_name": name, "text": text} for name, text in zip(names, (value, "kept"), strict=True)]
            (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        elif kind == "COCO":
            images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
            annotations = [{"id": i, "image_id": i, "caption": text} for i, text in enumerate((value, "kept"))]
            (root / "captions_x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        else:
            texts = {"0": json.dumps({"caption": value}).encode(), "1": b'{"caption": "kept"}'}
            root = write_tar(root / "s.tar", list(texts), lambda key, texts=texts: {"json": texts[key]})
        source = read_pairs(root)
        captions = [pair.caption for pair in source.pairs]
        if k < 2:
            assert captions == [expected, "kept"]
        else:
            assert captions == ["kept"]
            assert expected in source.skipped[0].reason


def test_other_values_of_the_wrong_type_are_an_error_with_their_place(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": 1, "text": "a"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: TypeError"):
        read_pairs(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    for images in ([{"id": 1, "file_name": 1}], [{"id": 1, "file_name": "1.jpg"}, {"id": 1, "file_name": "2.jpg"}]):
        (tmp_path / "captions_x.json").write_text(json.dumps({"images": images, "annotations": []}))
        with pytest.raises(ValueError, match=r"no COCO captions file .*file_name=.*id=1 is no text, or its id is that of another picture"):
            read_pairs(tmp_path)


def test_a_range_of_shards_of_which_one_matches_nothing_is_an_error(tmp_path):
    (tmp_path / "0").mkdir()
    write_tar(tmp_path / "0" / "a.tar", ["1"])
    with pytest.raises(ValueError, match=r"cannot read the shard .*/1/\*\.tar"):
        read_pairs(tmp_path / "{0..1}" / "*.tar")
