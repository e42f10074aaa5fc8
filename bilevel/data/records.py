"""Files of records -> checked, format-free rows in an on-disk cache.

1. patterns           -> files, sorted by source name (the file's stem)
2. JSON or JSON Lines -> records, parsed one at a time; errors name the file and the record (counted from 0)
3. Alpaca, chat, text -> rows {index, roles, contents, more, is_noisy}, cached by the file's content (Arrow), by a
                         reader per layout (bilevel.data.layouts)
"""

import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.data.cache import cached_dataset, cached_table
from bilevel.data.json_file import parse_records, read_bytes
from bilevel.data.layouts.alpaca import alpaca
from bilevel.data.layouts.conversation import CHAT_KEYS, conversation
from bilevel.data.layouts.plain_text import plain_text
from bilevel.data.layouts.values import field_names
from bilevel.data.notes import counted, line, packed
from bilevel.errors import DataError, first, short
from bilevel.files import content_hash

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import datasets
    import numpy as np
    import pyarrow

LEARNED_ROLES = ("response", "assistant", "text")
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")  # what csv files, logs and Arrow can hold
FORMULA = "=+-@"  # as the first character in a cell of weights.csv
ROWS_VERSION = 2  # part of the cache key; raise it when rows change for the same file


def find_files(patterns: list[str]) -> list[Path]:
    """All files of the patterns, sorted by stem, each once. Raises DataError listing every problem.

    A file under two names is two sources; links to it with the same name are one.
    """
    problems: list[str] = []
    files: dict[tuple[str, str], Path] = {}
    for pattern in patterns:
        # A file name may contain characters of a pattern, such as [.
        try:
            found = [pattern] if os.path.isfile(pattern) else sorted(_glob(pattern))
        except ValueError:  # a NUL or half a surrogate pair, which no name holds
            found = []
        matches = [Path(match) for match in found if os.path.isfile(match)]
        if not matches:
            problems.append(f"no file matches {short(pattern, 300)} (looked in {Path.cwd()}){_hint(pattern)}")
        for match in matches:
            files.setdefault((os.path.realpath(match), match.stem), match)
    stems: dict[str, Path] = {}
    for file in files.values():
        if not _NAME.fullmatch(str(file)):
            problems.append(f"{str(file)!r}: a name with a control character or bytes that are not UTF-8: rename it")
        if file.stem[0] in FORMULA:
            problems.append(
                f"{file}: a spreadsheet would read a name that begins with {file.stem[0]} as a formula: rename it"
            )
        if file.stem in stems:
            problems.append(f"{stems[file.stem]} and {file} would both be source {file.stem!r}: rename one")
        stems.setdefault(file.stem, file)
    if problems:
        raise DataError("; ".join(first(problems, 10)))
    return [stems[stem] for stem in sorted(stems)]


def read_rows(path: Path, format: str = "auto") -> "datasets.Dataset":
    """One row per record: index (its place in the file), roles, contents, more, is_noisy (None where unknown).

    roles are prompt, response, ... (Alpaca); system, developer, user, assistant, tool (chat); text. more is JSON, what
    a chat template needs beside roles and contents (bilevel.data.layouts.values.Row), or None. Raises DataError.
    """
    import datasets

    datasets.disable_progress_bars()
    return cached_dataset(*_cached(path, format))


def rows_table(path: Path, format: str) -> "pyarrow.Table":
    """The same rows without `datasets`, which takes a second to import. Raises DataError."""
    return cached_table(*_cached(path, format))


def most_samples(path: Path, format: str) -> float:
    """Upper limit of the file's number of samples: its records, or inf if a record can be several. Raises DataError."""
    import pyarrow
    import pyarrow.compute

    table = rows_table(path, format)
    roles = pyarrow.compute.list_flatten(table["roles"])
    learned = pyarrow.compute.is_in(roles, pyarrow.array(["response", "assistant"]))
    several = table["roles"][0].as_py() == ["text"] or pyarrow.compute.sum(learned).as_py() > table.num_rows
    return math.inf if several else table.num_rows


def row_notes(path: Path, format: str) -> list[str]:
    """Messages about the file's records for the user: fields that are not used, empty responses, repeated records."""
    import numpy as np

    table, hashes = rows_table(path, format), row_hashes(path, format)
    lines = counted(table["index"], table["notes"])
    places = np.unique(hashes, return_index=True)[1]
    if count := len(hashes) - len(places):
        again = np.ones(len(hashes), dtype=bool)
        again[places] = False
        lines.append(line(count, int(again.argmax()), "equal to an earlier record but for white space"))
    return lines


def row_hashes(path: Path, format: str) -> "np.ndarray":
    """(records,) uint64, a hash of each record's roles and texts; white space makes no difference."""
    return rows_table(path, format)["hash"].to_numpy()


def _cached(path: Path, format: str) -> tuple[str, str, Callable[["pyarrow.NativeFile"], None]]:
    """The folder and key of a file's rows in the cache, and the function that writes them."""
    content = content_hash(path)
    key = hashlib.sha256(f"{content} {format} {ROWS_VERSION} {version('datasets')}".encode()).hexdigest()[:32]
    return "rows", key, functools.partial(_write_rows, path, format, content)


def _write_rows(path: Path, format: str, content: str, sink: "pyarrow.NativeFile") -> None:
    import pyarrow

    texts = {"roles": pyarrow.list_(pyarrow.string()), "contents": pyarrow.list_(pyarrow.large_string())}
    texts |= {"more": pyarrow.large_string(), "notes": pyarrow.string()}
    schema = pyarrow.schema({"index": pyarrow.int64(), **texts, "is_noisy": pyarrow.bool_(), "hash": pyarrow.uint64()})
    rows = _rows(str(path), format, content)
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))


def _rows(path: str, format: str, content: str) -> Iterator[dict[str, Any]]:
    """The rows of a file whose bytes have the SHA-256 `content`; it is read anew here, and may have changed."""
    read = None
    for index, record in enumerate(parse_records(Path(path), read_bytes(Path(path), content))):
        where = f"{path}, record {index}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with fields, got {type(record).__name__}")
        if read is None:
            read = _READERS[_detect(record, where) if format == "auto" else format]
        row = read(record, where)
        roles, contents = zip(*row.turns, strict=True)
        is_noisy = record.get("is_noisy")
        if is_noisy is not None and not isinstance(is_noisy, bool):
            raise DataError(f"{where}: is_noisy must be true or false, got {short(is_noisy)}")
        notes = [f"{field}: not used" for field in row.unused]
        if any(role in LEARNED_ROLES and not text.strip() for role, text in row.turns):
            notes.append("a response is empty")
        more = json.dumps(row.more, ensure_ascii=False) if row.more else None
        yield {
            **{"index": index, "roles": roles, "contents": contents, "more": more, "is_noisy": is_noisy},
            **{"notes": packed(notes), "hash": _hash(roles, contents, more)},
        }
    if read is None:
        raise DataError(f"{path}: holds no record")


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


def _detect(record: dict[str, Any], where: str) -> str:
    if "instruction" in record and "output" in record:
        return "alpaca"
    if any(key in record for key in CHAT_KEYS):
        return "chat"
    if "text" in record:
        return "text"
    raise DataError(
        f"{where}: format not recognised from its fields {field_names(record)}; expected instruction and output "
        f"(alpaca), one of {', '.join(CHAT_KEYS)} (chat), or text"
    )


_READERS = {"alpaca": alpaca, "chat": conversation, "text": plain_text}


def _glob(pattern: str) -> Iterator[str]:
    """Paths that match; ** enters each real folder only once, because links can form a cycle."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern, maxsplit=1)
    if not after:
        yield from glob.glob(pattern)
        return
    entered = set()
    for top in glob.glob(before) if before else [os.curdir]:
        for folder, below, _ in os.walk(top, followlinks=True):
            real = os.path.realpath(folder)
            below[:] = [] if real in entered else [name for name in below if not name.startswith(".")]
            if real not in entered:
                entered.add(real)
                yield from _glob(os.path.join(glob.escape(folder), after[0] or "*"))


@functools.cache
def _hint(pattern: str) -> str:
    folders = (Path(pattern).parent, *Path(pattern).parents)
    folder = next((p for p in folders if os.path.isfile(p / "process.py")), None)
    return f"; run `python {folder}/process.py` first" if folder else ""
