"""The evaluate command: protocols of captions, settings, errors; and merging results in a report."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import corners, make_evaluator
from matplotlib.figure import Figure
from PIL import Image
from tiny_sd import write_tiny_sd

from ddil_agents import dagger, dmd2, evaluate
from ddil_agents.commands.agents import find_agent
from ddil_agents.commands.checks import check_command_line
from ddil_agents.commands.parse import resolve_presets
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.settings import Evaluation, extractor_for
from ddil_agents.report import merge_results, save_curves
from ddil_env import ExpertPolicy, TimeGrid, load_expert
from ddil_env.experts.stable_diffusion import StableDiffusion, coco_captions
from ddil_env.presets import config_dir, read_yaml


def test_coco_captions_are_the_first_of_each_image_in_order():
    annotations = [
        {"image_id": 9, "id": 3, "caption": "nine, later"},
        {"image_id": 9, "id": 1, "caption": " nine,\n first "},
        {"image_id": 2, "id": 7, "caption": "two"},
    ]
    assert coco_captions(json.dumps({"annotations": annotations})) == ["two", "nine, first"]


def test_the_papers_protocols_are_presets(tmp_path: Path):
    for name, n, scores in (("coco2017_5k", 5000, ("clip_score", "hpsv2")), ("coco2014_30k", 30000, ("clip_score",))):
        settings = read_yaml(config_dir() / "evaluate" / f"{name}.yaml")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        found = Evaluation(**given, images=str(tmp_path))
        assert (found.n, found.scores, found.extractor, found.protocol) == (n, scores, "inception_v3_2015", name)
        with pytest.raises(ValueError, match=f"protocol={name}: needs images"):
            Evaluation(**given)
        assert resolve_presets("evaluate", ["--config", name, "--n", "20"])[1].endswith(f"{name}.yaml")


def test_the_command_evaluates_the_expert_and_clears_its_cache(tmp_path: Path, capsys):
    out = tmp_path / "result.json"
    evaluate.main(
        ["--env", "gaussian_mixture", "--steps", "8", "2", "--n", "50", "--batch_size", "20", "--seeds", "0", "1", "--out", str(out)]
    )
    results = json.loads(out.read_text())
    assert [r["settings"]["seed"] for r in results] == [0, 1]
    assert results[0]["models"]["teacher@8"]["frechet"] < results[0]["models"]["teacher@2"]["frechet"]
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert "teacher@2" in capsys.readouterr().out


def test_a_config_gives_the_command_its_settings_and_flags_go_over_it(tmp_path: Path):
    config, out = tmp_path / "small.yaml", tmp_path / "result.json"
    config.write_text("n: 40\nn_paths: 12\nn_action: 6\n")
    evaluate.main(["--env", "gaussian_mixture", "--steps", "2", "--config", str(config), "--n_action", "5", "--out", str(out)])
    (result,) = json.loads(out.read_text())
    assert {key: result["settings"][key] for key in ("n", "n_paths", "n_action")} == {"n": 40, "n_paths": 12, "n_action": 5}


def test_a_protocol_needs_a_caption_for_each_sample(tmp_path: Path, colour):
    settings = {"extractor": "colour", "images": str(tmp_path), "protocol": "coco2017_5k"}
    with pytest.raises(ValueError, match="protocol=coco2017_5k: 11 samples have captions of their own, and 10 are given"):
        extractor_for(load_expert("digits8"), Evaluation(n=11, **settings))
    extractor_for(load_expert("digits8"), Evaluation(n=10, **settings))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A tiny pipeline's folder, and one of 30 pictures with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "pictures").mkdir()
    for i in range(30):
        pixels = torch.randint(0, 256, (18, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{i:02d}.png")
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"bee {i}")
    return write_tiny_sd(folder / "model"), folder / "pictures"


def test_a_protocol_refuses_data_that_leave_it_fewer_samples(captioned, colour):
    model, pictures = map(str, captioned)
    expert = StableDiffusion(model, data=pictures, held_out=0.4, workers=0)
    settings = {"extractor": "colour", "images": pictures, "protocol": "coco2017_5k", "n_paths": 4, "n_action": 2}
    with pytest.raises(ValueError, match="protocol=coco2017_5k: 20 samples are asked for, and the expert's own data allow 18"):
        make_evaluator(expert, n=20, **settings)
    assert make_evaluator(expert, n=18, **settings).n == 18


def test_a_runs_own_evaluation_bears_no_protocols_name(captioned):
    flags = ["--env", "gaussian_mixture", "--evaluate.images", str(captioned[1]), "--evaluate.protocol", "coco2017_5k"]
    with pytest.raises(
        ValueError, match=r"evaluate.protocol=coco2017_5k: a run is evaluated on its own prompts.* --config coco2017_5k --captions"
    ):
        check_command_line(find_agent("bc"), flags)


@pytest.mark.parametrize(("agent", "own"), [(dagger, ""), (dmd2, "--gan_weight .1 --critic_updates 1")])
def test_a_run_on_own_data_is_evaluated_on_the_captions_of_a_protocol(captioned, colour, tmp_path: Path, agent, own):
    model, pictures = map(str, captioned)
    env = ["--env.expert", "ddil_env.experts.stable_diffusion.StableDiffusion", "--env.model", model, "--data", pictures]
    env += ["--env.held_out", ".4", "--env.workers", "0", "--env.data_cache", str(tmp_path / "cache"), "--guidance_scale", "2"]
    sizes = "--num_updates 1 --batch_size 4 --num_steps 2 --teacher_steps 4 --mixed_precision no --collect_size 8 --updates_per_collect 1"
    evaluation = "--evaluate.n 10 --evaluate.n_paths 4 --evaluate.n_action 2 --thresholding.kind expert"
    agent.main([*env, *sizes.split(), *evaluation.split(), *own.split(), "--out", str(tmp_path / "run")])
    captions, out = tmp_path / "captions.txt", tmp_path / "result.json"
    captions.write_text("\n".join(f"sea {i}" for i in range(25)))
    protocol = ["--config", "coco2017_5k", "--images", pictures, "--n", "22", "--extractor", "colour", "--scores", "[]", "--lpips", "false"]
    evaluate.main(["--run", str(tmp_path / "run"), *protocol, "--captions", str(captions), "--out", str(out)])
    (result,) = json.loads(out.read_text())
    assert (result["settings"]["protocol"], result["settings"]["n"]) == ("coco2017_5k", 22)
    expert = StableDiffusion(model, prompts=str(captions))
    policy = ExpertPolicy(expert, 1, 2.0)
    same = Evaluator(policy, TimeGrid(expert.schedule, 1), Evaluation(n=22, n_paths=2, extractor="colour"))
    assert result["settings"]["captions"] == same.describe()["captions"]
    student = result["models"][f"{agent.__name__.rpartition('.')[2]}@2"]
    assert student["frechet"] > 0
    assert student["shift"] is None  # the data are set aside
    preset = {"expert": env[1], "model": model, "data": pictures, "data_cache": str(tmp_path / "cache"), "held_out": 0.4}
    (tmp_path / "mine.yaml").write_text(json.dumps(preset))
    evaluate.main(["--env", str(tmp_path / "mine.yaml"), "--steps", "1", *protocol, "--captions", str(captions), "--out", str(out)])
    assert json.loads(out.read_text())[0]["settings"]["captions"] == result["settings"]["captions"]


@pytest.mark.parametrize(("key", "others"), [("settings", {"n": 60}), ("env_config", {"model": "b"})])
def test_runs_that_were_measured_differently_are_not_merged_and_both_ways_are_named(key, others):
    first = {"settings": {"n": 50}, "env_config": {"model": "a"}, "models": {"teacher@8": {}, "bc@4": {}}}
    second = {**first, "models": {"teacher@8": {}, "dagger@4": {}}}
    assert merge_results({"bc@4": first, "dagger@4": second})["models"].keys() == {"teacher@8", "bc@4", "dagger@4"}
    more = {name: {**first, "models": {"teacher@8": {}, name: {}, "lcm@1": {"of": name}}} for name in ("lcm@4", "lcm@2")}
    shown = merge_results(more)["models"]
    assert list(shown) == ["teacher@8", "lcm@4", "lcm@1, of lcm@4", "lcm@2", "lcm@1, of lcm@2"]
    assert shown["lcm@1, of lcm@2"] == {"of": "lcm@2"}
    also = {name: {**first, "models": {name: {"of": name}, "lcm@1": {"of": name}}} for name in ("lcm@2", "lcm@1")}
    assert merge_results(also)["models"] == {name: {"of": name} for name in ("lcm@2", "lcm@1")}
    ways = re.escape(f"bc@4 has {key} {first[key]}, dagger@4 {others}; compare runs of one expert, evaluated in one way")
    with pytest.raises(ValueError, match=ways):
        merge_results({"bc@4": first, "dagger@4": {**second, key: others}})


def test_evaluations_during_training_are_drawn_beside_the_loss(monkeypatch, tmp_path: Path):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or savefig(self, *args, **kwargs))
    metrics = {name: [{"step": 4, "loss": 1.0, "teacher_nfe": 8}] for name in ("bc@4", "dagger@4")}
    values = [3.0, 1.0, 2.0]
    rows = [{"step": 4 * i, "frechet_to_expert": x, "recall": 0.5, "best": i < 2, "seconds": 1.0} for i, x in enumerate(values)]
    save_curves(tmp_path / "curves.png", metrics, {}, {"bc@4": rows})
    save_curves(tmp_path / "curves.png", metrics, {})
    with_evaluations, without = ([axis for axis in figure.axes if axis.lines] for figure in figures)
    curve, best = with_evaluations[2].lines
    assert (list(curve.get_xdata()), list(curve.get_ydata()), curve.get_label()) == ([0, 4, 8], values, "bc@4")
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([4], [1.0])
    assert (len(with_evaluations), len(without)) == (3, 2)
    assert with_evaluations[2].get_ylabel() == "validation: frechet_to_expert"


def test_a_preset_reaches_the_evaluator(monkeypatch, capsys, tmp_path: Path):
    evaluations = []
    monkeypatch.setattr(evaluate, "evaluate_expert", lambda expert, steps, settings, *args: evaluations.append(settings) or {"models": {}})
    monkeypatch.setattr("ddil_agents.evaluate.table", lambda result: "")
    evaluate.main(["--env", "gaussian_mixture", "--config", "coco2017_5k", "--protocol", "null"])
    assert (evaluations[0].n, evaluations[0].scores, evaluations[0].lpips) == (5000, ("clip_score", "hpsv2"), True)


def test_the_expert_is_sampled_once_in_each_number_of_steps(monkeypatch):
    expert = corners()
    evaluate.evaluate_expert(expert, [8, 2], Evaluation(n=20, n_paths=10, n_action=5))
    assert expert.nfe == 20 * (8 + 2)


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys):
    for flags, message in (
        (["--run", str(tmp_path)], "holds no run"),
        (
            ["--config", "coco2017_5k"],
            "--protocol coco2017_5k: its samples need the protocol's captions, not the expert's prompts; pass them as",
        ),
        (["--config", "coco"], "unknown evaluate 'coco'; presets: coco2014_30k, coco2017_5k"),
        (["--env", "digits8", "--captions", "x.json"], "--captions x.json: the expert of digits8 takes no captions; leave it out"),
        (["--run", "runs/mine", "--steps", "4"], "--run names expert and steps; leave --env and --steps out"),
        (["--run", "runs/mine", "--env", "digits8"], "--run names expert and steps; leave --env and --steps out"),
        (["--out", str(tmp_path)], "need a file in a folder that exists"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
