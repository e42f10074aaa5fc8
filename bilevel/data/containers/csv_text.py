"""Read CSV and TSV: a record per row, with the fields of the header. Every cell stays the text that it is."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevel.errors import DataError, short

_TRUTH = {"true": True, "false": False, "1": True, "0": False, "": None}
_DELIMITERS = (",", "\t", ";")


def items(file: io.BufferedReader, path: Path) -> Iterator[tuple[Any, str]]:
    """Records of a table with a header line; a row of another length is a DataError in its place."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        rows = csv.reader(text, delimiter=_delimiter(file, path), strict=True)
        names = _header(next(rows, []), path)
        for index, cells in enumerate(row for row in rows if row):
            if len(cells) != len(names):
                yield DataError(f"record {index}: has {len(cells)} cells, but the header has {len(names)}"), ""
                continue
            record: dict[str, Any] = dict(zip(names, cells, strict=True))
            if "is_noisy" in record:
                record["is_noisy"] = _TRUTH.get(record["is_noisy"].lower(), record["is_noisy"])
            yield record, json.dumps(record, ensure_ascii=False)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not CSV ({error}); check its quotation marks") from None
    finally:
        text.detach()


def _delimiter(file: io.BufferedReader, path: Path) -> str:
    """A tab in .tsv files; else the first of comma, tab and semicolon that the header holds."""
    head = file.peek(1 << 16).split(b"\n")[0].decode(errors="replace")
    usual = "\t" if ".tsv" in path.suffixes else ","
    return next((mark for mark in (usual, *_DELIMITERS) if mark in head), usual)


def _header(names: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in names]
    if not any(names):
        raise DataError(f"{path}: holds no record; expected a header line with the names of the fields")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{path}: the header has {', '.join(map(short, twice))} twice; rename one of the columns")
    return names
