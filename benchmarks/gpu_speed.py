"""Parts b, c and g of `gpu.py`: rollouts and gradient steps beside the field's own loops, and where their time goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import gpu_job
import gpu_job_files
import throughput
import torch
from gpu_report import Part, free_memory
from rollout import Way, bare_sd, interval, sd_expert, timed
from torch.autograd import DeviceType

from ddil_env import ExpertPolicy, TimeGrid
from ddil_env.rollout import unroll

TARGET = 1.5  # theirs / ours
BATCH = 8


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def rounds_for(calls: dict[str, Way], device: str, seconds: float, most: int = 30) -> int:
    """Timed rounds, at least 3, that take about so many seconds with the 3 that warm up."""
    for call in calls.values():
        call()
    synchronize(device)
    start = time.monotonic()
    for call in calls.values():
        call()
    synchronize(device)
    return min(max(int(seconds / (time.monotonic() - start)) - 3, 3), most)


def graphed(call: Callable[[], torch.Tensor]) -> Way:
    """A call as one CUDA graph: captured once, and launched as a whole."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def rollout_ways(expert: Any, batch_size: int, num_steps: int, theirs: Any) -> dict[str, Way]:
    """Diffusers' pipeline around the network `theirs`, our `unroll`, and the bare forwards of ours."""
    device = expert.device
    x_T = torch.randn(batch_size, *expert.sample_shape, device=device)
    c = torch.arange(batch_size, device=device) % expert.num_conditions
    policy, grid = ExpertPolicy(expert), TimeGrid(expert.schedule, num_steps).to(device)
    ours, expert.network.unet = expert.network.unet, theirs
    pipeline = bare_sd(expert, grid, x_T, c)["pipeline"]
    expert.network.unet = ours
    return {"pipeline": pipeline, "unroll": lambda: unroll(policy, grid, x_T, c)[:, -1], "limit": bare_sd(expert, grid, x_T, c)["limit"]}


def add_rollout(part: Part, how: str, batch_size: int, num_steps: int, calls: dict[str, Way], seconds: float) -> None:
    """A line for each way of ours in one case."""
    difference = throughput.apart(calls["unroll"]().float(), calls["pipeline"]().float())
    times = timed(calls, part.device, rounds_for(calls, part.device, seconds))
    for name in calls:
        if name not in ("pipeline", "limit"):
            ratio = interval([b / a for a, b in zip(times[name], times["pipeline"], strict=True)])
            part.add(
                f"{name}{how}, batch {batch_size}, {num_steps} steps",
                ours_ms=1e3 * interval(times[name])[0],
                pipeline_ms=1e3 * interval(times["pipeline"])[0],
                ratio=ratio,
                of_limit=interval([b / a for a, b in zip(times[name], times["limit"], strict=True)]),
                forwards_per_s=2 * batch_size * num_steps / interval(times[name])[0],
                difference=difference,
            )


def rollouts(part: Part) -> None:
    """Part b: guided denoisings, each step a forward of a batched pair."""
    model, dtype = ("sd", "float32") if part.dry else ("sd15", "bfloat16")
    cases = [(2, 2)] if part.dry else [(8, 4), (1, 4), (32, 4), (8, 8), (1, 8), (32, 8)]
    expert = sd_expert(model, part.device, dtype)
    expert.max_batch = None  # a large batch goes through whole, as the pipeline's does
    theirs = copy.deepcopy(expert.network.unet)
    with torch.no_grad():
        for batch_size, num_steps in cases:
            with part.attempt(f"batch {batch_size}, {num_steps} steps"):
                calls = rollout_ways(expert, batch_size, num_steps, theirs)
                if part.on_gpu:
                    calls["unroll as a CUDA graph"] = graphed(calls["unroll"])  # type: ignore[arg-type]
                add_rollout(part, "", batch_size, num_steps, calls, 0.2 if part.dry else 6)
        if not part.on_gpu:
            return
        batch_size, num_steps = cases[0]
        with part.attempt("compiled"):
            expert.compile()
            theirs.compile()  # as people do with a pipeline's UNet
            calls = rollout_ways(expert, batch_size, num_steps, theirs)
            start = time.monotonic()
            calls["unroll"]()
            synchronize(part.device)
            part.add("torch.compile of ours", seconds=time.monotonic() - start)
            calls["unroll as a CUDA graph"] = graphed(calls["unroll"])  # type: ignore[arg-type]
            add_rollout(part, ", both compiled", batch_size, num_steps, calls, 6)


def steps(part: Part) -> None:
    """Part c: a step of LCM and an iteration of DMD2 beside their scripts, the whole job, and both steps with our networks compiled."""
    model, proof, dtype = ("tiny", None, "float32") if part.dry else ("sd15-architecture", "small", "bfloat16")
    rounds = 1 if part.dry else 8
    compiles = [False] if part.dry else [False, True]
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 where the two sides are compared
    for compiled in compiles:
        for name in ("lcm", "dmd2"):
            with part.attempt(f"{name}{', compiled' if compiled else ''}"):
                case = throughput.Case(model, part.device, dtype, 2 if part.dry else BATCH, compiled)
                for row in throughput.measure(name, case, rounds, proof):
                    kept = ("ours_ms", "theirs_ms", "ratio", "limit_ms", "of_limit", "theirs_of_limit", "difference")
                    target = TARGET if name == "lcm" and row["name"].endswith("fresh") else None
                    part.add(f"{row['name']}{', ours compiled' if compiled else ''}", **{key: row[key] for key in kept}, target=target)
                del case
        if not compiled:
            jobs = [gpu_job_files.TINY] if part.dry else [gpu_job_files.SD15, gpu_job_files.COLOURED_DIGITS]
            for job in jobs:
                with part.attempt(f"the whole job, {job.name}"):
                    for row in gpu_job.compare(job, part.device, part.report.out / "job"):
                        part.add(**row)


def profiled(call: Callable[[], object], device: str) -> tuple[str, float]:
    """The table of a call's most expensive kernels, or on a CPU operators, and the share of its time in which the device stood still."""
    call()
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.startswith("cuda") else []
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        synchronize(device)
        elapsed = time.perf_counter() - start
    averages = profiler.key_averages()
    kernels = [event for event in averages if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) if kernels else sum(event.self_cpu_time_total for event in averages)
    sort = "self_cuda_time_total" if kernels else "self_cpu_time_total"
    return averages.table(sort_by=sort, row_limit=25, max_name_column_width=80), 1 - 1e-6 * busy / elapsed


def profiles(part: Part) -> None:
    """Part g."""
    model = "tiny" if part.dry else "sd15-architecture"
    case = throughput.Case(model, part.device, "float32" if part.dry else "bfloat16", 2 if part.dry else BATCH, False)
    for name in ("rollout", "lcm") if part.dry else ("rollout", "lcm", "dmd2"):
        with part.attempt(name):
            ways = {"rollout": throughput.rollout, "lcm": throughput.lcm, "dmd2": throughput.dmd2}[name](case)[0]
            ours, theirs = {
                "rollout": ("unroll", "theirs"),
                "lcm": ("fresh", "theirs"),
                "dmd2": ("student's turn", "theirs, student's turn"),
            }[name]
            for side, way in (("ours", ours), ("theirs", theirs)):
                table, idle = profiled(ways[way], part.device)
                part.save(f"g_{name}_{side}.txt", table)
                part.add(f"{name}, {side}", idle_share=idle, table=f"g_{name}_{side}.txt")
            del ways
            free_memory()
