"""Pictures with captions, as files of each kind of source."""

import json
import tarfile
from io import BytesIO

import numpy as np
from PIL import Image


def jpeg(seed=0, size=(20, 16), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, options.pop("format", "JPEG"), **options)
    return content.getvalue()


def write_folder(root, n=11):
    for i in range(n):
        path = root / f"part{i % 2}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
        path.with_suffix(".txt").write_text(f"picture  number {i}, é\n", encoding="utf-8")
    return root


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def write_tar(path, keys, caption=lambda key: {"txt": f"caption of {key}".encode()}):
    with tarfile.open(path, "w") as tar:
        for key in keys:
            add(tar, f"{key}.jpg", jpeg(int(key)))
            for suffix, content in caption(key).items():
                add(tar, f"{key}.{suffix}", content)
    return path


def write_coco(root, split="train2017"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images = [{"id": i, "file_name": f"{i:06d}.jpg"} for i in (7, 3, 5)]
    for image in images:
        (root / split / image["file_name"]).write_bytes(jpeg(image["id"]))
    captions = [(3, 31, "later"), (3, 30, "first of 3"), (7, 10, "seven"), (5, 40, "  "), (5, 41, "five")]
    annotations = [{"image_id": i, "id": k, "caption": text} for i, k, text in captions]
    path = root / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path
