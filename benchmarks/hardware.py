"""Which cards hold an update of DMD2, the learner with the most networks: Stable Diffusion 1.5, SDXL and Stable Diffusion 3.5 medium.

    python benchmarks/hardware.py

Memory is counted as in memory.py, on architectures without weights, and not measured. A card holds an update if the peak leaves 2 GB of it
free for what is not counted: CUDA's context, workspaces inside of kernels, gaps in the allocator, and the buffer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from gpu_memory import SDXL
from memory import RESULTS, Inputs, Setting, account, its_inputs, stable_diffusion
from torch import nn

from ddil_env.adapters import LoRA

CARDS = (12, 24, 80)  # GB
FREE = 2.0  # GB that stay free
SD35_MEDIUM = {  # the rest are diffusers' defaults
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


def sdxl() -> nn.Module:
    """SDXL's UNet, without numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)  # type: ignore[no-any-return]


def sdxl_inputs(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Its arguments, for n pictures of 1024 × 1024."""
    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    return {
        "sample": torch.empty(n, 4, 128, 128, **options),
        "timestep": torch.empty(n, device="meta"),
        "encoder_hidden_states": torch.empty(n, 77, 2048, **options),
        "added_cond_kwargs": {"text_embeds": torch.empty(n, 1280, **options), "time_ids": torch.empty(n, 6, **options)},
    }


def sd3() -> nn.Module:
    """The transformer of Stable Diffusion 3.5 medium, without numbers."""
    with torch.device("meta"):
        return SD3Transformer2DModel(**SD35_MEDIUM)  # type: ignore[no-any-return]


def sd3_inputs(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Its arguments, for n pictures of 1024 × 1024, with T5's tokens."""
    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    return {
        "hidden_states": torch.empty(n, 16, 128, 128, **options),
        "timestep": torch.empty(n, device="meta"),
        "encoder_hidden_states": torch.empty(n, 333, 4096, **options),
        "pooled_projections": torch.empty(n, 2048, **options),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "Stable Diffusion 1.5, 512 × 512": (stable_diffusion, its_inputs),
    "SDXL, 1024 × 1024": (sdxl, sdxl_inputs),
    "Stable Diffusion 3.5 medium, 1024 × 1024": (sd3, sd3_inputs),
}
BATCHES = {"Stable Diffusion 1.5, 512 × 512": (1, 4, 8), "SDXL, 1024 × 1024": (1, 4), "Stable Diffusion 3.5 medium, 1024 × 1024": (1, 4)}
NETWORKS = {"LoRA 64": LoRA(64), "full": None}


def rows() -> list[dict[str, Any]]:
    """Counts every row: bf16 and gradient checkpointing throughout."""
    found = []
    for model, (make, inputs) in MODELS.items():
        for networks, lora in NETWORKS.items():
            for batch in BATCHES[model]:
                parts = account(make, inputs, batch, Setting(lora, torch.bfloat16, autocast=True, checkpointing=True))
                found.append({"model": model, "networks": networks, "batch": batch, "peak": parts["peak"], "peak_8bit": parts["8-bit"]})
                print(model, networks, batch, f"{parts['peak'] / 1e9:.1f} GB", flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown, GB, with the smallest card that holds each with AdamW and with 8-bit momenta."""
    lines = ["| model | networks | states at a time | peak | card | peak, 8-bit momenta | card |", "|---" * 7 + "|"]
    for row in found:
        cells = [row["model"], row["networks"], str(row["batch"])]
        for peak in (row["peak"], row["peak_8bit"]):
            card = next((f"{size} GB" for size in CARDS if peak / 1e9 + FREE <= size), "none of these")
            cells += [f"{peak / 1e9:.1f}", card]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    found = rows()
    (given.out / "hardware.json").write_text(json.dumps({"free_gb": FREE, "rows": found}, indent=1))
    (given.out / "hardware.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
