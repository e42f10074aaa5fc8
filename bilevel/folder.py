"""A run's folder: taken by one process, with the files that a run begins with."""

import logging
from typing import TYPE_CHECKING

from bilevel.check import AT_WORK, folder_taken, hold
from bilevel.config import ConfigError, UserError, dump
from bilevel.finished import write_data
from bilevel.metrics import MetricsLog, open_metrics
from bilevel.screen import open_log
from bilevel.whole_file import whole_file

if TYPE_CHECKING:
    from bilevel.checkpoint import Checkpoints
    from bilevel.run import Run

log = logging.getLogger("bilevel")


def open_folder(run: "Run", checkpoints: "Checkpoints") -> MetricsLog:
    """Take the run's folder and open what the run writes there: run.log, checkpoints, and the metrics returned.

    Raises UserError, on all processes, where another process has the folder or it cannot be written.
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
    """Lock the folder and write its resolved settings and what its data are; raises UserError before it is touched.

    While this run was loading, another may have begun there, and even ended.
    """
    folder = run.settings.run_folder
    if problems := folder_taken(run.settings):
        raise ConfigError(problems)
    if checkpoints.all() != checkpoints.seen:
        raise UserError(f"another process has been at work in {folder} since this one began: start it again")
    folder.mkdir(parents=True, exist_ok=True)
    run.lock = hold(folder)
    if run.lock is None:
        raise UserError(AT_WORK.format(folder))
    with whole_file(folder / "config.yaml") as file:
        file.write_text(dump(run.settings), encoding="utf-8")
    write_data(folder, run.train, run.val, run.test)
