"""Files of records -> checked, format-free rows in an on-disk cache.

1. patterns           -> files, sorted by source name (the file's stem)
2. JSON or JSON Lines -> records, parsed one at a time; errors name the file and the record (counted from 0)
3. Alpaca, chat, text -> rows {index, roles, contents, more, is_noisy}, cached by the file's content (Arrow), by a
                         reader per layout (bilevel.data.layouts)
"""

import array
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.data.json_file import parse_records, read_bytes
from bilevel.data.layouts.alpaca import alpaca
from bilevel.data.layouts.conversation import CHAT_KEYS, conversation
from bilevel.data.layouts.plain_text import plain_text
from bilevel.data.layouts.values import field_names
from bilevel.data.notes import Notes
from bilevel.errors import DataError, first, short
from bilevel.files import cache_folder, content_hash, whole_file

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import datasets
    import numpy as np

LEARNED_ROLES = ("response", "assistant", "text")
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")  # what csv files, logs and Arrow can hold
ROWS_VERSION = 2  # part of the cache key; raise it when rows change for the same file


def find_files(patterns: list[str]) -> list[Path]:
    """All files of the patterns, sorted by stem, each once. Raises DataError listing every problem.

    One file under two names is two sources; links that lead to it by the same name are one.
    """
    problems: list[str] = []
    files: dict[tuple[str, str], Path] = {}
    for pattern in patterns:
        # A file's own name may hold what means something in a pattern, such as [.
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
    file = cached_rows(path, format)
    return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(file)), fingerprint=file.parent.name)


def most_samples(path: Path, format: str) -> float:
    """How many samples the file can become: its records, or no limit where one can be several. Raises DataError."""
    import pyarrow
    import pyarrow.compute

    with pyarrow.memory_map(str(cached_rows(path, format))) as file:
        table = pyarrow.ipc.open_stream(file).read_all()
        roles = pyarrow.compute.list_flatten(table["roles"])
        learned = pyarrow.compute.is_in(roles, pyarrow.array(["response", "assistant"]))
        several = table["roles"][0].as_py() == ["text"] or pyarrow.compute.sum(learned).as_py() > table.num_rows
        return math.inf if several else table.num_rows


def row_notes(path: Path, format: str) -> Notes:
    """What was worth saying when the file was read: fields that are not used, empty responses, repeated records."""
    return Notes.read(cached_rows(path, format).with_name("notes.json"))


def row_hashes(path: Path, format: str) -> "np.ndarray":
    """(records,) uint64, a hash of each record's roles and texts; white space makes no difference."""
    import numpy as np

    return np.fromfile(cached_rows(path, format).with_name("hashes"), dtype=np.uint64)


def cached_rows(path: Path, format: str) -> Path:
    """The Arrow file of the rows, in a folder named by all that they depend on; written when there is none."""
    content = content_hash(path)
    key = hashlib.sha256(f"{content} {format} {ROWS_VERSION} {version('datasets')}".encode()).hexdigest()[:32]
    file = cache_folder() / "rows" / key / "rows.arrow"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(path, format, content, file)
    return file


def _write_rows(path: Path, format: str, content: str, file: Path) -> None:
    """The rows, and before them what is kept beside them, so that whoever finds the rows finds all."""
    import pyarrow

    texts = {"roles": pyarrow.list_(pyarrow.string()), "contents": pyarrow.list_(pyarrow.large_string())}
    schema = pyarrow.schema(
        {"index": pyarrow.int64(), **texts, "more": pyarrow.large_string(), "is_noisy": pyarrow.bool_()}
    )
    notes, hashes = Notes(), array.array("Q")
    rows = _rows(str(path), format, content, notes)
    with (
        whole_file(file, shared=True) as new,
        pyarrow.OSFile(str(new), "wb") as sink,
        pyarrow.ipc.new_stream(sink, schema) as writer,
    ):
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            hashes.extend(_hash(row) for row in batch)
        _count_repeated(hashes, notes)
        with whole_file(file.with_name("hashes"), shared=True) as beside:
            beside.write_bytes(hashes.tobytes())
        notes.write(file.with_name("notes.json"))


def _rows(path: str, format: str, content: str, notes: Notes) -> Iterator[dict[str, Any]]:
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
        notes.update((f"{field}: not used" for field in row.unused), index)
        if any(role in LEARNED_ROLES and not text.strip() for role, text in row.turns):
            notes.add("a response is empty", index)
        more = json.dumps(row.more, ensure_ascii=False) if row.more else None
        yield {"index": index, "roles": roles, "contents": contents, "more": more, "is_noisy": is_noisy}
    if read is None:
        raise DataError(f"{path}: holds no record")


def _hash(row: dict[str, Any]) -> int:
    """64 bits of a hash of a row's roles and texts, in which all white space is alike."""
    parts = (*row["roles"], *(" ".join(text.split()) for text in row["contents"]), row["more"] or "")
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest())


def _count_repeated(hashes: array.array, notes: Notes) -> None:
    """Note how many records are the same as an earlier one."""
    import numpy as np

    places = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_index=True)[1]
    if count := len(hashes) - len(places):
        again = np.ones(len(hashes), dtype=bool)
        again[places] = False
        notes.found["equal to an earlier record but for white space"] = [count, int(again.argmax())]


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
    """Paths that match; ** enters each real folder once, as links may lead in circles."""
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
