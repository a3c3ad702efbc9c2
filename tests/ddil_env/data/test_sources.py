"""Sources of pictures with captions: what is read, in which order, and what is named."""

from __future__ import annotations

import json
import tarfile

import pytest
from pictures import add, jpeg, write_coco, write_tar

from ddil_env.data.sources import read_pairs


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
