"""The rest of a student's model card, once the run is over: recipe, metrics, limits and citation, below how it is called."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from ddil_agents.evaluation.results import read_result, table
from ddil_agents.training.checkpoint import write_atomically


def complete_card(out: Path, config: Any) -> None:
    """Adds to the README.md of a finished run's student, where it is a pipeline and has one.

    Args:
        out: The run's directory, with its result.json.
        config: An AgentConfig, the run's.
    """
    path = out / "student" / "README.md"
    if not path.is_file():
        return
    result, defaults = read_result(out / "result.json"), dataclasses.asdict(type(config)())
    changed = {key: value for key, value in dataclasses.asdict(config).items() if value != defaults[key]}
    if config.init is not None:
        changed["init"] = Path(config.init).name  # no more of the maker's disk
    shares = zip(("forward", "teacher", "student"), config.beta(0), strict=True)
    rest = REST.format(
        **{key: result[key] for key in ("agent", "num_updates", "processes", "teacher_nfe", "student_nfe")},
        batch_size=config.batch_size,
        beta=", ".join(f"{name} {share:.3g}" for name, share in shares),
        student=result["student"],
        teacher_steps=config.teacher_steps,
        version=result["ddil"],
        settings=yaml.safe_dump(json.loads(json.dumps(changed)), sort_keys=False, allow_unicode=True) if changed else "# none\n",
        table=table(result),
    )
    write_atomically(path, path.read_text(encoding="utf-8") + rest)


REST = """
## Recipe

`{agent}` of ddil {version}: {num_updates:,} gradient steps of {batch_size} states in each of {processes} process(es); sources of the
states: {beta}. The teacher samples in {teacher_steps} steps. Training took {teacher_nfe:,} forwards of the teacher and {student_nfe:,} of
the student. Settings that are not the defaults:

```yaml
{settings}```

## Metrics

The student is `{student}`. NFE/sample counts forwards of a network, a guided pair as two.

{table}

## Limits

What is measured is said above, and nothing else: few samples give distances that are too large, and numbers of two extractors, or of two
numbers of samples, do not compare. Other numbers of steps, times and guidance than those of the call above were not trained on. What the
teacher cannot do, or does wrong, its student does too, its biases among it.

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
