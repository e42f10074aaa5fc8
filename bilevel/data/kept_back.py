"""How many validation records are kept back at first, for training records to be compared with."""

MOST = 256  # that are needed
ENOUGH = 60  # fewer show only faults of many records: 10 % of harmful ones are not found by them


def kept_back(n: int, batch_size: int, steps: int) -> int:
    """Half of n validation records, and less if a batch of the rest, or `steps` batches of them, would be too few."""
    return min(MOST, n - max(batch_size, -(-n // 2)), steps * batch_size)
