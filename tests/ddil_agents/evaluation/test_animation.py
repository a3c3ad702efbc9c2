"""Animations of episodes."""

from pathlib import Path

import numpy as np
from line_world import Steersman
from PIL import Image

from ddil_agents.evaluation.animation import EPISODES, GAP, HEIGHT, render_episodes, save_episodes
from ddil_agents.evaluation.episodes import EpisodeEvaluator
from ddil_env import ExpertPolicy, TimeGrid, load_expert


def test_an_animation_shows_the_first_episodes_of_each_policy_until_they_end(tmp_path: Path) -> None:
    expert = load_expert("fork", num_rows=3)
    evaluator = EpisodeEvaluator(ExpertPolicy(expert), TimeGrid(expert.schedule, 1), n=5)
    film = render_episodes(evaluator, evaluator.expert_policy)
    assert film is not None
    lengths = evaluator.expert_episodes.length[:EPISODES]
    wide, high = evaluator.world.render(0).shape[1::-1]  # type: ignore[union-attr]
    assert film.shape == (int(lengths.max()) + 1, HEIGHT, EPISODES * (round(wide * HEIGHT / high) + GAP), 3)
    ended = int(lengths[0])
    column = film[:, :, : film.shape[2] // EPISODES]
    assert np.array_equal(column[ended], column[-1])  # it stands still where it has ended
    assert not np.array_equal(column[0], column[1])
    again = {"again": (evaluator.expert_policy, evaluator.grid, "ddim")}  # beside the teacher, which is the same
    assert save_episodes(tmp_path / "episodes.gif", evaluator, again)  # type: ignore[arg-type]
    with Image.open(tmp_path / "episodes.gif") as gif:
        assert gif.n_frames == len(film)  # type: ignore[attr-defined]
        assert gif.size[1] == 2 * (HEIGHT + GAP)
        rows = np.asarray(gif.convert("RGB")).reshape(2, HEIGHT + GAP, gif.size[0], 3)[:, :, -film.shape[2] :]  # beside the names
    assert np.array_equal(rows[0], rows[1])  # the same starts and noise


def test_a_world_that_is_not_rendered_has_no_animation(tmp_path: Path) -> None:
    expert = Steersman()
    evaluator = EpisodeEvaluator(ExpertPolicy(expert), TimeGrid(expert.schedule, 1), n=2)
    assert not save_episodes(tmp_path / "episodes.gif", evaluator, {})
    assert not (tmp_path / "episodes.gif").exists()
