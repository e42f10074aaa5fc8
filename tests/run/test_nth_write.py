"""A disk that is full, or read-only, from the n-th write of a run on: a message, and the same command ends it as usual.

root may write everywhere, so writes are counted and refused by a hook. A few n are taken; all of them:

    NTH_WRITE=1 python -m pytest tests/run/test_nth_write.py
"""

import errno
import filecmp
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from run_helpers import settings, train

import train_bilevel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_old_log")]

RUN = {"max_steps": 4, "save_every": 2, "eval_every": 2}
WRITING = {"os.mkdir", "os.rename", "os.link", "os.truncate", "os.symlink"}
FEW = (1, 3, 8, 15, 22, 29, 36)


class Disk:
    """Counts the writes below a folder, and refuses them from one on."""

    def __init__(self) -> None:
        self.folder, self.refuse_from, self.error, self.count = "", 0, errno.ENOSPC, 0

    def watch(self, folder: Path, refuse_from: int = sys.maxsize, error: int = errno.ENOSPC) -> None:
        self.folder, self.refuse_from, self.error, self.count = str(folder), refuse_from, error, 0

    def write(self, path: object) -> None:
        if self.folder and isinstance(path, (str, Path)) and str(path).startswith(self.folder):
            self.count += 1
            if self.count >= self.refuse_from:
                raise OSError(self.error, os.strerror(self.error), str(path))

    def hear(self, event: str, arguments: tuple) -> None:
        """An audit hook: what raises here does not happen."""
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.write(path)
        elif event in WRITING:
            self.write(arguments[0])


DISK = Disk()
sys.addaudithook(DISK.hear)  # for good: nothing takes it away again


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The hook, which hears of what Python opens; safetensors and fsync tell it themselves."""
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda what, path: (DISK.write(path), save(what, path)))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (DISK.write(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    yield DISK
    DISK.watch(Path(""))
    DISK.folder = ""


def same(one: Path, other: Path) -> bool:
    names = ["metrics.csv", "weights.csv", *(f"model/{path.name}" for path in (other / "model").iterdir())]
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def test_from_the_nth_write_on(data: Path, tmp_path: Path, disk: Disk, capsys):
    train(data, tmp_path / "warm", **RUN)
    (tmp_path / "whole").mkdir()
    arguments = settings(data, tmp_path / "whole" / "r", **RUN)
    disk.watch(tmp_path / "whole" / "r")
    assert train_bilevel.main(arguments) == 0
    writes, disk.folder = disk.count, ""
    assert writes > max(FEW)
    for n in range(1, writes + 1) if os.environ.get("NTH_WRITE") else FEW:
        out = tmp_path / f"r{n}"
        arguments = settings(data, out, **RUN)
        disk.watch(out, n, errno.ENOSPC if n % 2 else errno.EROFS)
        code = train_bilevel.main(arguments)
        disk.folder = ""
        said = "".join(capsys.readouterr())
        assert code in (0, 1, 2) and "Traceback" not in said, n
        assert code == 0 or "No space left" in said or "Read-only file system" in said, (n, said)
        finished = (out / "weights.csv").exists() and not (out / "lock").exists()
        assert train_bilevel.main(arguments) == (2 if finished else 0), (n, "".join(capsys.readouterr()))
        assert same(out, tmp_path / "whole" / "r"), n
