"""Facts about examples/toy.py: it runs as it stands, imports torch and matplotlib alone, and shows what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

TOY = ROOT / "examples" / "toy.py"


def test_the_toy_shows_that_dagger_mends_behaviour_cloning(tmp_path: Path) -> None:
    command = [sys.executable, str(TOY), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {
        name: [float(x) for x in re.findall(r" ([\d.]+) \(", line)] for line in done.stdout.splitlines()[1:] if (name := line.split(",")[0])
    }
    (bc, dagger) = (rows[name] for name in rows)
    assert len(rows) == 2
    assert dagger[0] > bc[0] + 0.2  # success
    assert bc[1] < 0.05  # behaviour cloning has learned its demonstrations, …
    assert bc[2] > 5 * bc[1]  # … and errs where it comes to itself
    assert dagger[2] < bc[2] / 5
    assert (tmp_path / "toy.png").is_file()


def test_the_toy_reads_like_a_page_of_a_book() -> None:
    text = TOY.read_text()
    assert len(text.splitlines()) < 200
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert imported == {"argparse", "math", "matplotlib", "torch"}
