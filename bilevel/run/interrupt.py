"""SIGTERM and SIGINT: noted when they come, obeyed at the end of the step by all processes together."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import torch

from bilevel.processes import World

GRACE = 2.0  # seconds: a scheduler signals all processes of a job, and its launcher passes on what it gets


class Interrupted(Exception):
    """A signal wants the run to end."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


class Interrupt:
    """Inside, the first signal is held, and with it those that come within GRACE, which ask for the same.

    A later one ends the process at once with 128 and its number.
    """

    def __init__(self, world: World, clock: Callable[[], float] = time.monotonic):
        self.world, self.clock, self.signal = world, clock, 0

    def __enter__(self) -> "Interrupt":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted on all processes after a signal to any; all call it at the same places."""
        if number := self.agreed():
            raise Interrupted(number)

    def agreed(self) -> int:
        """The signal that has reached any process, the same on all; 0 without one."""
        if self.world.size == 1:
            return self.signal
        seen = torch.zeros(self.world.size, dtype=torch.int64)
        seen[self.world.rank] = self.signal
        return int(self.world.sum(seen).max())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.since, self.signal = self.clock(), number  # in this order: the next may come between
        elif self.clock() - self.since > GRACE:
            os._exit(128 + number)
