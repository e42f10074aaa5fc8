"""Files: written whole or not at all, known by the hash of their bytes; and the folder of the cache."""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bilevel.errors import DataError


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """The path of a new file beside `path`, which takes its place once all is written.

    shared: other processes may write the same file at the same time, so that each has a new file of its own name.
    """
    beside = path.with_name(f".{secrets.token_hex(8)}.new" if shared else f"{path.name}.new")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


SETTLED = 2_000_000_000  # ns after which another change of a file is sure to show in its time of change


_hashes: dict[tuple[int, ...], str] = {}  # of files by what changes with every change of theirs


def content_hash(path: Path) -> str:
    """SHA-256 of the file's bytes, worked out once while nobody writes to the file. Raises DataError."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            if key not in _hashes:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if time.time_ns() - state.st_ctime_ns < SETTLED:
                    return digest
                _hashes[key] = digest
            return _hashes[key]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def cache_folder() -> Path:
    """Where `datasets` has its cache; asked without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or os.path.expanduser(os.path.join(home, "datasets")))
