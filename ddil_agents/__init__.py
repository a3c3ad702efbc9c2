"""Learners on the diffusion MDP: behaviour cloning (progressive distillation), DAgger (DDIL), LCM and DMD2.

The names below are imported when first used, so that `python -m ddil_agents.dagger` runs its module once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddil_agents.bc import BCConfig, BehaviourCloning
    from ddil_agents.beta import Beta
    from ddil_agents.buffer import SOURCES, SourceBuffer
    from ddil_agents.collect import Collector
    from ddil_agents.dagger import Dagger, DaggerConfig
    from ddil_agents.dmd2 import DistributionMatching, DMD2Config
    from ddil_agents.evaluate import Evaluation, Judge
    from ddil_agents.lcm import LatentConsistency, LCMConfig
    from ddil_agents.learner import Learner, LearnerConfig

_HOME = {
    "BCConfig": "bc",
    "BehaviourCloning": "bc",
    "Beta": "beta",
    "SOURCES": "buffer",
    "SourceBuffer": "buffer",
    "Collector": "collect",
    "Dagger": "dagger",
    "DaggerConfig": "dagger",
    "DistributionMatching": "dmd2",
    "DMD2Config": "dmd2",
    "Evaluation": "evaluate",
    "Judge": "evaluate",
    "LatentConsistency": "lcm",
    "LCMConfig": "lcm",
    "Learner": "learner",
    "LearnerConfig": "learner",
}

__all__ = [
    "SOURCES",
    "BCConfig",
    "BehaviourCloning",
    "Beta",
    "Collector",
    "DMD2Config",
    "Dagger",
    "DaggerConfig",
    "DistributionMatching",
    "Evaluation",
    "Judge",
    "LCMConfig",
    "LatentConsistency",
    "Learner",
    "LearnerConfig",
    "SourceBuffer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ddil_agents' has no attribute {name!r}")
    return getattr(import_module(f"ddil_agents.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
