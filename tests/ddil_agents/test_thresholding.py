"""Thresholding in the learners: whose estimates are projected, how much that moves, and where the calibration goes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Dataless, Killed, same_students, weights
from torch import Tensor

from ddil_agents import DMD2, LCM, ActionMatching, Algorithm, BehaviourCloning, Beta, Dagger, bc, dagger
from ddil_agents.commands.load import load_run
from ddil_agents.states.batch import Batch
from ddil_agents.training.callbacks import Callback
from ddil_agents.training.metrics import clipped_shares, read_metrics
from ddil_agents.training.trainer import Trainer
from ddil_env import Expert, GaussianMixtureExpert, NoDataError, invert_ddim, unroll
from ddil_env.support import ChannelQuantiles, CountingSupport, Thresholding

pytestmark = pytest.mark.usefixtures("own_generator")

AGENTS: dict[str, type[Algorithm]] = {"bc": BehaviourCloning, "dagger": Dagger, "lcm": LCM, "dmd2": DMD2}
BETAS = {"bc": Beta(0.7, 0.3, 0), "dagger": Beta(0.4, 0.2, 0.4), "lcm": Beta(0.4, 0.2, 0.4), "dmd2": Beta(0.3, 0.3, 0.4)}
MEANS = [[-0.5, 0.3, 0.0], [0.4, -0.5, 0.2]]
SMALL: dict[str, Any] = {
    "num_updates": 6,
    "teacher_steps": 8,
    "batch_size": 16,
    "collect_size": 60,
    "updates_per_collect": 3,
    "capacity": 200,
    "warmup_updates": 0,
    "learning_rate": 1e-2,
    "student": {"width": 16, "depth": 2},
}
OWN: dict[str, dict[str, Any]] = {
    "lcm": {"solver_steps": 10, "grid": "trailing", "inference_steps": (3,), "num_steps": 2},
    "dmd2": {"critic_updates": 2, "critic_learning_rate": 1e-2, "num_updates": 8},
}
each_agent = pytest.mark.parametrize("agent", AGENTS)


def mixture(cls: type[GaussianMixtureExpert] = GaussianMixtureExpert, **changed: Any) -> GaussianMixtureExpert:
    """Data well inside ±1."""
    return cls(MEANS, 0.05, **changed)


def made(
    agent: str, expert: Expert | None = None, support: Any = None, thresholding: Thresholding | None = None, **changed: Any
) -> Algorithm:
    cls = AGENTS[agent]
    options = {**SMALL, "beta": BETAS[agent], **OWN.get(agent, {}), "thresholding": thresholding or Thresholding(kind="none"), **changed}
    return cls(expert or mixture(), cls.Config(**options), support)


def subsets(agent: str) -> list[tuple[Any, ...]]:
    roles = AGENTS[agent].roles
    return [chosen for n in range(len(roles) + 1) for chosen in combinations(roles, n)]


class Lines(Callback):
    """Keeps the lines of metrics."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, agent: Any, row: dict[str, Any]) -> None:
        self.rows.append(row)


def learned(learner: Algorithm, *callbacks: Callback) -> Tensor:
    """The weights of student and average after the run."""
    learner.learn(progress=False, callbacks=callbacks)
    return torch.cat([weights(learner.student), weights(learner.ema_student)])


# The switches


@each_agent
def test_every_subset_of_the_roles_is_a_run_of_its_own(agent: str) -> None:
    plain = learned(made(agent))
    assert torch.equal(learned(made(agent, thresholding=Thresholding(kind="static", bound=0.2, roles=()))), plain)
    results = {(): plain}
    for roles in subsets(agent)[1:]:
        learner = made(agent, thresholding=Thresholding(kind="static", bound=0.2, roles=roles))  # tighter than the data
        assert {role for role, support in learner.thresholds.items() if isinstance(support, CountingSupport)} == set(roles)
        results[roles] = learned(learner)
    assert len(results) == 8
    for one, other in combinations(results, 2):
        assert not torch.equal(results[one], results[other]), (one, other)


@each_agent
def test_a_support_that_holds_everything_changes_nothing_bit_for_bit(agent: str) -> None:
    plain = learned(made(agent))
    for kind in ("static", "dynamic", "reflection"):
        thresholding = Thresholding(kind=kind, bound=1e4, roles=AGENTS[agent].roles)
        assert torch.equal(learned(made(agent, thresholding=thresholding)), plain), kind


@each_agent
@pytest.mark.parametrize(
    "thresholding", [Thresholding(kind="static", bound=1.0), Thresholding(kind="quantile", quantile=1.0, samples=20000)]
)
def test_projecting_the_exact_teacher_of_data_inside_changes_nothing_bit_for_bit(agent: str, thresholding: Thresholding) -> None:
    if thresholding.kind == "quantile":  # the means, which the teacher's estimates may reach, lie inside the data's range
        assert made(agent, thresholding=thresholding).support.low[0] < -0.5  # type: ignore[attr-defined]
    learner = made(agent, thresholding=thresholding)
    lines = Lines()
    assert torch.equal(learned(learner, lines), learned(made(agent)))
    assert [row["clipped"] for row in lines.rows] == [{"teacher": 0.0}]


@each_agent
def test_a_role_that_the_learner_has_not_is_refused(agent: str) -> None:
    (strange,) = {"teacher", "target", "student", "critic"} - set(AGENTS[agent].roles)
    with pytest.raises(ValueError, match=f"{agent} has no {strange}; it has {', '.join(AGENTS[agent].roles)}"):
        made(agent, thresholding=Thresholding(roles=("teacher", strange)))  # type: ignore[arg-type]


@each_agent
def test_a_thresholded_student_of_a_teacher_that_is_not_is_warned_of(agent: str) -> None:
    with pytest.warns(UserWarning, match="driven outward without end; add teacher"):
        made(agent, thresholding=Thresholding(kind="static", bound=0.1, roles=("student",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(agent, thresholding=Thresholding(kind="static", bound=0.1, roles=("teacher", "student")))
        made(agent, thresholding=Thresholding(kind="none", roles=("student",)))


@each_agent
def test_the_students_samples_are_projected_where_its_role_is_on(agent: str) -> None:
    x_T = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    for roles in (("teacher",), ("student",)):
        learner = made(agent, thresholding=Thresholding(kind="static", bound=0.1, roles=roles))
        samples = unroll(learner.student_policy, learner.grid, x_T, kernel=learner.kernel, generator=torch.Generator().manual_seed(1))[
            :, -1
        ]
        assert bool((samples.abs() <= 0.1 + 1e-6).all()) == (roles == ("student",))
        assert all(share.isnan() for share in clipped_shares(learner).values())  # to sample is not to train: it is not metered


@each_agent
def test_a_student_beyond_the_support_still_learns_to_come_back(agent: str) -> None:
    learner = made(agent, thresholding=Thresholding(kind="static", bound=1e-6, roles=("student",)))  # nothing lies inside
    learner.loss(Batch(learner.trainer.collect())).mean().backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 1e-4 for p in learner.student.network.layers.parameters())  # type: ignore[union-attr]


# What is moved


class Count(Callback):
    """Entries beyond the bound, counted by hand at each role's own source."""

    def __init__(self, learner: Algorithm, bound: float) -> None:
        self.bound, self.counts = bound, {role: [0, 0] for role in learner.roles}
        self.lines: list[dict[str, float | None]] = []
        expert, loss = learner.expert, learner.loss
        guided = expert.guided

        def asked(*args: Any) -> Any:
            pred = guided(*args)
            self.add("teacher", pred.x_0)
            return pred

        def trained(batch: Any) -> Tensor:
            if isinstance(learner, ActionMatching):
                self.add("target", invert_ddim(expert.schedule, batch.x_t, batch.t, batch.expert_action, batch.s).x_0)
            return loss(batch)

        expert.guided, learner.loss = asked, trained  # type: ignore[method-assign]
        learner.student.register_forward_hook(lambda module, args, pred: self.add("student", pred.x_0))
        if "critic" in learner.trainer.trainables:  # in the student's turn alone: its own loss is not thresholded
            critic = learner.networks["critic"]
            critic.register_forward_hook(
                lambda module, args, out: None if next(critic.parameters()).requires_grad else self.add("critic", out[0].x_0)
            )
        elif isinstance(learner, LCM):
            learner.ema_student.register_forward_hook(lambda module, args, pred: self.add("target", pred.x_0))

    def on_log(self, agent: Any, row: dict[str, Any]) -> None:
        self.lines.append({role: moved / seen if seen else None for role, (moved, seen) in self.counts.items()})
        self.counts = {role: [0, 0] for role in agent.roles}

    def add(self, role: str, x_0: Tensor) -> None:
        count = self.counts[role]  # type: ignore[index]
        count[0] += int((x_0.abs() > self.bound).sum())
        count[1] += x_0.numel()


@each_agent
def test_each_line_of_metrics_holds_the_share_that_each_role_moved(agent: str, tmp_path: Path) -> None:
    learner = made(agent, thresholding=Thresholding(kind="static", bound=0.2, roles=AGENTS[agent].roles))
    count = Count(learner, 0.2)
    learner.train(tmp_path, progress=False, log_every=1, callbacks=[count])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == len(count.lines) == learner.config.num_updates
    for row, expected in zip(rows, count.lines, strict=True):
        assert row["clipped"] == pytest.approx(expected)
    for role in AGENTS[agent].roles:
        assert any(row["clipped"][role] for row in rows), role
    met = [{role for role, share in row["clipped"].items() if share is not None} for row in rows]
    if agent == "dmd2":  # the critic only where the student learns from it, in every second update
        assert ["critic" in roles for roles in met] == [True, False] * 4
    else:  # the teacher labels in every third update alone
        assert ["teacher" in roles for roles in met] == [True, False, False] * 2
    absent = "critic" if agent == "dmd2" else "teacher"
    assert f'"{absent}": null' in (tmp_path / "metrics.jsonl").read_text()


@each_agent
def test_shares_are_those_of_the_roles_that_are_on(agent: str, tmp_path: Path) -> None:
    role = AGENTS[agent].roles[1]
    learner = made(agent, thresholding=Thresholding(kind="static", bound=0.3, roles=(role,)))
    learner.train(tmp_path / "on", progress=False, log_every=3)
    assert all(set(row["clipped"]) == {role} for row in read_metrics(tmp_path / "on" / "metrics.jsonl"))
    made(agent, thresholding=Thresholding(roles=())).train(tmp_path / "off", progress=False, log_every=3)
    assert all(row["clipped"] == {} for row in read_metrics(tmp_path / "off" / "metrics.jsonl"))


@pytest.mark.parametrize("agent", ["bc", "lcm"])
def test_a_line_holds_the_mean_and_the_largest_of_the_gradients_norms_before_clipping(agent: str, tmp_path: Path) -> None:
    thresholding = Thresholding(kind="static", bound=0.3, roles=AGENTS[agent].roles)
    learner = made(agent, thresholding=thresholding, max_grad_norm=1e-3)
    norms: list[float] = []
    update = learner.trainer.update

    def measured(batch: Any) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(learner.loss(Batch(batch)).mean(), list(learner.student.parameters()))
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        return update(batch)

    learner.trainer.update = measured  # type: ignore[method-assign]
    learner.train(tmp_path, progress=False, log_every=2)
    rows, pairs = read_metrics(tmp_path / "metrics.jsonl"), list(zip(norms[::2], norms[1::2], strict=True))
    assert [row["grad_norm"] for row in rows] == pytest.approx([(a + b) / 2 for a, b in pairs], rel=1e-4)
    assert [row["grad_norm_max"] for row in rows] == pytest.approx([max(pair) for pair in pairs], rel=1e-4)
    assert min(norms) > 1e-3


# Calibration


QUANTILE = Thresholding(kind="quantile", quantile=0.9, samples=64, roles=("teacher", "student"))


@pytest.mark.parametrize(("guidance_scale", "pair"), [(1.0, 1), (2.0, 2)])
@each_agent
def test_calibration_on_the_teacher_counts_its_forwards(agent: str, guidance_scale: float, pair: int) -> None:
    expert = mixture(Dataless, labels=[0, 1], guidance_scale=guidance_scale)
    config = Thresholding(kind="quantile", samples=50, calibrate_on="teacher")
    learner = made(agent, expert, thresholding=config, beta=Beta(0, 1, 0))
    steps = learner.config.substeps * learner.config.num_steps
    assert learner.teacher_nfe == expert.nfe == 50 * steps * pair
    assert isinstance(learner.support, ChannelQuantiles)
    assert learner.support.high[0] < 2
    again = made(agent, expert, support=learner.support, thresholding=config, beta=Beta(0, 1, 0))
    assert again.teacher_nfe == 0
    assert again.support == learner.support
    with pytest.raises(NoDataError, match="calibrate_on teacher"):
        made(agent, expert, thresholding=QUANTILE, beta=Beta(0, 1, 0))


def test_calibration_on_the_teacher_follows_the_seed() -> None:
    config = Thresholding(kind="quantile", samples=50, calibrate_on="teacher")
    one, again, other = (made("bc", thresholding=config, seed=seed).support for seed in (0, 0, 1))
    assert one == again != other


def test_a_saved_learner_refuses_another_calibration_and_takes_its_own(tmp_path: Path) -> None:
    learner = made("bc", thresholding=QUANTILE)
    learner.learn(progress=False)
    learner.save(tmp_path)
    assert isinstance(learner.support, ChannelQuantiles)
    other = ChannelQuantiles(learner.support.low, [2 * bound for bound in learner.support.high])  # as of other data
    with pytest.raises(ValueError, match=r"calibrated on other samples; pass it as support= \(support.json of its run\)"):
        made("bc", support=other, thresholding=QUANTILE).load(tmp_path)
    restored = made("bc", support=learner.support, thresholding=QUANTILE).load(tmp_path)
    assert torch.equal(weights(restored.student), weights(learner.student))


ENV = f"expert: ddil_env.GaussianMixtureExpert\nmeans: {MEANS}\nstds: 0.05\n"  # in three dimensions: no picture to draw
CLI = shlex.split(
    "--env env.yaml --num_updates 8 --teacher_steps 8 --batch_size 16 --collect_size 32 --updates_per_collect 3 --checkpoint_every 4 "
    "--log_every 2 --student '{width: 16}' --evaluate.n 20 --evaluate.n_action 4 --beta.forward 0 --beta.teacher 1 "
    "--states_per_rollout all --out run"  # so that its estimates are of each time equally often
)


def killed_at(step: int, patch: pytest.MonkeyPatch) -> None:
    update = Trainer.update

    def killing(trainer: Trainer, batch: Any) -> Any:
        if trainer.algorithm.step + 1 == step:
            raise Killed
        return update(trainer, batch)

    patch.setattr(Trainer, "update", killing)


def command(directory: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, die_at: int | None = None) -> Path:
    """The run directory of the command."""
    monkeypatch.chdir(directory)
    (directory / "env.yaml").write_text(ENV)
    with monkeypatch.context() as patch, contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
        if die_at is None:
            bc.main(argv)
        else:
            killed_at(die_at, patch)
            with pytest.raises(Killed):
                bc.main(argv)
    return directory / "run"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs whose support was calibrated on the data and on the teacher."""
    runs = {}
    for on in ("data", "teacher"):
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
            runs[on] = command(tmp_path_factory.mktemp(on), [*CLI, *calibrated(on)], patch)
    return runs


def calibrated(on: str) -> list[str]:
    return ["--thresholding.kind", "quantile", "--thresholding.quantile", "0.6", "--thresholding.calibrate_on", on]


@pytest.mark.parametrize("die_at", [2, 6], ids=["before the first checkpoint", "after it"])
def test_a_resumed_run_keeps_its_support_though_the_data_have_changed(
    die_at: int, unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command(tmp_path, [*CLI, *calibrated("data")], monkeypatch, die_at)
    stored = (run / "support.json").read_text()
    sample_data = GaussianMixtureExpert.sample_data

    def moved(expert: GaussianMixtureExpert, n: int, generator: torch.Generator | None = None) -> Any:
        x_0, c = sample_data(expert, n, generator)
        return x_0 + 5, c

    monkeypatch.setattr(GaussianMixtureExpert, "sample_data", moved)
    command(tmp_path, ["--resume", "run"], monkeypatch)
    assert (run / "support.json").read_text() == stored == (unbroken["data"] / "support.json").read_text()
    assert same_students(run, unbroken["data"])
    learner = load_run(run)
    low, high = (json.loads(stored)[side] for side in ("low", "high"))
    assert learner.support == ChannelQuantiles(low, high)
    assert all(a > -1 and b < 1 for a, b in zip(low, high, strict=True))  # of the data as they were
    (run / "support.json").unlink()
    assert load_run(run).support != learner.support


def test_the_support_that_a_run_stores_is_what_moved_its_labels(unbroken: dict[str, Path]) -> None:
    for run in unbroken.values():
        stored = json.loads((run / "support.json").read_text())
        assert stored["kind"] == "quantile"
        assert len(stored["low"]) == 3
        rows = read_metrics(run / "metrics.jsonl")
        shares = [row["clipped"]["teacher"] for row in rows if row["clipped"]["teacher"] is not None]
        assert shares[0] > 0.05  # the modes lie beyond the data's inner fifth


def test_a_run_whose_support_is_not_calibrated_stores_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = command(tmp_path, [*CLI, "--thresholding.kind", "static"], monkeypatch)
    assert not (run / "support.json").exists()


def test_the_cost_of_a_run_holds_its_calibration(unbroken: dict[str, Path]) -> None:
    on_data, on_teacher = (json.loads((unbroken[on] / "result.json").read_text())["teacher_nfe"] for on in ("data", "teacher"))
    assert on_data == 3 * 32 * 2  # three collections of 32 states of 2 expert steps
    assert on_teacher == on_data + 512 * 8
    assert read_metrics(unbroken["teacher"] / "metrics.jsonl")[0]["teacher_nfe"] == 512 * 8 + 32 * 2


@pytest.mark.parametrize(
    "die_at",
    [
        2,
        6,
    ],
    ids=["before the first checkpoint", "after it"],
)
def test_a_resumed_run_counts_its_calibration_once(
    die_at: int, unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command(tmp_path, [*CLI, *calibrated("teacher")], monkeypatch, die_at)
    command(tmp_path, ["--resume", "run"], monkeypatch)
    assert same_students(run, unbroken["teacher"])
    ours, theirs = (json.loads((each / "result.json").read_text())["teacher_nfe"] for each in (run, unbroken["teacher"]))
    assert ours == theirs


# An ablation is a list of roles


@pytest.mark.parametrize("roles", [[], ["teacher"], ["teacher", "student"], ["target", "student", "teacher"]], ids=str)
def test_the_roles_are_a_list_in_a_file_or_a_flag(
    roles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ablation.yaml").write_text(f"thresholding: {{kind: static, bound: 0.5, roles: {json.dumps(roles)}}}\n")
    flag = f"[{', '.join(roles)}]"
    printed = []
    for argv in (["--config", "ablation.yaml"], ["--thresholding.kind=static", "--thresholding.bound=0.5", "--thresholding.roles", flag]):
        with pytest.raises(SystemExit):
            dagger.main(["--env", "gaussian_mixture", *argv, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out)["thresholding"])
    assert printed[0] == printed[1]
    assert (printed[0]["roles"], printed[0]["kind"], printed[0]["bound"]) == (roles, "static", 0.5)


def test_a_run_thresholds_the_roles_of_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = command(tmp_path, [*CLI, "--thresholding.kind", "static", "--thresholding.roles", "[teacher, student]"], monkeypatch)
    assert all(set(row["clipped"]) == {"teacher", "student"} for row in read_metrics(run / "metrics.jsonl"))
    assert yaml.safe_load((run / "config.yaml").read_text())["thresholding"]["roles"] == ["teacher", "student"]
    assert load_run(run).config.thresholding == Thresholding(kind="static", roles=("teacher", "student"))
