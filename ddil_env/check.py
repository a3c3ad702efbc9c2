"""`check_expert` checks that an expert implements its interface, as gymnasium's check_env does for an environment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddil_env.denoiser import Denoiser, NetworkDenoiser
from ddil_env.expert import Expert, NoDataError
from ddil_env.prediction import Prediction
from ddil_env.schedule import NoiseSchedule
from ddil_env.time_grid import TimeGrid
from ddil_env.worlds.world import World


def _require(holds: bool, expert: Expert, message: str) -> None:
    if not holds:
        raise ValueError(f"{type(expert).__name__}: {message}")


def _check_prediction(expert: Expert, pred: object, x_t: Tensor, t: Tensor, where: str) -> None:
    _require(isinstance(pred, Prediction), expert, f"{where} returned {type(pred).__name__}; return a ddil_env.Prediction")
    assert isinstance(pred, Prediction)
    for name, value in (("x_0", pred.x_0), ("eps", pred.eps)):
        _require(value.shape == x_t.shape, expert, f"{where} gave {name} of shape {tuple(value.shape)}; need x_t's, {tuple(x_t.shape)}")
        _require(value.device == x_t.device, expert, f"{where} gave {name} on {value.device}; need x_t's device, {x_t.device}")
        _require(value.dtype in (torch.float32, torch.float64), expert, f"{where} gave {name} as {value.dtype}; need float32 or wider")
        _require(bool(torch.isfinite(value).all()), expert, f"{where} gave NaN or infinite {name} at t={t.tolist()}; look at the weights")
        _require(not value.requires_grad, expert, f"{where} gave {name} with a gradient; an expert is fixed: detach it")
    alpha, sigma = expert.schedule(t, x_t)
    error = float((alpha * pred.x_0 + sigma * pred.eps - x_t).abs().max())
    _require(error < 1e-2, expert, f"{where} breaks α_t x_0 + σ_t eps = x_t by {error:.3g}; build it with schedule.prediction(...)")


def check_expert(expert: Expert, seed: int = 0, student: Denoiser | None = None) -> None:
    """Checks an expert; returns nothing if it conforms.

    Args:
        expert: The expert to check. It runs a few forwards of batches of 1 to 8.
        seed: Seed of the latents that it is tried on.
        student: A student of the expert to check too; default: the expert makes one, if it makes students.

    Raises:
        TypeError: the object is not an Expert.
        ValueError: a method breaks the interface; the message names the value found and the cure.
    """
    if not isinstance(expert, Expert):
        raise TypeError(f"got {type(expert).__name__}; an expert subclasses ddil_env.Expert")
    for field in ("schedule", "sample_shape", "support", "device", "nfe", "num_conditions", "null_condition", "guidance_scale"):
        _require(hasattr(expert, field), expert, f"no `{field}`; call super().__init__(schedule, sample_shape, ...) in __init__")
    _require(
        isinstance(expert.schedule, NoiseSchedule),
        expert,
        f"`schedule` must be a ddil_env.NoiseSchedule, not a {type(expert.schedule).__name__}",
    )
    generator = torch.Generator(expert.device).manual_seed(seed)
    for n in (1, 3, min(expert.sample_shape[-1], 8)):  # a wrong broadcast goes unnoticed where batch size and width are equal
        x_t = torch.randn(n, *expert.sample_shape, generator=generator, device=expert.device)
        c = expert.sample_condition(n, generator)
        _check_condition(expert, c, n, "sample_condition")
        times = TimeGrid(expert.schedule, min(4, int(expert.schedule.t_max))).to(expert.device).times[:-1]
        t = times[torch.arange(n, device=expert.device) % len(times)]
        before = expert.nfe
        pred = _call(expert, f"predict on a batch of {n}", functools.partial(expert.predict, x_t, t, c))
        _check_prediction(expert, pred, x_t, t, f"predict on a batch of {n}")
        _require(expert.nfe - before >= n, expert, f"predict on a batch of {n} added {expert.nfe - before} to nfe; need at least {n}")
    second = expert.predict(x_t, t, c)
    _require(torch.equal(pred.x_0, second.x_0), expert, "predict is not deterministic; put networks in eval mode")
    if expert.null_condition is not None and c is not None:
        _check_prediction(expert, expert.guided(x_t, t, c, 2.0), x_t, t, "guided")
        single = expert.guided(x_t, t, c, 1.0)
        _require(torch.equal(single.x_0, pred.x_0), expert, "guided with guidance_scale=1 must equal predict; return predict's there")
    projected = expert.support.project(pred.x_0)
    shapes = tuple(projected.shape), tuple(pred.x_0.shape)
    _require(shapes[0] == shapes[1], expert, f"support.project gave shape {shapes[0]} for {shapes[1]}; it must keep the shape")
    again = expert.support.project(projected)
    gap = float((again - projected).abs().max())
    _require(torch.allclose(again, projected), expert, f"support.project must leave what it has projected; it moved it by {gap:.3g}")
    pictures = _call(expert, "decode", lambda: expert.decode(pred.x_0))
    if pictures is not None:
        good = pictures.dtype == torch.uint8 and pictures.ndim == 4 and len(pictures) == n and pictures.shape[-1] == 3
        _require(good, expert, f"decode gave {pictures.dtype} {tuple(pictures.shape)}; need uint8 ({n}, height, width, 3) or None")
        _require(pictures.device.type == "cpu", expert, f"decode gave pictures on {pictures.device}; need them on the CPU")
    _check_data(expert, generator)
    _check_world(expert)
    if student is None and type(expert).make_student is not Expert.make_student:
        student = expert.make_student()
    if student is not None:
        _check_student(expert, student, x_t, t, c)


def _call(expert: Expert, what: str, function: Callable[[], Any]) -> Any:
    """Calls a function; an error that it raises names the expert and what was called."""
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{type(expert).__name__}: {what} raised {type(error).__name__}: {error}") from error


def _check_condition(expert: Expert, c: Tensor | None, n: int, where: str) -> None:
    if not expert.conditional or c is None:
        _require(c is None and not expert.conditional, expert, f"{where} must give None for c exactly if the expert is unconditional")
        return
    if expert.condition_shape is not None:
        shape = (n, *expert.condition_shape)
        good = tuple(c.shape) == shape and c.dtype == torch.float32
        _require(good, expert, f"{where} gave c as {c.dtype} {tuple(c.shape)}; need float32 {shape}")
        _require(bool(torch.isfinite(c).all()), expert, f"{where} gave conditions that are not finite; clip or remove them")
        return
    _require(c.shape == (n,) and c.dtype == torch.int64, expert, f"{where} gave c as {c.dtype} {tuple(c.shape)}; need int64 ({n},)")
    first, last = int(c.min()), int(c.max())
    in_range = 0 <= first <= last < expert.num_conditions
    _require(in_range, expert, f"{where}: condition ids must be 0 … {expert.num_conditions - 1}; it gave {first} to {last}")


def _check_world(expert: Expert) -> None:
    """Takes one step in two of the expert's worlds, if it has any."""
    world = expert.make_world(2)
    if world is None:
        return
    _require(isinstance(world, World), expert, f"make_world gave {type(world).__name__}; need a ddil_env.worlds.World, or None")
    _require(world.num_worlds == 2, expert, f"make_world(2) gave {world.num_worlds} worlds")
    shapes = (world.sample_shape, world.condition_shape), (expert.sample_shape, expert.condition_shape)
    _require(
        shapes[0] == shapes[1], expert, f"its world takes and answers {shapes[0]}; need the expert's sample and condition, {shapes[1]}"
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    c = _call(expert, "a world's reset", lambda: world.reset(generators))
    again = _call(expert, "a world's reset", lambda: world.reset([generator.manual_seed(i) for i, generator in enumerate(generators)]))
    _require(torch.equal(c, again), expert, "a world starts differently from the same generator; draw from the generators alone")
    _call(expert, "a world's step", lambda: world.step(torch.zeros(2, *expert.sample_shape, device=world.device)))


def _check_data(expert: Expert, generator: torch.Generator) -> None:
    """Checks shape, dtype, device and finiteness of the expert's data, if it has any."""
    try:
        drawn = {"sample_data": (expert.sample_data(3, generator), 3)}
        for held_out in (False, True):
            pair = expert.reference_data(16, held_out)
            drawn[f"reference_data(held_out={held_out})"] = (pair, len(pair[0]))
    except NoDataError:
        return
    for where, ((x_0, c), n) in drawn.items():
        shape = (n, *expert.sample_shape)
        _require(tuple(x_0.shape) == shape, expert, f"{where} gave x_0 of shape {tuple(x_0.shape)}; need {shape}")
        _require(x_0.dtype == torch.float32, expert, f"{where} gave x_0 as {x_0.dtype}; need float32")
        _require(x_0.device == expert.device, expert, f"{where} gave x_0 on {x_0.device}; need {expert.device}")
        _require(bool(torch.isfinite(x_0).all()), expert, f"{where} gave NaN or infinite data; remove those samples")
        _check_condition(expert, c, n, where)


def _check_student(expert: Expert, student: Denoiser, x_t: Tensor, t: Tensor, c: Tensor | None) -> None:
    before = student.nfe
    w = (torch.full_like(t, expert.guidance_scale),) if isinstance(student, NetworkDenoiser) and student.guidance_embedding else ()
    pred = _call(expert, "the student", lambda: student.predict(x_t, t, c, *w))
    for name, value in (("x_0", pred.x_0), ("eps", pred.eps)):
        _require(value.shape == x_t.shape, expert, f"the student gave {name} of shape {tuple(value.shape)}; need {tuple(x_t.shape)}")
    counted = student.nfe - before
    _require(
        counted == len(x_t), expert, f"the student counted {counted} forwards for {len(x_t)} samples; add the batch to nfe in each predict"
    )
    _require(pred.x_0.requires_grad, expert, "the student has no gradient; make_student must return trainable parameters")
    student.nfe = before  # the forwards of a check do not count as the run's
