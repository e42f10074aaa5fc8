#!/usr/bin/env python
"""Run experiments: all arms with all seeds, then the table, the figure and the section in RESULTS.md.

    python example/experiments/experiment.py configs/experiments/d_needle.yaml
    python example/experiments/experiment.py configs/experiments/*.yaml --seeds 3 --jobs 2
    python example/experiments/experiment.py configs/experiments/a_real.yaml --source alpaca_data.json

An experiment is a YAML file with `settings` (on top of configs/small.yaml), a `data` recipe (experiment_data.py), and
`arms`, each with its changes to settings or data. An arm's `grid` makes one arm per combination of values. `weights_of`
trains an arm with method=fixed on the final weights of another arm's run with the same seed.

A run is one arm with one seed. The seed also draws the data. Each run has its own folder, whose name depends on all of
its settings and data: finished runs are not repeated, interrupted runs resume from their checkpoint, and a changed arm
is a new run.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLE = Path(__file__).resolve().parents[1]
ROOT = EXAMPLE.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from experiment_data import check_recipe, make  # noqa: E402
from process import UserError as DataError  # noqa: E402

from bilevel.errors import ConfigError, UserError  # noqa: E402
from bilevel.settings.command_line import read_yaml  # noqa: E402
from bilevel.settings.fields import FIELDS  # noqa: E402
from bilevel.settings.rules import validate  # noqa: E402

BASE = ROOT / "configs" / "small.yaml"
NEEDED = {"title", "question", "data", "arms", "measures", "figure"}
KEYS = NEEDED | {"settings", "source", "shows", "reading"}
# Settings of every run: the model is not saved, there is no tracker, test losses are computed only at the start and the
# end, and checkpoints are written only on a signal: runs are short, and a checkpoint of a large model takes gigabytes.
FIXED = {"save_model": "none", "tracker": "none", "eval_every": 10**6, "save_every": 0}
PRELOAD = [
    "train_bilevel",
    "bilevel.run.state",
    "bilevel.model.copies",
    "bilevel.data.samples",
    "bilevel.run.ending",
    "bilevel.monitor.metrics",
]
PRELOAD += ["bilevel.evaluate.command", "bilevel.run.messages", "matplotlib.figure"]


CRASHED = 70
ENDS = {0: "done", 1: "stopped", CRASHED: "crashed"}  # by exit code; all three count as results


class Arm(NamedTuple):
    """One arm. name: its key in the YAML file; values: the grid values chosen for it."""

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, Any]
    weights_of: str | None = None

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.values.items())])


# ----------------------------------------------------------------------------------------------------------------------
# Reading an experiment


def merged(base: dict, change: dict) -> dict:
    """base updated by change, recursively; a value of null removes its key."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return {key: value for key, value in result.items() if value is not None}


def read_arms(experiment: dict) -> list[Arm]:
    """The arms with resolved settings and recipes. A grid key is a setting or a dotted path in the recipe."""
    base = read_yaml(str(BASE)) | FIXED | experiment.get("settings", {})
    arms = []
    for name, change in experiment["arms"].items():
        change = dict(change or {})
        grid, data = change.pop("grid", {}), merged(experiment["data"], change.pop("data", {}))
        weights_of = change.pop("weights_of", None)
        for chosen in product(*grid.values()):
            values = dict(zip(grid, chosen, strict=True))
            recipe = data
            for key in values.keys() - FIELDS.keys():
                inner = values[key]
                for place in reversed(key.split(".")):
                    inner = {place: inner}
                recipe = merged(recipe, inner)
            settings = base | change | {key: value for key, value in values.items() if key in FIELDS}
            arms.append(Arm(name, values, settings, recipe, weights_of))
    return arms


def read_experiment(path: Path) -> tuple[dict, list[Arm]]:
    """The YAML content and its arms. Raises ConfigError with all problems."""
    experiment = read_yaml(str(path))
    problems = [f"{key}: unknown key" for key in experiment.keys() - KEYS]
    problems += [f"{key} is missing" for key in sorted(NEEDED - experiment.keys())]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    arms = read_arms(experiment)
    for arm in arms:
        found = validate(arm.settings)[1] + check_recipe(arm.data)
        if arm.weights_of and arm.weights_of not in {other.label for other in arms if not other.weights_of}:
            found.append(f"weights_of: {arm.weights_of!r} is not an arm that learns weights")
        problems += [f"{path}, {arm.label}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)
    return experiment, arms


# ----------------------------------------------------------------------------------------------------------------------
# Running


def prepare(arm: Arm, seed: int, source: Path | None, root: Path, x_init: Path | None = None) -> Path:
    """The run's folder, with its settings in train.yaml. The data are written if they do not exist yet.

    x_init: folder of the run whose final weights this run uses.
    """
    data = make(arm.data, seed, source, root / "data")
    train = "mixed/train_mixed.json" if arm.settings.get("weights") == "sample" else "train_*.json"
    settings = arm.settings | {"seed": seed, "train_data": [str(data / train)]}
    settings |= {f"{part}_data": [str(data / f"{part}.json")] for part in ("val", "test")}
    if x_init:
        settings |= {"method": "fixed", "x_init": str(x_init / "run")}
    text = yaml.safe_dump(settings, sort_keys=True)
    folder = root / "runs" / f"{arm.label}-{seed}-{checksum(text)}".replace(" ", "-").replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    return folder


def checksum(text: str) -> str:
    from process import sha256

    return sha256(text.encode())[:8]


def finished(folder: Path) -> bool:
    return (folder / "made.json").exists()


def run(folder: Path, commit: str) -> int:
    """Make one run, in its own process; return the exit code of train_bilevel.py. made.json is written last."""
    with (folder / "screen.txt").open("a") as screen:
        os.dup2(screen.fileno(), 1)
        os.dup2(screen.fileno(), 2)
    import train_bilevel

    begun = time.process_time()
    out = folder / "run"
    whole = (out / "weights.csv").exists()
    try:
        code = 0 if whole else train_bilevel.main(["--config", str(folder / "train.yaml"), "--output_dir", str(out)])
    except Exception:  # the other runs continue; the table reports the crash
        traceback.print_exc()
        code = CRASHED
    if code in ENDS:
        made = {"status": ENDS[code], "commit": commit, "machine": machine()}
        (folder / "made.json").write_text(json.dumps(made | {"cpu_seconds": round(time.process_time() - begun, 1)}))
    return code


def machine() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{cpu}, {torch.get_num_threads()} thread, torch {torch.__version__}"


def commit() -> str:
    """The commit, with "-dirty" if code, settings or data have changed since; "unknown" outside a clone."""
    places = ["train_bilevel.py", "bilevel", "configs", "data_alpaca_0.5", "example/experiments"]
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not name:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *places]).returncode
    return f"{name}-dirty" if changed else name


def run_all(folders: list[Path], jobs: int) -> None:
    """Make the unfinished runs, `jobs` at a time, each in a process forked from one that has imported torch."""
    wanted = [folder for folder in folders if not finished(folder)]
    if folders:
        print(f"{len(folders)} runs, {len(folders) - len(wanted)} of them already finished", flush=True)
    if not wanted:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on several threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    now = commit()
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        tasks = {pool.submit(run, folder, now): folder for folder in wanted}
        for i, task in enumerate(as_completed(tasks), 1):
            folder, code = tasks[task], task.result()
            end = ENDS.get(code, f"ended with {code}: see {folder / 'screen.txt'}")
            print(f"{i}/{len(wanted)} {folder.name}: {end}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments",
        nargs="+",
        type=Path,
        metavar="YAML",
        help="experiment files, such as those in configs/experiments/",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm [3]")
    parser.add_argument("--first_seed", type=int, default=0, help="seed of the first of them [0]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core [1]")
    parser.add_argument("--source", type=Path, help="Alpaca-format file, for experiments that need one from you")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs/experiments", help="folder for data and runs [%(default)s]"
    )
    parser.add_argument(
        "--results", type=Path, default=EXAMPLE, help="folder for results/ and RESULTS.md [%(default)s]"
    )
    parser.add_argument("--max_steps", type=int, help="limit of the steps, for a quick try; also give --results")
    args = parser.parse_args(argv)
    try:
        todo = [(path, *read_experiment(path)) for path in args.experiments]
        if args.max_steps and args.results == EXAMPLE:
            raise UserError(
                "--max_steps: short runs must not replace the published results; give another folder with --results"
            )
        if needing := [path.name for path, experiment, _ in todo if experiment.get("source") and not args.source]:
            raise UserError(f"{', '.join(needing)}: give the Alpaca-format training data with --source FILE")
        from experiment_results import write_results

        for path, experiment, arms in todo:
            if args.max_steps:
                arms = [arm._replace(settings=arm.settings | {"max_steps": args.max_steps}) for arm in arms]
            source = args.source if experiment.get("source") else None
            runs = [(arm, seed) for arm in arms for seed in range(args.first_seed, args.first_seed + args.seeds)]
            folders: dict[tuple[str, int], Path] = {}
            print(f"{path.stem}: ", end="")
            for of_others in (False, True):
                some = [(arm, seed) for arm, seed in runs if bool(arm.weights_of) == of_others]
                for arm, seed in some:
                    x_init = folders.get((arm.weights_of, seed))
                    folders[arm.label, seed] = prepare(arm, seed, source, args.out / path.stem, x_init)
                run_all([folders[arm.label, seed] for arm, seed in some], args.jobs)
            write_results(args.results, path, runs, [folders[arm.label, seed] for arm, seed in runs])
    except (UserError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
