"""Prints errors as one line, without a traceback."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ddil_agents.devices import out_of_memory, ranks
from ddil_agents.training.checkpoint import DISK_FULL


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the process with a one-line message and exit status 2 if an error is raised that the user can repair.

    Args:
        parser: Its `prog` starts the message.
    """
    for stream in (sys.stdout, sys.stderr):  # a legacy code page has no β and no arrows: they become question marks, and nothing fails
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    where = parser.prog if ranks.is_main() else f"{parser.prog}, rank {ranks.rank()}"
    try:
        with out_of_memory.explain("here", "choose a smaller batch, model or picture, or a device with more"):
            yield
    except OSError as error:  # a path that cannot be read or written, a full disk
        cure = "" if error.errno in DISK_FULL else "; choose another path, or repair this one"
        print(f"{where}: error: {_one_line(error)}{cure}", file=sys.stderr)
        raise SystemExit(2) from error
    except (ValueError, ArithmeticError, ImportError, MemoryError) as error:  # ImportError: an extra that is not installed
        cause = "a path holds a null character, which no path may; remove it" if str(error) == "embedded null byte" else error
        print(f"{where}: error: {_one_line(cause)}", file=sys.stderr)
        raise SystemExit(2) from error


def _one_line(message: object) -> str:
    return re.sub(r"\s*\n\s*", " ", str(message).strip())
