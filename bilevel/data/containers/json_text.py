"""Read JSON text, one record at a time: JSON Lines, an array, objects one after the other, or LMFlow's instances.

JSON Lines take the memory of one line; the other forms take at most ten times the size of the file.
"""

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.errors import DataError

Item = tuple[Any, str]  # a record, or the DataError that says why it cannot be read, and its text

_OPENING = re.compile(r"\s*\[[ \t\n\r]*(\]?)[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r]*([,\]]?)[ \t\n\r]*")
_SPACE = re.compile(r"[ \t\n\r]*")
# LMFlow's object up to its array of records, and what may follow the array.
_INSTANCES = re.compile(r'\s*\{\s*(?:"type"\s*:\s*"[^"]*"\s*,\s*)?"instances"\s*:\s*\[')
_BEHIND_INSTANCES = re.compile(r'\s*(?:,\s*"type"\s*:\s*"[^"]*"\s*)?\}\s*')
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)  # a string, or what separates values
MOST_VALUES = 100_000  # in one record
LONGEST_BEGINNING = 100_000  # characters of the first line of an object over several lines
_MAGIC = {  # first bytes of other kinds of file that are often named .json
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file itself with git lfs pull"),
}


def unparsed(file: io.BufferedReader, path: Path) -> Iterator[bytes | Item]:
    """Every record: a line of JSON Lines as it is, for `parsed`; else the record with its part of a longer text.

    If a key appears twice in a record, the last value wins, as in every JSON reader. Raises DataError for the file.
    """
    _check_kind(file.peek(64), path)
    above, head = _beginning(file)
    if head.lstrip().startswith(b"["):
        text = _text(above.space() + head + file.read(), path)
        del head  # a whole file, if it is one line
        yield from _array(text, path)
    elif _INSTANCES.match(head[:500].decode(errors="replace")) or _is_begun(head):
        text = _text(above.space() + head + file.read(), path)
        del head
        if mark := _INSTANCES.match(text):
            yield from _instances(text, mark, path)
        elif _begins_with_value(text):
            yield from _objects(text, path)
        else:  # JSON Lines, the first of which is damaged
            yield from _lines(io.BytesIO(text.encode()))
    else:
        yield from _lines(itertools.chain([head], file))


class _Blank(NamedTuple):
    """Blank lines at the beginning of a file: how many, and their bytes in all."""

    lines: int
    size: int

    def space(self) -> bytes:
        """As much space, so that places in the text behind it are those in the file."""
        return b" " * (self.size - self.lines) + b"\n" * self.lines


def _beginning(file: io.BufferedReader) -> tuple[_Blank, bytes]:
    """The blank lines at the beginning, which may be gigabytes, and the first line that is not blank."""
    lines = size = 0
    line = file.readline()
    while line.isspace():
        lines, size = lines + 1, size + len(line)
        line = file.readline()
    return _Blank(lines, size), line


def _check_kind(head: bytes, path: Path) -> None:
    for mark, (kind, remedy) in _MAGIC.items():
        if head.startswith(mark):
            raise DataError(f"{path}: this is {kind}, not JSON text; {remedy}")
    if not (encoding := json.detect_encoding(head)).startswith("utf-8"):
        raise DataError(f"{path}: not UTF-8 text but {encoding}, by its first bytes; save it as UTF-8")


def _lines(read: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that are not blank, each with its line break; \\r ends a line too."""
    for line in read:
        if b"\r" in line:
            yield from (part[0] for part in re.finditer(rb"[^\r\n]+[\r\n]*", line) if not part[0].isspace())
        elif line and not line.isspace():
            yield line


def parsed(line: bytes, index: int) -> Item:
    """The record of a line, or the DataError that says why it cannot be read; and the line without its line break."""
    try:
        with _errors(f"record {index}"):
            text = line.rstrip(b"\r\n").decode()
            if len(text) > MOST_VALUES and _dense(text):
                _check_values(text, 0)
            return json.loads(text), text
    except DataError as error:
        return error, line.decode(errors="replace")


def _is_begun(line: bytes) -> bool:
    """Whether the line begins an object that goes on in the next lines."""
    try:
        text = line.decode().strip()
        if text.startswith("{") and len(text) < LONGEST_BEGINNING:
            json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (RecursionError, ValueError):
        pass
    return False


def _begins_with_value(text: str) -> bool:
    try:
        json.JSONDecoder().raw_decode(text, _SPACE.match(text).end())
    except json.JSONDecodeError:
        return False
    except (RecursionError, ValueError):
        pass  # a value that cannot be read, which is an error of its own
    return True


def _array(text: str, path: Path) -> Iterator[Item]:
    """Records of a JSON array, one at a time, because parsed records can take many times the size of the file."""
    end = yield from _elements(text, 0, path)
    if end < len(text):
        raise DataError(f"{path}: text after the array's end, character {end}; expected one array of records")


def _instances(text: str, mark: re.Match[str], path: Path) -> Iterator[Item]:
    """The records of LMFlow's {"type": ..., "instances": [...]}, whose array begins at the mark's end."""
    end = yield from _elements(text, mark.end() - 1, path)
    if not _BEHIND_INSTANCES.fullmatch(text, end):
        raise DataError(f"{path}: text after the end of 'instances', character {end}; expected }} there")


def _elements(text: str, start: int, path: Path) -> Iterator[Item]:
    """The elements of the array that begins here; returns where it ends."""
    decode, index, dense = json.JSONDecoder().raw_decode, 0, _dense(text)
    mark = _OPENING.match(text, start)
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
    return mark.end()


def _objects(text: str, path: Path) -> Iterator[Item]:
    """Values that stand one after the other, each over any number of lines."""
    decode, index, dense = json.JSONDecoder().raw_decode, 0, _dense(text)
    end = _SPACE.match(text).end()
    while end < len(text):
        start = end
        with _errors(f"{path}, record {index}"):
            if dense:
                _check_values(text, start)
            record, end = decode(text, start)
        yield record, text[start:end]
        end = _SPACE.match(text, end).end()
        index += 1


def _text(data: bytes, path: Path) -> str:
    with _errors(str(path)):
        return data.decode()


def _dense(text: str) -> bool:
    """Whether one record of the text could take more than five times the text's size, at 120 bytes a value."""
    return 24 * sum(map(text.count, (",", "[", "{"))) > len(text)


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
