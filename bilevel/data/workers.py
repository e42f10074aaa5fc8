"""One function over many chunks in several processes, with the results in the order of the chunks.

The processes are forks: they share what is loaded, so each takes little memory and starts at once. They end with the
process that started them, however that ends.
"""

import collections
import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from bilevel.errors import UserError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

MOST = 16  # processes; the one that reads and writes is busy with as many
_at_once = 1
ALONE = 4  # chunks that this process does itself: a small input is done before other processes would have started


def in_order(function: Callable[[Chunk], Result], chunks: Iterable[Chunk]) -> Iterator[Result]:
    """function(chunk) for each chunk. Raises UserError if a process is killed, and what the function raises.

    Chunks and results must be picklable; the function need not be.
    """
    left, count = iter(chunks), processes()
    for number, chunk in enumerate(left):
        yield function(chunk)
        if number + 1 == ALONE and count > 1:
            break
    yield from _shared_out(function, left, count)


def processes() -> int:
    """Number of processes for a large input: one for each processor that this process may use, at most MOST."""
    free = min(MOST, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1
    return max(1, free // beside_others())


def beside_others() -> int:
    """Number of processes of this machine that do the same work at the same time, this one included."""
    return _at_once


@contextlib.contextmanager
def each_for_itself() -> Iterator[None]:
    """A block that every process of the run on this machine goes through, each for itself."""
    global _at_once
    before, _at_once = _at_once, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        yield
    finally:
        _at_once = before


def _shared_out(function: Callable[[Chunk], Result], chunks: Iterator[Chunk], count: int) -> Iterator[Result]:
    waiting = collections.deque()
    with contextlib.ExitStack() as ends:
        pool = None
        for chunk in chunks:
            if pool is None:
                context = multiprocessing.get_context("fork")
                pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(function,))
                ends.callback(pool.shutdown, cancel_futures=True)
            with _errors():
                waiting.append(pool.submit(_call, chunk))
            if len(waiting) > 2 * count:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(future: "object") -> Result:
    with _errors():
        return future.result()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """A context that turns the end of a process into UserError."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            "a process that read or tokenised records was killed, perhaps because memory was short; nothing of it was "
            "kept: start again, on fewer processors (taskset -c 0 COMMAND uses one) if memory is short"
        ) from None


_function: Callable


def _begin(function: Callable) -> None:
    """Called in each new process."""
    global _function
    _function = function
    gc.freeze()  # what is shared stays shared: the collector would write to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not exist in a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(chunk: Chunk) -> Result:
    return _function(chunk)
