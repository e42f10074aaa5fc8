"""data_alpaca_0.5/process.py: it replaces only files of its own; --if-needed; the command itself."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
from process_helpers import (
    FILES,
    FOLDER,
    contents,
    load_program,
    make,
    records,
    sample,
    write_source,
)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path)


def test_a_file_of_the_user_is_not_replaced(program, source, tmp_path, capsys):
    out = tmp_path / "out"
    for name in FILES:
        target = out / name
        target.parent.mkdir(parents=True)
        target.write_text("mine")
        assert program.main(["--source", str(source), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert name in error and "--force" in error and "Traceback" not in error
        assert contents(out) == {name: b"mine"}
        shutil.rmtree(out)


def test_own_files_are_replaced_until_someone_changes_one(program, source, tmp_path, capsys):
    out = tmp_path / "out"
    make(program, source, out)
    make(program, source, out, "--seed", 1)
    (out / "val.json").write_text("edited")
    before = contents(out)
    assert program.main(["--source", str(source), "--out", str(out), "--seed", "2"]) == 2
    error = capsys.readouterr().err
    assert "val.json" in error and "test.json" not in error
    assert contents(out) == before
    made = make(program, source, out, "--seed", 2, "--force")
    assert len(made["val.json"]) == 10


def test_stale_files_are_removed_only_if_they_are_our_own(program, source, tmp_path):
    out = tmp_path / "out"
    assert "train_noisy.json" in make(program, source, out)
    assert "train_noisy.json" not in make(program, source, out, "--corruption_rate", 0)
    made = make(program, source, out, "--corruption_rate", 1)
    assert "train_noisy.json" in made and "train_clean.json" not in made
    (out / "train_clean.json").write_text("")
    assert program.main(["--source", str(source), "--out", str(out), "--corruption_rate", "1"]) == 2
    assert (out / "train_clean.json").read_text() == ""


def test_a_foreign_manifest_is_in_the_way(program, source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "process.json").write_text('{"made_by": "someone else"}')
    assert program.main(["--source", str(source), "--out", str(out)]) == 2
    assert "process.json" in capsys.readouterr().err
    assert list(contents(out)) == ["process.json"]


def test_interrupted_renaming_can_be_repeated(program, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(program, source, out)
    replace, left = program.write.__globals__["os"].replace, [2]

    def fail_later(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("disk gone")
        replace(a, b)

    monkeypatch.setattr("os.replace", fail_later)
    assert program.main(["--source", str(source), "--out", str(out), "--seed", "1"]) == 2
    monkeypatch.undo()
    assert set(contents(out)) == {*FILES, "process.json"}, "temporary files left"
    make(program, source, out, "--seed", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped folder with a small data set, whose constants a test may edit."""
    copy = tmp_path / "data"
    (copy / "generator").mkdir(parents=True)
    for name in ("process.py", "generator/dataset_files.py"):
        shutil.copy(FOLDER / name, copy / name)
    (copy / "alpaca_synthetic.json").write_text(json.dumps(sample(40)))
    return copy


def launch(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """What the command would do, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = load_program(folder).main(list(flags))
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def needed(folder: Path, *flags: str) -> bool:
    """Run with --if-needed; whether it wrote anything."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    result = launch(folder, "--if-needed", *flags)
    assert result.returncode == 0, result.stderr
    changed = before != {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert bool(result.stdout) == changed and not result.stderr
    return changed


def edit(folder: Path, before: str, after: str) -> None:
    text = (folder / "process.py").read_text()
    assert text.count(before) == 1
    (folder / "process.py").write_text(text.replace(before, after))


def noisy_count(folder: Path) -> int:
    return len(records(folder / "train_noisy.json"))


def test_if_needed_follows_constants_and_source(folder):
    assert needed(folder) and noisy_count(folder) == 16
    assert not needed(folder)
    edit(folder, "CORRUPTION_RATE = 0.5", "CORRUPTION_RATE = 0.25")
    assert needed(folder) and noisy_count(folder) == 8
    assert not needed(folder)
    (folder / "alpaca_synthetic.json").write_text(json.dumps(sample(80)))
    assert needed(folder) and noisy_count(folder) == 16
    (folder / "test.json").unlink()
    assert needed(folder) and not needed(folder)


def test_if_needed_keeps_what_was_made_with_flags(folder):
    assert launch(folder, "--corruption_rate", "0.75").returncode == 0
    edit(folder, "SEED = 0", "SEED = 5")
    assert not needed(folder) and noisy_count(folder) == 24
    (folder / "val.json").unlink()
    assert needed(folder) and noisy_count(folder) == 24, "the flags of the earlier run count"
    assert needed(folder, "--corruption_rate", "0.5") and noisy_count(folder) == 16
    assert not needed(folder, "--corruption_rate", "0.5")


def test_if_needed_does_without_the_source_of_a_run_with_flags(folder, source):
    assert launch(folder, "--source", str(source)).returncode == 0
    source.unlink()
    assert not needed(folder) and noisy_count(folder) == 42


def test_if_needed_leaves_files_without_manifest_alone(folder):
    for name in ("train_mine.json", "mixed/train_mixed.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        assert not needed(folder)
        (folder / name).unlink()
    assert needed(folder)


def test_if_needed_does_not_replace_an_edited_file(folder):
    assert needed(folder)
    (folder / "train_noisy.json").write_text("edited")
    assert not needed(folder)
    edit(folder, 'CORRUPTION = "empty"', 'CORRUPTION = "dot"')
    result = launch(folder, "--if-needed")
    assert result.returncode == 2 and "train_noisy.json" in result.stderr
    assert (folder / "train_noisy.json").read_text() == "edited"


@pytest.mark.slow
def test_the_command(folder):
    def start(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-B", str(folder / "process.py"), *flags]
        return subprocess.run(command, cwd="/", capture_output=True, text=True)

    wrong = start("--seed", "x")
    assert wrong.returncode == 2 and wrong.stderr and "Traceback" not in wrong.stderr
    result = start()
    assert result.returncode == 0 and not result.stderr and str(folder) in result.stdout
    assert noisy_count(folder) == 16 and not start("--if-needed").stdout


def test_default_source_and_folder(folder):
    result = launch(folder)
    assert result.returncode == 0 and not result.stderr
    assert {name for name in contents(folder) if name.endswith(".json")} == {
        *FILES,
        "process.json",
        "alpaca_synthetic.json",
    }
    assert str(folder) in result.stdout and all(name in result.stdout for name in FILES)


def test_source_is_never_overwritten(program, source, tmp_path, capsys):
    out = tmp_path / "out"
    make(program, source, out)
    before = contents(out)
    assert program.main(["--source", str(out / "val.json"), "--out", str(out), "--force"]) == 2
    assert "val.json" in capsys.readouterr().err and contents(out) == before


def test_exit_codes_without_traceback(folder):
    edit(folder, "CORRUPTION_RATE = 0.5", 'CORRUPTION_RATE = "half"')
    for flags in ((), ("--seed", "x"), ("--out", str(folder / "process.py"))):
        result = launch(folder, *flags)
        assert result.returncode == 2 and result.stderr and "Traceback" not in result.stderr
    assert not (folder / "train_clean.json").exists()
