"""Whether a learner of one's own conforms: on a toy, in seconds.

    from ddil_agents import check_agent
    check_agent(MyAgent)

It trains, saves, resumes and compares; what is broken is named with its cure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddil_agents.algorithm import Algorithm
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.states.batch import Batch
from ddil_env import GaussianMixtureExpert, unroll

TOY: dict[str, Any] = {
    "num_steps": 4,
    "teacher_steps": 8,
    "batch_size": 64,
    "collect_size": 128,
    "updates_per_collect": 4,
    "warmup_updates": 5,
    "learning_rate": 1e-2,
    "student": {"width": 32, "depth": 2},
}


def check_agent(agent: type[Algorithm], num_updates: int = 150, **settings: Any) -> None:
    """Trains a learner on a mixture of four Gaussians in the plane, and checks what every command relies on.

    Args:
        agent: Its class.
        num_updates: Gradient steps in which it must come nearer to the teacher's samples than an untrained student.
        settings: Of its config, over those of the toy.

    Raises:
        ValueError: it is no subclass of Algorithm; its loss is not one number for each state; it learns nothing; it draws from torch's
            global generator; its forwards are not counted; or a run that is saved and resumed ends in other weights. Names what to change.
    """
    if not (isinstance(agent, type) and issubclass(agent, Algorithm)):
        raise ValueError(f"{agent!r} is not a subclass of ddil_agents.Algorithm")
    for name in ("name", "Config"):
        if not hasattr(agent, name) or (name == "name" and name not in vars(agent)):
            raise ValueError(f"{agent.__name__} has no {name} of its own, by which results tell it from others; set it on the class")
    _check_loss(_make(agent, num_updates, settings))
    with _global_generator(0):
        before, learner = torch.get_rng_state(), _make(agent, num_updates, settings)
        untrained, spent = _distance(learner), (learner.expert.nfe, learner.student_nfe, learner.teacher_nfe)
        learner.learn(progress=False)
        if not torch.equal(torch.get_rng_state(), before):
            raise ValueError(
                f"{agent.__name__} draws from torch's global generator, so that its runs are not reproducible; draw from a stream of "
                "self.collector.streams"
            )
    now = (learner.expert.nfe, learner.student_nfe, learner.teacher_nfe)
    _check_counts(learner, *(b - a for a, b in zip(spent, now, strict=True)))
    if not (trained := _distance(learner)) < untrained:
        raise ValueError(
            f"{agent.__name__}: after {num_updates} updates its samples are {trained:.3f} from the teacher's, and were {untrained:.3f} "
            "before the first (sliced Wasserstein distance); look at its loss, or pass more num_updates or another learning_rate"
        )
    _check_resume(agent, settings)


def _make(agent: type[Algorithm], num_updates: int, settings: dict[str, Any]) -> Any:
    expert = GaussianMixtureExpert([[-0.8, -0.8], [-0.8, 0.8], [0.8, -0.8], [0.8, 0.8]], 0.25)
    return agent(expert, agent.Config(**TOY | {"num_updates": num_updates} | settings))


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _distance(learner: Any) -> float:
    """Of the student's samples from the teacher's."""
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    own = unroll(learner.student_policy, learner.grid, x_T, kernel=learner.kernel, generator=torch.Generator().manual_seed(1))
    return sliced_wasserstein(own[:, -1], unroll(learner.teacher_policy, learner.grid, x_T)[:, -1])


def _check_loss(learner: Any) -> None:
    learner.trainer.collect()
    batch = Batch(learner.draw())
    loss = learner.loss(batch)
    if not isinstance(loss, Tensor) or loss.shape != (len(batch),):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{type(learner).__name__}.loss returns {got} for a batch of {len(batch)} states; need ({len(batch)},), the loss of each: its "
            "mean is taken afterwards, and each source's is logged"
        )
    if not loss.requires_grad:
        raise ValueError(f"{type(learner).__name__}.loss has no gradient; call self.student, and not the average or a detached copy")


def _check_counts(learner: Any, teacher: int, student: int, counted: int) -> None:
    """Of the forwards of a training: those that the teacher ran, those of the student, and the teacher's that were counted."""
    if counted != teacher:
        raise ValueError(
            f"{type(learner).__name__} counted {counted} forwards of the teacher where it ran {teacher}; add those outside of "
            "collect() to self.teacher_nfe"
        )
    if student < (least := learner.step * learner.config.batch_size):
        raise ValueError(
            f"{type(learner).__name__} counted {student} forwards of the student in {learner.step} updates; each takes a batch of states, "
            f"{least} in all: add those of networks beside self.student to student_nfe"
        )


def _check_resume(agent: type[Algorithm], settings: dict[str, Any]) -> None:
    def weights(learner: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for network in learner.networks.values() for p in network.parameters()])

    whole, first, second = (_make(agent, 12, settings) for _ in range(3))
    whole.learn(progress=False)
    with tempfile.TemporaryDirectory() as folder:
        while first.step < 6:
            if first.step % first.collect_every == 0:
                first.trainer.collect()
            first.trainer.update(first.draw())
        first.save(folder)
        second.load(folder)
    second.train(progress=False)
    if not torch.equal(weights(second), weights(whole)):
        raise ValueError(
            f"{agent.__name__}: a run that was saved after 6 of 12 updates and resumed ended in other weights; put what its next updates "
            "depend on into state_dict() and load_state_dict()"
        )
