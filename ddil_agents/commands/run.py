"""The command line of every learner: dataclass ← presets ← --config ← flags, and the run that follows.

    python -m ddil_agents.dagger --env digits --num_updates 2000 --out runs/mine
    python -m ddil_agents.dagger --resume runs/mine

An env is a preset of configs/env or a YAML file; its expert's arguments are flags, `--env.guidance_scale 3`. Where
configs/<agent>/<env>.yaml exists its settings are this env's defaults, and those of configs/<agent>/data/<env>.yaml over them where
`--data` names pictures of the user's own. A run directory holds

    config.yaml    reruns as it is: --config config.yaml
    metrics.jsonl, tensorboard/, checkpoints/, student/, samples.png, result.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import shutil
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from ddil_agents.agent import Agent
from ddil_agents.commands.card import complete_card
from ddil_agents.commands.errors import clear_errors
from ddil_agents.commands.hub import check_push, push
from ddil_agents.commands.parse import build_config, command_of, expert_and_config, identify, name_of_env, parse, take_flag
from ddil_agents.commands.plan import print_plan
from ddil_agents.config import LearnerConfig
from ddil_agents.devices import ranks, sharding
from ddil_agents.evaluation.callback import EvalCallback
from ddil_agents.evaluation.evaluator import Evaluator, evaluate_student
from ddil_agents.evaluation.metrics.diversity import lpips_distance
from ddil_agents.evaluation.pictures import save_pictures
from ddil_agents.evaluation.provenance import provenance
from ddil_agents.evaluation.results import read_result, table
from ddil_agents.evaluation.settings import Evaluation, Validation, extractor_for, load_scorers
from ddil_agents.training.callbacks import Callback
from ddil_agents.training.checkpoint import MAY_DIFFER, folder_atomically, write_atomically
from ddil_agents.training.metrics import read_metrics
from ddil_agents.training.stages import Stage, better_weights, evaluated_as, in_eval_mode, learners, plan
from ddil_agents.training.tracking import check_tracker
from ddil_agents.training.trained_agent import TrainedAgent
from ddil_env import Expert, ExpertPolicy, NoDataError, TimeGrid, check_expert
from ddil_env.presets import read_yaml

PLACES = {"env.model", "env.data", "env.images", "env.data_cache"}  # where what the run is made of lies, which may move
OF_THE_MACHINE = MAY_DIFFER | PLACES | {"env.device", "evaluate.batch_size", "push_to_hub", "hub_private"}  # may be given to a resume anew


def run(agent: type[Agent], argv: list[str] | None = None) -> None:
    """The main of a learner's file: parses, trains, evaluates and writes the run directory."""
    argv = list(sys.argv[1:] if argv is None else argv)
    outer = argparse.ArgumentParser(prog=shlex.join(["python", *command_of(identify(agent))]))
    ranks.choose_device()
    with clear_errors(outer):
        resume = take_flag(argv, "--resume")
        if resume is not None:
            if any(word == "--config" or word.startswith("--config=") for word in argv):
                raise ValueError("--resume goes on with the run's own config.yaml; leave --config out")
            if (other_env := take_flag(list(argv), "--env")) is not None:
                raise ValueError(f"--resume goes on with the run's own env; leave --env {other_env} out")
            saved = Path(resume) / "config.yaml"
            if not saved.is_file():
                raise ValueError(f"nothing to resume in {resume}: no config.yaml there")
            if (other := read_yaml(saved).get("agent")) is None:
                raise ValueError(f"{saved} is no run's config: it names no agent; restore it, or start a new run")
            if other != identify(agent):
                raise ValueError(f"{resume} is of {other}; resume it with {shlex.join(['python', *command_of(str(other))])}")
            _, was = parse(agent, ["--config", str(saved)])
            parser, cfg = parse(agent, ["--config", str(saved), *argv])
            before = vars(was.as_flat())
            changed = sorted({k for k, v in vars(cfg.as_flat()).items() if before.get(k) != v} - OF_THE_MACHINE)
            if changed:
                raise ValueError(
                    f"--resume continues {resume} as it was configured, but {', '.join(changed)} differs; start a new run for that"
                )
        else:
            parser, cfg = parse(agent, argv)
        expert, config = expert_and_config(agent, parser, cfg)
        stages = plan(config)
        chain = learners(agent, expert, stages, None if resume is None else Path(resume))
        first = next(chain)
        evaluation = Evaluation(**vars(cfg.evaluate))
        check_tracker(cfg.track)
        make_callbacks(agent, parser, cfg, evaluated_as(config, stages[0].config), expert)  # what is wrong with them is said now
        with ranks.together():
            check_expert(expert, student=first[1].ema_student)
            if ranks.is_main():
                check_evaluable(agent, expert, stages, evaluation)
                if cfg.push_to_hub is not None:
                    check_push(cfg.push_to_hub)
        out = Path(resume) if resume is not None else ranks.from_main(lambda: begin(agent, parser, cfg))
        if not (out / "config.yaml").is_file():
            raise ValueError(f"{out} is not to be seen from here; give an --out on a disk that all machines share")
        if ranks.is_main() and resume is None:
            print_plan(agent, config, stages, expert, evaluation, out, cfg.checkpoint_every)
        env = {"env": name_of_env(cfg), "env_config": {k: v for k, v in vars(cfg.env).items() if k != "device"}}
        chain = itertools.chain([first], chain)
        del first  # so that each learner goes before the next one is built
        for stage, learner in chain:
            directory = out / stage.directory
            if config.stages and (directory / "result.json").is_file():
                continue
            if config.stages and ranks.is_main():
                print(f"{directory}: {stage.config.num_steps} steps, teacher: {stage.teacher}", file=sys.stderr)
            if learner.step and ranks.is_main():
                print(f"resuming {directory} at step {learner.step} of {learner.total_updates}", file=sys.stderr)
            learner.train(
                directory,
                checkpoint_every=cfg.checkpoint_every,
                log_every=cfg.log_every,
                track=cfg.track,
                callbacks=make_callbacks(agent, parser, cfg, evaluated_as(config, stage.config), expert),
            )
            nfe = learner.total_nfe()
            if stage is stages[-1]:
                ranks.leave()  # nobody waits for the last evaluation
            with ranks.together():
                if ranks.is_main():
                    finish(learner, directory, evaluation, env, evaluated_as(config, stage.config), expert, nfe)
            del learner
        if not ranks.is_main():
            return
        if config.stages:
            gather(out, [out / stage.directory for stage in stages], config.seed)
        complete_card(out, config)
        print(table(read_result(out / "result.json")))
        print(f"\n{out}: config.yaml, metrics.jsonl, result.json, student/{', samples.png' if (out / 'samples.png').is_file() else ''}")
        if cfg.push_to_hub is not None:
            print(push(out / "student", cfg.push_to_hub, cfg.hub_private))


def make_callbacks(agent: type[Agent], parser: ArgumentParser, cfg: Namespace, settings: LearnerConfig, expert: Expert) -> list[Callback]:
    """The user's callbacks, and the evaluation while training if it is asked for, each built anew for a stage.

    Args:
        settings: Those that the stage's student is evaluated under.
        expert: The original teacher, which it is compared with.

    Raises:
        ValueError: settings that do not fit, or an agent without callbacks.
    """
    callbacks: list[Callback] = list(parser.instantiate(cfg).callbacks)
    if cfg.evaluate_every is not None:
        teacher = ExpertPolicy(expert, settings.substeps, settings.guidance_scale)
        callbacks.append(EvalCallback(cfg.evaluate_every, Validation(**vars(cfg.validation)), teacher))
    if callbacks and not issubclass(agent, TrainedAgent):
        raise ValueError(f"callbacks: {agent.name} is trained by a library of its own; leave --callbacks and --evaluate_every out")
    return callbacks


def begin(agent: type[Agent], parser: ArgumentParser, cfg: Namespace) -> Path:
    """Makes the run directory, with its config.yaml.

    Raises:
        ValueError: it exists and is not empty.
    """
    out = new_directory(cfg, agent)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.yaml", parser.dump(Namespace({**vars(cfg.clone()), "out": None, "config": None})))
    return out


def finish(
    learner: Agent,
    out: Path,
    evaluation: Evaluation,
    env: dict[str, Any],
    judged: LearnerConfig,
    expert: Expert,
    nfe: tuple[int, int],
) -> None:
    """Saves the student, judges it beside the original teacher, and writes result.json and samples.png.

    Args:
        learner: As it was trained.
        out: Its run directory.
        evaluation: How many samples, which seed.
        env: Name and settings of the env, for the record.
        judged: The settings that it is judged under: num_steps, grid, teacher_steps, guidance_scale.
        expert: The original teacher.
        nfe: Teacher and student forwards of the training, of all processes.
    """
    n, name = judged.num_steps, f"{learner.name}@{judged.num_steps}"
    with folder_atomically(out / "student") as student:
        expert.save_student(learner.ema_student, student, n, judged.grid, learner.kernel, *learner.guidance_input())
    store = out / "evaluation" if evaluation.n > evaluation.batch_size else None  # long ones go on where a kill stopped them
    evaluator = Evaluator(ExpertPolicy(expert, judged.substeps, judged.guidance_scale), learner.grid, evaluation, store)
    rows = read_metrics(out / "metrics.jsonl")
    cost: dict[str, Any] = dict(zip(("teacher_nfe", "student_nfe"), nfe, strict=True))
    seconds = {"train_seconds": rows[-1]["seconds"] if rows else None}
    models = evaluate_student(evaluator, learner.name, learner.student_policy, learner.kernel, judged.grid)
    models[name] = cost | seconds | models[name]
    weights: dict[str, Any] = {}
    if isinstance(learner, TrainedAgent) and not sharding.asked():  # the last weights of a sharded network are on many ranks
        latest = learner.policy(learner.networks["student"], learner.student_policy.support)
        with in_eval_mode(learner.networks["student"]):
            models[f"{name}, last weights"] = cost | seconds | evaluator.evaluate(latest, kernel=learner.kernel)
        if learner.kernel == "ddim":
            weights["error_of_weights"] = better_weights(learner)[0]
    result = {
        "agent": learner.name,
        **env,
        "student": name,
        "training_seed": learner.config.seed,
        "num_updates": learner.step,
        "processes": ranks.world(),
        "grid": judged.grid,
        "times": learner.grid.times.tolist(),
        **cost,
        **weights,
        "settings": evaluator.describe(),
        "floors": evaluator.floors(),
        "models": models,
        **provenance(expert.device),
    }
    save_pictures(
        out / "samples.png",
        evaluator,
        {**evaluator.baselines(), name: evaluator.sample(learner.student_policy, learner.grid, learner.kernel)},
    )
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    if store is not None:
        shutil.rmtree(store)


def gather(out: Path, stages: list[Path], seed: int) -> None:
    """Makes one run of its stages: the last one's student and pictures, everyone's metrics and results, costs summed up from the first."""
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    total = {"num_updates": 0, "teacher_nfe": 0, "student_nfe": 0}
    running = ("step", "seconds", "teacher_nfe", "student_nfe")
    for number, stage in enumerate(stages, 1):
        before = {key: rows[-1][key] if rows else 0 for key in running}
        for row in read_metrics(stage / "metrics.jsonl"):
            rows.append({**row, **{key: before[key] + row[key] for key in running}, "stage": number})
        result = read_result(stage / "result.json")
        total = {key: total[key] + result[key] for key in total}
        cost = {"teacher_nfe": total["teacher_nfe"], "student_nfe": total["student_nfe"], "train_seconds": rows[-1]["seconds"]}
        own = {name: model | cost for name, model in result["models"].items() if name.partition(",")[0] == result["student"]}
        models |= result["models"] | own  # of two stages with as many steps, the later one's student
    with folder_atomically(out / "student") as student:
        shutil.copytree(stages[-1] / "student", student, dirs_exist_ok=True)
    for name in ("samples.png", "support.json"):
        if (stages[-1] / name).is_file():
            write_atomically(out / name, (stages[-1] / name).read_bytes())
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(out / "result.json", json.dumps({**result, **total, "training_seed": seed, "models": models}, indent=1))


def refuse_early(agent: type[Agent], arguments: list[str], expert: Expert | None = None) -> tuple[Expert, LearnerConfig, Evaluation]:
    """Builds all that a command line describes and trains nothing, so that what is wrong with it is said before any long work.

    Args:
        agent: Its learner.
        arguments: As `run` takes them.
        expert: One that an earlier call returned, if it serves again.

    Returns:
        The expert, the settings that the student is judged under, and those of the evaluator.

    Raises:
        ValueError: what the config, the expert, the learner or the judge refuse.
    """
    parser, cfg = parse(agent, arguments)
    if expert is None:
        expert, config = expert_and_config(agent, parser, cfg)
        check_expert(expert)
    else:
        config = build_config(agent, parser, cfg)
    stages = plan(config)
    next(learners(agent, expert, stages))
    evaluation = Evaluation(**vars(cfg.evaluate))
    check_evaluable(agent, expert, stages, evaluation)
    return expert, evaluated_as(config, stages[-1].config), evaluation


def check_evaluable(agent: type[Agent], expert: Expert, stages: list[Stage], evaluation: Evaluation) -> None:
    """Refuses before training what would fail after it, or mislead: an extractor that does not fit, absent weights, a protocol's name."""
    if evaluation.protocol is not None:
        raise ValueError(
            f"evaluate.protocol={evaluation.protocol}: a run is judged on its own prompts, which are not the protocol's; leave it out, and "
            f"judge the run afterwards by python -m ddil_agents.evaluate --run OUT --config {evaluation.protocol} --captions FILE"
        )
    extractor_for(expert, evaluation)
    load_scorers(evaluation, expert.device)
    if evaluation.lpips:
        lpips_distance(evaluation.weights, device=expert.device)
    with suppress(NoDataError):
        for held_out in (False, True):
            if (m := len(expert.reference_data(evaluation.n, held_out)[0])) < 10:
                raise ValueError(
                    f"the expert has {m} {'held-out' if held_out else 'training'} samples to judge against; the metrics need 10: "
                    "give it more data, or another --env.held_out, 0 for none, where it takes one"
                )
    for config in (stage.config for stage in stages):
        expert.check_export(config.num_steps, config.grid, agent.kernel, config.student.get("prediction_type"))
        for more in evaluation.also_steps:
            TimeGrid(expert.schedule, more, config.grid)
        if config.beta.forward > 0 or config.beta.schedule != "constant":
            expert.sample_data(1, torch.Generator(expert.device))


def new_directory(cfg: Namespace, agent: type[Agent]) -> Path:
    """The run directory, not yet made.

    Raises:
        ValueError: it exists and is not empty.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(cfg.out or f"runs/{agent.name}-{name_of_env(cfg)}-s{cfg.seed}-{stamp}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    if out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):  # partial: a kill's remains
        raise ValueError(f"{out} exists and is not empty; continue it with --resume {out}, or choose another --out")
    return out
