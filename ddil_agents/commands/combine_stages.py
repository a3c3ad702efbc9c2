"""After the last stage of a run: writes the files of the run as a whole from those of its stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ddil_agents.evaluation.results import read_result
from ddil_agents.training.checkpoint import folder_atomically, write_atomically
from ddil_agents.training.metrics import read_metrics


def combine_stages(out: Path, stages: list[Path], seed: int) -> None:
    """Writes student/, samples.png, episodes.gif, support.json, metrics.jsonl and result.json of a run of several stages.

    The student, the pictures and the support are the last stage's. Metrics and results are those of all stages; steps, seconds and
    forwards are summed from the first stage on.

    Args:
        out: The run directory.
        stages: The directories of its stages, in order.
        seed: The run's seed.
    """
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    total = {"num_updates": 0, "teacher_nfe": 0, "student_nfe": 0}
    summed = ("step", "seconds", "teacher_nfe", "student_nfe")
    for number, stage in enumerate(stages, 1):
        before = {key: rows[-1][key] if rows else 0 for key in summed}
        for row in read_metrics(stage / "metrics.jsonl"):
            rows.append({**row, **{key: before[key] + row[key] for key in summed}, "stage": number})
        result = read_result(stage / "result.json")
        total = {key: total[key] + result[key] for key in total}
        cost = {"teacher_nfe": total["teacher_nfe"], "student_nfe": total["student_nfe"], "train_seconds": rows[-1]["seconds"]}
        students = {name: model | cost for name, model in result["models"].items() if name.partition(",")[0] == result["student"]}
        models |= result["models"] | students  # of two stages with the same num_steps the later student stays
    with folder_atomically(out / "student") as student:
        shutil.copytree(stages[-1] / "student", student, dirs_exist_ok=True)
    for name in ("samples.png", "episodes.gif", "support.json"):
        if (stages[-1] / name).is_file():
            write_atomically(out / name, (stages[-1] / name).read_bytes())
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(out / "result.json", json.dumps({**result, **total, "training_seed": seed, "models": models}, indent=1))
