"""Sources of records -> checked, format-free rows in an on-disk cache.

1. sources   -> places: files, saved datasets, datasets of the hub (bilevel.data.sources)
2. places    -> records, one at a time, whatever the container (bilevel.data.containers)
3. records   -> rows {index, roles, contents, more, is_noisy}, cached by the content of their place (bilevel.data.rows)
4. rows      -> those that can be read and that no filter leaves out, and of these those drawn, if a source has #N
"""

import dataclasses
import functools
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bilevel.data.bad_records import BadRecords, told_together
from bilevel.data.cache import cached_table, write_selected
from bilevel.data.containers import kinds
from bilevel.data.notes import counted, line
from bilevel.data.rows import place_table
from bilevel.data.sources import Source
from bilevel.errors import DataError

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import datasets
    import numpy as np
    import pyarrow


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
    bad = sum(len(table) - table["problem"].null_count for *_, table in tables)
    if bad == sum(map(len, (table for *_, table in tables))) or bad > source.reading.skip_bad_records:
        raise BadRecords(found := problems(source), len(found))
    good = [pyarrow.compute.and_(table["problem"].is_null(), table["filtered"].is_null()) for *_, table in tables]
    counts = [pyarrow.compute.sum(mask).as_py() or 0 for mask in good]
    if not sum(counts):
        raise DataError(f"{source}: no record is left: {'; '.join(filter_notes(source))}")
    drawn = None if source.take is None else _draw(source, counts)
    found, before, start = [], 0, 0
    for (place, key, table), mask, count in zip(tables, good, counts, strict=True):
        records = table.num_rows
        if drawn is not None or count < records:
            places = pyarrow.compute.indices_nonzero(mask).to_numpy()
            if drawn is not None:
                places = places[[i - start for i in drawn if start <= i < start + count]]
            key = hashlib.sha256(f"{key} {places.tolist()}".encode()).hexdigest()[:32]
            table = cached_table("rows", key, functools.partial(write_selected, table, places))
        if table.num_rows:
            found.append(Part(place, table, before, records, key))
        before, start = before + records, start + count
    return found


def _tables(source: Source) -> list[tuple[str, str, "pyarrow.Table"]]:
    """Place, key and rows of each place of a source. Raises BadRecords with those of all its places."""
    found, lines, count = [], [], 0
    for place in source.places:
        try:
            found.append((place, *place_table(place, source.reading)))
        except BadRecords as error:
            lines, count = lines + error.lines, count + error.count
    if count:
        raise BadRecords(lines, count)
    return found


def records_of(source: Source) -> int:
    """Number of all records of a source, with those that are left out or not drawn."""
    return sum(place_table(place, source.reading)[1].num_rows for place in source.places)


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
    tables = (place_table(place, source.reading)[1] for place in source.places)
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


def characters(source: Source) -> tuple[int, int, bool]:
    """Number of records that are read, characters (bytes of UTF-8) of all their turns, and whether they are texts.

    Raises DataError.
    """
    import pyarrow.compute

    table = rows_table(source)
    sizes = pyarrow.compute.binary_length(pyarrow.compute.list_flatten(table["contents"]))
    return table.num_rows, pyarrow.compute.sum(sizes).as_py() or 0, table["roles"][0].as_py() == ["text"]


def row_notes(source: Source, refused: Sequence[str] = ()) -> list[str]:
    """Messages about the source's records for the user: what is left out, not used, empty or repeated.

    refused: a line for each record that the chat template refuses, which is left out, too.
    """
    import numpy as np

    table, hashes = rows_table(source), row_hashes(source)
    left_out = [*problems(source), *refused]
    told = "; ".join(told_together(left_out, len(left_out)))
    lines = [f"{len(left_out)} left out (skip_bad_records): {told}"] if left_out else []
    lines += filter_notes(source)
    lines += counted(table["index"], table["notes"])
    places = np.unique(hashes, return_index=True)[1]
    if count := len(hashes) - len(places):
        again = np.ones(len(hashes), dtype=bool)
        again[places] = False
        record = table["index"][int(again.argmax())].as_py()
        lines.append(line(count, record, "equal to an earlier record but for white space"))
    return lines


def filter_notes(source: Source) -> list[str]:
    """A line for each reason for which the filters leave out records of a source."""
    counts: dict[str, int] = {}
    for place in source.places:
        for found in place_table(place, source.reading)[1]["filtered"].drop_null().value_counts().to_pylist():
            counts[found["values"]] = counts.get(found["values"], 0) + found["counts"]
    return [f"{count:,} left out by filters: {reason}" for reason, count in sorted(counts.items())]


def row_hashes(source: Source) -> "np.ndarray":
    """(rows,) uint64, a hash of each row's roles and texts; white space makes no difference."""
    return rows_table(source)["hash"].to_numpy()


def problems(source: Source) -> list[str]:
    """A line for each record that cannot be read."""
    found = []
    for place in source.places:
        problems = place_table(place, source.reading)[1]["problem"]
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
