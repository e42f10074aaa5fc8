"""bilevel/monitor/words.py: durations, memory and numbers as a person reads them."""

import pytest

from bilevel.monitor.words import apart, duration, many, memory


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0004, "0 ms"), (0.042, "42 ms"), (0.25, "0.25 s"), (2.34, "2.3 s"),
     (9.97, "10 s"), (99, "99 s"), (100, "2 min"),
     (3570, "1 h 00 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"), (90_000, "25 h 00 min")],
)  # fmt: skip
def test_durations(seconds: float, words: str):
    assert duration(seconds) == words


def test_memory_and_counts():
    assert [memory(999_000_000), memory(2_540_000_000)] == ["999 MB", "2.5 GB"]
    assert [many(1, "record"), many(4096, "record")] == ["1 record", "4,096 records"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.9949, 0.9996, 1.0038], ["0.9949", "0.9996", "1.0038"]),
        ([0.1, 1.96], ["0.10", "1.96"]),
        ([0.0003, 0, 1.5], ["0.0003", "0.00", "1.50"]),
        ([1, 1], ["1.00", "1.00"]),
        ([12.34, 1500], ["12.34", "1500.00"]),
    ],
)
def test_numbers_that_differ_are_shown_to_differ(values: list[float], words: list[str]):
    assert apart(values) == words
