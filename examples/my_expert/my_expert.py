"""An expert of one's own: smooth one-dimensional signals, a Gaussian process whose exact denoiser is a linear filter.

    x_0 ~ N(0, K) ,   K_ij = exp(−(i − j)²/2ℓ²) = U diag(λ) Uᵀ
    x̂_0 = E[x_0 | x_t] = U diag(α λ/(α² λ + σ²)) Uᵀ x_t

Everything between the two `super()` calls and `check_expert` is what any diffusion model needs; put a network's output where the
filter is, `self.schedule.prediction(network(x_t, t, c), x_t, t, "eps")`, and the rest stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddil_env import Expert, NetworkDenoiser, NoiseSchedule, Prediction, check_expert


class SmoothSignals(Expert):
    """Signals (1, length).

    Args:
        length: Samples of a signal.
        smoothness: ℓ, in samples.
        device: Where it computes.

    Raises:
        ValueError: a smoothness that is not positive.
    """

    def __init__(self, length: int = 64, smoothness: float = 6.0, device: torch.device | str = "cpu") -> None:
        if not smoothness > 0:
            raise ValueError(f"smoothness={smoothness}: need a positive number of samples")
        super().__init__(NoiseSchedule("cosine"), sample_shape=(1, length), device=device)
        i = torch.arange(length, dtype=torch.float64)
        eigenvalues, basis = torch.linalg.eigh(torch.exp(-((i[:, None] - i) ** 2) / (2 * smoothness**2)))
        self.eigenvalues, self.basis = eigenvalues.clamp(min=0).float().to(self.device), basis.float().to(self.device)

    def predict(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        alpha, sigma = self.schedule(t, x_t)  # (b, 1, 1)
        gain = alpha * self.eigenvalues / (alpha**2 * self.eigenvalues + sigma**2)  # (b, 1, length)
        x_0 = (x_t @ self.basis * gain) @ self.basis.T
        return self.schedule.prediction(x_0, x_t, t, "x_0")

    # The rest is by choice: without data it trains data-free, without students it is for environments and evaluation alone.

    def sample_data(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        white = torch.randn(n, 1, len(self.eigenvalues), generator=generator, device=self.device)
        return white * self.eigenvalues.sqrt() @ self.basis.T, None

    def make_student(self, *, width: int = 32) -> NetworkDenoiser:
        return NetworkDenoiser(Convolutions(width, self.schedule.t_max).to(self.device), self.schedule, "v")

    def decode(self, x_0: Tensor) -> Tensor:
        """The curve, black on white, 64 pixels high."""
        height, (n, _, length) = 64, x_0.shape
        row = ((1 - x_0[:, 0].cpu() / 4) / 2 * height).long().clamp(0, height - 1)  # (n, length)
        pictures = torch.full((n, height, length, 3), 255, dtype=torch.uint8)
        pictures[torch.arange(n)[:, None], row, torch.arange(length)] = 0
        return pictures


class Convolutions(nn.Module):
    """(x_t, t, c) → an output of x_t's shape."""

    def __init__(self, width: int, t_max: float) -> None:
        super().__init__()
        self.t_max = t_max
        self.first, self.time = nn.Conv1d(1, width, 9, padding=4), nn.Linear(2, width)
        self.rest = nn.Sequential(nn.SiLU(), nn.Conv1d(width, width, 9, padding=4), nn.SiLU(), nn.Conv1d(width, 1, 9, padding=4))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        u = (t / self.t_max)[:, None]
        output: Tensor = self.rest(self.first(x_t) + self.time(torch.cat([u, (torch.pi * u).cos()], dim=1))[..., None])
        return output


if __name__ == "__main__":
    check_expert(SmoothSignals())  # silent if it conforms
