"""Files that are whole or as before, whenever a process is killed or a disk is full."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
