"""What a denoising costs through the MDP over a bare loop around the same network.

    python benchmarks/rollout.py [--cases digits@4 digits@8 sd] [--rounds 60] [--profile] [--out rollout.json]

Every way is timed once a round, in an order drawn anew, all in one process, so that a busy machine slows them alike; a ratio is the
median over rounds of the ratios to the bare loop of the same round, with a distribution-free 95 % interval. The ways:

    bare       the least that anyone could write: DDIM's coefficients are numbers before the clock starts, and no state is kept
    unroll     the fast path, `unroll(ExpertPolicy(expert), grid, x_T, c)`: every state of every sample, in one block
    collector  `Collector.rollout`: the same, and noise, conditions, and every state's label
    env        `env.rollout(N, policy)`: TorchRL's loop over the same policy
    pipeline   diffusers' StableDiffusionPipeline on ready embeddings, to latents
    limit      the network alone, N times on one input

Target: unroll / bare ≤ 1.02. "own" is what a way costs a step around a network that does nothing, less sensitive to a busy machine.
The `sd` cases are UNets of random weights under guidance (a batched pair): `sd` is that of tests/tiny_sd.py, `sd_wide` twice as wide on
twice the side, and `sd15`, by default where there is a GPU, Stable Diffusion 1.5's in bfloat16 (not yet run: no GPU was to be had).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from buffer import hardware, keep_freed_memory, seconds
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from ddil_agents.states.collect import Collector
from ddil_env import DenoisingEnv, Expert, ExpertPolicy, StudentPolicy, TimeGrid, load_expert
from ddil_env.pipelines.networks import PromptedUNet
from ddil_env.pipelines.prompts import Embeddings
from ddil_env.rollout import unroll

GUIDANCE = 7.5
CASES = {"digits@4": (64, 4), "digits@8": (64, 8), "sd": (8, 4), "sd_wide": (8, 4), "sd15": (8, 4)}  # batch and steps
TINY = {
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd": {**TINY, "sample_size": 8, "block_out_channels": (16, 32)},
    "sd_wide": {**TINY, "sample_size": 16, "block_out_channels": (32, 64)},
    "sd15": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},  # diffusers' defaults are the rest of SD 1.5
}
Way = Callable[[], Tensor | None]  # the samples, or None where they do not come from the same noise


class Output(NamedTuple):
    sample: Tensor


class Nothing(nn.Module):
    """A UNet's stand-in that costs nothing: its output is its input."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.conv_in = nn.Conv2d(1, 1, 1, dtype=unet.dtype)  # where PromptedUNet reads the dtype

    def forward(self, x_t: Tensor, *args: object, **kwargs: object) -> Output:
        return Output(x_t)


def numbers(expert: Expert, grid: TimeGrid) -> list[tuple[float, float, float, float]]:
    """α_t, σ_t, α_s, σ_s of every step."""
    alpha, sigma = expert.schedule.coefficients(grid.times)
    return [(*now, *then) for now, then in pairwise(zip(alpha.tolist(), sigma.tolist(), strict=True))]


def bare_digits(expert: Any, grid: TimeGrid, x_T: Tensor, c: Tensor) -> dict[str, Way]:
    """v-prediction, thresholded: x̂_0 = clamp(α_t x − σ_t v), x ← (α_s − r α_t) x̂_0 + r x with r = σ_s/σ_t."""
    times = [t.expand(len(x_T)) for t in grid.times[:-1]]
    steps = [(t, a, b, a_s - b_s / b * a, b_s / b) for t, (a, b, a_s, b_s) in zip(times, numbers(expert, grid), strict=True)]
    network = expert.network

    @torch.no_grad()
    def bare() -> Tensor:
        x = x_T
        for t, alpha, sigma, gain, ratio in steps:
            x_0 = (alpha * x - sigma * network(x, t, c)).clamp(-1, 1)
            x = gain * x_0 + ratio * x
        return x

    @torch.no_grad()
    def limit() -> None:
        for t in times:
            network(x_T, t, c)

    return {"bare": bare, "limit": limit}


def bare_sd(expert: Any, grid: TimeGrid, x_T: Tensor, c: Tensor) -> dict[str, Way]:
    """ε-prediction, guided: x ← (α_s/α_t) x + (σ_s − α_s σ_t/α_t) ε̂."""
    times = [t.expand(2 * len(x_T)) for t in grid.times[:-1]]
    steps = [(t, a_s / a, b_s - a_s * b / a) for t, (a, b, a_s, b_s) in zip(times, numbers(expert, grid), strict=True)]
    unet, table = expert.network.unet, expert.network.embeddings.tables["text"]
    dtype = unet.dtype  # diffusers walks all parameters to tell it
    text = torch.cat([table[c], table[-1:].expand(len(c), -1, -1)])  # (2b, tokens, channels)

    @torch.no_grad()
    def bare() -> Tensor:
        x = x_T
        for t, gain, slope in steps:
            eps, eps_null = unet(torch.cat([x, x]).to(dtype), t, encoder_hidden_states=text).sample.float().chunk(2)
            x = gain * x + slope * torch.lerp(eps_null, eps, GUIDANCE)
        return x

    @torch.no_grad()
    def limit() -> None:
        pair = torch.cat([x_T, x_T]).to(dtype)
        for t in times:
            unet(pair, t, encoder_hidden_states=text)

    # First-order DPM-Solver++ that ends at σ = 0 is DDIM, here at our times: the scheduler that `save_student` writes.
    scheduler = DPMSolverMultistepScheduler(
        **expert.noise.options,
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="linspace",
        steps_offset=1,  # unused by this spacing; another value makes the pipeline warn
    )
    pipe = StableDiffusionPipeline(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def pipeline() -> Tensor:
        return pipe(
            prompt_embeds=text[: len(c)],
            negative_prompt_embeds=text[len(c) :],
            latents=x_T.to(dtype),
            num_inference_steps=grid.num_steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images

    return {"bare": bare, "limit": limit, "pipeline": pipeline}


def sd_expert(name: str, device: str, dtype: str) -> Any:
    """Stable Diffusion's expert over a UNet of random weights, with 8 prompts."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny_sd import write_tiny_sd

    torch.manual_seed(0)
    expert: Any
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_sd(Path(folder)))
        expert = load_expert("sd15", model=model, prompts=list("abcdefgh"), guidance_scale=GUIDANCE, dtype=dtype, device=device)
    config = UNETS[name]
    with torch.device(device):  # a large one takes long to draw on a CPU
        unet = UNet2DConditionModel(**config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    table = torch.randn(9, 77, config["cross_attention_dim"], device=device, dtype=unet.dtype)
    expert.network = PromptedUNet(unet, Embeddings({"text": table}))
    expert.sample_shape = (4, config["sample_size"], config["sample_size"])
    return expert


def ways(name: str, device: str, nothing: bool = False) -> dict[str, Way]:
    """Every way to run one case; with `nothing`, around a network that does nothing."""
    batch_size, num_steps = CASES[name]
    torch.manual_seed(0)
    dtype = "bfloat16" if name == "sd15" else "float32"
    expert: Any = load_expert("digits", device=device) if name.startswith("digits") else sd_expert(name, device, dtype)
    if nothing:
        expert.network.unet = Nothing(expert.network.unet)
    x_T = torch.randn(batch_size, *expert.sample_shape, device=device)
    c = torch.arange(batch_size, device=device) % expert.num_conditions
    policy, grid = ExpertPolicy(expert), TimeGrid(expert.schedule, num_steps).to(device)
    env = DenoisingEnv(expert, num_steps, [batch_size])
    collector = Collector(policy, StudentPolicy(expert, expert), grid, seed=0, states_per_rollout="all")

    def by_collector() -> None:
        collector.rollout(batch_size, p_expert=1.0)

    def by_env() -> None:
        with torch.no_grad():
            env.rollout(num_steps, policy)

    bare = bare_digits if name.startswith("digits") else bare_sd
    ours: dict[str, Way] = {"unroll": lambda: unroll(policy, grid, x_T, c)[:, -1], "collector": by_collector, "env": by_env}
    return bare(expert, grid, x_T, c) | ours


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval, from order statistics."""
    values, n = sorted(values), len(values)
    low = max(int((n - 1.96 * n**0.5) / 2), 0)  # the number below the median is Binomial(n, 1/2)
    return statistics.median(values), values[low], values[n - 1 - low]


def timed(calls: dict[str, Way], device: str, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name in random.sample(list(calls), len(calls)):
            elapsed = seconds(calls[name], device, clock)
            if i >= 3:  # the first rounds warm up
                times[name].append(elapsed)
    return times


def measure(name: str, device: str, rounds: int) -> dict[str, Any]:
    """One case: milliseconds of a denoising, ratios to the bare loop, own microseconds a step, distance to the bare loop's samples."""
    num_steps, calls = CASES[name][1], ways(name, device)
    expected = calls["bare"]()
    samples = {way: sample for way, call in calls.items() if (sample := call()) is not None}
    scale = max(1.0, float(expected.abs().max()))
    times, own = timed(calls, device, rounds), timed(ways(name, device, nothing=True), device, rounds=300)
    return {
        "batch_size": CASES[name][0],
        "num_steps": num_steps,
        "median_ms": {way: 1e3 * statistics.median(t) for way, t in times.items()},
        "ratio": {way: interval([a / b for a, b in zip(t, times["bare"], strict=True)]) for way, t in times.items()},
        "of_limit": {way: interval([b / a for a, b in zip(t, times["limit"], strict=True)]) for way, t in times.items()},
        "own_us_per_step": {way: 1e6 * statistics.median(t) / num_steps for way, t in own.items()},
        "relative_error": {way: float((sample.float() - expected).abs().max()) / scale for way, sample in samples.items()},
    }


def report(name: str, case: dict[str, Any]) -> None:
    print(f"\n{name}: batch {case['batch_size']}, {case['num_steps']} steps")
    print(f"{'':<12}{'ms':>9}{'ratio to bare':>16}  {'95 % interval':<16}{'of limit':>9}{'own µs/step':>13}{'error':>10}")
    for way, (ratio, low, high) in sorted(case["ratio"].items(), key=lambda row: case["own_us_per_step"][row[0]]):
        error = case["relative_error"].get(way)
        print(
            f"{way:<12}{case['median_ms'][way]:>9.2f}{ratio:>16.4f}  {f'{low:.4f} … {high:.4f}':<16}{case['of_limit'][way][0]:>9.3f}"
            f"{case['own_us_per_step'][way]:>13.0f}{'' if error is None else f'{error:.0e}':>10}"
        )


def profile(name: str, device: str) -> str:
    """Where the time of three denoisings by `unroll` goes, operator by operator."""
    call = ways(name, device)["unroll"]
    call()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            call()
    return profiler.key_averages().table(sort_by=f"self_{device.split(':')[0]}_time_total", row_limit=15, max_name_column_width=50)


def main() -> None:
    default = [name for name in CASES if name != "sd15" or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default)
    parser.add_argument("--rounds", type=int, default=60, help="timed rounds of each case")
    parser.add_argument("--profile", action="store_true", help="also print where the fast path's time goes")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    keep_freed_memory()
    result: dict[str, Any] = {"hardware": hardware(args.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"date": date.today().isoformat(), "rounds": args.rounds, "cases": {}}
    print(f"{result['hardware']}; torch {result['torch']}; {result['date']}; {args.rounds} rounds")
    for name in args.cases:
        result["cases"][name] = measure(name, args.device, args.rounds)
        report(name, result["cases"][name])
        if args.profile:
            print(profile(name, args.device))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
