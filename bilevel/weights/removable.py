"""What to do with learned weights: leave out what is shown to be worse, draw in proportion, or learn for longer."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

HARMFUL = 0.5  # a record is called harmful if it is so with a larger probability than this
LITTLE = 0.1  # weight of a record, whose mean is 1: a source of such records can be left out if it is worse


@dataclasses.dataclass(frozen=True)
class Advice:
    """What bilevel.export can do for these weights.

    leave out: what is shown to be worse. draw: `drawn` records in proportion to their weights, because what is worse
    keeps some. keep: all records, since nothing is to be left out. wait: nothing is shown, so that there is no reason
    to write anything.
    """

    kind: Literal["leave out", "draw", "keep", "wait"]
    drawn: int | None = None


def on_sources(verdicts: Sequence[str], record_weights: Sequence[float], sizes: Sequence[int]) -> Advice:
    """For sources with these verdicts (none if the weights were given), weights of a record, and numbers of records."""
    if not verdicts:
        return Advice("keep")
    if any(map(can_go, verdicts, record_weights)):
        return Advice("leave out")
    if "worse" in verdicts:
        return Advice("draw", _effective_number(record_weights, sizes))
    return Advice("keep" if "better" in verdicts else "wait")


def on_records(harmful: int | None, differ: bool) -> Advice:
    """For single records, of which so many are called harmful (None: that is not known), and whose weights differ."""
    if harmful is None:
        return Advice("leave out" if differ else "keep")
    return Advice("leave out" if harmful else "wait")


def can_go(verdict: str, record_weight: float) -> bool:
    """Whether a source with this verdict, and this weight of a record, is left out of the cleaned data."""
    return verdict == "worse" and record_weight <= LITTLE


def _effective_number(record_weights: Sequence[float], sizes: Sequence[int]) -> int:
    """The number of records of equal weight that are worth as much as these, (sum c)^2 / sum c^2."""
    sums = [sum(n * c**power for n, c in zip(sizes, record_weights, strict=True)) for power in (1, 2)]
    return round(sums[0] ** 2 / sums[1])
