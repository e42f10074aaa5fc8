"""Files of records -> checked, format-free rows in an on-disk cache.

1. patterns           -> files, sorted by source name (the file's stem)
2. JSON or JSON Lines -> records, parsed one at a time; errors name the file and the record (counted from 0)
3. Alpaca, chat, text -> rows {index, roles, contents, is_noisy}, cached by the file's content (Arrow)
"""

import functools
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.data.cache import cached_dataset, cached_table
from bilevel.data.json_file import parse_records, read_bytes
from bilevel.errors import DataError, first, short
from bilevel.files import content_hash

if TYPE_CHECKING:  # imported where it is used: it takes a second, and mistakes are told at once
    import datasets
    import pyarrow

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CHAT_KEYS = ("messages", "conversations", "items")
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")  # what csv files, logs and Arrow can hold
FORMULA = "=+-@"  # as the first character in a cell of weights.csv
_SURROGATE = re.compile(r"[\ud800-\udfff]")
ROWS_VERSION = 1  # part of the cache key; raise it when rows change for the same file


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
    """One row per record: index (its place in the file), roles, contents, is_noisy (None where unknown).

    roles are prompt, response (Alpaca); system, user, assistant (chat); text. Raises DataError.
    """
    import datasets

    datasets.disable_progress_bars()
    return cached_dataset(*_cached(path, format))


def rows_table(path: Path, format: str) -> "pyarrow.Table":
    """The same rows without `datasets`, which takes a second to import. Raises DataError."""
    return cached_table(*_cached(path, format))


def count_rows(path: Path, format: str) -> tuple[int, list[str]]:
    """The number of rows of a file and the roles of the first. Raises DataError."""
    table = rows_table(path, format)
    return table.num_rows, table["roles"][0].as_py()


def _cached(path: Path, format: str) -> tuple[str, str, Callable[["pyarrow.NativeFile"], None]]:
    """Where the cache has a file's rows, by all that they depend on, and what writes them."""
    content = content_hash(path)
    key = hashlib.sha256(f"{content} {format} {ROWS_VERSION} {version('datasets')}".encode()).hexdigest()[:32]
    return "rows", key, functools.partial(_write_rows, path, format, content)


def _write_rows(path: Path, format: str, content: str, sink: "pyarrow.NativeFile") -> None:
    import pyarrow

    texts = {"roles": pyarrow.list_(pyarrow.string()), "contents": pyarrow.list_(pyarrow.large_string())}
    schema = pyarrow.schema({"index": pyarrow.int64(), **texts, "is_noisy": pyarrow.bool_()})
    rows = _rows(str(path), format, content)
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))


def _rows(path: str, format: str, content: str) -> Iterator[dict[str, Any]]:
    """The rows of a file whose bytes have the SHA-256 `content`; it is read anew here, and may have changed."""
    convert = None
    for index, record in enumerate(parse_records(Path(path), read_bytes(Path(path), content))):
        where = f"{path}, record {index}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with fields, got {type(record).__name__}")
        if convert is None:
            convert = _CONVERTERS[_detect(record, where) if format == "auto" else format]
        roles, contents = zip(*convert(record, where), strict=True)
        is_noisy = record.get("is_noisy")
        if is_noisy is not None and not isinstance(is_noisy, bool):
            raise DataError(f"{where}: is_noisy must be true or false, got {short(is_noisy)}")
        yield {"index": index, "roles": roles, "contents": contents, "is_noisy": is_noisy}
    if convert is None:
        raise DataError(f"{path}: holds no record")


def _detect(record: dict[str, Any], where: str) -> str:
    if "instruction" in record and "output" in record:
        return "alpaca"
    if any(key in record for key in CHAT_KEYS):
        return "chat"
    if "text" in record:
        return "text"
    raise DataError(
        f"{where}: format not recognised from its fields {_fields(record)}; expected instruction and output "
        f"(alpaca), one of {', '.join(CHAT_KEYS)} (chat), or text"
    )


def _alpaca(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """The prompt of an Alpaca record under our headings, and its response."""
    instruction, response = _text(record, "instruction", where), _text(record, "output", where)
    extra = "" if record.get("input") is None else _text(record, "input", where)
    parts = [("Instruction", instruction)] + ([("Input", extra)] if extra else [])
    prompt = "".join(f"### {title}:\n{content}\n\n" for title, content in parts) + "### Response:\n"
    return [("prompt", prompt), ("response", response)]


def _chat(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    key = next((key for key in CHAT_KEYS if key in record), None)
    if key is None:
        raise DataError(f"{where}: no {' or '.join(CHAT_KEYS)} field")
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {key} must be a list of messages, got {_typed(messages)}")
    turns = []
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{place}: expected an object, got {_typed(message)}")
        speaker, content = ("role", "content") if "role" in message else ("from", "value")
        role = _text(message, speaker, place)
        if role not in ROLES:
            raise DataError(f"{place}: unknown {speaker} {short(role)}; known are {', '.join(ROLES)}")
        turns.append((ROLES[role], _text(message, content, place)))
    if all(role != "assistant" for role, _ in turns):
        raise DataError(f"{where}: no message from the assistant, nothing to learn")
    return turns


def _plain(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    return [("text", _text(record, "text", where))]


_CONVERTERS = {"alpaca": _alpaca, "chat": _chat, "text": _plain}


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; it has {_fields(record)}")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} must be text, got {_typed(value)}")
    if _SURROGATE.search(value):
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair, which is no text")
    return value


def _fields(record: dict[str, Any]) -> str:
    return short(sorted(record), 200)


def _typed(value: Any) -> str:
    return f"{type(value).__name__} {short(value)}"


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
