"""A disk that is full, or read-only, from the n-th write of a run on: a message, and the same command ends it as usual.

root may write everywhere, so writes are counted and refused by a hook. A few n are taken; for all from 1 on:

    NTH_WRITE=1 python -m pytest tests/run/test_nth_write.py
"""

import errno
import filecmp
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import make_data, settings, train

import train_bilevel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_old_log")]

RUN = {"max_steps": 4, "save_every": 2, "eval_every": 2, "max_length": 64, "global_batch_size": 4, "val_batch_size": 4}
WRITING = {"os.mkdir", "os.rename", "os.link", "os.truncate", "os.symlink"}
REMOVING = {"os.remove", "os.rmdir"}
FULL, NO_ROOM, READ_ONLY = "files cannot grow", "nothing can be opened", "nothing can be changed"
SAID = {FULL: "File too large", NO_ROOM: "No space left", READ_ONLY: "Read-only file system"}


class Disk:
    """Counts what is opened for writing, made and renamed below a folder; from one on, the disk fails in a way.

    FULL: no file can grow (a limit of the system, which holds for libraries that are not Python, too). NO_ROOM: no file
    can be opened for writing, or made. READ_ONLY: nor can any be removed.
    """

    def __init__(self) -> None:
        self.folder, self.from_nth, self.way, self.count = "", 0, NO_ROOM, 0

    def watch(self, folder: Path, from_nth: int = sys.maxsize, way: str = NO_ROOM) -> None:
        self.folder, self.from_nth, self.way, self.count = str(folder), from_nth, way, 0

    def work_again(self) -> None:
        self.folder = ""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def hear(self, event: str, arguments: tuple) -> None:
        """An audit hook: what raises here does not happen."""
        if not self.folder or not arguments or not str(arguments[0]).startswith(self.folder):
            return
        if event in WRITING or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.count += 1
        elif event not in REMOVING or self.way != READ_ONLY:
            return
        if self.count < self.from_nth:
            return
        if self.way == FULL:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        else:
            number = errno.EROFS if self.way == READ_ONLY else errno.ENOSPC
            raise OSError(number, os.strerror(number), str(arguments[0]))


DISK = Disk()
sys.addaudithook(DISK.hear)  # for good: nothing takes it away again


@pytest.fixture
def disk() -> Iterator[Disk]:
    yield DISK
    DISK.work_again()


def same(one: Path, other: Path) -> bool:
    names = ["metrics.csv", "weights.csv", *(f"model/{path.name}" for path in (other / "model").iterdir())]
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def exit_code(arguments: list[str]) -> int | str:
    """The run's exit code, or its traceback."""
    try:
        return train_bilevel.main(arguments)
    except Exception:
        return traceback.format_exc()


def test_from_the_nth_write_on(tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture):
    data = make_data(tmp_path / "data", size=24)
    train(data, tmp_path / "warm", **RUN)
    (tmp_path / "whole").mkdir()
    arguments = settings(data, tmp_path / "whole" / "r", **RUN)
    disk.watch(tmp_path / "whole" / "r")
    assert train_bilevel.main(arguments) == 0
    writes = disk.count
    disk.work_again()
    assert writes > 30
    if os.environ.get("NTH_WRITE"):
        cases = [(n, way) for n in range(int(os.environ["NTH_WRITE"]), writes + 1) for way in SAID]
    else:
        cases = [(n, [*SAID][n % 3]) for n in range(1, writes + 1, 4)]
    problems = []
    for n, way in cases:
        out = tmp_path / f"r{n}-{[*SAID].index(way)}"
        arguments = settings(data, out, **RUN)
        disk.watch(out, n, way)
        code = exit_code(arguments)
        disk.work_again()
        said = "".join(capsys.readouterr())
        finished = (out / "weights.csv").exists() and not (out / "lock").exists()
        again = exit_code(arguments)
        told = code == 0 or SAID[way] in said
        right = code in (0, 1, 2) and told and again == (2 if finished else 0) and same(out, tmp_path / "whole" / "r")
        if not right or "Traceback" in said:
            problems.append((n, way, code, said, again, "".join(capsys.readouterr())))
        capsys.readouterr()
    assert not problems, f"{len(problems)} of {len(cases)}: {problems[:9]}"
