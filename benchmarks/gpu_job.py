"""The whole job of distilling an LCM from a folder of pictures, as people live it: diffusers' script against this library.

    python benchmarks/gpu_job.py [--updates 200] [--out benchmarks/results/whole_job]     # coloured digits, on the CPU

Both start from the same pipeline's folder and the same folder of pictures with captions, and take as many updates of as many pictures.

    script          diffusers' train_lcm_distill_sd_wds.py: every step reads and crops its pictures and runs the tokenizer, the text encoder
                    and the VAE before peers.ConsistencyScript's loss
    ours, fresh     load_expert(…, data=folder), which makes the cache of latents and embeddings once, then LCM(…).learn(): each state is
                    labelled anew, as the script does
    ours, reused    with LCM's own default, that a label serves about four times

The clock starts before a model is read; our cache is counted. Not counted is the judging: the Fréchet distance, to held-out pictures, of
samples in one step, where training shows most, by the averaged weights after some updates. `to_same_frechet` is the time at which a side
first reaches the distance that both reach; between two judged updates it is interpolated. On a CPU the clock is the processor's time, with
the pictures read in this process.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from buffer import keep_freed_memory
from diffusers import AutoencoderKL, UNet2DConditionModel
from gpu_job_files import COLOURED_DIGITS, Job, write_pictures, write_pipeline
from gpu_report import cell
from peers import ConsistencyScript
from PIL import Image
from throughput import PRECISION
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from ddil_agents import LCM, Algorithm, Batch, Beta, Callback, LCMConfig
from ddil_agents.evaluation.metrics.extractors import load_extractor
from ddil_agents.evaluation.metrics.frechet import frechet_distance
from ddil_agents.evaluation.provenance import provenance
from ddil_env import load_expert

TARGET = 2.0
REUSE = 4  # gradient steps that a label serves, in LCM's defaults
State = dict[str, Tensor]


class Clock:
    """Seconds since it was made, without those of the body of `stopped`."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.outside, self.start = 0.0, 0.0
        self.start = self.now()

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self.on_gpu else time.process_time()

    @property
    def seconds(self) -> float:
        return self.now() - self.start - self.outside

    @contextmanager
    def stopped(self) -> Iterator[None]:
        before = self.now()
        yield
        self.outside += self.now() - before


@dataclass
class Outcome:
    """Seconds until the first update, and until the last; the seconds and the averaged weights of the judged updates."""

    set_up: float
    total: float
    kept: list[tuple[float, State]]


def kept(unet: torch.nn.Module) -> State:
    return {name: value.detach().float().cpu().clone() for name, value in unet.state_dict().items()}


# Their side.


class ScriptPictures(Dataset[tuple[Tensor, str]]):
    """Pictures as the script's loader gives them: the shorter side resized, a random square of it, in ±1."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths, self.side = sorted(path for path in folder.iterdir() if path.suffix != ".txt"), side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        image = Image.open(self.paths[i]).convert("RGB")
        scale = self.side / min(image.size)
        width, height = (max(self.side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(length - self.side + 1, ())) for length in (width, height))
        array = np.array(image.crop((left, top, left + self.side, top + self.side)))
        return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1, self.paths[i].with_suffix(".txt").read_text()


class Script:
    """The script's models, and its step from pictures and captions."""

    def __init__(self, job: Job, pipeline: Path, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder").requires_grad_(False).to(device, dtype)
        self.vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae").requires_grad_(False).to(device, dtype)
        teacher = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").requires_grad_(False)
        student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=256)
        student.load_state_dict(teacher.state_dict(), strict=False)
        low, high = job.guidance_range
        self.step = ConsistencyScript(
            teacher.to(device, dtype).eval(), student.to(device).train(), dtype, job.learning_rate, (low - 1, high - 1)
        )
        self.null = self.embed([""])

    def embed(self, texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": self.tokenizer.model_max_length, "truncation": True, "return_tensors": "pt"}
        return self.text_encoder(self.tokenizer(texts, **options).input_ids.to(self.device))[0]

    def encode(self, pixels: Tensor) -> Tensor:
        latents = [self.vae.encode(part).latent_dist.sample() for part in pixels.to(self.dtype).split(32)]
        return torch.cat(latents) * self.vae.config.scaling_factor

    def __call__(self, pixels: Tensor, texts: list[str]) -> None:
        pixels = pixels.to(self.device, non_blocking=True)
        text = self.embed(texts).float()
        self.step.step(self.encode(pixels).float(), text, self.null.float().expand_as(text))


def theirs(job: Job, pipeline: Path, pictures: Path, device: str, dtype: torch.dtype) -> Outcome:
    clock, on_gpu = Clock(device), device.startswith("cuda")
    script = Script(job, pipeline, device, dtype)
    workers = {"num_workers": 8, "persistent_workers": True, "pin_memory": True} if on_gpu else {}
    loader = DataLoader(ScriptPictures(pictures, job.side), job.batch_size, shuffle=True, drop_last=True, **workers)
    set_up, found, done = clock.seconds, [], 0
    while done < job.updates:
        for pixels, texts in loader:
            script(pixels, list(texts))
            done += 1
            if done in job.judged:
                with clock.stopped():
                    found.append((clock.seconds, kept(script.step.target)))
            if done == job.updates:
                break
    return Outcome(set_up, clock.seconds, found)


# Ours.


class Keeper(Callback):
    """Notes when the first update was over, and keeps the averaged weights of the judged ones."""

    def __init__(self, job: Job, clock: Clock) -> None:
        self.job, self.clock = job, clock
        self.found: list[tuple[float, State]] = []

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> None:
        if agent.step in self.job.judged:
            with self.clock.stopped():
                self.found.append((self.clock.seconds, kept(agent.ema_student.network.core)))


def ours(job: Job, pipeline: Path, pictures: Path, device: str, dtype: torch.dtype, reuse: int) -> Outcome:
    clock, on_gpu = Clock(device), device.startswith("cuda")
    name = str(dtype).removeprefix("torch.")
    cache = pictures.with_name(f"{reuse}.pairs")
    shutil.rmtree(cache, ignore_errors=True)
    data = {"data": str(pictures), "data_cache": str(cache), "held_out": 0.0, "workers": 8 if on_gpu else 0}
    low, high = job.guidance_range
    scale = min(max(3.0, low), high)  # inside the range
    expert = load_expert("sd15", model=str(pipeline), guidance_scale=scale, dtype=name, device=device, local_files_only=True, **data)
    collect = {"collect_size": job.batch_size, "updates_per_collect": 1, "capacity": job.batch_size}
    if reuse > 1:
        collect = {"collect_size": 4 * job.batch_size, "updates_per_collect": 4 * reuse}
    config = LCMConfig(
        num_updates=job.updates,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler="constant",
        warmup_updates=0,
        weight_decay=0.01,
        adam_betas=(0.9, 0.999),
        guidance_range=job.guidance_range,
        beta=Beta(1, 0, 0),
        mixed_precision=PRECISION[name],  # type: ignore[arg-type]
        **collect,
    )
    learner = LCM(expert, config)
    set_up, keeper = clock.seconds, Keeper(job, clock)
    learner.learn(job.updates, progress=False, callbacks=[keeper])
    return Outcome(set_up, clock.seconds, keeper.found)


# Both.


class Judge:
    """The Fréchet distance of coloured digits, sampled in one step, to held-out pictures."""

    def __init__(self, job: Job, device: str) -> None:
        self.expert = load_expert("coloured_digits", device=device)
        self.learner = LCM(self.expert, LCMConfig(num_steps=1, guidance_range=job.guidance_range))
        self.extractor = load_extractor(self.expert.extractor)
        real, self.c = self.expert.reference_data(job.n, held_out=True)
        self.real = self.features(real)

    def features(self, x_0: Tensor) -> Any:
        return self.extractor.features(self.expert.decode(x_0))

    def __call__(self, unet: State) -> float:
        self.learner.ema_student.network.core.load_state_dict(unet)
        return float(frechet_distance(self.real, self.features(self.learner.sample(len(self.c), c=self.c))))


def time_to(target: float, course: list[tuple[float, float]]) -> float:
    """Seconds at which a course of (seconds, distance) first reaches a distance; ∞ if it never does."""
    if course[0][1] <= target:
        return course[0][0]
    for (t, d), (t_next, d_next) in pairwise(course):
        if d_next <= target:
            return t + (t_next - t) * (d - target) / (d - d_next)
    return math.inf


def compare(job: Job, device: str, work: Path | None = None) -> list[dict[str, Any]]:
    """A row for each side, and for each of our ways to label.

    Args:
        job: What is done.
        device: Where.
        work: Folder for the courses of the distances, as JSON; None writes none.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    sides: dict[str, Callable[..., Outcome]] = {"script": theirs}
    sides |= {name: lambda *args, reuse=reuse: ours(*args, reuse) for name, reuse in (("ours, fresh", 1), ("ours, reused", REUSE))}
    with tempfile.TemporaryDirectory() as folder:
        pipeline = write_pipeline(job, Path(folder) / "pipeline", device, dtype)
        pictures = write_pictures(job, Path(folder) / "pictures")
        outcomes = {}
        for name, side in sides.items():
            torch.manual_seed(0)
            outcomes[name] = side(job, pipeline, pictures, device, dtype)
            torch.cuda.empty_cache()
    courses: dict[str, list[tuple[float, float]]] = {}
    if job.judged:
        judge = Judge(job, device)
        courses = {name: [(t, judge(unet)) for t, unet in outcome.kept] for name, outcome in outcomes.items()}
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
            (work / f"{job.name.replace(' ', '_')}.json").write_text(json.dumps(courses, indent=1) + "\n")
    return rows(job, outcomes, courses)


def rows(job: Job, outcomes: dict[str, Outcome], courses: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """The table; ratios are the script's time over ours."""
    per_update = {name: (each.total - each.set_up) / job.updates for name, each in outcomes.items()}
    same = max((min(distance for _, distance in course) for course in courses.values()), default=math.nan)  # that all reach
    times = {name: time_to(same, course) for name, course in courses.items()}
    found = []
    for name, outcome in outcomes.items():
        row: dict[str, Any] = {
            "name": f"whole job, {job.name}, {name}",
            "set_up_s": outcome.set_up,
            "ms_per_update": 1e3 * per_update[name],
            "images_per_s": job.updates * job.batch_size / outcome.total,
            "ratio": outcomes["script"].total / outcome.total,
            "ratio_of_updates": per_update["script"] / per_update[name],
        }
        if courses:
            row |= {"frechet": courses[name][-1][1], "same_frechet": same, "to_same_frechet_s": times[name]}
            row |= {"ratio_to_same_frechet": times["script"] / times[name]}
        found.append({**row, "target": None if name == "script" else TARGET})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--updates", type=int, help="default: 300")
    parser.add_argument("--out", type=Path, help="also write OUT.json and OUT.md")
    args = parser.parse_args(argv)
    keep_freed_memory()
    job = COLOURED_DIGITS
    if args.updates is not None:
        job = replace(job, updates=args.updates, judged=(*(n for n in job.judged if n < args.updates), args.updates))
    table = compare(job, args.device, None if args.out is None else args.out.parent)
    facts = provenance(torch.device(args.device)) | {"updates": job.updates, "batch_size": job.batch_size, "pictures": job.pictures}
    columns = list(table[0])
    lines = ["; ".join(f"{key}: {value}" for key, value in facts.items()), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row[key]) for key in columns)} |" for row in table]
    print("\n".join(lines))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": table}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
