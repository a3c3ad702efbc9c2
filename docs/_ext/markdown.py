"""The base class of directives that write Markdown."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

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
