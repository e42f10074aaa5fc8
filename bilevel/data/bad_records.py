"""The records of a source that cannot be read or rendered, told together."""

from bilevel.errors import DataError

SHOWN = 20  # problems of a file that are written out


class BadRecords(DataError):
    """The records of a source that cannot be read: a line for each of the first, and how many there are in all."""

    def __init__(self, lines: list[str], count: int):
        more = [f"and {count - SHOWN} more"] if count > SHOWN else []
        self.lines, self.count = lines[:SHOWN], count
        super().__init__("\n".join(self.lines + more))

    def __reduce__(self) -> tuple:
        return BadRecords, (self.lines, self.count)  # how it comes from another process
