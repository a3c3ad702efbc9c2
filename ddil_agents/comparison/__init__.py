"""Many runs: paired statistics, tables and the page."""
