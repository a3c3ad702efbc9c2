"""Checks the built site: every internal link leads to a file, and every anchor to an element of it. External links are only listed.

python docs/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def check(site: Path) -> tuple[list[str], set[str]]:
    """Returns what is broken, a line for each link, and the external links."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken, external = [], set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                external.add(link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link} leads to no file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link} has no such anchor")
    return broken, external


def main() -> None:
    site = Path(sys.argv[1])
    broken, external = check(site)
    (site.parent / "external_links.txt").write_text("".join(f"{link}\n" for link in sorted(external)))
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{len(broken)} broken links; {len(external)} external links in {site.parent / 'external_links.txt'}")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
