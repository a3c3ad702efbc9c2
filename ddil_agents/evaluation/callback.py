"""Evaluation while training: eval.jsonl, the best student so far, and an early end."""

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

    It draws from generators of its own, and the teacher's forwards that it takes are not counted as those of training: a run ends in
    the same weights with and without it, unless `patience` ends it early. In the run directory it writes

        eval.jsonl    a line for each evaluation: `step`, the metrics, `best` if no earlier one was better, `seconds` of training
        best/         student/ and evaluation.json of the best one

    Args:
        every: Updates between two evaluations.
        settings: How many samples, which metrics, when to stop.
        expert_policy: The teacher that the student is compared with; default: the agent's `reference`.
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
        """One evaluation, of which every process learns the result."""
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
            found = self._evaluator.evaluate(agent.student_policy, kernel=agent.kernel)
        agent.expert.release()  # what decoded the samples
        metrics: dict[str, float] = {}
        for name in self.settings.metrics:
            if found.get(name) is None:
                possible = ", ".join(key for key in DIRECTIONS if found.get(key) is not None)
                raise ValueError(f"validation.metrics: {name} is not measured here; choose from {possible}")
            metrics[name] = statistics.fmean(found[name]) if isinstance(found[name], list) else found[name]
        best = self._is_better(metrics)
        row = {"step": agent.step, **metrics, "best": best, "seconds": agent.trainer.clock.seconds}
        if self.out is not None:
            if best:
                with folder_atomically(self.out / "best") as folder:
                    config = agent.config
                    (folder / "student").mkdir()
                    agent.expert.save_student(agent.ema_student, folder / "student", config.num_steps, config.grid, agent.kernel)
                    (folder / "evaluation.json").write_text(json.dumps(row))
            with explain_write_errors(self.out / "eval.jsonl"), (self.out / "eval.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"{agent.name}, update {agent.step}: {numbers}{', the best so far' if best else ''}", file=sys.stderr)
        return row

    def _is_better(self, metrics: dict[str, float]) -> bool:
        """Whether no earlier evaluation was as good."""
        name = self.settings.metrics[0]
        sign = DIRECTIONS[name]
        return math.isfinite(metrics[name]) and all(sign * metrics[name] > sign * row[name] for row in self.rows)
