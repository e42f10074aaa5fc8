"""Which sources and records the cleaned data leave out by themselves."""

HARMFUL = 0.5  # a record is called harmful if more than this share of those with as large a mean gap are
LITTLE = 0.1  # weight of a record, whose mean is 1: a source of such records can be left out if it is worse


def can_go(verdict: str, record_weight: float) -> bool:
    """Whether a source with this verdict, and this weight of a record, is left out of the cleaned data."""
    return verdict == "worse" and record_weight <= LITTLE
