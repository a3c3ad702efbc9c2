"""Comparing many runs: paired statistics, tables and the HTML page."""
