"""What to do with learned weights: leave out what is shown to be worse, draw in proportion, or learn for longer."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

HARMFUL = 0.5  # a record is called harmful if it is so with a larger probability than this
UNKNOWN = 0.1  # share of records that may not be compared, for those called harmful to be left out by any rule
LITTLE = 0.1  # weight of a record, whose mean is 1: a source of such records can be left out if it is worse


@dataclasses.dataclass(frozen=True)
class Advice:
    """What bilevel.export can do for these weights.

    leave out: what is shown to be worse. groups: the lower of two groups of weights, of which nothing is shown. draw:
    `drawn` records in proportion to their weights, because what is worse keeps some. keep: all records, since nothing
    is to be left out. wait: nothing is shown, so that there is no reason to write anything.
    """

    kind: Literal["leave out", "groups", "draw", "keep", "wait"]
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


def on_records(learned: bool, harmful: int | None, differ: bool, two: bool) -> Advice:
    """For single records, of which so many are called harmful (`known_harmful`).

    learned: whether their weights were learned, and not given or scored. differ: whether the weights do. two: whether
    they form two groups.
    """
    if harmful:
        return Advice("leave out")
    if two or (differ and not learned):
        return Advice("groups")
    return Advice("wait" if learned else "keep")


def known_harmful(x_optimizer: str, called: int, compared: int, n: int) -> int | None:
    """How many of n records are called harmful; None if too few were compared, and the weights follow another rule."""
    return called if compared and (x_optimizer == "auto" or n - compared <= UNKNOWN * n) else None


def can_go(verdict: str, record_weight: float) -> bool:
    """Whether a source with this verdict, and this weight of a record, is left out of the cleaned data."""
    return verdict == "worse" and record_weight <= LITTLE


def _effective_number(record_weights: Sequence[float], sizes: Sequence[int]) -> int:
    """The number of records of equal weight that are worth as much as these, (sum c)^2 / sum c^2."""
    sums = [sum(n * c**power for n, c in zip(sizes, record_weights, strict=True)) for power in (1, 2)]
    return round(sums[0] ** 2 / sums[1])
