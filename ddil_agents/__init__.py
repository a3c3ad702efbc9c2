"""Imitation learning on the diffusion MDP: behaviour cloning (progressive distillation), DAgger (DDIL), LCM, DMD2 and others.

Each name below is imported when it is first used, so that `python -m ddil_agents.dagger` runs its module once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddil_agents.action_matching import ActionMatching, ActionMatchingConfig
    from ddil_agents.aggrevate import Aggrevate, AggrevateConfig
    from ddil_agents.algorithm import Algorithm
    from ddil_agents.bc import BCConfig, BehaviourCloning
    from ddil_agents.check import check_agent
    from ddil_agents.commands.load import load
    from ddil_agents.comparison.arms import Comparison
    from ddil_agents.config import LearnerConfig
    from ddil_agents.dagger import Dagger, DaggerConfig
    from ddil_agents.dart import Dart, DartConfig
    from ddil_agents.dmd2 import DMD2, DMD2Config
    from ddil_agents.evaluation.evaluator import Evaluator
    from ddil_agents.evaluation.settings import Evaluation
    from ddil_agents.gail import Gail, GailConfig
    from ddil_agents.lcm import LCM, LCMConfig
    from ddil_agents.ppo import PPOAgent as PPOAgent
    from ddil_agents.ppo import PPOConfig as PPOConfig
    from ddil_agents.safe_dagger import SafeDagger, SafeDaggerConfig
    from ddil_agents.scheduled_sampling import ScheduledSampling, ScheduledSamplingConfig
    from ddil_agents.states.batch import Batch
    from ddil_agents.states.beta import SOURCES, Beta
    from ddil_agents.states.buffer import SourceBuffer
    from ddil_agents.states.collect import Collector
    from ddil_agents.training.callbacks import Callback
    from ddil_agents.training.trainer import GradientStep

_MODULE_OF = {
    "ActionMatching": "action_matching",
    "ActionMatchingConfig": "action_matching",
    "Aggrevate": "aggrevate",
    "AggrevateConfig": "aggrevate",
    "Algorithm": "algorithm",
    "Batch": "states.batch",
    "Callback": "training.callbacks",
    "GradientStep": "training.trainer",
    "BCConfig": "bc",
    "BehaviourCloning": "bc",
    "Beta": "states.beta",
    "SOURCES": "states.beta",
    "SourceBuffer": "states.buffer",
    "Collector": "states.collect",
    "Comparison": "comparison.arms",
    "check_agent": "check",
    "load": "commands.load",
    "Dagger": "dagger",
    "DaggerConfig": "dagger",
    "Dart": "dart",
    "DartConfig": "dart",
    "DMD2Config": "dmd2",
    "DMD2": "dmd2",
    "Evaluation": "evaluation.settings",
    "Evaluator": "evaluation.evaluator",
    "Gail": "gail",
    "GailConfig": "gail",
    "LCMConfig": "lcm",
    "LCM": "lcm",
    "LearnerConfig": "config",
    "PPOAgent": "ppo",
    "PPOConfig": "ppo",
    "SafeDagger": "safe_dagger",
    "SafeDaggerConfig": "safe_dagger",
    "ScheduledSampling": "scheduled_sampling",
    "ScheduledSamplingConfig": "scheduled_sampling",
}

__all__ = [  # without PPOAgent and PPOConfig, so that `import *` needs no stable-baselines3
    "DMD2",
    "LCM",
    "SOURCES",
    "ActionMatching",
    "ActionMatchingConfig",
    "Aggrevate",
    "AggrevateConfig",
    "Algorithm",
    "BCConfig",
    "Batch",
    "BehaviourCloning",
    "Beta",
    "Callback",
    "Collector",
    "Comparison",
    "DMD2Config",
    "Dagger",
    "DaggerConfig",
    "Dart",
    "DartConfig",
    "Evaluation",
    "Evaluator",
    "Gail",
    "GailConfig",
    "GradientStep",
    "LCMConfig",
    "LearnerConfig",
    "SafeDagger",
    "SafeDaggerConfig",
    "ScheduledSampling",
    "ScheduledSamplingConfig",
    "SourceBuffer",
    "check_agent",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ddil_agents' has no attribute {name!r}")
    return getattr(import_module(f"ddil_agents.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
