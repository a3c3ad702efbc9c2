"""Command lines and run directories."""
