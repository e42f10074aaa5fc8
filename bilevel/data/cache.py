"""Tables in the cache: read if whole, rebuilt with a message if damaged, kept in memory if the cache is not writable.

    <cache>/rows/<key>/<SHA-256 of the file's bytes>.arrow        key: all that the table depends on
    <cache>/tokens/<key>/<SHA-256 of the file's bytes>.arrow

A file is synced before it gets its name, and the name is the hash of its bytes. A file that is empty, cut short, zeroed
or changed is therefore never read as data.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.errors import plain
from bilevel.files import cache_folder, file_hash, fresh_file, sync

if TYPE_CHECKING:  # imported where they are used: they take a second, and mistakes are told at once
    import datasets
    import pyarrow

log = logging.getLogger("bilevel")

_NAME = re.compile(r"[0-9a-f]{64}\.arrow")


def cached_file(kind: str, key: str, write: Callable[[Path], object]) -> Path | None:
    """A whole file of the cache, made by `write` if missing; None, with a message, if the cache cannot be used."""
    folder = cache_folder() / kind / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                if problem := _damage(path):
                    _say(f"{path} in the cache {problem}: it is made anew")
                else:
                    return path
        with fresh_file(folder) as new:
            write(new)
            sync(new)
            path = folder / f"{file_hash(new)}.arrow"
            for damaged in filter(lambda other: _NAME.fullmatch(other.name), folder.iterdir()):
                if _damage(damaged):
                    with contextlib.suppress(OSError):  # it may belong to another user; it is never read
                        damaged.unlink()
            new.rename(path)
            sync(folder)
            return path
    except OSError as error:
        say_unusable(error)
        return None


def say_unusable(error: OSError) -> None:
    """Tell the user that the run does without the cache."""
    _say(f"the cache {plain(str(cache_folder()), 300)} cannot be used ({error}): going on without it, in memory")


def _say(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        log.warning(words)


def _damage(path: Path) -> str | None:
    """A problem with a file whose name is its hash, in words; None if the file is whole."""
    try:
        return None if file_hash(path) == path.stem else "is damaged"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


Write = Callable[["pyarrow.NativeFile"], None]  # writes an Arrow stream


def _on_disk(kind: str, key: str, write: Write) -> Path | None:
    import pyarrow

    def to_file(new: Path) -> None:
        with pyarrow.OSFile(str(new), "wb") as sink:
            write(sink)

    return cached_file(kind, key, to_file)


def _in_memory(write: Write) -> "pyarrow.Table":
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    write(sink)
    return pyarrow.ipc.open_stream(sink.getvalue()).read_all()


def cached_table(kind: str, key: str, write: Write) -> "pyarrow.Table":
    """The table that `write` writes, mapped from the cache if it can be."""
    import pyarrow

    if (file := _on_disk(kind, key, write)) is None:
        return _in_memory(write)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()


def mapped_dataset(file: Path, fingerprint: str) -> "datasets.Dataset":
    """An Arrow file as a dataset, mapped from the disk."""
    import datasets

    return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(file)), fingerprint=fingerprint)
