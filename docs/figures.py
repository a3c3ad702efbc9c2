"""Draws the figures of docs/concepts from the library itself, each for a light and a dark page.

    python docs/figures.py                 # all of them, in less than a minute on one core
    python docs/figures.py labels worlds   # some

Text is 12 points or more on figures 4.6 inches wide, so that it stays above 12 pixels on a phone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import ddil_env
from ddil_agents import Beta, Dagger, DaggerConfig
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_env import Box, ExpertPolicy, GaussianMixtureExpert, TimeGrid, unroll
from ddil_env.worlds.fork import HALF_WIDTH, ROW, displacement

OUT = Path(__file__).parent / "concepts" / "figures"
WIDTH = 4.6  # inches
THEMES = {
    "light": {"ink": "#222222", "faint": "#b0b0b0", "blue": "#1f6fb4", "red": "#c8372d", "green": "#2b8a3e"},
    "dark": {"ink": "#e4e4e4", "faint": "#6a6a6a", "blue": "#6cb2f0", "red": "#ff7b70", "green": "#69c779"},
}
Colours = dict[str, str]


# What is drawn: an exact teacher with eight modes in the plane, and the students of `fork`.


@cache
def circle() -> GaussianMixtureExpert:
    angle = 2 * torch.pi * torch.arange(8) / 8
    return GaussianMixtureExpert(torch.stack([angle.cos(), angle.sin()], 1), 0.1, schedule="cosine")


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


@cache
def small_student() -> Any:
    """A student of 8 units, which cannot follow its teacher, by behaviour cloning in 4 steps."""
    config = DaggerConfig(num_steps=4, teacher_steps=32, num_updates=400, learning_rate=1e-2, beta=Beta(), student={"width": 8, "depth": 1})
    return Dagger(circle(), config).learn(progress=False)


@cache
def fork_students() -> dict[str, Any]:
    """Students of `fork` by behaviour cloning and by DAgger, with the settings of configs/dagger/fork.yaml; seed 0."""
    expert = ddil_env.load_expert("fork")
    shared = {
        "num_steps": 2,
        "teacher_steps": 16,
        "num_updates": 2000,
        "learning_rate": 3e-3,
        "collect_size": 256,
        "updates_per_collect": 64,
    }
    shared |= {"updates_per_collect": 64, "capacity": 8192, "student_collections": None, "student": {"width": 32, "depth": 2}}
    betas = {"behaviour cloning": Beta(), "DAgger": Beta(student=1.0)}
    return {name: Dagger(expert, DaggerConfig(beta=beta, **shared)).learn(progress=False) for name, beta in betas.items()}


@cache
def fork_evaluator() -> EpisodeEvaluator:
    agent = fork_students()["DAgger"]
    return EpisodeEvaluator(agent.teacher_policy, agent.grid, n=50)


# Figures: each is a function of the colours.


def mdp(colours: Colours) -> Figure:
    """States of an episode of 4 steps: 200 of the teacher's trajectories, one of them marked."""
    grid = TimeGrid(circle().schedule, 4)
    path = unroll(ExpertPolicy(circle(), substeps=8), grid, noise(200))
    figure, axes = panels(2, 3, 3.6)
    for i, axis in enumerate(axes[:5]):
        cloud(axis, path[:, i], colours["blue"])
        axis.plot(*path[:1, : i + 1, :].squeeze(0).T, "-", color=colours["red"], lw=1.2)
        axis.plot(*path[0, i], "o", color=colours["red"], ms=7)
        axis.set_title(f"t = {grid.times[i]:g}")
    axes[5].axis("off")
    lines = ("state (x, t, c)", "action: the next x", "start: noise", "end: t = 0")
    axes[5].text(-0.05, 0.5, "\n".join(lines), va="center", transform=axes[5].transAxes)
    return figure


def sources(colours: Colours) -> Figure:
    """States at t = 250 from the three sources, and a β over a run."""
    grid, t = small_student().grid, torch.full((200,), 250.0)
    x_0, _ = circle().sample_data(200, torch.Generator().manual_seed(1))
    states = {
        "forward": circle().schedule.add_noise(x_0, noise(200, 2), t),
        "teacher": unroll(ExpertPolicy(circle(), substeps=8), grid, noise(200))[:, 3],
        "student": unroll(small_student().student_policy, grid, noise(200))[:, 3],
    }
    figure, axes = panels(2, 2, 4.8)
    for axis, (name, x) in zip(axes, states.items(), strict=False):
        cloud(axis, x, colours["blue"], reach=2)
        axis.set_title(f"{name}, t = 250")
    beta = Beta(forward=0.2, teacher=0.2, student=0.6, schedule="linear")
    progress = torch.linspace(0, 1, 50)
    shares = torch.tensor([beta(float(u)) for u in progress]).T
    axes[3].stackplot(progress, shares, colors=[colours["faint"], colours["green"], colours["red"]])
    for name, y in (("forward", 0.07), ("teacher", 0.26), ("student", 0.62)):
        axes[3].text(0.97, y, name, ha="right", color="black")
    axes[3].set(title="β over a run", xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], xticklabels=["start", "end"], yticks=[0, 1])
    return figure


def labels(colours: Colours) -> Figure:
    """From six states at t = 500 to t = 0 in one and in 16 steps of the teacher, and the error of a label by the number of steps."""
    x = unroll(ExpertPolicy(circle(), substeps=64), TimeGrid(circle().schedule, 2), noise(300, 5))[:, 1]
    t, s = torch.full((300,), 500.0), torch.zeros(300)
    figure, (left, right) = panels(1, 2, 2.9)
    cloud(left, circle().means.float(), colours["faint"], size=80, reach=2)
    for k, colour in ((16, "blue"), (1, "red")):
        policy, path = ExpertPolicy(circle(), substeps=k), [x[:6]]
        for now, after in pairwise(policy.substep_times(t[:6], s[:6])):
            path.append(ExpertPolicy(circle()).act(path[-1], now, after))
        left.plot(*torch.stack(path).permute(2, 0, 1), color=colours[colour], lw=1.3)
        left.plot(*path[-1].T, "o", color=colours[colour], ms=5)
    left.plot(*x[:6].T, "o", color=colours["ink"], ms=3)
    left.set_title("1 step, 16 steps")
    exact, ks = ExpertPolicy(circle(), substeps=256).act(x, t, s), [1, 2, 4, 8, 16, 32]
    errors = [float((ExpertPolicy(circle(), substeps=k).act(x, t, s) - exact).norm(dim=1).mean()) for k in ks]
    right.plot(ks, errors, "o-", color=colours["blue"])
    right.set(xscale="log", ylim=(0, None), xlabel="teacher steps k", title="error of a label")
    right.set_xticks(ks, [str(k) for k in ks])
    right.minorticks_off()
    return figure


def transitions(colours: Colours) -> Figure:
    """Three runs from one noise: under `ddim` they are one, under `renoise` each has noise of its own."""
    policy, grid, x_T = ExpertPolicy(circle(), substeps=8), TimeGrid(circle().schedule, 4), torch.tensor([[-1.7, -0.3]])
    figure, axes = panels(1, 2, 2.7)
    for axis, kernel in zip(axes, ("ddim", "renoise"), strict=True):
        cloud(axis, circle().means.float(), colours["faint"], size=80, reach=3)
        for seed, colour in enumerate(("blue", "red", "green")):
            generator = torch.Generator().manual_seed(seed)
            path = unroll(policy, grid, x_T, kernel=kernel, generator=generator)[0]  # type: ignore[arg-type]
            axis.plot(*path.T, "o-", color=colours[colour], ms=4, lw=1.3)
        axis.plot(*x_T[0], "o", color=colours["ink"], ms=8)
        axis.set_title(kernel)
    return figure


def thresholding(colours: Colours) -> Figure:
    """Estimates of x_0 under guidance 7 at t = 500, and the share of entries outside the data's box by time."""
    expert = ddil_env.load_expert("gaussian_mixture", guidance_scale=7.0)  # 25 modes of width .04, the outermost at ±.8
    bound, box = 0.92, Box(0.92)
    x_0, c = expert.sample_data(500, torch.Generator().manual_seed(0))
    times = torch.arange(50, 1000, 50).float()
    figure, (left, right) = panels(1, 2, 2.9)
    for w, colour in ((7.0, "red"), (3.0, "blue"), (1.0, "green")):
        outside = []
        for t in times:
            t = t.expand(500)
            pred = expert.guided(expert.schedule.add_noise(x_0, noise(500, 7), t), t, c, w)
            outside.append(float((pred.x_0 != box.project(pred.x_0)).float().mean()))
            if w == 7 and t[0] == 500:
                shown = pred.x_0
        right.plot(times, outside, color=colours[colour], label=f"w = {w:g}")
    for x, colour in ((shown[:150], "red"), (box.project(shown[:150]), "blue")):
        left.scatter(*x.T, s=5, color=colours[colour], linewidths=0)
    left.set(ylim=(-1.5, 1.5), yticks=[-0.92, 0.92], yticklabels=["−.92", ".92"])
    left.add_patch(plt.Rectangle((-bound, -bound), 2 * bound, 2 * bound, fill=False, ec=colours["ink"]))
    left.set_title("w = 7, t = 500")
    right.set(xlabel="t", title="share outside", xticks=[0, 500, 999], ylim=(0, None))
    right.legend(frameon=False)
    return figure


def worlds(colours: Colours) -> Figure:
    """Straight ahead of a peg the teacher goes left or right; in one step it averages the two."""
    expert = ddil_env.load_expert("fork")
    figure, (left, right) = panels(1, 2, 3.2)
    draw_paths(left, fork_evaluator().expert_policy, colours)
    left.set_title("15 episodes")
    c, x_T = torch.tensor([[0.0, 1.0]]).expand(150, 2), noise(150)
    for steps, colour in ((16, "blue"), (1, "red")):
        x_0 = unroll(ExpertPolicy(expert), TimeGrid(expert.schedule, steps), x_T, c)[:, -1]
        right.scatter(*x_0.T, s=7, color=colours[colour], label=f"{steps} step{'s' * (steps > 1)}")
    right.set(xticks=[], yticks=[], title="samples at the start")
    right.margins(0.1, 0.25)
    right.legend(frameon=False, loc="upper center", handletextpad=0.1)
    return figure


def covariate_shift(colours: Colours) -> Figure:
    """Episodes of two students, and their errors on their own places and on demonstrations."""
    evaluator, figure = fork_evaluator(), plt.figure(figsize=(WIDTH, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2.6))
    axes, chart = above.subplots(1, 2), below.subplots()
    for axis, (name, agent), colour in zip(axes, fork_students().items(), ("red", "blue"), strict=True):
        draw_paths(axis, agent.student_policy, colours)
        measured = evaluator.evaluate(agent.student_policy)
        axis.set_title(f"{name}\n{measured['success']:.0%} pass")
        own = [e for e in measured["error_own"] if e is not None]
        chart.plot(range(1, len(own) + 1), own, "o-", color=colours[colour])
        chart.plot([1, 8], [measured["error_data"]] * 2, "--", color=colours[colour], lw=1.2)
    chart.set(xlabel="eighth of an episode", yscale="log", title="error on own places (– – demonstrations)", xticks=range(1, 9))
    chart.set_yticks([0.01, 0.03, 0.1, 0.3], [".01", ".03", ".1", ".3"])
    chart.minorticks_off()
    return figure


def toy(colours: Colours) -> Figure:
    """The figure of examples/toy.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import toy as module

    figure = module.draw(toy_students(), n=12)
    figure.set_size_inches(WIDTH, 3.4)
    for axis, title in zip(figure.axes, ("expert", "cloning", "DAgger"), strict=True):
        axis.set_title(axis.get_title().replace("behaviour cloning", title))
    return figure


@cache
def toy_students() -> dict[str, Any]:
    import toy as module

    return {name: module.train(name == "DAgger", 24, seed=0) for name in ("behaviour cloning", "DAgger")}


FIGURES: dict[str, Callable[[Colours], Figure]] = {
    f.__name__: f for f in (mdp, sources, labels, transitions, thresholding, worlds, covariate_shift, toy)
}


# Drawing.


def panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained")
    return figure, list(axes.flat)


def cloud(axis: Axes, x: Tensor, colour: str, size: float = 5, reach: float = 3) -> None:
    """A square panel with points x (n, 2)."""
    axis.scatter(*x.T, s=size, color=colour, linewidths=0)
    axis.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])


def draw_paths(axis: Axes, policy: ddil_env.DdimPolicy, colours: Colours, n: int = 15) -> None:
    """Episodes of a policy on `fork`, those that end at a peg in red."""
    evaluator = fork_evaluator()
    episodes = evaluator.run(policy, evaluator.grid)
    path = torch.cat([torch.zeros(1, evaluator.n, 2), displacement(episodes.x_0).cumsum(0)])
    path[..., 0] += episodes.c[0, :, 0]
    good = evaluator.world.succeeded(episodes.total_reward)
    assert good is not None
    for i in range(n):
        end = int(episodes.length[i])
        axis.plot(*path[: end + 1, i].T, lw=0.9, color=colours["blue" if good[i] else "red"])
        if not good[i]:
            axis.plot(*path[end, i], "x", color=colours["red"])
    for row in range(5):
        pegs = torch.arange(row % 2 - 6, 7, 2)
        axis.hlines([ROW * (row + 1)] * len(pegs), pegs - HALF_WIDTH, pegs + HALF_WIDTH, color=colours["faint"], lw=2)
    axis.set(xlim=(-5.5, 5.5), ylim=(10.4, -0.4), xticks=[], yticks=[])


def save(name: str, theme: str) -> Path:
    """Draws a figure and writes it as an SVG of a transparent ground."""
    colours = THEMES[theme]
    ink = {f"{key}.color": colours["ink"] for key in ("text", "xtick", "ytick")}
    ink |= {"axes.edgecolor": colours["faint"], "axes.labelcolor": colours["ink"], "axes.titlecolor": colours["ink"]}
    style = {"font.size": 12, "axes.titlesize": 12, "legend.fontsize": 12, "svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(ink | style):
        figure = FIGURES[name](colours)
        path = OUT / f"{name}-{theme}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], help="which figures; default: all")
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().names or FIGURES:
        for theme in THEMES:
            path = save(name, theme)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
