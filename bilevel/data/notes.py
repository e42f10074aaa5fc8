"""What is worth saying of a file at the start of a run: sentences beside its records, and counts of them."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow


def packed(notes: Iterable[str]) -> str | None:
    """The notes of one record as they are cached, each once; None without any."""
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
