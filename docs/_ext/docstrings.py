"""Makes the library's docstrings fit for Sphinx: they are plain text with formulas, which reStructuredText would read as markup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


def escape(line: str) -> str:
    """Escapes what reStructuredText would read as emphasis, substitutions and links, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if i % 2 else re.sub(r"_(?=\W|$)", r"\\_", part.replace("\\", r"\\").replace("*", r"\*").replace("|", r"\|"))
        for i, part in enumerate(parts)
    )


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, with indented formulas and code as literal blocks and special characters escaped."""
    result: list[str] = []
    in_section = in_block = False
    for i, line in enumerate(lines):
        if line in SECTIONS:
            in_section = True
        after_blank = i == 0 or not lines[i - 1].strip()
        if not in_section and line.startswith("    ") and (in_block or after_blank):
            if not in_block:
                result += ["::", ""]
            in_block = True
            result.append(line)
            continue
        if line.strip():
            if in_block:
                result.append("") if result[-1].strip() else None
            in_block = False
        result.append(line if line in SECTIONS else escape(line))
    return result


def returns_as_list(lines: list[str]) -> list[str]:
    """Makes a list of a `Returns:` section whose entries go on in indented lines, which napoleon would take for one text."""
    result = list(lines)
    for start, line in enumerate(lines):
        if line not in ("Returns:", "Yields:"):
            continue
        end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
        if any(entry.startswith("     ") for entry in lines[start + 1 : end]):
            entries = lines[start + 1 : end]
            result[end:end] = [""]
            result[start + 1 : end] = [
                f"* {entry.strip()}" if entry.startswith("    ") and not entry.startswith("     ") else f"  {entry.strip()}".rstrip()
                for entry in entries
            ]
            result[start : start + 1] = [f"**{line[:-1]}**", ""]
            return result
    return result


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = returns_as_list(as_rst(lines))
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment: napoleon reads a first line `text: more` as a type and its description


def find_by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> nodes.Element | None:
    """Resolves what a signature calls by another module's name or by none: the only documented object of that name."""
    if node.get("refdomain") != "py":
        return None
    python, last = env.domains["py"], node["reftarget"].rpartition(".")[2]
    found = [name for name, entry in python.data["objects"].items() if name.rpartition(".")[2] == last and not entry.aliased]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, content)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon, which reads the sections
    app.connect("missing-reference", find_by_last_name)
    return {"parallel_read_safe": True}
