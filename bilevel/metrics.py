"""What a run writes down: metrics.csv and timing.csv always, wandb when asked; the one list of metric names.

Every column of metrics.csv is a function of the computation alone; what the clock and the machine say is in timing.csv.
"""

import csv
import netrc
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

# Name -> what it is. Losses are cross-entropies in nats; the first group is of the step's batch, before the step.
METRICS = {
    "step": "model steps done",
    "epoch": "passes over the training samples",
    "loss_w": "mean training loss of w over the batch's samples, each a mean over its supervised tokens",
    "loss_u": "the same of u",
    "gap": "loss_w - loss_u; per sample it says whether a sample helps (below 0: validation wants it learned)",
    "gap_signal": "estimated correlation of the batch's gaps with unrounded ones; bf16 runs at steps 16, 32, 64, ...",
    "val_loss_w": "mean validation loss of w over the batch's samples",
    "grad_norm_w": "norm of w's gradient, before clipping",
    "grad_norm_u": "norm of u's gradient, before clipping",
    "lr_y": "step size of w and u",
    "lr_x": "step size x has or would have at this step",
    "weight/<source>": "share of the source: p_s, or the sum of its samples' weights c_i over N; sums to 1",
    "test_loss_w": "held-out loss of w per supervised token, all tokens alike",
    "test_loss_u": "the same of u",
    "weight_q/<q>": "quantile of the weights c_i of all records (mean 1); per-sample runs",
    "roc_auc": "area under the ROC of 1 - weight against is_noisy, where corrupted records are known",
    "threshold": "weight below which a record is called noisy: two-means on the weights alone",
    "precision": "share of the records called noisy that are",
    "recall": "share of the noisy records called so",
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Columns:
    """The columns of this run's metrics.csv, known before it starts."""

    def __init__(self, sources: list[str], per_sample: bool, tested: bool, noise_known: bool, bf16: bool):
        absent = [] if tested else ["test_loss_w", "test_loss_u"]
        absent += [] if noise_known else ["roc_auc", "threshold", "precision", "recall"]
        absent += [] if bf16 else ["gap_signal"]
        self.names: list[str] = []
        for name in METRICS:
            if name == "weight/<source>":
                self.names += [f"weight/{source}" for source in sources]
            elif name == "weight_q/<q>":
                self.names += [f"weight_q/{q}" for q in QUANTILES] if per_sample else []
            elif name not in absent:
                self.names.append(name)


class MetricsLog:
    """Rows of metrics.csv and timing.csv in a run's folder, mirrored to a tracker; without a folder, of nothing."""

    def __init__(self, folder: Path | None, columns: Columns, tracker: "WandbTracker | NoTracker", steps_done: int = 0):
        self.tracker, self.started = tracker, time.perf_counter()
        timing = ["step", "seconds", "tokens_per_second", "memory_mib"]
        self.metrics = _CsvFile(folder, "metrics.csv", columns.names, steps_done)
        self.timing = _CsvFile(folder, "timing.csv", timing, steps_done)
        self.tokens, self.last = 0, self.started

    def count(self, tokens: int) -> None:
        """Note the tokens that a step's passes have read."""
        self.tokens += tokens

    def write(self, row: dict[str, Any], weights: torch.Tensor | None = None) -> None:
        """One row; weights (N,), given at evaluations of per-sample runs, make a histogram in the tracker."""
        now = time.perf_counter()
        timing = {
            "step": row["step"],
            "seconds": round(now - self.started, 3),
            "tokens_per_second": round(self.tokens / (now - self.last)),
            "memory_mib": _peak_memory() >> 20,
        }
        self.tokens, self.last = 0, now
        self.metrics.write(row)
        self.timing.write(timing)
        self.tracker.log(row | {f"timing/{key}": value for key, value in timing.items() if key != "step"}, weights)

    def close(self) -> None:
        self.metrics.close()
        self.timing.close()
        self.tracker.close()


class NoTracker:
    """Takes metrics and does nothing with them."""

    notice = None

    def log(self, row: dict[str, Any], weights: torch.Tensor | None) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """Metrics to wandb: to the account when logged in, else to a folder that can be sent later. Never asks."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]):
        import wandb

        self.wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_logged_in() else "offline")
        (folder / "wandb").mkdir(exist_ok=True)
        known = folder / "wandb" / "run_id"  # a resumed run is the same run there
        if not known.exists():
            known.write_text(wandb.util.generate_id(), encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bilevel-reweighting"),
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            name=name,
            dir=str(folder),
            config=config,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
        )
        sync = f"wandb: offline (not logged in); to send the run later: wandb sync {Path(self.run.dir).parent}"
        self.notice = sync if self.run.offline else f"wandb: {self.run.url}"

    def log(self, row: dict[str, Any], weights: torch.Tensor | None) -> None:
        row = {key: value for key, value in row.items() if key != "step"} | {"step": row["step"]}
        if weights is not None:
            row["weights"] = self.wandb.Histogram(weights.numpy())
        self.run.log(row, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def wandb_logged_in() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _CsvFile:
    """A CSV with a header, a row at a time; floats are written so that reading gives the same float.

    A file that is there keeps its rows of steps below steps_done, and loses the others, which the run makes again.
    """

    def __init__(self, folder: Path | None, name: str, columns: list[str], steps_done: int):
        path = folder / name if folder else Path(os.devnull)
        rows = []
        if steps_done and folder and path.exists():
            with path.open(newline="", encoding="utf-8") as before:
                whole = (row for row in csv.DictReader(before) if row["step"].isdigit() and None not in row.values())
                rows = [row for row in whole if int(row["step"]) < steps_done]
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def write(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _peak_memory() -> int:
    """Peak bytes of this process: of the GPU when there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
