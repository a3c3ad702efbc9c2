"""Evaluation during training: eval.jsonl, the best student so far, and early stopping."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddil_agents.devices import ranks, sharding
from ddil_agents.evaluation.evaluator import Evaluator
from ddil_agents.evaluation.results import DIRECTIONS
from ddil_agents.evaluation.settings import Evaluation, Validation
from ddil_agents.states.batch import Batch
from ddil_agents.states.collect import stream_seed
from ddil_agents.training.callbacks import Callback
from ddil_agents.training.checkpoint import explain_write_errors, folder_atomically, write_atomically
from ddil_agents.training.metrics import read_metrics
from ddil_env import ExpertPolicy

if TYPE_CHECKING:
    from ddil_agents.algorithm import Algorithm


class EvalCallback(Callback):
    """Evaluates the averaged student every `every` updates, and once before the first.

    It does not change the training: it draws from its own generators, and a run ends in the same weights with and without it, unless
    `patience` ends it early. Its teacher forwards are not counted as training cost. In the run directory it writes

        eval.jsonl    a line for each evaluation: `step`, the metrics, `best` (whether it is better than all earlier ones), `seconds`
                      of training
        best/         student/ and evaluation.json of the best evaluation

    Args:
        every: Updates between two evaluations.
        settings: How many samples, which metrics, when to stop.
        expert_policy: The teacher that the student is compared with; default: the agent's `teacher_policy`.

    Raises:
        ValueError: every < 1.
    """

    def __init__(self, every: int, settings: Validation | None = None, expert_policy: ExpertPolicy | None = None) -> None:
        if every < 1:
            raise ValueError(f"evaluate_every={every}: need at least 1")
        self.every, self.settings, self.expert_policy = every, settings or Validation(), expert_policy
        self.rows: list[dict[str, Any]] = []
        self.out: Path | None = None
        self._evaluator: Evaluator | None = None

    def on_start(self, agent: Algorithm, out: Path | None) -> None:
        if sharding.is_requested():
            raise ValueError(f"evaluate_every={self.every}: a sharded student cannot be sampled while it trains; leave it out")
        self.out = out
        if out is not None and (out / "eval.jsonl").is_file():
            self.rows = read_metrics(out / "eval.jsonl", agent.step)
        with ranks.sync_errors():
            if out is not None and ranks.is_main():
                out.mkdir(parents=True, exist_ok=True)
                write_atomically(out / "eval.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        if not self.rows:
            self.evaluate(agent)

    def on_update(self, agent: Algorithm, batch: Batch, measured: dict[str, Tensor]) -> bool | None:
        if agent.step % self.every:
            return None
        self.evaluate(agent)
        patience = self.settings.patience
        return patience is None or any(row["best"] for row in self.rows[-patience:])

    def evaluate(self, agent: Algorithm) -> None:
        """Evaluates the student on the main process, sends the result to all processes and to all callbacks."""
        with agent.trainer.clock.paused():
            row = ranks.broadcast_from_main(lambda: self._measure(agent))
        self.rows.append(row)
        for callback in agent.trainer.callbacks:
            callback.on_evaluate(agent, row)

    def _measure(self, agent: Algorithm) -> dict[str, Any]:
        with torch.random.fork_rng():
            if self._evaluator is None:
                s, seed = self.settings, stream_seed(agent.config.seed, "validation")
                evaluation = Evaluation(n=s.n, seed=seed, n_paths=s.n, n_action=min(s.n, 64), batch_size=s.batch_size)
                self._evaluator = Evaluator(self.expert_policy or agent.teacher_policy, agent.grid, evaluation)
            result = self._evaluator.evaluate(agent.student_policy, kernel=agent.kernel)
        agent.expert.release()  # the decoder's memory
        metrics: dict[str, float] = {}
        for name in self.settings.metrics:
            value = result.get(name)
            if value is None:
                possible = ", ".join(key for key in DIRECTIONS if result.get(key) is not None)
                raise ValueError(f"validation.metrics: {name} is not measured here; choose from {possible}")
            metrics[name] = statistics.fmean(value) if isinstance(value, list) else value
        best = self._is_better(metrics)
        row = {"step": agent.step, **metrics, "best": best, "seconds": agent.trainer.clock.seconds}
        if self.out is not None:
            if best:
                with folder_atomically(self.out / "best") as folder:
                    agent.save_student(folder / "student")
                    (folder / "evaluation.json").write_text(json.dumps(row))
            with explain_write_errors(self.out / "eval.jsonl"), (self.out / "eval.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"{agent.name}, update {agent.step}: {numbers}{', the best so far' if best else ''}", file=sys.stderr)
        return row

    def _is_better(self, metrics: dict[str, float]) -> bool:
        """Whether the first metric is finite and better than in all earlier evaluations."""
        name = self.settings.metrics[0]
        sign = DIRECTIONS[name]
        return math.isfinite(metrics[name]) and all(sign * metrics[name] > sign * row[name] for row in self.rows)
