"""The reverse denoising process as a Markov decision process, with pretrained diffusion models as experts."""

import logging

from ddil_env.adapters import LoRA
from ddil_env.check import check_expert
from ddil_env.denoiser import Denoiser, NetworkDenoiser
from ddil_env.denoising_env import DenoisingEnv
from ddil_env.expert import Expert, NoDataError
from ddil_env.experts.gaussian_mixture import GaussianMixtureExpert
from ddil_env.gym_env import DenoisingGymEnv, register_envs
from ddil_env.mdp import DenoisingMDP
from ddil_env.policy import DdimPolicy, ExpertPolicy, StudentPolicy
from ddil_env.prediction import Prediction
from ddil_env.presets import load_expert
from ddil_env.rollout import unroll
from ddil_env.schedule import NoiseSchedule
from ddil_env.steps import ddim_step, invert_ddim, renoise_step
from ddil_env.support import Box, Support, Unbounded
from ddil_env.time_grid import TimeGrid
from ddil_env.vector_env import DenoisingVectorEnv
from ddil_env.worlds import Autoregressive, GymWorld, World

register_envs()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it where it is there: it warns of kernels not used here

__all__ = [
    "Autoregressive",
    "Box",
    "DdimPolicy",
    "Denoiser",
    "DenoisingEnv",
    "DenoisingGymEnv",
    "DenoisingMDP",
    "DenoisingVectorEnv",
    "Expert",
    "ExpertPolicy",
    "GaussianMixtureExpert",
    "GymWorld",
    "LoRA",
    "NetworkDenoiser",
    "NoDataError",
    "NoiseSchedule",
    "Prediction",
    "StudentPolicy",
    "Support",
    "TimeGrid",
    "Unbounded",
    "World",
    "check_expert",
    "ddim_step",
    "invert_ddim",
    "load_expert",
    "register_envs",
    "renoise_step",
    "unroll",
]
