"""Facts about docs/tutorials, docs/concepts and docs/start: their code runs as it stands, and their figures can be read.

The three cheapest tutorials run here; the build of the site executes all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"
TUTORIALS = sorted(path for path in (DOCS / "tutorials").glob("*.md") if path.name != "index.md")
CHEAPEST = ("trajectories", "sb3_torchrl", "own_world")
PAGES = sorted(path for folder in ("concepts", "start") for path in (DOCS / folder).glob("*.md") if "```python" in path.read_text())
FIGURES = sorted((DOCS / "concepts" / "figures").glob("*.svg"))
PHONE = 358  # pixels of a page's text on a phone of 390


def cells(tutorial: Path) -> list[str]:
    """The code of a tutorial's cells, without their options."""
    return [
        re.sub(r"\A(:.*\n)+", "", cell) for cell in re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```$", tutorial.read_text(), re.S | re.M)
    ]


def run(code: str, folder: Path) -> None:
    """Runs code in a fresh process on one thread, in an empty folder."""
    (folder / "page.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "page.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CHEAPEST)
def test_a_tutorials_cells_run_as_they_stand(name: str, tmp_path: Path) -> None:
    run("\n\n".join(cells(DOCS / "tutorials" / f"{name}.md")), tmp_path)


def test_the_code_of_concepts_and_first_steps_runs_as_it_stands(tmp_path: Path) -> None:
    """Each page in a namespace of its own, all in one process."""
    blocks = {path.name: re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.S | re.M) for path in PAGES}
    codes = {name: "\n\n".join(code) for name, code in blocks.items()}
    pages = [f"exec(compile({code!r}, {name!r}, 'exec'), {{'__name__': 'page'}})" for name, code in codes.items()]
    assert len(pages) >= 7
    run("\n".join(pages), tmp_path)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_says_what_one_sees_what_it_shows_and_what_comes_next(tutorial: Path) -> None:
    text = tutorial.read_text()
    assert text.startswith("---\njupytext:\n")  # so that it opens as a notebook
    for part in ("**What you will see.**", "**What this shows, and what it does not.**", "**Next.**"):
        assert text.count(part) == 1
    for code in cells(tutorial):
        compile(code, tutorial.name, "exec")  # plain Python: no magics
    assert "plt.show()" in text


def test_the_index_lists_every_tutorial() -> None:
    index = (DOCS / "tutorials" / "index.md").read_text()
    assert all(f"]({path.name})" in index and f"\n{path.stem}\n" in index for path in TUTORIALS)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_small_in_two_variants_and_legible_on_a_phone(figure: Path) -> None:
    assert figure.stat().st_size < 200_000
    theme = figure.stem.rpartition("-")[2]
    assert figure.with_name(figure.name.replace(theme, {"light": "dark", "dark": "light"}[theme])).is_file()
    root = ElementTree.parse(figure).getroot()
    width = float(root.attrib["viewBox"].split()[2])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*([\d.]+)px", figure.read_text())]
    assert sizes
    assert min(sizes) * PHONE / width >= 12
