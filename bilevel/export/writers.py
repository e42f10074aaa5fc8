"""Write records to a file of any kind that bilevel.data.containers reads; the file's name tells the kind.

JSON and JSON Lines get the records' own text. The other kinds hold the parsed values: all rows of a table have the
fields of all records, null or empty where a record has none.
"""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bilevel.errors import UserError, short
from bilevel.files import whole_file

Records = Iterator[tuple[dict[str, Any], str]]  # each record with its original text

_LINE_BREAK = re.compile(r"[\r\n]+")
ROWS = 1000  # records per table of Parquet and Arrow


def ending(out: Path) -> tuple[str, str]:
    """The kind of file that a name asks for and its compression, such as (".jsonl", ".gz"); "" for none."""
    packed = out.suffix if out.suffix in PACKERS else ""
    kind = Path(out.name.removesuffix(packed)).suffix
    return (kind, packed) if kind in WRITERS and not (packed and kind in (".parquet", ".arrow")) else ("", "")


def write(records: Records, out: Path, total: int) -> None:
    """Write the records to a new file, which is either complete or absent. Raises UserError."""
    from tqdm import tqdm

    kind, packed = ending(out)
    bar = tqdm(records, total=total, unit="record", desc=f"writing {out.name}", disable=None, leave=False)
    try:
        with bar, whole_file(out, replace=False) as new, new.open("wb") as plain, _packed(plain, packed) as file:
            WRITERS[kind](iter(bar), file)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _packed(file: IO[bytes], packed: str) -> Iterator[IO[bytes]]:
    """The file itself, or one that compresses what is written into it. The same records give the same bytes."""
    if not packed:
        yield file
        return
    with PACKERS[packed](file) as stream:
        yield stream


def _gzip(file: IO[bytes]) -> IO[bytes]:
    import gzip

    return gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0)


def _bz2(file: IO[bytes]) -> IO[bytes]:
    import bz2

    return bz2.BZ2File(file, "wb")


def _xz(file: IO[bytes]) -> IO[bytes]:
    import lzma

    return lzma.LZMAFile(file, "wb")


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.CompressedOutputStream(file, "zstd")


PACKERS = {".gz": _gzip, ".zst": _zstd, ".bz2": _bz2, ".xz": _xz}


def _json_lines(records: Records, file: IO[bytes]) -> None:
    """Write one line per record. Line breaks of a record from a JSON array are replaced by spaces."""
    for _, text in records:
        parts = _LINE_BREAK.split(text)  # these are never inside strings, where JSON escapes line breaks
        line = text if len(parts) == 1 else " ".join(part.strip(" \t") for part in parts)
        file.write(line.encode() + b"\n")


def _json_array(records: Records, file: IO[bytes]) -> None:
    for number, (_, text) in enumerate(records):
        file.write((b",\n" if number else b"[\n") + text.encode())
    file.write(b"\n]\n")


def _table(records: Records, file: IO[bytes], delimiter: str) -> None:
    """Write a header line and a row per record; what is neither text nor null is JSON in its cell. Raises UserError."""
    rows = [record for record, _ in records]
    names = dict.fromkeys(name for record in rows for name in record)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    try:
        writer.writerow(names)
        for record in rows:
            writer.writerow([_cell(record.get(name)) for name in names])
    except UnicodeEncodeError as error:
        raise UserError(f"a table holds UTF-8 text, but {short(error.object)} is none; write a .jsonl file") from None
    finally:
        text.detach()


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _csv(records: Records, file: IO[bytes]) -> None:
    _table(records, file, ",")


def _tsv(records: Records, file: IO[bytes]) -> None:
    _table(records, file, "\t")


def _parquet(records: Records, file: IO[bytes]) -> None:
    import pyarrow.parquet

    with _one_type_per_field():
        pyarrow.parquet.write_table(_arrow_table(records), file)


def _arrow(records: Records, file: IO[bytes]) -> None:
    import pyarrow

    with _one_type_per_field():
        table = _arrow_table(records)
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def _arrow_table(records: Records) -> Any:
    """The records as columns in the order in which fields appear."""
    import pyarrow as pa

    tables = []
    while batch := [record for record, _ in itertools.islice(records, ROWS)]:
        names = dict.fromkeys(name for record in batch for name in record)
        tables.append(pa.table({name: [record.get(name) for record in batch] for name in names}))
    return pa.concat_tables(tables, promote_options="permissive")


@contextlib.contextmanager
def _one_type_per_field() -> Iterator[None]:
    """A context that turns the errors of pyarrow into UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(
            f"Parquet needs one type per field, but the types of these records differ ({short(str(error), 200)}); "
            "write a .jsonl file instead"
        ) from None


WRITERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_array, ".csv": _csv, ".tsv": _tsv}
WRITERS |= {".parquet": _parquet, ".arrow": _arrow}
