#!/usr/bin/env python
"""Run an experiment: every arm with every seed, its table, its figure and its section of RESULTS.md.

    python example/experiments/experiment.py configs/experiments/d_needle.yaml
    python example/experiments/experiment.py configs/experiments/*.yaml --seeds 3 --jobs 2
    python example/experiments/experiment.py configs/experiments/a_real.yaml --source alpaca_data.json

An experiment is a YAML file: `settings` over configs/small.yaml and a `data` recipe (experiment_data.py), then `arms`,
each with what it changes in either; an arm's `grid` makes one arm of every combination of values, and `weights_of`
trains it on the weights that another arm's run with the same seed ends with (method: fixed). A run is one arm with one
seed, which draws its data as well as its batches, in a folder of its own named by all that enters it: a finished
run is never made again, one that a signal ended goes on from its checkpoint, and a changed arm is another run.
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
# What every run has: no weights of the model, no tracker, test losses at the start and at the end alone, checkpoints
# only when a signal ends it, as runs are short and two copies of a pretrained model with their moments take gigabytes.
FIXED = {"save_model": "none", "tracker": "none", "eval_every": 10**6, "save_every": 0}
PRELOAD = [
    "train_bilevel",
    "bilevel.run.state",
    "bilevel.model.copies",
    "bilevel.data.samples",
    "bilevel.run.results",
    "bilevel.monitor.metrics",
]
PRELOAD += ["bilevel.evaluate.command", "bilevel.run.messages", "matplotlib.figure"]


CRASHED = 70
ENDS = {0: "done", 1: "stopped", CRASHED: "crashed"}  # by exit code; all of them are results


class Arm(NamedTuple):
    """One way to run; the name is that in the YAML, values are what its grid chose."""

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, Any]
    weights_of: str | None = None

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.values.items())])


# ----------------------------------------------------------------------------------------------------------------------
# reading an experiment


def merged(base: dict, change: dict) -> dict:
    """base with change over it, mapping by mapping; a value null takes its key away."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return {key: value for key, value in result.items() if value is not None}


def read_arms(experiment: dict) -> list[Arm]:
    """The arms with all settings and recipes resolved. A key of a grid is a setting or a dotted place in the recipe."""
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
    """The YAML and its arms. Raises ConfigError with everything that is wrong with it."""
    experiment = read_yaml(str(path))
    problems = [f"{key}: no such key" for key in experiment.keys() - KEYS]
    problems += [f"{key} is missing" for key in sorted(NEEDED - experiment.keys())]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    arms = read_arms(experiment)
    for arm in arms:
        found = validate(arm.settings)[1] + check_recipe(arm.data)
        if arm.weights_of and arm.weights_of not in {other.label for other in arms if not other.weights_of}:
            found.append(f"weights_of: {arm.weights_of!r} is no arm that learns weights")
        problems += [f"{path}, {arm.label}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)
    return experiment, arms


# ----------------------------------------------------------------------------------------------------------------------
# running


def prepare(arm: Arm, seed: int, source: Path | None, root: Path, x_init: Path | None = None) -> Path:
    """The run's folder, with its settings in train.yaml; its data are made where they are not there yet.

    x_init: the folder of the run whose weights it trains on.
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
    """One run in a process of its own; the exit code of train_bilevel.py. made.json is written last."""
    with (folder / "screen.txt").open("a") as screen:
        os.dup2(screen.fileno(), 1)
        os.dup2(screen.fileno(), 2)
    import train_bilevel

    begun = time.process_time()
    out = folder / "run"
    whole = (out / "weights.csv").exists()
    try:
        code = 0 if whole else train_bilevel.main(["--config", str(folder / "train.yaml"), "--output_dir", str(out)])
    except Exception:  # the other runs go on; the table says that this one crashed
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
    """The commit, marked where code, settings or data have been changed since; "unknown" outside a clone."""
    places = ["train_bilevel.py", "bilevel", "configs", "data_alpaca_0.5", "example/experiments"]
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not name:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *places]).returncode
    return f"{name}-dirty" if changed else name


def run_all(folders: list[Path], jobs: int) -> None:
    """Make what is not finished, `jobs` runs at a time, each in a process forked from one that has imported torch."""
    wanted = [folder for folder in folders if not finished(folder)]
    if folders:
        print(f"{len(folders)} runs, {len(folders) - len(wanted)} of them finished", flush=True)
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
# main


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, metavar="YAML", help="files of configs/experiments/")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm [3]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core [1]")
    parser.add_argument("--source", type=Path, help="the records, where an experiment wants a file of yours")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/experiments", help="data and runs [%(default)s]")
    parser.add_argument("--results", type=Path, default=EXAMPLE, help="tables, figures and RESULTS.md [%(default)s]")
    parser.add_argument("--max_steps", type=int, help="shorter runs, to try things out; give --results as well")
    args = parser.parse_args(argv)
    try:
        todo = [(path, *read_experiment(path)) for path in args.experiments]
        if args.max_steps and args.results == EXAMPLE:
            raise UserError("--max_steps makes other runs than the published ones: give another folder with --results")
        if needing := [path.name for path, experiment, _ in todo if experiment.get("source") and not args.source]:
            raise UserError(f"{', '.join(needing)}: give the Alpaca-format file that it trains on with --source FILE")
        from experiment_results import write_results

        for path, experiment, arms in todo:
            if args.max_steps:
                arms = [arm._replace(settings=arm.settings | {"max_steps": args.max_steps}) for arm in arms]
            source = args.source if experiment.get("source") else None
            runs = [(arm, seed) for arm in arms for seed in range(args.seeds)]
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
