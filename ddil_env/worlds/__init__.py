"""Worlds: where a sample goes, and where the next condition comes from."""

from ddil_env.worlds.autoregressive import Autoregressive
from ddil_env.worlds.episodes import Episodes, run_episodes
from ddil_env.worlds.fork import Fork
from ddil_env.worlds.gym_world import GymWorld
from ddil_env.worlds.world import World

__all__ = ["Autoregressive", "Episodes", "Fork", "GymWorld", "World", "run_episodes"]
