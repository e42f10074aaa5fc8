"""What a test of the default suite may cost: it starts no interpreter, shell or browser, and takes little time.

A plugin of conftest.py. Every run checks what is started. The time depends on the machine and on what else it does, so
it is checked only on demand: `python -m pytest --processor-limit 4` on an idle machine.
"""

import contextlib
import logging
import os
import resource
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

STARTS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"}  # sys.audit's names
COSTLY = ("python", "bash", "torchrun", "deepspeed", "chrom")  # libraries start others, which take milliseconds
LIGHT = "bilevel.data.renderer"  # renders chat templates: a tenth of a second
AT_THE_START = pytest.StashKey[float]()
WARM = pytest.StashKey[bool]()
started: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor-limit",
        type=float,
        metavar="SECONDS",
        help="fail a test that is not marked slow and takes more processor time, its fixtures included",
    )


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(_note)


def _note(event: str, arguments: tuple) -> None:
    """Remember the costly programs that are started."""
    if event in STARTS:
        command = arguments[1] if event == "subprocess.Popen" else arguments[:1]
        words = command if isinstance(command, (list, tuple)) else str(os.fspath(command)).split()
        program = os.path.basename(os.fsdecode(words[0]))
        if program.startswith(COSTLY) and LIGHT not in os.fsdecode(words[-1]):
            started.append(program)


def processor_seconds() -> float:
    """Used so far by this process and by the children it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    _warm_up(item.config)
    started.clear()
    item.stash[AT_THE_START] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    result = yield
    if item.get_closest_marker("slow") is None:
        used = processor_seconds() - item.stash[AT_THE_START]
        limit = item.config.getoption("--processor-limit")
        if started:
            pytest.fail(f"starts {', '.join(started)}: mark it slow, or call the program's main here", pytrace=False)
        if limit and used > limit:
            pytest.fail(f"took {used:.1f} s of processor time, limit {limit:g}: make it smaller or mark it slow", False)
    return result


def _warm_up(config: pytest.Config) -> None:
    """Where time is limited, import what a run imports late, so that it does not count for the first test."""
    if config.getoption("--processor-limit") and not config.stash.get(WARM, False):
        from run_helpers import make_data, train

        config.stash[WARM] = True
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            train(make_data(Path(folder) / "data"), Path(folder) / "run", max_steps=1)
        logging.getLogger("bilevel").handlers = []
