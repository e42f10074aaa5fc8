"""Files are whole or as before."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

from bilevel.errors import DataError
from bilevel.files import content_hash, is_unfinished, open_regular, whole_file


def test_it_takes_its_place_when_all_is_written(tmp_path: Path):
    path = tmp_path / "file.csv"
    path.write_text("before")
    with whole_file(path) as new:
        new.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "file.csv"
    path.write_text("before")
    with pytest.raises(error), whole_file(path) as new:
        new.write_text("aft")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_killed_writer_leaves_what_was_there_and_the_next_one_goes_on(tmp_path: Path):
    path = tmp_path / "file.csv"
    path.write_text("before")
    code = "import os, pathlib, sys; from bilevel.files import whole_file\n"
    code += "with whole_file(pathlib.Path(sys.argv[1])) as new: new.write_text('aft'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -9
    assert path.read_text() == "before"
    (left,) = [file for file in tmp_path.iterdir() if file != path]
    assert is_unfinished(left.name) and left.read_text() == "aft"
    with whole_file(path) as new:
        new.write_text("after")
    assert path.read_text() == "after" and sorted(tmp_path.iterdir()) == [left, path]


def test_files_with_the_names_of_other_tools_stay(tmp_path: Path):
    """The new file's name is random and exclusive: no file of a user is opened, replaced or removed."""
    path, others = tmp_path / "page.html", [tmp_path / name for name in ("page.html.new", ".page.html", "new")]
    for other in others:
        other.write_text("mine")
    with whole_file(path) as new:
        new.write_text("after")
    assert [other.read_text() for other in others] == ["mine"] * 3 and path.read_text() == "after"
    assert not any(is_unfinished(other.name) for other in others)
    assert is_unfinished(".tmpmZipK6") and not is_unfinished(".tmp") and not is_unfinished(".tmp_notes.txt")


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("links", [False, True], ids=["no hard links", "hard links"])
def test_what_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path, monkeypatch, link: bool, links: bool):
    """A file or a link that leads nowhere, also one that comes while the new file is written."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    path = tmp_path / "file.csv"
    with pytest.raises(FileExistsError), whole_file(path, replace=False) as new:
        new.write_text("after")
        path.symlink_to("nowhere") if link else path.write_text("mine")
    assert path.is_symlink() == link and (link or path.read_text() == "mine")
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    with whole_file(path, replace=False) as new:
        new.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_only_regular_files_are_read(tmp_path: Path):
    """A FIFO would wait for ever and a device may have no end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(DataError, match="not a regular file"):
            content_hash(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    (tmp_path / "file").write_text("content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path):
    path = tmp_path / "file.csv"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("one")
        second.write_text("two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
