"""All that this project has to measure on a GPU, by one command that fits into one short loan of a machine.

    python benchmarks/gpu.py --out DIR --minutes 8                # on the GPU
    python benchmarks/gpu.py --out DIR --minutes 4 --parts cd     # some parts
    python benchmarks/gpu.py --out DIR --dry                      # every part on the CPU, tiny: that it runs, not how fast

    a   correctness: environment, labels, buffer, 20 updates of every learner and episodes in worlds beside the CPU's, with TF32 and
        without; the lines that wait for the GPU in an update; `pytest -m gpu`, which resumes runs bit for bit
    b   rollouts of Stable Diffusion 1.5's UNet beside diffusers' pipeline: eager, as a CUDA graph, and compiled
    c   a step of LCM and an iteration of DMD2 beside their scripts, the whole job from a folder of pictures, and the steps compiled
    d   peaks of memory beside those that memory.py counts, the largest batch, SDXL
    e   draws from the buffer, collections and the copies between host and device in them, and episodes in worlds
    f   training: every learner on digits under strong guidance, over seeds, for as long as there is time; goes on in --training DIR
    g   where the time of b's and c's loops goes, kernel by kernel

The parts run in this order, each within its share of the minutes; what one leaves goes to the next. results.json and results.md are
written anew after every row, and a failure is written down with its traceback. After one that takes the GPU from this process, the parts
that are left run in a new one, whose results are in after_LETTER/. All weights of Stable Diffusion are random.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import buffer
import gpu_worlds
import torch
import yaml
from diffusers.utils import logging
from gpu_checks import FEW, LEARNERS, check_pictures, run_marked_tests, settings
from gpu_memory import memory
from gpu_report import Part, Report, device_works
from gpu_speed import profiles, rollouts, steps, synchronize
from transformers.utils.logging import disable_progress_bar

from ddil_agents import DMD2, Dagger
from ddil_agents.comparison.results import student_row
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.results import read_result
from ddil_env import load_expert

JOBS = 6  # training processes at a time on one GPU: the networks are small, and most of an update is launches
TRAINING: dict[str, Any] = {  # where the map of when.py shows the largest gain of the student's own states
    "env": "digits",
    "seeds": 3,
    "baseline": "forward",
    "primary": "frechet_to_expert",
    "shared": {"num_updates": 1000, "num_steps": 8, "guidance_scale": 7.0, "evaluate": {"n": 1000}},
    "arms": {
        "forward": {"agent": "dagger", "beta": {"forward": 1.0, "teacher": 0.0, "student": 0.0}},
        "student": {"agent": "dagger", "beta": {"forward": 0.5, "teacher": 0.0, "student": 0.5}},
        **{cls.name: {"agent": cls.name} for cls in LEARNERS if cls is not Dagger},
    },
}
DRY_TRAINING = {
    "env": "gaussian_mixture",
    "seeds": 1,
    "shared": {"num_updates": 2, "num_steps": 2, "evaluate": {"n": 20, "n_paths": 4, "n_action": 4}},
    "arms": {"bc": {"agent": "bc"}},
}


def correctness(part: Part) -> None:
    """Part a."""
    updates = 3 if part.dry else 20
    check_pictures(part, "digits8" if part.dry else "digits", (Dagger, DMD2) if part.dry else LEARNERS, updates)
    with part.attempt("pytest -m gpu"):
        run_marked_tests(part)
    gpu_worlds.correctness(part, updates)
    if not part.dry:
        check_pictures(part, "coloured_digits", FEW, updates)


def data(part: Part) -> None:
    """Part e."""
    capacity, batch_size, repeats, states = (96, 16, 3, 32) if part.dry else (4096, 256, 100, 1024)
    with part.attempt("draws"):
        result = buffer.measure(part.device, capacity, batch_size, repeats)
        for name, ratio in result["ratio"].items():
            part.add(f"draw of {batch_size} of {capacity}, {name}", ms=result["median_ms"][name], to_raw_index=ratio, target="≤ 1.5")
    for name in ("digits8",) if part.dry else ("digits", "coloured_digits"):
        with part.attempt(f"collection, {name}"):
            learner = Dagger(load_expert(name, device=part.device), settings(Dagger, collect_size=states))
            for _ in range(2):  # fills caches
                learner.trainer.collect()
            times = []
            for _ in range(3):
                synchronize(part.device)
                start = time.perf_counter()
                learner.trainer.collect()
                synchronize(part.device)
                times.append(time.perf_counter() - start)
            copies: dict[str, int] = {}
            if part.on_gpu:
                with torch.profiler.profile() as profiler:
                    learner.trainer.collect()
                    synchronize(part.device)
                copies = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("Memcpy")}
            told = [f"{count} × {key}" for key, count in copies.items()]
            part.add(f"collection of {states}, {name}", ms=1e3 * statistics.median(times), states_per_s=states / min(times), copies=told)
    gpu_worlds.rollouts(part)


def training(part: Part, folder: Path) -> None:
    """Part f."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "comparison.yaml"
    config.write_text(yaml.safe_dump(DRY_TRAINING if part.dry else TRAINING, sort_keys=False))
    command = [sys.executable, "-m", "ddil_agents.compare", "--config", str(config), "--out", str(folder)]
    command += ["--jobs", str(1 if part.dry else JOBS)]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with (folder / "compare.log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=max(part.left - 3, 1))
        except subprocess.TimeoutExpired:
            pass  # the comparison goes on where it stopped
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it and its runs, which are in a session of their own; checkpoints are whole
                process.wait()
    for path in sorted(folder.glob("runs/updates/*/result.json")):
        result = read_result(path)
        row = student_row(result)
        scores = {key: row[key] for key in ("frechet", "frechet_to_expert", "recall", "train_seconds") if row.get(key) is not None}
        part.add(path.parent.name, **scores, updates_per_s=result["num_updates"] / row["train_seconds"])
    log_tail = (folder / "compare.log").read_text(errors="replace").splitlines()[-20:]
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError("\n".join([f"the comparison ended with {process.returncode}:", *log_tail]))


class Kind(NamedTuple):
    title: str
    measure: Callable[..., None]
    share: float  # of the minutes


PARTS = {
    "a": Kind("Correctness: the GPU beside the CPU", correctness, 0.24),
    "b": Kind("Rollouts beside diffusers' pipeline", rollouts, 0.14),
    "c": Kind("Gradient steps and the whole job beside the field's scripts", steps, 0.33),
    "d": Kind("Memory", memory, 0.10),
    "e": Kind("Buffer and collections", data, 0.03),
    "f": Kind("Training", training, 0.10),
    "g": Kind("Profiles", profiles, 0.06),
}


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, results.md and the profiles")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", default="".join(PARTS), help=f"letters of {''.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="on the CPU with tiny shapes")
    parser.add_argument("--training", type=Path, help="folder of part f, which goes on with what is there; default: OUT/training")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    asked = [letter for letter in PARTS if letter in args.parts]
    if not asked or set(args.parts) - set(PARTS) - {","}:
        parser.error(f"--parts {args.parts}: need letters of {''.join(PARTS)}")
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU is to be had here; --dry runs every part on the CPU with tiny shapes")
    device = "cpu" if args.dry else "cuda"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    for harmless in (".*more features than samples.*", "TF32 acceleration on top of oneDNN"):
        warnings.filterwarnings("ignore", message=harmless)
    buffer.keep_freed_memory()
    facts = {"command": shlex.join(["python", "benchmarks/gpu.py", *given]), **provenance(torch.device(device))}
    report = Report(args.out, {**facts, "cuda": torch.version.cuda, "dry": args.dry})
    whole, ends = sum(PARTS[letter].share for letter in asked), 0.0
    for letter in asked:
        title, measure, share = PARTS[letter]
        ends += 60 * args.minutes * share / whole
        part = report.parts[letter] = Part(report, title, device, args.dry, start + ends - time.monotonic())
        print(f"{letter}. {title}", flush=True)
        options = {"folder": args.training or args.out / "training"} if letter == "f" else {}
        part.run(measure, **options)
        print(f"{letter}. {part.status}, {part.seconds:.0f} s", flush=True)
        rest = "".join(asked[asked.index(letter) + 1 :])
        if rest and not device_works(device):
            left = max(args.minutes - (time.monotonic() - start) / 60, 0.5)
            go_on = ["--out", str(args.out / f"after_{letter}"), "--minutes", f"{left:.2f}", "--parts", rest]
            go_on += ["--training", str(args.training or args.out / "training")]
            os.execv(sys.executable, [sys.executable, __file__, *go_on])


if __name__ == "__main__":
    main()
