"""The site's pages follow its rules, and what they take from code and committed files is there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import ddil_agents
import ddil_env
from ddil_agents.commands.agents import agent_names

DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS), str(DOCS / "_ext")]

import check_links  # noqa: E402
import check_pages  # noqa: E402
import docstrings  # noqa: E402
import from_code  # noqa: E402
import tables  # noqa: E402

PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
OWN = [path for path in PAGES if path.relative_to(DOCS).parts[0] not in ("start", "concepts", "tutorials")]
HEADINGS = [
    "Overview",
    "Equation and code",
    "Usage",
    "Logged metrics",
    "Differences from the paper",
    "Expected result",
    "In a world",
    "Next",
]
TABLE = "# T\n\n## One `file.json`\n\n| | a | b |\n|---|---|---|\n| x | 1 | 2 |\n| `y` | 3 | 4 |\n\n### In one\n\ntext\n\n## Two\n\nmore\n"


def test_every_page_ends_with_where_to_go_next() -> None:
    assert [str(page) for page in OWN if page.name != "index.md" and "\n## Next\n" not in page.read_text()] == []


@pytest.mark.parametrize("agent", [name for name in agent_names() if (ROOT / "ddil_agents" / f"{name}.py").is_file()])
def test_every_algorithm_has_a_page_of_the_same_headings_and_its_flags(agent: str) -> None:
    text = (DOCS / "algorithms" / f"{agent}.md").read_text()
    found = [heading.replace("papers", "paper") for heading in re.findall(r"^## (.*)$", text, re.M)]
    assert found == HEADINGS
    assert f"```{{flags}} {agent}\n" in (DOCS / "reference" / "cli" / f"{agent}.md").read_text()
    assert f"({agent}.md)" in (DOCS / "algorithms" / "index.md").read_text()


def test_the_reference_has_every_public_name() -> None:
    text = "".join((DOCS / "reference" / f"api_{name}.md").read_text() for name in ("env", "agents"))
    public = {f"ddil_env.{name}" for name in ddil_env.__all__}
    public |= {f"ddil_agents.{name}" for name in dir(ddil_agents) if name != "SOURCES"}  # a tuple of names
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M))
    assert sorted(public - documented) == []


def test_the_flags_of_a_command_are_all_there_with_their_defaults() -> None:
    text = from_code.flag_list(from_code.agent_flags("dagger"))
    assert "`--num_updates` *INT* = `1000`\n: Number of updates" in text
    assert "--env." not in text
    assert "`--env.max_batch`" in from_code.flag_list(from_code.agent_flags("bc", "sd15"))
    assert "`--jobs` *INT* = `null`" in from_code.flag_list(from_code.other_flags("compare"))


def test_what_a_preset_changes_is_told_beside_the_defaults() -> None:
    head, *rows = from_code.differing_settings("dagger", "sd15", "paper")
    assert head == ["setting", "`--env sd15`", "`--config paper`"]
    assert ["`batch_size`", "`32`", "`224`"] in rows
    assert ["`lora.rank`", "`64`", "`null`"] in rows


def test_error_messages_are_read_from_the_code() -> None:
    source = 'def f(x):\n    if x:\n        raise ValueError(f"x={x}: need at least 1")\n    raise KeyError("x")\n'
    assert from_code.error_messages(source) == [("ValueError", "x=…: need at least 1")]


def test_rows_and_sections_are_found_or_refused() -> None:
    assert tables.section_of(TABLE, "One").startswith("| | a | b |")
    assert tables.section_of(TABLE, "Two") == "more"
    assert "**In one**" in tables.without_headings(TABLE)
    assert tables.select(tables.tables_of(TABLE), ["y"], ["b"]) == [["", "b"], ["`y`", "4"]]
    assert len(tables.select([[["", "a"], ["x", "1"], ["x", "2"]]], ["x"], [])) == 3
    with pytest.raises(ValueError, match="no table has the rows"):
        tables.select(tables.tables_of(TABLE), ["z"], [])
    with pytest.raises(ValueError, match="0 sections begin with 'Three'"):
        tables.section_of(TABLE, "Three")
    with pytest.raises(ValueError, match="states no hours"):
        tables.hours("num_updates: 3\n")


def test_the_rows_that_pages_show_are_in_the_files_that_they_name() -> None:
    shown = 0
    for page in PAGES:
        for path, options in re.findall(r"^```\{committed\} (\S+)\n((?::.*\n)*)", page.read_text(), re.M):
            section = dict(re.findall(r"^:(\w+): (.*)$", options, re.M)).get("section")
            assert section is None or tables.section_of((ROOT / path).read_text(), section)
        for path, options, rows in re.findall(r"^```\{rows\} (\S+)\n((?::.*\n)*)(.*?)```$", page.read_text(), re.M | re.S):
            given = dict(re.findall(r"^:(\w+): (.*)$", options, re.M))
            text = (ROOT / path).read_text()
            text = tables.section_of(text, given["section"]) if "section" in given else text
            columns = [part.strip() for part in given.get("columns", "").split("|") if part.strip()]
            assert tables.select(tables.tables_of(text), rows.split("\n")[:-1], columns)
            shown += 1
    assert shown >= 15


def test_the_numbers_in_sentences_are_in_the_files_that_they_name() -> None:
    found = {text for page in PAGES for text in re.findall(r"\{number\}`([^`]*)`", page.read_text().replace(r"\|", "|"))}
    for name, *section, row, column in (text.split(" | ") for text in found):
        text = (ROOT / "benchmarks" / "results" / name).read_text()
        tables.number(tables.section_of(text, section[0]) if section else text, row, column)
    assert len(found) >= 15
    table = "| | a |\n|---|---|\n| x | 0.931 [0.9, 0.95] |\n| y | +0.89 ± .58 |\n| z | |\n"
    assert [tables.number(table, row, "a") for row in "xy"] == [".931", "+.89"]
    with pytest.raises(ValueError, match="holds no number"):
        tables.number(table, "z", "a")


@pytest.mark.parametrize(
    ("page", "file", "column", "rows"),
    [
        ("dagger_beta", "fork.md", "success ↑", ["bc", "ddil", "dagger"]),
        ("stable_diffusion_lora", "coloured_digits.md", "caption agreement ↑", ["bc @2", "teacher @2"]),
    ],
)
def test_the_numbers_that_tutorials_type_are_those_of_the_files(page: str, file: str, column: str, rows: list[str]) -> None:
    page_text = (DOCS / "tutorials" / f"{page}.md").read_text()  # opens as a notebook by itself, in which no role is known
    table = (ROOT / "benchmarks" / "results" / file).read_text()
    assert [row for row in rows if f" {tables.number(table, row, column)}" not in page_text] == []


def test_docstrings_become_markup_that_shows_what_they_say() -> None:
    lines = ["A formula:", "", "    a* = |x_0|", "", "Of x_ and *args, `x_`.", "", "Args:", "    x: |x|"]
    assert docstrings.as_rst(lines) == [
        *("A formula:", "", "::", "", "    a* = |x_0|", "", r"Of x\_ and \*args, `x_`.", "", "Args:", r"    x: \|x\|"),
    ]


def test_a_field_whose_text_holds_a_colon_is_no_type() -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed; pip install 'ddil[docs]'")
    from sphinx.ext.napoleon import Config, GoogleDocstring

    lines = ["Distance of the loss: huber or l2.", ""]
    docstrings.process(None, "attribute", "a.b", None, None, lines)  # type: ignore[arg-type]
    assert str(GoogleDocstring(lines, Config(), what="attribute", name="a.b")).split("\n")[:3] == [
        "..",
        "",
        "Distance of the loss: huber or l2.",
    ]


def test_broken_links_and_anchors_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">1</a><a href="b.html#there">2</a><a href="c.html">3</a><a href="https://x.org">4</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="#here">1</a>')
    broken, external = check_links.check(tmp_path)
    assert broken == ["a.html: b.html#there has no such anchor", "a.html: c.html leads to no file"]
    assert external == {"https://x.org"}


@pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no chromium or chromedriver here")
def test_what_is_wrong_with_a_page_in_a_browser_is_found(tmp_path: Path) -> None:
    pytest.importorskip("selenium_axe_python", reason="selenium-axe-python is not installed; pip install selenium-axe-python")
    head = '<!doctype html><html lang="en"><head><title>A page</title><meta name="viewport" content="width=device-width">'
    head += '<link rel="icon" href="data:,"></head><body><main>'
    wide = '<p style="width: 900px">wide</p>'
    (tmp_path / "good.html").write_text(f'{head}<h1>Good</h1><div style="overflow-x: auto" tabindex="0">{wide}</div>')
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 90"><text y="50" font-size="12">a</text></svg>'
    (tmp_path / "small.svg").write_text(svg)
    bad = f'<h1>Bad</h1>{wide}<p style="color: #999">grey</p><img src="none.png" alt="none">'
    (tmp_path / "bad.html").write_text(f'{head}{bad}<img src="small.svg" style="width: 300px"><script>console.error("oh")</script>')
    found = [line.split(": ")[:2] for line in check_pages.check_site(tmp_path, ["good.html", "bad.html"], keyboard=False)]
    rules = ("picture", "alt", "text", "image-alt", "color-contrast")
    expected = {(f"bad.html at {width}", rule) for width in (390, 1280) for rule in rules}
    assert {tuple(line) for line in found} == expected | {("bad.html at 390", "width"), ("bad.html", "console")}


def test_every_number_on_the_reports_pictures_is_explained() -> None:
    pytest.importorskip("selenium", reason="selenium is not installed; pip install selenium")
    import report_figures

    text = (DOCS / "evaluate" / "report.md").read_text()
    numbered = [int(number) for number in re.findall(r"^(\d+)\. ", text, re.M)]
    assert numbered == list(range(1, sum(len(part.numbered) for part in report_figures.PARTS.values()) + 1))
    shown = re.findall(r"\(\.\./four_agents/(\S+)-light\.png\)\{\.only-light .*\n.*\(\.\./four_agents/\1-dark\.png\)\{\.only-dark ", text)
    assert shown == list(report_figures.PARTS)
    assert all((DOCS / "four_agents" / f"{name}-{theme}.png").is_file() for name in shown for theme in ("light", "dark"))


README_ROWS = {  # a row of README's table, the section of worlds.md, and its rows in the order of README's columns
    "`fork`, small student in 2 steps: success ↑": "fork, width 32, 2 steps, 8 demos",
    "lander, small student in 1 step: success ↑": "lunar_lander, width 16, 1 step, 20 demos",
    "`fork`, the teacher's own network in 1 step: success ↑": "fork, the teacher's network, 1 step, 8 demos",
}


@pytest.mark.parametrize("row", README_ROWS)
def test_readmes_numbers_are_those_of_the_results(row: str) -> None:
    (cells,) = [cells[1:] for table in tables.tables_of((ROOT / "README.md").read_text()) for cells in table if cells[0] == row]
    section = tables.section_of((ROOT / "benchmarks/results/worlds.md").read_text(), README_ROWS[row])
    assert cells == [tables.number(section, arm, "success") for arm in ("bc", "noise 0.3", "ddil", "dagger", "teacher, 16 steps")]


def test_the_counts_of_worlds_in_words_are_those_of_the_results() -> None:
    (verdicts, *_) = tables.tables_of((ROOT / "benchmarks/results/worlds.md").read_text())
    helps = f"in {sum(row[-1] == 'helps' for row in verdicts)} of "
    rule = json.loads((ROOT / "benchmarks/results/rule.json").read_text())
    noise = f"in {rule['noise_ahead']} of "
    for path in ("README.md", "CHANGELOG.md", "docs/start/choose.md", "docs/results/index.md", "benchmarks/results/README.md"):
        assert helps in " ".join((ROOT / path).read_text().split()), path
    for path in ("CHANGELOG.md", "docs/start/choose.md", "benchmarks/results/README.md"):
        assert noise in " ".join((ROOT / path).read_text().split()), path
