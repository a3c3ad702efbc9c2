"""Errors that callers tell apart."""

from __future__ import annotations


class NoDataError(ValueError):
    """An expert without data of its own was asked for some."""
