"""What a command leaves to the shell that started it: its exit code, and output that may lose its reader."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
READER_LEFT = 141  # 128 + SIGPIPE, as of other programs in `program | head`


def to_reader(main: Callable[[list[str]], T], argv: list[str]) -> T:
    """main(argv). If it ends with an exit code and nobody reads its output any more, exit without a traceback."""
    try:
        try:
            result = main(argv)
        except SystemExit as end:  # --help
            sys.stdout.flush()
            raise end
        if isinstance(result, int):
            sys.stdout.flush()
        return result
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends
        sys.exit(READER_LEFT)
