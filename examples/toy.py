"""Why behaviour cloning fails where samples feed back, and DAgger does not: the whole idea in one file, with nothing but torch.

    python examples/toy.py            # a table and toy.png, 40 seconds on one core

A point moves between pegs. In every frame a diffusion policy is given the place of the point (the condition c) and draws a sideways
velocity (the clean sample x_0). The world executes it, and the new place is the next condition. So there are two loops:

    denoising    x_1 ~ N(0, 1) → … → x_0, given c              an MDP: state (x_t, t, c), action x_s with s < t, end at t = 0
    the world    c → x_0 → c' → x_0' → …                       samples decide the next conditions

The expert is the exact denoiser E[x_0 | x_t, c] of two Gaussians: pass the peg on its left, or on its right. A label is the place where
K of its DDIM steps lead from a state. The student, a small network, must get there in one step: it takes N = 2 steps, the expert N K = 16.

Behaviour cloning trains on labels at states of the expert's demonstrations, DAgger (Ross et al. 2011) on as many labels at states that the
student visits itself. Network, loss, number of labels and number of updates are the same. Demonstrations are thin lines, and the small
student misses them a little: off the lines it was never trained, so that its errors grow. A wide student (128 units) mostly follows them.
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

N, K = 2, 8  # steps of the student; expert steps in each of them
ROWS, FRAMES, SPEED, HALF_WIDTH = 5, 12, 0.2, 0.75  # rows of pegs; frames between rows; distance of a frame; half of a peg's width


# 1. Diffusion: x_t = α_t x_0 + σ_t ε, with t from 1 (noise) to 0 (data).
def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    return (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()


def ddim_step(x_t: Tensor, t: Tensor, s: Tensor, x_0: Tensor) -> Tensor:
    """x_s = α_s x̂_0 + σ_s ε̂, with ε̂ = (x_t − α_t x̂_0)/σ_t. All tensors are (n,)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    return alpha_s * x_0 + sigma_s * (x_t - alpha_t * x_0) / sigma_t


# 2. The expert: p(x_0 | c) = Σ_k w_k N(m_k, .1²), the velocities m_k that lead to the gate on the left and on the right of the peg ahead.
def expert(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """E[x_0 | x_t, c] = Σ_k r_k [m_k + (α .1²/v)(x_t − α m_k)],  v = α² .1² + σ²,  r_k ∝ w_k N(x_t; α m_k, v)."""
    y, frames_left = c[:, :1], FRAMES * c[:, 1:]  # sideways distance from the peg ahead; frames until its row
    gates = torch.tensor([-1.0, 1.0])
    m = ((gates - y) / (SPEED * frames_left)).clamp(-1, 1)  # (n, 2)
    log_w = gates * y / 0.1  # the nearer gate is more likely; straight ahead of a peg both are equally so
    alpha, sigma = (a[:, None] for a in alpha_sigma(t))
    v = (0.1 * alpha) ** 2 + sigma**2
    difference = x_t[:, None] - alpha * m
    r = (log_w - difference**2 / (2 * v)).softmax(1)
    return (r * (m + 0.1**2 * alpha / v * difference)).sum(1)


def expert_action(x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """Where K steps of the expert lead from t to s: the action that the student is to imitate."""
    for now, after in ((t + (s - t) * k / K, t + (s - t) * (k + 1) / K) for k in range(K)):
        x_t = ddim_step(x_t, now, after, expert(x_t, now, c))
    return x_t


def target(x_t: Tensor, t: Tensor, s: Tensor, x_s: Tensor) -> Tensor:
    """The x̂_0 whose one DDIM step lands on x_s: x_tgt = (x_s − r x_t)/(α_s − r α_t), r = σ_s/σ_t (Salimans & Ho 2021)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    return (x_s - sigma_s / sigma_t * x_t) / (alpha_s - sigma_s / sigma_t * alpha_t)


# 3. The student: x̂_θ(x_t, t, c), too small to answer like the expert everywhere.
class Student(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.layers(torch.cat([x_t[:, None], t[:, None], c], 1))[:, 0]

    def action(self, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        return ddim_step(x_t, t, s, self(x_t, t, c))


# 4. The world, and the two loops. A policy is a function (x_t, t, s, c) → x_s.
def denoise(policy, x: Tensor, c: Tensor) -> Tensor:
    """Runs the denoising MDP: states x_1, …, x_0, (N + 1, n)."""
    path = [x]
    for i in range(N):
        t = torch.full_like(x, 1 - i / N)
        path.append(policy(path[-1], t, t - 1 / N, c))
    return torch.stack(path)


def episodes(policy, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n points pass ROWS rows of pegs; one that hits a peg stays there."""
    y = 0.05 * torch.randn(n, generator=generator)
    place, alive, record = y.clone(), torch.ones(n, dtype=torch.bool), []
    for frame in range(ROWS * FRAMES):
        frames_left = FRAMES - frame % FRAMES
        c = torch.stack([y, torch.full((n,), frames_left / FRAMES)], 1)
        latents = denoise(policy, torch.randn(n, generator=generator), c)
        record.append((c, latents.T, place, alive))
        step = SPEED * latents[-1].clamp(-1, 1) * alive
        y, place = y + step, place + step
        if frames_left == 1:
            alive = alive & ((y + 1) % 2 - 1).abs().gt(HALF_WIDTH)  # pegs are 2 apart
            y = torch.where(alive, y % 2 - 1, y)  # the next row's pegs stand behind the gates
    c, latents, places, was_alive = map(torch.stack, zip(*record, strict=True))  # (frames, n, 2), (frames, n, N + 1), (frames, n) twice
    return {"c": c, "latents": latents, "place": torch.cat([places, place[None]]), "alive": was_alive, "success": alive}


# 5. Labelled states. This is the only place where behaviour cloning and DAgger differ.
@torch.no_grad()
def collect(student: Student | None, n_episodes: int, n_labels: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """States (x_t, t, c) with their targets: of the student's episodes (DAgger), or of the expert's where there is no student (BC)."""
    visited = episodes(student.action if student else expert_action, n_episodes, generator)
    c, latents = visited["c"][visited["alive"]], visited["latents"][visited["alive"]]
    row, i = (torch.randint(high, (n_labels,), generator=generator) for high in (len(c), N))
    c, t, s = c[row], 1 - i / N, 1 - (i + 1) / N
    alpha, sigma = alpha_sigma(t)
    diffused = alpha * latents[row, -1] + sigma * torch.randn(n_labels, generator=generator)
    x_t = latents[row, i] if student else diffused  # the latent that the student was at, or the demonstrated x_0 with noise
    return x_t, t, c, target(x_t, t, s, expert_action(x_t, t, s, c))


def train(dagger: bool, width: int, seed: int, rounds: int = 16, labels: int = 1024, updates: int = 150) -> Student:
    """L(θ) = E ‖x̂_θ(x_t, t, c) − x_tgt‖² over all labels so far; DAgger adds its labels in rounds, from the student as it then is."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = Student(width)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, rounds * updates)
    data = () if dagger else collect(None, 16 * rounds, labels * rounds, generator)
    for _ in range(rounds):
        if dagger:  # aggregate: the labels of earlier rounds stay
            new = collect(student, 16, labels, generator)
            data = tuple(map(torch.cat, zip(data, new, strict=True))) if data else new
        for _ in range(updates):
            batch = torch.randint(len(data[0]), (256,), generator=generator)
            x_t, t, c, x_tgt = (column[batch] for column in data)
            loss = (student(x_t, t, c) - x_tgt).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return student


# 6. The comparison.
@torch.no_grad()
def evaluate(student: Student, demonstrations: dict[str, Tensor], n: int = 500) -> list[float]:
    """Share of n episodes that pass; E (x_0 − x_0*)² from the same noise, on conditions of demonstrations and of its own episodes."""
    own = episodes(student.action, n, torch.Generator().manual_seed(2))
    scores = [float(own["success"].float().mean())]
    for c in (visited["c"][visited["alive"]] for visited in (demonstrations, own)):
        x_1 = torch.randn(len(c), generator=torch.Generator().manual_seed(3))
        scores.append(float((denoise(student.action, x_1, c)[-1] - denoise(expert_action, x_1, c)[-1]).square().mean()))
    return scores


@torch.no_grad()
def draw(students: dict[str, Student], n: int = 60):
    """Episodes of the expert and of students, from the same starts; the expert's in grey behind the students'."""
    figure, axes = plt.subplots(1, 1 + len(students), figsize=(5.4, 3.6), sharey=True, layout="constrained")
    shown = None
    for axis, (name, student) in zip(axes, [("expert", None), *students.items()], strict=True):
        seen = episodes(student.action if student else expert_action, n, torch.Generator().manual_seed(4))
        frames = torch.minimum(torch.arange(ROWS * FRAMES + 1)[:, None], seen["alive"].sum(0)).numpy()  # a point stays where it hit a peg
        place, good = seen["place"].numpy(), seen["success"].numpy()
        axis.plot(*(shown := shown or (place, frames)), color="grey", lw=0.5, alpha=0.3)
        axis.plot(place[:, good], frames[:, good], color="tab:blue", lw=0.7, alpha=0.6)
        axis.plot(place[:, ~good], frames[:, ~good], color="tab:red", lw=0.7, alpha=0.6)
        axis.plot(place[-1, ~good], frames[-1, ~good], "x", color="tab:red", ms=5)
        for row in range(ROWS):
            pegs = torch.arange(row % 2 - 8, 9, 2)
            axis.hlines([FRAMES * (row + 1)] * len(pegs), pegs - HALF_WIDTH, pegs + HALF_WIDTH, color="grey", lw=2)
        axis.set(title=f"{name}\n{good.mean():.0%} pass", xlim=(-6, 6), xticks=[], yticks=[])
    axes[0].invert_yaxis()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half of a training of the small student alone")
    parser.add_argument("--out", default="toy.png", help="where the figure goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    widths, seeds, rounds = ((24,), range(1), 8) if args.quick else ((24, 128), range(4), 16)
    demonstrations, drawn = episodes(expert_action, 500, torch.Generator().manual_seed(5)), dict[str, Student]()
    print(f"{f'mean (worst) of {len(seeds)} seeds':>36} {'success':>16} {'error on demos':>16} {'on own states':>16}")
    for width in widths:
        for name in ("behaviour cloning", "DAgger"):
            students = [train(name == "DAgger", width, seed, rounds) for seed in seeds]
            drawn.setdefault(name, students[0])
            success, *errors = torch.tensor([evaluate(student, demonstrations) for student in students]).T
            cells = [f"{x.mean():.3f} ({worst:.3f})" for x, worst in [(success, success.min()), *((e, e.max()) for e in errors)]]
            print(f"{name + f', {width} units a layer':>36}", *(f"{cell:>16}" for cell in cells))
    draw(drawn).savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
