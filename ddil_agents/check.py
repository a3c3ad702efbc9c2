"""Checks that an agent of your own works with all commands, on a toy problem, in seconds.

    from ddil_agents import check_agent
    check_agent(MyAgent)

The check trains the agent, compares its samples, saves and resumes it. An error says what is wrong and how to repair it.
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
    """Trains an agent on a mixture of four Gaussians in the plane, and checks what every command relies on.

    Args:
        agent: The agent's class.
        num_updates: Number of updates in which the student must come nearer to the teacher's samples.
        settings: Settings of its config, in the place of those of the toy problem.

    Raises:
        ValueError: the class is no subclass of Algorithm; its loss is not one number per state; it learns nothing; it draws from torch's
            global generator; its forwards are not counted; or a run that is saved and resumed ends in other weights.
    """
    if not (isinstance(agent, type) and issubclass(agent, Algorithm)):
        raise ValueError(f"{agent!r} is not a subclass of ddil_agents.Algorithm")
    for name in ("name", "Config"):
        if not hasattr(agent, name) or (name == "name" and name not in vars(agent)):
            raise ValueError(f"{agent.__name__} has no {name} of its own, by which results identify it; set it on the class")
    _check_loss(_make_learner(agent, num_updates, settings))
    with _global_generator(0):
        rng_state, learner = torch.get_rng_state(), _make_learner(agent, num_updates, settings)
        untrained, nfe_before = _distance_to_teacher(learner), (learner.expert.nfe, learner.student_nfe, learner.teacher_nfe)
        learner.learn(progress=False)
        if not torch.equal(torch.get_rng_state(), rng_state):
            raise ValueError(
                f"{agent.__name__} draws from torch's global generator, so that its runs are not reproducible; draw from a stream of "
                "self.collector.streams"
            )
    nfe_after = (learner.expert.nfe, learner.student_nfe, learner.teacher_nfe)
    _check_nfe(learner, *(after - before for before, after in zip(nfe_before, nfe_after, strict=True)))
    if not (trained := _distance_to_teacher(learner)) < untrained:
        raise ValueError(
            f"{agent.__name__}: after {num_updates} updates its samples are {trained:.3f} from the teacher's, and were {untrained:.3f} "
            "before the first (sliced Wasserstein distance); check its loss, or pass a larger num_updates or another learning_rate"
        )
    _check_resume(agent, settings)


def _make_learner(agent: type[Algorithm], num_updates: int, settings: dict[str, Any]) -> Any:
    expert = GaussianMixtureExpert([[-0.8, -0.8], [-0.8, 0.8], [0.8, -0.8], [0.8, 0.8]], 0.25)
    return agent(expert, agent.Config(**TOY | {"num_updates": num_updates} | settings))


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _distance_to_teacher(learner: Any) -> float:
    """Sliced Wasserstein distance of the student's samples to the teacher's."""
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    student = unroll(learner.student_policy, learner.grid, x_T, kernel=learner.kernel, generator=torch.Generator().manual_seed(1))
    return sliced_wasserstein(student[:, -1], unroll(learner.teacher_policy, learner.grid, x_T)[:, -1])


def _check_loss(learner: Any) -> None:
    learner.trainer.collect()
    batch = Batch(learner.draw())
    loss = learner.loss(batch)
    if not isinstance(loss, Tensor) or loss.shape != (len(batch),):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{type(learner).__name__}.loss returns {got} for a batch of {len(batch)} states; need ({len(batch)},), the loss of each "
            "state: the trainer takes the mean, and logs the loss of each source"
        )
    if not loss.requires_grad:
        raise ValueError(f"{type(learner).__name__}.loss has no gradient; call self.student, not self.ema_student or a detached copy")


def _check_nfe(learner: Any, teacher: int, student: int, counted: int) -> None:
    """Checks the counts of a training.

    Args:
        learner: The trained agent.
        teacher: Forwards that the teacher ran.
        student: Forwards that `student_nfe` counted.
        counted: Forwards that `teacher_nfe` counted.
    """
    if counted != teacher:
        raise ValueError(
            f"{type(learner).__name__} counted {counted} forwards of the teacher where it ran {teacher}; add those outside "
            "collect() to self.teacher_nfe"
        )
    if student < (least := learner.step * learner.config.batch_size):
        raise ValueError(
            f"{type(learner).__name__} counted {student} forwards of the student in {learner.step} updates; each takes a batch of states, "
            f"{least} in all; add the forwards of networks other than self.student to student_nfe"
        )


def _check_resume(agent: type[Algorithm], settings: dict[str, Any]) -> None:
    def weights(learner: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for network in learner.networks.values() for p in network.parameters()])

    uninterrupted, saved, resumed = (_make_learner(agent, 12, settings) for _ in range(3))
    uninterrupted.learn(progress=False)
    with tempfile.TemporaryDirectory() as folder:
        while saved.step < 6:
            if saved.step % saved.collect_every == 0:
                saved.trainer.collect()
            saved.trainer.update(saved.draw())
        saved.save(folder)
        resumed.load(folder)
    resumed.train(progress=False)
    if not torch.equal(weights(resumed), weights(uninterrupted)):
        raise ValueError(
            f"{agent.__name__}: a run that was saved after 6 of 12 updates and resumed ended in other weights; put the state that its "
            "updates depend on into state_dict() and load_state_dict()"
        )
