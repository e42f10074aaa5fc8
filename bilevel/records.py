"""Files of records -> checked, format-free rows in an on-disk cache.

1. patterns           -> files, sorted by source name (the file's stem)
2. JSON or JSON Lines -> records; each is checked, and errors name the file and the record (counted from 0)
3. Alpaca, chat, text -> rows {index, roles, contents, is_noisy}, cached by the file's content (`datasets`)
"""

import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from bilevel.config import UserError

FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "roles": datasets.List(datasets.Value("string")),
        "contents": datasets.List(datasets.Value("large_string")),
        "is_noisy": datasets.Value("bool"),
    }
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CHAT_KEYS = ("messages", "conversations", "items")
ROWS_VERSION = 1  # part of the cache key; raise it when rows change for the same file


class DataError(UserError):
    """A data file that cannot be used; the message names the file and the record."""


def find_files(patterns: list[str]) -> list[Path]:
    """All files of the patterns, sorted by stem, each once. Raises DataError listing every problem."""
    problems: list[str] = []
    files: dict[str, Path] = {}
    for pattern in patterns:
        # A file's own name may hold what means something in a pattern, such as [.
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        matches = [Path(match) for match in found if Path(match).is_file()]
        if not matches:
            problems.append(f"no file matches {pattern!r} (looked in {Path.cwd()}){_hint(pattern)}")
        for match in matches:
            files.setdefault(os.path.abspath(match), match)
    stems: dict[str, Path] = {}
    for file in files.values():
        if file.stem in stems:
            problems.append(f"{stems[file.stem]} and {file} would both be source {file.stem!r}: rename one")
        stems.setdefault(file.stem, file)
    if problems:
        raise DataError("; ".join(problems))
    return [stems[stem] for stem in sorted(stems)]


def read_rows(path: Path, format: str = "auto") -> datasets.Dataset:
    """One row per record: index (its place in the file), roles, contents, is_noisy (None where unknown).

    roles are prompt, response (Alpaca); system, user, assistant (chat); text. Raises DataError.
    """
    try:
        digest = hashlib.sha256(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    digest.update(f"{format} {ROWS_VERSION} {datasets.__version__}".encode())
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=FEATURES,
            gen_kwargs={"path": str(path), "format": format},
            fingerprint=digest.hexdigest()[:32],
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _rows(path: str, format: str) -> Iterator[dict[str, Any]]:
    convert = None
    for index, record in enumerate(_records(Path(path))):
        where = f"{path}, record {index}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with fields, got {type(record).__name__}")
        if convert is None:
            convert = _CONVERTERS[_detect(record, where) if format == "auto" else format]
        roles, contents = zip(*convert(record, where), strict=True)
        is_noisy = record.get("is_noisy")
        if is_noisy is not None and not isinstance(is_noisy, bool):
            raise DataError(f"{where}: is_noisy must be true or false, got {is_noisy!r}")
        yield {"index": index, "roles": roles, "contents": contents, "is_noisy": is_noisy}
    if convert is None:
        raise DataError(f"{path}: holds no record")


def _records(path: Path) -> Iterator[Any]:
    """Records of a JSON array or of JSON Lines, told apart by the first character."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.lstrip().startswith("["):
        yield from _parse(text, path)
        return
    lines = (line for line in text.split("\n") if line.strip())
    for index, line in enumerate(lines):
        yield _parse(line, path, index)


def _parse(text: str, path: Path, index: int | None = None) -> Any:
    """The record on line `index`, or with None all records of an array."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if index is None else f"column {error.colno}"
        record = _complete_before(text, error.pos) if index is None else index
        raise DataError(
            f"{path}, record {record}: not JSON ({error.msg} at {place}); "
            "expected a JSON array of records or one record per line"
        ) from None
    except (RecursionError, ValueError) as error:  # too many brackets, too many digits
        where = str(path) if index is None else f"{path}, record {index}"
        raise DataError(f"{where}: cannot be read ({error})") from None


def _complete_before(text: str, position: int) -> int:
    """Number of records of a JSON array that end before `position`, where it stops being JSON."""
    decoder, count, end = json.JSONDecoder(), 0, text.index("[") + 1
    while True:
        try:
            _, end = decoder.raw_decode(text, re.compile(r"[\s,]*").match(text, end).end())
        except json.JSONDecodeError:
            return count
        if end > position:
            return count
        count += 1


def _detect(record: dict[str, Any], where: str) -> str:
    if "instruction" in record and "output" in record:
        return "alpaca"
    if any(key in record for key in CHAT_KEYS):
        return "chat"
    if "text" in record:
        return "text"
    raise DataError(
        f"{where}: format not recognised from its fields {sorted(record)}; expected instruction and output "
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
        raise DataError(f"{where}: {key} must be a list of messages, got {_short(messages)}")
    turns = []
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{place}: expected an object, got {_short(message)}")
        speaker, content = ("role", "content") if "role" in message else ("from", "value")
        role = _text(message, speaker, place)
        if role not in ROLES:
            raise DataError(f"{place}: unknown {speaker} {role!r}; known are {', '.join(ROLES)}")
        turns.append((ROLES[role], _text(message, content, place)))
    if all(role != "assistant" for role, _ in turns):
        raise DataError(f"{where}: no message from the assistant, nothing to learn")
    return turns


def _plain(record: dict[str, Any], where: str) -> list[tuple[str, str]]:
    return [("text", _text(record, "text", where))]


_CONVERTERS = {"alpaca": _alpaca, "chat": _chat, "text": _plain}


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; it has {sorted(record)}")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} must be text, got {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair, which is no text") from None
    return value


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _hint(pattern: str) -> str:
    folder = next((p for p in (Path(pattern).parent, *Path(pattern).parents) if (p / "process.py").is_file()), None)
    return f"; run `python {folder}/process.py` first" if folder else ""
