"""Trains any agent: one of this library, or one of your own package.

    python -m ddil_agents dagger --env digits
    python -m ddil_agents my_pkg.MyAgent --env digits

The first is the same as python -m ddil_agents.dagger. The second names a class path; the name of an entry point of the group
ddil.agents works too.
"""

from __future__ import annotations

import argparse
import sys

from ddil_agents.commands.agents import agent_names, find_agent
from ddil_agents.commands.errors import one_line_errors
from ddil_agents.commands.run import run


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m ddil_agents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", help=f"{', '.join(agent_names())}, or a class path; `AGENT --help` lists its settings")
    with one_line_errors(parser):
        agent = find_agent(parser.parse_args(argv[:1]).agent)
    run(agent, argv[1:])


if __name__ == "__main__":
    main()
