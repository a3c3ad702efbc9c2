"""The command for a GPU: it runs on a CPU, with tiny shapes, and writes down what it measures, what fails and what it had no time for."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_job
import pytest
import torch
from gpu_checks import HostDraws, Recorder, settings
from gpu_job_files import TINY
from gpu_report import Part, Report, cell
from helpers import mixture

from ddil_agents import Dagger
from ddil_env import load_expert


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A dry run of all parts but the training, which runs commands that have tests of their own, and `pytest -m gpu`."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "run_marked_tests", lambda part: None)
        gpu.main(["--dry", "--out", str(out), "--parts", "a,b,c,d,e,g"])
    return out, json.loads((out / "results.json").read_text())


def test_every_part_runs_on_a_cpu(results: tuple[Path, dict[str, Any]]) -> None:
    out, found = results
    assert {letter: part["status"] for letter, part in found["parts"].items()} == dict.fromkeys("abcdeg", "done"), found
    for part in found["parts"].values():
        assert part["rows"]
        assert not part["errors"]
    assert all(row["within"] == "yes" for row in found["parts"]["a"]["rows"] if "left_out" not in row)
    assert (out / "g_lcm_ours.txt").read_text()
    table = (out / "results.md").read_text()
    assert all(str(found[key]) in table for key in ("command", "hardware", "torch", "diffusers", "date"))
    assert all(f"| {row['name']} |" in table for part in found["parts"].values() for row in part["rows"])


def test_steps_are_timed_beside_scripts_that_do_the_same(results: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in results[1]["parts"]["c"]["rows"]}
    for name in ("lcm, fresh", "lcm, reused", "dmd2, mean of 10"):
        assert rows[name]["difference"] < 1e-3
        assert rows[name]["ratio"][0] > 0
    for name in ("script", "ours, fresh", "ours, reused"):
        row = rows[f"whole job, coloured digits, {name}"]
        assert row["images_per_s"] > 0
        assert math.isfinite(row["frechet"])


@pytest.fixture
def part(tmp_path: Path) -> Part:
    report = Report(tmp_path, {"hardware": "this"})
    report.parts["a"] = Part(report, "A part", "cpu", True, seconds=60)
    return report.parts["a"]


def test_a_failure_is_written_down_and_the_next_measurement_goes_on(part: Part, tmp_path: Path) -> None:
    def measure(part: Part) -> None:
        with part.attempt("first"):
            raise ValueError("no such kernel")
        part.add("second", ms=1.0)

    part.run(measure)
    found = json.loads((tmp_path / "results.json").read_text())["parts"]["a"]
    assert (part.status, [row["name"] for row in found["rows"]]) == ("failed", ["first", "second"])
    assert "ValueError: no such kernel" in found["errors"]["first"]
    assert "no such kernel" in (tmp_path / "results.md").read_text()


def test_the_end_of_its_time_stops_a_part_and_keeps_what_it_measured(part: Part, tmp_path: Path) -> None:
    def measure(part: Part) -> None:
        part.add("first", ms=1.0)
        with part.attempt("second"):
            time.sleep(20)

    part.seconds = 0.2
    part.run(measure)
    found = json.loads((tmp_path / "results.json").read_text())["parts"]["a"]
    assert (found["status"], [row["name"] for row in found["rows"]]) == ("out of time", ["first"])


def test_parts_after_a_failed_kernel_run_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(gpu, "PARTS", {letter: gpu.Kind(letter, lambda part: part.add("row"), 0.5) for letter in "ab"})
    monkeypatch.setattr(gpu, "device_works", lambda device: False)
    monkeypatch.setattr(gpu.os, "execv", lambda path, argv: started.append(argv))
    gpu.main(["--dry", "--out", str(tmp_path), "--minutes", "4"])
    (argv,) = started
    assert argv[2:4] == ["--out", str(tmp_path / "after_a")]
    assert argv[argv.index("--parts") + 1] == "b"
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["a"]["status"] == "done"


def test_a_cell_shows_a_number_an_interval_and_lines() -> None:
    assert [cell(x) for x in (None, 0.123456, (1.0, 0.5, 2.0), ["2 × a|b"])] == ["", "0.1235", "1.000 (0.500 … 2.000)", "2 × a\\|b"]


def test_a_gpus_generators_can_draw_as_the_cpus_of_their_seeds() -> None:
    """Shown with the CPU's own in the place of a GPU's."""
    runs = []
    for everywhere in (False, True):
        recorder = Recorder()
        with HostDraws(lambda generator, everywhere=everywhere: everywhere):  # type: ignore[misc]
            learner = Dagger(mixture(), settings(Dagger, num_updates=4, student={"width": 8, "depth": 1}))
            learner.learn(4, progress=False, callbacks=[recorder])
        runs.append(torch.stack(recorder.losses))
    assert torch.equal(*runs)


def test_the_script_reads_and_encodes_what_our_cache_holds(tmp_path: Path) -> None:
    """Both from one folder of pictures and one pipeline: its crop of a picture of that size is the picture."""
    job = TINY
    pictures = gpu_job.write_pictures(job, tmp_path / "pictures")
    pipeline = gpu_job.write_pipeline(job, tmp_path / "pipeline", "cpu", torch.float32)
    script, loaded = gpu_job.Script(job, pipeline, "cpu", torch.float32), gpu_job.ScriptPictures(pictures, job.side)
    expert: Any = load_expert("sd15", model=str(pipeline), data=str(pictures), held_out=0.0, workers=0)
    pixels, texts = torch.stack([loaded[i][0] for i in range(4)]), [loaded[i][1] for i in range(4)]
    ids = torch.arange(4)
    assert expert.captions(ids) == texts
    torch.testing.assert_close(script.embed(texts), expert.embeddings.rows(ids, 4)["text"], atol=1e-5, rtol=0)
    latents = (
        script.vae.encode(pixels).latent_dist.mean * script.vae.config.scaling_factor
    )  # of which the script draws, and ours is the mean
    torch.testing.assert_close(latents, expert.pairs.latents(ids), atol=1e-4, rtol=0)


def test_the_time_to_a_distance_is_read_between_two_judged_updates() -> None:
    course = [(1.0, 8.0), (3.0, 4.0), (4.0, 6.0)]
    assert [gpu_job.time_to(d, course) for d in (9.0, 6.0, 4.0, 3.0)] == [1.0, 2.0, 3.0, math.inf]


def test_the_ratios_of_the_whole_job_are_the_scripts_time_over_ours() -> None:
    outcomes = {name: gpu_job.Outcome(1.0, total, []) for name, total in (("script", 13.0), ("ours, fresh", 7.0))}
    courses = {"script": [(2.0, 9.0), (12.0, 4.0)], "ours, fresh": [(2.0, 6.0), (6.0, 3.0)]}
    row = gpu_job.rows(TINY, outcomes, courses)[1]
    assert (row["ratio"], row["ratio_of_updates"], row["same_frechet"]) == (13 / 7, 2.0, 4.0)
    assert row["ratio_to_same_frechet"] == 12.0 / (2 + 4 * 2 / 3)


def test_it_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--parts", "az"], "--parts az: need letters of abcdefg"),
        ([], "no GPU is to be had here; --dry runs every part on the CPU"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), *argv])
        assert message in capsys.readouterr().err
