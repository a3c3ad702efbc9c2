"""Part a of `gpu.py`: the same numbers on the GPU as on the CPU, and no wait for the device in an update.

The learners are trained on both devices from the same seeds. For one seed a GPU's generator draws other numbers than a CPU's, and most
streams of a run live on the device, so that here all of them are drawn on the CPU and copied (`HostDraws`). What is left is rounding.

Tolerances, relative. On a CPU, other convolution kernels (oneDNN's against torch's own) move the first loss by 1e-6, the losses of 20
updates by 6e-6 and the weights by 2e-4 of the way that they have gone. A GPU's kernels are less alike, and are given 100 times as much. For
TF32, whose products keep 10 bits, convolutions and matrix products were rounded so on a CPU, which moved them by 2e-4, 5e-2 and 4e-2; they
are given ten times as much in the first loss, and four times later.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_report import Part
from tensordict import TensorDict
from throughput import apart, moved_apart, weights
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ddil_agents import (
    DMD2,
    LCM,
    Aggrevate,
    Algorithm,
    Batch,
    BehaviourCloning,
    Beta,
    Callback,
    Dagger,
    Dart,
    Gail,
    SafeDagger,
    ScheduledSampling,
    SourceBuffer,
)
from ddil_env import DenoisingEnv, Expert, ExpertPolicy, load_expert

ROOT = Path(__file__).parents[1]
MIXTURE = Beta(forward=0.5, teacher=0.1, student=0.4)
LEARNERS: dict[type[Algorithm], dict[str, Any]] = {
    BehaviourCloning: {},
    Dagger: {"p_expert": 0.5},
    LCM: {"beta": MIXTURE, "guidance_range": (1, 4)},
    DMD2: {"beta": MIXTURE, "critic_updates": 2, "guidance_scale": 3.0},  # unguided, the first gradient is rounding alone
    ScheduledSampling: {},
    Dart: {},
    SafeDagger: {},
    Aggrevate: {},
    Gail: {},
}
FEW = (Dagger, LCM, DMD2)
WAITING = {  # what a collection has to know on the host, by the function that asks for it; in a world, every frame besides
    LCM: ("lcm.py, counts", "how many steps the student's rollouts have"),
    Aggrevate: ("aggrevate.py, label", "how many states the teacher completes from each time on"),
}
SHORT = {"num_updates": 20, "num_steps": 4, "teacher_steps": 8, "batch_size": 32, "collect_size": 32, "updates_per_collect": 4}
SHORT |= {"learning_rate": 1e-4, "warmup_updates": 5}
LIMITS = {  # by whether in TF32
    False: {"first loss": 1e-4, "losses": 6e-4, "weights": 2e-2},
    True: {"first loss": 2e-3, "losses": 0.2, "weights": 0.16},
}


class HostDraws(TorchFunctionMode):
    """Inside, a GPU's generators draw what the CPU's of the same seeds draw.

    Args:
        drawn_here: Whose draws are replaced; default: those of generators that are not the CPU's.
    """

    draws = (torch.rand, torch.randn, torch.randint, torch.randperm, torch.multinomial)

    def __init__(self, drawn_here: Callable[[torch.Generator], bool] = lambda generator: generator.device.type != "cpu") -> None:
        super().__init__()
        self.drawn_here = drawn_here
        self.twins: dict[int, tuple[torch.Generator, torch.Generator]] = {}  # with the first, so that its id stays its own

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if function not in self.draws or generator is None or not self.drawn_here(generator):
            return function(*args, **kwargs)
        if id(generator) not in self.twins:
            self.twins[id(generator)] = generator, torch.Generator().manual_seed(generator.initial_seed())
        here: dict[str, Any] = {"generator": self.twins[id(generator)][1], **({"device": "cpu"} if "device" in kwargs else {})}
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        return function(*args, **{**kwargs, **here}).to(generator.device)


class Recorder(Callback):
    """Keeps the mean losses of every update, the student's and those of networks beside it; 0 where one took no step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> None:
        prefixes = ["" if step.network == "student" else f"{step.network}_" for step in agent.gradient_steps()]
        none = torch.zeros((), device=agent.expert.device)
        self.losses.append(torch.stack([measured.get(f"{prefix}loss", none).mean() for prefix in prefixes]))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 matrix products and convolutions run in TF32 on a GPU."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def settings(agent: type[Algorithm], **own: Any) -> Any:
    return agent.Config(**{**SHORT, **LEARNERS[agent], **own})


def trained(agent: type[Algorithm], expert: Expert, updates: int, **own: Any) -> tuple[Algorithm, Tensor, Tensor]:
    """A learner after so many updates; its losses (updates, networks), and the weights that it started from, on the CPU."""
    recorder = Recorder()
    with HostDraws():
        learner = agent(expert, settings(agent, num_updates=updates, **own))
        start = weights(learner.networks["student"]).cpu()
        learner.learn(updates, progress=False, callbacks=[recorder])
    return learner, torch.stack(recorder.losses).cpu(), start


def check_learner(
    part: Part, agent: type[Algorithm], name: str, expert: Expert, reference: Expert, updates: int, modes: list[bool], **own: Any
) -> None:
    """Trains a learner on both devices, with TF32 on the GPU as `modes` say."""
    theirs, expected, start = trained(agent, reference, updates, **own)
    for in_tf32 in modes:
        with tf32(in_tf32), nullcontext() if part.on_gpu else torch.backends.mkldnn.flags(enabled=False):  # else both would be one
            ours, losses, same_start = trained(agent, expert, updates, **own)
        assert torch.equal(start, same_start), f"{agent.name} starts from other weights on {expert.device}"
        found = {
            "first loss": apart(losses[0], expected[0]),
            "losses": apart(losses, expected),
            "weights": moved_apart(ours.networks["student"].cpu(), theirs.networks["student"].cpu(), start),
        }
        limits = LIMITS[in_tf32]
        within = all(found[key] <= limit for key, limit in limits.items())
        part.add(f"{agent.name}, {name}{', TF32' if in_tf32 else ''}", **found, within="yes" if within else "no")
        assert within, f"{agent.name} on {name}: {found} exceeds {limits}"


def check_env(part: Part, name: str, expert: Expert, reference: Expert) -> None:
    """A denoising by the expert from the same noise, with the reward that asks it again."""
    found = {}
    for each in (reference, expert):
        env = DenoisingEnv(each, 4, [8], reward="expert_l2")
        x_T = torch.randn(8, *each.sample_shape, generator=torch.Generator().manual_seed(0)).to(each.device)
        c = torch.arange(8, device=each.device) % each.num_conditions
        start = TensorDict({"x_t": x_T, "t": env.mdp.grid.times[:1].expand(8), "c": c}, [8])
        with torch.no_grad():
            path = env.rollout(4, ExpertPolicy(each), auto_reset=False, tensordict=env.reset(start, set_state=True))
        found[each] = path["next", "x_t"].cpu(), path["next", "reward"].cpu()
    difference = apart(found[expert][0], found[reference][0])
    part.add(f"env, {name}", states=difference, reward=float(found[expert][1].abs().max()), within="yes" if difference <= 1e-4 else "no")
    assert difference <= 1e-4, f"a denoising of {name} differs by {difference:.1e}"


def check_labels_and_buffer(part: Part, name: str, expert: Expert, reference: Expert) -> None:
    """States that were collected on the device: their labels on the CPU, and what a buffer there gives back of them."""
    learner, other = (Dagger(each, settings(Dagger)) for each in (expert, reference))
    states = learner.trainer.collect()
    assert all(value.device == expert.device for value in states.values()), "a collection left the device"
    labels = other.expert_policy.act(*(states[key].cpu() for key in ("x_t", "t", "s", "c")))
    difference = apart(states["x_s"].cpu(), labels)
    drawn = []
    with HostDraws():
        for device in (expert.device, torch.device("cpu")):
            buffer = SourceBuffer(64, device=device, seed=1)
            buffer.extend(states.to(device))
            drawn.append(buffer.sample(256, (0.5, 0.1, 0.4)).cpu())
    same = all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0].keys())  # noqa: SIM118
    part.add(f"labels and buffer, {name}", states=difference, within="yes" if same and difference <= 1e-4 else "no")
    assert same, "a buffer on the device draws other states"
    assert difference <= 1e-4, f"labels of {name} differ by {difference:.1e}"


def told(frame: traceback.FrameSummary) -> str:
    """File, function, line and text of a frame; of a world with its folder."""
    path = Path(frame.filename)
    return f"{'worlds/' if path.parent.name == 'worlds' else ''}{path.name}, {frame.name}, line {frame.lineno}: {frame.line}"


def waits(work: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a call gives, and the lines of this project at which it waited for the GPU."""
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack() if "/ddil_" in f.filename]
            found[told(frames[-1]) if frames else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return work(), found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def allowed(line: str, agent: type[Algorithm], doing: str) -> bool:
    """Whether a line may wait: in a collection those that WAITING names, and the frames of a world."""
    return doing == "collect" and line.startswith(("worlds/", *WAITING.get(agent, ())[:1]))


def count_waits(part: Part, agent: type[Algorithm], name: str, expert: Expert, **own: Any) -> None:
    """The lines that wait for the GPU in a learner's third update; the first ones fill caches."""
    learner = agent(expert, settings(agent, **own))
    for _ in range(2):
        learner.trainer.collect()
        learner.trainer.update(learner.draw())
    _, collecting = waits(learner.trainer.collect)
    batch, drawing = waits(learner.draw)
    _, updating = waits(lambda: learner.trainer.update(batch))
    for doing, found in (("collect", collecting), ("draw", drawing), ("update", updating)):
        lines = [f"{n} × {line}" for line, n in found.most_common()]
        within = "yes" if all(allowed(line, agent, doing) for line in found) else "no"
        part.add(f"waits in {doing}, {agent.name}, {name}", waits=found.total(), lines=lines, within=within)


def run_marked_tests(part: Part) -> None:
    """`pytest -m gpu` in a process of its own, on the files that have such tests: others need packages that may not be here."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    log = part.report.out / "a_pytest.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={log}"]
    command += ["--continue-on-collection-errors", *files]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    part.save("a_pytest.txt", ended.stdout + ended.stderr)
    suite = next(ElementTree.parse(log).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    part.add("pytest -m gpu", **counts, within="yes" if ended.returncode == 0 else "no")
    assert ended.returncode == 0, f"pytest -m gpu ended with {ended.returncode}; see a_pytest.txt"


def check_pictures(part: Part, name: str, agents: Iterable[type[Algorithm]], updates: int) -> None:
    """All that is compared on one preset; a few of the learners with TF32, too."""
    expert, reference = load_expert(name, device=part.device), load_expert(name)
    with part.attempt(f"env, {name}"), tf32(False):
        check_env(part, name, expert, reference)
    with part.attempt(f"labels and buffer, {name}"), tf32(False):
        check_labels_and_buffer(part, name, expert, reference)
    for agent in agents:
        if part.on_gpu:
            with part.attempt(f"waits, {agent.name}, {name}"):
                count_waits(part, agent, name, expert)
        with part.attempt(f"{agent.name}, {name}"):
            check_learner(part, agent, name, expert, reference, updates, [False, True] if agent in FEW and part.on_gpu else [False])
