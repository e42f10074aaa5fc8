"""Nothing that the program did not write is opened for writing, renamed over or removed, and a dry run writes nothing.

Each entry is tried against a folder that is full of a user's files with the names of ours.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from run_helpers import finished_run, settings

import train_bilevel
from bilevel.compare import command as compare
from bilevel.evaluate import command as evaluate
from bilevel.export import command as export
from bilevel.report import command as report
from bilevel.run import lock
from bilevel.run.preflight import FILES, FOLDERS

pytestmark = pytest.mark.usefixtures("no_old_log")

NAMES = [*FILES, *(f"{name}.new" for name in FILES), "lock", "compare.yaml", "results.csv", "compare.csv", "compare.md"]


def state(folder: Path) -> dict[str, tuple]:
    """All that can be told of a folder's files: what they are, their bytes, inode and times of change."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (facts.st_mode, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, content)
    return found


def fill(folder: Path, **others: str) -> Path:
    """A user's files under the names of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_text(f"mine: {name}\n")
    for name in FOLDERS:
        (folder / name / "step_000002").mkdir(parents=True)
        (folder / name / "step_000002" / "notes.txt").write_text("mine")
    for name, content in others.items():
        (folder / name).write_text(content)
    return folder


def test_a_run_or_its_dry_run_touches_no_file_of_a_user(data: Path, tmp_path: Path, capsys):
    """With the user's lock, without it, and with a config.yaml that says what the run would."""
    out = fill(tmp_path / "mine")
    arguments = settings(data, out)
    train_bilevel.main([*settings(data, tmp_path / "other"), "--dry_run"])
    same = yaml.safe_load(capsys.readouterr().out) | {"output_dir": str(out)}
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: (out / "lock").unlink(),
        lambda: (out / "config.yaml").write_text(yaml.safe_dump(same)),  # and weights.csv: a finished run
        lambda: (out / "config.yaml").unlink(),
    ]
    for change in steps:
        change()
        before = state(out)
        for flags in (["--dry_run"], []):
            assert train_bilevel.main([*arguments, *flags]) == 2
            assert str(out) in capsys.readouterr().err and state(out) == before


KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("mine"),
    "empty": lambda path: path.write_text(""),
    "link": lambda path: path.symlink_to(path.parent.parent / "target"),
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_no_run_wrote(data: Path, tmp_path: Path, capsys, kind: str):
    out = tmp_path / "r"
    out.mkdir()
    (tmp_path / "target").write_text("the link's target")
    KINDS[kind](out / "lock")
    before = state(tmp_path)
    arguments = settings(data, out)
    before |= {str(out.with_suffix(".yaml")): state(tmp_path)[str(out.with_suffix(".yaml"))]}
    for flags in (["--dry_run"], []):
        assert train_bilevel.main([*arguments, *flags]) == 2
        assert f"{out / 'lock'} is there and was not written by a run" in capsys.readouterr().err
        assert state(tmp_path) == before


@pytest.mark.parametrize("name", [*FILES[2:], *FOLDERS])
def test_a_link_or_fifo_in_an_unfinished_run(data: Path, tmp_path: Path, capsys, name: str):
    """Another has put it there: the run would write through it, or wait for ever."""
    out = tmp_path / "r"
    (tmp_path / "target").write_text("mine")
    arguments = settings(data, out)
    assert train_bilevel.main([*arguments, "--dry_run"]) == 0
    out.mkdir()
    (out / "config.yaml").write_text(capsys.readouterr().out)
    for make in (lambda path: path.symlink_to(tmp_path / "target"), os.mkfifo):
        make(out / name)
        before = state(tmp_path)
        for flags in (["--dry_run"], []):
            assert train_bilevel.main([*arguments, *flags]) == 2
            assert str(out) in capsys.readouterr().err and state(tmp_path) == before
        (out / name).unlink()


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path, monkeypatch):
    """Into a folder that is not there, one that is empty, and one of a run that was killed."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "new" / "r"
    arguments = settings(data, tmp_path / "conf")
    for prepare in (lambda: None, lambda: out.mkdir(parents=True), lambda: lock.hold(out).close()):
        prepare()
        before = state(tmp_path)
        assert train_bilevel.main([*arguments, "--output_dir", str(out), "--dry_run"]) == 0
        assert state(tmp_path) == before


def test_nothing_given_as_out_is_replaced(data: Path, tmp_path: Path, capsys):
    """bilevel.report, export and evaluate: neither the file, nor a link to nowhere, nor a neighbour."""
    run = finished_run(
        tmp_path / "run",
        [data / "train_clean.json", data / "train_noisy.json"],
        pd.DataFrame({"source": ["train_clean", "train_noisy"], "weight": [0.9, 0.1], "samples": [96, 96]}),
    )
    programs = {"page.html": report.main, "kept.jsonl": export.main, "judged.json": evaluate.main}
    for name, program in programs.items():
        for kind in ("file", "link", "FIFO"):
            KINDS[kind](tmp_path / name)
            before = state(tmp_path)
            assert program([str(run), "--out", str(tmp_path / name)]) == 2
            said = capsys.readouterr().err
            assert "the file exists and is" in said and "overwritten" in said and state(tmp_path) == before
            (tmp_path / name).unlink()
    for name in ("page.html.new", ".page.html.new", "kept.jsonl.new"):
        (tmp_path / name).write_text("mine")
    before = state(tmp_path)
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert export.main([str(run), "--keep", "0.5", "--out", str(tmp_path / "kept.jsonl")]) == 0
    after = state(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {str(tmp_path / "page.html"), str(tmp_path / "kept.jsonl")}


@pytest.mark.parametrize("there", [True, False], ids=["all names", "only a lock"])
def test_a_comparison_touches_no_file_of_a_user(data: Path, tmp_path: Path, capsys, there: bool):
    out = tmp_path / "out"
    if there:
        fill(out)
    else:
        out.mkdir()
        (out / "lock").write_text("mine")
    config = Path(settings(data, tmp_path / "conf")[1])
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({k: v for k, v in values.items() if k not in ("output_dir", "tracker")}))
    before = state(out)
    assert compare.main([str(config), "--methods", "f2sa", "--seeds", "1", "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err and state(out) == before


@pytest.mark.parametrize("name", ["config", "deepspeed", "x_init", "resume", "train_data", "val_data"])
def test_only_regular_files_are_read(data: Path, tmp_path: Path, capsys, name: str):
    """A FIFO for each file that a setting can name: a message at once, where reading it would wait for ever."""
    os.mkfifo(tmp_path / "fifo.json")
    arguments = settings(data, tmp_path / "r", **({"backend": "deepspeed"} if name == "deepspeed" else {}))
    assert train_bilevel.main([*arguments, f"--{name}", str(tmp_path / "fifo.json")]) == 2
    assert "fifo.json" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_an_output_dir_that_cannot_be_written_is_told_at_once(data: Path, tmp_path: Path, monkeypatch, capsys):
    """Also in a dry run. root may write everywhere, so that the answer of the system is put in its place."""
    (tmp_path / "file").write_text("mine")
    arguments = settings(data, tmp_path / "conf")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    for out, why in ((tmp_path / "r" / "s", "cannot be written"), (tmp_path / "file" / "r", "Not a directory")):
        for flags in (["--dry_run"], []):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_bilevel, "setup", None)  # before anything is loaded
                assert train_bilevel.main([*arguments, "--output_dir", str(out), *flags]) == 2
            assert f"output_dir {out}" in (said := capsys.readouterr().err) and why in said
