"""A training step as its public implementation takes it, to be timed beside ours: their order of work, torch's and diffusers' pieces.

    ConsistencyScript   diffusers, examples/consistency_distillation/train_lcm_distill_sd_wds.py
    DMD2Script          tianweiy/DMD2: main/train_sd.py, sd_unified_model.py and sd_guidance.py, with SDXL's backward simulation, no GAN

Both begin at ready latents and text embeddings. Left out, which favours them: data loading, VAE and text encoder, accelerate's wrapping,
and every log but the numbers that they wait for in each step. What they compute in another precision than the rest (the script's teacher
under an autocast without a dtype, DMD2's simulation and fake score in float32) is here in the same, so that the work is equal.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.functional import mse_loss

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion 1.5's
LEARNING_RATE = 1e-5


def rows(table: Tensor, t: Tensor) -> Tensor:
    """Entries of a table (T,) at t (b,), ready to multiply latents."""
    return table.gather(-1, t).reshape(-1, 1, 1, 1)


def adamw(network: nn.Module, learning_rate: float = LEARNING_RATE) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)


class ConsistencyScript:
    """Latent consistency distillation: one gradient step of the student, and the average's.

    Args:
        teacher, student: The student has a guidance embedding.
        dtype: Of autocast; float32 for none.
        learning_rate: AdamW's.
        guidance: Between which w is drawn, without the 1.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        dtype: torch.dtype,
        learning_rate: float = LEARNING_RATE,
        guidance: tuple[float, float] = (5.0, 15.0),
    ) -> None:
        self.teacher, self.student, self.dtype, self.guidance = teacher, student, dtype, guidance
        self.target = copy.deepcopy(student).requires_grad_(False)
        self.noise = DDPMScheduler(**NOISE)
        device = teacher.device
        alpha_bar = self.noise.alphas_cumprod.to(device)
        self.alpha, self.sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self.times = torch.arange(1, 51, device=device) * 20 - 1
        self.alpha_bar_next = torch.cat([alpha_bar[:1], alpha_bar[self.times[:-1]]])
        self.optimizer = adamw(student, learning_rate)
        self.rate = get_scheduler("constant", self.optimizer)
        self.autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    def x_0(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return (x - rows(self.sigma, t) * eps) / rows(self.alpha, t)

    @staticmethod
    def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
        scaled = 10.0 * t.reshape(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5

    def step(self, x_0: Tensor, text: Tensor, null: Tensor) -> tuple[float, Tensor]:
        index = torch.randint(50, (len(x_0),), device=x_0.device)
        noisy = self.noise.add_noise(x_0, torch.randn_like(x_0), self.times[index])
        low, high = self.guidance
        w = low + (high - low) * torch.rand(len(x_0))
        return self.descend(self.loss(noisy, index, w, text, null))

    def loss(self, x: Tensor, index: Tensor, w: Tensor, text: Tensor, null: Tensor) -> Tensor:
        """Of states x (b, 4, h, w) at times[index]; w (b,) on the CPU, without the 1; text and null (b, tokens, channels)."""
        t = self.times[index]
        s = (t - 20).clamp(min=0)
        w_embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256).to(x.device)
        w = w.reshape(-1, 1, 1, 1).to(x.device)
        c_skip, c_out = self.boundary(t)
        with self.autocast():
            eps = self.student(x, t, timestep_cond=w_embedding, encoder_hidden_states=text).sample
        prediction = c_skip * x + c_out * self.x_0(eps, t, x)
        with torch.no_grad():
            given = x.to(self.dtype)
            eps = self.teacher(given, t, encoder_hidden_states=text.to(self.dtype)).sample
            eps_null = self.teacher(given, t, encoder_hidden_states=null.to(self.dtype)).sample
            x_0, x_0_null = self.x_0(eps, t, x), self.x_0(eps_null, t, x)
            x_0, eps = x_0 + w * (x_0 - x_0_null), eps + w * (eps - eps_null)
            level = rows(self.alpha_bar_next, index)
            x_s = level.sqrt() * x_0 + (1 - level).sqrt() * eps
            c_skip, c_out = self.boundary(s)
            with self.autocast():
                eps = self.target(x_s.float(), s, timestep_cond=w_embedding, encoder_hidden_states=text).sample
            target = c_skip * x_s + c_out * self.x_0(eps, s, x_s)
        return (((prediction.float() - target.float()) ** 2 + 1e-6).sqrt() - 1e-3).mean()

    def descend(self, loss: Tensor) -> tuple[float, Tensor]:
        """The gradient step; returns the loss and the gradient's norm."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mean, p in zip(self.target.parameters(), self.student.parameters(), strict=True):
                mean.mul_(0.95).add_(p, alpha=0.05)
        return loss.item(), norm


class DMD2Script:
    """Distribution matching: the student's step where it is due, and the fake score's.

    Args:
        real, student, fake: The teacher and the two that learn, of one architecture.
        dtype: Of autocast; float32 for none.
        generator: Of all noise and times.
    """

    guidance_scale = 1.75
    times = (999, 749, 499, 249)

    def __init__(
        self,
        real: UNet2DConditionModel,
        student: UNet2DConditionModel,
        fake: UNet2DConditionModel,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self.student, self.guidance = student, nn.ModuleDict({"real": real, "fake": fake})
        self.dtype, self.generator = dtype, generator
        self.noise = DDIMScheduler(**NOISE)
        self.alpha_bar = self.noise.alphas_cumprod.to(real.device).double()
        self.optimizers = adamw(student), adamw(fake)
        self.rates = [get_scheduler("constant", optimizer) for optimizer in self.optimizers]
        self.autocast = partial(torch.autocast, real.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def x_0(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        level = rows(self.alpha_bar, t)
        return (x.double() - (1 - level) ** 0.5 * eps.double()) / level**0.5

    def randn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=like.device)

    def diffused(self, x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """x at a random time, low and high included; the time and the noise."""
        tau, eps = torch.randint(low, high + 1, (len(x),), generator=self.generator, device=x.device), self.randn(x)
        return self.noise.add_noise(x, eps, tau), tau, eps

    @torch.no_grad()
    def simulate(self, x: Tensor, text: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """The student's own state at times[j], from noise x."""
        for now, then in zip(self.times[:j], self.times[1:], strict=False):
            t = torch.full((len(x),), now, device=x.device)
            with self.autocast():
                eps = self.student(x, t, text).sample
            x = self.noise.add_noise(self.x_0(x, eps, t).float(), self.randn(x), torch.full_like(t, then))
        return x, torch.full((len(x),), self.times[j], device=x.device)

    def update(self, x_t: Tensor, t: Tensor, text: Tensor, null: Tensor, students_turn: bool) -> dict[str, Tensor]:
        """One iteration from states x_t at t; what it measured."""
        measured = {}
        with torch.set_grad_enabled(students_turn), self.autocast():
            eps = self.student(x_t, t, text).sample
        x = self.x_0(x_t, eps, t).float()
        if students_turn:
            self.guidance.requires_grad_(False)
            measured["loss"] = self.matching(x, text, null)
            self.guidance.requires_grad_(True)
            measured["loss"].backward()
            measured["grad_norm"] = nn.utils.clip_grad_norm_(self.student.parameters(), 10.0)
            self.optimizers[0].step()
            self.optimizers[0].zero_grad()
            self.optimizers[1].zero_grad()
        self.rates[0].step()
        measured["critic_loss"] = self.denoising(x.detach(), text)
        measured["critic_loss"].backward()
        measured["critic_grad_norm"] = nn.utils.clip_grad_norm_(self.guidance.parameters(), 10.0)
        self.optimizers[1].step()
        self.optimizers[1].zero_grad()
        self.optimizers[0].zero_grad()
        self.rates[1].step()
        return {name: value.detach() for name, value in measured.items()}

    def matching(self, x: Tensor, text: Tensor, null: Tensor) -> Tensor:
        with torch.no_grad():
            x_tau, tau, _ = self.diffused(x, 20, 980)
            with self.autocast():
                fake = self.guidance["fake"](x_tau, tau, text).sample
            pair, texts = torch.cat([x_tau] * 2).to(self.dtype), torch.cat([null, text]).to(self.dtype)
            eps_null, eps = self.guidance["real"](pair, torch.cat([tau] * 2), texts).sample.chunk(2)
            real = eps_null + self.guidance_scale * (eps - eps_null)
            p_real, p_fake = x - self.x_0(x_tau, real, tau), x - self.x_0(x_tau, fake, tau)
            grad = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True))
            grad.norm().item()  # logged in every step
        return 0.5 * mse_loss(x.float(), (x - grad).detach().float())

    def denoising(self, x: Tensor, text: Tensor) -> Tensor:
        x_tau, tau, noise = self.diffused(x, 1, 999)  # theirs from 0 on, where our schedule has no noise left
        with self.autocast():
            eps = self.guidance["fake"](x_tau, tau, text).sample
        self.x_0(x_tau, eps.detach(), tau)  # logged in every step
        return ((eps.float() - noise.float()) ** 2).mean()
