"""Which sources and records the cleaned data leave out by themselves, and how many to draw where none is."""

from collections.abc import Sequence

HARMFUL = 0.5  # a record is called harmful if it is so with a larger probability than this
LITTLE = 0.1  # weight of a record, whose mean is 1: a source of such records can be left out if it is worse


def can_go(verdict: str, record_weight: float) -> bool:
    """Whether a source with this verdict, and this weight of a record, is left out of the cleaned data."""
    return verdict == "worse" and record_weight <= LITTLE


def worth_drawing(verdicts: Sequence[str], record_weights: Sequence[float], sizes: Sequence[int]) -> int | None:
    """How many records to draw in proportion to the weights, if a source is worse but none can go; else None.

    It is the number of records of equal weight that are worth as much, (sum c)^2 / sum c^2.
    """
    if "worse" not in verdicts or any(map(can_go, verdicts, record_weights)):
        return None
    sums = [sum(n * c**power for n, c in zip(sizes, record_weights, strict=True)) for power in (1, 2)]
    return round(sums[0] ** 2 / sums[1])
