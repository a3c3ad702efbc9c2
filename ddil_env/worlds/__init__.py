"""Worlds: environments that map a generated sample to the next condition and a reward."""

from ddil_env.worlds.autoregressive import Autoregressive
from ddil_env.worlds.episodes import Episodes, run_episodes
from ddil_env.worlds.fork import Fork
from ddil_env.worlds.gym_world import GymWorld
from ddil_env.worlds.world import World

__all__ = ["Autoregressive", "Episodes", "Fork", "GymWorld", "World", "run_episodes"]
