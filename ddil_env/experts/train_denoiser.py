"""The training of the small experts of worlds: denoising score matching on pairs of sample and condition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ddil_env.denoiser import NetworkDenoiser
from ddil_env.prediction import Prediction


def train_denoiser(
    network: NetworkDenoiser,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    updates: int,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    ema: float = 0.999,
) -> float:
    """Minimises E ‖v_θ(α_t x_0 + σ_t ε, t, c) − v‖², t uniform, ε ~ N(0, I), and leaves the average of the weights in the network.

    Args:
        network: A denoiser in v.
        draw: b → samples (b, *sample_shape) and their conditions (b, *condition_shape).
        updates: Gradient steps of AdamW, one cycle of the learning rate.
        batch_size: b.
        learning_rate: The highest of the cycle.
        ema: Decay of the average of the weights.

    Returns:
        The mean loss of the last tenth of the updates.
    """
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, updates)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema))
    losses = []
    for _ in tqdm(range(updates), unit="update"):
        x_0, c = draw(batch_size)
        t = torch.randint(1, network.schedule.num_train_steps, (batch_size,), device=x_0.device).float()
        eps = torch.randn_like(x_0)
        predicted = network(network.schedule.add_noise(x_0, eps, t), t, c)
        loss = (predicted.output("v") - Prediction(x_0, eps, t, network.schedule).output("v")).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()
        average.update_parameters(network)
        losses.append(loss.detach())
    network.load_state_dict(average.module.state_dict())
    return float(torch.stack(losses[-max(1, updates // 10) :]).mean())


def save_expert(path: Path, network: NetworkDenoiser, data: dict[str, Tensor]) -> None:
    """Writes the weights (`network.…`) and what else the expert needs to a safetensors file, and prints its size."""
    stored = {f"network.{name}": value.contiguous() for name, value in network.network.state_dict().items()}
    save_file(stored | {name: value.contiguous() for name, value in data.items()}, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
