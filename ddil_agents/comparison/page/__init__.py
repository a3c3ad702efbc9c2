"""The page of a comparison: report.html, one file that needs no network.

    tables.py    what the tests say        figures.py    how things are drawn
    plots.py     what is drawn             viewer.py     the denoisings that can be played

page.html, page.css and page.js are the page itself; Jinja2 fills it and escapes every string.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ddil_agents.comparison.page.figures import TEACHER, number
from ddil_agents.comparison.page.plots import looks, per_step, profile, quality, training
from ddil_agents.comparison.page.tables import BUDGETS, conclusions, percent, settings, tables, unfinished
from ddil_agents.comparison.page.viewer import read_trajectories, samples_in_the_plane, show
from ddil_agents.evaluation.results import heading
from ddil_agents.training.checkpoint import write_atomically

HERE = Path(__file__).parent


def write_page(result: dict[str, Any], out: Path) -> Path:
    """Writes report.html.

    Args:
        result: What comparison.json holds.
        out: The comparison's directory, with its runs/; what is not there is left out.
    """
    trajectories = read_trajectories(result, out)
    shown = show(result, trajectories)
    script = (HERE / "page.js").read_text()
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = jinja.get_template("page.html").render(
        result=result,
        parts=result["comparison"],
        primary=heading(result["comparison"]["primary"], result),
        percent=percent(result["comparison"]["level"]),
        heading=heading,
        BUDGETS=BUDGETS,
        number=number,
        css=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # the one script that may run
        sentences=conclusions(result),
        warnings=[*result["flags"], *unfinished(result)],
        settings=settings(result),
        arms={arm: yaml.safe_dump(spec["settings"], sort_keys=False, allow_unicode=True) for arm, spec in result["arms"].items()},
        tables=[tables(result, budget) for budget in result["budgets"]],
        quality=quality(result),
        profile=profile(result),
        processes={b: [per_step(result, b, out), *training(result, b, out)] for b in result["budgets"]},
        looks={**dict.fromkeys(trajectories, TEACHER), **looks(result)},  # all that is no arm is the teacher, on some arm's times
        show=shown,
        ends=samples_in_the_plane(result, trajectories, shown["cloud"]),
        data=for_script(shown),
    )
    write_atomically(out / "report.html", page)
    return out / "report.html"


def for_script(shown: dict[str, Any]) -> dict[str, Any]:
    """What the viewer's script needs; pictures are in the style sheet."""
    models = [{key: value for key, value in model.items() if key not in ("sheet", "ratio")} for model in shown["models"]]
    return {key: shown[key] for key in ("kind", "conditions", "reach")} | {"models": models}
