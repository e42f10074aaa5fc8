"""Sources of records -> checked, format-free rows in an on-disk cache.

1. sources   -> places: files, saved datasets, datasets of the hub (bilevel.data.sources)
2. places    -> records, one at a time, whatever the container (bilevel.data.containers)
3. records   -> rows {index, roles, contents, more, is_noisy}, cached by the content of their place (Arrow), by a reader
                per layout (bilevel.data.layouts); a record that cannot be read is a row with a problem
4. rows      -> those that can be read, and of these the ones that are drawn, if a source has #N
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bilevel.data.bad_records import SHOWN, BadRecords
from bilevel.data.cache import cached_table
from bilevel.data.containers import kinds
from bilevel.data.layouts.detect import LAYOUTS, Layout, detect
from bilevel.data.layouts.values import add_suffix, renamed
from bilevel.data.notes import counted, line, packed
from bilevel.data.sources import Reading, Source
from bilevel.errors import DataError, first, short

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import datasets
    import numpy as np
    import pyarrow

LEARNED_ROLES = ("response", "assistant", "text")
ROWS_VERSION = 3  # part of the cache key; raise it when rows change for the same file


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of one place of a source that are read; their index counts from 0 in the place.

    place: its path or hub name. before: number of records in the places before. records: number of all in this place.
    key: of the rows in the cache.
    """

    place: str
    table: "pyarrow.Table"
    before: int
    records: int
    key: str


def read_rows(source: Source) -> "datasets.Dataset":
    """One row per record: index (its place in the source), roles, contents, more, is_noisy (None where unknown).

    roles are prompt, response, ... (Alpaca); system, developer, user, assistant, tool (chat); text. more is JSON, what
    a chat template needs beside roles and contents (bilevel.data.layouts.values.Row), or None. Raises DataError.
    """
    import datasets

    key = " ".join(part.key for part in parts(source))
    return datasets.Dataset(datasets.table.InMemoryTable(rows_table(source)), fingerprint=key)


def rows_table(source: Source) -> "pyarrow.Table":
    """The same rows without `datasets`, which takes a second to import. Raises DataError."""
    import pyarrow

    found = parts(source)
    return (
        found[0].table
        if len(found) == 1
        else pyarrow.concat_tables([shifted(part.table, part.before) for part in found])
    )


def shifted(table: "pyarrow.Table", by: int) -> "pyarrow.Table":
    """The table with `by` added to its index."""
    import pyarrow.compute

    if not by:
        return table
    number = table.column_names.index("index")
    return table.set_column(number, "index", pyarrow.compute.add(table["index"], by))


def parts(source: Source) -> list[Part]:
    """The rows of each place of a source that are read. Raises BadRecords, or DataError for a place as a whole."""
    import pyarrow.compute

    tables = _tables(source)
    good = [table["problem"].is_null() for _, _, table in tables]
    counts = [pyarrow.compute.sum(mask).as_py() or 0 for mask in good]
    if not sum(counts) or sum(table.num_rows for *_, table in tables) - sum(counts) > source.reading.skip_bad_records:
        raise BadRecords(problems := _problems(source), len(problems))
    drawn = None if source.take is None else _draw(source, counts)
    found, before, start = [], 0, 0
    for (place, key, table), mask, count in zip(tables, good, counts, strict=True):
        records = table.num_rows
        if drawn is not None or count < records:
            places = pyarrow.compute.indices_nonzero(mask).to_numpy()
            if drawn is not None:
                places = places[[i - start for i in drawn if start <= i < start + count]]
            key = hashlib.sha256(f"{key} {places.tolist()}".encode()).hexdigest()[:32]
            table = cached_table("rows", key, functools.partial(_write_selected, table, places))
        if table.num_rows:
            found.append(Part(place, table, before, records, key))
        before, start = before + records, start + count
    return found


def _tables(source: Source) -> list[tuple[str, str, "pyarrow.Table"]]:
    """Place, key and rows of each place of a source. Raises BadRecords with those of all its places."""
    found, lines, count = [], [], 0
    for place in source.places:
        try:
            found.append((place, *_place_table(place, source.reading)))
        except BadRecords as error:
            lines, count = lines + error.lines, count + error.count
    if count:
        raise BadRecords(lines, count)
    return found


def records_of(source: Source) -> int:
    """Number of all records of a source, with those that are left out or not drawn."""
    return sum(_place_table(place, source.reading)[1].num_rows for place in source.places)


def raw_records(source: Source, content: str | None = None) -> Iterator[kinds.Item]:
    """All records of a source in order, each with its text; one that cannot be read is a DataError. Raises DataError.

    content: what Source.content must be.
    """
    if content is not None and source.content != content:
        raise DataError(f"{source}: changed while it was read; start again when it is complete")
    for place in source.places:
        yield from kinds.items(place, kinds.content_of(place))


def read_as(source: Source) -> str:
    """The layouts of a source's records in words, such as "chat (messages)"."""
    tables = (_place_table(place, source.reading)[1] for place in source.places)
    return "; ".join(dict.fromkeys(words for table in tables for words in table["read_as"].drop_null().to_pylist()))


def most_samples(source: Source) -> float:
    """Upper limit of the number of samples: its records, or inf if a record can be several. Raises DataError."""
    import pyarrow
    import pyarrow.compute

    table = rows_table(source)
    roles = pyarrow.compute.list_flatten(table["roles"])
    learned = pyarrow.compute.is_in(roles, pyarrow.array(["response", "assistant"]))
    several = table["roles"][0].as_py() == ["text"] or pyarrow.compute.sum(learned).as_py() > table.num_rows
    return math.inf if several else table.num_rows


def row_notes(source: Source) -> list[str]:
    """Messages about the source's records for the user: what is left out, not used, empty or repeated."""
    import numpy as np

    table, hashes = rows_table(source), row_hashes(source)
    left_out = _problems(source)
    lines = [f"{len(left_out)} left out (skip_bad_records): {'; '.join(first(left_out, SHOWN))}"] if left_out else []
    lines += counted(table["index"], table["notes"])
    places = np.unique(hashes, return_index=True)[1]
    if count := len(hashes) - len(places):
        again = np.ones(len(hashes), dtype=bool)
        again[places] = False
        record = table["index"][int(again.argmax())].as_py()
        lines.append(line(count, record, "equal to an earlier record but for white space"))
    return lines


def row_hashes(source: Source) -> "np.ndarray":
    """(rows,) uint64, a hash of each row's roles and texts; white space makes no difference."""
    return rows_table(source)["hash"].to_numpy()


def _problems(source: Source) -> list[str]:
    """A line for each record that cannot be read."""
    found = []
    for place in source.places:
        problems = _place_table(place, source.reading)[1]["problem"]
        if problems.null_count < len(problems):
            found += [f"{place}, {problem}" for problem in problems.drop_null().to_pylist()]
    return found


def _draw(source: Source, counts: list[int]) -> list[int]:
    """Which of the records that can be read a source takes, by the seed, in order. Raises DataError."""
    among = sum(counts)
    if source.take > among:
        raise DataError(f"{source}: #{source.take} asks for more records than it has, {among}; take fewer")
    draw = random.Random(f"records of {source.stem}, seed {source.reading.seed}")
    return sorted(draw.sample(range(among), source.take))


def _place_table(place: str, reading: Reading) -> tuple[str, "pyarrow.Table"]:
    """The rows of a place, with those of records that cannot be read, and their key in the cache.

    Raises BadRecords if they are too many, and DataError.
    """
    content = kinds.content_of(place)
    key = hashlib.sha256(f"{content} {reading.key} {ROWS_VERSION} {version('datasets')}".encode()).hexdigest()[:32]
    return key, cached_table("rows", key, functools.partial(_write_rows, place, reading, content))


def _write_rows(place: str, reading: Reading, content: str, sink: "pyarrow.NativeFile") -> None:
    import pyarrow

    texts = {"roles": pyarrow.list_(pyarrow.string()), "contents": pyarrow.list_(pyarrow.large_string())}
    texts |= {"more": pyarrow.large_string(), "notes": pyarrow.string()}
    texts |= {"read_as": pyarrow.string(), "problem": pyarrow.string()}
    schema = pyarrow.schema({"index": pyarrow.int64(), **texts, "is_noisy": pyarrow.bool_(), "hash": pyarrow.uint64()})
    rows, lines, count = _rows(place, reading, content), [], 0
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            bad = [f"{place}, {row['problem']}" for row in batch if "problem" in row]
            lines, count = (lines + bad)[:SHOWN], count + len(bad)
    if count > reading.skip_bad_records:
        raise BadRecords(lines, count)


def _write_selected(table: "pyarrow.Table", places: "np.ndarray", sink: "pyarrow.NativeFile") -> None:
    """Write the rows at these places, which rise, a thousand at a time."""
    import pyarrow

    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        for start in range(0, len(places), 1000):
            writer.write_table(table.take(places[start : start + 1000]))


def _rows(place: str, reading: Reading, content: str) -> Iterator[dict[str, Any]]:
    """The rows of a place whose hash is `content`; it is read anew here, and may have changed."""
    layout, index, fields = None if reading.format == "auto" else LAYOUTS[reading.format], -1, dict(reading.fields)
    said = False
    for index, (record, _) in enumerate(kinds.items(place, content)):
        where = f"record {index}"
        try:
            record = _checked(record, fields, where)
            layout = layout or detect(record, where, fields)
            row = _row(layout, record, reading.prompt_suffix, where)
        except DataError as error:
            yield {"index": index, "problem": str(error)}
            continue
        yield {"index": index, **row, "read_as": None if said else layout.words}
        said = True
    if index < 0:
        raise DataError(f"{place}: holds no record")


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


def _row(layout: Layout, record: dict[str, Any], prompt_suffix: str | None, where: str) -> dict[str, Any]:
    """The row of a record. Raises DataError."""
    row = layout.read(record, where)
    if prompt_suffix:
        add_suffix(row, prompt_suffix)
    roles, contents = zip(*row.turns, strict=True)
    notes = [f"{field}: not used" for field in row.unused]
    if any(role in LEARNED_ROLES and not text.strip() for role, text in row.turns):
        notes.append("a response is empty")
    more = json.dumps(row.more, ensure_ascii=False) if row.more else None
    return {
        **{"roles": roles, "contents": contents, "more": more, "is_noisy": record.get("is_noisy")},
        **{"notes": packed(notes), "hash": _hash(roles, contents, more)},
    }


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
