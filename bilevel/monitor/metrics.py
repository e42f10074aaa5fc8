"""Metrics of a run: metrics.csv and timing.csv always, wandb on request; the one list of metric names.

Every column of metrics.csv depends on the computation alone. Measurements of time and memory are in timing.csv.
"""

import csv
import io
import itertools
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from bilevel.files import move, open_regular, whole_file
from bilevel.monitor.tracker import NoTracker, WandbTracker
from bilevel.weights.fixed import FixedSampleWeights
from bilevel.weights.statistics import QUANTILES

log = logging.getLogger("bilevel")

# Name -> meaning. Losses are cross-entropies in nats. The columns up to grad_norm_u describe the step's batch, before
# the step.
METRICS = {
    "step": "model steps done",
    "epoch": "passes over the training samples",
    "loss_w": "mean training loss of w over the batch's samples, each a mean over its supervised tokens",
    "loss_u": "the same for u; like all columns about u, validation and x, only in runs that learn weights",
    "gap": "loss_w - loss_u; the gap of a single sample says whether it helps (below 0: validation wants it learned)",
    "gap_signal": "estimated correlation of the batch's gaps with unrounded ones; bf16 runs, at steps 16, 32, 64, ...",
    "computed": "share of the drawn training samples whose loss was computed; runs with sampling=weighted",
    "val_loss_w": "mean validation loss of w over the batch's samples",
    "val_loss_u": "the same for u, which ascends it; runs with order=2",
    "grad_norm_w": "norm of the gradient of w, before clipping",
    "grad_norm_u": "norm of the gradient of u, before clipping",
    "lr_y": "learning rate of w and u at this step",
    "lr_x": "learning rate of x at this step (x itself moves every `upper_every` steps); empty with x_optimizer=auto",
    "alpha": "penalty at this step; runs with alpha_start",
    "weight/<source>": "share of the source: p_s, or the sum of its samples' weights c_i over N; the shares sum to 1",
    "difference/<source>": "mean gap of the source minus that of the others since the start, in standard deviations of "
    "single gaps; above 0 it is worse; like the next two, in runs that learn weights per source",
    "interval/<source>": "half the width of the difference's 95 % interval, which holds at all steps at once",
    "evidence/<source>": "natural logarithm of the e-value against `no difference`, 0 or more, with the sign of the "
    "difference; beyond 3.0 (e-value 20) the source is called worse or better",
    "loss/<source>": "mean training loss of w over the batch's samples of the source; empty if there are none",
    "gap/<source>": "the same of the gap",
    "tokens/<source>": "tokens of the batch's samples of the source, prompts included, padding aside",
    "test_loss_w": "held-out loss of w, the mean over all supervised tokens of the test data",
    "test_loss_u": "the same for u",
    "weight_q/<q>": "quantile of the weights c_i of all records (mean 1); per-sample runs",
    "harmful": "records called harmful; 0 until harmful ones are shown to exist; per-sample runs that learn",
    "harmful_z": "evidence that there are harmful records; beyond 3.7 they are shown",
    "roc_auc": "area under the ROC curve of 1 - weight against is_noisy, if the data say which records are corrupted",
    "threshold": "weight below which a record is called noisy, from two-means on the weights alone",
    "precision": "share of the records called noisy that are noisy",
    "recall": "share of the noisy records that are called noisy",
}


EVIDENCE = ["difference/<source>", "interval/<source>", "evidence/<source>"]
PER_SOURCE = {"weight/<source>", *EVIDENCE, "loss/<source>", "gap/<source>", "tokens/<source>"}


class Columns:
    """The columns of a run's metrics.csv, known before it starts."""

    def __init__(
        self,
        sources: list[str],
        per_sample: bool,
        tested: bool,
        noise_known: bool,
        bf16: bool,
        weighted: bool = False,
        central: bool = False,
        learned: bool = True,
        copies: tuple[str, ...] = ("u", "w"),
        growing: bool = False,
    ):
        absent = [] if learned else ["val_loss_w", "lr_x"]
        absent += [] if learned and not per_sample else EVIDENCE
        absent += [] if learned and per_sample else ["harmful", "harmful_z"]
        absent += [] if "u" in copies else ["loss_u", "gap", "gap/<source>", "grad_norm_u", "test_loss_u"]
        absent += [] if copies else ["loss_w", "loss/<source>", "tokens/<source>", "grad_norm_w", "lr_y", "test_loss_w"]
        absent += [] if tested else ["test_loss_w", "test_loss_u"]
        absent += [] if noise_known else ["roc_auc", "threshold", "precision", "recall"]
        absent += [] if bf16 else ["gap_signal"]
        absent += [] if weighted else ["computed"]
        absent += [] if growing else ["alpha"]
        absent += [] if central else ["val_loss_u"]
        self.names: list[str] = []
        for name in METRICS:
            if name in absent:
                continue
            if name in PER_SOURCE:
                self.names += [name.replace("<source>", source) for source in sources]
            elif name == "weight_q/<q>":
                self.names += [f"weight_q/{q}" for q in QUANTILES] if per_sample else []
            else:
                self.names.append(name)


class MetricsLog:
    """Writes rows to metrics.csv and timing.csv in a run's folder, if there is one, and to a tracker."""

    def __init__(self, folder: Path | None, columns: Columns, tracker: WandbTracker | NoTracker, steps_done: int = 0):
        self.tracker, self.started = tracker, time.perf_counter()
        self.files: list[_CsvFile] = []
        if folder:
            timing = ["step", "seconds", "seconds_per_step", "tokens_per_second", "memory_mib", "gflop"]
            self.files = [
                _CsvFile(folder / "metrics.csv", columns.names, steps_done),
                _CsvFile(folder / "timing.csv", timing, steps_done),
            ]
            self.started -= self.files[1].seconds
        self.last = self.mark = time.perf_counter()
        self.tokens = self.steps = 0
        self.stepping = 0.0

    def count(self, tokens: int) -> None:
        """Call after each step with the tokens that its passes have read."""
        now = time.perf_counter()
        self.tokens, self.steps, self.stepping = self.tokens + tokens, self.steps + 1, self.stepping + now - self.mark
        self.mark = now

    def write(self, row: dict[str, Any], weights: FixedSampleWeights | None = None, operations: float = 0.0) -> None:
        """Write one row.

        weights: given at evaluations of per-sample runs, so that the tracker shows their histogram. operations:
        floating-point operations of all passes so far, without evaluations; NaN (unknown) leaves the column empty.
        """
        now = time.perf_counter()
        timing = {
            "step": row["step"],
            "seconds": round(now - self.started, 3),
            "tokens_per_second": round(self.tokens / (now - self.last)),
            "memory_mib": peak_memory() >> 20,
        }
        if self.steps:  # without the evaluation that may have come before this row
            timing["seconds_per_step"] = round(self.stepping / self.steps, 4)
        if not math.isnan(operations):
            timing["gflop"] = round(operations / 1e9, 3)
        self.tokens, self.steps, self.stepping, self.last = 0, 0, 0.0, now
        for file, values in zip(self.files, (row, timing), strict=False):
            file.write(values)
        self.mark = time.perf_counter()
        self.tracker.log(row | {f"timing/{key}": value for key, value in timing.items() if key != "step"}, weights)

    def flush(self) -> None:
        """Write the rows that wait for a disk that was full."""
        for file in self.files:
            file.flush()

    def close(self) -> None:
        self.flush()
        self.tracker.close()


class _CsvFile:
    """A CSV file with a header, written a row at a time; reading a float gives the same float.

    An existing file keeps its rows of steps below steps_done and loses the others, because the run repeats them. One
    that an older version began may lack columns; they stay empty in its rows. Rows that a full disk does not take are
    kept and written with the next row.
    """

    def __init__(self, path: Path, columns: list[str], steps_done: int):
        self.columns = columns
        rows = self._before(path, steps_done) if steps_done and path.exists() else []
        self.seconds = float(rows[-1].get("seconds") or 0) if rows else 0.0  # of the starts before, in timing.csv
        content = self._lines([dict(zip(columns, columns, strict=True)), *rows])
        with whole_file(path) as new:
            new.write_bytes(content)
        self.path, self.size, self.waiting, self.failing = path, len(content), b"", False

    def _before(self, path: Path, steps_done: int) -> list[dict[str, Any]]:
        """The rows of steps below steps_done. A file that is not as it was written is kept under another name."""
        try:
            with io.TextIOWrapper(open_regular(path), newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                names = reader.fieldnames or []
                if "step" not in names or names != [name for name in self.columns if name in names]:
                    raise ValueError("it has other columns")
                rows = list(reader)
                whole = [row["step"].isdigit() and None not in row and None not in row.values() for row in rows]
                if not all(whole[:-1]):  # a killed run may have written only a part of the last row
                    raise ValueError(f"row {whole.index(False) + 1} is none")
            return [row for row, good in zip(rows, whole, strict=True) if good and int(row["step"]) < steps_done]
        except (ValueError, csv.Error) as error:
            names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            move(path, aside)
            log.warning(
                f"{path} is not as the run has written it ({error}), as when a spreadsheet has saved it: it is now "
                f"{aside.name}, and {path.name} begins anew, after step {steps_done - 1}"
            )
            return []

    def write(self, row: dict[str, Any]) -> None:
        self.waiting += self._lines([row])
        self.flush()

    def flush(self) -> None:
        """Write the rows that could not be written before."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(self.size)  # overwrite half a row that did not fit
                while self.waiting:
                    written = file.write(self.waiting)
                    self.size, self.waiting = self.size + written, self.waiting[written:]
            self.failing = False
        except OSError as error:
            if not self.failing:
                log.warning(
                    f"{self.path} CANNOT BE WRITTEN: {error}. The run goes on; it keeps the rows and tries again"
                )
            self.failing = True

    def _lines(self, rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        return text.getvalue().encode()


def peak_memory() -> int:
    """Peak memory of this process in bytes: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
