"""The runs of a comparison: their folders and command lines, which are to come, and making them."""

import gc
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bilevel.files import whole_file
from bilevel.monitor.words import duration
from bilevel.run.finished import read_data, read_table
from bilevel.settings.command_line import load_settings, read_yaml
from bilevel.settings.fields import Settings

if TYPE_CHECKING:  # imported in the functions that use it, so that --help and mistakes are answered at once
    import pandas as pd

KEPT = "f2sa_kept"  # the weights of the same seed's f2sa, used like the scores of a baseline
COPIES = {"f2sa_w": "w", "f2sa_u": "u"}  # a copy of one run that learns weights, without a training run after it


class Row(NamedTuple):
    """One method with one seed: a scoring run that ends in weights, and a training run that uses them.

    For a method of COPIES both are the same run.
    """

    out: Path
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / f"{self.method}-seed{self.seed}"

    @property
    def scorer(self) -> str:
        return "f2sa" if self.method == KEPT or self.one_run else self.method

    @property
    def one_run(self) -> bool:
        return self.method in COPIES

    @property
    def scoring(self) -> Path:
        return self.training if self.one_run else self._replace(method=self.scorer).folder / "scoring"

    @property
    def training(self) -> Path:
        return self.folder / "training"

    @property
    def weights(self) -> Path:
        """The constant weights of the training run (its x_init)."""
        return self.folder / "weights.csv" if self.method == KEPT else self.scoring

    def command_lines(self, shared: list[str], scoring_steps: int | None) -> tuple[list[str], list[str]]:
        """The command lines of the scoring run and the training run."""
        ours = ["--seed", str(self.seed), "--output_dir"]
        blind = ["--test_data", "[]", "--val_in_training", "false", "--save_model", "none"]
        shorter = ["--max_steps", str(scoring_steps)] if scoring_steps else []
        scoring = ["--method", self.scorer, "--x_init", "uniform", *blind, *shorter, *ours, str(self.scoring)]
        if self.one_run:
            finding = ["--method", "f2sa", "--x_init", "uniform", "--val_in_training", "false"]
            both = [*shared, *finding, "--save_model", COPIES[self.method], *ours, str(self.training)]
            return both, both
        training = ["--method", "fixed", "--x_init", str(self.weights), "--save_model", "w", *ours, str(self.training)]
        return [*shared, *scoring], [*shared, *training]


class Runs:
    """Counts the runs that are not finished yet; `begin` says which one is on and about how long the rest will take."""

    def __init__(self, rows: list[Row]):
        folders = [folder for row in rows for folder in (row.scoring, row.training)]
        self.folders = list(dict.fromkeys(folder for folder in folders if not is_finished(folder)))
        self.began, self.before = time.perf_counter(), 0

    def begin(self, folder: Path, words: str) -> None:
        number, total = self.folders.index(folder) + 1, len(self.folders)
        elapsed = time.perf_counter() - self.began
        left = f" (about {duration(elapsed / self.before * (total - self.before))} left)" if self.before else ""
        print(f"\n--- run {number} of {total}: {words}{left} ---", flush=True)
        self.before += 1


def run_both(row: Row, runs: Runs, scoring: list[str], training: list[str]) -> int:
    """Make the runs that are not finished. Returns the exit code of a run that was stopped, or 0."""
    if not is_finished(row.scoring):
        does = f"training, and keeping {COPIES[row.method]}" if row.one_run else "finding the weights"
        runs.begin(row.scoring, f"{row.scorer}, seed {row.seed}, {does}")
        if code := run(scoring):
            return code
    if row.method == KEPT:
        keep_best(row.scoring, row.weights, load_settings(training)[0])
    if is_finished(row.training):
        return 0
    runs.begin(row.training, f"{row.method}, seed {row.seed}, training on the weights")
    return run(training)


def is_finished(folder: Path) -> bool:
    """Whether the run in the folder has written its results."""
    return (folder / "weights.csv").exists()


def run(line: list[str]) -> int:
    """Train with these settings and return the exit code. The commands that would come after it are not printed."""
    import train_bilevel
    from bilevel.run.ending import AFTERWARDS

    afterwards = logging.getLogger(AFTERWARDS)
    afterwards.disabled = True
    try:
        return train_bilevel.main(line)
    finally:
        afterwards.disabled = False
        gc.collect()  # the objects of a run form reference cycles


def keep_best(scoring: Path, file: Path, settings: Settings) -> None:
    """Write weights.csv in which the best fraction `keep` of the records have equal weights and the others 0."""
    import torch

    from bilevel.baselines.scores import kept

    table = weights_table(scoring)
    table["weight"] = kept(torch.tensor(table["weight"]), settings.keep, settings.seed).double()
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as new:
        table.to_csv(new, index=False)


def weights_table(run: Path, file: Path | None = None) -> "pd.DataFrame":
    """The weights.csv of a run, or another file of weights of the same records."""
    per_sample = read_yaml(str(run / "config.yaml"))["weights"] == "sample"
    return read_table(file or run / "weights.csv", per_sample, read_data(run).train)
