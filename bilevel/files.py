"""Write files whole or not at all, read only regular files, and hash their bytes."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bilevel.errors import DataError


@contextmanager
def fresh_file(folder: Path) -> Iterator[Path]:
    """The path of a new, empty file in a folder, which is removed at the end unless it has been renamed.

    Its name is random and it is created exclusively, so no other file is ever opened or renamed over.
    """
    path = folder / f".{secrets.token_hex(8)}{UNFINISHED}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """The path of a new file beside `path`, which is renamed to `path` once it has been written and synced.

    An error removes it and leaves `path` as it was.

    replace: whether a file at `path` may be replaced; if not, it raises FileExistsError.
    """
    with fresh_file(path.parent) as beside:
        yield beside
        sync(beside)
        if replace:
            beside.replace(path)
        else:
            move(beside, path)


UNFINISHED = ".new"  # ends the name of a file that is being written
_LEFT = re.compile(r"\.[0-9a-f]{16}\.new|\.tmp[0-9A-Za-z]{6}")


def is_unfinished(name: str) -> bool:
    """Whether this is the name of a file left by a writer that was killed: by fresh_file, or by safetensors."""
    return _LEFT.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove the files that killed writers have left in a folder of ours."""
    for path in folder.iterdir():
        if is_unfinished(path.name) and stat.S_ISREG(path.lstat().st_mode):
            path.unlink()


def move(file: Path, to: Path) -> None:
    """Rename a file; raises FileExistsError if there is anything at the new place."""
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if os.path.lexists(to):  # a file system without hard links
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to)) from None
        file.rename(to)
    else:
        file.unlink()


def sync(path: Path) -> None:
    """Return when all that was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open for reading. Raises OSError for a device or a FIFO, which may never end."""
    _check_regular(os.stat(path).st_mode, path)  # opening a device can have effects of its own
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        _check_regular(os.fstat(descriptor).st_mode, path)
        undo.pop_all()
    return open(descriptor, "rb")


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


SETTLED = 2_000_000_000  # ns: after that time, another change of a file is sure to change its ctime


_hashes: dict[tuple[int, ...], str] = {}  # hash of a file by values that differ after every change of the file


def file_hash(path: Path) -> str:
    """SHA-256 of a regular file's bytes; computed once as long as nobody writes to the file. Raises OSError."""
    with open_regular(path) as file:
        state = os.fstat(file.fileno())
        key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if key not in _hashes:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time_ns() - state.st_ctime_ns < SETTLED:
                return digest
            _hashes[key] = digest
        return _hashes[key]


def content_hash(path: Path) -> str:
    """file_hash of a data file. Raises DataError."""
    try:
        return file_hash(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def cache_folder() -> Path:
    """The cache folder of `datasets`, found without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or os.path.expanduser(os.path.join(home, "datasets")))
