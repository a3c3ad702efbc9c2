"""Metrics of pictures against the packages that they stand on, with small random networks in the place of the published ones."""

import hashlib
import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file

from ddil_agents.evaluation.metrics import hps as hps_module
from ddil_agents.evaluation.metrics.clip_score import ClipScore
from ddil_agents.evaluation.metrics.diversity import group_diversity, lpips_distance
from ddil_agents.evaluation.metrics.features import Features
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_agents.evaluation.metrics.hps import HPS
from ddil_agents.evaluation.metrics.inception import Inception
from ddil_agents.evaluation.metrics.pictures import RESIZE, load_pictures, resize

CAPTIONS = ["a cat on a mat", "two dogs", "a house by the sea"]


def pictures(n, height, width, seed=0):
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Runs:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# Resizing and reading


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (33, 33)])
def test_resize_is_torchvisions_centre_crop_and_pillows_lanczos(height, width):
    functional = pytest.importorskip("torchvision.transforms.functional")
    x = pictures(2, height, width)
    expected = [
        functional.center_crop(Image.fromarray(p.numpy()), min(height, width)).resize((16, 16), Image.Resampling.LANCZOS) for p in x
    ]
    assert torch.equal(resize(x, 16), torch.stack([torch.from_numpy(np.array(image)) for image in expected]))


def test_resize_is_to_256_unless_told_and_leaves_squares_of_that_size_alone():
    x = pictures(1, 256, 256)
    assert torch.equal(resize(x), x)
    assert str(resize(pictures(1, 30, 20)).shape[1]) in RESIZE


@pytest.fixture
def folder(tmp_path):
    for i, suffix in enumerate([".png", ".PNG", ".png"]):
        Image.fromarray(pictures(1, 20, 24 + i, seed=i)[0].numpy()).save(tmp_path / f"{i}{suffix}")
    Image.fromarray(pictures(1, 20, 20)[0, ..., 0].numpy()).save(tmp_path / "3.jpg")  # grey
    (tmp_path / "captions.json").write_text("[]")
    return tmp_path


def test_load_pictures_reads_a_folder_in_order_and_in_batches(folder):
    batches = list(load_pictures(folder, size=8, batch_size=3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 8, 8, 3), (1, 8, 8, 3)]
    for i in range(3):
        assert torch.equal(batches[0][i], resize(pictures(1, 20, 24 + i, seed=i), 8)[0])
    assert torch.equal(batches[1][..., 0], batches[1][..., 2])
    assert torch.equal(next(load_pictures([folder / "2.png"], size=8))[0], batches[0][2])


@pytest.mark.parametrize("content", [b"", b"not a picture", "cut"])
def test_a_broken_picture_stops_the_reading_by_name(folder, content):
    whole = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"cannot read image .*1\.png"):
        list(load_pictures(folder, size=8))


def test_reference_pictures_of_any_format_count_and_transparent_ones_lie_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 255, 0, 0)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "1.tif")
    (tmp_path / "notes.txt").write_text("x")
    clear, opaque = next(load_pictures(tmp_path, size=8))
    assert (clear == 255).all()
    assert (opaque == torch.tensor([1, 2, 3])).all()


def test_a_rotation_that_reference_pictures_do_not_follow_is_told(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with pytest.warns(UserWarning, match="at least one has a rotation in its EXIF data.*rotate the files first"):
        list(load_pictures(tmp_path, 4))


def test_a_picture_of_16_bits_is_refused_since_pillow_would_clip_it(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*more than 8 bits"):
        next(load_pictures(tmp_path))


# LPIPS


def lpips_trunk(net):
    """A seeded random trunk, and its weights as torchvision names them."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    name = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[net]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = getattr(models, name)()
    return {k: v for k, v in network.state_dict().items() if k.startswith("features.")}


@pytest.mark.parametrize(
    ("net", "file"),
    [("alex", "alexnet-owt-7be5be79.pth"), ("squeeze", "squeezenet1_1-b8a52dc0.pth"), ("vgg", "vgg16-397923af.safetensors")],
)
def test_lpips_distance_is_the_packages_with_the_weights_of_the_folder(net, file, tmp_path):
    lpips = pytest.importorskip("lpips")
    weights = lpips_trunk(net)
    (save_file if file.endswith("safetensors") else torch.save)(weights, tmp_path / file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False)
    slices = {k.partition(".")[2]: k for k in reference.net.state_dict()}
    reference.net.load_state_dict(
        {slices[k.removeprefix("features.")]: v for k, v in weights.items() if k.removeprefix("features.") in slices}
    )
    a, b = pictures(3, 64, 72, 0), pictures(3, 64, 72, 1)
    expected = [float(reference(*(x[i : i + 1].permute(0, 3, 1, 2) / 255.0 for x in (a, b)), normalize=True)) for i in range(3)]
    ours = lpips_distance(tmp_path, net, batch_size=2)
    assert ours(a, b).tolist() == pytest.approx(expected, rel=1e-4)
    assert ours(a, a).abs().max() == 0
    groups = [a, b]
    by_hand = sum(float(ours(x[i : i + 1], x[j : j + 1])) for x in groups for i, j in [(0, 1), (0, 2), (1, 2)]) / 6
    assert group_diversity(groups, ours) == pytest.approx(by_hand, rel=1e-5)


def test_lpips_without_its_trunk_says_which_file_it_wants(tmp_path):
    pytest.importorskip("lpips")
    with pytest.raises(ValueError, match=r"no alexnet-owt-7be5be79\.pth or alexnet-owt-7be5be79\.safetensors in .*: download https"):
        lpips_distance(tmp_path)
    with pytest.raises(ValueError, match="unknown trunk 'resnet'; choose one of: alex, vgg, squeeze"):
        lpips_distance(tmp_path, "resnet")


def test_lpips_refuses_weights_of_another_network_and_pictures_of_two_sizes(tmp_path):
    pytest.importorskip("lpips")
    torch.save(lpips_trunk("squeeze"), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not fit alexnet"):
        lpips_distance(tmp_path / "other.pth")
    distance = lpips_distance(tmp_path / "other.pth", "squeeze")
    with pytest.raises(ValueError, match=r"\(1, 64, 64, 3\) and \(1, 64, 72, 3\)"):
        distance(pictures(1, 64, 64), pictures(1, 64, 72))


# Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """torch-fidelity's Inception-v3 with seeded random weights, in a file under the published name."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    folder = tmp_path_factory.mktemp("inception")
    for name, weight in network.named_parameters():
        if name.endswith("conv.weight"):
            weight.mul_(6**0.5)  # from torch's default to Kaiming's spread, or the features fade to 1e-8
    torch.save(network.state_dict(), folder / "weights-inception-2015-12-05-6726825d.pth")
    return folder


def test_inception_features_are_torch_fidelitys(inception_weights):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = str(inception_weights / "weights-inception-2015-12-05-6726825d.pth")
    reference = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    x = pictures(3, 40, 52)
    expected = torch.cat([reference(p.permute(2, 0, 1)[None])[0] for p in x])
    inception = Inception(inception_weights, batch_size=2)
    features = inception.features(x)
    assert features.shape == (3, 2048)
    assert inception.name == "inception_v3_2015"
    torch.testing.assert_close(features, expected)
    assert (features[0] - features[1]).abs().max() > 0.01  # the pictures matter


class First(torch.nn.Module):
    """The first features of an Inception: torchmetrics' eigenvalues lose two digits where there are more features than pictures."""

    num_features = 6

    def __init__(self, inception):
        super().__init__()
        self.inception = inception

    def forward(self, x):
        return self.inception.features(x.permute(0, 2, 3, 1))[:, : self.num_features]


def test_fid_is_torchmetrics(inception_weights):
    fid = pytest.importorskip("torchmetrics.image.fid")
    inception = Inception(inception_weights)
    reference = fid.FrechetInceptionDistance(First(inception))
    real, fake = pictures(16, 48, 48), pictures(14, 48, 48, seed=1) // 2
    reference.update(real.permute(0, 3, 1, 2), real=True)
    reference.update(fake.permute(0, 3, 1, 2), real=False)
    found = frechet_distance(*(Features(inception.name, inception.features(x)[:, :6]) for x in (real, fake)))
    assert found == pytest.approx(float(reference.compute()), rel=1e-4)
    assert found > 0.01


def test_inception_is_found_under_its_other_name_and_as_safetensors(inception_weights, tmp_path):
    tensors = torch.load(inception_weights / "weights-inception-2015-12-05-6726825d.pth", weights_only=True)
    save_file(tensors, tmp_path / "pt_inception-2015-12-05-6726825d.safetensors")
    x = pictures(1, 32, 32)
    torch.testing.assert_close(Inception(tmp_path).features(x), Inception(inception_weights).features(x))


def test_weights_of_another_sha256_than_their_name_states_are_told(inception_weights, tmp_path):
    path = inception_weights / "weights-inception-2015-12-05-6726825d.pth"
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.warns(UserWarning, match=rf"{path.name} should have a SHA-256 of 6726825d… and has {found}…"):
        Inception(inception_weights)
    (tmp_path / f"mine-{found}.pth").symlink_to(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Inception(tmp_path / f"mine-{found}.pth")


def test_inception_runs_no_code_from_its_weights(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": Runs(tmp_path / "ran")}, tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(ValueError, match=r"6726825d\.pth is damaged or holds more than tensors"):
        Inception(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("content", "message"), [({"a": torch.zeros(1)}, "does not fit"), ([1, 2], "is no state dict")])
def test_inception_refuses_weights_of_another_network(content, message, tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save(content, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=rf"mine\.pth {message}"):
        Inception(tmp_path / "mine.pth")


def test_inception_without_a_network_says_which_file_it_wants(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(ValueError, match=r"no weights-inception-2015-12-05-6726825d\.pth or .* in .*: download https"):
        Inception(tmp_path)
    monkeypatch.setattr(module, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot download weights-inception-2015-12-05-6726825d\.pth .* pass its folder as weights_dir"):
        Inception()


# CLIP score and HPS


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """An open_clip network of 32×32 pictures with seeded random weights; its name, and a folder with the weights."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (folder / "tiny-ddil.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-ddil.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-ddil").state_dict(), folder / "tiny-ddil-random.safetensors")
    return "tiny-ddil", folder


def reference_scores(model, path, x, captions, **preprocessing):
    import open_clip

    network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=str(path), **preprocessing)
    network.eval()
    images = torch.stack([preprocess(Image.fromarray(p.numpy())) for p in x])
    with torch.no_grad():
        image, text, _ = network(images, open_clip.get_tokenizer(model)(captions))
    return torch.nn.functional.cosine_similarity(image, text)


def test_clip_score_is_open_clips_raw_cosine(tiny_clip):
    model, folder = tiny_clip
    x = pictures(3, 48, 40)
    clip = ClipScore(folder, model, "random", batch_size=2)
    scores = clip.score(x, CAPTIONS)
    torch.testing.assert_close(scores, reference_scores(model, folder / "tiny-ddil-random.safetensors", x, CAPTIONS))
    assert scores.abs().max() <= 1
    assert clip.name == "clip_score_tiny-ddil_random"
    swapped = clip.score(x, CAPTIONS[::-1])
    torch.testing.assert_close(swapped[1], scores[1])
    assert (swapped[0] - scores[0]).abs() > 1e-4  # the caption matters


def test_clip_score_below_zero_is_not_clamped(tiny_clip):
    model, folder = tiny_clip
    clip = ClipScore(folder, model, "random")
    clip.network.visual.proj.data.neg_()
    scores = ClipScore(folder, model, "random").score(pictures(3, 32, 32), CAPTIONS)
    torch.testing.assert_close(clip.score(pictures(3, 32, 32), CAPTIONS), -scores)


def test_clip_score_puts_the_prefix_before_each_caption(tiny_clip):
    model, folder = tiny_clip
    x = pictures(3, 32, 32)
    plain = ClipScore(folder / "tiny-ddil-random.safetensors", model, "mine").score(x, ["A photo depicts " + c for c in CAPTIONS])
    torch.testing.assert_close(ClipScore(folder, model, "random", prefix="A photo depicts ").score(x, CAPTIONS), plain)


def test_local_weights_are_preprocessed_for_as_the_published_ones(tiny_clip, monkeypatch):
    model, folder = tiny_clip
    open_clip = pytest.importorskip("open_clip")
    published = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *args: published)
    x = pictures(3, 64, 40)
    preprocessing = {f"image_{key}": value for key, value in published.items()}
    expected = reference_scores(model, folder / "tiny-ddil-random.safetensors", x, CAPTIONS, **preprocessing)
    torch.testing.assert_close(ClipScore(folder, model, "random").score(x, CAPTIONS), expected)


@pytest.mark.parametrize(("version", "file"), [("v2.1", "HPS_v2.1_compressed.pt"), ("v2.0", "HPS_v2_compressed.pt")])
def test_hps_is_the_cosine_under_its_checkpoint_with_pictures_padded(version, file, tiny_clip, tmp_path, monkeypatch):
    model, folder = tiny_clip
    open_clip = pytest.importorskip("open_clip")
    state = {k: v.half() for k, v in open_clip.create_model(model, str(folder / "tiny-ddil-random.safetensors")).state_dict().items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, tmp_path / file)  # the form of the published file
    monkeypatch.setattr(HPS, "model", model)
    hps, x = HPS(tmp_path, version), pictures(3, 64, 40)
    expected = reference_scores(model, tmp_path / file, x, CAPTIONS, image_resize_mode="longest")
    torch.testing.assert_close(hps.score(x, CAPTIONS), expected)
    assert hps.name == f"hps_{version}"


def test_clip_weights_run_no_code_and_fit_their_network(tiny_clip, tmp_path):
    model, _ = tiny_clip
    torch.save({"logit_scale": Runs(tmp_path / "ran")}, tmp_path / f"{model}-evil.pt")
    with pytest.raises(ValueError, match=r"cannot load .*-evil\.pt into tiny-ddil"):
        ClipScore(tmp_path, model, "evil")
    assert not (tmp_path / "ran").exists()
    save_file({"logit_scale": torch.zeros(())}, tmp_path / f"{model}-other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors into tiny-ddil .*\n.*Missing key"):
        ClipScore(tmp_path, model, "other")


def test_clip_and_hps_without_weights_say_which_file_they_want(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    with pytest.raises(
        ValueError, match=r"no ViT-g-14-laion2b_s34b_b88k\.safetensors or .*\.bin in .*laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
    ):
        ClipScore(tmp_path)
    with pytest.raises(ValueError, match=r"no HPS_v2\.1_compressed\.pt or HPS_v2\.1_compressed\.safetensors in .*xswu/HPSv2"):
        HPS(tmp_path)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(ValueError, match=r"cannot load laion2b_s34b_b88k into ViT-g-14 .*no network.* pass a weights_dir"):
        ClipScore()
    monkeypatch.setattr(hps_module, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"cannot download HPS_v2\.1_compressed\.pt \(no network\)"):
        HPS()


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clip: ClipScore(None, "ViT-Z"), "unknown model 'ViT-Z'; .*ViT-g-14"),
        (
            lambda clip: ClipScore(None, "ViT-g-14", "laion5b"),
            "unknown weights 'laion5b' of ViT-g-14; choose one of: laion2b_s12b_b42k, laion2b",
        ),
        (lambda clip: HPS(None, "v3"), r"unknown version 'v3'; choose one of: v2\.0, v2\.1"),
        (lambda clip: clip.score(pictures(3, 8, 8), CAPTIONS[:2]), "3 pictures and 2 captions"),
        (lambda clip: clip.score(pictures(3, 8, 8), "cat"), "3 pictures and one string"),
        (lambda clip: clip.score(pictures(3, 8, 8).float(), CAPTIONS), r"must be uint8 .*; got float32 \(3, 8, 8, 3\)"),
        (lambda clip: resize(pictures(2, 8, 8).permute(0, 3, 1, 2)), r"got uint8 \(2, 3, 8, 8\)"),
        (lambda clip: resize(pictures(0, 8, 8)), "n ≥ 1"),
        (lambda clip: resize(pictures(1, 8, 8), size=0), "size=0"),
        (lambda clip: next(load_pictures([])), "0 pictures"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message, tiny_clip):
    model, folder = tiny_clip
    with pytest.raises(ValueError, match=message):
        call(ClipScore(folder, model, "random"))


@pytest.mark.parametrize(("module", "make"), [("lpips", lpips_distance), ("open_clip", ClipScore), ("torch_fidelity", Inception)])
def test_without_the_extra_the_error_says_how_to_install_it(module, make, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "ddil\[eval\]"'):
        make()
