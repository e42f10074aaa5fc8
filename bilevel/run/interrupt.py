"""SIGTERM, SIGINT and SIGHUP (a lost ssh): all processes of a run end together, between two steps.

If the launcher of a process is gone, the process sends itself SIGTERM. A file `finish` in the run's folder, which a
user makes, also ends the run between two steps, but with its results.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch; mistakes should be answered before that
    from bilevel.processes import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 2.0  # seconds: a scheduler signals all processes of a job, and its launcher passes on what it gets
WATCH = 1.0  # seconds between two looks at the launcher
FINISH = "finish"  # the file's name


class Interrupted(Exception):
    """A signal wants the run to end."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


class Interrupt:
    """Handles the signals from the start of the program to its end.

    While the run is loading, before `hold`, the first signal ends the program with exit code 128 + its number. After
    `hold` the first signal is only noted; others within GRACE seconds are ignored, because they usually have the same
    cause; a later one ends the process at once with 128 + its number. If SIGHUP is ignored (nohup), it stays ignored.
    """

    def __init__(self, world: "World | None" = None, clock: Callable[[], float] = time.monotonic):
        self.world, self.clock, self.signal = world, clock, 0
        self.file: Path | None = None  # `finish` in the run's folder
        self.finishing = False  # whether it was there at the last check

    def begin(self) -> "Interrupt":
        """Handle signals from now on."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    __enter__ = begin

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hold(self, world: "World", folder: Path) -> None:
        """From now on a signal ends the run between two steps, when all processes know of it. folder: the run's."""
        self.world, self.file = world, folder / FINISH

    def check(self) -> None:
        """Raises Interrupted on all processes after a signal to any of them; all must call it at the same places."""
        if number := self.agreed():
            raise Interrupted(number)

    def agreed(self) -> int:
        """The signal that has reached any process, the same on all; 0 if there is none. Also looks for the file."""
        import torch

        finish = self.world.main and self.file is not None and self.file.exists()
        if self.world.size == 1:
            self.finishing = finish
            return self.signal
        seen = torch.zeros(self.world.size + 1, dtype=torch.int64)
        seen[self.world.rank], seen[-1] = self.signal, int(finish)
        *signals, finish = self.world.sum(seen).tolist()
        self.finishing = bool(finish)
        return max(signals)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.since, self.signal = self.clock(), number  # in this order: the next may come between
            if self.world is None:
                print(f"signal {number}: ended before the first step; the same command starts again", file=sys.stderr)
                raise SystemExit(128 + number)
            if self.world.main:
                with contextlib.suppress(OSError):  # the terminal may be what is lost
                    # Not by print, which may be at work already.
                    words = f"\nsignal {number}: the run ends and saves its state when this step is done\n"
                    os.write(2, words.encode())
        elif self.clock() - self.since > GRACE:
            os._exit(128 + number)


def watch_launcher() -> None:
    """Send this process SIGTERM when its launcher is gone, for example after kill -9.

    Otherwise the processes would go on, keep the run's folder locked and block a new start.
    """
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(WATCH)
    os.kill(os.getpid(), signal.SIGTERM)
