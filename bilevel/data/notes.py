"""Notes on the records of a file, which a run shows at its start: a sentence and a count each."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow


def packed(notes: Iterable[str]) -> str | None:
    """The notes of one record as cached (JSON, without repeats); None if there are none."""
    found = list(dict.fromkeys(notes))
    return json.dumps(found) if found else None


def counted(index: "pyarrow.ChunkedArray", notes: "pyarrow.ChunkedArray") -> list[str]:
    """A line for each note, such as "3 records (first: record 7): a response is empty".

    index: the record of each row; notes: packed, or null.
    """
    found: dict[str, list[int]] = {}
    has = notes.is_valid()
    for record, text in zip(index.filter(has).to_pylist(), notes.filter(has).to_pylist(), strict=True):
        for note in json.loads(text):
            found.setdefault(note, []).append(record)
    return [line(len(records), records[0], note) for note, records in found.items()]


def line(count: int, first: int, note: str) -> str:
    return f"{count} record{'s' if count > 1 else ''} (first: record {first}): {note}"
