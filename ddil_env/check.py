"""`check_expert`: one call that proves that an expert conforms, as gymnasium's check_env does for an environment."""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_env.expert import Expert
from ddil_env.schedule import NoiseSchedule, Prediction, TimeGrid


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
        _require(bool(torch.isfinite(value).all()), expert, f"{where} gave NaN or infinite {name}")
        _require(not value.requires_grad, expert, f"{where} gave {name} with a gradient; an expert is fixed")
    alpha, sigma = expert.schedule(t, x_t)
    error = float((alpha * pred.x_0 + sigma * pred.eps - x_t).abs().max())
    _require(error < 1e-2, expert, f"{where} breaks α_t x_0 + σ_t eps = x_t by {error:.3g}; build it with schedule.prediction(...)")


def check_expert(expert: Expert, seed: int = 0, student: bool = True) -> None:
    """Runs an expert through the contract; silent if it holds.

    Args:
        expert: The expert to check. A few forwards of batches of 1 to 8 are run.
        seed: Of the latents it is tried on.
        student: Whether make_student is tried too, if there is one.

    Raises:
        TypeError: not an Expert.
        ValueError: a broken clause, named with the value found and the cure.
    """
    if not isinstance(expert, Expert):
        raise TypeError(f"got {type(expert).__name__}; an expert subclasses ddil_env.Expert")
    for field in ("schedule", "sample_shape", "support", "device", "nfe", "num_conditions", "null_condition", "guidance_scale"):
        _require(hasattr(expert, field), expert, f"no `{field}`; call super().__init__(schedule, sample_shape, ...) in __init__")
    _require(isinstance(expert.schedule, NoiseSchedule), expert, "`schedule` must be a ddil_env.NoiseSchedule")
    generator = torch.Generator(expert.device).manual_seed(seed)
    for n in (1, 3, min(expert.sample_shape[-1], 8)):  # where batch and width agree a wrong broadcast hides, elsewhere it shows
        x_t = torch.randn(n, *expert.sample_shape, generator=generator, device=expert.device)
        c = expert.sample_condition(n, generator)
        _require((c is None) == (expert.num_conditions == 0), expert, "sample_condition must give None exactly if num_conditions is 0")
        if c is not None:
            _require(
                c.shape == (n,) and c.dtype == torch.int64, expert, f"sample_condition gave {c.dtype} {tuple(c.shape)}; need int64 ({n},)"
            )
            _require(bool(((c >= 0) & (c < expert.num_conditions)).all()), expert, f"condition ids must be 0 … {expert.num_conditions - 1}")
        times = TimeGrid(expert.schedule, min(4, int(expert.schedule.t_max))).to(expert.device).times[:-1]
        t = times[torch.arange(n, device=expert.device) % len(times)]
        before = expert.nfe
        pred = expert.predict(x_t, t, c)
        _check_prediction(expert, pred, x_t, t, f"predict on a batch of {n}")
        _require(expert.nfe - before >= n, expert, f"predict on a batch of {n} added {expert.nfe - before} to nfe; need at least {n}")
    again = expert.predict(x_t, t, c)
    _require(torch.equal(pred.x_0, again.x_0), expert, "predict is not deterministic; put networks in eval mode")
    if expert.null_condition is not None and c is not None:
        _check_prediction(expert, expert.guided(x_t, t, c, 2.0), x_t, t, "guided")
        single = expert.guided(x_t, t, c, 1.0)
        _require(torch.equal(single.x_0, pred.x_0), expert, "guided with guidance_scale=1 must equal predict")
    projected = expert.support.project(pred.x_0)
    _require(projected.shape == pred.x_0.shape, expert, "support.project must keep the shape")
    _require(torch.allclose(expert.support.project(projected), projected), expert, "support.project must leave what it has projected")
    pictures = expert.decode(pred.x_0)
    if pictures is not None:
        good = pictures.dtype == torch.uint8 and pictures.ndim >= 4 and len(pictures) == n and pictures.shape[-1] == 3
        _require(good, expert, f"decode gave {pictures.dtype} {tuple(pictures.shape)}; need uint8 ({n}, height, width, 3) or None")
    if student and type(expert).make_student is not Expert.make_student:
        _check_student(expert, x_t, t, c)


def _check_student(expert: Expert, x_t: Tensor, t: Tensor, c: Tensor | None) -> None:
    student = expert.make_student()
    before = student.nfe
    pred = student.predict(x_t, t, c)
    for name, value in (("x_0", pred.x_0), ("eps", pred.eps)):
        _require(value.shape == x_t.shape, expert, f"the student gave {name} of shape {tuple(value.shape)}; need {tuple(x_t.shape)}")
    _require(student.nfe - before == len(x_t), expert, f"the student counted {student.nfe - before} forwards for {len(x_t)} samples")
    _require(pred.x_0.requires_grad, expert, "the student has no gradient; make_student must return trainable parameters")
