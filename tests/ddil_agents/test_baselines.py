"""Facts about the imitation-learning baselines: each one's formula, what it costs, what it equals at its ends, and that it learns."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CORNERS, ENV, MIXTURE, corners, labelled, learn, make, same, settings, weights
from safetensors.torch import load_file

from ddil_agents import Algorithm, Beta, Dagger
from ddil_agents import aggrevate as aggrevate_module
from ddil_agents import dart as dart_module
from ddil_agents import gail as gail_module
from ddil_agents import safe_dagger as safe_dagger_module
from ddil_agents import scheduled_sampling as scheduled_sampling_module
from ddil_agents.aggrevate import Aggrevate
from ddil_agents.commands.load import load_run
from ddil_agents.commands.parse import expert_and_config, parse
from ddil_agents.dart import Dart, DartConfig
from ddil_agents.evaluation.metrics.distances import sliced_wasserstein
from ddil_agents.gail import Gail, GailConfig
from ddil_agents.safe_dagger import SafeDagger, SafeDaggerConfig
from ddil_agents.scheduled_sampling import ScheduledSampling, ScheduledSamplingConfig
from ddil_env import DdimPolicy, ExpertPolicy, GaussianMixtureExpert, NoDataError, unroll
from ddil_env.mdp import Kernel

pytestmark = pytest.mark.usefixtures("own_generator")


# What all of them promise

BASELINES: list[tuple[type[Algorithm], dict[str, Any]]] = [
    (ScheduledSampling, {}),
    (Dart, {"beta": Beta(0.6, 0.4, 0)}),
    (SafeDagger, {"gate": 0.3, "query_budget": 200, "beta": MIXTURE}),
    (Aggrevate, {"beta": MIXTURE}),
    (Gail, {}),
    (Gail, {"paired": False, "beta": Beta(0.2, 0.4, 0.4)}),
]
NAMES = ["scheduled_sampling", "dart", "safe_dagger", "aggrevate", "gail", "gail-unpaired"]
every = pytest.mark.parametrize(("agent", "changed"), BASELINES, ids=NAMES)


@every
def test_a_resumed_learner_ends_bit_for_bit_where_the_unbroken_one_does(
    tmp_path: Path, agent: type[Algorithm], changed: dict[str, Any]
) -> None:
    whole = make(agent, **changed)
    whole.train(tmp_path, progress=False, checkpoint_every=9)
    (resumed := make(agent, **changed).load(tmp_path / "checkpoints" / "step_00000018")).train(progress=False)
    first = make(agent, **changed)
    first.train(tmp_path / "again", progress=False, checkpoint_every=11)
    (early := make(agent, **changed).load(tmp_path / "again" / "checkpoints" / "step_00000011")).train(progress=False)
    a = whole.trainer.state_dict()
    for other in (resumed, early):
        b = other.trainer.state_dict()
        for key in a.keys() | b.keys():
            assert same(a[key], b[key]), key
    assert whole.step == 20


@every
def test_a_learner_that_has_trained_takes_over_the_counts_of_the_one_that_it_loads(
    tmp_path: Path, agent: type[Algorithm], changed: dict[str, Any]
) -> None:
    (saved := make(agent, **changed)).train(tmp_path, progress=False, checkpoint_every=20)
    trained = learn(make(agent, **changed)).load(tmp_path / "checkpoints" / "step_00000020")
    assert (trained.student_nfe, trained.teacher_nfe) == (saved.student_nfe, saved.teacher_nfe)


@every
def test_every_forward_of_the_teacher_is_counted(agent: type[Algorithm], changed: dict[str, Any]) -> None:
    for expert in (corners(), labelled()):
        learner = learn(make(agent, expert, **changed))
        assert learner.teacher_nfe == expert.nfe > 0


@every
def test_it_trains_on_conditions_and_on_any_shape(agent: type[Algorithm], changed: dict[str, Any]) -> None:
    video = GaussianMixtureExpert(torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 0.2, schedule="cosine")
    for expert in (labelled(), video, GaussianMixtureExpert(CORNERS, 0.25, schedule="flow")):
        learner = make(agent, expert, num_updates=6, **changed)
        before = weights(learner.ema_student)
        learn(learner)
        assert torch.isfinite(weights(learner.ema_student)).all()
        assert not torch.equal(weights(learner.ema_student), before)


FAST = {"batch_size": 256, "collect_size": 1024, "updates_per_collect": 16, "capacity": 4096, "warmup_updates": 50, "teacher_steps": 32}
FAST |= {"num_updates": 400, "learning_rate": 1e-2, "ema": 0.97, "student": {"width": 64}}
ADVERSARIAL = {"learning_rate": 3e-3, "discriminator_learning_rate": 1e-2, "batch_size": 128, "num_updates": 600}
# Seeds 0 … 2 at equal updates: behaviour cloning .033 – .048, DAgger .033 – .049.
TOYS: list[tuple[type[Algorithm], dict[str, Any], float]] = [
    (Dagger, {"beta": Beta(0, 0, 1)}, 0.08),  # Imagine Flash's states: .032 – .034
    (ScheduledSampling, {}, 0.08),  # .032 – .034, as exponential and inverse_sigmoid
    (Dart, {}, 0.08),  # .034 – .048
    (Dart, {"beta": Beta(0, 1, 0)}, 0.08),  # .033 – .035
    (SafeDagger, {"gate": 0.25}, 0.1),  # .043 – .056, for 44 % of DAgger's forwards
    (SafeDagger, {"gate": 0.25, "query_budget": 30000}, 0.1),  # .047 – .060, for 14 %
    (Aggrevate, {}, 0.12),  # .083 – .084; the floor: two draws of 1000 by the teacher are .055 – .110 apart
    (Gail, ADVERSARIAL, 0.15),  # .086 – .092; .061 – .079 at a batch of 256
]


@pytest.mark.parametrize(("agent", "changed", "within"), TOYS)
def test_a_4_step_student_comes_near_the_32_step_teacher(agent: type[Algorithm], changed: dict[str, Any], within: float) -> None:
    learner = make(agent, **{**FAST, **changed})
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    teacher = unroll(ExpertPolicy(learner.expert, 8), learner.grid, x_T)[:, -1]

    def distance(policy: DdimPolicy, kernel: Kernel) -> float:
        samples = unroll(policy, learner.grid, x_T, kernel=kernel, generator=torch.Generator().manual_seed(1))[:, -1]
        return sliced_wasserstein(samples, teacher)

    assert distance(ExpertPolicy(learner.expert, 1), "ddim") > 0.2  # the teacher's own 4 steps
    assert distance(learner.student_policy, learner.kernel) > 0.3  # untrained
    learn(learner)
    assert distance(learner.student_policy, learner.kernel) < within


# Imagine Flash


class NoData(GaussianMixtureExpert):
    def sample_data(self, n: int, generator: torch.Generator | None = None) -> Any:
        raise NoDataError("none")


def test_imagine_flash_trains_on_the_students_states_alone_and_without_data() -> None:
    parser, cfg = parse(Dagger, ["--env", "gaussian_mixture", "--config", "imagine_flash"])
    _, config = expert_and_config(Dagger, parser, cfg)
    assert config.beta(0) == config.beta(1) == (0, 0, 1)
    assert (config.num_steps, config.substeps) == (3, 10)
    learner = learn(make(Dagger, NoData(CORNERS, 0.25), beta=config.beta))
    assert learner.buffer.counts == {"forward": 0, "teacher": 0, "student": 64}


# Scheduled sampling
# DART
# SafeDAgger
# AggreVaTe
# GAIL
# Bad settings


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (ScheduledSamplingConfig, {"mixing": "cosine"}, "unknown mixing 'cosine'; choose one of: constant, linear, exponential, inverse_"),
        (ScheduledSamplingConfig, {"mixing_rate": 0.0}, "mixing_rate=0.0: need a positive number"),
        (ScheduledSamplingConfig, {"beta": Beta()}, "beta.student=0: .*give them a share"),
        (DartConfig, {"perturbation": -0.1}, "perturbation=-0.1: need a finite number ≥ 0"),
        (SafeDaggerConfig, {"gate": 0.0}, r"gate=0.0: need a fraction in \(0, 1\]"),
        (SafeDaggerConfig, {"gate": 1.5}, "gate=1.5"),
        (SafeDaggerConfig, {"p_expert": 0.2}, "p_expert=0.2 with gate=0.5: .*set p_expert to 0 or gate to 1"),
        (SafeDaggerConfig, {"check_substeps": 2}, "check_substeps=2: need at least 1 and fewer than the 2 of a label"),
        (SafeDaggerConfig, {"teacher_steps": 4}, "check_substeps=1: need .* fewer than the 1 of a label"),
        (SafeDaggerConfig, {"beta": Beta(0, 1, 0)}, "gate=0.5: the teacher's own states are not gated"),
        (DartConfig, {"p_expert": 0.5}, "p_expert=0.5: the expert acts in student rollouts, and β has none"),
        (GailConfig, {"discriminator_learning_rate": 0.0}, "discriminator_learning_rate=0.0: need a positive"),
        (GailConfig, {"discriminator_width": 0}, "discriminator_width=0: need at least 1"),
        (GailConfig, {"gradient_penalty": -1.0}, "gradient_penalty=-1.0: need a finite number ≥ 0"),
        (GailConfig, {"paired": False, "beta": Beta(0, 0, 1)}, "paired=false .*give beta.student and beta.teacher a share each"),
        (GailConfig, {"paired": False, "p_expert": 0.5}, "p_expert=0.5 with paired=false"),
        (GailConfig, {"guidance_range": (1.0, 3.0)}, "guidance_range=.*the discriminator takes no w"),
        (GailConfig, {"prioritised": True}, "prioritised=true: GAIL's loss is the discriminator's belief"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(config: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings(**changed))


# Corrections at inference
# The command lines

SMALL = shlex.split(
    "--num_updates 6 --teacher_steps 8 --batch_size 16 --collect_size 40 --updates_per_collect 3 --log_every 3 --checkpoint_every 5 "
    "--student '{width: 16}' --evaluate.n 20 --evaluate.n_action 5"
)
COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str], int]] = {  # and the forwards of the teacher: 2 collections
    "scheduled_sampling": (
        scheduled_sampling_module.main,
        ["--mixing", "exponential"],
        (40 + 60 + 40 + 1) * 2,
    ),  # which takes all steps, then one of 60
    "dart": (dart_module.main, ["--perturbation", ".2"], 2 * 40 * 2),
    "safe_dagger": (
        safe_dagger_module.main,
        ["--gate", ".25", "--query_budget", "150", "--beta.forward", "0", "--beta.teacher", "0"],
        2 * (40 + 20),
    ),
    "aggrevate": (aggrevate_module.main, [], 2 * 40 * 5),
    "gail": (gail_module.main, ["--discriminator_width", "8"], 2 * (40 + 30) * 2),  # 30 steps to its own 20 states
}


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in an empty directory, and say nothing."""
    monkeypatch.chdir(tmp_path)
    Path("env.yaml").write_text(ENV)
    with contextlib.redirect_stdout(None), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_the_command_says_what_it_measured(name: str) -> None:
    main, argv, teacher_nfe = COMMANDS[name]
    main(["--env", "env.yaml", *SMALL, *argv, "--out", "run"])
    result = json.loads(Path("run/result.json").read_text())
    assert (result["agent"], result["student"], result["num_updates"]) == (name, f"{name}@4", 6)
    assert result["teacher_nfe"] == teacher_nfe
    own = result["models"][f"{name}@4"]
    assert own["nfe_per_sample"] == 4
    assert all(math.isfinite(own[key]) and own[key] > 0 for key in ("frechet", "frechet_to_expert"))
    saved = load_file("run/student/student.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    learner = load_run(Path("run"))
    assert learner.name == name
    assert all(torch.equal(value, saved[key]) for key, value in learner.ema_student.state_dict().items())
    main(["--resume", "run"])
    assert json.loads(Path("run/result.json").read_text())["models"][f"{name}@4"]["frechet"] == own["frechet"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_method_is_and_what_its_settings_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, argv, _ = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        main(["--env", "gaussian_mixture", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"\w+ et al\. \d{4}|\(?\w+ & \w+ \d{4}", text)
    assert f"python -m ddil_agents.{name} --env digits" in text
    for flag in argv[::2]:
        assert re.search(rf"^  {re.escape(flag)} .*\n(?: +.*\n)*? *.*\w+", text, re.MULTILINE), flag
