"""Files of prompts: one prompt a line, or COCO's captions, and nothing else."""

from __future__ import annotations

import json

import pytest

from ddil_env.pipelines.prompts import read_prompts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat\na dog\n", ("a cat", "a dog")),
        ("\ufeffa cat\r\n\r\n  a dog \r\n", ("a cat", "a dog")),
        ("a\u2028cat\na\x0cdog\x85\x1cand\x0ba fox", ("a\u2028cat", "a\x0cdog\x85\x1cand\x0ba fox")),
        ('{a cat|a dog}\n"quoted"\n[brackets]', ("{a cat|a dog}", '"quoted"', "[brackets]")),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "P.TXT", "prompts"])
def test_a_prompt_is_a_line_and_nothing_else_ends_one(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.tsv", "p.parquet", "p.yaml"])
def test_a_file_of_another_format_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_text("a cat")
    with pytest.raises(ValueError, match=rf"{name} is a \.\w+ file; .*write its prompts into a \.txt, one a line"):
        read_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a cat\rand a dog", r"prompt 1: 'a cat\\rand a dog' holds a carriage return"),
        (b'a cat\n{"text": "a dog"}\n', r"prompt 2: .* is a JSON object; write its prompt alone on the line"),
        ("a cat\n".encode("utf-16"), r"cannot read the prompts file .*must be a UTF-8 text file"),
        (b"a cat\nNone\n", r"prompt 2: the text 'None' is a missing-value placeholder; mend or remove it"),
        (b"\n \n", "holds no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "p.txt"))


def coco(*captions):
    return {"annotations": [{"image_id": i, "id": 9 - k, "caption": caption} for k, (i, caption) in enumerate(captions)]}


def test_coco_captions_are_read_whatever_the_case_of_the_suffix(tmp_path):
    for name in ("a.json", "b.JSON"):
        (tmp_path / name).write_text("\ufeff" + json.dumps(coco((1, " one"), (1, ""), (0, "zero"))), encoding="utf-8")
        assert read_prompts(str(tmp_path / name)) == ("zero", "one")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco((1, None)), r"c\.json, annotation id=9 of image_id=1: None is not a string; mend or remove it"),
        (coco((1, "a"), (2, "half \ud83d")), r"annotation id=8 of image_id=2: the text 'half \\ud83d' contains an unpaired surrogate"),
        (
            coco(
                (
                    1,
                    ["a"],
                ),
                (2, 3),
            ),
            r"annotation id=8 of image_id=2: 3 is not a string",
        ),
        (coco((1, "a"), (2, " ")), r"annotation id=8 of image_id=2: the text is empty, and the image has no other"),
        (["a cat", "a dog"], r"is no COCO captions file \(TypeError.*pass one, .* or a \.txt with one prompt a line"),
        ({"annotations": []}, "holds no prompt"),
    ],
)
def test_a_caption_that_is_no_text_is_refused_with_its_place(tmp_path, content, message):
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "c.json"))


def test_a_list_of_prompts_is_checked_too():
    assert read_prompts(["a cat ", "", "a\ndog"]) == ("a cat", "a\ndog")
    for prompts in (["a cat", None], ["a cat", 3]):
        with pytest.raises(ValueError, match=r"the list of prompts holds (None|3) as number 2, which is not a string; remove it"):
            read_prompts(prompts)
    with pytest.raises(ValueError, match=r"prompt 1: the text 'a \\ud83d' contains an unpaired surrogate"):
        read_prompts(["a \ud83d"])
