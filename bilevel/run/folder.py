"""Open a run's folder: lock it and write the files that a run begins with."""

import dataclasses
import logging
from typing import TYPE_CHECKING

from bilevel.data.overlap import find_overlaps, write_overlaps
from bilevel.errors import ConfigError, UserError
from bilevel.files import whole_file
from bilevel.monitor.metrics import Columns, MetricsLog
from bilevel.monitor.tracker import NoTracker, WandbTracker, wandb_disabled
from bilevel.run.commands import again
from bilevel.run.finished import write_data
from bilevel.run.lock import at_work, hold
from bilevel.run.machine import commit, write_machine
from bilevel.run.messages import open_log
from bilevel.run.preflight import folder_taken
from bilevel.settings.written import dump

if TYPE_CHECKING:
    from bilevel.run.checkpoint import Checkpoints
    from bilevel.run.state import Run

log = logging.getLogger("bilevel")


def open_folder(run: "Run", checkpoints: "Checkpoints") -> MetricsLog:
    """Lock the run's folder, write its first files, open run.log, and return the metrics log.

    Raises UserError, on all processes, if another process has the folder or it cannot be written.
    """
    folder, problem, metrics = run.settings.run_folder, None, None
    try:
        if run.world.main:
            _take(run, checkpoints)
        open_log(run)
        if run.world.main:
            checkpoints.set_aside(run.step)
        metrics = open_metrics(run)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{folder} cannot be written: {error}; make room there, or give another output_dir"
    if found := [problem for problem in run.world.gather(problem) if problem]:
        raise UserError(found[0])
    if unseen := [rank for rank, seen in enumerate(run.world.gather(folder.is_dir())) if not seen]:
        log.warning(
            f"NO CHECKPOINTS: processes {unseen} do not see {folder}, where each has to write its share. Give an "
            "output_dir that all machines see, or this run cannot be resumed"
        )
    return metrics


def _take(run: "Run", checkpoints: "Checkpoints") -> None:
    """Lock the folder and write the files that a run begins with. Raises UserError before it writes anything.

    It checks the folder again, because another run may have begun there, and even ended, while this one was loading.
    """
    folder = run.settings.run_folder
    if problems := folder_taken(run.settings):
        raise ConfigError(problems)
    if checkpoints.all() != checkpoints.seen:
        raise UserError(f"another process has been at work in {folder} since this one began: start it again")
    folder.mkdir(parents=True, exist_ok=True)
    run.lock = hold(folder)
    if run.lock is None:
        raise UserError(at_work(folder) or f"a process is still at work in {folder}: wait for it, and start again")
    with whole_file(folder / "config.yaml") as file:
        file.write_text(dump(run.settings), encoding="utf-8")
    write_machine(folder, run.world.size)
    write_data(folder, run.train, run.val, run.test)
    parts = {"train": run.train, "val": run.val, "test": run.test}
    files = {name: part.files for name, part in parts.items() if part is not None}
    write_overlaps(folder, find_overlaps(files))


def open_metrics(run: "Run") -> MetricsLog:
    """metrics.csv, timing.csv and the tracker of a run."""
    s, learned = run.settings, run.settings.learned
    columns = Columns(
        run.train.sources,
        run.per_sample,
        tested=run.test is not None,
        noise_known=run.train.is_noisy is not None,
        bf16="u" in run.copies and run.copies["u"].bf16,
        weighted=learned and s.sampling == "weighted",
        central="u" in run.copies and s.order == 2,
        growing=learned and s.alpha_start is not None,
        learned=learned,
        copies=s.copies,
    )
    metrics = MetricsLog(s.run_folder if run.world.main else None, columns, NoTracker(), run.step)
    if not run.world.main:
        return metrics
    off = wandb_disabled() if s.tracker == "wandb" else "tracker=none" if s.track_report else ""
    if off:
        unsent = "; track_report has no effect" if s.track_report else ""
        log.info(f"wandb is off: {off}{unsent}")
    elif s.tracker == "wandb":  # last: if the files cannot be written, there is no run
        folder = s.run_folder
        command = again(s, folder, folder.with_name(f"{folder.name}_again"))
        config = dataclasses.asdict(s) | {"commit": commit(), "the same again": command}
        metrics.tracker = WandbTracker(folder, folder.name, config)
    return metrics
