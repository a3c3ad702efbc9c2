"""Any agent's command: one of ours, or one of a package of your own.

    python -m ddil_agents dagger --env digits
    python -m ddil_agents my_pkg.MyAgent --env digits

The first is python -m ddil_agents.dagger; the second a class path, or the name of an entry point of the group ddil.agents.
"""

from __future__ import annotations

import argparse
import sys

from ddil_agents.commands.errors import clear_errors
from ddil_agents.commands.parse import agent_names, find_agent
from ddil_agents.commands.run import run


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m ddil_agents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", help=f"{', '.join(agent_names())}, or a class path; `AGENT --help` tells its settings")
    with clear_errors(parser):
        agent = find_agent(parser.parse_args(argv[:1]).agent)
    run(agent, argv[1:])


if __name__ == "__main__":
    main()
