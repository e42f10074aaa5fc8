"""How far reading and tokenising have come: a bar on a terminal, elsewhere a line a minute; none for small inputs."""

import os
import sys
import time
from pathlib import Path
from types import TracebackType

from bilevel.data.workers import beside_others
from bilevel.errors import plain

SOON = 1.0  # seconds before a bar appears
EVERY = 60.0  # seconds between two lines
_UNITS = {"bytes": ("B", 1024), "records": (" records", 1000)}


class Progress:
    """Counts bytes or records of a place, and shows on stderr how many are done.

    verb: reading or tokenising. total: None if it is not known.
    """

    def __init__(self, verb: str, place: str, total: int | None, unit: str):
        self.verb, self.place, self.total, self.unit, self.done = verb, place, total, unit, 0
        self.start = self.told = time.monotonic()
        self.silent = beside_others() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
        self.bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and not self.silent:
            from tqdm import tqdm

            unit, divisor = _UNITS[self.unit]
            shown = {"unit": unit, "unit_divisor": divisor, "unit_scale": True, "delay": SOON, "leave": False}
            self.bar = tqdm(desc=f"{self.verb} {plain(Path(self.place).name)}", total=self.total, **shown)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif not self.silent and (now := time.monotonic()) - self.told >= EVERY:
            self.told = now
            share = f"{self.done:,} {self.unit}" if self.total is None else f"{self.done / self.total:.0%}"
            words = f"{self.verb} {plain(self.place, 300)}: {share} after {(now - self.start) / 60:.0f} min"
            print(words, file=sys.stderr, flush=True)
