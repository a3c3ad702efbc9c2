"""Imitation learning on the diffusion MDP: behaviour cloning (progressive distillation), DAgger (DDIL), LCM, DMD2 and others.

Each name below is imported when it is first used, so that `python -m ddil_agents.dagger` runs its module once.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each as itself, so that type checkers take it for exported
    from ddil_agents.action_matching import ActionMatching as ActionMatching
    from ddil_agents.action_matching import ActionMatchingConfig as ActionMatchingConfig
    from ddil_agents.aggrevate import Aggrevate as Aggrevate
    from ddil_agents.aggrevate import AggrevateConfig as AggrevateConfig
    from ddil_agents.algorithm import Algorithm as Algorithm
    from ddil_agents.bc import BCConfig as BCConfig
    from ddil_agents.bc import BehaviourCloning as BehaviourCloning
    from ddil_agents.check import check_agent as check_agent
    from ddil_agents.commands.load import load as load
    from ddil_agents.commands.load import make as make
    from ddil_agents.comparison.arms import Comparison as Comparison
    from ddil_agents.config import LearnerConfig as LearnerConfig
    from ddil_agents.dagger import Dagger as Dagger
    from ddil_agents.dagger import DaggerConfig as DaggerConfig
    from ddil_agents.dart import Dart as Dart
    from ddil_agents.dart import DartConfig as DartConfig
    from ddil_agents.dmd2 import DMD2 as DMD2
    from ddil_agents.dmd2 import DMD2Config as DMD2Config
    from ddil_agents.evaluation.episodes import EpisodeEvaluator as EpisodeEvaluator
    from ddil_agents.evaluation.evaluator import Evaluator as Evaluator
    from ddil_agents.evaluation.settings import Evaluation as Evaluation
    from ddil_agents.gail import Gail as Gail
    from ddil_agents.gail import GailConfig as GailConfig
    from ddil_agents.lcm import LCM as LCM
    from ddil_agents.lcm import LCMConfig as LCMConfig
    from ddil_agents.ppo import PPOAgent as PPOAgent
    from ddil_agents.ppo import PPOConfig as PPOConfig
    from ddil_agents.safe_dagger import SafeDagger as SafeDagger
    from ddil_agents.safe_dagger import SafeDaggerConfig as SafeDaggerConfig
    from ddil_agents.scheduled_sampling import ScheduledSampling as ScheduledSampling
    from ddil_agents.scheduled_sampling import ScheduledSamplingConfig as ScheduledSamplingConfig
    from ddil_agents.states.batch import Batch as Batch
    from ddil_agents.states.beta import SOURCES as SOURCES
    from ddil_agents.states.beta import Beta as Beta
    from ddil_agents.states.buffer import SourceBuffer as SourceBuffer
    from ddil_agents.states.collect import Collector as Collector
    from ddil_agents.training.callbacks import Callback as Callback
    from ddil_agents.training.trainer import GradientStep as GradientStep

_NAMES = {
    "action_matching": ("ActionMatching", "ActionMatchingConfig"),
    "aggrevate": ("Aggrevate", "AggrevateConfig"),
    "algorithm": ("Algorithm",),
    "bc": ("BCConfig", "BehaviourCloning"),
    "check": ("check_agent",),
    "commands.load": ("load", "make"),
    "comparison.arms": ("Comparison",),
    "config": ("LearnerConfig",),
    "dagger": ("Dagger", "DaggerConfig"),
    "dart": ("Dart", "DartConfig"),
    "dmd2": ("DMD2Config", "DMD2"),
    "evaluation.episodes": ("EpisodeEvaluator",),
    "evaluation.evaluator": ("Evaluator",),
    "evaluation.settings": ("Evaluation",),
    "gail": ("Gail", "GailConfig"),
    "lcm": ("LCMConfig", "LCM"),
    "ppo": ("PPOAgent", "PPOConfig"),
    "safe_dagger": ("SafeDagger", "SafeDaggerConfig"),
    "scheduled_sampling": ("ScheduledSampling", "ScheduledSamplingConfig"),
    "states.batch": ("Batch",),
    "states.beta": ("Beta", "SOURCES"),
    "states.buffer": ("SourceBuffer",),
    "states.collect": ("Collector",),
    "training.callbacks": ("Callback",),
    "training.trainer": ("GradientStep",),
}
# An algorithm's file can be taken out: its names go with it.
_MODULE_OF = {name: module for module, names in _NAMES.items() if find_spec(f"ddil_agents.{module}") is not None for name in names}
__all__ = sorted(set(_MODULE_OF) - {"PPOAgent", "PPOConfig"})  # so that `import *` needs no stable-baselines3


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ddil_agents' has no attribute {name!r}")
    return getattr(import_module(f"ddil_agents.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
