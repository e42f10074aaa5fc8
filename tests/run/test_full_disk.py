"""A disk that takes nothing more: run.log, the screen and the lock; test_nth_write.py tries every write of a run."""

import errno
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import settings

import train_bilevel
from bilevel.run import lock, messages


def test_a_log_that_cannot_be_written_is_told_once(tmp_path: Path, capsys) -> None:
    before, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run.log"
    handler = messages._LogFile(path, encoding="utf-8")
    said = [logging.makeLogRecord({"msg": f"message {number}"}) for number in range(4)]
    handler.emit(said[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        handler.emit(said[1])
        handler.emit(said[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    handler.emit(said[3])
    handler.close()
    assert capsys.readouterr().err == f"{path} CANNOT BE WRITTEN: [Errno 27] File too large. The run goes on\n"
    assert path.read_text().split("\n") == ["message 0", "message 1", "message 2", "message 3", ""]


def test_a_mistake_in_a_message_is_still_shown(capsys) -> None:
    handler = messages._Screen(sys.stdout)
    handler.emit(logging.makeLogRecord({"msg": "%d", "args": ("word",)}))
    assert "Logging error" in capsys.readouterr().err


def test_a_screen_that_is_gone_is_told_once(capsys) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self) -> None:
            pass

    handler = messages._Screen(Gone())
    for _ in range(2):
        handler.emit(logging.makeLogRecord({"msg": "message"}))
    assert capsys.readouterr().err == "the screen (stdout) CANNOT BE WRITTEN: [Errno 32] Broken pipe. The run goes on\n"


@pytest.mark.usefixtures("no_old_log")
def test_a_lock_that_cannot_be_removed(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """After a run, and again when the same command has only the lock left to remove."""
    arguments = settings(data, tmp_path / "r", max_steps=1, save_every=0, global_batch_size=4, val_batch_size=4)
    unlink: Callable = Path.unlink

    def refused(path: Path, *rest, **options) -> None:
        if path.name == lock.NAME:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        unlink(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        assert train_bilevel.main(arguments) == 1
        said = capsys.readouterr().out
        assert "all results are written, but the lock cannot be removed: [Errno 30] Read-only file system" in said
        assert train_bilevel.main(arguments) == 2
        assert "the lock cannot be removed: [Errno 30] Read-only file system" in capsys.readouterr().err
    assert (tmp_path / "r" / "lock").exists() and (tmp_path / "r" / "report.html").exists()
    assert train_bilevel.main(arguments) == 0
    assert not (tmp_path / "r" / "lock").exists()
