"""Pipelines of random weights, small enough for a test and saved with diffusers' own classes: SDXL, SD3, DiT and DDPM.

Latents are 8×8 of 4 channels and pictures 16×16, as in tiny_sd.py; DDPM's are pictures of 3×8×8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tiny_sd import MAX_TOKENS, write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def text_config(tokenizer: CLIPTokenizer, width: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def tiny_vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **options,
    )


def write_tiny_sdxl(folder: Path, prediction_type: str = "epsilon", seed: int = 0, force_zeros: bool = True, **unet: Any) -> Path:
    """SDXL: two text encoders of 16 and 24 channels, pooled embeddings of 12."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    with seeded(seed):
        StableDiffusionXLPipeline(
            vae=tiny_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 24, projection_dim=12)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8,
                layers_per_block=1,
                block_out_channels=(16, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=8,
                attention_head_dim=2,
                cross_attention_dim=40,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 12,
                **unet,
            ),
            scheduler=EulerDiscreteScheduler(  # as shipped with SDXL and SSD-1B
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type=prediction_type,
                timestep_spacing="leading",
                steps_offset=1,
            ),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer over single letters, read word by word."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789,.-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, vocab=pieces, extra_ids=0)


def write_tiny_sd3(folder: Path, seed: int = 0, t5: bool = False, shift: float = 3.0) -> Path:
    """SD3: text encoders of 16 and 24 channels, pooled 10 and 12, T5 of 48 by choice."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    with seeded(seed):
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=48,
                caption_projection_dim=32,
                pooled_projection_dim=22,
                pos_embed_max_size=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, 16, projection_dim=10)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 24, projection_dim=12)),
            tokenizer_2=tokenizer,
            text_encoder_3=T5EncoderModel(T5Config(vocab_size=64, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2)) if t5 else None,
            tokenizer_3=t5_tokenizer() if t5 else None,
        ).save_pretrained(folder)
    return folder


def write_tiny_dit(folder: Path, seed: int = 0, classes: int = 1000, learned_sigma: bool = True) -> Path:
    """DiT: by default of 1000 classes, which DiTPipeline takes for granted when it guides."""
    with seeded(seed):
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learned_sigma else 4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )
        DiTPipeline(
            transformer=transformer, vae=tiny_vae(), scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False)
        ).save_pretrained(folder)
    path = folder / "model_index.json"
    names = {str(i): f"thing {i}, object {i}" for i in range(classes)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    return folder


def write_tiny_ddpm(folder: Path, seed: int = 0, **unet: Any) -> Path:
    """DDPM: pictures of 3×8×8."""
    with seeded(seed):
        model = UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
            **unet,
        )
        DDPMPipeline(unet=model, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "ssd1b": write_tiny_sdxl,
    "sd3": write_tiny_sd3,
    "dit": write_tiny_dit,
    "ddpm": write_tiny_ddpm,
}
