"""What a place of records is (a file of some kind, a saved dataset, a dataset of the hub), its hash and its records."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bilevel.data.containers import arrow, csv_text, hub, json_text
from bilevel.data.containers.stream import COMPRESSED, open_hashed
from bilevel.errors import DataError
from bilevel.files import content_hash

Item = tuple[Any, str]  # a record, or the DataError that says why it cannot be read, and its text
SAVED = re.compile(r":[\w.-]+$")  # the split at the end of a saved dataset's place
_PLAIN = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ENDINGS = (*_PLAIN, ".parquet", ".arrow", *(plain + packed for plain in _PLAIN for packed in COMPRESSED))


def stem_of(place: str) -> str:
    """The name of a file without its ending, and without that of its compression."""
    path = Path(SAVED.sub("", place) if holds_saved(place) else place)
    stem = Path(path.stem).stem if path.suffix in COMPRESSED and path.name.endswith(ENDINGS) else path.stem
    return path.name if path.is_dir() else stem


def holds_saved(place: str) -> bool:
    """Whether this is a folder that datasets' save_to_disk wrote, perhaps with :split."""
    return any(
        os.path.isfile(os.path.join(folder, name))
        for folder in (place, SAVED.sub("", place))
        for name in ("state.json", "dataset_dict.json")
    )


def content_of(place: str) -> str:
    """SHA-256 of a file's bytes, or of all that a dataset's files hold. Raises DataError."""
    if place.startswith(hub.PREFIX):
        return _together(place, hub.files(place))
    if holds_saved(place):
        return _together(place.rpartition("/")[2], arrow.saved_files(place))
    return content_hash(Path(place))


def items(place: str, content: str) -> Iterator[Item]:
    """All records of a place in order, each with its own text. Raises DataError for the file as a whole.

    content: content_of the place; if it has changed since, that is an error.
    """
    for index, record in enumerate(unparsed(place, content)):
        yield parsed(record, index)


def parsed(record: bytes | Item, index: int) -> Item:
    """A record of `unparsed`, and its own text; index: its place."""
    return json_text.parsed(record, index) if isinstance(record, bytes) else record


def length_of(place: str) -> int | None:
    """Bytes of a file that is read from its beginning to its end; None for other places."""
    plain = not place.startswith(hub.PREFIX) and not holds_saved(place) and arrow.kind_of(Path(place)) is None
    return os.path.getsize(place) if plain else None


def unparsed(place: str, content: str, seen: Callable[[int], object] = lambda count: None) -> Iterator[bytes | Item]:
    """The same records, but each line of JSON Lines is still to be parsed.

    seen: called with the number of bytes that have been read since the last call, where length_of is not None.
    """
    if place.startswith(hub.PREFIX):
        yield from arrow.dataset_items(hub.load(place))
    elif holds_saved(place):
        yield from arrow.dataset_items(arrow.load_saved(place))
    elif (kind := arrow.kind_of(Path(place))) is not None:
        yield from arrow.file_items(Path(place), kind)
    else:
        path = Path(place)
        with open_hashed(path, content, seen) as file:
            name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
            table = name.endswith((".csv", ".tsv"))
            yield from (csv_text.items if table else json_text.unparsed)(file, path)
        return
    if content_of(place) != content:
        raise DataError(f"{place}: changed while it was read; start again when it is complete")


def _together(name: str, files: list[str]) -> str:
    """One hash for the content of several files."""
    hashes = [name, *(content_hash(Path(file)) for file in files)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
