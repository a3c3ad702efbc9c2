"""The directives of this site. Each writes Markdown that it makes from the code or from committed files; no number is typed twice."""

from __future__ import annotations

import re
from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from from_code import OTHERS, agent_flags, differing_settings, error_messages, escape, flag_list, other_flags
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole
from tables import as_table, hours, number, section_of, select, tables_of, without_headings

from ddil_agents.commands import help as help_of

ROOT = Path(__file__).parents[2]  # of the repository


class MarkdownDirective(SphinxDirective):
    """A directive whose content is Markdown that it makes, without headings."""

    has_content = True

    @abstractmethod
    def markdown(self) -> str:
        """The Markdown."""

    def run(self) -> list[nodes.Node]:
        try:
            text = self.markdown()
        except ValueError as error:
            raise self.error(str(error)) from error
        node = nodes.Element()
        node.document = self.state.document
        self.state.nested_parse(StringList(text.splitlines(), self.get_location()), self.content_offset, node)
        return node.children

    def depend_on(self, path: str) -> str:
        """Reads a file of the repository; the page is built again when it changes."""
        self.env.note_dependency(str(ROOT / path))
        return (ROOT / path).read_text(encoding="utf-8")


class FlagsDirective(MarkdownDirective):
    """`{flags} dagger`; with `:env: sd15` the flags that this env adds."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"env": str}

    def markdown(self) -> str:
        command = self.arguments[0]
        for module in (help_of, import_module(f"ddil_agents.{command}"), import_module("ddil_agents.config")):
            self.env.note_dependency(str(module.__file__))
        return flag_list(other_flags(command) if command in OTHERS else agent_flags(command, self.options.get("env")))


class DifferencesDirective(MarkdownDirective):
    """`{differences} dagger sd15 paper`: what `--config paper` of dagger changes beside the defaults of `--env sd15`."""

    required_arguments = 3

    def markdown(self) -> str:
        agent, env, config = self.arguments
        for path in (f"configs/learner/{env}.yaml", f"configs/{agent}/text_to_image.yaml", f"configs/{agent}/{config}.yaml"):
            self.depend_on(path)
        return as_table(differing_settings(agent, env, config))


class PresetsDirective(MarkdownDirective):
    """`{presets} dagger`: every file of configs/dagger, data/ included, each in a dropdown."""

    required_arguments = 1

    def markdown(self) -> str:
        parts = []
        for path in sorted((ROOT / "configs" / self.arguments[0]).rglob("*.yaml")):
            name = path.relative_to(ROOT).as_posix()
            parts.append(f":::{{dropdown}} {name}\n```yaml\n{self.depend_on(name)}```\n:::\n")
        if not parts:
            raise ValueError(f"configs/{self.arguments[0]} holds no YAML file")
        return "\n".join(parts)


class ErrorsDirective(MarkdownDirective):
    """`{errors} ddil_agents`: the messages of all errors that a package raises, by file."""

    required_arguments = 1

    def markdown(self) -> str:
        parts = []
        for path in sorted((ROOT / self.arguments[0]).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if found := error_messages(self.depend_on(name)):
                parts.append(f"**`{name}`**\n\n" + "\n".join(f"- {escape(text)}" for _, text in found) + "\n")
        return "\n".join(parts)


class SectionsDirective(MarkdownDirective):
    """Cards, a line `path | title | text` for each."""

    def markdown(self) -> str:
        cards = []
        for line in self.content:
            path, title, text = (part.strip() for part in line.split("|"))
            cards.append(f":::{{grid-item-card}} {title}\n:link: /{path}\n:link-type: doc\n{text}\n:::")
        return "::::{grid} 1 2 2 3\n:gutter: 3\n\n" + "\n\n".join(cards) + "\n\n::::"


class CommittedDirective(MarkdownDirective):
    """`{committed} benchmarks/results/README.md`, with `:section:` one section of it."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"section": directives.unchanged_required}

    def markdown(self) -> str:
        text = self.depend_on(self.arguments[0])
        return without_headings(section_of(text, self.options["section"]) if "section" in self.options else text)


class RowsDirective(MarkdownDirective):
    """Rows of a table of a committed file: a row's first cell on each line of the content; `:section:`, `:columns: a | b`."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"section": directives.unchanged_required, "columns": directives.unchanged_required}

    def markdown(self) -> str:
        text = self.depend_on(self.arguments[0])
        text = section_of(text, self.options["section"]) if "section" in self.options else text
        columns = [part.strip() for part in self.options.get("columns", "").split("|") if part.strip()]
        cells = select(tables_of(text), [line.strip() for line in self.content if line.strip()], columns)
        return f"{without_headings(as_table(cells))}\n\n{{.source}}\nFrom `{self.arguments[0]}`."


class HoursDirective(MarkdownDirective):
    """The hours that the files of configs/learner state, as a table."""

    has_content = False

    def markdown(self) -> str:
        cells: list[list[str]] = []
        for env in ("sd15", "ssd1b", "sdxl", "sd3"):
            text = self.depend_on(f"configs/learner/{env}.yaml")
            updates = re.search(r"^num_updates: (\d+)", text, re.M)
            for what, found in zip(("prompts alone", "pictures"), hours(text), strict=True):
                if not cells:
                    cells.append(["`--env`", "updates", "data", *(f"`{name}`" for name in found)])
                cells.append([f"`{env}`", updates[1] if updates else "", what, *(f"{value:g} h" for value in found.values())])
        return as_table(cells)


class NumberRole(SphinxRole):
    """`{number}` of `fork.md | dagger | success`: a number of benchmarks/results; `worlds.md | SECTION | bc | success` of a section."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        name, *section, row, column = (part.strip() for part in self.text.split(" | "))
        path = ROOT / "benchmarks" / "results" / name
        self.env.note_dependency(str(path))
        text = path.read_text(encoding="utf-8")
        try:
            found = number(section_of(text, section[0]) if section else text, row, column)
        except ValueError as error:
            message = self.inliner.reporter.error(f"{name}: {error}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        return [nodes.Text(found)], []


def setup(app: Sphinx) -> dict[str, Any]:
    kinds = {
        "flags": FlagsDirective,
        "presets": PresetsDirective,
        "differences": DifferencesDirective,
        "errors": ErrorsDirective,
        "sections": SectionsDirective,
        "committed": CommittedDirective,
        "rows": RowsDirective,
        "hours": HoursDirective,
    }
    for name, kind in kinds.items():
        app.add_directive(name, kind)
    app.add_role("number", NumberRole())
    return {"parallel_read_safe": True}
