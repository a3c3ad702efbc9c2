"""Part d of `gpu.py`: the memory that updates of DMD2 take, beside what `memory.py` counts, and the largest batch that fits."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from gpu_report import Part, free_memory
from memory import RESULTS, Meter, Setting, settings
from rollout import sd_expert

from ddil_agents import DMD2, DMD2Config
from ddil_env import Expert, load_expert
from ddil_env.adapters import LoRA
from ddil_env.pipelines.prompts import Embeddings

BATCH = 8
RANK = 64
SDXL = {  # the rest are diffusers' defaults
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def sdxl_expert(device: str, dtype: str, tiny: bool) -> Expert:
    """SDXL's expert over a UNet of random weights; the tiny one of the tests, or the real one's architecture."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny_pipelines import write_tiny_sdxl

    expert: Any
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_sdxl(Path(folder)))
        expert = load_expert("sdxl", model=model, prompts=list("abcdefgh"), dtype=dtype, device=device)
    if not tiny:
        with torch.device(device):
            unet = UNet2DConditionModel(**SDXL).to(expert.dtype).eval().requires_grad_(False)
            expert.embeddings = Embeddings({"text": torch.randn(9, 77, 2048), "pooled": torch.randn(9, 1280)})
        expert.time_ids = (1024, 1024, 0, 0, 1024, 1024)
        expert.network, expert.sample_shape = expert.wrap(unet), (4, 128, 128)
    return expert


def peak(expert: Expert, batch_size: int, setting: Setting, optimizer: str = "adamw") -> int:
    """The most bytes that two updates take, a step of student and critic in each; on a CPU beside what was there before."""
    config = DMD2Config(
        batch_size=batch_size,
        critic_updates=1,
        num_updates=100,
        lora=setting.lora,
        student={"gradient_checkpointing": setting.checkpointing},
        mixed_precision="bf16" if setting.autocast else "no",
        optimizer=optimizer,  # type: ignore[arg-type]
    )
    on_gpu, meter = expert.device.type == "cuda", Meter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    learner = DMD2(expert, config)
    for _ in range(2):  # the first makes the momenta
        learner.trainer.collect()
        batch = learner.draw()
        if on_gpu:
            learner.trainer.update(batch)
        else:
            with meter:
                learner.trainer.update(batch)
    return torch.cuda.max_memory_allocated() if on_gpu else meter.peak


def largest_batch(part: Part, expert: Expert, setting: Setting, least: int, most: int) -> None:
    """Doubles the batch until memory runs out, and adds half of the last one that fitted."""
    fits, batch_size = 0, least
    while batch_size <= most:
        try:
            used = peak(expert, batch_size, setting)
        except (MemoryError, torch.OutOfMemoryError):
            if not fits or batch_size < 2 * fits:
                break
            batch_size = fits + fits // 2
        else:
            part.add("the largest batch: fits", batch=batch_size, peak_gb=used / 1e9)
            if batch_size != fits + fits // 2 or not fits:
                fits, batch_size = batch_size, 2 * batch_size
            else:
                break
        free_memory()


def memory(part: Part) -> None:
    """Part d."""
    dtype, batch_size = ("float32", 2) if part.dry else ("bfloat16", BATCH)
    expert = sd_expert("sd" if part.dry else "sd15", part.device, dtype)
    counted = json.loads((RESULTS / "memory.json").read_text())["bytes"]
    rank = 2 if part.dry else RANK
    within = "LoRA 2, float32, checkpointing" if part.dry else "bf16"  # in float32 the networks would take most of the part's time
    asked = {name: setting for name, setting in settings(rank).items() if within in name}
    for optimizer, column in (("adamw", "peak"), ("adamw8bit", "8-bit")):
        if optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            part.add("8-bit momenta", left_out="bitsandbytes is not installed here")
            continue
        for name, setting in asked.items():
            told = name if optimizer == "adamw" else f"{name}, 8-bit momenta"
            with part.attempt(told):
                found = peak(expert, batch_size, setting, optimizer)
                beside = {} if part.dry else {"counted_gb": counted[name][column] / 1e9, "ratio": found / counted[name][column]}
                part.add(told, batch=batch_size, peak_gb=found / 1e9, **beside)
    lean = Setting(LoRA(rank), expert.network.core.dtype, not part.dry, checkpointing=True)
    with part.attempt("SDXL with LoRA"):
        large = sdxl_expert(part.device, dtype, tiny=part.dry)
        for n in (1,) if part.dry else (1, 4, BATCH):
            part.add(f"SDXL, LoRA {rank}, checkpointing", batch=n, peak_gb=peak(large, n, lean) / 1e9)
            free_memory()
        del large
    with part.attempt("the largest batch"):
        largest_batch(part, expert, lean, batch_size, batch_size if part.dry else 512)
