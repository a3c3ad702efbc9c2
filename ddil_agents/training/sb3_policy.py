"""The student as a policy of stable-baselines3: a Gaussian whose mean is the student's DDIM step, and a critic beside it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from torch import Tensor, nn

from ddil_env import NetworkDenoiser


class StudentFeatures(BaseFeaturesExtractor):
    """The features of a state: the student's next latent (d entries), for the actor, and the inputs of the critic.

    The critic's inputs are x_t, u = t/t_max, sin and cos of 2^i π u for i < 6, and c one-hot.
    """

    def __init__(self, observation_space: spaces.Dict, student: NetworkDenoiser, t_max: float) -> None:
        self.size = math.prod(cast(tuple[int, ...], observation_space["x_t"].shape))
        self.num_ids = int(cast(spaces.Discrete, observation_space["c"]).n) if "c" in observation_space.spaces else 0
        super().__init__(observation_space, 2 * self.size + 13 + self.num_ids)
        self.student, self.t_max = student, t_max
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(6), persistent=False)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        x_t, t, s = observations["x_t"], observations["t"], observations["s"]  # times (b, 1)
        one_hot = [observations["c"].flatten(1)] if self.num_ids else []
        action = self.student.predict(x_t, t[:, 0], one_hot[0].argmax(1) if one_hot else None).latent(s[:, 0])
        u = t / self.t_max
        waves = [(u * self.frequencies).sin(), (u * self.frequencies).cos()]
        return torch.cat([action.flatten(1), x_t.flatten(1), u, *waves, *one_hot], dim=1)


class ActionAndCritic(MlpExtractor):
    """Splits StudentFeatures: the first d entries are the actor's, a network of the others is the critic's."""

    def __init__(self, features: StudentFeatures, hidden: list[int], activation: type[nn.Module]) -> None:
        super().__init__(features.features_dim - features.size, {"pi": [], "vf": hidden}, activation)
        self.latent_dim_pi = features.size

    def forward_actor(self, features: Tensor) -> Tensor:
        return features[:, : self.latent_dim_pi]

    def forward_critic(self, features: Tensor) -> Tensor:
        return cast(Tensor, super().forward_critic(features[:, self.latent_dim_pi :]))


class StudentActorCritic(MultiInputActorCriticPolicy):
    """A Gaussian policy with the student's DDIM step as its mean."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActionAndCritic(self.features_extractor, self.net_arch, self.activation_fn)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the actor's features are the mean action
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
