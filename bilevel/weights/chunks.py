"""Visiting the weights of many records a chunk at a time, so that memory does not grow with their number."""

from collections.abc import Iterator

CHUNK = 1 << 20  # entries converted to float64, or rows of weights.csv parsed, at a time


def chunks(end: int, start: int = 0) -> Iterator[slice]:
    """The entries start..end-1 in order, at most CHUNK of them in each slice."""
    return (slice(first, min(first + CHUNK, end)) for first in range(start, end, CHUNK))
