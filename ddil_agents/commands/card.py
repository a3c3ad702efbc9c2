"""Completes the model card of a run's student with recipe, metrics, limits and citation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from ddil_agents.evaluation.results import read_result, table
from ddil_agents.training.checkpoint import write_atomically


def complete_card(out: Path, config: Any) -> None:
    """Appends to the README.md of a finished run's student, if it has one; students that are pipelines do.

    Args:
        out: The run directory, with its result.json.
        config: The run's AgentConfig.
    """
    path = out / "student" / "README.md"
    if not path.is_file():
        return
    result, defaults = read_result(out / "result.json"), dataclasses.asdict(type(config)())
    changed = {key: value for key, value in dataclasses.asdict(config).items() if value != defaults[key]}
    if config.init is not None:
        changed["init"] = Path(config.init).name  # without the rest of the path, which is of the local disk
    shares = zip(("forward", "teacher", "student"), config.beta(0), strict=True)
    text = SECTIONS.format(
        **{key: result[key] for key in ("agent", "num_updates", "processes", "teacher_nfe", "student_nfe")},
        batch_size=config.batch_size,
        beta=", ".join(f"{name} {share:.3g}" for name, share in shares),
        student=result["student"],
        teacher_steps=config.teacher_steps,
        version=result["ddil"],
        settings=yaml.safe_dump(json.loads(json.dumps(changed)), sort_keys=False, allow_unicode=True) if changed else "# none\n",
        table=table(result),
    )
    write_atomically(path, path.read_text(encoding="utf-8") + text)


SECTIONS = """
## Recipe

`{agent}` of ddil {version}: {num_updates:,} gradient steps of {batch_size} states in each of {processes} process(es); sources of the
states: {beta}. The teacher samples in {teacher_steps} steps. Training took {teacher_nfe:,} forwards of the teacher and {student_nfe:,} of
the student. Settings that differ from the defaults:

```yaml
{settings}```

## Metrics

The student is `{student}`. NFE/sample counts forwards of a network, a guided pair as two.

{table}

## Limits

The table above is all that was measured. Few samples give distances that are too large; results with another extractor or another number
of samples are not comparable. The student was trained for the number of steps, the times and the guidance of the call above only. It
inherits the teacher's limits, errors and biases.

## Citation

```bibtex
@article{{garrepalli2024ddil,
  title   = {{DDIL: Diversity Enhancing Diffusion Distillation With Imitation Learning}},
  author  = {{Garrepalli, Risheek and Mahajan, Shweta and Hayat, Munawar and Porikli, Fatih}},
  journal = {{arXiv preprint arXiv:2410.11971}},
  year    = {{2024}}
}}
```
"""
