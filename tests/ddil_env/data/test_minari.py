"""Demonstrations of one's own, as a local Minari dataset: `--data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from helpers import refused

from ddil_agents.bc import main as bc
from ddil_env import load_expert

minari = pytest.importorskip("minari", reason="Minari comes with ddil[worlds]")
pytest.importorskip("Box2D", reason="Box2D comes with ddil[worlds]")


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def keep(dataset_id: str, env_id: str, actions: Any, **kwargs: Any) -> None:
    """Keeps an episode of these actions, of an environment that is stepped by them."""
    from minari.data_collector import EpisodeBuffer

    env = gymnasium.make(env_id, **kwargs)
    observations, rewards = [env.reset(seed=0)[0]], []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(float(reward))
    ends = [False] * (len(actions) - 1) + [True]
    recorded = {"observations": np.stack(observations), "actions": np.stack(actions), "rewards": rewards}
    episodes = [EpisodeBuffer(id=i, **recorded, terminations=ends, truncations=ends) for i in range(2)]
    minari.create_dataset_from_buffers(dataset_id, episodes, env, eval_env=env)


def test_a_dataset_of_the_shipped_landings_gives_the_shipped_demonstrations() -> None:
    from ddil_env.experts.train_lunar_lander import main as train

    train(["--minari", "scripted/landings-v0", "--demos", "3"])
    brought, shipped = load_expert("lunar_lander", num_demos=2, data="scripted/landings-v0"), load_expert("lunar_lander", num_demos=2)
    for ours, theirs in zip(brought.demos[False], shipped.demos[False], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # a simulator's last bits depend on its libraries' versions
    third = shipped.demos[True][0][: len(brought.demos[True][0])]
    torch.testing.assert_close(brought.demos[True][0], third, atol=1e-4, rtol=0)
    assert "demonstrations" in brought.identity()  # a run resumes on the same ones alone
    assert "demonstrations" not in shipped.identity()


def test_actions_are_stretched_from_their_bounds() -> None:
    from ddil_env.data.minari import read_demonstrations

    keep("me/pendulum-v0", "Pendulum-v1", [np.array([a], np.float32) for a in (-2.0, 0.0, 1.0)])
    c, actions, episodes = read_demonstrations("me/pendulum-v0", "Pendulum-v1", (1,), (3,))
    assert actions.flatten().tolist() == pytest.approx([-1, 0, 0.5] * 2)
    assert episodes.tolist() == [0, 0, 0, 1, 1, 1]
    assert c.shape == (6, 3)


def test_what_is_no_set_of_such_demonstrations_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def error(data: str) -> str:
        return refused(bc, ["--env", "lunar_lander", "--data", data], capsys)

    assert "data='me/absent-v0': the dataset is not there in" in error("me/absent-v0")
    keep("me/pendulum-v0", "Pendulum-v1", [np.zeros(1, np.float32)] * 2)
    assert "was recorded in Pendulum-v1; need demonstrations of LunarLander-v3" in error("me/pendulum-v0")
    keep("me/discrete-v0", "LunarLander-v3", [0, 1])
    assert "has actions in Discrete(4); LunarLander-v3 needs a Box of shape (2,) here" in error("me/discrete-v0")
    keep("me/nan-v0", "LunarLander-v3", [np.zeros(2, np.float32), np.full(2, np.nan, np.float32)], continuous=True)
    assert "not finite" in error("me/nan-v0")
    keep("me/short-v0", "LunarLander-v3", [np.zeros(2, np.float32)] * 2, continuous=True)
    assert "num_demos=5: there are 2, and one at least is held out" in error("me/short-v0")
