"""The end of a run: save its state, write its results, write the report.

weights.csv is the last result: a run with this file is finished. Then its checkpoints are removed, unless
keep_checkpoints says otherwise, and the lock at the very end. If a signal or a full disk ends the run earlier, the same
command does what is missing.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from bilevel.errors import UserError
from bilevel.monitor.words import memory
from bilevel.run import lock, picture
from bilevel.run.checkpoint import Checkpoints
from bilevel.run.checkpoint_file import clear
from bilevel.run.interrupt import Interrupt
from bilevel.run.messages import what_next
from bilevel.run.next_commands import next_commands
from bilevel.run.state import Row, Run
from bilevel.run.summary import summary
from bilevel.settings.fields import Settings
from bilevel.weights import csv_file

log = logging.getLogger("bilevel")
AFTERWARDS = "bilevel.afterwards"  # the logger of the commands that come next, which a program can turn off


def keep_state(run: Run, checkpoints: Checkpoints) -> bool:
    """Save the present state unless it has a checkpoint already; return whether it is saved.

    A baseline has a state to save once its scores are known.
    """
    checkpoints.finish()
    if not run.copies and run.scores is None:
        return False
    if checkpoints.step != run.step:
        checkpoints.begin(run.step, run.state_dict())
    return checkpoints.finish()


Report = Callable[[Path], object]  # writes the page of a finished run's folder


def write_results(run: Run, row: Row, checkpoints: Checkpoints, interrupt: Interrupt, report: Report) -> int:
    """Write the results of a finished run and its closing lines; return the exit code. Raises Interrupted.

    row: the last row of metrics.csv.
    """
    s, folder = run.settings, run.settings.run_folder
    log.info("writing the results")

    def save_model() -> None:
        if s.save_model in run.copies:
            run.copies[s.save_model].save(folder / "model", run.tokenizer)

    def save_weights() -> None:
        interrupt.check()  # the rest takes only seconds
        if run.world.main:
            picture.draw_weights(folder, run.weights, run.train)
            csv_file.write_weights(folder / "weights.csv", run.weights, run.train, run.scores)

    for write in (save_model, save_weights):
        if problem := _problem(run, write):
            log.error(f"the results cannot be written: {problem}. Make room; {what_next(s, checkpoints.last)}")
            return 1
    removed = 0
    if s.keep_checkpoints is None:
        removed = checkpoints.clear()
    elif s.save_every == 0 or not run.copies:  # no checkpoint was asked for; this one only protected the results
        checkpoints.discard(run.step)
    return _close(run, row, removed, report) if run.world.main else 0


def _problem(run: Run, write: Callable[[], None]) -> str | None:
    """Call `write`; return why it failed on any process (the same text on all processes), or None."""
    problem = None
    try:
        write()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    return next((found for found in run.world.gather(problem) if found), None)


def _close(run: Run, row: Row, removed: int, report: Report) -> int:
    """Write the report and the closing lines, and remove the lock, after all results are written; the exit code.

    removed: bytes of the checkpoints that were removed.
    """
    folder = run.settings.run_folder
    report(folder)
    log.info(summary(run, row))
    if removed:
        log.info(f"checkpoints removed, {memory(removed)}; with keep_checkpoints=2 the newest two stay")
    logging.getLogger(AFTERWARDS).info("\n".join(["", *next_commands(run)]))
    try:
        (folder / lock.NAME).unlink()
    except OSError as error:
        log.error(f"all results are written, but the lock cannot be removed: {error}; the same command removes it")
        return 1
    return 0


def is_written(settings: Settings) -> bool:
    """Whether the run in the folder has all its results; only its report may be missing."""
    return (settings.run_folder / "weights.csv").is_file()


def complete(settings: Settings, report: Report) -> int:
    """Finish a run that was ended after its results were written, without loading anything. Raises UserError."""
    folder = settings.run_folder
    if os.environ.get("RANK", "0") == "0":
        held = lock.hold(folder)
        if held is None:
            raise UserError(lock.at_work(folder) or f"a process is still at work in {folder}: start again")
        with held:
            if settings.keep_checkpoints is None:
                clear(folder / "checkpoints")
            report(folder)
            try:
                (folder / lock.NAME).unlink()
            except OSError as error:
                raise UserError(f"the lock cannot be removed: {error}; the same command removes it") from None
        print(f"the run in {folder} was finished but for its report, which has been written now")
        if settings.track_report:
            print("it has not been sent to wandb (track_report), because the run there has ended")
    return 0
