"""When does DDIL help? The effect of its mixture against the covariate shift that was measured, cell by cell.

    python benchmarks/when.py --jobs 2            # hours on two cores; goes on where it stopped
    python benchmarks/when.py --report_only       # the map, from the runs that are there

    when.json, when.md, when.png    the map
    when_runs.jsonl                 a line for each run, all that the map is made of; a run that has its line is not run again

What is expected, which metric and how many seeds was written down in benchmarks/README.md before the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ddil_agents.checkpoint import write_atomically
from ddil_agents.compare import Comparison, Run, check, given_settings, last_line, made, merged, own_row, same_measure, train
from ddil_agents.evaluate import PROVENANCE
from ddil_agents.report import read_result
from ddil_agents.statistics import holm, paired_comparison
from ddil_env.presets import read_yaml

METRICS = ("endpoint_rmse", "frechet_to_expert", "recall")
ERRORS = {"action_mse_own": "error on own states", "action_mse_forward": "error on forward states"}  # which action_ratio is made of
COSTS = ("teacher_nfe", "student_nfe")
SHIFTS = {"action_ratio": "action error, own / forward states", "gaussian_shift": "Gaussian W2 of visits / held-out floor"}
FIRST_SEED = 100  # seeds from 0 have been seen in other benchmarks, some in settings like these
GUIDANCE, STEPS = (1.0, 3.0, 7.0), (2, 4, 8, 16)
BASE: dict[str, Any] = {
    "num_updates": 300,
    "num_steps": 4,
    "batch_size": 32,
    "collect_size": 128,
    "updates_per_collect": 16,
    "evaluate": {"n": 300, "n_paths": 300, "n_action": 200},
}
# Of an experiment's arms the first is the baseline, and the second the mixture whose effect is the cell's.
DAGGER = {
    "forward": {"agent": "dagger", "beta": {"forward": 1.0, "teacher": 0.0, "student": 0.0}},
    "ddil": {"agent": "dagger", "beta": {"forward": 0.5, "teacher": 0.1, "student": 0.4}},
}
STUDENT = {"student": {"agent": "dagger", "beta": {"forward": 0.0, "teacher": 0.0, "student": 1.0}}}
LCM = {
    "forward": {"agent": "lcm", "beta": {"forward": 1.0, "teacher": 0.0, "student": 0.0}},
    "half": {"agent": "lcm", "beta": {"forward": 0.5, "teacher": 0.0, "student": 0.5}},
}
DMD2 = {
    "own": {"agent": "dmd2", "config": "demo", "beta": {"forward": 0.0, "teacher": 0.0, "student": 1.0}},
    "half teacher": {"agent": "dmd2", "config": "demo", "beta": {"forward": 0.0, "teacher": 0.5, "student": 0.5}},
}


class Cell(NamedTuple):
    """One setting in which the arms are compared."""

    name: str
    arms: dict[str, dict[str, Any]]
    settings: dict[str, Any]

    @property
    def follows(self) -> bool:
        """Whether its students step along the teacher's ODE, so that noise determines the sample; LCM and DMD2 draw fresh noise."""
        return self.arms.keys() >= DAGGER.keys()

    @property
    def primary(self) -> str:
        return "endpoint_rmse" if self.follows else "frechet_to_expert"


def grid_name(w: float, num_steps: int) -> str:
    return f"w {w:g}, {num_steps} steps"


def cells() -> list[Cell]:
    """All of them, fixed before the runs."""
    guided = {"guidance_scale": 3.0}
    lcm = guided | {"num_updates": 600}
    dmd2 = guided | {"num_updates": 600, "learning_rate": 3e-5, "updates_per_collect": 4}  # its rollouts are to be fresh
    found = [
        Cell(grid_name(w, n), DAGGER | (STUDENT if n == 4 else {}), {"guidance_scale": w, "num_steps": n, "teacher_steps": 32})
        for w in GUIDANCE
        for n in STEPS
    ]
    found += [
        Cell("w 3, 4 steps, 75 updates", DAGGER, guided | {"num_updates": 75}),
        Cell("w 3, 4 steps, 1200 updates", DAGGER, guided | {"num_updates": 1200}),
        Cell("w 3, 4 steps, small student", DAGGER, guided | {"student": {"channels": [16, 32]}, "num_updates": 600}),
        Cell("w 3, 4 steps, batch 7", DAGGER, guided | {"batch_size": 7, "collect_size": 28}),
    ]
    found += [Cell(f"LCM, w 3, {n} steps", LCM, lcm | {"num_steps": n, "inference_steps": [n]}) for n in (4, 8)]
    found += [
        Cell("DMD2, w 3, 4 steps", DMD2, dmd2),
        Cell("DMD2, w 3, 4 steps, batch 7", DMD2, dmd2 | {"batch_size": 7, "collect_size": 28}),
    ]
    return found


def shift_of(row: dict[str, Any], floor: list[float]) -> dict[str, float]:
    """The covariate shift of one student: how much worse it acts where it goes itself, and how far that is from the data."""
    ratios = [ratio for ratio in row["action_ratio"][1:] if ratio is not None]
    return {
        "action_ratio": statistics.fmean(ratios) if ratios else float("nan"),
        "gaussian_shift": statistics.fmean(a / b for a, b in zip(row["gaussian_shift"][1:], floor[1:], strict=True)),
    }


Key = tuple[str, str, int]  # a run: its cell, arm and seed


def record_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the map needs of one run's result, and how it was measured, with what."""
    row = own_row(result)
    measured = {key: row[key] for key in (*METRICS, *COSTS)} | {error: statistics.fmean(row[error][1:]) for error in ERRORS}
    measured |= shift_of(row, result["floors"]["training_data"]["gaussian_shift"])
    about = {"settings": {k: v for k, v in result["settings"].items() if k != "seed"}}
    return measured | about | {key: result[key] for key in ("env_config", *PROVENANCE)}


def harvest(run: Run, agent: str, lost: bool) -> dict[str, Any] | None:
    """The record of a run that has ended: its result or, of one that failed, how; None if there is nothing to tell yet."""
    if (path := run.directory / "result.json").is_file():
        return record_of(read_result(path)) | {"given": digest(agent, read_yaml(run.given))}
    return {"lost": last_line(run.log), "given": digest(agent, read_yaml(run.given))} if lost and run.log.is_file() else None


def read_records(path: Path) -> dict[Key, dict[str, Any]]:
    """The runs of a when_runs.jsonl; none if there is no such file."""
    lines = map(json.loads, path.read_text().splitlines() if path.is_file() else ())
    return {(line.pop("cell"), line.pop("arm"), line.pop("seed")): line for line in lines}


def write_records(path: Path, records: dict[Key, dict[str, Any]]) -> None:
    """A when_runs.jsonl, of all of these runs."""
    lines = [json.dumps(dict(zip(("cell", "arm", "seed"), key, strict=True)) | record) for key, record in records.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(line + "\n" for line in lines))


def digest(agent: str, settings: dict[str, Any]) -> str:
    """Of what a run was given."""
    return hashlib.sha256(json.dumps([agent, settings], sort_keys=True).encode()).hexdigest()[:12]


def effect_of(cell: Cell, records: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """A cell's differences from its first arm, paired by seed, in per cent of that arm's mean, and the shift measured on that arm.

    Args:
        cell: Which.
        records: Of its finished runs, by arm and seed.
    """
    base, *others = cell.arms
    measures = [*METRICS, *ERRORS] if cell.follows else METRICS[1:]
    effects: dict[str, Any] = {}
    paired = {arm: sorted({seed for _, seed in records if (arm, seed) in records and (base, seed) in records}) for arm in others}
    for arm, seeds in paired.items():
        for metric in measures if len(seeds) > 1 else ():
            own, reference = ([records[which, seed][metric] for seed in seeds] for which in (arm, base))
            pair, mean = paired_comparison(own, reference, (arm, base)), statistics.fmean(reference)
            effects.setdefault(arm, {})[metric] = {
                **{key: 100 * getattr(pair, key) / mean for key in ("mean", "low", "high")},
                "n": pair.n,
                "p": pair.p,
                "baseline": mean,
                "by_seed": {seed: 100 * (a - b) / mean for seed, a, b in zip(seeds, own, reference, strict=True)},
            }
    shifts = {seed: {key: records[base, seed][key] for key in SHIFTS} for seed in paired[others[0]]}
    mean_shift = {key: statistics.fmean(shift[key] for shift in shifts.values()) for key in SHIFTS} if shifts else {}
    return {
        "mixture": others[0],
        "primary": cell.primary,
        "pairs": {arm: len(seeds) for arm, seeds in paired.items()},
        "effects": effects,
        "shift": mean_shift,
        "shift_by_seed": shifts,
    }


def adjust(found: dict[str, Any], family: int) -> None:
    """Adds Holm's p to the mixtures' effects: one family over all cells, of which those that have not run count as no effect."""
    own = [cell["effects"][cell["mixture"]][cell["primary"]] for cell in found.values() if cell["mixture"] in cell["effects"]]
    p = [effect["p"] for effect in own]
    for effect, adjusted in zip(own, holm([*p, *[1.0] * (family - len(p))]), strict=False):
        effect["p_holm"] = float(adjusted)


def predicts(found: dict[str, Any]) -> dict[str, Any]:
    """Spearman's correlation between shift and effect, over the cells whose students follow the teacher's ODE.

    Shift and effect share the forward-only students, whose chance errors would correlate them. So the shift is taken from one
    half of the seeds and the effect from the other; the correlation is the mean over all ways to halve them.
    """
    chosen = [cell for cell in found.values() if cell["primary"] == "endpoint_rmse" and cell["mixture"] in cell["effects"]]
    effects = [cell["effects"][cell["mixture"]]["endpoint_rmse"]["by_seed"] for cell in chosen]
    seeds = sorted(set.intersection(*map(set, effects))) if effects else []
    if len(chosen) < 3 or len(seeds) < 4:
        return {}
    correlations = {}
    for measure in SHIFTS:
        shift = np.array([[cell["shift_by_seed"][seed][measure] for seed in seeds] for cell in chosen])  # (cells, seeds)
        effect = np.array([[by_seed[seed] for seed in seeds] for by_seed in effects])
        halves = [list(half) for half in itertools.combinations(range(len(seeds)), len(seeds) // 2)]
        rho = [stats.spearmanr(shift[:, half].mean(1), np.delete(effect, half, 1).mean(1)).statistic for half in halves]
        whole = stats.spearmanr(shift.mean(1), effect.mean(1)).statistic
        correlations[measure] = {"rho": statistics.fmean(rho), "uncorrected": float(whole), "cells": len(chosen), "seeds": len(seeds)}
    return correlations


def markdown(found: dict[str, Any]) -> str:
    """The map as a table; bold is the metric that the cell is judged by, and p is of it."""
    heads = [
        "cell",
        "arm",
        "seeds",
        "RMSE to teacher, %",
        "Fréchet to teacher, %",
        "recall, %",
        "p",
        *(f"{error}, %" for error in ERRORS.values()),
        "action ratio",
        "Gaussian shift / floor",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cell in found.items():
        for arm, pairs in cell["pairs"].items():
            if (effect := cell["effects"].get(arm)) is None:
                lines.append(f"| {name} | {arm} | {pairs} |" + " – |" * (len(heads) - 3))
                continue
            spans = {key: f"{e['mean']:+.1f} [{e['low']:+.1f}, {e['high']:+.1f}]" for key, e in effect.items()}
            spans[cell["primary"]] = f"**{spans[cell['primary']]}**"
            p = f"{effect[cell['primary']]['p_holm']:.3f}" if arm == cell["mixture"] else ""
            found_in, errors = ([spans.get(key, "–") for key in keys] for keys in (METRICS, ERRORS))
            shift = [f"{cell['shift'][key]:.2f}" if cell["primary"] == "endpoint_rmse" else "–" for key in SHIFTS]
            row = [name, arm, str(pairs), *found_in, p, *errors, *shift]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The map over guidance and steps, and every cell's effect against its shift, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    grid, *scatters = figure.subplots(1, 3)
    effect = np.full((len(GUIDANCE), len(STEPS)), np.nan)
    for i, j in np.ndindex(effect.shape):
        cell = found.get(grid_name(GUIDANCE[i], STEPS[j]))
        if cell is not None and cell["mixture"] in cell["effects"]:
            e = cell["effects"][cell["mixture"]]["endpoint_rmse"]
            effect[i, j] = e["mean"]
            shift = "\n".join(f"{key.replace('_', ' ')} {cell['shift'][key]:.2f}" for key in SHIFTS)
            grid.text(j, i, f"{e['mean']:+.1f} %\n[{e['low']:+.1f}, {e['high']:+.1f}]\n{shift}", ha="center", va="center", fontsize=7)
    limit = np.nanmax(np.abs(effect), initial=1.0)
    grid.imshow(effect, cmap="PiYG_r", vmin=-limit, vmax=limit, aspect="auto", alpha=0.6)
    grid.set_xticks(range(len(STEPS)), [str(n) for n in STEPS])
    grid.set_yticks(range(len(GUIDANCE)), [f"{w:g}" for w in GUIDANCE])
    grid.set(xlabel="student steps", ylabel="guidance w", title="RMSE to teacher, DDIL beside forward-only", box_aspect=0.75)
    for axis, (measure, label) in zip(scatters, SHIFTS.items(), strict=True):
        for marker, arm in zip("os", ("ddil", "student"), strict=True):
            cells = [cell for cell in found.values() if arm in cell["effects"]]
            if cells:
                effects = [cell["effects"][arm][cell["primary"]] for cell in cells]
                y = [e["mean"] for e in effects]
                error = [[e["mean"] - e["low"] for e in effects], [e["high"] - e["mean"] for e in effects]]
                axis.errorbar([cell["shift"][measure] for cell in cells], y, error, fmt=marker, label=arm, capsize=2, alpha=0.8)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(xlabel=label, ylabel="effect on RMSE to teacher, %: below 0 it helps")
        if axis.lines[1:]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/when"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/when.json"))
    parser.add_argument("--env", default="digits8")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cells", nargs="+", default=None, help="names of those to run; default: all. All that have run are reported")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args()
    names = [cell.name for cell in cells()]
    if unknown := sorted(set(args.cells or ()) - set(names)):
        parser.error(f"--cells {unknown}: choose of {names}")
    found: dict[str, Any] = {}
    kept = args.out.with_name(f"{args.out.stem}_runs.jsonl")
    records = read_records(kept)
    for cell in cells():
        out = args.runs / cell.name.replace(",", "").replace(" ", "_")
        settings = Comparison(args.env, cell.arms, merged(BASE, cell.settings), args.seeds, FIRST_SEED, primary=cell.primary)
        runs = {
            (cell.name, arm, seed): Run("updates", arm, seed, out / "runs" / "updates" / f"{arm}-s{seed}")
            for seed in settings.all_seeds
            for arm in cell.arms
        }
        todo = {key: run for key, run in runs.items() if key not in records}
        trains = bool(todo) and not args.report_only and cell.name in (args.cells or names)
        if trains:
            check(settings, out)
            train(list(todo.values()), settings, out, None, args.jobs)
        new = {key: harvest(run, cell.arms[run.arm]["agent"], trains) for key, run in todo.items()}
        records |= {key: record for key, record in new.items() if record is not None}
        own = {key: records[key] for key in runs if key in records}
        given = {key: digest(cell.arms[run.arm]["agent"], given_settings(settings, run.arm, run.seed)) for key, run in runs.items()}
        if other := [key for key, record in own.items() if record["given"] != given[key]]:
            parser.error(f"the runs {other} had other settings than they have now; remove them from {kept} and {args.runs}")
        done = {key: record for key, record in own.items() if "lost" not in record}
        if len(devices := {record["hardware"] for record in done.values()}) > 1:
            parser.error(f"{cell.name} was run on {' and '.join(sorted(devices))}, which draw other noise: make it on one of them alone")
        if own:
            print(f"{cell.name}: {len(done)} of {len(runs)} runs done", flush=True)
            records |= read_records(kept)  # another process may have added cells of its own
            write_records(kept, records)
        if done:
            same_measure({Path(*map(str, key)): record for key, record in done.items()})
            found[cell.name] = effect_of(cell, {(arm, seed): record for (_, arm, seed), record in done.items()})
    if not found:
        parser.error(f"--runs {args.runs}: none of these cells has run there; leave --report_only out, or name another folder")
    adjust(found, len(names))
    used = {key: record for key, record in records.items() if key[0] in found}
    lost = [f"{cell}, {arm}, seed {seed}: {record['lost']}" for (cell, arm, seed), record in used.items() if "lost" in record]
    about = {"env": args.env, "seeds": args.seeds, "first_seed": FIRST_SEED, **made(r for r in used.values() if "lost" not in r)}
    args.out.write_text(json.dumps({"cells": found, "predicts": predicts(found), "lost": lost, **about}, indent=1))
    draw(found, args.out.with_suffix(".png"))
    told = [
        f"Spearman, {measure} against the mixture's effect: {c['rho']:+.2f} across halves of the seeds ({c['uncorrected']:+.2f} with the"
        f" same seeds in both), {c['cells']} cells, {c['seeds']} seeds"
        for measure, c in predicts(found).items()
    ]
    told += [f"{about['hardware']}, torch {about['torch']}, {about['date']}"]
    table = "\n\n".join([markdown(found), *told, *(f"- ! {each}" for each in lost)])
    args.out.with_suffix(".md").write_text(f"# When does DDIL help?\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
