"""Learners on the diffusion MDP: behaviour cloning (progressive distillation) and DAgger (DDIL)."""

from ddil_agents.bc import BCConfig, BehaviourCloning
from ddil_agents.beta import Beta
from ddil_agents.buffer import SOURCES, SourceBuffer
from ddil_agents.collect import Collector
from ddil_agents.dagger import Dagger, DaggerConfig
from ddil_agents.evaluate import Evaluation, Judge
from ddil_agents.learner import Learner, LearnerConfig

__all__ = [
    "SOURCES",
    "BCConfig",
    "BehaviourCloning",
    "Beta",
    "Collector",
    "Dagger",
    "DaggerConfig",
    "Evaluation",
    "Judge",
    "Learner",
    "LearnerConfig",
    "SourceBuffer",
]
