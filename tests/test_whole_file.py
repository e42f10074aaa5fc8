"""Files are whole or as before."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

from bilevel.files import whole_file


@pytest.mark.parametrize("shared", [False, True])
def test_it_takes_its_place_when_all_is_written(tmp_path: Path, shared: bool):
    path = tmp_path / "file.csv"
    path.write_text("before")
    with whole_file(path, shared) as new:
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
    with whole_file(path) as new:
        new.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path):
    path = tmp_path / "file.csv"
    with whole_file(path, shared=True) as first, whole_file(path, shared=True) as second:
        first.write_text("one")
        second.write_text("two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
