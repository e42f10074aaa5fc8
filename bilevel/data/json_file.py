"""Read a JSON or JSON Lines file, one record at a time, in at most ten times the size of the file in memory."""

import codecs
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevel.errors import DataError
from bilevel.files import open_regular

_OPENING = re.compile(r"\s*\[[ \t\n\r]*(\]?)[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r]*([,\]]?)[ \t\n\r]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)  # a string, or what separates values
MOST_VALUES = 100_000  # in one record
_UNPACK, _CONVERT = "unpack it first", "write it as JSON Lines first, for example with datasets' Dataset.to_json"
_MAGIC = {  # first bytes of other kinds of file that are often named .json
    b"\x1f\x8b": ("gzip", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"\xfd7zXZ\x00": ("xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstd", _UNPACK),
    b"PAR1": ("Parquet", _CONVERT),
    b"ARROW1": ("Arrow", _CONVERT),
    b"\xff\xff\xff\xff": ("an Arrow stream", _CONVERT),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file itself with git lfs pull"),
}


def read_bytes(path: Path, content: str) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != content:
        raise DataError(f"{path}: changed while it was read; start again when it is complete")
    return data.removeprefix(codecs.BOM_UTF8)


def parse_records(path: Path, data: bytes) -> Iterator[Any]:
    """Records of a JSON array or of JSON Lines, told apart by the first character.

    If a key appears twice in a record, the last value wins, as in every JSON reader.
    """
    return (record for record, _ in parse_texts(path, data))


def parse_texts(path: Path, data: bytes) -> Iterator[tuple[Any, str]]:
    """Every record with its own text: its line without the line break, or the text between the commas of the array."""
    for mark, (kind, remedy) in _MAGIC.items():
        if data.startswith(mark):
            raise DataError(f"{path}: this is {kind}, not JSON text; {remedy}")
    if not (encoding := json.detect_encoding(data)).startswith("utf-8"):
        raise DataError(f"{path}: not UTF-8 text but {encoding}, by its first bytes; save it as UTF-8")
    if re.match(rb"\s*\[", data):
        yield from _array(data, path)
        return
    dense = _dense(data)
    lines = (line[0] for line in re.finditer(rb"[^\r\n]+", data) if not line[0].isspace())
    for index, line in enumerate(lines):
        with _errors(f"{path}, record {index}"):
            text = line.decode()
            if dense:
                _check_values(text, 0)
            record = json.loads(text)
        yield record, text


def _array(data: bytes, path: Path) -> Iterator[tuple[Any, str]]:
    """Records of a JSON array, one at a time, because parsed records can take many times the size of the file."""
    with _errors(str(path)):
        text = data.decode()
    decode, index, dense = json.JSONDecoder().raw_decode, 0, _dense(data)
    mark = _OPENING.match(text)
    while mark[1] != "]":
        with _errors(f"{path}, record {index}"):
            if index and not mark[1]:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, mark.end())
            if dense:
                _check_values(text, mark.end())
            record, end = decode(text, mark.end())
        yield record, text[mark.end() : end]
        mark = _BETWEEN.match(text, end)
        index += 1
    if mark.end() < len(text):
        raise DataError(f"{path}: text after the array's end, character {mark.end()}; expected one array of records")


def _dense(data: bytes) -> bool:
    """Whether one record of the file could take more than five times the file's size, at 120 bytes a value."""
    return 24 * sum(map(data.count, (b",", b"[", b"{"))) > len(data)


def _check_values(text: str, start: int) -> None:
    """Raises ValueError when the record that begins here holds more than MOST_VALUES, before they take memory."""
    depth = values = 0
    for token in _STRUCTURE.finditer(text, start):
        mark = token[0]
        depth += (mark in "[{") - (mark in "]}")
        values += mark in "[{,"
        if values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, where a few texts are expected")
        if depth <= 0:
            return


@contextlib.contextmanager
def _errors(where: str) -> Iterator[None]:
    """A context that turns the errors of a JSON parser into DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not JSON ({error.msg} at {line}column {error.colno}); "
            "expected a JSON array of records or one record per line"
        ) from None
    except (RecursionError, ValueError) as error:  # too many brackets, digits or values
        raise DataError(f"{where}: cannot be read ({error})") from None
