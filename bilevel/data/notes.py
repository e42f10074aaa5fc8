"""What is worth saying of a file at the start of a run: counted while it is read, and kept in the cache."""

import json
from collections.abc import Iterable
from pathlib import Path

from bilevel.files import cache_folder, whole_file


class Notes:
    """Sentences, each with the number of records that it is about and the place of the first."""

    def __init__(self, found: dict[str, list[int]] | None = None):
        self.found = found or {}

    def add(self, note: str, index: int) -> None:
        entry = self.found.setdefault(note, [0, index])
        entry[0] += 1

    def update(self, notes: Iterable[str], index: int) -> None:
        for note in dict.fromkeys(notes):
            self.add(note, index)

    def lines(self) -> list[str]:
        """A line for each, such as "3 records (first: record 7): the response is empty"."""
        return [
            f"{count} record{'s' if count > 1 else ''} (first: record {index}): {note}"
            for note, (count, index) in self.found.items()
        ]

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file, shared=True) as new:
            new.write_text(json.dumps(self.found), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "Notes":
        """The notes of a file; none where there is no file."""
        return cls(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls()


def kept(notes: Notes, key: str) -> Notes:
    """The notes of a tokenised file, from the cache where it was not tokenised now; key: that of its tokens."""
    file = cache_folder() / "notes" / f"{key}.json"
    if not notes.found:
        return Notes.read(file)
    notes.write(file)
    return notes
