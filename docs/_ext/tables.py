"""Reads committed Markdown: sections, tables and their rows. What is not there is an error, so that a page cannot go stale in silence."""

from __future__ import annotations

import re

HEADING = re.compile(r"^(#+) (.*)$")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


def plain(text: str) -> str:
    """A heading without its markup."""
    return text.replace("`", "").strip()


def section_of(text: str, title: str) -> str:
    """The section of a Markdown file whose heading is this title, or the only one to begin with it, without the heading.

    Raises:
        ValueError: there is none, or several.
    """
    exact = any(match and plain(match[2]) == title for match in map(HEADING.match, text.splitlines()))
    lines, fenced, found, level, taken = text.splitlines(), False, 0, 0, []
    for line in lines:
        fenced ^= line.startswith("```")
        match = None if fenced else HEADING.match(line)
        if match and level and len(match[1]) <= level:
            level = 0
        if match and (plain(match[2]) == title or (not exact and plain(match[2]).startswith(title))):
            found, level = found + 1, len(match[1])
        elif level:
            taken.append(line)
    if found != 1:
        raise ValueError(f"{found} sections begin with {title!r}; need one")
    return "\n".join(taken).strip("\n")


def without_headings(text: str) -> str:
    """Markdown with its title left out, other headings in bold, and links to files as their text."""
    lines = []
    for line in text.splitlines():
        match = HEADING.match(line)
        lines.append(line if match is None else "" if match[1] == "#" else f"**{match[2]}**")
    return LINK.sub(lambda m: m[1] if "`" in m[1] or "/" in m[1] or "." in m[1] else f"{m[1]} (`{m[2]}`)", "\n".join(lines))


def tables_of(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, (rows, columns); the first row is the head."""
    tables: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not all(set(cell) <= {"-", ":"} and cell for cell in cells):
                tables[-1].append(cells)
        before = line
    return tables


def select(tables: list[list[list[str]]], rows: list[str], columns: list[str]) -> list[list[str]]:
    """The rows and columns of the first table that has all of them, in the order asked for.

    Args:
        tables: As `tables_of` returns them.
        rows: First cells, of one or several rows each; empty: all rows.
        columns: Headings; empty: all columns.

    Raises:
        ValueError: no table has them all.
    """
    for head, *body in tables:
        names = [plain(row[0]).removesuffix(" (best)") for row in body]  # a mark of the tables of worlds
        if set(columns) <= {plain(cell) for cell in head} and set(rows) <= set(names):
            plain_head = [plain(cell) for cell in head]
            at = [0, *(plain_head.index(column) for column in columns)] if columns else list(range(len(head)))
            chosen = [row for wanted in rows for name, row in zip(names, body, strict=True) if name == wanted] if rows else body
            return [[row[i] if i < len(row) else "" for i in at] for row in [head, *chosen]]
    raise ValueError(f"no table has the rows {rows} and the columns {columns}")


def number(text: str, row: str, column: str) -> str:
    """The first number of a cell of the first table that has the row and the column, as prose writes it: .93 for 0.93.

    Raises:
        ValueError: there is no such row or column, or no number in the cell.
    """
    cell = select(tables_of(text), [row], [column])[1][1]
    match = re.search(r"[+−-]?\d*\.?\d+", cell)
    if match is None:
        raise ValueError(f"row {row!r}, column {column!r}: {cell!r} holds no number")
    return re.sub(r"\b0\.", ".", match[0])


def as_table(cells: list[list[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def hours(text: str) -> list[dict[str, float]]:
    """Hours of each agent in the head of a file of configs/learner: with prompts alone, and with pictures.

    Raises:
        ValueError: the head has no such line.
    """
    match = re.search(r"#\s+(bc [^;]*); with --data ([^#]*?)\.?\n", text)
    if match is None:
        raise ValueError("the head of the file states no hours")
    alone = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) h", match[1])}
    pictures = [float(value) for value in re.findall(r"[\d.]+\d", match[2])]
    return [alone, dict(zip(alone, pictures, strict=True))]
