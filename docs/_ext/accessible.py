"""Mends the theme's navigation: the captions of its parts are headings of a level."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def name_levels(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    if "furo_navigation_tree" in context:
        context["furo_navigation_tree"] = context["furo_navigation_tree"].replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", name_levels, priority=900)  # after the theme has made its navigation
    return {"parallel_read_safe": True}
