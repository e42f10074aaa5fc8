"""Tables in the cache: read if whole, rebuilt with a message if damaged, kept in memory if the cache is not writable.

    <cache>/rows/<key>/<SHA-256 of the file's bytes>.arrow        key: all that the table depends on
    <cache>/tokens/<key>/<SHA-256 of the file's bytes>.arrow

A file is synced before it gets its name, and the name is the hash of its bytes. A file that is empty, cut short, zeroed
or changed is therefore never read as data.
"""

import contextlib
import fcntl
import functools
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.data.workers import each_for_itself
from bilevel.errors import plain
from bilevel.files import cache_folder, file_hash, fresh_file, sync

if TYPE_CHECKING:  # imported where they are used: they take a second, and mistakes are told at once
    import datasets
    import numpy as np
    import pyarrow

log = logging.getLogger("bilevel")

ROWS = 1000  # in a chunk
LARGE = 1 << 20  # bytes or characters after which a chunk ends
PATIENCE = 20.0  # seconds before a process says that it waits for another
_NAME = re.compile(r"[0-9a-f]{64}\.arrow")


def cached_file(kind: str, key: str, write: Callable[[Path], object]) -> Path | None:
    """A whole file of the cache, made by `write` if missing; None, with a message, if the cache cannot be used.

    Of all processes that need it at the same time, one makes it and the others wait.
    """
    folder = cache_folder() / kind / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if whole := _whole(folder, _say):
            return whole
        if kind == "tokens":
            _say_apart()
        with _alone(folder), fresh_file(folder) as new:
            if whole := _whole(folder, lambda _: None):
                return whole
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


def _whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The file in a folder of the cache that is whole."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name):
            if problem := _damage(path):
                say(f"{path} in the cache {problem}: it is made anew")
            else:
                return path
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with its process; without effect on file systems that lock no folders."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        begin, said = time.monotonic(), False
        while not _locked(descriptor):
            if time.monotonic() - begin > PATIENCE and not said:
                _say(f"waiting for another process on this machine that is making {folder}")
                said = True
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether nobody else holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def say_unusable(error: OSError) -> None:
    """Tell the user that the run does without the cache."""
    _say(f"the cache {plain(str(cache_folder()), 300)} cannot be used ({error}): going on without it, in memory")


@functools.cache
def _say_apart() -> None:
    """Tell the user, once on each host, that the main process has made a file where this host does not see it."""
    if os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0":
        log.warning(
            f"host {socket.gethostname()} does not share the cache {plain(str(cache_folder()), 300)} with the main "
            "process, so it tokenises all data itself; to do it once, set HF_DATASETS_CACHE to a folder that all hosts "
            "share, or run bilevel.prepare on each host before"
        )


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
    with each_for_itself():
        write(sink)
    return pyarrow.ipc.open_stream(sink.getvalue()).read_all()


def cached_table(kind: str, key: str, write: Write) -> "pyarrow.Table":
    """The table that `write` writes, mapped from the cache if it can be."""
    import pyarrow

    if (file := _on_disk(kind, key, write)) is None:
        return _in_memory(write)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()


def cached_dataset(kind: str, key: str, write: Write) -> "datasets.Dataset":
    """The same as a dataset, whose fingerprint is the key."""
    import datasets

    file, kinds = _on_disk(kind, key, write), datasets.table
    mapped = kinds.InMemoryTable(_in_memory(write)) if file is None else kinds.MemoryMappedTable.from_file(str(file))
    return datasets.Dataset(mapped, fingerprint=key)


def write_selected(table: "pyarrow.Table", places: "np.ndarray", sink: "pyarrow.NativeFile") -> None:
    """Write the rows at these places, which rise, in batches of ROWS, or fewer if they are long.

    The table is read batch by batch, because Table.take would copy all of it.
    """
    import numpy as np
    import pyarrow

    places, held = places.astype(np.int64), []
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:

        def write() -> None:
            if held:
                writer.write_table(pyarrow.Table.from_batches(held).combine_chunks())
                held.clear()

        end = 0
        for batch in table.to_batches():
            start, end = end, end + batch.num_rows
            first, last = np.searchsorted(places, (start, end))
            if first < last:
                held.append(batch.take(pyarrow.array(places[first:last] - start)))
                if sum(part.num_rows for part in held) >= ROWS or sum(part.nbytes for part in held) >= LARGE:
                    write()
        write()
