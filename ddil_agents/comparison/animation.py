"""The animation of a comparison in a world: the teacher and the student of every arm, from the same starts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddil_agents.commands.load import load_run
from ddil_agents.evaluation.animation import EPISODES, save_episodes
from ddil_agents.evaluation.episodes import EpisodeEvaluator


def animate_arms(result: dict[str, Any], out: Path) -> bool:
    """Writes episodes.gif of the first seed's students: the teacher in all its steps and in as few as the first arm, then the arms.

    Args:
        result: What comparison.json holds.
        out: The comparison's directory.

    Returns:
        Whether a file was written: not without a world, or where no run has ended.
    """
    first, runs = result["comparison"]["first_seed"], result["budgets"]["updates"]["runs"]
    paths = {run["arm"]: out / run["directory"] for run in runs if run["seed"] == first and run["done"]}
    if not any((path / "episodes.gif").is_file() for path in paths.values()):
        return False
    agents = {arm: load_run(path) for arm, path in paths.items()}
    agent = next(iter(agents.values()))
    evaluator = EpisodeEvaluator(agent.teacher_policy, agent.grid, n=EPISODES, seed=first)
    students = {arm: (agent.student_policy, agent.grid, agent.kernel) for arm, agent in agents.items()}
    return save_episodes(out / "episodes.gif", evaluator, students)
