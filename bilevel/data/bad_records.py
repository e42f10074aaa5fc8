"""The records of a source that cannot be read or rendered, told together."""

import re

from bilevel.errors import DataError

KEPT = 1000  # problems of a file that are remembered; the others are counted
SHOWN = 20  # lines about them that are written out
NAMED = 10  # records in a line
PLACE = re.compile(r"^(.*?\brecord )(\d+)\b(.*)$", re.DOTALL)


class BadRecords(DataError):
    """The records of a source that cannot be read: a line for each kind of problem, and how many there are in all.

    lines: problems, one for each record, of which the first KEPT are kept. count: how many records cannot be read.
    """

    def __init__(self, lines: list[str], count: int):
        self.lines, self.count = lines[:KEPT], count
        super().__init__("\n".join(told_together(self.lines, count)))

    def __reduce__(self) -> tuple:
        return BadRecords, (self.lines, self.count)  # how it comes from another process


def told_together(lines: list[str], count: int) -> list[str]:
    """At most SHOWN lines, and one that counts the other records: records with the same problem share a line."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        found = PLACE.match(line)
        before, number, after = found.groups() if found else (line, "", "")
        kinds.setdefault((before, after), []).append(number)
    shown = list(kinds.items())[:SHOWN]
    left = count - sum(len(numbers) for _, numbers in shown)
    return [_line(*kind, numbers) for kind, numbers in shown] + ([f"and {left:,} more"] if left > 0 else [])


def _line(before: str, after: str, numbers: list[str]) -> str:
    if len(set(numbers)) == 1:  # one record, or a problem of no single record
        return before + numbers[0] + after
    several, more = before.removesuffix("record ") + "records ", len(numbers) - NAMED
    if more <= 0:
        return f"{several}{', '.join(numbers[:-1])} and {numbers[-1]}{after}"
    return f"{several}{', '.join(numbers[:NAMED])} and {more:,} more{after}"
