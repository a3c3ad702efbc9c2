"""What both sides of `gpu_job.py` start from: a pipeline's folder, and a folder of pictures with captions."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddil_env.experts.coloured_digits import captions, draw_pictures


@dataclass(frozen=True)
class Job:
    """What both sides do.

    Attributes:
        pictures: In the folder.
        side: Of a picture, in pixels.
        guidance_range: Between which w is drawn, with the 1.
        judged: Updates after which the averaged weights are judged; none where there is nothing to judge by.
        n: Samples of a judging.
    """

    name: str
    pictures: int
    side: int
    batch_size: int
    updates: int
    learning_rate: float
    guidance_range: tuple[float, float]
    judged: tuple[int, ...] = ()
    n: int = 504


COLOURED_DIGITS = Job("coloured digits", 2048, 32, 32, 300, 5e-5, (1, 5), (20, 40, 80, 150, 300))
SD15 = Job("Stable Diffusion 1.5's sizes, random weights", 256, 512, 8, 30, 1e-5, (6, 16))
TINY = replace(COLOURED_DIGITS, pictures=12, batch_size=4, updates=2, judged=(1, 2), n=16)


def write_pictures(job: Job, folder: Path) -> Path:
    """A folder of pictures, each beside a text file of its caption."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    if job.side == 32:
        pixels, c = draw_pictures(job.pictures, "train", False, generator)
        texts = [captions()[i] for i in c.tolist()]
    else:  # smooth, as a photograph is beside noise: the cost of a JPEG goes with its detail
        coarse = torch.rand(job.pictures, 3, 16, 16, generator=generator) * 2 - 1
        pixels = torch.nn.functional.interpolate(coarse, size=(job.side, job.side), mode="bicubic").clamp(-1, 1)
        texts = [f"picture number {i}, of many colours" for i in range(job.pictures)]
    for i, (picture, text) in enumerate(zip(pixels, texts, strict=True)):
        array = ((picture.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(folder / f"{i:05d}.{'png' if job.side == 32 else 'jpg'}")
        (folder / f"{i:05d}.txt").write_text(text)
    return folder


def write_pipeline(job: Job, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """The pipeline's folder: the shipped one, or Stable Diffusion 1.5's architecture with random weights."""
    if job.side == 32:
        return Path(str(files("ddil_env") / "experts" / "weights" / "coloured_digits"))
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny_sd import write_tokenizer

    write_tokenizer(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 77}))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=512,
            ),
            "text_encoder": CLIPTextModel(text),
        }
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1)
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(
        **{name: part.to(dtype) for name, part in parts.items()}, tokenizer=tokenizer, scheduler=scheduler, **others
    ).save_pretrained(folder)
    return folder
