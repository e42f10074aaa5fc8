"""What a run does before its first step: a line for each stage, with the time since the start."""

import contextlib
import os
import time

from bilevel.monitor.words import duration


class Stages:
    """Prints the lines, from the main process only, and keeps them until run.log is open and takes them."""

    def __init__(self):
        self.began, self.lines = time.perf_counter(), []

    def begin(self) -> None:
        """Count the time from now on."""
        self.__init__()

    def __call__(self, words: str) -> None:
        """Say what comes next, and how long all that came before it has taken."""
        if os.environ.get("RANK", "0") == "0":
            self.lines.append(f"{duration(time.perf_counter() - self.began):>6}  {words}")
            with contextlib.suppress(OSError):  # the log, once it is open, says that nobody reads it
                print(self.lines[-1], flush=True)


stage = Stages()
