"""The records of one place -> checked, format-free rows in the cache, by a reader per layout (bilevel.data.layouts).

A record that cannot be read is a row with a problem; one that the filters leave out is a row that says why.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bilevel.data.bad_records import KEPT, BadRecords
from bilevel.data.cache import LARGE, ROWS, cached_table
from bilevel.data.containers import kinds
from bilevel.data.filters import left_out
from bilevel.data.layouts.detect import LAYOUTS, Layout, detect
from bilevel.data.layouts.values import NoAnswer, add_suffix, renamed
from bilevel.data.notes import packed
from bilevel.data.progress import Progress
from bilevel.data.sources import Reading
from bilevel.data.workers import in_order
from bilevel.errors import DataError, short
from bilevel.settings.data_fields import FILTERS

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import pyarrow

LEARNED_ROLES = ("response", "assistant", "text")
ROWS_VERSION = 6  # part of the cache key; raise it when rows change for the same file
GLUED = (
    "nothing stands between prompt and completion: end the prompt or begin the completion with a space or line break, "
    "or take the chat template with --fields '{question: prompt, answer: completion}'"
)


def place_table(place: str, reading: Reading) -> tuple[str, "pyarrow.Table"]:
    """The rows of a place, with those of records that cannot be read, and their key in the cache.

    Raises BadRecords if they are too many, and DataError.
    """
    content = kinds.content_of(place)
    key = hashlib.sha256(f"{content} {reading.key} {ROWS_VERSION} {version('datasets')}".encode()).hexdigest()[:32]
    return key, cached_table("rows", key, functools.partial(write_rows, place, reading, content))


def write_rows(place: str, reading: Reading, content: str, sink: "pyarrow.NativeFile") -> None:
    import pyarrow

    lines, count = [], 0
    with pyarrow.ipc.new_stream(sink, _schema()) as writer:
        for batch in read_place(place, reading, content):
            writer.write_batch(batch)
            bad = [f"{place}, {problem}" for problem in batch["problem"].drop_null().to_pylist()]
            lines, count = (lines + bad)[:KEPT], count + len(bad)
    if count > reading.skip_bad_records:
        raise BadRecords(lines, count)


def _schema() -> "pyarrow.Schema":
    import pyarrow

    texts = {"roles": pyarrow.list_(pyarrow.string()), "contents": pyarrow.list_(pyarrow.large_string())}
    texts |= {"more": pyarrow.large_string(), "notes": pyarrow.string()}
    texts |= {"read_as": pyarrow.string(), "problem": pyarrow.string()}
    texts |= {"filtered": pyarrow.string()}
    return pyarrow.schema({"index": pyarrow.int64(), **texts, "is_noisy": pyarrow.bool_(), "hash": pyarrow.uint64()})


def read_place(place: str, reading: Reading, content: str) -> Iterator["pyarrow.RecordBatch"]:
    """The rows of a place whose hash is `content`; it is read anew here, and may have changed."""
    length, reader = kinds.length_of(place), _Reader(reading)
    with Progress("reading", place, length, "records" if length is None else "bytes") as progress:
        seen = (lambda count: None) if length is None else progress.update
        for batch in _batches(_chunks(kinds.unparsed(place, content, seen)), reader):
            yield batch
            if length is None:
                progress.update(batch.num_rows)
    if not reader.started:
        raise DataError(f"{place}: holds no record")


def _batches(chunks: "Iterator[Chunk]", reader: "_Reader") -> Iterator["pyarrow.RecordBatch"]:
    """The rows of each chunk; the first record that can be read tells how all others are read."""
    for chunk in chunks:
        yield reader(chunk)
        if reader.said:
            break
    yield from in_order(reader, chunks)


Chunk = tuple[int, list[bytes | kinds.Item]]  # the place of the first record, and records of kinds.unparsed


def _chunks(records: Iterator[bytes | kinds.Item]) -> Iterator[Chunk]:
    """The records, ROWS at a time, or fewer if they are long."""
    start, found, size = 0, [], 0
    for record in records:
        found.append(record)
        size += len(record if isinstance(record, bytes) else record[1])
        if len(found) == ROWS or size > LARGE:
            after = start + len(found)  # the reader empties the chunk
            yield start, found
            start, found, size = after, [], 0
    if found:
        yield start, found


class _Reader:
    """A function from chunks of records to their rows.

    layout: of all records, once it is known. said: whether a row has named it. started: whether there is any record.
    """

    def __init__(self, reading: Reading):
        self.layout = None if reading.format == "auto" else LAYOUTS[reading.format]
        self.reading, self.fields = reading, dict(reading.fields)
        self.started = self.said = False

    def __call__(self, chunk: Chunk) -> "pyarrow.RecordBatch":
        import pyarrow

        self.started, (start, records) = True, chunk
        records.reverse()  # each is let go when it has become a row
        rows = [self._row(records.pop(), start + number) for number in range(len(records))]
        return pyarrow.RecordBatch.from_pylist(rows, schema=_schema())

    def _row(self, record: bytes | kinds.Item, index: int) -> dict[str, Any]:
        where = f"record {index}"
        try:
            record = _checked(kinds.parsed(record, index)[0], self.fields, where)
            self.layout = self.layout or detect(record, where, self.fields)
            row = _row(self.layout, record, self.reading, where)
        except DataError as error:
            if isinstance(error, NoAnswer) and "alternating_turns" in self.reading.filters:
                return {"index": index, "filtered": FILTERS["alternating_turns"]}
            return {"index": index, "problem": str(error)}
        words, self.said = None if self.said else self.layout.words, True
        return {"index": index, **row, "read_as": words}


def _checked(record: Any, fields: dict[str, str], where: str) -> dict[str, Any]:
    """The record with its fields renamed. Raises DataError."""
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with fields, got {type(record).__name__}")
    is_noisy = record.get(fields.get("is_noisy", "is_noisy"))
    if is_noisy is not None and not isinstance(is_noisy, bool):
        raise DataError(f"{where}: is_noisy must be true or false, got {short(is_noisy)}")
    return renamed(record, fields, where) if fields else record


def _row(layout: Layout, record: dict[str, Any], reading: Reading, where: str) -> dict[str, Any]:
    """The row of a record. Raises DataError."""
    row = layout.read(record, where)
    if reading.prompt_suffix:
        add_suffix(row, reading.prompt_suffix)
    roles, contents = zip(*row.turns, strict=True)
    notes = [f"{field}: not used" for field in row.unused]
    if any(role in LEARNED_ROLES and not text.strip() for role, text in row.turns):
        notes.append("a response is empty")
    if _glued(row.turns):
        notes.append(GLUED)
    more = json.dumps(row.more, ensure_ascii=False) if row.more else None
    return {
        **{"roles": roles, "contents": contents, "more": more, "is_noisy": record.get("is_noisy")},
        **{"notes": packed(notes), "hash": _hash(roles, contents, more)},
        "filtered": left_out(row.turns, reading.filters, reading.max_characters),
    }


def _glued(turns: list[tuple[str, str]]) -> bool:
    """Whether a completion begins with a letter or digit right behind the last character of its prompt."""
    (role, prompt), after = turns[0], turns[1][1] if len(turns) > 1 else ""
    between = prompt[-1:] + after[:1]
    return (
        role == "prompt"
        and len(between) == 2
        and not between[0].isspace()
        and between.isascii()
        and between[1].isalnum()
    )


def _hash(roles: tuple[str, ...], contents: tuple[str, ...], more: str | None) -> int:
    """A 64-bit hash of a record's roles and texts; runs of white space count as one space."""
    digest = hashlib.blake2b(digest_size=8)
    for text in (*roles, *contents, more or ""):
        for part in _evenly_spaced(text):
            digest.update(part.encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest())


def _evenly_spaced(text: str) -> Iterator[str]:
    """The words of a text with one space between them, a piece at a time: a record may be as long as its file."""
    between = ""
    for start in range(0, len(text), 1 << 16):
        piece = text[start : start + (1 << 16)]
        if words := piece.split():
            yield (" " if between and (between.isspace() or piece[0].isspace()) else "") + " ".join(words)
            between = piece[-1]
        elif between:
            between = " "
