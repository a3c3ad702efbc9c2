"""The commands: from a command line to a run directory, and from a run directory to an agent."""
