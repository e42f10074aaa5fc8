"""The lock on a run's folder: the file `lock` names the one process that may write there.

    <folder>/lock     bilevel: process 4711 on node3

The file is locked (flock) while its process lives, so the file of a killed process blocks nobody. It is removed when
the run has finished. A folder with weights.csv and a lock is of a run that was ended while it wrote its last files.
"""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from bilevel.errors import UserError, plain
from bilevel.files import open_regular, whole_file

NAME = "lock"
MARK = b"bilevel: "  # begins every lock file
TRIES, PAUSE = 5, 0.05  # another start that looks at a lock holds it for a moment (seconds)


def hold(folder: Path) -> IO[bytes] | None:
    """Lock a run's folder as long as the returned file stays open; None if another process has it.

    Raises UserError if the folder has a file of this name that no run has written, which stays as it is.
    """
    path = folder / NAME
    for _ in range(TRIES):
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError), whole_file(path, replace=False) as new:
                new.write_bytes(_owner())
        try:
            _read(folder).close()
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), "r+b", buffering=0)
        except FileNotFoundError:
            continue  # the run that had it has just finished
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                file.write(_owner())
                file.truncate()
                return file
        file.close()
        time.sleep(PAUSE)
    return None


def at_work(folder: Path) -> str | None:
    """A message that names the process that has the folder; None if there is none. Writes nothing.

    Raises UserError if the folder has a file `lock` that no run has written.
    """
    try:
        file = _read(folder)
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(len(MARK))
            owner = file.readline(300).decode(errors="replace").strip()
            return (
                f"a process is still at work in {folder}: {plain(owner, 300)}. Wait for it, end it there with kill, or "
                "give another run_name or output_dir"
            )
    return None


def _read(folder: Path) -> IO[bytes]:
    """The folder's lock file, open for reading. Raises UserError if no run has written it, FileNotFoundError."""
    path = folder / NAME
    if path.is_symlink():
        raise _foreign(path)
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _foreign(path) from error
    if file.read(len(MARK)) != MARK:
        file.close()
        raise _foreign(path)
    return file


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} is there and was not written by a run; give another output_dir, or move that file away")


def _owner() -> bytes:
    return MARK + f"process {os.getpid()} on {socket.gethostname()}\n".encode()
