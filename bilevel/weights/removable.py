"""Which sources and records the cleaned data leave out by themselves."""

LIKELY = 0.5  # a record that is harmful with a larger probability is more likely harmful than not
LITTLE = 0.1  # weight of a record, whose mean is 1: a source of such records can be left out if it is worse


def can_go(verdict: str, record_weight: float) -> bool:
    """Whether a source with this verdict, and this weight of a record, is left out of the cleaned data."""
    return verdict == "worse" and record_weight <= LITTLE
