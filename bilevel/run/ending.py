"""The end of a run: first its state is saved, then its results are written, then the report on them.

weights.csv is written when all other results are there, and says that the run is finished; the lock goes last. Whatever
ends the run before, a signal or a full disk, the same command writes what is missing.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from bilevel.errors import UserError
from bilevel.run import lock, results
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.interrupt import Interrupt
from bilevel.run.messages import what_next
from bilevel.run.state import Row, Run
from bilevel.settings.fields import Settings
from bilevel.weights import csv_file

log = logging.getLogger("bilevel")


def keep_state(run: Run, checkpoints: Checkpoints) -> bool:
    """Save the state that the run is in, unless its checkpoint is there; whether it is saved.

    A baseline has a state once its scores are known.
    """
    checkpoints.finish()
    if not run.copies and run.scores is None:
        return False
    if checkpoints.step != run.step:
        checkpoints.begin(run.step, run.state_dict())
    return checkpoints.finish()


Report = Callable[[Path], object]  # writes the page of a finished run's folder


def write_results(run: Run, row: Row, checkpoints: Checkpoints, interrupt: Interrupt, report: Report) -> int:
    """Write what a finished run leaves, and its closing words; the exit code. Raises Interrupted between two files.

    row: the last of metrics.csv.
    """
    s, folder = run.settings, run.settings.run_folder

    def save_model() -> None:
        if s.save_model in run.copies:
            run.copies[s.save_model].save(folder / "model", run.tokenizer)

    def save_weights() -> None:
        interrupt.check()  # from here on it takes no more than seconds
        if run.world.main:
            results.draw_weights(folder, run.weights, run.train)
            csv_file.write_weights(folder / "weights.csv", run.weights, run.train, run.scores)

    for write in (save_model, save_weights):
        if problem := _problem(run, write):
            log.error(f"the results cannot be written: {problem}. Make room; {what_next(s, checkpoints.last)}")
            return 1
    if s.save_every == 0 or not run.copies:  # checkpoints were not asked for; this one was for the results
        checkpoints.discard(run.step)
    if run.world.main:
        _close(run, row, report)
    return 0


def _problem(run: Run, write: Callable[[], None]) -> str | None:
    """Write something; why that failed on any process, the same on all, or None."""
    problem = None
    try:
        write()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    return next((found for found in run.world.gather(problem) if found), None)


def _close(run: Run, row: Row, report: Report) -> None:
    """The report, the closing words, and the lock away: what comes when all results are there."""
    folder = run.settings.run_folder
    report(folder)
    log.info(results.summary(folder, run.weights, run.train, row))
    (folder / lock.NAME).unlink()


def is_written(settings: Settings) -> bool:
    """Whether the run in the folder has all its results, and at most its report is missing."""
    return (settings.run_folder / "weights.csv").is_file()


def complete(settings: Settings, report: Report) -> int:
    """What a run that was ended in its last moments has left to do, without loading anything. Raises UserError."""
    folder = settings.run_folder
    if os.environ.get("RANK", "0") == "0":
        held = lock.hold(folder)
        if held is None:
            raise UserError(lock.at_work(folder) or f"a process is still at work in {folder}: start again")
        with held:
            report(folder)
            (folder / lock.NAME).unlink()
        print(f"the run in {folder} was finished but for its report, which has been written now")
    return 0
