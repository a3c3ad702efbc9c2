"""The page of a comparison: report.html, one file that needs no network.

    plots.py, episode_plots.py    the figures               tables.py    conclusions and tables
    figures.py                    drawing them as SVG       viewer.py    data of the trajectory viewer

Jinja2 fills the template page.html, and escapes every string; page.css and page.js become part of the file.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ddil_agents.comparison.page.episode_plots import episode_figures
from ddil_agents.comparison.page.figures import TEACHER, format_number
from ddil_agents.comparison.page.plots import arm_styles, profile_figures, quality_figures, step_figures, training_figures
from ddil_agents.comparison.page.tables import BUDGETS, conclusions, describe_setup, find_unfinished, format_percent, score_tables
from ddil_agents.comparison.page.viewer import read_animation, read_trajectories, samples_in_the_plane, viewer_data
from ddil_agents.evaluation.results import metric_heading
from ddil_agents.training.checkpoint import write_atomically

HERE = Path(__file__).parent


def write_page(result: dict[str, Any], out: Path) -> Path:
    """Writes report.html.

    Args:
        result: What comparison.json holds.
        out: The comparison's directory. Figures of runs or trajectories that are not there are left out.

    Returns:
        The path of report.html.
    """
    trajectories = read_trajectories(result, out)
    viewer = viewer_data(result, trajectories)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = jinja.get_template("page.html").render(
        result=result,
        comparison=result["comparison"],
        primary=metric_heading(result["comparison"]["primary"], result),
        percent=format_percent(result["comparison"]["level"]),
        metric_heading=metric_heading,
        BUDGETS=BUDGETS,
        number=format_number,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # of the only script that the page allows
        sentences=conclusions(result),
        warnings=[*result["flags"], *find_unfinished(result)],
        settings=describe_setup(result),
        arms={arm: yaml.safe_dump(spec["settings"], sort_keys=False, allow_unicode=True) for arm, spec in result["arms"].items()},
        tables=[score_tables(result, budget) for budget in result["budgets"]],
        quality=quality_figures(result),
        profile=profile_figures(result),
        processes={
            b: [episode_figures(result, b), step_figures(result, b, out), *training_figures(result, b, out)] for b in result["budgets"]
        },
        styles={**dict.fromkeys(trajectories, TEACHER), **arm_styles(result)},  # trajectories are of arms, or else of the teacher
        viewer=viewer,
        plane=samples_in_the_plane(result, trajectories, viewer["cloud"]),
        data=script_data(viewer),
        episodes=read_animation(out),
    )
    write_atomically(out / "report.html", page)
    return out / "report.html"


def script_data(viewer: dict[str, Any]) -> dict[str, Any]:
    """The part of the viewer's data that the script reads; the style sheet holds the pictures."""
    models = [{key: value for key, value in model.items() if key not in ("sheet", "ratio")} for model in viewer["models"]]
    return {key: viewer[key] for key in ("kind", "conditions", "reach")} | {"models": models}
